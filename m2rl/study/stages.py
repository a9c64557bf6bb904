"""The stages of a study that are not training, each in a process of its own: `python -m m2rl.study.stages STAGE ...`.

    merges         every merge of the experts, coefficients chosen on training problems
    merge_samples, samples                     K responses of every model to every held-out problem
    policies, verification, weights, skills    the analyses
    report

run.py starts them, with its own command line after the stage's key.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from m2rl.command import exit_with, whole_file
from m2rl.config import Config, read_config
from m2rl.merge_sweep import Judge
from m2rl.study.definition import Study, candidates
from m2rl.study.options import parse
from m2rl.study.plan import Seed, Stage, marker, plan, sampling_config, seed_folder
from m2rl.study.preflight import load_benchmarks
from m2rl.types import Prompt


def merge_all(s: Seed) -> None:
    """Every merge of the experts; those with a list of coefficients take the best on validation problems."""
    from m2rl.merge import merge_many
    from m2rl.merge_sweep import sweep

    models, study = s.models, s.study
    experts = [models[d] for d in study.domains]
    chosen: dict[str, Any] = {}
    note = s.out / "merges" / "chosen.json"
    if note.is_file():
        chosen = json.loads(note.read_text())
    with contextlib.ExitStack() as stack:
        judge: Judge | None = None
        for name in study.merge:
            folder = s.out / "merges" / name
            if name in chosen and (folder / "config.json").is_file():
                continue
            recipes = candidates(study, name)
            options = dict(study.merge[name])
            if len(recipes) == 1:
                ((label, recipe),) = recipes.items()
                merge_many(models["sft"], experts, [(recipe, folder)], overwrite=True, progress=False, sync=False)
                chosen[name] = {"label": label, "candidates": 1}
            else:
                judge = judge or stack.enter_context(validation(s))
                density, lam = options.pop("density", None), options.pop("lam", 1.0)
                rows = sweep(
                    models["sft"],
                    experts,
                    folder,
                    methods=[options.pop("method")],
                    densities=density if isinstance(density, list) else [density],
                    lambdas=lam if isinstance(lam, list) else [lam],
                    options=options,
                    score=judge,
                    overwrite=True,
                    progress=False,
                )
                chosen[name] = {"label": rows[0].label, "candidates": len(rows), "validation_mean": rows[0].mean}
            with whole_file(note) as file:
                file.write(json.dumps(chosen, indent=1) + "\n")


@contextlib.contextmanager
def validation(s: Seed) -> Iterator[Judge]:
    """A judge of merged models: Avg@K per domain on prompts of the training data that come after all that the mixed run
    draws, so that the problems of the report have no part in any choice."""
    from m2rl.benchmarks import Benchmark
    from m2rl.evaluate import Evaluator
    from m2rl.scores import score_one

    c = sampling_config(s.study)
    with Evaluator(s.models["sft"], c) as evaluator:
        tasks = [
            Benchmark(d, tuple(prompts), s.study.validation.k, 1.0, c.rollout.max_new_tokens)
            for d, prompts in validation_prompts(s, evaluator.tokenizer).items()
        ]

        def judge(folder: Path) -> Mapping[str, tuple[float, float]]:
            evaluator.take(folder)
            scores = {b.name: score_one(evaluator.samples(b, seed=s.seed)) for b in tasks}
            return {d: (x.avg_at_k, (x.ci95[1] - x.ci95[0]) / 2) for d, x in scores.items()}

        yield judge


def validation_prompts(s: Seed, tokenizer: PreTrainedTokenizerBase) -> dict[str, list[Prompt]]:
    """Domain -> distinct prompts of the mixed run's training data, from the place where that run ends."""
    from m2rl.data import Mixture, load_sources, quotas

    c, wanted = validation_config(s.study), s.study.validation.problems
    loaded = load_sources(c.data.train, c, tokenizer, verifiable=True)
    mixture = Mixture(loaded.sources, quotas(c.domain, loaded.sources, c.rollout.prompts_per_step), s.seed)
    found: dict[str, dict[str, Prompt]] = {d: {} for d in s.study.domains}
    for step in range(c.train.steps, c.train.steps + 100 * wanted):  # a small file repeats: fewer must do
        for p in mixture.batch(step):
            if len(found[p.domain]) < wanted:
                found[p.domain].setdefault(p.text, p)
        if all(len(prompts) == wanted for prompts in found.values()):
            break
    return {d: list(prompts.values()) for d, prompts in found.items()}


def validation_config(study: Study) -> Config:
    """Whose training data the validation problems are from: the mixed run's, also where that is not trained here."""
    r = study.training("mixed")
    c, _ = read_config(r.config)
    return dataclasses.replace(c, train=dataclasses.replace(c.train, steps=r.steps or c.train.steps))


def sample(s: Seed, names: Sequence[str]) -> None:
    """K samples of models on every benchmark; files that are complete stay."""
    from m2rl.analyze.sampling import sample_models
    from m2rl.evaluate import Evaluator
    from m2rl.launch import process_group

    config = sampling_config(s.study)
    with process_group(config.threads) as device, Evaluator(s.models["sft"], config, device=device) as evaluator:
        found = load_benchmarks(s.study, evaluator.tokenizer)
        models = {name: s.models[name] for name in names}
        sample_models(evaluator, models, found, seed=s.seed, folder=s.out / "samples")


