"""Each problem and each bias that a file can have is counted, and the filter leaves rows without problems."""

import json

import blend_rows
import numpy as np
import pytest

from m2rl.data.__main__ import benchmark_index, main
from m2rl.data.inspect import inspect, ranks
from m2rl.data.overlap import Index, grams
from m2rl.types import InputError

LONG = "A farmer has seventeen sheep and buys four more every week until the barn holds ninety; how many weeks pass?"


@pytest.fixture
def rows(tmp_path):
    made = [
        {
            "domain": "science",
            "prompt": f"Question {i}?",
            "answer": "C",
            "options": ["A", "B", "C"],
            "pass_rate": i / 10,
        }
        for i in range(6)
    ]
    made += [
        {"domain": "science", "prompt": "Question 0?", "answer": "A", "options": ["A", "B", "C"]},  # a repeat
        {"domain": "science", "prompt": "Which?", "answer": "D", "options": ["A", "B"]},  # unverifiable
        {"domain": "math", "prompt": "Question  1?", "answer": "4"},  # the same words as a science row
        {"domain": "math", "prompt": f"Please solve. {LONG} Box the answer.", "answer": "19"},  # overlaps
        {"domain": "math", "prompt": "1+1?"},  # unverifiable: no answer
        {"domain": "math", "prompt": "half \ud83d", "answer": "1"},  # unreadable
        {"domain": "math", "prompt": 7, "answer": "1"},  # unreadable
        {
            "domain": "if",
            "prompt": "Write.",
            "constraints": [{"id": "punctuation:no_comma", "kwargs": {}}],
        },  # "foo" wins
        {"domain": "if", "prompt": "Tell.", "constraints": [{"id": "no:such", "kwargs": {}}]},
        {"domain": "code", "prompt": "Say yes.", "tests": {"inputs": ["1", "2"], "outputs": ["YES", "YES\n"]}},
        {"domain": "code", "prompt": "Square.", "tests": {"inputs": ["1", "2"], "outputs": ["1", "4"]}},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in made))
    return str(path)


def test_every_problem_is_counted_once_under_its_kind(rows, tmp_path):
    (tmp_path / "aime.jsonl").write_text(
        json.dumps({"problem": LONG.replace("; how", " -- HOW"), "answer": "19"}) + "\n"
    )
    report = inspect([rows], against=benchmark_index({"aime24": str(tmp_path / "aime.jsonl")}))
    counted = {d: {k: sum(c.values()) for k, c in r.problems.items()} for d, r in report.items()}
    assert counted == {
        "science": {"duplicate": 1, "unverifiable": 1},
        "if": {"lint": 1, "unverifiable": 1},
        "code": {},
        "math": {"duplicate": 1, "overlap": 1, "unverifiable": 1, "unreadable": 2},
    }
    assert "shares .. words with aime24" in report["math"].problems["overlap"]
    assert "the prompt repeats an earlier one of domain science" in report["math"].problems["duplicate"]
    assert next(iter(report["if"].examples.values())).endswith("rows.jsonl:14")


def test_bias_shows_as_balance_constant_answer_and_length(rows):
    report = inspect([rows])
    assert report["science"].labels == {"C": 6, "A": 1, "D": 1}
    assert report["science"].constant_score == ("C", 6 / 8)
    assert report["code"].constant_score == ("print('YES')", 1 / 2)
    assert report["science"].length_correlation is None  # every prompt has the same length


def test_length_against_reward_is_spearmans(tmp_path):
    path = tmp_path / "r.jsonl"
    path.write_text(
        "".join(
            json.dumps({"domain": "math", "prompt": f"q{i}", "answer": "1", "response": "x" * n, "reward": r}) + "\n"
            for i, (n, r) in enumerate([(1, 0), (9, 0), (20, 1), (500, 1)])
        )
    )
    assert inspect([str(path)])["math"].length_correlation == pytest.approx(2 / np.sqrt(5), abs=1e-9)


def test_the_filter_writes_the_rows_without_problems(rows, tmp_path, capsys):
    out = tmp_path / "clean" / "rows.jsonl"
    assert main(["inspect", rows, "--filter", str(out), "--json", str(tmp_path / "report.json")]) == 0
    kept = [json.loads(line) for line in out.read_text().splitlines()]
    assert [r["prompt"] for r in kept if r["domain"] == "science"] == [f"Question {i}?" for i in range(6)]
    assert sum(r["domain"] == "math" for r in kept) == 1 and not any(r["domain"] == "if" for r in kept)
    assert f"{len(kept)} of 17 rows written" in capsys.readouterr().out
    assert json.loads((tmp_path / "report.json").read_text())["science"]["best_constant"] == {
        "answer": "C",
        "score": 0.75,
    }
    again = inspect([str(out)])
    assert not any(r.problems for r in again.values())
    main(["inspect", rows, "--filter", str(out), "--keep", "lint,duplicate"])
    assert sum(1 for _ in out.open()) == len(kept) + 3
    with pytest.raises(InputError, match="--keep dup: must be of unreadable"):
        main(["inspect", rows, "--keep", "dup"])


def test_blend_rows_are_inspected_as_they_are(tmp_path):
    made = [blend_rows.science_row(i, "ABC"[i % 3]) for i in range(6)]
    made += [blend_rows.dropped_row(), blend_rows.if_row(), blend_rows.dapo_row(1), blend_rows.code_row()]
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in made))
    report = inspect([str(path)])
    assert report["science"].rows == 6 and report["structured_outputs (no verifier)"].rows == 1
    assert not report["science"].problems and not report["if"].problems
    assert list(report["?"].problems) == ["unreadable"]  # a placeholder has no text to inspect


def test_grams_ignore_case_punctuation_and_line_breaks():
    assert grams("One, two\nTHREE", 2) == grams("one two three", 2) and len(grams("a b c", 2)) == 2
    index = Index([("b/1", LONG)])
    assert index.find(LONG.upper()) == "b/1" and index.find("a farmer has seventeen sheep") is None


def test_ranks_of_ties_are_their_mean():
    assert ranks(np.array([3.0, 1.0, 3.0])).tolist() == [1.5, 0.0, 1.5]


def test_lines_that_are_no_rows_are_counted_and_the_rest_is_read(tmp_path, capsys):
    path = tmp_path / "train.jsonl"
    good = json.dumps({"domain": "math", "prompt": "one?", "answer": "1"}).encode()
    path.write_bytes(b"\n".join([good, b"{", b"[1]", b"\xff", b"[" * 99999, good.replace(b"one", b"two")]))
    assert main(["inspect", str(path), "--filter", str(tmp_path / "clean.jsonl")]) == 0
    assert "2 of 6 rows written" in capsys.readouterr().out
    report = inspect([str(path)])
    assert report["math"].rows == 2 and sum(report["?"].problems["unreadable"].values()) == 4
    assert f"{path}:2" in report["?"].examples.values()
