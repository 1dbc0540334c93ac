"""Where a result comes from: versions, commit, date, command line and machine.

Every file of results that headway writes carries this record. It names no folder and no host, so that it can be
committed and shared: an argument that is an absolute path is cut to what lies below the working directory, or to its
last name; the program to its name.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path, PurePath
from typing import Any

_PACKAGES = ("headway", "torch", "transformers", "tokenizers", "numpy")


def provenance(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Return a JSON-ready record of what made a result; imports neither torch nor transformers.

    Args:
        argv: the command line to record; `sys.argv` where not given.

    Returns:
        `versions` (python and packages; None where not installed), `commit` and `modified` (of the checkout that
        headway runs from; None outside one), `date` (UTC, ISO 8601, seconds), `argv`, and `machine`: `system`, `cpu`,
        `cores` (usable by this process) and `threads` (of torch where it is loaded, else what the environment asks
        for, else None).
    """
    commit, modified = _checkout_state()
    program, *arguments = sys.argv if argv is None else argv
    return {
        "versions": package_versions(),
        "commit": commit,
        "modified": modified,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "argv": [Path(program).name, *(_without_absolute_path(argument) for argument in arguments)],
        "machine": {
            "system": f"{platform.system()} {platform.machine()}",
            "cpu": cpu_model(),
            "cores": usable_cores(),
            "threads": compute_threads(),
        },
    }


def package_versions() -> dict[str, str | None]:
    """Versions of Python and of the packages that decide results, read from their metadata; None where absent."""
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return versions


def cpu_model() -> str | None:
    """The processor's trade name, or None where the system does not tell."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip().lower() in ("model name", "cpu model", "hardware"):
                return value.strip()
    if sys.platform == "darwin":
        return _output_of(["sysctl", "-n", "machdep.cpu.brand_string"])
    return platform.processor() or None


def usable_cores() -> int:
    """Logical cores this process may use, which can be fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def compute_threads() -> int | None:
    """Threads of one operation: torch's own number where torch is loaded, else OMP_NUM_THREADS, else None."""
    torch = sys.modules.get("torch")
    if torch is not None:
        return int(torch.get_num_threads())
    requested = os.environ.get("OMP_NUM_THREADS", "")
    return int(requested) if requested.isdecimal() else None


def _checkout_state() -> tuple[str | None, bool | None]:
    package = Path(__file__).resolve().parent
    top = _output_of(["git", "-C", str(package), "rev-parse", "--show-toplevel"])
    # An installed headway may lie inside a virtual environment of somebody else's checkout: that commit is not ours.
    if top is None or Path(top).resolve() / "src" / "headway" != package:
        return None, None
    commit = _output_of(["git", "-C", top, "rev-parse", "HEAD"])
    if commit is None:
        return None, None
    changes = _output_of(["git", "-C", top, "status", "--porcelain", "--untracked-files=no"])
    return commit, None if changes is None else changes != ""


def _output_of(command: list[str]) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _without_absolute_path(argument: str) -> str:
    name, equals, value = argument.partition("=") if argument.startswith("-") else ("", "", argument)
    if not PurePath(value).is_absolute():
        return argument
    path, here = PurePath(value), Path.cwd()
    return f"{name}{equals}{path.relative_to(here) if path.is_relative_to(here) else path.name}"
