"""torchrun -m m2rl.evaluate as a user types it: tables, resume after a kill, several models and ranks, bad input."""

import csv
import io
import json
import re
import shutil
import signal
import subprocess
import sys
import time

import benchmark_rows
import pytest
from commands import environment, torchrun

from m2rl import embedded, published
from m2rl.analyze.__main__ import main as analyze
from m2rl.evaluate.__main__ import main, model_name
from m2rl.samples import read_folder
from m2rl.scores import Score
from m2rl.types import InputError


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    embedded.save(folder / "mine", 0)
    embedded.save(folder / "RL_Math", 1)
    for name in ("gpqa_diamond", "aime24", "ifeval"):
        rows = benchmark_rows.ALL[name]()
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (folder / "train.jsonl").write_text(
        json.dumps({"domain": "math", "prompt": "unrelated words", "answer": "1"}) + "\n"
    )
    return folder


def arguments(models, out, *more):
    files = [f"--data-file={name}={models}/{name}.jsonl" for name in ("gpqa_diamond", "aime24", "ifeval")]
    return [
        "--models",
        str(models / "mine"),
        "--benchmarks",
        "gpqa_diamond,ifeval",
        "math",
        "--k",
        "2",
        "--max-new-tokens",
        "6",
        "--problems",
        "3",
        "--out",
        str(out),
        *files,
        *more,
    ]


def samples(folder):
    found = [
        json.loads(line) for path in sorted(folder.glob("samples.*.jsonl")) for line in path.read_text().splitlines()
    ]
    return {(r["prompt_id"], r["sample"]): r["response"] for r in found}


