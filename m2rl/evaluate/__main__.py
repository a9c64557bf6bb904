"""`torchrun -m m2rl.evaluate`: models on benchmarks, as the paper's table."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from m2rl import benchmarks, published
from m2rl.benchmarks import Benchmark
from m2rl.command import exit_with, named
from m2rl.config import Config
from m2rl.data import files
from m2rl.data.inspect import prompt_texts
from m2rl.data.overlap import Index
from m2rl.display import Display
from m2rl.evaluate.evaluator import Evaluator, architecture_key, evaluation_config
from m2rl.launch import process_group
from m2rl.sample_log import SampleLog, weights_identity
from m2rl.scores import BOOTSTRAP, Score
from m2rl.types import InputError

PROGRESS_EVERY_S = 30.0  # without a terminal; of this rank's samples


def main(argv: Sequence[str] | None = None) -> int:
    o = arguments(argv)
    parts = [part for item in o.benchmarks for part in item.split(",") if part]
    wanted = [name for part in parts for name in (benchmarks.PRESETS if part == "paper" else [part])]
    config = evaluation_config(wanted, o.config, o.engine, o.temperature, o.max_new_tokens)
    check_options(o, wanted)
    with process_group(config.threads) as device:
        return run(o, wanted, config, device)


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="torchrun -m m2rl.evaluate",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Score models on benchmarks: Avg@K with 95% intervals, as the paper's table.\n\n"
        "  torchrun -m m2rl.evaluate --models RL_Math RL_Multi --benchmarks paper    the nine, with the paper's K\n"
        "  ... --benchmarks aime24 gpqa_diamond --data-file gpqa_diamond=gpqa.jsonl   rows of your own copy\n"
        "  ... --problems 20 --k 1 --max-new-tokens 2048 --out runs/smoke            a quick look\n\n"
        "The same command goes on after a kill; a larger --k or --problems keeps the samples that are there.",
    )
    add = parser.add_argument
    add("--models", nargs="+", required=True, metavar="DIR", help="Hugging Face folders or ids, of any architectures")
    add("--benchmarks", nargs="+", required=True, help=f"of {', '.join(benchmarks.names())}; `paper` = the nine")
    add("--out", default="runs/evaluation", metavar="DIR", help="for samples and tables (default: %(default)s)")
    rows = parser.add_argument_group("problems")
    rows.add_argument(
        "--data-file",
        action="append",
        default=[],
        metavar="NAME=FILE",
        help="a benchmark's rows from this file or glob (.jsonl, .parquet), in the hub's schema; default: the hub",
    )
    rows.add_argument("--problems", type=int, default=0, metavar="N", help="at most N of each benchmark; 0 = all")
    rows.add_argument("--lcb-window", default="", metavar="FROM:TO", help="LiveCodeBench contest dates, as 2024-08-01")
    rows.add_argument(
        "--train-data",
        nargs="+",
        default=[],
        metavar="FILE",
        help="count the problems that share 13 words in a row with these training prompts",
    )
    sampling = parser.add_argument_group("sampling and scoring")
    sampling.add_argument(
        "--k", type=int, default=0, help="samples per problem; 0 = each benchmark's own (the paper's)"
    )
    sampling.add_argument("--seed", type=int, default=0, help="of samples, GPQA's option order and intervals")
    sampling.add_argument(
        "--max-new-tokens",
        type=int,
        default=0,
        metavar="N",
        help=f"0 = the config's; without one {benchmarks.PAPER_MAX_NEW_TOKENS}, the paper's",
    )
    sampling.add_argument(
        "--temperature",
        type=float,
        metavar="T",
        help=f"default: {benchmarks.PAPER_TEMPERATURE}, the whole distribution",
    )
    sampling.add_argument(
        "--think-gate",
        choices=("auto", "on", "off"),
        default="auto",
        help="score only what follows </think>, and 0 without it; auto: if the chat template knows </think>",
    )
    engine = parser.add_argument_group("engine")
    engine.add_argument("--engine", choices=("native", "vllm"), default="", help="default: native, or the config's")
    engine.add_argument("--config", default="", help="a TOML whose model, rollout and [[domain]] keys are used")
    return parser.parse_args(argv)


def check_options(o: argparse.Namespace, wanted: Sequence[str]) -> None:
    """Everything that can be wrong before a model loads; fills o.files and o.window."""
    for name in wanted:
        if name not in benchmarks.names():
            benchmarks.unknown(name)
    if not wanted:
        raise InputError("--benchmarks names none")
    if twice := next((m for i, m in enumerate(o.models) if m in o.models[:i]), None):
        raise InputError(f"--models {twice} is given twice")
    if o.k < 0 or o.problems < 0 or o.max_new_tokens < 0:
        raise InputError("--k, --problems and --max-new-tokens must not be negative")
    if o.temperature is not None and not 0 <= o.temperature < math.inf:
        raise InputError(f"--temperature must be at least 0, got {o.temperature}")
    o.files = named(o.data_file, "--data-file")
    for name, path in o.files.items():
        if name not in benchmarks.PRESETS:
            raise InputError(f"--data-file {name}={path}: NAME must be one of {', '.join(benchmarks.PRESETS)}")
        files([path])
    o.window = None
    if o.lcb_window:
        o.window = tuple(o.lcb_window.split(":"))
        if len(o.window) != 2 or not all(re.fullmatch(r"\d{4}-\d\d-\d\d", day) for day in o.window):
            raise InputError(f"--lcb-window {o.lcb_window}: must be YYYY-MM-DD:YYYY-MM-DD")


def run(o: argparse.Namespace, wanted: Sequence[str], config: Config, device: torch.device) -> int:
    """Every model on every benchmark; the tables are written after each, of what there is."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    out, display = Path(o.out), Display(rank == 0)
    table = Table(out, {"seed": o.seed, "engine": config.rollout.engine, "world_size": world, "bootstrap": BOOTSTRAP})
    evaluator, family, tasks = None, "", list[Benchmark]()
    try:
        for model in o.models:
            name, key = model_name(model, table.scores), architecture_key(model)
            if evaluator is None or key != family:
                if evaluator is not None:
                    evaluator.close()
                family = key
                evaluator = Evaluator(model, config, device=device, whole_device=not o.config)
                tasks = [evaluator.benchmark(n, **task_options(o, n)) for n in wanted]
                if any(p.domain == "code" for b in tasks for p in b.prompts):  # refused now, not after hours
                    display.say(f"Programs of the model run in sandbox level {evaluator.pool.sandbox_level}")
            evaluator.take(model)
            for b in tasks:
                log = SampleLog(out / name / b.name, b, {"model": weights_identity(model), "seed": o.seed}, rank)
                if world > 1:
                    dist.barrier()
                log.open()
                display.start(f"{name} {b.name}", every_s=PROGRESS_EVERY_S)
                try:
                    samples = evaluator.samples(
                        b,
                        seed=o.seed,
                        known=log.known,
                        on_sample=log.write,
                        progress=lambda done, total: display.update(done, "samples", total),
                    )
                finally:
                    log.close()
                    display.stop()
                if b.name not in table.notes:
                    found = (*b.notes, benchmarks.departures(b), contamination(b, o.train_data))
                    table.notes[b.name] = tuple(filter(None, found))
                score = evaluator.scored(b, samples, o.seed)
                table.add(name, b, score, write=rank == 0)
                display.say(f"{name}  {b.name}  {line(score)}")
    finally:
        display.stop()
        if evaluator is not None:
            evaluator.close()
    display.say("\n" + published.plain(table.scores, table.apart))
    for name, found in table.notes.items():
        display.say(f"{name}: {'; '.join(found)}")
    display.say(f"Files  {out}/  (table.md, table.csv, table.html, scores.json, <model>/<benchmark>/samples.*.jsonl)")
    return 0


