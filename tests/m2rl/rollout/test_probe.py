"""An engine that samples from another policy than the trainer's is found at the start, on resume, and later."""

import dataclasses
import json

import pytest

from m2rl import embedded, train
from m2rl.rollout import start
from m2rl.rollout.native import NativeEngine
from m2rl.types import InputError

SMALL = [
    "--train.steps",
    "3",
    "--train.save-every",
    "1",
    "--train.tokens-per-bin",
    "4096",
    "--evaluation.problems",
    "2",
]
SMALL += ["--evaluation.k", "1", "--rollout.prompts-per-step", "4", "--rollout.group-size", "4"]
SMALL += [x for i in range(4) for x in (f"--domain.{i}.quota", "1")]


@pytest.fixture
def options(embedded_folder, tmp_path):
    return ["--run-dir", str(tmp_path / "run"), "--warm-start", "", "--model.path", str(embedded_folder), *SMALL]


class Stale(NativeEngine):
    """Keeps the weights it has when it is given those of `ignored` or later."""

    ignored = 0

    def load(self, weights, version):
        if version < self.ignored:
            super().load(weights, version)
        self.version = version


class Hotter(NativeEngine):
    """Samples at another temperature than asked for."""

    def submit(self, requests):
        super().submit(dataclasses.replace(r, temperature=r.temperature * 1.5) for r in requests)


class OneTensor(NativeEngine):
    """Forgets the last norm, as a wrong name mapping would."""

    def load(self, weights, version):
        weights = dict(weights)
        weights["model.norm.weight"] = weights["model.norm.weight"] * 1.2
        super().load(weights, version)


@pytest.mark.parametrize("engine", [Stale, Hotter, OneTensor])
def test_the_probe_ends_a_run_before_its_first_step(options, monkeypatch, engine, tmp_path):
    monkeypatch.setattr(start, "NativeEngine", engine)
    with pytest.raises(InputError, match=r"on 64 probe tokens at weight version 0: mean k3 .* \(limit 0.001\)"):
        train.main(options)
    assert not (tmp_path / "run" / "metrics.jsonl").read_text()


def test_the_probe_is_repeated_on_resume(options, monkeypatch):
    assert train.main([*options, "--train.steps", "1"]) == 0
    monkeypatch.setattr(start, "NativeEngine", Stale)
    with pytest.raises(InputError, match="probe tokens at weight version 1"):
        train.main(options)


def test_drift_after_the_probe_raises_the_alarm_and_is_logged_by_domain(options, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(start, "NativeEngine", Stale)
    monkeypatch.setattr(Stale, "ignored", 1)  # takes the first weights, none of the updated ones; every sample teaches
    embedded.save(tmp_path / "teacher", 1)
    teachers = [x for i in range(4) for x in (f"--domain.{i}.teacher", str(tmp_path / "teacher"))]
    assert train.main([*options, "--algorithm", "distill", *teachers, "--optim.lr", "0.01"]) == 0
    assert "mean k3 between engine and trainer is" in " ".join(capsys.readouterr().out.split())
    steps = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    found = {m["step"]: max(v for k, v in m.items() if k.endswith("/mismatch_k3")) for m in steps if "loss" in m}
    assert found[0] < 1e-6 and found[2] > 1e-3
