"""`python -m m2rl.study --out DIR`: mix or merge? The comparison at the embedded size, one command, stage by stage.

    sft -> math, code, science, if (experts) -> mixed -> merges -> distill -> samples of all -> analyses -> report.html

Every stage writes into DIR and leaves DIR/stages/<stage>.json, which holds a hash of what it was made from: a finished
stage is not done again, a killed one is continued by the same command, and a changed setting redoes exactly what
depends on it. Training stages are ordinary `m2rl.train` runs, two at a time, one core each.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import dataclasses
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from m2rl.config import Config, Data, Domain, build, read_toml, to_toml
from m2rl.domains.procedural import DOMAINS
from m2rl.launch import exit_with
from m2rl.metrics import Display
from m2rl.types import InputError

EXPERT_STEPS = {"math": 40, "code": 40, "science": 60, "if": 60}
MIXED_STEPS = sum(EXPERT_STEPS.values())  # the same number of prompts as all experts together
DISTILL_STEPS = 100
MERGES: dict[str, dict[str, Any]] = {  # name -> method and options; strengths chosen on other seeds, never on these
    "average": {"method": "average"},
    "ta": {"method": "task_arithmetic", "lam": 0.75},
    "ties": {"method": "ties", "density": 0.5, "lam": 1.5},
    "dare_ta": {"method": "dare_linear", "density": 0.8, "lam": 0.75},
    "dare_ties": {"method": "dare_ties", "density": 0.8, "lam": 1.5},
    "sce": {"method": "sce"},
    "ram_plus": {"method": "ram_plus"},
    "model_stock": {"method": "model_stock"},
    "tsv_m": {"method": "tsv_m"},
    "iso_c": {"method": "iso_c"},
}

COMPARED_MERGES = ("average", "ta", "ties")  # those whose policies are compared pair by pair


@dataclass(frozen=True)
class Study:
    """What is compared, and how large."""

    out: Path
    seed: int = 0
    scale: float = 1.0  # of every number of training steps
    problems: int = 160  # held-out problems per domain
    k: int = 8  # samples per problem

    def steps(self, n: int) -> int:
        return max(2, round(n * self.scale))

    @property
    def models(self) -> dict[str, Path]:
        """Name -> folder of every model, in the order of the report."""
        trained = ["sft", *DOMAINS, "mixed"]
        return {
            **{name: self.out / name / "model" for name in trained},
            **{name: self.out / "merges" / name for name in MERGES},
            "distill": self.out / "distill" / "model",
        }


@dataclass(frozen=True)
class Stage:
    """One step of the plan: `inputs` (JSON values) and the stages in `after` decide whether it has to be done."""

    name: str
    inputs: Any
    after: tuple[str, ...]
    work: Callable[[], None]


def plan(study: Study) -> list[Stage]:
    """The stages in an order that respects what each needs."""
    sft, experts = training_configs(study)
    stages = [Stage("sft", to_toml(sft), (), lambda: train(study, sft))]
    for name, config in experts.items():
        after = ("sft",) if name != "distill" else ("sft", *DOMAINS)
        stages.append(Stage(name, to_toml(config), after, lambda c=config: train(study, c)))  # type: ignore[misc]
    stages.append(Stage("merges", MERGES, ("sft", *DOMAINS), lambda: merge_all(study)))
    models = ("sft", *experts, "merges")
    stages.append(Stage("samples", [study.problems, study.k, study.seed], models, lambda: sample_all(study)))
    stages.append(Stage("analyses", [], ("samples",), lambda: analyze_all(study)))
    stages.append(Stage("report", [], ("analyses",), lambda: write_report(study)))
    return stages


def training_configs(study: Study) -> tuple[Config, dict[str, Config]]:
    """(SFT, {expert, mixed, distill}) as complete run configurations."""

    def shipped(name: str) -> Config:
        return build(Config, *read_toml(name))

    sft, rl = shipped("embedded_sft"), shipped("embedded")
    steps = study.steps(sft.train.steps)
    sft = dataclasses.replace(
        sft,
        seed=study.seed,
        name="sft",
        run_dir=str(study.out / "sft"),
        train=dataclasses.replace(sft.train, steps=steps),
    )

    def run(name: str, domains: Sequence[Domain], steps: int, **changes: Any) -> Config:
        return dataclasses.replace(
            rl,
            name=name,
            seed=study.seed,
            warm_start="",
            run_dir=str(study.out / name),
            model=dataclasses.replace(rl.model, path=str(study.out / "sft" / "model")),
            data=Data(eval=()),
            domain=tuple(domains),
            train=dataclasses.replace(rl.train, steps=study.steps(steps)),
            **changes,
        )

    quota = rl.rollout.prompts_per_step
    share = quota // len(DOMAINS)
    configs = {"mixed": run("mixed", [Domain(d, quota=share) for d in DOMAINS], MIXED_STEPS)}  # the longest goes first
    configs |= {d: run(d, [Domain(d, quota=quota)], EXPERT_STEPS[d]) for d in DOMAINS}
    taught = [Domain(d, quota=share, teacher=str(study.out / d / "model")) for d in DOMAINS]
    configs["distill"] = run("distill", taught, DISTILL_STEPS, algorithm="distill")
    return sft, configs


# ---- stages ----


def train(study: Study, config: Config) -> None:
    """One `m2rl.train` run in a process of its own; a stopped one is continued from its last checkpoint."""
    folder = study.out / "configs"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{config.name}.toml"
    path.write_text(to_toml(config))
    log = study.out / "logs" / f"{config.name}.log"
    log.parent.mkdir(exist_ok=True)
    with open(log, "a") as output:
        command = [sys.executable, "-m", "m2rl.train", "--config", str(path)]
        done = subprocess.run(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            preexec_fn=_end_with_parent,
            check=False,
        )
    if done.returncode != 0 or not (study.out / config.name / "model" / "config.json").is_file():
        last = next((line for line in reversed(log.read_text().splitlines()) if line.strip()), "no output")
        raise InputError(f"stage {config.name} ended with status {done.returncode}: {last} (all of it: {log})")


_LIBC = ctypes.CDLL(None)


def _end_with_parent() -> None:
    """In the child: a killed study leaves no training behind (Linux; elsewhere the child runs to its end)."""
    if sys.platform == "linux":
        _LIBC.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def merge_all(study: Study) -> None:
    """Every merge of the four experts; their inputs are small here, so one call each."""
    from m2rl.merge import merge

    experts = [str(study.out / d / "model") for d in DOMAINS]
    for name, options in MERGES.items():
        folder = study.out / "merges" / name
        shutil.rmtree(folder, ignore_errors=True)
        merge(str(study.out / "sft" / "model"), experts, **options, out=str(folder), progress=False, sync=False)


def sample_all(study: Study) -> None:
    """K samples of every model on every domain's held-out problems; files that are complete stay."""
    from m2rl.analyze.samples import sample_models
    from m2rl.evaluate import Evaluator

    shutil.rmtree(study.out / "samples", ignore_errors=True)
    models = {name: str(folder) for name, folder in study.models.items()}
    with contextlib.closing(Evaluator(models["sft"])) as evaluator:
        sample_models(
            evaluator,
            models,
            list(DOMAINS),
            k=study.k,
            problems=study.problems,
            seed=study.seed,
            folder=study.out / "samples",
        )


