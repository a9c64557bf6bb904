"""Samples on disk: one JSON object per line and response, the same wherever a command writes them.

    always        domain, prompt_id, sample, prompt, response, reward (null: not judged), status, detail, finish,
                  tokens (how many the response has)
    with tokens   prompt_tokens, response_tokens, logp, mask
    and           model (analyses), question (m2rl.evaluate), step and weight_version (rollouts.jsonl of training)

    <folder>/<model>.jsonl                          the analyses' and the study's, tokens included
    <folder>/<model>/<benchmark>/samples.*.jsonl    m2rl.evaluate's, a file of every rank, without tokens: those of a
                                                    benchmark are gigabytes

Rewards alone (skills, the report) need domain, prompt_id and reward; divergences and verification the tokens as well.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from m2rl.command import whole_file
from m2rl.data.rows import Broken, read_records
from m2rl.types import InputError, Prompt, Sample

EVALUATED = "*/samples.*.jsonl"  # below a model's folder


def record(s: Sample, *, tokens: bool = False) -> dict[str, Any]:
    """One line."""
    out = {
        "domain": s.prompt.domain,
        "prompt_id": s.prompt.id,
        "sample": s.index,
        "prompt": s.prompt.text,
        "response": s.text,
        "reward": None if math.isnan(s.reward) else s.reward,
        "status": s.status,
        "detail": s.detail,
        "finish": s.finish,
        "tokens": len(s.tokens),
    }
    if tokens:
        out |= {
            "prompt_tokens": list(s.prompt.tokens),
            "response_tokens": s.tokens,
            "logp": [round(v, 6) for v in s.logp],
            "mask": s.mask,
        }
    return out


def sample_of(row: dict[str, Any], prompt: Prompt, where: str) -> Sample:
    """The sample of a line; without tokens where the line has none. InputError for a reward that is no number."""
    reward = row["reward"]
    if not isinstance(reward, (int, float, type(None))):
        raise InputError(f"{where}: reward must be a number or null, got {reward!r}")
    return Sample(
        prompt,
        row["sample"],
        list(row.get("response_tokens") or ()),
        list(row.get("logp") or ()),
        row.get("finish", "stop"),
        0,
        mask=row.get("mask"),
        text=str(row.get("response", "")),
        reward=float("nan") if reward is None else float(reward),
        status=row.get("status"),
        detail=str(row.get("detail", "")),
    )


def write_samples(path: str | Path, samples: Iterable[Sample], model: str = "") -> None:
    """Samples with their tokens; the file is complete or absent."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as lines:
        lines.writelines(
            json.dumps({"model": model, **record(s, tokens=True)}, ensure_ascii=False) + "\n" for s in samples
        )


def read_samples(path: str | Path, *, tokens: bool = True) -> list[Sample]:
    """The samples of one file, in order. InputError for a missing file or key, or a file without samples."""
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path} does not exist")
    out = list(_read([path], tokens))
    if not out:
        raise InputError(f"{path} holds no samples")
    return out


def _read(paths: Sequence[Path], tokens: bool, broken: Broken | None = None) -> Iterator[Sample]:
    prompts: dict[str, Prompt] = {}
    seen = Counter[str]()
    for path in paths:
        for where, row in read_records(path, broken=broken):
            for key in ("domain", "prompt_id", "reward", *(("prompt_tokens", "response_tokens") if tokens else ())):
                if key not in row:
                    raise InputError(f"{where}: key {key} is missing; it is needed to read this file as samples")
            name = str(row["prompt_id"])
            if name not in prompts:
                prompts[name] = Prompt(
                    name, str(row["domain"]), tuple(row.get("prompt_tokens") or ()), str(row.get("prompt", "")), {}
                )
            yield sample_of({"sample": seen[name], **row}, prompts[name], where)
            seen[name] += 1


def _read_evaluated(paths: Sequence[Path]) -> list[Sample]:
    """By benchmark, problem and index, whichever rank wrote them. InputError if problems of one benchmark differ in K:
    its evaluation was killed."""
    out: list[Sample] = []
    for folder in sorted({path.parent for path in paths}):
        mine = [path for path in paths if path.parent == folder]
        torn = lambda where, error: None  # noqa: E731 - what a killed process left of its last line
        found = {(s.prompt.id, s.index): s for s in _read(mine, False, torn)}
        have = Counter(id for id, _ in found)
        k = max(have.values(), default=0)
        short = sum(n < k for n in have.values())
        if short or not found:
            raise InputError(
                f"{folder}: "
                + (f"{short} of {len(have)} problems have fewer than {k} samples" if found else "it holds no samples")
                + "; the evaluation is not finished: repeat its command"
            )
        out += [found[key] for key in sorted(found)]
    return out


def find(folder: str | Path, model: str, *, tokens: bool) -> list[Path]:
    """The files of one model in either layout, none if it has none; <model>.jsonl goes before. InputError if tokens are
    needed and only samples of m2rl.evaluate are there."""
    folder = Path(folder)
    if (path := folder / f"{model}.jsonl").is_file():
        return [path]
    found = sorted((folder / model).glob(EVALUATED))
    if found and tokens:
        raise InputError(
            f"{folder / model} holds samples of m2rl.evaluate, which keeps no tokens, and this analysis needs them: "
            "name another --samples folder, where it can sample"
        )
    return found


def read_folder(folder: str | Path, models: Sequence[str], *, tokens: bool = True) -> dict[str, list[Sample]]:
    """Samples of every model, in either layout; a missing one is an InputError before any is read."""
    found = {model: find(folder, model, tokens=tokens) for model in models}
    for model, paths in found.items():
        if not paths:
            raise InputError(
                f"{folder} has no samples of {model}: neither {model}.jsonl nor {model}/<benchmark>/samples.*.jsonl "
                "exists"
            )
    return {
        model: _read_evaluated(paths) if paths[0].parent != Path(folder) else read_samples(paths[0], tokens=tokens)
        for model, paths in found.items()
    }
