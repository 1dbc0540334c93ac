"""Our C++ kernel: compiled at first use, and kept in the user's cache folder.

The kernel is compiled for the processor that it will run on, so its paths (AMX tiles, AVX-512 with and without products of
bfloat16, AVX2 with FMA) are chosen by what that processor says of itself; a file is used again only where that is the same.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

# Copies of a loop that the compiler makes (inlined, vectorised, for what is left) must round alike: no contraction of its own.
FLAGS = ("-O3", "-march=native", "-ffp-contract=off", "-std=c++17", "-fopenmp", "-shared", "-fPIC")

_FOLDER = Path(__file__).with_name("kernel")
_SOURCE = _FOLDER / "kernel.cpp"
_COMPILERS = ("c++", "g++", "clang++")

logger = logging.getLogger(__name__)


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernel, from the user's cache where it was compiled before; None where it cannot be compiled."""
    compiler = _compiler()
    if compiler is None or sys.platform != "linux" or platform.machine() not in ("x86_64", "AMD64"):
        return None
    try:
        found = ctypes.CDLL(str(_compiled(compiler)))
    except (OSError, subprocess.SubprocessError) as error:
        output = getattr(error, "stderr", None) or str(error)
        logger.warning("the lean kernel cannot be compiled, other products are used: %s", output.strip()[-300:])
        return None
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    for function in (found.headway_linear_float32, found.headway_linear_bfloat16):
        function.argtypes = [pointer, number, number, pointer, number, pointer, number, number, ctypes.c_int]
        function.restype = None
    for function in (found.headway_layers_float32, found.headway_layers_bfloat16):
        function.argtypes = [pointer, pointer, number]
        function.restype = None
    drafts = (found.headway_chain_float32, found.headway_chain_bfloat16)
    for function in (*drafts, found.headway_draft_float32, found.headway_draft_bfloat16):
        function.argtypes = [pointer]
        function.restype = None
    found.headway_read.argtypes = [pointer, number, ctypes.c_int]
    found.headway_read.restype = ctypes.c_float
    found.headway_instructions.restype = ctypes.c_char_p
    return found


def instructions() -> str:
    """The instructions that the kernel uses here, in words; "none" where it cannot be compiled."""
    found = library()
    return "none" if found is None else found.headway_instructions().decode()


@functools.cache
def has_tiles() -> bool:
    """Whether products of bfloat16 go through AMX tiles, which make up to 16 rows cost what one costs."""
    found = library()
    return found is not None and bool(found.headway_has_tiles())


def forget() -> None:
    """Load the kernel anew at its next use, with what `FLAGS` and the compiler are by then."""
    library.cache_clear()
    has_tiles.cache_clear()


def _compiler() -> str | None:
    named = os.environ.get("CXX")
    if named:
        return shutil.which(named)
    return next((path for name in _COMPILERS if (path := shutil.which(name))), None)


def _compiled(compiler: str) -> Path:
    """The library's file; named by everything that its code depends on, written aside and moved."""
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True, timeout=30).stdout
    sources = [path.read_text() for path in sorted(_FOLDER.iterdir()) if path.suffix in (".cpp", ".hpp")]
    identity = "\n".join((*sources, *FLAGS, version, _processor()))
    folder = _cache_folder()
    target = folder / f"kernel-{hashlib.sha256(identity.encode()).hexdigest()[:16]}.so"
    if target.is_file():
        return target
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    with tempfile.TemporaryDirectory(dir=folder) as aside:
        built = Path(aside) / target.name
        command = [compiler, *FLAGS, str(_SOURCE), "-o", str(built)]
        subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
        built.replace(target)
    return target


def _processor() -> str:
    """What -march=native depends on; a home folder may be shared by different machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith("flags")), platform.processor())


def _cache_folder() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(root) / "headway" / "kernels"
