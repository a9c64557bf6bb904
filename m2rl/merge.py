"""`python -m m2rl.merge`: merge expert checkpoints into one, streaming, exact, without torch.

    python -m m2rl.merge --base DIR --experts A B C D --method ties --density 0.2 --out DIR

One pass over the inputs per statistic the method needs (thresholds, energies), one pass that writes. Inputs are
mapped, outputs preallocated and written at their final place, in a folder beside `--out` that is renamed when complete:
an interrupted merge leaves no half checkpoint, and `--resume` continues it. Methods and formulas:
`m2rl_kernels.merge_recipe.METHODS`.

Python: `merge(base, experts, method="ties", density=0.2, out="DIR")` on folders, or on state dicts or modules (in
memory).
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import errno
import hashlib
import math
import mmap
import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from m2rl_kernels import merge_passes as passes
from m2rl_kernels.merge_passes import Device, Statistics, Tensors
from m2rl_kernels.merge_recipe import CHOICES, METHODS, PRESETS, Recipe, check_read, recipe

from m2rl.command import exit_with
from m2rl.merge_inputs import CODES, Inputs, open_inputs, warn
from m2rl.merge_output import Output, finish, open_output, out_dtype
from m2rl.safetensors_io import DTYPES, ITEM_BYTES, Layout, plan_layout
from m2rl.types import InputError

# Options of a recipe by their names on the command line, and those that only a sweep reads.
OPTIONS = ("preset", "weights", "normalize", "sce_eps", "trim_density", "gamma", "epsilon", "seed", *CHOICES)
SWEEP = ("evaluate", "engine", "k")
BATCH_ELEMENTS = 1 << 25  # per step of the progress bar; memory does not depend on it


# ---- the stream ----


def as_tensors(inputs: Inputs, names: Sequence[str], with_base: bool) -> Tensors:
    base = inputs.base if with_base else None
    return Tensors(
        names=list(names),
        shapes=[inputs.info(n).shape for n in names],
        base=np.array([base.address(n) for n in names], np.uint64) if base else None,
        base_dtype=np.array([CODES[(base or inputs.donor).tensors[n].dtype] for n in names], np.int32),
        experts=np.array([[e.address(n) for e in inputs.experts] for n in names], np.uint64).reshape(
            len(names), len(inputs.experts)
        ),
        expert_dtype=np.array([[CODES[e.tensors[n].dtype] for e in inputs.experts] for n in names], np.int32).reshape(
            len(names), len(inputs.experts)
        ),
        owner=inputs,
    )


def _check_finite(inputs: Inputs, tensors: Tensors, nonfinite: np.ndarray) -> None:
    for t, who in np.argwhere(nonfinite).tolist():
        source = inputs.experts[who - 1] if who else inputs.base
        assert source is not None
        raise InputError(f"{tensors.names[t]} of {source.source} has {nonfinite[t, who]} NaN or infinite elements")


def batches(inputs: Inputs, names: Sequence[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    held = 0
    for name in names:
        batch.append(name)
        held += math.prod(inputs.info(name).shape)
        if held >= BATCH_ELEMENTS:
            yield batch
            batch, held = [], 0
    if batch:
        yield batch


class Progress:
    """`42 %  1.31 GB/s  0:03 left`, on a terminal or when asked; bytes are those read and written."""

    def __init__(self, total_bytes: int, shown: bool | None) -> None:
        self.total, self.done, self.start, self.last = max(total_bytes, 1), 0, time.monotonic(), 0.0
        self.shown, self.open = sys.stderr.isatty() if shown is None else shown, False

    def add(self, size: int, label: str) -> None:
        self.done += size
        now = time.monotonic()
        if self.shown and (now - self.last > 0.1 or self.done >= self.total):
            self.last = now
            rate = self.done / max(now - self.start, 1e-9)
            left = (self.total - self.done) / max(rate, 1)
            share = 100 * self.done / self.total
            clock = f"{int(left) // 60}:{int(left) % 60:02d}" if self.done else "-:--"
            line = f"{share:3.0f} %  {rate / 1e9:5.2f} GB/s  {clock} left  {label[:60]:60s}"
            width = shutil.get_terminal_size().columns - 1  # a line that wraps cannot be written over
            print(f"\r{line[:width]}", end="", file=sys.stderr, flush=True)
            self.open = True

    @contextlib.contextmanager
    def following(self, total_bytes: int, share: Callable[[], float], label: str) -> Iterator[None]:
        """Draw a call that reads `total_bytes` in one go: `share` tells how much of it is done."""
        before = self.done
        self.add(0, label)
        with repeatedly(lambda: self.add(before + int(total_bytes * min(1.0, share())) - self.done, label), 0.2):
            yield
        self.add(before + total_bytes - self.done, label)

    def close(self) -> None:
        """End the line: what follows, an error perhaps, starts on its own."""
        if self.open:
            print(file=sys.stderr)
        self.open = False


@contextlib.contextmanager
def repeatedly(work: Callable[[], object], interval_s: float) -> Iterator[None]:
    """Call `work` in a thread, every so often until the block ends. An error ends the calls and is raised then."""
    done, failed = threading.Event(), []

    def run() -> None:
        try:
            while not done.wait(interval_s):
                work()
        except Exception as error:
            failed.append(error)

    worker = threading.Thread(target=run, daemon=True)
    worker.start()
    try:
        yield
    finally:
        done.set()
        worker.join()
    if failed:
        raise failed[0]


def small_footprint(inputs: Inputs, limit_bytes: int = 1 << 30) -> contextlib.AbstractContextManager[None]:
    """Unmap what was read whenever about `limit_bytes` of it are resident, whatever the models' size.

    The pages stay in the page cache; unmapping them more often costs more than reading them.
    """

    def unmap() -> None:
        if resident_file_bytes() > limit_bytes:
            for checkpoint in inputs.all:
                checkpoint.release_all()

    return repeatedly(unmap, 0.02)


def resident_file_bytes() -> float:
    """Bytes of mapped files this process holds in memory; infinity where the system does not tell."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[2]) * mmap.PAGESIZE
    except OSError:
        return math.inf


