"""Rows of the nine benchmarks become problems whose right answers score and whose wrong ones do not."""

import base64
import dataclasses
import json
import pickle
import zlib

import benchmark_rows
import pytest

from m2rl import benchmarks, embedded
from m2rl.config import Config, Data, Domain, Evaluation, Rollout
from m2rl.data import eval_prompts, hub
from m2rl.domains import verify
from m2rl.domains.pool import VerifierPool
from m2rl.types import InputError, Sample

TOKENIZER = embedded.build_tokenizer()
PAPER = Config(rollout=Rollout(max_new_tokens=benchmarks.PAPER_MAX_NEW_TOKENS))


@pytest.fixture(scope="module")
def pool():
    with VerifierPool(workers=1, deadline_s=30) as made:
        yield made


def load(name, tmp_path, rows=None, **options):
    path = tmp_path / f"{name}.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in (benchmark_rows.ALL[name]() if rows is None else rows)))
    return benchmarks.load(name, TOKENIZER, PAPER, data_file=str(path), **options)


def rewards(benchmark, responses):
    return [verify(p.domain, r, p.spec).reward for p, r in zip(benchmark.prompts, responses, strict=True)]


@pytest.mark.parametrize("name", benchmark_rows.ALL)
def test_every_preset_loads_with_the_papers_k_and_budget(name, tmp_path):
    made = load(name, tmp_path)
    assert made.k == {"aime24": 64, "aime25": 64, "lcb_v5": 2, "lcb_v6": 2, "gpqa_diamond": 4, "ifeval": 4}.get(name, 1)
    assert made.max_new_tokens == 32768 and made.temperature == 1.0
    assert len({p.id for p in made.prompts}) == len(made.prompts) and all(
        p.id.startswith(f"{name}/") for p in made.prompts
    )
    assert all(p.spec["question"] in p.text for p in made.prompts)


def test_aime_answers_are_integers_whatever_their_zeros(tmp_path):
    made = load("aime24", tmp_path)
    assert rewards(made, ["Answer: \\boxed{25}", "Answer: \\boxed{204}"]) == [1, 1]
    assert rewards(made, ["Answer: \\boxed{025}", "Answer: \\boxed{24}"]) == [1, 0]
    with pytest.raises(InputError, match=r"aime24.jsonl:1: not a row of aime24: answer 'x' is not an integer"):
        load("aime24", tmp_path, [{"problem": "p", "answer": "x"}])


def test_gpqa_orders_options_by_seed_and_record(tmp_path):
    orders = [
        tuple(tuple(p.spec["options"].values()) for p in load("gpqa_diamond", tmp_path, seed=s).prompts)
        for s in (0, 0, 1)
    ]
    assert orders[0] == orders[1] != orders[2]
    made = load("gpqa_diamond", tmp_path)
    assert all(p.spec["options"][p.spec["answer"]].startswith("right") for p in made.prompts)
    assert len({p.spec["answer"] for p in made.prompts}) > 1
    assert rewards(made, [f"Answer: {p.spec['answer']}" for p in made.prompts]) == [1] * 6
    rows = benchmark_rows.gpqa()
    assert (
        load("gpqa_diamond", tmp_path, rows[::-1]).prompts[::-1] == made.prompts
    )  # the order in the file does not matter


def test_hle_is_text_only_and_rule_graded(tmp_path):
    made = load("hle", tmp_path)
    assert [p.domain for p in made.prompts] == ["math", "science"]
    assert made.prompts[1].spec["options"] == ["A", "B", "C"]
    assert rewards(made, ["Answer: \\boxed{17}", "Answer: B"]) == [1, 1]
    assert rewards(made, ["Answer: \\boxed{18}", "Answer: C"]) == [0, 0]
    assert "1 rows left out: has an image" in made.notes and any("not the official judgement" in n for n in made.notes)


def test_mmlu_redux_keeps_all_rows_and_details_those_without_error(tmp_path, pool):
    made = load("mmlu_redux", tmp_path)
    assert [p.spec["answer"] for p in made.prompts] == ["A", "B", "C", "D"]
    samples = [Sample(p, 0, [1], [0.0], "stop", 0, reward=float(i == 0)) for i, p in enumerate(made.prompts)]
    assert benchmarks.details(made, samples, pool) == {"ok_rows": 1.0}


def test_a_question_of_two_subjects_counts_twice_in_mmlu_and_a_repeated_record_once_elsewhere(tmp_path):
    made = load("mmlu_redux", tmp_path, benchmark_rows.mmlu_redux() * 2)
    assert len(made.prompts) == 8 and len({p.id for p in made.prompts}) == 8
    made = load("gpqa_diamond", tmp_path, benchmark_rows.gpqa() * 2)
    assert len(made.prompts) == 6 and "6 rows left out: repeats an id" in made.notes