def analyze_all(study: Study) -> None:
    """Weights, policies, skills, information, efficiency; each writes its JSON, CSV and SVG."""
    from m2rl.analyze import efficiency, information, policies, skills, weights
    from m2rl.analyze.samples import read_folder

    out = study.out / "analysis"
    models = {name: str(folder) for name, folder in study.models.items()}
    samples = read_folder(study.out / "samples", list(models))
    experts = {d: d for d in DOMAINS}
    rest = {n: m for n, m in models.items() if n != "sft"}
    weights.analyze(weights.measure(models["sft"], rest, seed=study.seed), base="sft").write(out)
    # Every pair of policies is scored on every sample: a quarter of the samples, and three merges, are enough.
    few = {n: samples[n][::4] for n in models if n not in MERGES or n in COMPARED_MERGES}
    kl = policies.kl_matrix({n: models[n] for n in few}, few, keep=len(few))
    policies.analyze(kl, policies.accuracies({n: samples[n] for n in few}), base="sft", experts=experts).write(out)
    rewards = {n: skills.rewards_of(s) for n, s in samples.items()}
    skills.analyze(rewards, base="sft", experts=list(DOMAINS)).write(out)
    kinds = dict.fromkeys(DOMAINS, "expert") | dict.fromkeys(COMPARED_MERGES, "merge")
    kinds |= {"mixed": "mixed", "distill": "distill"}
    information.analyze(kl, {n: rewards[n] for n in few}, base="sft", kinds=kinds).write(out)
    runs = [
        efficiency.read_run(str(study.out / name), name, kind)
        for name, kind in [
            ("sft", "sft"),
            *((d, "expert") for d in DOMAINS),
            ("mixed", "mixed"),
            ("distill", "distill"),
        ]
    ]
    efficiency.analyze([*runs, efficiency.merge_cost("merges", seconds_of(study, "merges"))]).write(out)


