"""Samples of one model and benchmark on disk, so that a killed evaluation goes on where it was."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from m2rl.benchmarks import Benchmark
from m2rl.data import read_records
from m2rl.samples import record, sample_of
from m2rl.types import InputError, Prompt, Sample


class SampleLog:
    """Samples as JSONL, one file per rank.

    known: what earlier runs left, by (prompt id, index); their tokens are placeholders, only the number counts.
    InputError if they were made with other settings, or answer another prompt or another row's answer key.
    """

    def __init__(self, folder: Path, benchmark: Benchmark, identity: Mapping[str, Any], rank: int):
        self.settings = {
            **identity,
            "benchmark": benchmark.name,
            "temperature": benchmark.temperature,
            "max_new_tokens": benchmark.max_new_tokens,
        }
        self.folder, self.rank = folder, rank
        prompts = {p.id: p for p in benchmark.prompts}
        self.asked = {id: question(p) for id, p in prompts.items()}
        folder.mkdir(parents=True, exist_ok=True)
        saved = folder / "settings.json"
        if saved.is_file() and (old := json.loads(saved.read_text())) != self.settings:
            changed = sorted(k for k in {*old, *self.settings} if old.get(k) != self.settings.get(k))
            raise InputError(
                f"{folder} holds samples made with other settings ({', '.join(changed)}): name another --out, or "
                "delete it"
            )
        self.known: dict[tuple[str, int], Sample] = {}
        for path in sorted(folder.glob("samples.*.jsonl")):
            for where, row in read_records(path, broken=lambda where, error: None):  # the last line of a killed process
                self._take(row, prompts, where)

    def _take(self, row: dict[str, Any], prompts: Mapping[str, Prompt], where: str) -> None:
        prompt = prompts.get(row.get("prompt_id", ""))
        if prompt is None:
            return  # a problem that is not asked for now
        if row["question"] != self.asked[prompt.id]:
            raise InputError(
                f"{where}: sample {row['sample']} of {prompt.id!r} answers another prompt, or is judged by another "
                "answer: name another --out"
            )
        found = sample_of(row, prompt, where)
        found.tokens = [0] * row["tokens"]
        self.known[prompt.id, found.index] = found

    def open(self) -> None:
        """Start to write; after every rank has read."""
        if self.rank == 0:
            (self.folder / "settings.json").write_text(json.dumps(self.settings, indent=1) + "\n")
        path = self.folder / f"samples.{self.rank}.jsonl"
        torn = path.is_file() and path.stat().st_size and not path.read_bytes().endswith(b"\n")
        self.file = open(path, "a", encoding="utf-8")  # noqa: SIM115 - closed by close
        if torn:
            self.file.write("\n")

    def write(self, s: Sample) -> None:
        """Append one sample, and let go of its tokens: a benchmark's worth of them is gigabytes."""
        row = {**record(s), "question": self.asked[s.prompt.id]}
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()
        s.tokens, s.logp = [0] * len(s.tokens), []

    def close(self) -> None:
        self.file.close()


def question(prompt: Prompt) -> str:
    """Of what a model reads and what judges its answer."""
    return fingerprint([*prompt.tokens, json.dumps(prompt.spec, sort_keys=True, default=str)])


def fingerprint(parts: Iterable[Any]) -> str:
    digest = hashlib.blake2b(digest_size=12)
    for part in parts:
        digest.update((part if isinstance(part, str) else repr(part)).encode(errors="replace"))
    return digest.hexdigest()


def weights_identity(model: str) -> str:
    """Changes when a folder's weights are written again; a hub id stands for itself."""
    found = sorted(Path(model).glob("*.safetensors"))
    return fingerprint((p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in found) if found else model
