"""Samples on disk, as the analyses read and write them: one JSONL line per response, tokens included.

    {"model", "domain", "prompt_id", "sample", "prompt", "prompt_tokens", "response", "response_tokens", "logp",
     "reward", "status", "finish"}

Rewards alone (skills) need domain, prompt_id and reward; divergences and verification need the tokens as well.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from m2rl.benchmarks import Benchmark
from m2rl.checkpoint import rank
from m2rl.data import read_records
from m2rl.evaluate import Evaluator, Weights
from m2rl.types import InputError, Prompt, Sample


def record(sample: Sample, model: str = "") -> dict[str, Any]:
    """One line."""
    return {
        "model": model,
        "domain": sample.prompt.domain,
        "prompt_id": sample.prompt.id,
        "sample": sample.index,
        "prompt": sample.prompt.text,
        "prompt_tokens": list(sample.prompt.tokens),
        "response": sample.text,
        "response_tokens": sample.tokens,
        "logp": [round(v, 6) for v in sample.logp],
        "mask": sample.mask,
        "reward": None if math.isnan(sample.reward) else sample.reward,
        "status": sample.status,
        "finish": sample.finish,
    }


def write_samples(path: str | Path, samples: Iterable[Sample], model: str = "") -> None:
    """Write beside and rename: the file is complete or absent."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    with open(partial, "w", encoding="utf-8") as lines:
        lines.writelines(json.dumps(record(s, model), ensure_ascii=False) + "\n" for s in samples)
    partial.rename(path)


def read_samples(path: str | Path, *, tokens: bool = True) -> list[Sample]:
    """The samples of one file, in order. InputError for a missing file or key, or a file without samples."""
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path} does not exist")
    prompts: dict[str, Prompt] = {}
    seen: dict[str, int] = {}
    out = []
    for where, row in read_records(path):
        for key in ("domain", "prompt_id", "reward", *(("prompt_tokens", "response_tokens") if tokens else ())):
            if key not in row:
                raise InputError(f"{where}: key {key} is missing; it is needed to read this file as samples")
        name = str(row["prompt_id"])
        if name not in prompts:
            prompts[name] = Prompt(
                name, str(row["domain"]), tuple(row.get("prompt_tokens") or ()), str(row.get("prompt", "")), {}
            )
        index = row.get("sample", seen.get(name, 0))
        seen[name] = seen.get(name, 0) + 1
        reward = row["reward"]
        out.append(
            Sample(
                prompts[name],
                index,
                list(row.get("response_tokens") or ()),
                list(row.get("logp") or ()),
                row.get("finish", "stop"),
                0,
                mask=row.get("mask"),
                text=str(row.get("response", "")),
                reward=float("nan") if reward is None else float(reward),
                status=row.get("status"),
            )
        )
    if not out:
        raise InputError(f"{path} holds no samples")
    return out


def read_folder(folder: str | Path, models: Sequence[str], *, tokens: bool = True) -> dict[str, list[Sample]]:
    """`<folder>/<model>.jsonl` of every model; a missing one is an InputError before any is read."""
    folder = Path(folder)
    for model in models:
        if not (folder / f"{model}.jsonl").is_file():
            raise InputError(f"{folder} has no samples of {model}: {model}.jsonl does not exist")
    return {model: read_samples(folder / f"{model}.jsonl", tokens=tokens) for model in models}


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