def write_report(study: Study) -> None:
    from m2rl.report import write

    write(study.out, list(study.models), list(DOMAINS), {"seed": study.seed, "scale": study.scale, "k": study.k})


# ---- running the plan ----


def marker(study: Study, name: str) -> Path:
    return study.out / "stages" / f"{name}.json"


def seconds_of(study: Study, name: str) -> float:
    return float(json.loads(marker(study, name).read_text())["seconds"])


def digest(stage: Stage, digests: Mapping[str, str]) -> str:
    """Of the stage's own inputs and everything it is made from."""
    content = json.dumps([stage.name, stage.inputs, [digests[name] for name in stage.after]], sort_keys=True)
    return hashlib.blake2b(content.encode(), digest_size=12).hexdigest()


def run(study: Study, only: Sequence[str] = ()) -> None:
    """Do what is not done yet; two training stages at a time."""
    stages = plan(study)
    unknown = [name for name in only if name not in {s.name for s in stages}]
    if unknown:
        raise InputError(f"--only: no stage {unknown[0]} (there are: {', '.join(s.name for s in stages)})")
    (study.out / "stages").mkdir(parents=True, exist_ok=True)
    display = Display(True)
    digests: dict[str, str] = {}
    for stage in stages:
        digests[stage.name] = digest(stage, digests)
    waiting = [s for s in stages if not finished(study, s, digests) and (not only or s.name in only)]
    if only:
        for stage in waiting:
            for name in stage.after:
                if name not in only and not finished(study, next(s for s in stages if s.name == name), digests):
                    raise InputError(f"stage {stage.name} needs {name}, which is not done: run without --only first")
    display.say(
        f"{len(stages) - len(waiting)} of {len(stages)} stages are done; to do: {', '.join(s.name for s in waiting)}"
    )
    ready = {s.name for s in stages} - {s.name for s in waiting}

    def work(stage: Stage) -> None:
        start = time.perf_counter()
        stage.work()
        seconds = time.perf_counter() - start
        partial = marker(study, stage.name).with_suffix(".partial")
        partial.write_text(json.dumps({"digest": digests[stage.name], "seconds": seconds}))
        partial.rename(marker(study, stage.name))

    display.start("study", len(stages), len(ready))
    try:
        while waiting:
            able = [s for s in waiting if set(s.after) <= ready]
            batch = able[:2] if all(s.name in (*DOMAINS, "mixed", "distill", "merges") for s in able[:2]) else able[:1]
            display.update(len(ready), f"now: {', '.join(s.name for s in batch)}")
            with ThreadPoolExecutor(2) as pool:
                for future in [pool.submit(work, s) for s in batch]:
                    future.result()
            ready |= {s.name for s in batch}
            waiting = [s for s in waiting if s not in batch]
            for s in batch:
                display.say(f"{s.name} {seconds_of(study, s.name):.0f} s")
    finally:
        display.stop()


def finished(study: Study, stage: Stage, digests: Mapping[str, str]) -> bool:
    path = marker(study, stage.name)
    return path.is_file() and json.loads(path.read_text())["digest"] == digests[stage.name]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m m2rl.study", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", default="runs/study", help="folder of the study; the same folder continues it")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scale", type=float, default=1.0, help="of every number of training steps (0.1 = a tenth)")
    parser.add_argument("--problems", type=int, default=160, help="held-out problems per domain")
    parser.add_argument("--k", type=int, default=8, help="samples per problem: Avg@K")
    parser.add_argument("--only", nargs="+", default=[], metavar="STAGE", help="do these stages only")
    parser.add_argument("--dry-run", action="store_true", help="print the stages and stop")
    o = parser.parse_args(argv)
    if o.scale <= 0 or o.problems < 2 or o.k < 1:
        raise InputError("--scale must be above 0, --problems at least 2, --k at least 1")
    study = Study(Path(o.out), o.seed, o.scale, o.problems, o.k)
    if o.dry_run:
        for stage in plan(study):
            print(f"{stage.name:10} after {', '.join(stage.after) or 'nothing'}")
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    run(study, o.only)
    print(f"Report: {study.out / 'report.html'}")
    return 0


if __name__ == "__main__":
    exit_with(main)
