"""`python -m m2rl.study --out DIR`: mix or merge? The whole comparison, one command, stage by stage.

    sft -> math, code, science, if (experts) -> mixed -> merges -> distill -> samples of all -> analyses -> report.html

A study is a TOML file: `study_embedded` (the default, 2 CPU cores), `study_qwen3_4b` (full size), or your own. Every
stage is a process of its own (training: `m2rl.train`, under torchrun where `ranks` is above 1) that writes into DIR and
leaves DIR/stages/<stage>.json with a hash of what it was made from: a finished stage is not done again, a killed one is
continued by the same command, and a changed setting redoes exactly what depends on it. A run with a `checkpoint` is not
trained. Several seeds are several studies, DIR/seed0 ..., under one plan and one report.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import dataclasses
import fcntl
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from m2rl.command import exit_with, named
from m2rl.config import Config, Domain, build, check, read_config, read_toml, to_toml
from m2rl.metrics import Display
from m2rl.types import InputError

FIXED = ("sft", "mixed", "distill")  # every other [[run]] is the expert of the domain that it is named after
SIGTERM_WAIT_S = 60.0  # a stage that was asked to stop may finish its step and save


@dataclass(frozen=True)
class Training:
    """One [[run]]."""

    name: str = ""
    """sft, mixed, distill, or the domain whose expert it is."""
    config: str = ""
    """The run's own configuration: a file or the name of one that ships with m2rl. Paths, seed, starting model,
    teachers and (of an expert) the domain are the study's."""
    steps: int = 0
    """0 = as in the config."""
    checkpoint: str = ""
    """Folder or hub id on this disk of a model that is there already: it is not trained."""
    device_hours: float = 0.0
    """For --dry-run and the time left: GPU hours, or CPU core hours."""


@dataclass(frozen=True)
class Validation:
    """Problems on which merge coefficients are chosen, from the mixed run's training data."""

    problems: int = 40  # per domain
    k: int = 4


@dataclass(frozen=True)
class Sampling:
    """What every model is sampled on."""

    benchmarks: tuple[str, ...] = ()
    data_files: tuple[str, ...] = ()
    """NAME=FILE: rows of a benchmark from a file, not the hub."""
    config: str = "embedded"
    """Its model.compute_dtype, rollout (engine, budgets) and [[domain]] keys are used."""
    problems: int = 0
    """Per benchmark, at most; 0 = all."""
    k: int = 0
    """Samples per problem; 0 = each benchmark's own."""


@dataclass(frozen=True)
class Analyses:
    merges: tuple[str, ...] = ()
    """The merges whose policies are compared pair by pair; the other models always are."""
    every: int = 4
    """Of the samples, every so many are scored under every policy."""


@dataclass(frozen=True)
class Assumed:
    """What --dry-run and the time left are computed from."""

    responses_per_model: int = 1000
    response_tokens: int = 1000
    merge_hours: float = 0.0
    """Per merge, on one device."""
    tokens_per_s: float = 1000.0
    """Generated, per device."""
    scored_tokens_per_s: float = 0.0
    """Log-probabilities, per device; 0 = as generated."""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Study:
    """A study's file: what is compared, and how large."""

    name: str = "study"
    seeds: tuple[int, ...] = (0,)
    ranks: int = 1
    """Processes of a stage, under torchrun where above 1."""
    lanes: int = 1
    """Stages at once."""
    scale: float = 1.0
    """Of every number of training steps."""
    run: tuple[Training, ...] = ()
    merge: dict = field(default_factory=dict)
    """[merge.NAME]: method and options of m2rl.merge; lists of lam and density are chosen from, on validation
    problems."""
    validation: Validation = field(default_factory=Validation)
    sampling: Sampling = field(default_factory=Sampling)
    analyses: Analyses = field(default_factory=Analyses)
    estimate: Assumed = field(default_factory=Assumed)

    @property
    def domains(self) -> list[str]:
        return [r.name for r in self.run if r.name not in FIXED]

    def training(self, name: str) -> Training:
        return next(r for r in self.run if r.name == name)


