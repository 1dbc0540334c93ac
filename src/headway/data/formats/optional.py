"""Packages that only some formats need."""

from __future__ import annotations

import importlib
from typing import Any

from headway.errors import DataError


def optional_package(name: str, *, needed_for: str) -> Any:
    """Import a package of the extra `datasets`.

    Raises:
        DataError: it is not installed; the command that installs it is given.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise DataError(
            f"{needed_for} needs the package {name.split('.')[0]}, which is not installed ({error}); install it with "
            f"pip install 'headway[datasets]'"
        ) from error
