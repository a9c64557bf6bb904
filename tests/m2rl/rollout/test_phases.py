"""Who holds the accelerator's memory when, over whole runs: an engine that really sleeps stands in for vLLM on a GPU.

It decodes as the default engine does, but sleep destroys its weights, sync alone brings them back, and whatever comes
in the wrong order raises.
"""

import json

import pytest
import torch

from m2rl import embedded, train
from m2rl.learner import Learner
from m2rl.rollout import start
from m2rl.rollout.native import NativeEngine

SMALL = ["--train.steps", "3", "--train.save-every", "1", "--evaluation.problems", "2", "--evaluation.k", "2"]
SMALL += ["--evaluation.every", "2", "--rollout.prompts-per-step", "4", "--rollout.group-size", "2"]
SMALL += [x for i in range(4) for x in (f"--domain.{i}.quota", "1")]


class Sleeping(NativeEngine):
    """weights: "gone" (asleep), "there" (awake or written since); awake: the cache is there as well."""

    def __init__(self, *args):
        super().__init__(*args)
        self.weights, self.awake, self.log = "there", True, []

    def load(self, weights, version):
        self.log.append("write")
        super().load(weights, version)
        self.weights = "there"

    def sleep(self):
        if not self.pending and self.awake:
            self.log.append("sleep")
            for p in self.model.parameters():
                p.data.fill_(float("nan"))
            self.weights, self.awake = "gone", False

    def wake(self):
        assert self.weights == "there", "the cache woke before the weights were written"
        if not self.awake:
            self.log.append("wake")
        self.awake = True

    def submit(self, requests):
        assert self.awake, "a request reached an engine that sleeps"
        super().submit(requests)


@pytest.fixture
def engines(monkeypatch):
    """Every engine that a run starts. No gradient may be computed while one is awake."""
    made = []

    def build(*args):
        made.append(Sleeping(*args))
        return made[-1]

    monkeypatch.setattr(start, "NativeEngine", build)
    backward = Learner.backward

    def checked(self, *args, **kwargs):
        assert not any(e.awake for e in made), "the trainer computes gradients while the engine holds its memory"
        for e in made:
            e.log.append("learn")
        return backward(self, *args, **kwargs)

    monkeypatch.setattr(Learner, "backward", checked)
    return made


def steps_of(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [m for m in lines if "loss" in m]


def test_grpo_evaluation_and_probe_take_turns_with_the_trainer(engines, embedded_folder, tmp_path):
    folder = tmp_path / "run"
    options = ["--run-dir", str(folder), "--warm-start", "", "--model.path", str(embedded_folder)]
    assert train.main([*options, *SMALL, "--train.tokens-per-bin", "4096"]) == 0
    (engine,) = engines
    turn = ["write", "wake", "sleep"]
    # start; probe; evaluation before; steps 0 and 1; evaluation after step 1; step 2; evaluation at the end; close
    want = ["sleep", *turn, *turn, *turn, "learn", *turn, "learn", *turn, *turn, "learn", *turn]
    assert engine.log == want
    assert [m["step"] for m in steps_of(folder)] == [0, 1, 2]


@pytest.mark.parametrize("divergence", ["sampled_reverse", "forward"])
def test_distillations_student_sleeps_while_it_learns(engines, tmp_path, divergence):
    for seed, name in enumerate(("model", "teacher")):
        embedded.save(tmp_path / name, seed)
    config = tmp_path / "my.toml"
    config.write_text(
        f"""algorithm = "distill"
run_dir = "{tmp_path / "run"}"
distill.divergence = "{divergence}"
model.path = "{tmp_path / "model"}"
[data]
eval = ["procedural"]
[[domain]]
name = "math"
teacher = "{tmp_path / "teacher"}"
[rollout]
prompts_per_step = 2
group_size = 2
max_prompt_tokens = 40
max_new_tokens = 16
[train]
steps = 2
tokens_per_bin = 4000
[evaluation]
k = 1
problems = 2
"""
    )
    assert train.main(["--config", str(config)]) == 0
    (engine,) = engines
    turn = ["write", "wake", "sleep"]
    assert engine.log == ["sleep", *turn, *turn, *turn, "learn", *turn, "learn", *turn]
    for m in steps_of(tmp_path / "run"):
        assert m["weight_lag"] == 0 and m["math/mismatch_k3"] < 1e-6


def test_a_resumed_runs_moments_wait_on_the_host_while_the_engine_builds_its_cache(
    engines, embedded_folder, tmp_path, monkeypatch
):
    """Parked only later, they would lie where the cache goes: a run that fits would not resume."""
    options = ["--run-dir", str(tmp_path / "run"), "--warm-start", "", "--model.path", str(embedded_folder), *SMALL]
    options += ["--rollout.park-optimizer", "True", "--train.tokens-per-bin", "4096"]
    assert train.main([*options, "--train.steps", "1"]) == 0
    found = []
    build = train.Run.build_engine

    def watched(self):
        state = self.learner.optimizer.state.values()
        found.append([s[k].untyped_storage().size() for s in state for k in ("exp_avg", "exp_avg_sq")])
        return build(self)

    monkeypatch.setattr(train.Run, "build_engine", watched)
    assert train.main(options) == 0
    assert len(found[0]) > 0 and set(found[0]) == {0}
    assert [m["step"] for m in steps_of(tmp_path / "run")] == [0, 1, 2]
    assert all(torch.isfinite(torch.tensor(m["loss"])) for m in steps_of(tmp_path / "run"))