@dataclass(frozen=True)
class Seed:
    """One seed of a study: its folder and its models."""

    study: Study
    seed: int
    out: Path

    @property
    def models(self) -> dict[str, str]:
        """Name -> folder of every model, in the order of the report."""
        trained = ["sft", *self.study.domains, "mixed", "distill"]
        runs = {n: self.study.training(n).checkpoint or str(self.out / n / "model") for n in trained}
        last = runs.pop("distill")
        return {**runs, **{name: str(self.out / "merges" / name) for name in self.study.merge}, "distill": last}

    @property
    def trained(self) -> list[str]:
        return [m for m in self.models if m not in self.study.merge]

    @property
    def compared(self) -> list[str]:
        """The models whose policies are compared pair by pair."""
        return [m for m in self.models if m not in self.study.merge or m in self.study.analyses.merges]


@dataclass(frozen=True)
class Stage:
    """One step of the plan: `inputs` (JSON values) and the stages in `after` decide whether it has to be done."""

    key: str  # the name, after "seed1/" where there are several
    name: str
    seed: int
    inputs: Any
    after: tuple[str, ...]
    hours: float  # device hours, as assumed
    ranks: int
    files: tuple[str, ...]  # what it writes, as glob patterns under the seed's folder: old ones go when inputs changed


# ---- reading a study ----


def read(name: str) -> tuple[Study, str]:
    """A study's file, by path or by the name of one that ships with m2rl, and where it was found."""
    table, where = read_toml(name, studies=True)
    return build(Study, table, where), where


def verify(study: Study, where: str) -> Study:
    """The rules inside a study's file; nothing but TOML is read. InputError names the first that is broken."""

    def need(ok: bool, message: str) -> None:
        if not ok:
            raise InputError(f"{where}: {message}")

    names = [r.name for r in study.run]
    need(len(set(names)) == len(names), f"a [[run]] is listed twice: {', '.join(names)}")
    for name in FIXED:
        need(name in names, f"stage {name} is missing: add [[run]] with name = {name!r} and a config or a checkpoint")
    need(len(study.domains) >= 2, f"at least two experts are needed to merge, got {study.domains or 'none'}")
    for r in study.run:
        need(bool(r.config or r.checkpoint), f"run {r.name}: needs a config to train it, or a checkpoint")
        need(r.steps >= 0, f"run {r.name}: steps must not be negative, got {r.steps}")
    given = [r.name for r in study.run if r.checkpoint]
    need(
        not given or "sft" in given,
        f"run {next(iter(given), None)}: has a checkpoint but run sft has none: give also the model it came from",
    )
    need(bool(study.merge), "no merge is named: add [merge.NAME] with its method")
    for name, options in study.merge.items():
        need(name not in names, f"merge.{name}: a run has this name")
        need(isinstance(options, dict) and "method" in options, f"merge.{name} needs key method")
    odd = [m for m in study.analyses.merges if m not in study.merge]
    need(not odd, f"analyses.merges: no merge {next(iter(odd), None)} (there are: {', '.join(study.merge)})")
    need(bool(study.sampling.benchmarks), "sampling.benchmarks names none: there is nothing to evaluate on")
    for item in study.sampling.data_files:
        need(
            item.partition("=")[0] in study.sampling.benchmarks, f"sampling.data_files: {item!r} is not BENCHMARK=FILE"
        )
    need(study.scale > 0, f"scale must be above 0, got {study.scale}")
    need(bool(study.seeds) and len(set(study.seeds)) == len(study.seeds), f"seeds must differ, got {study.seeds}")
    for key in ("ranks", "lanes"):
        need(getattr(study, key) >= 1, f"{key} must be at least 1, got {getattr(study, key)}")
    s, v = study.sampling, study.validation
    need(
        s.problems >= 0 and s.k >= 0, f"sampling.problems and sampling.k must not be negative, got {s.problems}, {s.k}"
    )
    need(s.problems != 1, "sampling.problems must be at least 2: an interval over problems needs two")
    need(v.problems >= 2 and v.k >= 1, f"validation needs 2 problems and 1 sample, got {v.problems} and {v.k}")
    need(study.analyses.every >= 1, f"analyses.every must be at least 1, got {study.analyses.every}")
    for name in study.merge:
        with _as_input_error(f"{where}: merge.{name}"):
            several = len(candidates(study, name)) > 1
        need(
            not several or bool(study.training("mixed").config),
            f"merge.{name}: choosing from a list needs run mixed's config, whose training data the problems are from",
        )
    return study