def early_writeback(outputs: Sequence[Output], sync: bool) -> contextlib.AbstractContextManager[None]:
    """Send finished bytes to the disk while the rest is computed: the fsync that makes them safe finds few left.

    OSError, when the block ends, where the disk refused them: the kernel may report that only once.
    """

    def write_back() -> None:
        for output in outputs:
            output.writer.write_back()

    return repeatedly(write_back, 0.02) if sync else contextlib.nullcontext()


def stream(
    inputs: Inputs, outputs: Sequence[Output], *, threads: int = 0, progress: bool | None = None
) -> list[dict[str, Any]]:
    """Merge every tensor into every output; one reading of the inputs serves all. Returns one summary per output."""
    place = Device("cpu", threads)
    with_base = inputs.base is not None and any(o.recipe.needs_base for o in outputs)
    names = [n for n in inputs.merged if any(n not in o.done for o in outputs)]
    size = {
        n: sum(c.tensors[n].size for c in inputs.all)
        + sum(ITEM_BYTES[o.layout.dtypes[n]] * math.prod(inputs.info(n).shape) for o in outputs)
        for n in names
    }
    recipes = [o.recipe for o in outputs]
    read_all = any(map(_needs_whole_model, recipes)) * sum(c.tensors[n].size for n in inputs.merged for c in inputs.all)
    with contextlib.closing(Progress(sum(size.values()) + read_all, progress)) as bar:
        whole: Whole = {}
        if read_all:
            elements, seen = sum(math.prod(inputs.info(n).shape) for n in inputs.merged), np.zeros(1, np.int64)
            with bar.following(read_all, lambda: int(seen[0]) / max(elements, 1), "statistics of the whole model"):
                whole = whole_statistics(inputs, recipes, with_base, place, seen)
        for batch in batches(inputs, names):
            tensors = as_tensors(inputs, batch, with_base)
            statistics = batch_statistics(inputs, tensors, recipes, whole, place)
            for i, output in enumerate(outputs):
                if i in statistics:
                    _apply(inputs, tensors, output, statistics[i], place)
                else:
                    _apply_spectral(inputs, batch, output)
            bar.add(sum(size[n] for n in batch), batch[-1])
    for output in outputs:
        for name in inputs.copied:
            _copy(inputs, name, output)
    for checkpoint in inputs.all:
        checkpoint.check_unchanged()
    return [_summary(inputs, output) for output in outputs]


Whole = dict[int, tuple[dict[str, int], Statistics]]  # recipe -> (tensor -> row, statistics of every tensor)