def test_hle_rows_that_no_rule_can_grade_are_counted_not_fatal(tmp_path):
    rows = [
        {"id": "a", "question": "Prove.", "image": "", "answer": "w" * 5000, "answer_type": "exactMatch"},
        {"id": "b", "question": "Which?", "image": "", "answer": "A and C", "answer_type": "multipleChoice"},
    ]
    made = load("hle", tmp_path, rows)
    assert "1 rows left out: has an answer that no rule can grade" in made.notes
    assert rewards(made, ["Answer: \\boxed{A and C}"]) == [1] and rewards(made, ["Answer: \\boxed{A}"]) == [0]


def test_what_departs_from_the_papers_setting_is_named(tmp_path):
    made = load("gpqa_diamond", tmp_path, k=2)
    assert benchmarks.departures(made) == "not the paper's setting: problems 6 (the paper's 198), K 2 (the paper's 4)"
    as_published = dataclasses.replace(made, k=4, prompts=made.prompts * 33)
    assert benchmarks.departures(as_published) == ""
    assert "tokens 16 (the paper's 32,768)" in benchmarks.departures(dataclasses.replace(made, max_new_tokens=16))
    assert benchmarks.departures(dataclasses.replace(made, name="math")) == ""


def test_ifeval_has_four_levels(tmp_path, pool):
    made = load("ifeval", tmp_path)
    assert rewards(made, ["so it is", "one two three four five six seven eight nine ten"]) == [1, 1]
    texts = ["Sure, here:\nso it is", "one two, three"]
    samples = [Sample(p, 0, [1], [0.0], "stop", 0, text=t, reward=0.0) for p, t in zip(made.prompts, texts)]
    assert benchmarks.details(made, samples, pool) == {
        "strict_prompt": 0,
        "strict_instruction": 0,
        "loose_prompt": 0.5,
        "loose_instruction": 1 / 3,
    }


def test_lcb_runs_every_test_of_both_kinds(tmp_path):
    made = load("lcb_v6", tmp_path)
    assert made.prompts[0].spec["tests"] == {"inputs": ["0\n", "1\n", "2\n"], "outputs": ["0\n", "1\n", "4\n"]}
    assert made.prompts[1].spec["tests"] == {
        "fn_name": "total",
        "inputs": [[[i, 2], "a"] for i in range(3)],
        "outputs": [2, 3, 4],
    }
    assert made.prompts[1].spec["max_tests"] == 3
    right = [
        "```python\nprint(int(input()) ** 2)\n```",
        "```python\nclass Solution:\n    def total(self, xs: List[int], name):\n        return sum(xs)\n```",
    ]
    with VerifierPool(workers=1, deadline_s=30, sandbox="trusted") as pool:
        for i, text in enumerate([*right, right[0].replace("** 2", "* 2"), right[1].replace("sum(xs)", "4")]):
            p = made.prompts[i % 2]
            pool.submit(i, p.domain, text, p.spec)
        found = {}
        while len(found) < 4:
            found |= dict(pool.poll(0.5))
    assert [found[i].reward for i in range(4)] == [1, 1, 0, 0], found


def test_lcb_windows_by_contest_date(tmp_path):
    made = load("lcb_v6", tmp_path, lcb_window=("2025-02-01", "2025-05-01"))
    assert [p.id for p in made.prompts] == ["lcb_v6/q2"]
    assert "contest dates 2025-02-01 to 2025-05-01: 1 problems" in made.notes
    with pytest.raises(InputError, match=r"no problem in .*outside the window"):
        load("lcb_v6", tmp_path, lcb_window=("1999-01-01", "1999-12-31"))


def test_a_benchmark_becomes_rows_that_training_evaluates_on(tmp_path, capsys):
    (tmp_path / "gpqa.jsonl").write_text("".join(json.dumps(r) + "\n" for r in benchmark_rows.gpqa()))
    out = tmp_path / "eval" / "gpqa_diamond.jsonl"
    assert benchmarks.main(["gpqa_diamond", "--data-file", str(tmp_path / "gpqa.jsonl"), "--out", str(out)]) == 0
    assert "6 problems of gpqa_diamond" in capsys.readouterr().out
    config = Config(data=Data(eval=(str(out),)), evaluation=Evaluation(problems=4))
    held_out = eval_prompts(config, TOKENIZER)
    assert [p.id for p in held_out] == [f"science/gpqa_diamond/rec{i}" for i in range(4)]
    assert [p.spec["answer"] for p in held_out] == [
        p.spec["answer"] for p in load("gpqa_diamond", tmp_path).prompts[:4]
    ]


class Hostile:
    def __reduce__(self):
        return (print, ("a class was built",))