@contextlib.contextmanager
def _as_input_error(where: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise InputError(f"{where}: {error}") from None


def candidates(study: Study, name: str) -> dict[str, Any]:
    """label -> recipe of one merge: every combination of its lists. ValueError for an option that does not fit."""
    from m2rl.merge_sweep import grid

    options = dict(study.merge[name])
    method, density, lam = options.pop("method"), options.pop("density", None), options.pop("lam", 1.0)
    listed = [v if isinstance(v, list) else [v] for v in (density, lam)]
    return grid([method], listed[0], listed[1], len(study.domains), options)


def training_configs(s: Seed) -> dict[str, Config]:
    """Name -> complete run configuration of every run that is to be trained."""
    study, models = s.study, s.models
    configs = {}
    for r in study.run:
        if r.checkpoint:
            continue
        c, where = read_config(r.config)
        wanted = "sft" if r.name == "sft" else "distill" if r.name == "distill" else "grpo"
        if c.algorithm != wanted:
            raise InputError(f"run {r.name}: {where} has algorithm {c.algorithm!r}, must be {wanted!r}")
        domains = c.domain
        if r.name in study.domains:
            mine = [d for d in domains if d.name == r.name]
            if domains and not mine:
                raise InputError(f"run {r.name}: {where} has no [[domain]] of that name")
            domains = (dataclasses.replace(mine[0] if mine else Domain(r.name), quota=0, weight=0.0),)
        elif r.name != "sft" and {d.name for d in domains} != set(study.domains):
            raise InputError(
                f"run {r.name}: {where} is of the domains {', '.join(d.name for d in domains) or 'of its data'}, the "
                f"experts are of {', '.join(study.domains)}"
            )
        if r.name == "distill":  # the routing table: a domain's teacher is its expert
            domains = tuple(dataclasses.replace(d, teacher=models[d.name]) for d in domains)
        configs[r.name] = check(
            dataclasses.replace(
                c,
                name=r.name,
                seed=s.seed,
                warm_start="",
                run_dir=str(s.out / r.name),
                model=c.model if r.name == "sft" else dataclasses.replace(c.model, path=models["sft"]),
                data=dataclasses.replace(c.data, eval=()),  # all models are evaluated together afterwards
                domain=domains,
                train=dataclasses.replace(c.train, steps=max(2, round((r.steps or c.train.steps) * study.scale))),
            ),
            where,
        )
    return configs


def sampling_config(study: Study) -> Config:
    c, _ = read_config(study.sampling.config)
    problems = study.sampling.problems or c.evaluation.problems
    return dataclasses.replace(c, evaluation=dataclasses.replace(c.evaluation, problems=problems))


def preflight(study: Study, out: Path) -> None:
    """What can be known to be wrong before any work: checkpoints of another architecture or tokenizer, absent data,
    unknown or empty benchmarks. Reads headers, tokenizers and rows, no weights."""
    from transformers import AutoTokenizer

    from m2rl import embedded
    from m2rl.data import files
    from m2rl.data.mixture import GENERATED
    from m2rl.evaluate import architecture_key
    from m2rl.merge import open_inputs
    from m2rl.safetensors_io import resolve_folder

    s = Seed(study, study.seeds[0], out)
    configs = training_configs(s)
    for name, config in configs.items():
        try:
            files([p for p in config.data.train if p not in GENERATED])
        except InputError as error:
            raise InputError(f"run {name}: {error}") from None
    given = {r.name: r.checkpoint for r in study.run if r.checkpoint}
    for name, folder in given.items():
        try:
            resolve_folder(folder)
        except InputError as error:
            raise InputError(f"run {name}: checkpoint {error}") from None
    if len(given) > 1:
        others = [n for n in given if n != "sft"]
        open_inputs(given["sft"], [given[n] for n in others])  # names, shapes, tokenizer
        for name in others:
            if architecture_key(given[name]) != architecture_key(given["sft"]):
                raise InputError(
                    f"run {name}: {given[name]} is of another architecture, tokenizer or chat template than sft, "
                    f"{given['sft']}"
                )
    path = given.get("sft") or configs["sft"].model.path
    tokenizer: Any
    if path == "embedded":
        tokenizer = embedded.build_tokenizer()
    else:
        try:
            tokenizer = AutoTokenizer.from_pretrained(path)
        except (OSError, ValueError) as error:
            raise InputError(f"run sft: {path} has no usable tokenizer ({str(error).splitlines()[0]})") from None
    load_benchmarks(study, tokenizer)


def load_benchmarks(study: Study, tokenizer: Any) -> list[Any]:
    """The benchmarks, their prompts encoded. InputError for an unknown or an empty one."""
    from m2rl import benchmarks

    sources = named(study.sampling.data_files, "sampling.data_files")
    config, found = sampling_config(study), []
    for name in study.sampling.benchmarks:
        with _as_input_error(f"sampling.benchmarks {name}"):
            b = benchmarks.load(
                name,
                tokenizer,
                config,
                data_file=sources.get(name, ""),
                k=study.sampling.k,
                limit=study.sampling.problems,
            )
        if not b.prompts:
            raise InputError(f"sampling.benchmarks: {name} has no problem")
        found.append(dataclasses.replace(b, temperature=1.0))  # the policy itself, which is what divergences need
    domains = {p.domain for b in found for p in b.prompts}
    for d in study.domains:
        if d not in domains:
            raise InputError(f"sampling.benchmarks: no benchmark of domain {d}, which has an expert")
    return found


# ---- the plan ----


def plan(study: Study, out: Path) -> list[Stage]:
    """All stages of all seeds in an order that respects what each needs; of the stages that can begin, the first do."""
    stages: list[Stage] = []
    several = len(study.seeds) > 1
    for seed in study.seeds:
        s = Seed(study, seed, seed_folder(study, out, seed))
        prefix = f"seed{seed}/" if several else ""
        configs = training_configs(s)
        domains = study.domains

        def add(
            name: str, inputs: Any, after: Sequence[str], hours: float, files: Sequence[str], ranks: int = 1
        ) -> None:
            needed = tuple(prefix + a for a in after if a in present)  # noqa: B023
            stages.append(Stage(prefix + name, name, seed, inputs, needed, hours, ranks, tuple(files)))  # noqa: B023
            present.add(name)  # noqa: B023

        present: set[str] = set()
        identity = {r.name: checkpoint_identity(r.checkpoint) for r in study.run if r.checkpoint}

        def train(name: str, after: Sequence[str]) -> None:
            if name in configs:  # noqa: B023
                r = study.training(name)
                used = [identity[a] for a in after if a in identity]  # noqa: B023
                inputs = [to_toml(configs[name]), used]  # noqa: B023
                add(name, inputs, after, r.device_hours * study.scale, [name], study.ranks)

        train("sft", ())
        train("mixed", ["sft"])  # the longest begins first
        for d in domains:
            train(d, ["sft"])
        e, n = study.estimate, len(study.merge)
        tried = sum(len(c) for name in study.merge if len(c := candidates(study, name)) > 1)
        choose = tried * len(domains) * study.validation.problems * study.validation.k
        train("distill", ["sft", *domains])
        per_token = e.response_tokens / e.tokens_per_s / 3600
        inputs = [study.merge, dataclasses.asdict(study.validation) if tried else None, identity]
        add("merges", inputs, ["sft", *domains], n * e.merge_hours + choose * per_token, ["merges"])
        sampling = [dataclasses.asdict(study.sampling), to_toml(sampling_config(study)), seed, identity]
        one = responses_per_model(study) * per_token
        add("merge_samples", sampling, ["merges"], n * one, [f"samples/{m}.jsonl" for m in study.merge], study.ranks)
        mine = [f"samples/{m}.jsonl" for m in s.trained]
        add("samples", sampling, ["sft", *domains, "mixed", "distill"], len(mine) * one, mine, study.ranks)
        both, some = ["samples", "merge_samples"], [dataclasses.asdict(study.analyses), seed]
        few = len(s.compared) ** 2 * responses_per_model(study) / study.analyses.every * e.response_tokens / 3600
        few /= e.scored_tokens_per_s or e.tokens_per_s
        models = ["sft", *domains, "mixed", "distill", "merges"]
        add("policies", some, both, 2 * few, ["analysis/policies*", "analysis/information*"])
        add("verification", some, both, few, ["analysis/verification*"])
        add("weights", [seed], models, 0.2 * study.ranks if study.ranks > 1 else 0.001, ["analysis/weights*"])
        add("skills", [], both, 0.001, ["analysis/skills*", "analysis/efficiency*"])
    last = [s.key for s in stages if s.name in ("policies", "verification", "weights", "skills")]
    settings = [study.name, study.scale, dataclasses.asdict(study.sampling)]
    stages.append(Stage("report", "report", study.seeds[0], settings, tuple(last), 0.001, 1, ()))
    return stages


def responses_per_model(study: Study) -> int:
    c = study.sampling
    return c.problems * c.k * len(c.benchmarks) or study.estimate.responses_per_model


def seed_folder(study: Study, out: Path, seed: int) -> Path:
    return out / f"seed{seed}" if len(study.seeds) > 1 else out


def checkpoint_identity(source: str) -> str:
    """Changes when a checkpoint's weights are written again."""
    from m2rl.safetensors_io import resolve_folder
    from m2rl.sample_log import weights_identity

    try:
        return weights_identity(str(resolve_folder(source)))
    except InputError:
        return source  # a dry run may plan with checkpoints that are elsewhere


def digest(stage: Stage, digests: Mapping[str, str]) -> str:
    """Of the stage's own inputs and everything it is made from."""
    content = json.dumps([stage.name, stage.inputs, [digests[key] for key in stage.after]], sort_keys=True)
    return hashlib.blake2b(content.encode(), digest_size=12).hexdigest()


def digests_of(stages: Sequence[Stage]) -> dict[str, str]:
    found: dict[str, str] = {}
    for stage in stages:
        found[stage.key] = digest(stage, found)
    return found


# ---- running the plan ----


def marker(folder: Path, name: str) -> Path:
    return folder / "stages" / f"{name}.json"


def finished(folder: Path, stage: Stage, digests: Mapping[str, str]) -> bool:
    path = marker(folder, stage.name)
    return path.is_file() and json.loads(path.read_text())["digest"] == digests[stage.key]


def launcher(ranks: int) -> list[str]:
    several = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    return [sys.executable, *(several if ranks > 1 else [])]


def clear(folder: Path, stage: Stage, wanted: str) -> None:
    """Keep what an interrupted attempt at this very stage left; what was made from other inputs goes."""
    started = marker(folder, stage.name).with_suffix(".started")
    started.parent.mkdir(parents=True, exist_ok=True)
    if started.is_file() and started.read_text() == wanted:
        return
    for pattern in stage.files:
        for path in folder.glob(pattern):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    started.write_text(wanted)


_LIBC = ctypes.CDLL(None)


def _end_with_parent(number: int) -> Callable[[], None]:
    """In the child: a killed study leaves no stage behind (Linux; elsewhere the child runs to its end)."""

    def ask() -> None:
        if sys.platform == "linux":
            _LIBC.prctl(1, number)  # PR_SET_PDEATHSIG

    return ask


@dataclass
class Running:
    stage: Stage
    folder: Path
    process: subprocess.Popen[bytes]
    log: Path
    output: IO[bytes]
    begun: float
    steps: int  # of training; 0 = unknown

    @property
    def share(self) -> float:
        """Of the stage that is done, from the last line of a training run's metrics."""
        path = self.folder / self.stage.name / "metrics.jsonl"
        if not self.steps or not path.is_file():
            return 0.0
        with open(path, "rb") as lines:
            lines.seek(max(0, path.stat().st_size - 8192))
            for line in reversed(lines.read().splitlines()):
                with contextlib.suppress(ValueError, KeyError):
                    return min(1.0, (json.loads(line)["step"] + 1) / self.steps)
        return 0.0


def start(study: Study, out: Path, stage: Stage, wanted: str, argv: Sequence[str]) -> Running:
    """Begin one stage as a process."""
    folder = out if stage.name == "report" else seed_folder(study, out, stage.seed)
    clear(folder, stage, wanted)
    config = training_configs(Seed(study, stage.seed, folder)).get(stage.name)
    command, steps = launcher(stage.ranks), 0
    if config is not None:
        path = folder / "configs" / f"{config.name}.toml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(to_toml(config))
        command, steps = [*command, "-m", "m2rl.train", "--config", str(path)], config.train.steps
    else:
        command = [*command, "-m", "m2rl.study_stages", stage.key, *argv]
    log = folder / "logs" / f"{stage.name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    output = open(log, "ab")  # noqa: SIM115  closed by end
    # torchrun passes SIGTERM on to its ranks; a killed one would leave them behind
    ask = _end_with_parent(signal.SIGTERM if stage.ranks > 1 else signal.SIGKILL)
    one_thread = {"OMP_NUM_THREADS": "1"} if study.lanes > 1 else {}  # lanes share the cores
    process = subprocess.Popen(
        command,
        stdout=output,
        stderr=subprocess.STDOUT,
        env={**one_thread, **os.environ, "PYTHONUNBUFFERED": "1"},
        preexec_fn=ask,
    )
    return Running(stage, folder, process, log, output, time.perf_counter(), steps)


def end(r: Running, wanted: str) -> float:
    """Write the marker of a stage whose process has ended; its seconds. InputError with its last words if it failed."""
    r.output.close()
    seconds = time.perf_counter() - r.begun
    trained = not r.steps or (r.folder / r.stage.name / "model" / "config.json").is_file()
    if r.process.returncode != 0 or not trained:
        lines = [line for line in r.log.read_text(errors="replace").splitlines() if line.strip()]
        said = [line for line in lines if line.startswith("m2rl: ")] or lines or ["no output"]
        raise InputError(f"stage {r.stage.key} ended with status {r.process.returncode}: {said[-1]} (all: {r.log})")
    path = marker(r.folder, r.stage.name)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps({"digest": wanted, "seconds": seconds}))
    partial.rename(path)
    return seconds


