"""The study: its file, its plan, what is refused before work, and the full-size form at a small size. (CI runs the
embedded study whole.)"""

import dataclasses
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
import tiny
from commands import environment

from m2rl import embedded
from m2rl.domains.procedural import DOMAINS
from m2rl.study.__main__ import main
from m2rl.study.definition import Analyses, Sampling, read, verify
from m2rl.study.plan import Seed, digests_of, finished, marker, plan, training_configs
from m2rl.study.preflight import preflight
from m2rl.study.run import clear, run
from m2rl.study.stages import validation_config, validation_prompts
from m2rl.types import InputError


def digests(made, out):
    return digests_of(plan(made, out))


def changed(a, b):
    return {name for name in a if a[name] != b[name]}


def with_run(made, name, **changes):
    runs = tuple(dataclasses.replace(r, **changes) if r.name == name else r for r in made.run)
    return dataclasses.replace(made, run=runs)


@pytest.fixture
def made():
    return dataclasses.replace(read("study_embedded")[0], scale=0.1)


ANALYSES = {"policies", "verification", "skills"}


@pytest.mark.parametrize("name", ["study_embedded", "study_qwen3_4b"])
def test_the_shipped_studies_are_valid_and_every_stage_comes_after_what_it_needs(name, tmp_path):
    made = verify(*read(name))
    seen = set()
    for stage in plan(made, tmp_path):
        assert set(stage.after) <= seen
        seen.add(stage.key)
    runs = {"sft", *DOMAINS, "mixed", "distill"}
    assert seen == runs | {"merges", "samples", "merge_samples", "weights", "report"} | ANALYSES
    configs = training_configs(Seed(made, 3, tmp_path))
    assert all(c.seed == 3 and c.data.eval == () for c in configs.values())
    models = Seed(made, 3, tmp_path).models
    assert {d.name: d.teacher for d in configs["distill"].domain} == {d: models[d] for d in DOMAINS}
    assert all([d.name for d in configs[name].domain] == [name] for name in DOMAINS)


def test_the_mixed_run_has_the_prompts_of_all_experts_together(made, tmp_path):
    configs = training_configs(Seed(dataclasses.replace(made, scale=1.0), 0, tmp_path))
    assert configs["mixed"].train.steps == sum(configs[d].train.steps for d in DOMAINS)
    assert len({c.rollout.prompts_per_step for c in configs.values() if c.algorithm == "grpo"}) == 1


def test_a_changed_setting_redoes_exactly_what_depends_on_it(made, tmp_path):
    before = digests(made, tmp_path)
    assert changed(before, digests(made, tmp_path)) == set()
    k = dataclasses.replace(made, sampling=dataclasses.replace(made.sampling, k=4))
    assert changed(before, digests(k, tmp_path)) == {"samples", "merge_samples", "report"} | ANALYSES
    assert changed(before, digests(dataclasses.replace(made, seeds=(1,)), tmp_path)) == set(before)
    math = digests(with_run(made, "math", steps=90), tmp_path)
    rest = {"merges", "distill", "samples", "merge_samples", "weights", "report"} | ANALYSES
    assert changed(before, math) == {"math"} | rest
    merge = dataclasses.replace(made, merge={**made.merge, "ta": {"method": "task_arithmetic"}})
    assert changed(before, digests(merge, tmp_path)) == {"merges", "merge_samples", "weights", "report"} | ANALYSES


def test_several_seeds_are_several_studies_and_one_report(made, tmp_path):
    one = plan(made, tmp_path)
    stages = plan(dataclasses.replace(made, seeds=(0, 1, 2)), tmp_path)
    assert len(stages) == 3 * (len(one) - 1) + 1
    assert {s.key.split("/")[0] for s in stages} == {"seed0", "seed1", "seed2", "report"}
    assert len(stages[-1].after) == 12 and all(a.startswith(s.key.split("/")[0]) for s in stages[:-1] for a in s.after)


def test_a_given_checkpoint_is_not_trained_and_its_weights_decide_what_is_redone(made, tmp_path):
    for seed, name in enumerate(("sft", "math")):
        embedded.save(tmp_path / name, seed)
    given = with_run(with_run(made, "sft", checkpoint=str(tmp_path / "sft")), "math", checkpoint=str(tmp_path / "math"))
    before = digests(verify(given, "test"), tmp_path)
    assert not {"sft", "math"} & set(before) and {"code", "mixed", "merges"} < set(before)
    assert Seed(given, 0, tmp_path).models["math"] == str(tmp_path / "math")
    embedded.save(tmp_path / "math", 5)
    assert {"merges", "samples"} < changed(before, digests(given, tmp_path))
    assert "code" not in changed(before, digests(given, tmp_path))