def compare_policies(s: Seed) -> None:
    """KL between all pairs of the compared policies, what explains accuracy, and nats against gains."""
    from m2rl.analyze import information, policies, skills
    from m2rl.samples import read_folder

    samples = read_folder(s.out / "samples", s.compared)
    few = {n: samples[n][:: s.study.analyses.every] for n in s.compared}
    models = {n: s.models[n] for n in s.compared}
    kl = policies.kl_matrix(models, few, keep=len(few) if s.study.ranks == 1 else 2, dtype=dtype_of(s.study))
    accuracy = policies.accuracies(samples)
    policies.analyze(kl, accuracy, base="sft", experts={d: d for d in s.study.domains}).write(s.out / "analysis")
    kinds = dict.fromkeys(s.study.domains, "expert") | dict.fromkeys(s.study.analyses.merges, "merge")
    kinds |= {"mixed": "mixed", "distill": "distill"}
    rewards = {n: skills.rewards_of(samples[n]) for n in s.compared}
    information.analyze(kl, rewards, base="sft", kinds=kinds).write(s.out / "analysis")


def verify_answers(s: Seed) -> None:
    """How well every compared model tells right from wrong responses, its own and the others'."""
    from transformers import AutoTokenizer

    from m2rl.analyze import verification
    from m2rl.samples import read_folder

    samples = read_folder(s.out / "samples", s.compared)
    few = {n: mine[:: 2 * s.study.analyses.every] for n, mine in samples.items()}
    right = {n: sum(x.reward > 0.5 for x in mine) for n, mine in few.items()}
    if all(count in (0, len(few[n])) for n, count in right.items()):  # so weak, or so few, that nothing can be told
        print(f"verification left out: no model has both right and wrong responses (right: {right})")
        return
    models = {n: s.models[n] for n in s.compared}
    tokenizer = AutoTokenizer.from_pretrained(models["sft"])
    scores = verification.verify(models, few, tokenizer, dtype=dtype_of(s.study))
    texts = {n: [x.text for x in mine] for n, mine in few.items()}
    verification.analyze(scores, texts, seed=s.seed).write(s.out / "analysis")


def dtype_of(study: Study) -> Any:
    import torch

    return getattr(torch, sampling_config(study).model.compute_dtype)


def weigh(s: Seed) -> None:
    from m2rl.analyze import weights

    rest = {n: m for n, m in s.models.items() if n != "sft"}
    weights.analyze(weights.measure(s.models["sft"], rest, seed=s.seed), base="sft").write(s.out / "analysis")


def count_skills(s: Seed) -> None:
    """Which problems are solved by whom, and what every stage that ran here has cost."""
    from m2rl.analyze import efficiency, skills
    from m2rl.samples import read_folder

    samples = read_folder(s.out / "samples", list(s.models), tokens=False)
    rewards = {n: skills.rewards_of(x) for n, x in samples.items()}
    skills.analyze(rewards, base="sft", experts=s.study.domains).write(s.out / "analysis")
    kinds = {"sft": "sft", **dict.fromkeys(s.study.domains, "expert"), "mixed": "mixed", "distill": "distill"}
    here = [n for n in kinds if not s.study.training(n).checkpoint]
    costs = [efficiency.read_run(s.out / n, n, kinds[n]) for n in here]
    spent = float(json.loads(marker(s.out, "merges").read_text())["seconds"])
    efficiency.analyze([*costs, efficiency.merge_cost("merges", spent)]).write(s.out / "analysis")


def write_report(study: Study, out: Path) -> None:
    from m2rl.report import write

    settings = {
        "study": study.name,
        "scale": study.scale,
        "problems": study.sampling.problems or "all",
        "k": study.sampling.k or "the benchmarks' own",
        "date": datetime.date.today().isoformat(),
    }
    models = list(Seed(study, study.seeds[0], out).models)
    if len(study.seeds) > 1:
        folders = {seed: seed_folder(study, out, seed) for seed in study.seeds}
        write(out, models, study.domains, {"seeds": ", ".join(map(str, study.seeds)), **settings}, folders)
    else:
        write(out, models, study.domains, {"seed": study.seeds[0], **settings})


def work(study: Study, out: Path, stage: Stage) -> None:
    """Do one stage that is not training, in this process."""
    s = Seed(study, stage.seed, seed_folder(study, out, stage.seed))
    works: dict[str, Callable[[], None]] = {
        "merges": lambda: merge_all(s),
        "merge_samples": lambda: sample(s, list(study.merge)),
        "samples": lambda: sample(s, s.trained),
        "policies": lambda: compare_policies(s),
        "verification": lambda: verify_answers(s),
        "weights": lambda: weigh(s),
        "skills": lambda: count_skills(s),
        "report": lambda: write_report(study, out),
    }
    works[stage.name]()


def main(argv: Sequence[str] | None = None) -> int:
    key, *rest = list(sys.argv[1:] if argv is None else argv)
    study, out, _ = parse(rest)
    work(study, out, next(s for s in plan(study, out) if s.key == key))
    return 0


if __name__ == "__main__":
    exit_with(main)