@dataclasses.dataclass
class Table:
    """The scores so far, and their files."""

    folder: Path
    settings: dict[str, Any]
    scores: dict[str, dict[str, Score]] = dataclasses.field(default_factory=dict)  # model -> benchmark
    notes: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)  # benchmark -> what to know
    budgets: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)  # benchmark -> tokens, temperature
    apart: set[str] = dataclasses.field(default_factory=set)  # benchmarks in another setting than the paper's

    def add(self, model: str, b: Benchmark, score: Score, write: bool) -> None:
        self.scores.setdefault(model, {})[b.name] = score
        self.budgets[b.name] = {"max_new_tokens": b.max_new_tokens, "temperature": b.temperature}
        if benchmarks.departures(b):
            self.apart.add(b.name)
        if not write:
            return
        scores = {m: {name: s.as_dict() for name, s in mine.items()} for m, mine in self.scores.items()}
        record = {**self.settings, "notes": self.notes, "benchmarks": self.budgets, "scores": scores}
        (self.folder / "scores.json").write_text(json.dumps(record, indent=1) + "\n")
        (self.folder / "table.md").write_text(published.markdown(self.scores, self.apart))
        (self.folder / "table.csv").write_text(published.as_csv(self.scores))
        (self.folder / "table.html").write_text(published.as_html(self.scores, self.notes, self.apart))


def task_options(o: argparse.Namespace, name: str) -> dict[str, Any]:
    """What the command line says of one benchmark, as `benchmarks.load` takes it."""
    return {
        "data_file": o.files.get(name, ""),
        "seed": o.seed,
        "k": o.k,
        "limit": o.problems,
        "think_gate": {"auto": None, "on": True, "off": False}[o.think_gate],
        "lcb_window": o.window,
    }


def line(s: Score) -> str:
    """A score in one line."""
    parts = [
        f"Avg@{s.k} {100 * s.avg_at_k:.2f} [{100 * s.ci95[0]:.1f}, {100 * s.ci95[1]:.1f}]",
        f"pass@{s.k} {100 * s.pass_at_k:.1f}",
        *([f"majority@{s.k} {100 * s.majority_at_k:.1f}"] if s.majority_at_k is not None else []),
        f"{s.problems:,} problems",
        f"{s.mean_tokens:,.0f} tokens",
        f"{100 * s.truncated:.1f}% cut",
        ", ".join(f"{status} {n:,}" for status, n in s.statuses.items()),
    ]
    return "  ".join(parts)


def model_name(model: str, taken: Mapping[str, Any]) -> str:
    """A short name that no other model has: the last part of its path, more of it where that is taken or says nothing;
    of a folder in the hub's cache the repository's."""
    cached = re.search(r"models--([^/]+)--([^/]+)/snapshots/", model)
    parts = list(cached.groups()) if cached else [p for p in model.split("/") if p not in ("", ".", "..")]
    for n in range(2 if parts[-1] == "model" and len(parts) > 1 else 1, len(parts) + 1):
        if (name := "-".join(parts[-n:])) not in taken:
            return name
    return next(name for i in itertools.count(2) if (name := f"{parts[-1]}-{i}") not in taken)


def contamination(benchmark: Benchmark, train_data: Sequence[str]) -> str:
    """How many problems share 13 words in a row with the training prompts, or that nobody looked."""
    if not train_data:
        return "overlap with training data not checked (--train-data)"
    index = Index((p.id, p.spec.get("question", p.text)) for p in benchmark.prompts)
    hit = {name for text in prompt_texts(train_data) if (name := index.find(text))}
    return f"{len(hit)} of {len(benchmark.prompts)} problems share 13 words in a row with the training data"


if __name__ == "__main__":
    exit_with(main)