def whole_statistics(
    inputs: Inputs, recipes: Sequence[Recipe], with_base: bool, place: Device, seen: np.ndarray | None = None
) -> Whole:
    """Of the recipes that look at the whole model at once, in one reading; `seen` [1] counts its elements meanwhile."""
    chosen = [i for i, r in enumerate(recipes) if _needs_whole_model(r)]
    if not chosen:
        return {}
    ordered = sorted(inputs.merged)  # the authors concatenate by sorted name: ties are resolved in that order
    everything = as_tensors(inputs, ordered, with_base)
    report = passes.Report(nonfinite=np.zeros((len(ordered), len(inputs.experts) + 1), np.int64), elements=seen)
    found = passes.gather(everything, [recipes[i] for i in chosen], device=place, report=report)
    assert report.nonfinite is not None
    _check_finite(inputs, everything, report.nonfinite)
    row = {name: t for t, name in enumerate(ordered)}
    return {i: (row, s) for i, s in zip(chosen, found)}


def batch_statistics(
    inputs: Inputs, tensors: Tensors, recipes: Sequence[Recipe], whole: Whole, place: Device
) -> dict[int, Statistics]:
    """recipe -> statistics of these tensors, in one reading; none for spectral methods, which take a matrix at once."""
    local = [i for i, r in enumerate(recipes) if i not in whole and r.rule.combine != "spectral"]
    report = passes.Report(nonfinite=np.zeros((len(tensors), len(inputs.experts) + 1), np.int64))
    found = passes.gather(tensors, [recipes[i] for i in local], device=place, report=report)
    assert report.nonfinite is not None
    _check_finite(inputs, tensors, report.nonfinite)
    out = dict(zip(local, found))
    for i, (row, s) in whole.items():
        out[i] = s.take([row[n] for n in tensors.names])
    return out


def _needs_whole_model(r: Recipe) -> bool:
    return r.scope == "model" and (
        r.rule.filter in ("magnitude", "outliers")
        or r.trim_density is not None
        or r.method == "ram_plus"
        or (r.rule.combine == "elect" and r.zero_sign == "majority")
    )


def _apply(inputs: Inputs, tensors: Tensors, output: Output, statistics: Statistics, device: Device) -> None:
    todo = [t for t, n in enumerate(tensors.names) if n not in output.done]
    if not todo:
        return
    tensors, statistics = tensors.take(todo), statistics.take(todo)
    if not output.recipe.needs_base:
        tensors = tensors.without_base()
    where = [output.writer.where(n) for n in tensors.names]
    dtypes = np.array([CODES[output.layout.dtypes[n]] for n in tensors.names], np.int32)
    report = passes.apply(
        tensors,
        output.recipe,
        statistics,
        out_dtype=dtypes,
        files=np.array([f for f, _ in where], np.int32),
        positions=np.array([p for _, p in where], np.int64),
        checksum=True,
        device=device,
    )
    assert report.nonfinite is not None and report.overflow is not None and report.checksum is not None
    assert report.nonzero is not None and report.changed is not None
    _check_finite(inputs, tensors, report.nonfinite)
    _check_overflow(tensors, report, output.layout)
    for t, name in enumerate(tensors.names):
        entry = {
            "tensor": name,
            "bytes": int(tensors.numel[t]) * passes.ITEM_BYTES[int(dtypes[t])],
            "checksum": report.checksum[t].tolist(),
            "nonzero": report.nonzero[t].tolist(),
            "changed": int(report.changed[t]),
            "numel": int(tensors.numel[t]),
        }
        output.journal.add(**entry)
        output.done[name] = entry


def _check_overflow(tensors: Tensors, report: passes.Report, layout: Layout) -> None:
    assert report.overflow is not None
    for t in np.flatnonzero(report.overflow).tolist():
        raise InputError(
            f"{tensors.names[t]}: {report.overflow[t]} merged elements overflow {layout.dtypes[tensors.names[t]]}; "
            "choose a wider --dtype"
        )


def _apply_spectral(inputs: Inputs, batch: Sequence[str], output: Output) -> None:
    for name in batch:
        if name in output.done:
            continue
        merged = _spectral(inputs, output.recipe, name, CODES[output.layout.dtypes[name]])
        output.writer.write(name, merged)
        read = [passes.checksum(c.address(name), c.tensors[name].size) for c in inputs.all]
        entry = {
            "tensor": name,
            "bytes": merged.nbytes,
            "checksum": [*read, passes.checksum(merged.ctypes.data, merged.nbytes)],
        }
        output.journal.add(**entry)
        output.done[name] = entry


