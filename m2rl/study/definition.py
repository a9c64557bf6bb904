"""A study's file: what is compared, and how large; what it may say is checked here, and nothing else is read."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from m2rl.config import build, read_toml
from m2rl.types import InputError

FIXED = ("sft", "mixed", "distill")  # every other [[run]] is the expert of the domain that it is named after


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
        with as_input_error(f"{where}: merge.{name}"):
            several = len(candidates(study, name)) > 1
        need(
            not several or bool(study.training("mixed").config),
            f"merge.{name}: choosing from a list needs run mixed's config, whose training data the problems are from",
        )
    return study


def candidates(study: Study, name: str) -> dict[str, Any]:
    """label -> recipe of one merge: every combination of its lists. ValueError for an option that does not fit."""
    from m2rl.merge_sweep import grid

    options = dict(study.merge[name])
    method, density, lam = options.pop("method"), options.pop("density", None), options.pop("lam", 1.0)
    listed = [v if isinstance(v, list) else [v] for v in (density, lam)]
    return grid([method], listed[0], listed[1], len(study.domains), options)


def swept(study: Study) -> dict[str, int]:
    """How many candidates each merge has whose coefficients are chosen."""
    return {name: n for name in study.merge if (n := len(candidates(study, name))) > 1}


@contextlib.contextmanager
def as_input_error(where: str) -> Iterator[None]:
    """A ValueError of a library as the user's, with its place."""
    try:
        yield
    except ValueError as error:
        raise InputError(f"{where}: {error}") from None
