"""How the benchmarks measure: interleaved, the median of several, the peak of what torch allocates."""

import platform
import statistics
import time
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

__all__ = ["machine", "median_seconds", "peak_bytes"]


def machine(device: str = "cpu") -> str:
    """Name what the figures were measured on."""
    name = torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()} CPU"
    return f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def median_seconds(forms: dict[str, Callable[[], object]], repeats: int, device: str = "cpu") -> dict[str, float]:
    """Time the forms by turns, after one unmeasured round, and return each one's median."""
    taken: dict[str, list[float]] = {name: [] for name in forms}
    for repeat in range(repeats + 1):
        for name, form in forms.items():
            _synchronise(device)
            start = time.perf_counter()
            form()
            _synchronise(device)
            if repeat:
                taken[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in taken.items()}


def peak_bytes(form: Callable[[], object], device: str = "cpu") -> int:
    """Return the most that torch held at a time for one call, beyond what it held before."""
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        form()
        _synchronise(device)
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        form()
    held = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def _synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