def run(study: Study, out: Path, argv: Sequence[str], only: Sequence[str] = ()) -> None:
    """Do what is not done yet, `lanes` stages at a time. argv: the command line that names this study."""
    stages = plan(study, out)
    names = list(dict.fromkeys(s.name for s in stages))
    for name in only:
        if name not in names:
            raise InputError(f"--only: no stage {name} (there are: {', '.join(names)})")
    digests = digests_of(stages)
    folders = {s.key: out if s.name == "report" else seed_folder(study, out, s.seed) for s in stages}
    done = {s.key for s in stages if finished(folders[s.key], s, digests)}
    todo = [s for s in stages if s.key not in done and (not only or s.name in only)]
    coming = {s.key for s in todo}
    for s in todo:
        for key in s.after:
            if key not in done and key not in coming:
                raise InputError(f"stage {s.key} needs {key}, which is not done: name it as well, or leave out --only")
    display, running = Display(True), list[Running]()
    display.say(f"{len(done)} of {len(stages)} stages are done; to do: {', '.join(s.key for s in todo) or 'none'}")
    if not todo:
        return
    out.mkdir(parents=True, exist_ok=True)
    lock = open(out / ".lock", "w")  # noqa: SIM115  held until this process ends
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise InputError(f"another study is at work in {out}: wait for it, or name another --out") from None
    preflight(study, out)
    total = sum(max(s.hours, 1e-4) for s in todo)
    spent, begun, shown, count = 0.0, time.perf_counter(), -1, len(todo)

    def progress() -> tuple[int, str]:
        part = spent + sum(r.share * max(r.stage.hours, 1e-4) for r in running)
        share, gone = part / total, time.perf_counter() - begun
        left = f", about {clock(gone * (1 - share) / share)} left" if 0.02 < share < 1 else ""
        return int(100 * share), f"{count - len(todo) - len(running)} of {count} stages, {clock(gone)}{left}"

    display.start("study", 100, 0)
    try:
        while todo or running:
            for s in list(todo):
                if len(running) < study.lanes and set(s.after) <= done:
                    todo.remove(s)
                    running.append(start(study, out, s, digests[s.key], argv))
            time.sleep(0.1)
            for r in [r for r in running if r.process.poll() is not None]:
                running.remove(r)
                seconds = end(r, digests[r.stage.key])
                done.add(r.stage.key)
                spent += max(r.stage.hours, 1e-4)
                percent, words = progress()
                display.say(f"{r.stage.key} took {clock(seconds)}; {percent} % of the work, {words}")
            percent, words = progress()
            if percent != shown:
                shown = percent
                now = ", ".join(r.stage.key for r in running)
                display.update(percent, f"{words}; now {now or 'ready'}")
    finally:
        display.stop()
        stop(running)