@pytest.fixture(scope="module")
def done(models, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    run = torchrun(
        "-m",
        "m2rl.evaluate",
        *arguments(models, out, "--train-data", str(models / "train.jsonl")),
        "--models",
        str(models / "mine"),
        str(models / "RL_Math"),
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return out, run.stdout


def test_one_call_gives_the_table_of_several_models(done):
    out, text = done
    table = (out / "table.md").read_text()
    assert re.match(r"\| benchmark \| mine \| RL_Math \|\n\| --- \| ---: \| ---: \|\n\| GPQA-D \(Avg@2\)", table)
    assert "* (paper 56.82)" in table and "* (paper 83.18)" in table and table.count("(paper") == 2
    assert "GPQA-D (Avg@2)" in text and "* (paper 56.82)" in text and "sandbox" not in text
    rows = list(csv.DictReader(io.StringIO((out / "table.csv").read_text())))
    assert [(r["model"], r["benchmark"], r["problems"]) for r in rows[:3]] == [
        ("mine", "gpqa_diamond", "3"),
        ("mine", "ifeval", "2"),
        ("mine", "math", "3"),
    ]
    assert rows[3]["published"] == "56.82" and rows[0]["published"] == ""
    page = (out / "table.html").read_text()
    assert page.startswith("<!doctype html>") and "IFEval (Avg@2)" in page and "http" not in page
    record = json.loads((out / "scores.json").read_text())
    assert record["seed"] == 0 and set(record["scores"]["mine"]["ifeval"]["details"]) == {
        "strict_prompt",
        "strict_instruction",
        "loose_prompt",
        "loose_instruction",
    }
    assert "problems 3 (the paper's 198), K 2 (the paper's 4), tokens 6" in record["notes"]["gpqa_diamond"][-2]
    assert record["notes"]["gpqa_diamond"][-1] == "0 of 3 problems share 13 words in a row with the training data"
    assert sum(record["scores"]["mine"]["math"]["statuses"].values()) == 6
    assert len(samples(out / "mine" / "gpqa_diamond")) == 6


def test_a_finished_evaluation_is_only_read_again(done, models):
    out, _ = done
    before = {p: p.read_bytes() for p in out.rglob("samples.*")}
    scores = json.loads((out / "scores.json").read_text())["scores"]
    assert main([*arguments(models, out), "--models", str(models / "mine"), str(models / "RL_Math")]) == 0
    assert {p: p.read_bytes() for p in out.rglob("samples.*")} == before
    assert json.loads((out / "scores.json").read_text())["scores"] == scores


SKILLS = ["skills", "--base", "mine", "--models", "mine", "RL_Math", "--experts", "RL_Math"]


def test_the_samples_of_an_evaluation_can_be_analysed(done, models, tmp_path):
    out, _ = done
    assert analyze([*SKILLS, "--samples", str(out), "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "skills.json").read_text())
    assert found["inputs"]["problems"] == {"all": 8, "gpqa_diamond": 3, "ifeval": 2, "math": 3}
    assert found["inputs"]["samples_per_problem"] == 2
    read = read_folder(out, ["mine"], tokens=False)["mine"]
    assert [(s.prompt.domain, s.index) for s in read[:2]] == [("science", 0), ("science", 1)]
    assert all(s.prompt.text and s.text is not None and s.status for s in read)
    options = ["--base=mine", "--experts=math=mine", "--samples", str(out)]
    options += ["--models", f"mine={models}/mine", f"RL_Math={models}/RL_Math"]
    for analysis in ("policies", "information", "verification"):
        with pytest.raises(InputError, match=r"mine holds samples of m2rl.evaluate, which keeps no tokens"):
            analyze([analysis, *options, "--out", str(tmp_path / "none")])
    with pytest.raises(InputError, match=r"no samples of other: neither other.jsonl nor other/<benchmark>/samples"):
        analyze([*SKILLS, "--models", "other", "--samples", str(out), "--out", str(tmp_path)])


def test_rewards_come_from_the_files_of_the_model_and_benchmark(done, tmp_path):
    shutil.copytree(done[0], tmp_path / "out")
    path = tmp_path / "out" / "RL_Math" / "math" / "samples.0.jsonl"  # random weights have solved nothing
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(r | {"reward": 1.0 if r["sample"] else 0.0}) + "\n" for r in rows))
    assert analyze([*SKILLS, "--rule", "any", "--samples", str(tmp_path / "out"), "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "skills.json").read_text())
    assert found["results"]["solved"]["RL_Math"]["math"] == 3
    pairs = {r["domain"]: r for r in found["tables"]["pairs"]}
    scores = json.loads((done[0] / "scores.json").read_text())["scores"]
    assert pairs["math"]["difference"] == pytest.approx(scores["mine"]["math"]["avg_at_k"] - 0.5)


def test_the_samples_of_several_ranks_are_one_evaluation_and_an_unfinished_one_is_refused(done, tmp_path):
    for model in ("mine", "RL_Math"):
        shutil.copytree(done[0] / model, tmp_path / model)
    path = tmp_path / "mine" / "ifeval" / "samples.0.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.with_name("samples.1.jsonl").write_text(lines[0] + lines[2])
    path.write_text(lines[3] + lines[1] + '{"torn')
    want, got = (read_folder(f, ["mine"], tokens=False)["mine"] for f in (done[0], tmp_path))
    assert [(s.prompt.id, s.index, s.text) for s in got] == [(s.prompt.id, s.index, s.text) for s in want]
    path.write_text(lines[3] + lines[1][:-9])
    with pytest.raises(InputError, match=r"ifeval: 1 of 2 problems have fewer than 2 samples; the evaluation is not"):
        read_folder(tmp_path, ["mine"], tokens=False)
    for name in ("samples.0.jsonl", "samples.1.jsonl"):
        path.with_name(name).write_text("")
    with pytest.raises(InputError, match=r"ifeval: it holds no samples; the evaluation is not finished"):
        read_folder(tmp_path, ["mine"], tokens=False)


def test_more_samples_and_problems_keep_those_that_are_there(models, tmp_path):
    main([*arguments(models, tmp_path), "--benchmarks", "math"])
    before = samples(tmp_path / "mine" / "math")
    main([*arguments(models, tmp_path), "--benchmarks", "math", "--problems", "5", "--k", "3"])
    after = samples(tmp_path / "mine" / "math")
    assert len(after) == 15 and {key: after[key] for key in before} == before


def test_two_ranks_draw_the_samples_of_one(done, models, tmp_path):
    run = torchrun("-m", "m2rl.evaluate", *arguments(models, tmp_path), ranks=2)
    assert run.returncode == 0, run.stdout + run.stderr
    for name in ("gpqa_diamond", "ifeval", "math"):
        assert len(list((tmp_path / "mine" / name).glob("samples.*.jsonl"))) == 2
        assert samples(tmp_path / "mine" / name) == samples(done[0] / "mine" / name)


def test_a_killed_evaluation_goes_on_where_it_was(models, tmp_path):
    command = [*arguments(models, tmp_path), "--benchmarks", "math", "--problems", "40", "--k", "30"]
    process = subprocess.Popen(
        [sys.executable, "-m", "m2rl.evaluate", *command],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    folder = tmp_path / "mine" / "math"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        written = folder / "samples.0.jsonl"
        if written.is_file() and written.stat().st_size > 20_000:
            break
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    left = samples_of_torn(folder)
    if process.returncode == 0 or len(left) == 1200:
        pytest.skip("it finished before it could be killed")
    assert 0 < len(left) < 1200
    with (folder / "samples.0.jsonl").open("a") as torn:
        torn.write('{"domain": "math", "prompt_id": "math/to')
    assert main(command) == 0
    rows = [line for line in (folder / "samples.0.jsonl").read_text().split("\n") if line.endswith("}")]
    assert len(rows) == 1200
    fresh = tmp_path / "fresh"
    assert main([*command, "--out", str(fresh)]) == 0
    score = [json.loads((o / "scores.json").read_text())["scores"]["mine"]["math"] for o in (tmp_path, fresh)]
    assert score[0] == score[1]


def samples_of_torn(folder):
    return [line for line in (folder / "samples.0.jsonl").read_text().split("\n") if line.endswith("}")]


def test_other_settings_do_not_mix_with_the_samples_of_a_folder(done, models, tmp_path):
    out, _ = done
    with pytest.raises(
        InputError, match=r"holds samples made with other settings \(max_new_tokens\): name another --out"
    ):
        main([*arguments(models, out), "--max-new-tokens", "7"])
    line = json.loads((out / "mine" / "math" / "samples.0.jsonl").read_text().split("\n")[0])
    odd = tmp_path / "mine" / "math"
    odd.mkdir(parents=True)
    (odd / "samples.0.jsonl").write_text(json.dumps(line | {"question": "0"}) + "\n")
    with pytest.raises(InputError, match=r"samples.0.jsonl:1: sample [01] of .math/.* answers another prompt"):
        main([*arguments(models, tmp_path), "--benchmarks", "math"])
    with pytest.raises(InputError, match=r"other settings \(seed\)"):
        main([*arguments(models, out), "--seed", "7"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--benchmarks", "aime23"], "unknown benchmark aime23, did you mean aime2[45]"),
        (["--benchmarks", "aime25", "--data-file", "aime25=/nowhere.jsonl"], "no file /nowhere.jsonl"),
        (["--data-file", "mth=x"], "--data-file mth=x: NAME must be one of aime24"),
        (["--lcb-window", "2025"], "--lcb-window 2025: must be YYYY-MM-DD:YYYY-MM-DD"),
        (["--models", "/nowhere"], "model /nowhere: not a Hugging Face model folder or id"),
        (["--models", "a/b", "a/b"], "--models a/b is given twice"),
        (["--k", "-1"], "must not be negative"),
        (["--temperature", "-0.5"], "--temperature must be at least 0, got -0.5"),
        (["--benchmarks", ","], "names none"),
    ],
)
def test_bad_input_is_one_sentence(options, message, models, tmp_path):
    with pytest.raises(InputError, match=message):
        main([*arguments(models, tmp_path), *options])


@pytest.mark.parametrize(
    ("name", "want"),
    [
        ("Jackwang111/RL_Math", "RL_Math"),
        ("x/m2rl-rl-if/", "RL_IF"),
        ("checkpoints/SFT", "SFT"),
        ("my-sft", None),
        ("M2RL_RL_Multi", "RL_Multi"),
        ("RL_Math_v2", None),
        ("", None),
        ("runs/RL_Math/model", None),
    ],
)
def test_released_checkpoints_are_told_by_name(name, want):
    assert published.released(name) == want


def test_models_have_short_names_of_their_own():
    given = [
        "runs/math/model",
        "runs/code/model/",
        "SFT",
        "../SFT",
        "./SFT/",
        "x/models--j--RL_IF/snapshots/0f3a",
        "model",
    ]
    names: list[str] = []
    for path in given:
        names.append(model_name(path, dict.fromkeys(names)))
    assert names == ["math-model", "code-model", "SFT", "SFT-2", "SFT-3", "RL_IF", "model"]


def test_the_published_means_are_those_of_the_paper():
    means = {name: sum(row.values()) / 9 for name, row in published.PUBLISHED.items()}
    want = {
        "Base": 16.95,
        "SFT": 51.02,
        "RL_Math": 56.88,
        "RL_Coding": 54.15,
        "RL_Science": 54.80,
        "RL_IF": 57.82,
        "RL_Multi": 59.99,
        "Average": 55.86,
        "SCE": 59.00,
        "TIES": 59.41,
        "TIES+DARE": 58.87,
        "TA": 57.85,
        "TA+DARE": 58.91,
        "MT-OPD": 59.26,
    }
    assert means == pytest.approx(want, abs=0.04)  # the paper's TIES column and row differ in HLE by 0.32


def test_a_table_with_gaps_has_a_mean_over_what_is_shared():
    s = Score(0.5, (0.4, 0.6), 1.0, 2, 4, 9.0, 0.0, {"ok": 4})
    made = published.cells({"a": {"math": s, "if": s}, "b|c": {"math": s, "if": s, "code": s}})
    texts = [[value for value, _ in row] for row in made]
    assert texts[0] == ["benchmark", "a", "b|c"] and texts[3] == ["code (Avg@2)", "", "50.00 [40.0, 60.0]"]
    assert texts[-1] == ["mean", "50.00", "50.00"]
    assert "b\\|c" in published.markdown({"a": {"math": s}, "b|c": {"math": s}})


def test_differences_to_the_paper_carry_a_star_in_another_setting():
    s = Score(0.5, (0.4, 0.6), 1.0, 2, 4, 9.0, 0.0, {"ok": 4})
    all_nine = {"SFT": dict.fromkeys(published.NINE, s)}
    made = published.cells(all_nine)
    assert made[1][1] == ("50.00 [40.0, 60.0]", "-4.90 (paper 54.90)") and made[-1][1] == (
        "50.00",
        "-1.02 (paper 51.02)",
    )
    made = published.cells(all_nine, {"aime24"})
    assert made[1][1][1] == "-4.90* (paper 54.90)" and made[2][1][1] == "-1.30 (paper 51.30)"
    assert made[-1][1][1] == "-1.02* (paper 51.02)" and "see the notes" in published.markdown(all_nine, {"aime24"})
    assert "see the notes" not in published.plain(all_nine)


def test_a_row_that_is_judged_by_another_answer_is_not_taken_from_the_samples_before(models, tmp_path):
    row = {"problem": "How many?", "answer": 4}
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    command = ["--models", str(models / "mine"), "--benchmarks", "aime24", "--k", "1", "--max-new-tokens", "4"]
    command += ["--data-file", f"aime24={tmp_path}/a.jsonl", "--out", str(tmp_path / "out")]
    assert main(command) == 0
    (tmp_path / "a.jsonl").write_text(json.dumps(row | {"answer": 5}))
    with pytest.raises(InputError, match="answers another prompt, or is judged by another answer"):
        main(command)
