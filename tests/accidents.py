"""What can happen in the middle of writing: Ctrl-C, a full disk."""

from __future__ import annotations

from typing import Any

from headway.errors import CheckpointError


def stop(*args: Any, **kwargs: Any) -> None:
    raise KeyboardInterrupt


def full(*args: Any, **kwargs: Any) -> None:
    raise OSError(28, "No space left on device")


ACCIDENTS: list[tuple[Any, type[BaseException]]] = [(stop, KeyboardInterrupt), (full, CheckpointError)]
"""(what is called instead of a writer, what the caller of the command gets)."""
