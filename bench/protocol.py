"""How every kernel is measured: the error against float64 first, then the time, then the memory, beside its floor.

    compare("linear_logprob", case, providers, oracle, floor)  ->  rows, printed as a table

A provider is a function of no arguments that does one call and returns a dict of tensors, or a string that says why
it is absent. Providers are interleaved round by round, so that a noisy machine is noisy for all of them; the numbers
are medians with the 20th and 80th percentiles. CUDA times are of CUDA events, after a write that evicts the L2 cache.
On the CPU with one thread the clock is the process's CPU time, which waiting for a busy machine does not lengthen;
with more it is wall time. The floor is a call too, interleaved with the others: the work that no method can avoid,
and nothing else. Memory is the peak above what was held before the call, less what the call returns (CUDA: the
allocator's; CPU: resident, with freed pages returned first).
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from datetime import date
from importlib import metadata
from pathlib import Path

import torch

Provider = Callable[[], dict[str, torch.Tensor]]


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def device_name() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    names = (
        [
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ]
        if Path("/proc/cpuinfo").exists()
        else []
    )
    return f"{names[0] if names else platform.processor()}, {torch.get_num_threads()} thread(s)"


def versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "torch": torch.__version__, "cuda": str(torch.version.cuda)}
    for name in ("triton", "liger_kernel", "cut_cross_entropy", "trl"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "absent"
    return found


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want).norm() / want.norm().clamp_min(1e-300))


def errors(got: dict[str, torch.Tensor], oracle: dict[str, torch.Tensor]) -> dict[str, float]:
    """Largest absolute error of a [N] result, relative norm of a matrix; infinite where a value is not finite."""
    out = {}
    for name, want in oracle.items():
        if name in got:
            value = relative(got[name], want) if want.dim() > 1 else float((got[name].double() - want).abs().max())
            out[name] = value if value == value else float("inf")
    return out


def _resident() -> tuple[int, int]:
    """(now, peak) resident bytes of this process."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return tuple(int(fields[k].split()[0]) << 10 for k in ("VmRSS", "VmHWM"))  # type: ignore[return-value]


def _bytes(results: dict[str, torch.Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in results.values())


def peak_bytes(call: Provider) -> int | None:
    """Peak memory beyond the inputs and the results; None where it cannot be read."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        results = call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before - _bytes(results)
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # peak := now
        before = _resident()[0]
        results = call()
        return max(0, _resident()[1] - before - _bytes(results))
    except OSError:
        return None


def _seconds(call: Provider, flush: torch.Tensor | None) -> float:
    if flush is None:
        clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
        start = clock()
        call()
        return clock() - start
    flush.zero_()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3


def interleaved(providers: dict[str, Provider], rounds: int, warmup: int) -> dict[str, list[float]]:
    flush = torch.empty(256 << 20, dtype=torch.int8, device="cuda") if torch.cuda.is_available() else None
    times: dict[str, list[float]] = {name: [] for name in providers}
    for r in range(warmup + rounds):
        for name, call in providers.items():
            seconds = _seconds(call, flush)
            if r >= warmup:
                times[name].append(seconds)
    return times


def compare(
    kernel: str,
    case: dict,
    providers: dict[str, Provider | str],
    oracle: dict[str, torch.Tensor],
    floor: Provider,
    *,
    floor_scale: float = 1.0,
    rounds: int | None = None,
    warmup: int | None = None,
) -> list[dict]:
    """One row per provider; a provider that raises is reported with its exception and left out of the timing. The floor
    is `floor_scale` times the time of `floor`."""
    rounds = rounds or (30 if torch.cuda.is_available() else 7)
    warmup = warmup if warmup is not None else (5 if torch.cuda.is_available() else 1)
    rows, running = {}, {}
    for name, call in providers.items():
        rows[name] = {"kernel": kernel, **case, "provider": name}
        if isinstance(call, str):
            rows[name]["absent"] = call
            continue
        try:
            rows[name]["error"] = errors(call(), oracle)
            rows[name]["peak_bytes"] = peak_bytes(call)
            running[name] = call
        except Exception as problem:
            rows[name]["absent"] = f"{type(problem).__name__}: {problem}".splitlines()[0][:200]
    times = interleaved({"": floor, **running}, rounds, warmup)
    floor_s = floor_scale * statistics.median(times.pop(""))
    for name, seconds in times.items():
        cuts = statistics.quantiles(seconds, n=5) if len(seconds) > 1 else [seconds[0]] * 4
        median = statistics.median(seconds)
        rows[name] |= {
            "median_s": median,
            "p20_s": cuts[0],
            "p80_s": cuts[-1],
            "floor_s": floor_s,
            "percent_of_floor": 100 * floor_s / median,
            "rounds": rounds,
        }
    show(list(rows.values()))
    return list(rows.values())


def show(rows: list[dict]) -> None:
    first = rows[0]
    case = {
        k: v
        for k, v in first.items()
        if k
        not in (
            "provider",
            "error",
            "peak_bytes",
            "median_s",
            "p20_s",
            "p80_s",
            "floor_s",
            "percent_of_floor",
            "rounds",
            "absent",
        )
    }
    print("\n" + "  ".join(f"{k}={v}" for k, v in case.items()))
    print(
        f"{'provider':16} {'median ms':>10} {'p20':>9} {'p80':>9} {'% floor':>8} {'peak MB':>9}  errors against float64"
    )
    for row in rows:
        if "median_s" not in row:
            print(f"{row['provider']:16} absent: {row['absent']}")
            continue
        peak = "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e6:.1f}"
        print(
            f"{row['provider']:16} {row['median_s'] * 1e3:10.3f} {row['p20_s'] * 1e3:9.3f} {row['p80_s'] * 1e3:9.3f} "
            f"{row['percent_of_floor']:8.1f} {peak:>9}  " + "  ".join(f"{k} {v:.1e}" for k, v in row["error"].items())
        )
    sys.stdout.flush()


def save(path: str | Path, rows: list[dict], command: str) -> None:
    """Adds rows to bench/results/<device>.json with what is needed to repeat them."""
    path = Path(path)
    old = json.loads(path.read_text()) if path.exists() else []
    entry = {
        "date": date.today().isoformat(),
        "device": device_name(),
        "versions": versions(),
        "command": command,
        "rows": rows,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([*old, entry], indent=1) + "\n")


def main(measure: Callable[[argparse.Namespace], list[dict]], **flags: str) -> None:
    """The command of a bench: --full, --threads and further flags (name=help) for `measure`, whose rows go to --out."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--full", action="store_true", help="all shapes")
    parser.add_argument("--out", help="add the rows to this JSON file")
    parser.add_argument("--threads", type=int, default=1)
    for name, help in flags.items():
        parser.add_argument(f"--{name}", action="store_true", help=help)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(device_name(), versions())
    rows = measure(options)
    if options.out:
        save(options.out, rows, "python " + " ".join(sys.argv))