def stop(running: Sequence[Running]) -> None:
    """Ask the stages that still run to save and end; wait for them."""
    for r in running:
        r.process.terminate()
    for r in running:
        try:
            r.process.wait(SIGTERM_WAIT_S)
        except subprocess.TimeoutExpired:
            r.process.kill()
            r.process.wait()
        r.output.close()


def clock(seconds: float) -> str:
    minutes, hours = seconds / 60, seconds / 3600
    return f"{seconds:.0f} s" if seconds < 90 else f"{minutes:.1f} min" if minutes < 90 else f"{hours:.1f} h"


# ---- --dry-run ----


def print_plan(study: Study, out: Path) -> None:
    """Stages, devices, estimated hours and what they are assumed from; nothing is loaded or written."""
    from m2rl.data import whereabouts

    stages = plan(study, out)
    digests = digests_of(stages)
    unit = "GPU" if study.ranks > 1 else "core"
    print(f"{study.name} in {out}: {len(stages)} stages, {study.lanes} at a time, up to {study.ranks} {unit}(s) each\n")
    print(f"{'stage':22} {'state':8} {unit + 's':>5} {unit + ' hours':>10} {'wall':>9}  after")
    hours = wall = 0.0
    for r in study.run:
        if r.checkpoint:
            print(f"{r.name:22} {'given':8} {'-':>5} {'-':>10} {'-':>9}  {r.checkpoint}")
    for s in stages:
        folder = out if s.name == "report" else seed_folder(study, out, s.seed)
        state = "done" if finished(folder, s, digests) else "to do"
        if state == "to do":
            hours, wall = hours + s.hours, wall + s.hours / s.ranks
        size = f"{s.hours:.1f}" if s.hours >= 0.1 else f"{s.hours:.3f}"
        print(
            f"{s.key:22} {state:8} {s.ranks:5} {size:>10} {clock(3600 * s.hours / s.ranks):>9}  "
            f"{', '.join(s.after) or '-'}"
        )
    print(f"{'to do':22} {'':8} {'':5} {hours:10.1f} {clock(3600 * wall / study.lanes):>9}")
    print("\nHours are estimates:")
    for note in study.estimate.notes:
        print(f"  {note}")
    command = f"torchrun --standalone --nproc-per-node {study.ranks}" if study.ranks > 1 else "python"
    print(f"Training stages run as: {command} -m m2rl.train --config {out}/configs/STAGE.toml")
    tried = {name: len(c) for name in study.merge if len(c := candidates(study, name)) > 1}
    print(f"Merges: {', '.join(study.merge)}")
    if tried:
        chosen = ", ".join(f"{n} of {k}" for n, k in tried.items())
        print(f"Coefficients chosen on {study.validation.problems} training problems per domain: {chosen}")
    wanted = [p for c in training_configs(Seed(study, study.seeds[0], out)).values() for p in c.data.train]
    for p in dict.fromkeys(p for p in wanted if not whereabouts(p)):
        print(f"Data {p}: NOT FOUND here; the study needs it")
    for r in study.run:
        if r.checkpoint and not checkpoint_is_here(r.checkpoint):
            print(f"Checkpoint of {r.name}, {r.checkpoint}: NOT FOUND here; the study needs it")
    print("Dry run: nothing was loaded, trained or written.")


