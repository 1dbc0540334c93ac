"""What a device can do at most, so that a speed can be told as a share of it.

Only dense figures: those with sparsity are twice as high and no training reaches them.
"""

from __future__ import annotations

import time

import torch

from headway.training.precision import Precision

_MEASURED_SECONDS = 0.25
_SIDE = 1024

# TFLOP/s of one GPU, dense: (bfloat16, TF32, float32); None where the maker gives none. From NVIDIA's and AMD's data
# sheets of the product named, figures with sparsity halved. More specific names come first.
_DATA_SHEETS: tuple[tuple[str, tuple[float | None, float | None, float | None]], ...] = (
    ("B200", (2250.0, None, None)),
    ("GH200", (989.4, 494.7, 66.9)),
    ("H200 NVL", (835.5, 417.5, 60.0)),
    ("H200", (989.4, 494.7, 66.9)),
    ("H100 PCIe", (756.0, 378.0, 51.0)),
    ("H100 NVL", (835.5, 417.5, 60.0)),
    ("H100", (989.4, 494.7, 66.9)),
    ("A100", (312.0, 156.0, 19.5)),
    ("A40", (149.7, 74.8, 37.4)),
    ("A10G", (None, None, None)),
    ("A10", (125.0, 62.5, 31.2)),
    ("L40S", (362.0, 183.0, 91.6)),
    ("L40", (181.0, 90.5, 90.5)),
    ("L4", (121.0, 60.0, 30.3)),
    ("RTX A6000", (154.8, 77.4, 38.7)),
    ("RTX 4090", (165.2, 82.6, 82.6)),
    ("RTX 3090", (71.0, 35.6, 35.6)),
    ("MI300X", (1307.4, 653.7, 163.4)),
)


def peak_flops_per_second(wanted: str, *, device: torch.device, precision: Precision) -> float | None:
    """The peak of one device for the precision of the run, or None where it is not known.

    Args:
        wanted: "auto" looks the GPU up by name and knows no CPU; "measure" times matrix products for a quarter of a second;
            a number is TFLOP/s.
        device: of the run.
        precision: of its matrix products.
    """
    if wanted == "measure":
        return measured_peak(device, torch.float32 if precision == "float32" else torch.bfloat16)
    if wanted != "auto":
        return float(wanted) * 1e12
    if device.type != "cuda":
        return None
    return peak_by_name(torch.cuda.get_device_name(device), precision=precision)


def peak_by_name(name: str, *, precision: Precision) -> float | None:
    """The data sheet's figure for a GPU as torch names it; None where the table has none, and for a slice of a GPU.

    >>> peak_by_name("NVIDIA H100 80GB HBM3", precision="bfloat16")
    989400000000000.0
    """
    if " MIG " in f" {name} ":
        return None
    words = f" {name.replace('-', ' ')} "
    for product, (bfloat16, tf32, float32) in _DATA_SHEETS:
        if f" {product} " in words:
            reduced = torch.get_float32_matmul_precision() != "highest"
            peak = bfloat16 if precision != "float32" else tf32 if reduced else float32
            return None if peak is None else peak * 1e12
    return None


def measured_peak(device: torch.device, dtype: torch.dtype) -> float:
    """The best rate of a product of two square matrices, with torch's present number of threads.

    Anything else that runs on the machine lowers it, so that a share of it can come out above what is true.
    """
    square = torch.ones((_SIDE, _SIDE), device=device, dtype=dtype)
    best, began = float("inf"), time.perf_counter()
    while time.perf_counter() - began < _MEASURED_SECONDS or best == float("inf"):
        started = time.perf_counter()
        square @ square
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - started)
    return 2 * _SIDE**3 / best