def test_a_pickle_that_builds_anything_is_refused(capsys):
    text = base64.b64encode(zlib.compress(pickle.dumps(Hostile()))).decode()
    with pytest.raises(ValueError, match=r"plain data only, not builtins.print"):
        benchmarks.lcb_tests(text)
    assert not capsys.readouterr().out
    for broken in (b"", b"not a pickle", b"\x80\x04h\x05.", b"R.", b"\x80\x04\x95\xff."):
        with pytest.raises(ValueError, match="cannot be read"):
            benchmarks.lcb_tests(base64.b64encode(zlib.compress(broken)).decode())
    with pytest.raises(ValueError, match="cannot be read"):
        benchmarks.lcb_tests("bm90IHpsaWI=")


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("gpqa_diamond", {"Question": "q"}, "key Correct Answer is missing"),
        (
            "ifeval",
            {"key": 1, "prompt": "p", "instruction_id_list": ["no:such"], "kwargs": [{}]},
            "unknown constraint 'no:such'",
        ),
        (
            "ifeval",
            {"key": 1, "prompt": "p", "instruction_id_list": ["a"], "kwargs": []},
            "at least one|must be as long|unknown",
        ),
        (
            "mmlu_redux",
            {"question": "q", "choices": ["a", "b"], "answer": 9},
            "answer 9 is not the index of one of 2 choices",
        ),
        ("lcb_v5", {"question_content": "q", "question_id": "1"}, "no test cases"),
    ],
)
def test_bad_rows_name_themselves(name, row, message, tmp_path):
    with pytest.raises(InputError, match=rf"{name}.jsonl:1: not a row of {name}: .*({message})"):
        load(name, tmp_path, [row])


def test_thinking_is_left_out_where_the_template_knows_it(tmp_path):
    assert not load("aime24", tmp_path).prompts[0].spec.get("think_gate")
    gated = load("aime24", tmp_path, think_gate=True)
    assert rewards(gated, ["\\boxed{25}", "<think>\\boxed{9}</think>\\boxed{204}"]) == [0, 1]
    assert "only what follows </think> counts" in gated.notes
    thinking = embedded.build_tokenizer()
    thinking.chat_template = thinking.chat_template + "{# </think> #}"
    path = tmp_path / "aime24.jsonl"
    assert benchmarks.load("aime24", thinking, PAPER, data_file=str(path)).prompts[0].spec["think_gate"]


def test_a_configs_system_prompt_applies_but_not_its_template(tmp_path):
    config = Config(domain=(Domain("math", system_prompt="Be brief.", prompt_template="Hm: {prompt}"),))
    load("aime24", tmp_path)
    made = benchmarks.load("aime24", TOKENIZER, config, data_file=str(tmp_path / "aime24.jsonl"), limit=1)
    assert len(made.prompts) == 1 and "Be brief." in made.prompts[0].text and "Hm:" not in made.prompts[0].text


@pytest.mark.parametrize(
    ("status", "message"),
    [
        ("gated", "is gated: accept its terms at https://huggingface.co/datasets/Idavidrein/gpqa and log in"),
        (401, "does not exist, or is private and you are not logged in"),
        (403, "the hub answered 403; log in"),
        (500, "the hub answered 500; or give a local file"),
        (None, r"not downloaded \(ConnectError"),
        ("empty", "lacks the files that are needed"),
    ],
)
def test_the_hubs_refusals_are_one_sentence(status, message, monkeypatch):
    import huggingface_hub
    from huggingface_hub import errors

    class ConnectError(Exception):
        pass

    class Response:
        headers, request, text = {}, None, ""

        def __init__(self, code):
            self.status_code = code

    def refuse(self, repo, **_):
        if status == "empty":
            return ["README.md"]
        if status is None:
            raise ConnectError("no name")
        kind = {"gated": errors.GatedRepoError, 401: errors.RepositoryNotFoundError}.get(status, errors.HfHubHTTPError)
        raise kind("no", response=Response(status))

    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", refuse)
    with pytest.raises(InputError, match=message):
        benchmarks.load("gpqa_diamond", TOKENIZER, PAPER)


def test_hub_files_come_from_the_parquet_copy_in_order(monkeypatch):
    import huggingface_hub

    listed = [
        "default/test/0001.parquet",
        "default/test/0000.parquet",
        "default/train/0000.parquet",
        "other/test/0000.parquet",
    ]
    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", lambda self, repo, **_: listed)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda repo, name, **_: f"/{repo}/{name}")
    assert [str(p) for p in hub.dataset_files("a/b", "default", "test")] == [
        "/a/b/default/test/0000.parquet",
        "/a/b/default/test/0001.parquet",
    ]
    assert len(hub.dataset_files("a/b", "*", "test")) == 3
