"""Devices to plan for: peak rates, memory and bandwidth by data sheet, or this machine's, measured."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from headway.errors import ConfigError
from headway.training.fields import nearest
from headway.training.peak import measured_peak, peak_by_name
from headway.training.precision import Precision

THIS = "this"

# Memory in GB and bandwidth in TB/s, by the makers' data sheets; peaks: headway.training.peak.
_DATA_SHEETS: dict[str, tuple[float, float]] = {
    "A10": (24, 0.6),
    "A100": (80, 2.039),
    "A100 40GB": (40, 1.555),
    "B200": (180, 8.0),
    "H100": (80, 3.35),
    "H100 PCIe": (80, 2.0),
    "H200": (141, 4.8),
    "L4": (24, 0.3),
    "L40S": (48, 0.864),
    "MI300X": (192, 5.3),
    "RTX 3090": (24, 0.936),
    "RTX 4090": (24, 1.008),
    "RTX A6000": (48, 0.768),
}
_GPU_MFU = 0.4
# Of 2 cores with AMX, models of 10M and 30M (docs/LOG.md has no larger ones): what the step reaches of the matrix peak.
_CPU_MFU = {"float32": 0.55, "bfloat16": 0.2, "bfloat16-residual": 0.2}
_COPIED_BYTES = 2**26
_COPIES = 5


@dataclass(frozen=True)
class Device:
    """What a plan needs to know of a device.

    Attributes:
        name: of the product, or of this machine.
        flops_per_second: dense peak in the run's precision.
        memory_bytes: None where it is not known.
        bytes_per_second: of its memory.
        assumed_mfu: share of the peak that a training step is assumed to reach.
        measured: whether peak and bandwidth were measured here instead of read from a data sheet.
    """

    name: str
    flops_per_second: float
    memory_bytes: int | None
    bytes_per_second: float
    assumed_mfu: float
    measured: bool


def device_to_plan_for(name: str, *, precision: Precision) -> Device:
    """A device by name, or this machine's.

    Args:
        name: of a product, such as H100; "this" measures this machine's GPU, or its CPU where it has none.
        precision: of the run's matrix products.

    Raises:
        ConfigError: no such device, or one without a peak for this precision.
    """
    if name == THIS:
        return _this(precision)
    found = next((known for known in _DATA_SHEETS if known.lower() == name.lower()), None)
    if found is None:
        raise ConfigError(f"unknown device {name!r}; {nearest(name, [*_DATA_SHEETS, THIS])}")
    peak = peak_by_name(found, precision=precision)
    if peak is None:
        raise ConfigError(
            f"the data sheet of {found} gives no peak for precision={precision}; pass --precision bfloat16"
        )
    gigabytes, terabytes_per_second = _DATA_SHEETS[found]
    return Device(found, peak, round(gigabytes * 1e9), terabytes_per_second * 1e12, _GPU_MFU, measured=False)


def _this(precision: Precision) -> Device:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.float32 if precision == "float32" else torch.bfloat16
    name, memory, mfu = f"this CPU, {torch.get_num_threads()} threads", None, _CPU_MFU[precision]
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        name, memory, mfu = properties.name, int(properties.total_memory), _GPU_MFU
    return Device(name, measured_peak(device, dtype), memory, _measured_bandwidth(device), mfu, measured=True)


def _measured_bandwidth(device: torch.device) -> float:
    """Bytes read and written per second by the best of some copies."""
    source = torch.zeros(_COPIED_BYTES, dtype=torch.uint8, device=device)
    target, best = torch.empty_like(source), float("inf")
    for _ in range(_COPIES):
        began = time.perf_counter()
        target.copy_(source)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - began)
    return 2 * _COPIED_BYTES / best