def test_coefficients_are_never_chosen_on_problems_of_the_report(made, tmp_path):
    """The validation prompts come from the training stream, after all that the mixed run draws."""
    from m2rl.domains import procedural

    s = Seed(made, 0, tmp_path)
    found = validation_prompts(s, embedded.build_tokenizer())
    assert {d: len({p.text for p in found[d]}) for d in DOMAINS} == dict.fromkeys(DOMAINS, made.validation.problems)
    texts = {p.text.removeprefix("<bos>").removesuffix("\n") for d in DOMAINS for p in found[d]}
    steps = validation_config(made).train.steps
    stream = {procedural.problem("if", 0, i).prompt for i in range(4 * steps, 4 * steps + 100)}
    assert {p.text.removeprefix("<bos>").removesuffix("\n") for p in found["if"]} < stream
    assert not any(procedural.held_out(text) for text in texts)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: dataclasses.replace(s, run=s.run[:-1]), "stage distill is missing"),
        (lambda s: dataclasses.replace(s, run=(*s.run, s.run[0])), "listed twice"),
        (lambda s: with_run(s, "math", config=""), "run math: needs a config to train it, or a checkpoint"),
        (lambda s: with_run(s, "math", checkpoint="there"), "has a checkpoint but run sft has none"),
        (lambda s: dataclasses.replace(s, merge={**s.merge, "x": {"method": "tis"}}), "merge.x: method must be one of"),
        (
            lambda s: dataclasses.replace(s, merge={**s.merge, "x": {"method": "ties", "densty": 1}}),
            "unknown merge option 'densty'",
        ),
        (lambda s: with_run(s, "mixed", config="", checkpoint="x"), "has a checkpoint but run sft has none"),
        (
            lambda s: with_run(with_run(s, "mixed", config="", checkpoint="x"), "sft", checkpoint="x"),
            "merge.ta: choosing from a list needs run mixed's config",
        ),
        (lambda s: dataclasses.replace(s, merge={}), "no merge is named"),
        (lambda s: dataclasses.replace(s, analyses=Analyses(("tie",))), "analyses.merges: no merge"),
        (lambda s: dataclasses.replace(s, sampling=Sampling()), "sampling.benchmarks names none"),
        (lambda s: dataclasses.replace(s, seeds=(1, 1)), "seeds must differ"),
        (lambda s: dataclasses.replace(s, scale=-1.0), "scale must be above 0"),
    ],
)
def test_a_wrong_file_is_refused_in_one_sentence(made, change, message):
    with pytest.raises(InputError, match=message):
        verify(change(made), "my.toml")


def test_what_cannot_work_is_refused_before_work(made, tmp_path):
    embedded.save(tmp_path / "sft", 0)
    made = with_run(made, "sft", checkpoint=str(tmp_path / "sft"))
    preflight(made, tmp_path)

    def refused(changed, message):
        with pytest.raises(InputError, match=message):
            preflight(changed, tmp_path)

    refused(with_run(made, "math", checkpoint=str(tmp_path / "nowhere")), "run math: checkpoint .*nowhere")
    tiny.model("llama").save_pretrained(tmp_path / "llama")
    embedded.build_tokenizer().save_pretrained(tmp_path / "llama")
    refused(with_run(made, "math", checkpoint=str(tmp_path / "llama")), "lacks|has shape|tensors that")
    embedded.save(tmp_path / "words", 1)
    path = tmp_path / "words" / "tokenizer.json"
    path.write_text(path.read_text().replace('"boxed', '"baxed').replace("(v)", "(w)").replace('"km"', '"kn"'))
    refused(with_run(made, "math", checkpoint=str(tmp_path / "words")), "tokenizer")
    refused(with_run(made, "math", config="qwen3_4b_math"), "run math: .*data/rl/math.jsonl")
    refused(with_run(made, "code", config="qwen3_4b_math"), r"run code: .* has no \[\[domain\]\] of that name")
    refused(with_run(made, "distill", config="embedded"), "has algorithm 'grpo', must be 'distill'")

    def sampled(**changes):
        return dataclasses.replace(made, sampling=dataclasses.replace(made.sampling, **changes))

    refused(sampled(benchmarks=("math", "mths")), "unknown benchmark mths, did you mean math")
    refused(sampled(benchmarks=("math", "code")), "no benchmark of domain science, which has an expert")
    refused(sampled(problems=5000), "math: domain math has only .* held-out problems, 5000 were asked for")
    (tmp_path / "aime.jsonl").write_text("")
    empty = {"benchmarks": (*DOMAINS, "aime24"), "data_files": (f"aime24={tmp_path}/aime.jsonl",)}
    refused(sampled(**empty), "aime")


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
