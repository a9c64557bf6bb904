"""The stages as processes: done, continued, stopped; the full-size form made small. (CI runs the embedded study.)"""

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from importlib import resources
from pathlib import Path

import benchmark_rows
import pytest
from commands import environment

from m2rl import embedded
from m2rl.study.__main__ import main
from m2rl.study.plan import digests_of, finished, marker, plan
from m2rl.study.run import clear, run
from m2rl.types import InputError


def test_only_asks_for_what_is_missing(made, tmp_path):
    with pytest.raises(InputError, match="stage merges needs sft, which is not done"):
        run(made, tmp_path, [], ["merges"])
    with pytest.raises(InputError, match=r"--only: no stage sfr \(there are: sft"):
        run(made, tmp_path, [], ["sfr"])


def test_two_studies_do_not_work_in_one_folder(made, tmp_path):
    with open(tmp_path / ".lock", "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="another study is at work in"):
            run(made, tmp_path, [], ["sft"])


def test_a_finished_stage_is_known_by_its_hash_and_old_files_go_when_inputs_change(made, tmp_path):
    stages = plan(made, tmp_path)
    found, first = digests_of(stages), stages[0]
    assert not finished(tmp_path, first, found)
    (tmp_path / "stages").mkdir()
    marker(tmp_path, "sft").write_text(json.dumps({"digest": found["sft"], "seconds": 1.0}))
    assert finished(tmp_path, first, found)
    marker(tmp_path, "sft").write_text(json.dumps({"digest": "another", "seconds": 1.0}))
    assert not finished(tmp_path, first, found)
    (tmp_path / "sft").mkdir()
    clear(tmp_path, first, "now")
    (tmp_path / "sft").mkdir()
    clear(tmp_path, first, "now")  # an interrupted attempt at the same
    assert (tmp_path / "sft").is_dir()
    clear(tmp_path, first, "changed")
    assert not (tmp_path / "sft").exists()


def full_size_form(folder: Path) -> str:
    """A study file of the same form as study_qwen3_4b: torchrun, given checkpoints, data and benchmarks from files."""
    for seed, name in enumerate(("SFT", "RL_Math", "RL_IF", "RL_Multi")):
        embedded.save(folder / name, seed)
    rows = [{"domain": "math", "prompt": f"math: what is {i}+1", "answer": str(i + 1)} for i in range(8)]
    no_comma = [{"id": "punctuation:no_comma", "kwargs": {}}]
    rows += [{"domain": "if", "prompt": f"exactly {i} words", "constraints": no_comma} for i in range(8)]
    (folder / "rl.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    for name in ("aime24", "ifeval"):
        lines = benchmark_rows.ALL[name]()
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in lines))
    (folder / "distill.toml").write_text(f"""
algorithm = "distill"
[data]
train = ["{folder}/rl.jsonl"]
[[domain]]
name = "math"
[[domain]]
name = "if"
[rollout]
prompts_per_step = 4
group_size = 2
max_prompt_tokens = 64
max_new_tokens = 8
[train]
steps = 2
tokens_per_bin = 2048
""")
    (folder / "study.toml").write_text(f"""
ranks = 2
[[run]]
name = "sft"
checkpoint = "{folder}/SFT"
[[run]]
name = "math"
checkpoint = "{folder}/RL_Math"
[[run]]
name = "if"
checkpoint = "{folder}/RL_IF"
[[run]]
name = "mixed"
checkpoint = "{folder}/RL_Multi"
[[run]]
name = "distill"
config = "{folder}/distill.toml"
[merge.ta]
method = "task_arithmetic"
preset = "paper"
[merge.ties]
method = "ties"
preset = "paper"
density = 0.2
[sampling]
benchmarks = ["math", "if", "aime24", "ifeval"]
data_files = ["aime24={folder}/aime24.jsonl", "ifeval={folder}/ifeval.jsonl"]
config = "{folder}/distill.toml"
problems = 3
k = 2
[analyses]
merges = ["ties"]
every = 2
""")
    return str(folder / "study.toml")


def command(*arguments):
    return [sys.executable, "-m", "m2rl.study", *arguments]


def test_the_full_size_form_runs_on_given_checkpoints_under_torchrun(tmp_path, capsys):
    """Up to the samples of all models; the analyses of a study run in CI."""
    config, out = full_size_form(tmp_path), tmp_path / "out"
    argv = ["--config", config, "--out", str(out)]
    assert main([*argv, "--dry-run"]) == 0
    planned = capsys.readouterr().out
    assert "given" in planned and "GPU hours" in planned and not out.exists()
    argv += ["--only", "distill", "merges", "samples", "merge_samples"]
    done = subprocess.run(command(*argv), env=environment(), capture_output=True, text=True, timeout=420)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((out / "distill" / "summary.json").read_text())["world_size"] == 2
    names = {p.stem for p in (out / "samples").glob("*.jsonl")}
    assert names == {"sft", "math", "if", "mixed", "ta", "ties", "distill"}
    rows = [json.loads(line) for line in (out / "samples" / "ties.jsonl").read_text().splitlines()]
    assert {r["domain"] for r in rows} == {"math", "if"} and {len(r["response_tokens"]) > 0 for r in rows} == {True}
    assert main(argv) == 0
    assert "4 of 9 stages are done; to do: none" in capsys.readouterr().out


def test_a_killed_study_leaves_nothing_running_and_goes_on(tmp_path):
    out = tmp_path / "out"
    argv = ["--out", str(out), "--scale", "0.05", "--problems", "4", "--k", "2", "--only", "sft"]
    first = subprocess.Popen(command(*argv), env=environment(), stdout=subprocess.DEVNULL)
    metrics = out / "sft" / "metrics.jsonl"
    end = time.monotonic() + 120
    while not (metrics.is_file() and metrics.read_text()) and time.monotonic() < end:
        time.sleep(0.05)
    children = Path(f"/proc/{first.pid}/task/{first.pid}/children").read_text().split()
    first.send_signal(signal.SIGKILL)
    first.wait()
    time.sleep(1)
    assert children and not any(alive(int(c)) for c in children)
    done = subprocess.run(command(*argv), env=environment(), capture_output=True, text=True, timeout=420)
    assert done.returncode == 0 and (out / "stages" / "sft.json").is_file(), done.stdout + done.stderr


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().split(")")[1].split()[0] != "Z"


def test_a_stage_that_fails_names_its_last_words_and_its_log(tmp_path):
    (tmp_path / "rows.jsonl").write_text("no JSON at all\n")
    broken = f'algorithm = "sft"\n[model]\npath = "embedded"\n[data]\ntrain = ["{tmp_path}/rows.jsonl"]\n'
    (tmp_path / "broken.toml").write_text(broken)
    text = resources.files("m2rl.configs").joinpath("study_embedded.toml").read_text()
    (tmp_path / "study.toml").write_text(text.replace('"embedded_sft"', f'"{tmp_path}/broken.toml"'))
    argv = [
        "--config",
        str(tmp_path / "study.toml"),
        "--out",
        str(tmp_path / "out"),
        "--problems",
        "4",
        "--only",
        "sft",
    ]
    done = subprocess.run(command(*argv), env=environment(), capture_output=True, text=True, timeout=420)
    assert done.returncode == 2
    assert "stage sft ended with status 2: m2rl: " in done.stderr and "rows.jsonl:1: " in done.stderr
    assert "sft.log" in done.stderr