def checkpoint_is_here(source: str) -> bool:
    from m2rl.safetensors_io import resolve_folder

    with contextlib.suppress(InputError):
        return resolve_folder(source).is_dir()
    return False


# ---- command ----


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m m2rl.study", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--config", default="study_embedded", metavar="FILE|NAME", help="study_embedded, study_qwen3_4b ...")
    p.add_argument("--out", default="", help="folder of the study, default runs/<its name>; the same one continues it")
    p.add_argument("--seeds", type=int, nargs="+", default=[], help="one study per seed, one report with intervals")
    p.add_argument("--checkpoint", nargs="+", default=[], metavar="RUN=FOLDER", help="models that are there already")
    p.add_argument("--scale", type=float, default=0.0, help="of every number of training steps (0.1 = a tenth)")
    p.add_argument("--problems", type=int, default=0, help="held-out problems per benchmark, at most")
    p.add_argument("--k", type=int, default=0, help="samples per problem: Avg@K")
    p.add_argument("--ranks", type=int, default=0, help="processes (GPUs) per stage, under torchrun")
    p.add_argument("--lanes", type=int, default=0, help="stages at once")
    p.add_argument("--only", nargs="+", default=[], metavar="STAGE", help="do these stages only")
    p.add_argument("--dry-run", action="store_true", help="print stages, devices and estimated hours, and stop")
    p.add_argument(
        "--work", default="", help=argparse.SUPPRESS
    )  # one stage in this process: how the study calls itself
    return p


