"""A sweep on a live engine: merges go from memory into its weights, and only the best is ever on disk."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from m2rl import merge, merge_sweep
from m2rl.config import Config, Evaluation, Rollout
from m2rl.evaluate import Evaluator
from m2rl.types import InputError

WANTED = {
    "average": {},
    "task_arithmetic": {"lam": 0.7},
    "ties": {"density": 0.3},
    "ties of the whole model": {"method": "ties", "density": 0.3, "scope": "model"},
    "dare_ties": {"density": 0.4, "seed": 3},
    "sce": {"density": 0.5},
    "tsv_m": {},
}


@pytest.fixture(scope="module")
def folders(embedded_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("experts")
    tensors = load_file(embedded_folder / "model.safetensors")
    for k in range(2):
        shutil.copytree(embedded_folder, folder / f"e{k}")
        g = torch.Generator().manual_seed(k)
        tuned = {n: x + 0.02 * torch.randn(x.shape, generator=g).to(x.dtype) for n, x in tensors.items()}
        save_file(tuned, folder / f"e{k}" / "model.safetensors", metadata={"format": "pt"})
    return str(embedded_folder), [str(folder / "e0"), str(folder / "e1")]


def as_torch(merged):
    return {n: torch.from_numpy(x).view(getattr(torch, d)).view(s) for n, (d, s, x) in merged.items()}


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_merges_in_memory_are_those_on_disk_bitwise(folders, tmp_path, dtype):
    base, experts = folders
    recipes = [merge.recipe(o.pop("method", n), 2, **o) for n, o in ((n, dict(o)) for n, o in WANTED.items())]
    merge.merge_many(base, experts, [(r, tmp_path / str(i)) for i, r in enumerate(recipes)], dtype=dtype)
    for i, merged in enumerate(merge.in_memory(base, experts, recipes, dtype=dtype)):
        want, got = load_file(tmp_path / str(i) / "model.safetensors"), as_torch(merged)
        assert got.keys() == want.keys()
        assert all(got[n].dtype == want[n].dtype and torch.equal(got[n], want[n]) for n in want), recipes[i].method


def sweep(folders, out, **options):
    base, experts = folders
    return merge_sweep.sweep(
        base, experts, out, methods=["ties", "average"], densities=[0.2, 0.6], lambdas=[0.5, 1.0],
        options={}, evaluate=["math", "if"], k=1, **options,
    )  # fmt: skip


@pytest.fixture
def live(folders, tmp_path, monkeypatch):
    """An evaluator; what its engine was given, and the checkpoints on disk at that time."""
    with Evaluator(
        folders[0], Config(rollout=Rollout(max_new_tokens=12), evaluation=Evaluation(problems=3))
    ) as evaluator:
        taken = []
        load = evaluator.engine.load

        def watched(weights, version):
            taken.append(({n: w.clone() for n, w in weights.items()}, list(tmp_path.rglob("*.safetensors"))))
            load(weights, version)

        monkeypatch.setattr(evaluator.engine, "load", watched)
        yield evaluator, taken


def test_every_merge_goes_into_the_live_engine_and_only_the_best_to_disk(folders, live, tmp_path):
    evaluator, taken = live
    rows = sweep(folders, tmp_path / "out", evaluator=evaluator)
    assert len(rows) == len(taken) == 5 and rows[0].mean == max(r.mean for r in rows)
    assert [on_disk for _, on_disk in taken] == [[]] * 5
    assert [p.parent.name for p in tmp_path.rglob("*.safetensors")] == ["out"] and not list(tmp_path.glob(".*"))
    best = load_file(tmp_path / "out" / "model.safetensors")
    order = list(merge_sweep.grid(["ties", "average"], [0.2, 0.6], [0.5, 1.0], 2, {}))
    given = taken[order.index(rows[0].label)][0]
    assert all(torch.equal(given[n], best[n]) for n in given)  # what was scored is what is kept
    saved = json.loads((tmp_path / "out" / "sweep.json").read_text())
    assert [r["label"] for r in saved] == [r.label for r in rows] and set(saved[0]["scores"]) == {"math", "if"}


def test_an_interrupted_sweep_scores_only_what_is_missing(folders, live, tmp_path, monkeypatch):
    evaluator, taken = live
    score = evaluator.score

    def dies(weights, *args, **kwargs):
        if len(taken) == 2:
            raise KeyboardInterrupt
        return score(weights, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(evaluator, "score", dies)
        with pytest.raises(KeyboardInterrupt):
            sweep(folders, tmp_path / "out", evaluator=evaluator)
    rows = sweep(folders, tmp_path / "out", evaluator=evaluator, resume=True)
    assert len(rows) == len(taken) == 5
    shutil.rmtree(tmp_path / "out")
    again = sweep(folders, tmp_path / "out", evaluator=evaluator)
    assert {r.label: r.scores for r in again} == {r.label: tuple_scores(r) for r in rows}


def tuple_scores(row):
    return {name: tuple(pair) for name, pair in row.scores.items()}


def test_scores_of_another_sweep_are_not_taken_over(folders, live, tmp_path):
    evaluator, taken = live
    work = tmp_path / ".out.sweep"
    work.mkdir()
    lines = [{"base": "another", "experts": [], "evaluate": ["math", "if"], "k": 1}]
    lines += [{"label": "average", "scores": {"math": [1.0, 0.0]}}]
    (work / "scores.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    sweep(folders, tmp_path / "out", evaluator=evaluator, resume=True)
    assert len(taken) == 5


def test_an_overflow_is_named_before_the_engine_sees_it(folders, live, tmp_path):
    base, experts = folders
    large = tmp_path / "large"
    shutil.copytree(experts[0], large)
    tensors = load_file(large / "model.safetensors")
    tensors["model.norm.weight"][0] = 1e6
    save_file(tensors, large / "model.safetensors", metadata={"format": "pt"})
    evaluator, taken = live
    with pytest.raises(InputError, match=r"model\.norm\.weight: 1 merged elements overflow F16"):
        sweep((base, [str(large), experts[1]]), tmp_path / "out", evaluator=evaluator, dtype="float16")
    assert not taken