def _spectral(inputs: Inputs, r: Recipe, name: str, code: int) -> np.ndarray:
    """SVD methods: one matrix at a time, in torch."""
    from m2rl_kernels import delta_merge

    data = [(f"{name} of {c.source}", c.bytes(name), CODES[c.tensors[name].dtype]) for c in inputs.all]
    return delta_merge.spectral_from_bytes(r, inputs.info(name).shape, data, code)


def _copy(inputs: Inputs, name: str, output: Output) -> None:
    data = inputs.donor.bytes(name)
    for other in inputs.all:
        if not np.array_equal(other.bytes(name), data):
            raise InputError(
                f"{name} is {inputs.info(name).dtype}, which is copied and not merged (merged are {', '.join(CODES)}), "
                f"and it differs between {inputs.donor.source} and {other.source}"
            )
    output.writer.write(name, data)


def _summary(inputs: Inputs, output: Output) -> dict[str, Any]:
    """Per input: a content checksum independent of sharding, and how much it changed."""
    entries = [output.done[n] for n in inputs.merged]

    def content(tensors: Mapping[str, tuple[str, tuple[int, ...]]], who: int) -> str:
        digest = hashlib.blake2b(digest_size=16)
        for name in sorted(inputs.merged):
            dtype, shape = tensors[name]
            digest.update(f"{name} {dtype} {list(shape)} {output.done[name]['checksum'][who]}\n".encode())
        return digest.hexdigest()

    with_counts = [e for e in entries if "nonzero" in e]
    total = sum(e["numel"] for e in with_counts)
    models: list[dict[str, Any]] = []
    for i, checkpoint in enumerate([inputs.base, *inputs.experts]):
        if checkpoint is None:
            continue
        read = i > 0 or output.recipe.needs_base
        form = {n: (checkpoint.tensors[n].dtype, checkpoint.tensors[n].shape) for n in inputs.merged}
        model = {"source": checkpoint.source, "content": content(form, i) if read else "not read"}
        if i and len(with_counts) == len(entries) and output.recipe.needs_base and total:
            moved = sum(e["nonzero"][i - 1] for e in with_counts)
            model["elements that differ from the base"] = f"{moved} of {total}"
            if moved == 0:
                warn(f"expert {checkpoint.source} is identical to the base: it adds nothing")
        elif i and output.recipe.needs_base and model["content"] == models[0]["content"]:
            warn(f"expert {checkpoint.source} is identical to the base: it adds nothing")
        models.append(model)
    form = {n: (output.layout.dtypes[n], inputs.info(n).shape) for n in inputs.merged}
    summary: dict[str, Any] = {"models": models, "content of the merge": content(form, -1)}
    if with_counts and output.recipe.needs_base and total:
        summary["merged elements that differ from the base"] = f"{sum(e['changed'] for e in with_counts)} of {total}"
    return summary


# ---- the Python interface ----


def merge(
    base: Any,
    experts: Sequence[Any],
    method: str = "ties",
    *,
    out: str | os.PathLike | None = None,
    dtype: str | None = None,
    device: str = "auto",
    threads: int = 0,
    shard_bytes: int = 5_000_000_000,
    resume: bool = False,
    overwrite: bool = False,
    sync: bool = True,
    progress: bool | None = None,
    **options: Any,
) -> Any:
    """Merge `experts` onto `base`.

    base, experts: folders or cached hub ids (then `out` is required; returns its path), or state dicts or modules
        (returns a new state dict of the base's names, on the base's device). `base` may be None for average and
        karcher.
    method, options: as in `merge_recipe.recipe`: preset, weights, density, lam, normalize, scope, ties, zero_sign,
        rescale, sce_select, sce_eps, compute_dtype, seed, ...
    dtype: "bfloat16" | "float16" | "float32": type of the result; default as the base.
    Raises InputError for input that does not fit, ValueError for an option that makes no sense; nothing is written
        then.
    """
    if not experts:
        raise ValueError("experts must name at least one model, got none")
    on_disk = {isinstance(m, (str, os.PathLike)) for m in (base, *experts) if m is not None}
    if len(on_disk) > 1:
        raise ValueError("base and experts must all be folders, or all state dicts or modules")
    if on_disk != {out is not None}:
        raise ValueError("out must be given for folders, and only for folders")
    check_read(method, [name for name, value in options.items() if value is not None])
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    if out is None:
        from m2rl_kernels import delta_merge

        return delta_merge.merge_state_dicts(base, experts, method, dtype=dtype, threads=threads, **options)
    chosen = recipe(method, len(experts), **options)
    merge_many(
        base,
        experts,
        [(chosen, Path(out))],
        dtype=dtype,
        device=device,
        threads=threads,
        shard_bytes=shard_bytes,
        resume=resume,
        overwrite=overwrite,
        sync=sync,
        progress=progress,
    )
    return Path(out)