def resolve(o: argparse.Namespace) -> tuple[Study, str]:
    """The study's file with the command line's changes, not yet verified."""
    study, where = read(o.config)
    given = named(o.checkpoint, "--checkpoint")
    for name, folder in given.items():
        if name not in {r.name for r in study.run}:
            raise InputError(f"--checkpoint {name}={folder}: RUN must be one of {', '.join(r.name for r in study.run)}")
    runs = tuple(dataclasses.replace(r, checkpoint=given.get(r.name, r.checkpoint)) for r in study.run)
    sampling = dataclasses.replace(
        study.sampling, problems=o.problems or study.sampling.problems, k=o.k or study.sampling.k
    )
    v = study.validation
    if o.problems:
        v = dataclasses.replace(v, problems=min(v.problems, max(2, o.problems)))
    changed: dict[str, Any] = {"run": runs, "sampling": sampling, "validation": v}
    changed |= {key: getattr(o, key) for key in ("scale", "ranks", "lanes") if getattr(o, key)}
    changed |= {"seeds": tuple(o.seeds)} if o.seeds else {}
    return dataclasses.replace(study, **changed), where


def folder_of(study: Study, o: argparse.Namespace) -> Path:
    return Path(o.out or f"runs/{study.name}")


def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    o = parser().parse_args(argv)
    study = verify(*resolve(o))
    out = folder_of(study, o)
    if o.dry_run:
        print_plan(study, out)
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    run(study, out, argv, o.only)
    report = out / "report.html"
    if report.is_file() and not o.only:
        print(f"Report: {report}")
    return 0


if __name__ == "__main__":
    exit_with(main)
