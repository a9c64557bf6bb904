"""Samples of several models for the analyses: K of every problem, verified, kept with their tokens."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from m2rl.benchmarks import Benchmark
from m2rl.checkpoint import rank
from m2rl.evaluate import Evaluator, Weights
from m2rl.samples import read_samples, write_samples
from m2rl.types import InputError, Sample


def sample_models(
    evaluator: Evaluator,
    models: Mapping[str, Weights],
    benchmarks: Sequence[str | Benchmark],
    *,
    k: int = 0,
    problems: int = 0,
    temperature: float = 1.0,
    seed: int = 0,
    folder: str | Path | None = None,
) -> dict[str, list[Sample]]:
    """K verified samples of every model on every benchmark. With `folder`, models whose file is there are read, and
    finished ones written, so that an interrupted call continues. Temperature 1 samples from the policy itself, which is
    what divergences need. InputError for an empty benchmark before sampling."""
    found = [evaluator.benchmark(name, k) for name in benchmarks]
    if not found:
        raise InputError("--benchmarks names none: there is nothing to sample")
    for b in found:
        if not b.prompts:
            raise InputError(f"benchmark {b.name} has no problems")
    found = [
        dataclasses.replace(b, prompts=b.prompts[:problems] if problems else b.prompts, temperature=temperature)
        for b in found
    ]
    out: dict[str, list[Sample]] = {}
    for name, weights in models.items():
        path = Path(folder) / f"{name}.jsonl" if folder is not None else None
        if path is not None and path.is_file():
            out[name] = read_samples(path)
            _check_same(path, out[name], found)
            continue
        evaluator.take(weights)
        out[name] = [s for b in found for s in evaluator.samples(b, seed=seed)]
        if path is not None and rank() == 0:  # every rank has all samples
            write_samples(path, out[name], name)
    return out


def _check_same(path: Path, samples: Sequence[Sample], found: Sequence[Benchmark]) -> None:
    have = Counter(s.prompt.id for s in samples)
    wanted = {p.id: b.k for b in found for p in b.prompts}
    if have != wanted:
        raise InputError(
            f"{path}: {len(samples)} samples of {len(have)} prompts, not the {sum(wanted.values())} of {len(wanted)} "
            "that are asked for: name another --samples folder, or the --k, --problems and --benchmarks of this one"
        )