def open_for(
    recipes: Sequence[Recipe], base: str | os.PathLike | None, experts: Sequence[str | os.PathLike], dtype: str | None
) -> Inputs:
    """The inputs of these merges, checked; recipes that go by layer are told the last one."""
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    if base is None and any(r.needs_base for r in recipes):
        raise InputError(f"--base is needed by {next(r.method for r in recipes if r.needs_base)}")
    inputs = open_inputs(base, experts)
    numbers = [int(m.group(1)) for n in inputs.merged if (m := re.search(r"layers\.(\d+)\.", n))]
    for chosen in recipes:
        if chosen.per_tensor is not None and hasattr(chosen.per_tensor, "layers"):
            chosen.per_tensor.layers["last"] = max(numbers, default=0)
    return inputs


def in_memory(
    base: str | os.PathLike | None,
    experts: Sequence[str | os.PathLike],
    recipes: Sequence[Recipe],
    *,
    dtype: str | None = None,
    threads: int = 0,
) -> Iterator[dict[str, tuple[str, tuple[int, ...], np.ndarray]]]:
    """The merges of a sweep, one after the other in the same memory, bit for bit what `merge_many` writes to disk.

    Yields the float tensors: name -> (dtype as torch names it, shape, bytes [n] uint8), overwritten by the next merge.
    Statistics are gathered for all merges in one reading; then every merge reads the inputs once.
    """
    inputs, place = open_for(recipes, base, experts, dtype), Device("cpu", threads)
    with_base = inputs.base is not None and any(r.needs_base for r in recipes)
    layout = plan_layout([(i.name, out_dtype(i, dtype), i.shape) for i in map(inputs.info, inputs.merged)], 1 << 62)
    memory = np.empty(layout.bytes, np.uint8)  # as the one file would lie
    size = {n: ITEM_BYTES[layout.dtypes[n]] * math.prod(inputs.info(n).shape) for n in inputs.merged}
    merged = {n: memory[at : at + size[n]] for n, (_, at) in layout.place.items()}
    torchs = {safetensors: name for name, safetensors in DTYPES.items()}
    with small_footprint(inputs):
        whole = whole_statistics(inputs, recipes, with_base, place)
        found = []
        for batch in batches(inputs, inputs.merged):
            tensors = as_tensors(inputs, batch, with_base)
            found.append((tensors, batch_statistics(inputs, tensors, recipes, whole, place)))
    for i, chosen in enumerate(recipes):
        with small_footprint(inputs):
            for tensors, statistics in found:
                dtypes = np.array([CODES[layout.dtypes[n]] for n in tensors.names], np.int32)
                if i not in statistics:
                    for name, code in zip(tensors.names, dtypes.tolist()):
                        merged[name][:] = _spectral(inputs, chosen, name, code).reshape(-1).view(np.uint8)
                    continue
                report = passes.apply(
                    tensors if chosen.needs_base else tensors.without_base(),
                    chosen,
                    statistics[i],
                    out_dtype=dtypes,
                    addresses=np.array([merged[n].ctypes.data for n in tensors.names], np.uint64),
                    device=place,
                )
                _check_overflow(tensors, report, layout)
        yield {n: (torchs[layout.dtypes[n]], inputs.info(n).shape, data) for n, data in merged.items()}
    for checkpoint in inputs.all:
        checkpoint.check_unchanged()


