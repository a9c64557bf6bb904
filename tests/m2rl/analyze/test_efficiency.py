"""Costs of made-up run folders, counted by hand."""

import json

import pytest

from m2rl.analyze.__main__ import main
from m2rl.analyze.efficiency import analyze, merge_cost, ratios, read_run, totals
from m2rl.types import InputError


def run_folder(path, step_s, *, world=1, device="cpu", threads=1, joules=None, repeated=()):
    path.mkdir(parents=True)
    steps = [*range(len(step_s)), *repeated]  # a killed run repeats the steps after its checkpoint
    lines = [
        {
            "step": i,
            "step_s": step_s[i],
            "tokens": 100,
            "trained_tokens": 40,
            "time/rollout_s": 1.0,
            "time/learn_s": 0.5,
            "memory/resident_gib": 1.0 + i,
        }
        for i in steps
    ]
    lines.append({"step": len(step_s), "eval/avg_at_k": 0.5})
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (path / "config.toml").write_text(f"threads = {threads}\n")
    summary = {"device": device, "world_size": world, "wall_s": {"evaluate": 7.0, "total": 99.0}}
    (path / "summary.json").write_text(json.dumps(summary | ({} if joules is None else {"energy_j": joules})))
    return path


def test_a_run_is_the_sum_of_its_steps_each_counted_once(tmp_path):
    c = read_run(run_folder(tmp_path / "r", [2.0, 3.0, 4.0], world=2, threads=2, repeated=[1, 2]), "math", "expert")
    assert (c.steps, c.train_s, c.tokens, c.trained_tokens) == (3, 9.0, 300, 120)
    assert c.devices == 4 and c.device_hours == pytest.approx(9 * 4 / 3600)
    assert (c.rollout_s, c.learn_s, c.evaluate_s, c.energy_kwh, c.peak_gib) == (3.0, 1.5, 7.0, None, 3.0)
    g = read_run(run_folder(tmp_path / "g", [1.0], world=8, device="cuda", threads=4, joules=7.2e6))
    assert g.devices == 8 and g.energy_kwh == 2.0 and g.name == "g"


def test_the_comparison_of_mixed_and_separate(tmp_path):
    costs = [read_run(run_folder(tmp_path / n, s), n, "expert") for n, s in (("math", [4.0] * 10), ("if", [2.0] * 10))]
    costs += [read_run(run_folder(tmp_path / "mix", [3.0] * 8), "mix", "mixed"), merge_cost("ties", 6.0)]
    found = ratios(costs)
    assert found["mixed_over_experts_device_hours"] == pytest.approx(24 / 60)
    assert found["mixed_over_experts_tokens"] == pytest.approx(8 / 20)
    assert "mixed_over_experts_energy_kwh" not in found
    by_stage = totals(costs)
    assert by_stage["expert"]["train_s"] == 60 and by_stage["all"]["runs"] == 4
    assert by_stage["merge"]["device_hours"] == pytest.approx(6 / 3600)
    a = analyze(costs)
    assert a.results["paper"]["mixed_over_experts_device_hours"] == pytest.approx(0.332, abs=5e-4)
    assert "CPU hours" in a.definitions["device_hours"]


def test_the_command(tmp_path):
    for n in ("math", "mix"):
        run_folder(tmp_path / n, [1.0, 1.0])
    arguments = ["--experts", f"math={tmp_path / 'math'}", "--mixed", f"mix={tmp_path / 'mix'}"]
    assert main(["efficiency", *arguments, "--merge-seconds", "ties=3", "--out", str(tmp_path / "o")]) == 0
    found = json.loads((tmp_path / "o" / "efficiency.json").read_text())
    assert found["results"]["ratios"]["mixed_over_experts_device_hours"] == 1
    assert len((tmp_path / "o" / "efficiency-runs.csv").read_text().splitlines()) == 4


def test_bad_runs_are_named(tmp_path):
    with pytest.raises(InputError, match=r"absent is not the folder of a run: it has no metrics\.jsonl"):
        read_run(tmp_path / "absent")
    folder = run_folder(tmp_path / "cut", [1.0])
    (folder / "metrics.jsonl").write_text('{"step": 0, "step_s"')
    with pytest.raises(InputError, match=r"metrics.jsonl:1: malformed JSON"):
        read_run(folder)
    (folder / "metrics.jsonl").write_text('{"step": 0}\n')
    with pytest.raises(InputError, match="records no step"):
        read_run(folder)
    with pytest.raises(InputError, match="at least one run"):
        analyze([])
    mixed = read_run(run_folder(tmp_path / "a", [1.0], device="cuda"), "a", "mixed")
    with pytest.raises(InputError, match="runs on cpu and cuda cannot be compared"):
        analyze([mixed, read_run(run_folder(tmp_path / "b", [1.0]), "b", "expert")])
    with pytest.raises(InputError, match="seconds must be a number, got 'soon'"):
        main(["efficiency", "--merge-seconds", "ties=soon", "--out", str(tmp_path / "o")])
