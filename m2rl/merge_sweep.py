"""`python -m m2rl.merge --sweep`: merge every combination of method, density and lambda, score each, keep the best.

All merges share one statistics pass (a threshold selection serves every density, lambda costs nothing). Each goes from
memory straight into the weights of one live engine, which scores it with Avg@K; only the best (highest mean over
domains) is written, as `--out`, with the table and the plot beside it. A `score` of your own gets folders instead: then
every merge is on disk while the sweep lasts.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from m2rl_kernels.merge_recipe import METHODS, Recipe, recipe

from m2rl import merge as merging
from m2rl.analyze.figures import Series, chart
from m2rl.domains.procedural import DOMAINS
from m2rl.merge_output import output_folder, volume
from m2rl.safetensors_io import resolve_folder
from m2rl.types import InputError

if TYPE_CHECKING:
    from m2rl.evaluate import Evaluator

Scored = tuple[float, float]  # Avg@K, half width of its 95% interval
Judge = Callable[[Path], Mapping[str, Scored]]  # folder of a merged model -> domain -> score


@dataclass(frozen=True)
class Row:
    """One merge of the sweep."""

    label: str
    recipe: Recipe
    scores: Mapping[str, Scored]

    @property
    def mean(self) -> float:
        return sum(s for s, _ in self.scores.values()) / len(self.scores)


def grid(
    methods: Sequence[str],
    densities: Sequence[float | None],
    lambdas: Sequence[float],
    experts: int,
    options: Mapping[str, Any],
) -> dict[str, Recipe]:
    """label -> recipe, without the combinations that a method does not distinguish. A density of None is for methods
    that need none."""
    found: dict[str, Recipe] = {}
    for method, density, lam in itertools.product(methods, densities, lambdas):
        chosen = recipe(method, experts, density=density, lam=lam, **options)
        rule = METHODS[chosen.method]
        label = chosen.method
        label += f"-density{density:g}" if density is not None and "density" in rule.uses else ""
        label += f"-lambda{lam:g}" if chosen.needs_base else ""
        found.setdefault(label, chosen)
    return found


def sweep(
    base: str | None,
    experts: Sequence[str],
    out: Path,
    *,
    methods: Sequence[str],
    densities: Sequence[float | None],
    lambdas: Sequence[float],
    options: Mapping[str, Any],
    score: Judge | None = None,
    evaluator: Evaluator | None = None,
    evaluate: Sequence[str] = (),
    k: int = 8,
    engine: Literal["native", "vllm"] = "native",
    **shared: Any,
) -> list[Row]:
    """Merge, score, keep the best as `out`. Returns the rows, best first.

    evaluator: a live one whose engine takes every merge; default one on `engine`, "native" or "vllm". evaluate: the
    benchmarks it scores on, `k` samples per problem; default the generated problems of four domains. score: any
    function of a model folder, in the evaluator's place. shared: as of `merge.merge_many`.
    """
    models = [m for m in (base, *experts) if m is not None]
    out = output_folder(out, {str(m): resolve_folder(m) for m in models}, bool(shared.get("overwrite")))
    recipes = grid(methods, densities, lambdas, len(experts), options)
    work = out.with_name(f".{out.name}.sweep")
    if score is not None:
        rows = _by_folder(base, experts, recipes, work, score, shared)
    else:
        rows = _by_engine(base, experts, recipes, work, evaluator, list(evaluate) or list(DOMAINS), k, engine, shared)
    rows.sort(key=lambda row: -row.mean)
    best = work / rows[0].label
    if not best.is_dir():
        merging.merge_many(base, experts, [(rows[0].recipe, best)], **{**shared, "sync": False})
    (best / "sweep.json").write_text(
        json.dumps(
            [{"label": r.label, "recipe": r.recipe.describe(), "mean": r.mean, "scores": r.scores} for r in rows],
            indent=2,
            default=str,
        )
        + "\n"
    )
    (best / "sweep.svg").write_text(plot(rows))
    with open(best / "README.md", "a") as card:
        card.write(f"\nBest of {len(rows)} merges:\n\n{table(rows)}\n")
    if out.exists():
        shutil.rmtree(out)
    best.rename(out)
    shutil.rmtree(work)
    print(table(rows))
    print(f"\n{out}: {rows[0].label}, mean {rows[0].mean:.4f}")
    return rows


def _by_folder(
    base: str | None,
    experts: Sequence[str],
    recipes: Mapping[str, Recipe],
    work: Path,
    score: Judge,
    shared: Mapping[str, Any],
) -> list[Row]:
    """Every merge on disk, in one reading of the inputs; then each folder is scored."""
    done = {label for label in recipes if shared.get("resume") and (work / label).is_dir()}
    todo = [(chosen, work / label) for label, chosen in recipes.items() if label not in done]
    inputs = merging.open_inputs(base, experts)
    need = sum(inputs.info(n).size for n in inputs.merged) * len(todo)
    work.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(work.parent).free
    if free < need:
        raise InputError(
            f"{work.parent} has {volume(free)} free, the {len(todo)} merges of the sweep need about {volume(need)}"
        )
    if todo:
        merging.merge_many(base, experts, todo, **{**shared, "sync": False})
    return [Row(label, chosen, dict(score(work / label))) for label, chosen in recipes.items()]


def _by_engine(
    base: str | None,
    experts: Sequence[str],
    recipes: Mapping[str, Recipe],
    work: Path,
    evaluator: Evaluator | None,
    evaluate: Sequence[str],
    k: int,
    engine: Literal["native", "vllm"],
    shared: Mapping[str, Any],
) -> list[Row]:
    """Every merge in memory, taken by the engine and scored; what is scored is kept for `resume`."""
    import torch

    from m2rl.evaluate import Evaluator, evaluation_config

    asked = {"base": str(base), "experts": list(map(str, experts)), "evaluate": list(evaluate), "k": k}
    log, known = work / "scores.jsonl", {}
    if shared.get("resume") and log.is_file():
        first, *lines = map(json.loads, log.read_text().splitlines())
        known = {line["label"]: line["scores"] for line in lines} if first == asked else {}
    work.mkdir(parents=True, exist_ok=True)
    rows = [Row(label, recipes[label], known[label]) for label in recipes if label in known]
    todo = {label: chosen for label, chosen in recipes.items() if label not in known}
    lines = [asked, *({"label": r.label, "scores": r.scores} for r in rows)]
    log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    merges = merging.in_memory(
        base, experts, list(todo.values()), dtype=shared.get("dtype"), threads=shared.get("threads", 0)
    )
    with contextlib.ExitStack() as stack, open(log, "a") as file:
        for label, merged in zip(todo, merges):
            if evaluator is None:  # after the first merge: what is wrong with the inputs shows before an engine starts
                config = evaluation_config(evaluate, engine=engine)
                evaluator = stack.enter_context(Evaluator(str(base or experts[0]), config))
            weights = {
                name: torch.from_numpy(data).view(getattr(torch, dtype)).view(shape)
                for name, (dtype, shape, data) in merged.items()
            }
            found = evaluator.score(weights, list(evaluate), k=k)
            scores = {name: (s.avg_at_k, (s.ci95[1] - s.ci95[0]) / 2) for name, s in found.items()}
            file.write(json.dumps({"label": label, "scores": scores}) + "\n")
            file.flush()
            rows.append(Row(label, todo[label], scores))
    return rows


def table(rows: Sequence[Row]) -> str:
    """Markdown: one line per merge, best first; scores in percent with 95% intervals."""
    domains = list(rows[0].scores)
    lines = ["| merge | mean | " + " | ".join(domains) + " |", "|---|---|" + "---|" * len(domains)]
    for row in rows:
        cells = " | ".join(f"{100 * row.scores[d][0]:.1f} ± {100 * row.scores[d][1]:.1f}" for d in domains)
        lines.append(f"| {row.label} | {100 * row.mean:.1f} | {cells} |")
    return "\n".join(lines)


def plot(rows: Sequence[Row]) -> str:
    """SVG: mean score against lambda, one line per method and density; single points where lambda does not vary."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        lines.setdefault(row.label.split("-lambda")[0], []).append((row.recipe.lam, 100 * row.mean))
    series = [Series(name, [x for x, _ in sorted(at)], [y for _, y in sorted(at)]) for name, at in lines.items()]
    return chart("sweep", "lines", "Merges", series, x_title="lambda", y_title="mean Avg@K, %").svg()
