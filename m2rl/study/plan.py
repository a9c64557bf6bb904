"""The plan of a study: its stages, what each needs, is made from and is assumed to cost."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from m2rl.config import Config, Domain, check, read_config, to_toml
from m2rl.study.definition import Study, swept
from m2rl.types import InputError


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


def seed_folder(study: Study, out: Path, seed: int) -> Path:
    return out / f"seed{seed}" if len(study.seeds) > 1 else out


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


def plan(study: Study, out: Path) -> list[Stage]:
    """All stages of all seeds in an order that respects what each needs; of the stages that can begin, the first do."""
    stages: list[Stage] = []
    for seed in study.seeds:
        s = Seed(study, seed, seed_folder(study, out, seed))
        stages += stages_of(s, f"seed{seed}/" if len(study.seeds) > 1 else "")
    last = [s.key for s in stages if s.name in ("policies", "verification", "weights", "skills")]
    settings = [study.name, study.scale, dataclasses.asdict(study.sampling)]
    stages.append(Stage("report", "report", study.seeds[0], settings, tuple(last), 0.001, 1, ()))
    return stages


def stages_of(s: Seed, prefix: str) -> list[Stage]:
    """All stages of one seed; `prefix` goes before their keys."""
    study, configs, domains = s.study, training_configs(s), s.study.domains
    identity = {r.name: checkpoint_identity(r.checkpoint) for r in study.run if r.checkpoint}
    stages: dict[str, Stage] = {}

    def add(name: str, inputs: Any, after: Sequence[str], hours: float, files: Sequence[str], ranks: int = 1) -> None:
        needed = tuple(prefix + a for a in after if a in stages)
        stages[name] = Stage(prefix + name, name, s.seed, inputs, needed, hours, ranks, tuple(files))

    def train(name: str, after: Sequence[str]) -> None:
        if name in configs:
            inputs = [to_toml(configs[name]), [identity[a] for a in after if a in identity]]
            add(name, inputs, after, study.training(name).device_hours * study.scale, [name], study.ranks)

    train("sft", ())
    train("mixed", ["sft"])  # the longest begins first
    for d in domains:
        train(d, ["sft"])
    train("distill", ["sft", *domains])
    e, n = study.estimate, len(study.merge)
    per_token = e.response_tokens / e.tokens_per_s / 3600
    tried = sum(swept(study).values())
    choose = tried * len(domains) * study.validation.problems * study.validation.k
    inputs = [study.merge, dataclasses.asdict(study.validation) if tried else None, identity]
    add("merges", inputs, ["sft", *domains], n * e.merge_hours + choose * per_token, ["merges"])
    sampling = [dataclasses.asdict(study.sampling), to_toml(sampling_config(study)), s.seed, identity]
    one = responses_per_model(study) * per_token
    add("merge_samples", sampling, ["merges"], n * one, [f"samples/{m}.jsonl" for m in study.merge], study.ranks)
    mine = [f"samples/{m}.jsonl" for m in s.trained]
    add("samples", sampling, ["sft", *domains, "mixed", "distill"], len(mine) * one, mine, study.ranks)
    both, some = ["samples", "merge_samples"], [dataclasses.asdict(study.analyses), s.seed]
    few = len(s.compared) ** 2 * responses_per_model(study) / study.analyses.every * e.response_tokens / 3600
    few /= e.scored_tokens_per_s or e.tokens_per_s
    models = ["sft", *domains, "mixed", "distill", "merges"]
    add("policies", some, both, 2 * few, ["analysis/policies*", "analysis/information*"])
    add("verification", some, both, few, ["analysis/verification*"])
    add("weights", [s.seed], models, 0.2 * study.ranks if study.ranks > 1 else 0.001, ["analysis/weights*"])
    add("skills", [], both, 0.001, ["analysis/skills*", "analysis/efficiency*"])
    return list(stages.values())


def responses_per_model(study: Study) -> int:
    c = study.sampling
    return c.problems * c.k * len(c.benchmarks) or study.estimate.responses_per_model


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


def stage_folder(study: Study, out: Path, stage: Stage) -> Path:
    """Under which a stage writes: its seed's, or the study's for the report of all seeds."""
    return out if stage.name == "report" else seed_folder(study, out, stage.seed)


def marker(folder: Path, name: str) -> Path:
    return folder / "stages" / f"{name}.json"


def finished(folder: Path, stage: Stage, digests: Mapping[str, str]) -> bool:
    path = marker(folder, stage.name)
    return path.is_file() and json.loads(path.read_text())["digest"] == digests[stage.key]
