"""Where time, memory and energy go: phase timers, tokens per second, MFU, resident memory, NVML energy."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import psutil
import torch

PEAK_BF16_FLOPS = {
    "H200": 989e12,
    "H100": 989e12,
    "A100": 312e12,
    "B200": 2250e12,
    "L40S": 362e12,
}  # dense, vendor figures


class Phases:
    """Wall seconds by phase; a phase entered twice adds up."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def add(self, other: Phases) -> None:
        for name, seconds in other.seconds.items():
            self.seconds[name] = self.seconds.get(name, 0.0) + seconds


def memory_gib(device: torch.device) -> dict[str, float]:
    """Resident memory of this process and its children, and the accelerator's peak since the last call."""
    me = psutil.Process()
    resident = me.memory_info().rss
    for child in me.children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            resident += child.memory_info().rss
    out = {"memory/resident_gib": resident / 2**30}
    if device.type == "cuda":
        out["memory/gpu_peak_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
        torch.cuda.reset_peak_memory_stats(device)
    return out


def mfu(parameters: int, tokens: int, seconds: float, world: int, device: torch.device) -> float | None:
    """Model FLOPs utilisation of training: 6 * parameters * tokens over the peak of all devices; None where it is
    unknown."""
    if device.type != "cuda" or seconds <= 0:
        return None
    name = torch.cuda.get_device_name(device)
    peak = next((flops for key, flops in PEAK_BF16_FLOPS.items() if key in name), None)
    return None if peak is None else 6 * parameters * tokens / (seconds * world * peak)


class Energy:
    """Joules of this rank's GPU since the start, by NVML; None without one."""

    def __init__(self, device: torch.device):
        self._handle, self._start = None, 0
        if device.type == "cuda":
            try:
                import pynvml

                pynvml.nvmlInit()
                uuid = torch.cuda.get_device_properties(device).uuid
                self._handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}".encode())
                self._start = pynvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)
            except Exception:  # NVML is optional: absent in containers, or without this counter
                self._handle = None

    def joules(self) -> float | None:
        if self._handle is None:
            return None
        import pynvml

        return (pynvml.nvmlDeviceGetTotalEnergyConsumption(self._handle) - self._start) / 1000
