"""Made-up rows in the schemas of the nine benchmarks; the shapes are real, the contents are not."""

import base64
import json
import pickle
import zlib


def aime() -> list[dict]:
    return [
        {"id": 1, "problem": "How many pairs?", "answer": "025", "solution": "-", "url": "-"},
        {"id": 2, "problem": "How many tripels?", "solution": "So \\boxed{204}."},
    ]


def packed(cases: list[dict]) -> str:
    return base64.b64encode(zlib.compress(pickle.dumps(json.dumps(cases)))).decode()


def lcb() -> list[dict]:
    stdin = [{"input": f"{i}\n", "output": f"{i * i}\n", "testtype": "stdin"} for i in range(3)]
    calls = [{"input": f'[{i}, 2]\n"a"', "output": f"{i + 2}", "testtype": "functional"} for i in range(3)]
    common = {"question_title": "t", "platform": "made up", "contest_id": "c", "difficulty": "easy"}
    return [
        {
            **common,
            "question_content": "Square n.",
            "question_id": "q1",
            "contest_date": "2025-01-04T00:00:00",
            "starter_code": "",
            "public_test_cases": json.dumps(stdin[:1]),
            "private_test_cases": packed(stdin[1:]),
            "metadata": "{}",
        },
        {
            **common,
            "question_content": "Sum the list.",
            "question_id": "q2",
            "contest_date": "2025-03-01T00:00:00",
            "starter_code": "class Solution:\n    def total(self, xs, name):\n        ",
            "metadata": '{"func_name": "total"}',
            "public_test_cases": json.dumps(calls[:1]),
            "private_test_cases": json.dumps(calls[1:]),
        },
    ]


def hle() -> list[dict]:
    return [
        {"id": "h1", "question": "How much?", "image": "", "answer": "17", "answer_type": "exactMatch"},
        {
            "id": "h2",
            "question": "Which?\n\nAnswer Choices:\nA. tin\nB. lead\nC. zinc",
            "image": "",
            "answer": "B",
            "answer_type": "multipleChoice",
        },
        {
            "id": "h3",
            "question": "What is shown?",
            "image": "data:image/png;base64,xx",
            "answer": "a cat",
            "answer_type": "exactMatch",
        },
    ]


def gpqa() -> list[dict]:
    return [
        {
            "Record ID": f"rec{i}",
            "Question": f"Why {i}?",
            "Correct Answer": f"right {i}\n",
            "Subdomain": "made up",
            **{f"Incorrect Answer {j}": f"wrong {i}.{j}" for j in (1, 2, 3)},
        }
        for i in range(6)
    ]


def ifeval() -> list[dict]:
    none = {"relation": None, "num_words": None, "keywords": None}
    return [
        {
            "key": 1000,
            "prompt": "Write without commas.",
            "instruction_id_list": ["punctuation:no_comma"],
            "kwargs": [none],
        },
        {
            "key": 1001,
            "prompt": "Write ten words without commas.",
            "kwargs": [none, {**none, "relation": "at least", "num_words": 10}],
            "instruction_id_list": ["punctuation:no_comma", "length_constraints:number_words"],
        },
    ]


def ifbench() -> list[dict]:
    return [
        {"key": "7", "prompt": "Use three pronouns.", "instruction_id_list": ["count:numbers"], "kwargs": [{"N": 3}]}
    ]


def mmlu_redux() -> list[dict]:
    kinds = ("ok", "wrong_groundtruth", "no_correct_answer", "bad_question_clarity")
    return [
        {
            "question": f"Which is {i}?",
            "choices": ["w", "x", "y", "z"],
            "answer": i,
            "error_type": kind,
            "source": None,
            "correct_answer": None,
            "potential_reason": None,
        }
        for i, kind in enumerate(kinds)
    ]


ALL = {
    "aime24": aime,
    "aime25": aime,
    "lcb_v5": lcb,
    "lcb_v6": lcb,
    "hle": hle,
    "gpqa_diamond": gpqa,
    "ifeval": ifeval,
    "ifbench": ifbench,
    "mmlu_redux": mmlu_redux,
}