def merge_many(
    base: str | os.PathLike | None,
    experts: Sequence[str | os.PathLike],
    wanted: Sequence[tuple[Recipe, Path]],
    *,
    dtype: str | None = None,
    device: str = "auto",
    threads: int = 0,
    shard_bytes: int = 5_000_000_000,
    resume: bool = False,
    overwrite: bool = False,
    sync: bool = True,
    progress: bool | None = None,
) -> list[dict[str, Any]]:
    """Several merges of the same models in one reading. InputError: nothing is written, unfinished folders are
    removed."""
    inputs = open_for([r for r, _ in wanted], base, experts, dtype)
    outputs: list[Output] = []
    try:
        if device not in ("auto", "cpu"):
            raise ValueError(f"device must be auto or cpu (files are merged on the CPU), got {device!r}")
        if threads < 0:
            raise ValueError(f"threads must be 0 (as many as the process may use) or more, got {threads}")
        if shard_bytes < 1:
            raise ValueError(f"shard_bytes must be at least 1, got {shard_bytes}")
        for chosen, folder in wanted:
            outputs.append(
                open_output(
                    inputs, chosen, folder, dtype=dtype, shard_bytes=shard_bytes, resume=resume, overwrite=overwrite
                )
            )
        with small_footprint(inputs), early_writeback(outputs, sync):
            summaries = stream(inputs, outputs, threads=threads, progress=progress)
        for output, summary in zip(outputs, summaries):
            finish(inputs, output, summary, dtype=dtype, sync=sync)
    except ValueError:  # InputError too
        _discard(outputs)
        raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            _discard(outputs)
            raise InputError(f"the disk of {outputs[0].folder.parent} is full: nothing was written") from None
        if error.errno == errno.EIO:  # the page cache may show what the disk never got: nothing to resume
            _discard(outputs)
        raise
    return summaries


def _discard(outputs: Sequence[Output]) -> None:
    for output in outputs:
        output.writer.close()
        output.journal.close()
        shutil.rmtree(output.partial, ignore_errors=True)


# ---- the command ----


def parser() -> argparse.ArgumentParser:
    table = "\n".join(f"  {name:17s} {m.formula}  ({m.source})" for name, m in METHODS.items())
    p = argparse.ArgumentParser(
        prog="python -m m2rl.merge",
        description="Merge expert checkpoints into one.",
        epilog=f"methods:\n{table}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--base", help="folder or cached hub id of the model the experts were trained from")
    p.add_argument("--experts", nargs="+", default=[], help="folders or cached hub ids")
    p.add_argument("--out", required=True, help="folder to create")
    p.add_argument("--config", help="a recipe in mergekit's YAML schema, in place of --base, --experts and --method")
    p.add_argument("--method", nargs="+", help="one of those below (default ties); several with --sweep")
    p.add_argument("--preset", choices=list(PRESETS), help="conventions of the paper's code, or of mergekit")
    p.add_argument("--weights", nargs="+", type=float, help="one per expert (default 1)")
    p.add_argument(
        "--density", nargs="+", type=float, help="fraction kept, in (0, 1], or one per expert; --sweep: to try"
    )
    p.add_argument(
        "--lambda",
        dest="lam",
        nargs="+",
        type=float,
        help="factor of the merged task vector (1); several with --sweep",
    )
    p.add_argument(
        "--normalize",
        action=argparse.BooleanOptionalAction,
        help="divide by the weights that count (default: by method)",
    )
    meaning = {
        "scope": "thresholds per tensor (default), or one over the whole model",
        "ties": "keep exactly k (default), or all that equal the threshold",
        "zero_sign": "elected where the sum is 0: + (default), or the sign of most elements",
        "rescale": "after a random mask: 1 / density (default), restore the L1 norm, or nothing",
        "sce_select": "what SCE's variance mask acts on: its weights only (default), or the task vectors too",
        "compute_dtype": "what intermediate results are rounded to (default float32)",
    }
    for name, allowed in CHOICES.items():
        p.add_argument(f"--{name.replace('_', '-')}", choices=allowed, help=meaning[name])
    p.add_argument("--sce-eps", type=float, help="sce: uniform weights where all energies together are below (0)")
    p.add_argument("--trim-density", type=float, help="dare_ties: top-k after the random mask")
    p.add_argument("--gamma", type=float, help="breadcrumbs: fraction of the largest dropped (0.01)")
    p.add_argument(
        "--epsilon", type=float, help="della: half width of the keep probabilities (0.15); ram: smallest change (1e-5)"
    )
    p.add_argument("--seed", type=int, help="of random masks (0)")
    p.add_argument("--dtype", choices=list(DTYPES), help="type of the result (default: the base's, tensor by tensor)")
    p.add_argument(
        "--device",
        default="auto",
        choices=["auto", "cpu"],
        help="where to compute; files are merged on the CPU, which is faster than moving them to a GPU and back",
    )
    p.add_argument("--threads", type=int, default=0, help="default: as many as the process may use")
    p.add_argument("--shard-bytes", type=float, default=5e9, help="largest output file (5e9)")
    p.add_argument("--resume", action="store_true", help="continue an interrupted merge")
    p.add_argument("--overwrite", action="store_true", help="replace --out if it exists")
    p.add_argument("--sync", action=argparse.BooleanOptionalAction, default=True, help="fsync before the rename")
    p.add_argument("--progress", action=argparse.BooleanOptionalAction, help="default: on a terminal")
    p.add_argument(
        "--sweep",
        action="store_true",
        help="score every combination of --method, --density and --lambda; keep the best",
    )
    p.add_argument("--evaluate", nargs="+", help="--sweep: benchmarks (default: math code science if)")
    p.add_argument("--engine", choices=("native", "vllm"), help="--sweep: what takes every merge (native)")
    p.add_argument("--k", type=int, help="--sweep: samples per problem (8)")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    try:
        run(args)
    except (ValueError, OverflowError, ImportError, OSError) as error:
        raise InputError(str(error)) from error
    except KeyboardInterrupt:
        print("\ninterrupted: nothing stands in --out; --resume continues", file=sys.stderr)
        raise
    return 0


