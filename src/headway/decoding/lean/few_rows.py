"""The products of few rows by a small C++ kernel, compiled at first use where a compiler is present.

Legend: R rows of the input, D inputs, O outputs.

The kernel reads each weight once and in order, where it lies: no copy in another layout. A row's result does not depend on
what stands beside it, bit for bit. Beyond `MOST_ROWS` rows, and where there is no compiler, other products are used
(`headway.decoding.lean.linear`).
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
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

MOST_ROWS = 16
FLAGS = ("-O3", "-march=native", "-std=c++17", "-fopenmp", "-shared", "-fPIC")

_SOURCE = Path(__file__).with_name("few_rows.cpp")
_COMPILERS = ("c++", "g++", "clang++")

logger = logging.getLogger(__name__)

Kernel = Callable[[Tensor, Tensor, Tensor | None, Tensor], None]
"""(x [R, D], weight [O, D], bias [O] or None, output [R, O] with any row stride) -> None."""


def kernel_for(weight: Tensor) -> Kernel | None:
    """The kernel for products with such a matrix; None where there is none (no compiler, another device or dtype)."""
    if weight.device.type != "cpu" or weight.dtype not in (torch.float32, torch.bfloat16):
        return None
    library = _library()
    if library is None:
        return None
    function = library.headway_linear_float32 if weight.dtype == torch.float32 else library.headway_linear_bfloat16

    def run(x_RD: Tensor, weight_OD: Tensor, bias_O: Tensor | None, out_RO: Tensor) -> None:
        function(
            x_RD.data_ptr(),
            x_RD.shape[0],
            x_RD.shape[1],
            weight_OD.data_ptr(),
            weight_OD.shape[0],
            None if bias_O is None else bias_O.data_ptr(),
            out_RO.data_ptr(),
            out_RO.stride(0),
            torch.get_num_threads(),
        )

    return run


@functools.cache
def _library() -> ctypes.CDLL | None:
    """The compiled kernel, from the user's cache where it was compiled before; None where it cannot be compiled."""
    compiler = _compiler()
    if compiler is None or sys.platform != "linux" or platform.machine() not in ("x86_64", "AMD64"):
        return None
    try:
        library = ctypes.CDLL(str(_compiled(compiler)))
    except (OSError, subprocess.SubprocessError) as error:
        output = getattr(error, "stderr", None) or str(error)
        logger.warning("the kernel for few rows cannot be compiled, other products are used: %s", output.strip()[-300:])
        return None
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    for function in (library.headway_linear_float32, library.headway_linear_bfloat16):
        function.argtypes = [pointer, number, number, pointer, number, pointer, pointer, number, ctypes.c_int]
        function.restype = None
    return library


def _compiler() -> str | None:
    named = os.environ.get("CXX")
    if named:
        return shutil.which(named)
    return next((path for name in _COMPILERS if (path := shutil.which(name))), None)


def _compiled(compiler: str) -> Path:
    """The library's file; named by everything that its code depends on, written aside and moved."""
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True, timeout=30).stdout
    identity = "\n".join((_SOURCE.read_text(), *FLAGS, version, _processor()))
    folder = _cache_folder()
    target = folder / f"few_rows-{hashlib.sha256(identity.encode()).hexdigest()[:16]}.so"
    if target.is_file():
        return target
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    with tempfile.TemporaryDirectory(dir=folder) as aside:
        built = Path(aside) / target.name
        command = [compiler, *FLAGS, str(_SOURCE), "-o", str(built)]
        subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
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