def run(args: argparse.Namespace) -> None:
    shared = {
        "dtype": args.dtype,
        "device": args.device,
        "threads": args.threads,
        "shard_bytes": int(args.shard_bytes),
        "resume": args.resume,
        "overwrite": args.overwrite,
        "sync": args.sync,
        "progress": args.progress,
    }
    if args.config:
        from m2rl.merge_yaml import read_config

        named_there = [name for name in OPTIONS if name != "seed"]  # mergekit too takes its seed from the command line
        _refuse(args, ["base", "experts", "method", "density", "lam", *named_there, "sweep", *SWEEP], "with --config")
        plan = read_config(args.config)
        shared["dtype"] = args.dtype or plan.dtype
        chosen = plan.recipe
        if args.seed is not None:
            check_read(chosen.method, ["seed"])
            chosen = dataclasses.replace(chosen, seed=args.seed)
        _merge_one(args.out, plan.base, plan.experts, chosen, shared)
        return
    options, methods = {name: getattr(args, name) for name in OPTIONS}, args.method or ["ties"]
    given = [name for name, value in options.items() if value is not None]
    if args.sweep:
        for name in given:
            if all(_unread(method, name) for method in methods):
                check_read(methods[0], [name])
        from m2rl.merge_sweep import sweep

        sweep(
            args.base,
            args.experts,
            Path(args.out),
            methods=methods,
            densities=args.density or [None],
            lambdas=args.lam or [1.0],
            options=options,
            evaluate=args.evaluate or [],
            k=8 if args.k is None else args.k,
            engine=args.engine or "native",
            **shared,
        )
        return
    _refuse(args, SWEEP, "without --sweep")
    for flag, values in (("--method", args.method), ("--lambda", args.lam)):
        if values is not None and len(values) > 1:
            raise InputError(f"{flag} takes one value without --sweep, got {len(values)}")
    options["density"] = args.density[0] if args.density and len(args.density) == 1 else args.density
    options["lam"] = args.lam and args.lam[0]
    check_read(methods[0], [name for name, value in options.items() if value is not None])
    _merge_one(args.out, args.base, args.experts, recipe(methods[0], len(args.experts), **options), shared)


def _refuse(args: argparse.Namespace, names: Sequence[str], where: str) -> None:
    """InputError for an option that would be ignored there."""
    for name in names:
        if getattr(args, name) not in (None, [], False) or (name == "normalize" and args.normalize is not None):
            flag = "--lambda" if name == "lam" else f"--{name.replace('_', '-')}"
            raise InputError(f"{flag} has no effect {where}: leave it out")


def _unread(method: str, name: str) -> bool:
    try:
        check_read(method, [name])
    except ValueError:
        return True
    return False


def _merge_one(out: str, base: str | None, experts: Sequence[str], chosen: Recipe, shared: Mapping[str, Any]) -> None:
    started = time.monotonic()
    merge_many(base, experts, [(chosen, Path(out))], **shared)
    with contextlib.suppress(BrokenPipeError):
        print(f"{out}: {chosen.method} of {len(experts)} experts in {time.monotonic() - started:.1f} s")


if __name__ == "__main__":
    exit_with(main)
