r"""Benchmarks: problems in their published schemas, and the K, token budget and temperature they are scored at.

    load("gpqa_diamond", tokenizer, config, data_file="gpqa.jsonl")  ->  Benchmark(name, prompts, k, ...)

The nine of arXiv 2602.12566, and the embedded domains, which are generated. K is what the published percentages imply
(PRESETS). Rows come from local files in the schema of the hub's dataset, or from the hub.

    aime24, aime25          "Answer: \boxed{}" asked for; integers, leading zeros ignored
    lcb_v5, lcb_v6          the problems that release v5 / v6 added; all public and private tests must pass
    hle                     text-only; graded by rule (letters, else math-verify), which is not the official judge
    gpqa_diamond            the order of the options is drawn from (seed, record id)
    ifeval, ifbench         strict, prompt level; the other three levels are details
    mmlu_redux              all rows, as published; error_type "ok" alone is a detail
"""

from __future__ import annotations

import argparse
import base64
import dataclasses
import difflib
import hashlib
import io
import json
import pickle
import random
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from transformers import PreTrainedTokenizerBase

from m2rl.command import exit_with, whole_file
from m2rl.config import Config, Data, Domain
from m2rl.data import Encoder, Row, eval_prompts, files, hub, read_records
from m2rl.domains import THINK_END, check_spec, procedural
from m2rl.domains.answers import final_answer
from m2rl.domains.pool import VerifierPool
from m2rl.types import InputError, Prompt, Sample


@dataclass(frozen=True, slots=True)
class Benchmark:
    """Problems and how they are sampled."""

    name: str
    prompts: tuple[Prompt, ...]
    k: int  # samples per problem
    temperature: float
    max_new_tokens: int
    notes: tuple[str, ...] = ()  # what a reader of the score has to know


@dataclass(frozen=True, slots=True)
class Preset:
    """Where a benchmark's rows are, how one becomes a problem, and the paper's K."""

    title: str
    k: int
    problems: int
    """as many as the published percentages imply; 0 = not known"""
    row: Callable[[Mapping[str, Any], int], Problem | str]
    """(record, seed) -> the problem, or the reason why the row is left out"""
    download: Callable[[], list[Path]]
    note: str = ""


@dataclass(frozen=True, slots=True)
class Problem:
    """One row of a benchmark."""

    id: str
    domain: str
    question: str  # as published
    prompt: str  # as asked
    spec: dict[str, Any]


# ---- rows ----------------------------------------------------------------------------------------------------------

BOXED = (
    "Solve the following math problem step by step. End with a line of the form Answer: \\boxed{{$Answer}}, where "
    "$Answer is the answer to the problem.\n\n{question}"
)
CHOICE = (
    "Answer the following multiple choice question. Think step by step, and end with a line of the form Answer: "
    "$LETTER (without quotes), where LETTER is one of {letters}.\n\n{question}\n\n{options}"
)
SHORT = (
    "Answer the following question. Think step by step, and end with a line of the form Answer: \\boxed{{$Answer}}, "
    "where $Answer is the answer alone.\n\n{question}"
)
PROGRAM = (
    "Write a Python program that solves the following problem. It reads standard input and prints to standard output. "
    "End with the whole program in one ```python block.\n\n{question}"
)
FUNCTION = (
    "Solve the following problem in Python by completing the code below it. End with the whole program in one "
    "```python block.\n\n{question}\n\n```python\n{starter}\n```"
)


def _need(record: Mapping[str, Any], *keys: str) -> Any:
    """The first of these keys that the record has."""
    for key in keys:
        if record.get(key) is not None:
            return record[key]
    raise ValueError(f"key {' or '.join(keys)} is missing")


def _digest(*parts: object) -> str:
    return hashlib.blake2b(json.dumps(parts, default=str).encode(), digest_size=8).hexdigest()


def aime(record: Mapping[str, Any], seed: int) -> Problem | str:
    question = str(_need(record, "problem", "Problem", "question"))
    answer = record.get("answer", record.get("Answer"))
    if answer is None:  # math-ai/aime24 has it inside the solution
        answer = final_answer(str(_need(record, "solution")))
    try:
        number = int(str(answer).strip())
    except ValueError:
        raise ValueError(f"answer {answer!r} is not an integer") from None
    return Problem(_digest(question), "math", question, BOXED.format(question=question), {"answer": str(number)})


def _choices(question: str, texts: Sequence[str], right: int) -> tuple[str, dict[str, Any]]:
    letters = [chr(ord("A") + i) for i in range(len(texts))]
    options = dict(zip(letters, texts))
    prompt = CHOICE.format(
        letters=", ".join(letters),
        question=question,
        options="\n".join(f"{letter}) {text}" for letter, text in options.items()),
    )
    return prompt, {"answer": letters[right], "options": options}


def gpqa(record: Mapping[str, Any], seed: int) -> Problem | str:
    question = str(_need(record, "Question")).strip()
    texts = [
        str(_need(record, key)).strip()
        for key in ("Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3")
    ]
    id = str(record.get("Record ID") or _digest(question))
    order = list(range(4))
    random.Random(f"gpqa/{seed}/{id}").shuffle(order)
    prompt, spec = _choices(question, [texts[i] for i in order], order.index(0))
    return Problem(id, "science", question, prompt, spec)


def mmlu_redux(record: Mapping[str, Any], seed: int) -> Problem | str:
    question, choices = str(_need(record, "question")), [str(c) for c in _need(record, "choices")]
    answer = int(_need(record, "answer"))
    if not 0 <= answer < len(choices):
        raise ValueError(f"answer {answer} is not the index of one of {len(choices)} choices")
    prompt, spec = _choices(question, choices, answer)
    spec["error_type"] = str(record.get("error_type") or "ok")
    return Problem(_digest(record.get("subject"), question, choices), "science", question, prompt, spec)


def hle(record: Mapping[str, Any], seed: int) -> Problem | str:
    if record.get("image"):
        return "has an image"
    question, answer = str(_need(record, "question")), str(_need(record, "answer")).strip()
    id = str(record.get("id") or _digest(question))
    if record.get("answer_type") != "multipleChoice" or not re.fullmatch("[A-Za-z]", answer):
        problem = Problem(id, "math", question, SHORT.format(question=question), {"answer": answer})
        try:
            check_spec("math", problem.spec)
        except ValueError:
            return "has an answer that no rule can grade"
        return problem
    found = re.findall(r"^\s*\(?([A-Z])[.):]\s", question, re.MULTILINE)
    letters = sorted({*found, answer.upper()}) if found else [chr(c) for c in range(ord("A"), ord("Z") + 1)]
    prompt = CHOICE.format(letters=", ".join(letters), question=question, options="").rstrip()
    return Problem(id, "science", question, prompt, {"answer": answer.upper(), "options": letters})


def constraints(record: Mapping[str, Any], seed: int) -> Problem | str:
    ids = list(_need(record, "instruction_id_list"))
    kwargs = list(record.get("kwargs") or [None] * len(ids))
    if len(kwargs) != len(ids):
        raise ValueError(f"kwargs must be as long as instruction_id_list, {len(kwargs)} and {len(ids)}")
    wanted = [
        {
            "id": i,
            "kwargs": {k: v for k, v in (json.loads(kw) if isinstance(kw, str) else kw or {}).items() if v is not None},
        }
        for i, kw in zip(ids, kwargs)
    ]
    prompt = str(_need(record, "prompt"))
    id = str(record.get("key", _digest(prompt)))
    return Problem(id, "if", prompt, prompt, {"constraints": wanted, "mode": "strict"})


class _NoClasses(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"a test file may hold plain data only, not {module}.{name}")


def lcb_tests(text: str) -> list[dict[str, str]]:
    """Test cases from JSON, or from base64(zlib(pickle(JSON))); a pickle that names any class is refused."""
    try:
        return json.loads(text)
    except ValueError:
        pass
    try:
        found = _NoClasses(io.BytesIO(zlib.decompress(base64.b64decode(text)))).load()
        return json.loads(found) if isinstance(found, (str, bytes)) else found
    except Exception as error:  # a broken pickle may raise anything
        raise ValueError(f"private_test_cases cannot be read: {error}") from None


def lcb(record: Mapping[str, Any], seed: int) -> Problem | str:
    question, id = str(_need(record, "question_content")), str(_need(record, "question_id"))
    cases = [
        case
        for key in ("public_test_cases", "private_test_cases")
        if record.get(key)
        for case in (lcb_tests(record[key]) if isinstance(record[key], str) else record[key])
    ]
    if not cases:
        raise ValueError("no test cases")
    metadata = record.get("metadata") or {}
    name = (json.loads(metadata) if isinstance(metadata, str) else metadata).get("func_name")
    tests: dict[str, Any] = {"inputs": [c["input"] for c in cases], "outputs": [c["output"] for c in cases]}
    starter = str(record.get("starter_code") or "")
    if name:
        tests = {
            "fn_name": name,
            "inputs": [[json.loads(line) for line in text.split("\n") if line] for text in tests["inputs"]],
            "outputs": [json.loads(text) for text in tests["outputs"]],
        }
        prompt = FUNCTION.format(question=question, starter=starter)
    else:
        prompt = PROGRAM.format(question=question)
    # LiveCodeBench runs every test, 6 s each, below its own header of imports.
    spec = {"tests": tests, "max_tests": len(cases), "time_limit_s": 6, "prelude": True}
    spec["date"] = str(record.get("contest_date") or "")[:10]
    return Problem(id, "code", question, prompt, spec)


def _lcb(name: str) -> Callable[[], list[Path]]:
    return lambda: hub.repository_files("livecodebench/code_generation_lite", name)


def _hub(repo: str, config: str, split: str) -> Callable[[], list[Path]]:
    return lambda: hub.dataset_files(repo, config, split)


_LCB_NOTE = "the problems that this release added; give other files with --data-file, other dates with --lcb-window"
PRESETS = {
    "aime24": Preset("AIME'24", 64, 30, aime, _hub("HuggingFaceH4/aime_2024", "default", "train")),
    "aime25": Preset("AIME'25", 64, 30, aime, _hub("math-ai/aime25", "default", "test")),
    "lcb_v5": Preset(
        "LCB v5", 2, 0, lcb, _lcb("test5.jsonl"), f"{_LCB_NOTE}; the paper's v5 window and K are not known"
    ),
    "lcb_v6": Preset("LCB v6", 2, 175, lcb, _lcb("test6.jsonl"), _LCB_NOTE),
    "hle": Preset(
        "HLE", 1, 2158, hle, _hub("cais/hle", "default", "test"), "rule-graded, text-only: not the official judgement"
    ),
    "gpqa_diamond": Preset("GPQA-D", 4, 198, gpqa, _hub("Idavidrein/gpqa", "gpqa_diamond", "train")),
    "ifeval": Preset("IFEval", 4, 541, constraints, _hub("google/IFEval", "default", "train"), "strict, prompt level"),
    "ifbench": Preset(
        "IFBench", 1, 294, constraints, _hub("allenai/IFBench_test", "default", "train"), "strict, prompt level"
    ),
    "mmlu_redux": Preset(
        "MMLU-Redux",
        1,
        5700,
        mmlu_redux,
        _hub("edinburgh-dawg/mmlu-redux-2.0", "*", "test"),
        "all rows, those with an error_type included",
    ),
}
PAPER_MAX_NEW_TOKENS = 32768
PAPER_TEMPERATURE = 1.0  # of its evaluations during training; that of the final ones is not published


# ---- loading -------------------------------------------------------------------------------------------------------


def names() -> list[str]:
    return [*PRESETS, *procedural.DOMAINS]


def unknown(name: str) -> NoReturn:
    near = difflib.get_close_matches(name, names(), 1)
    raise InputError(
        f"--benchmarks: unknown benchmark {name}{f', did you mean {near[0]}?' if near else ''} "
        f"(there are: {', '.join(names())})"
    )


def load(
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    config: Config,
    *,
    data_file: str = "",
    seed: int = 0,
    k: int = 0,
    limit: int = 0,
    think_gate: bool | None = None,
    lcb_window: tuple[str, str] | None = None,
) -> Benchmark:
    """The benchmark of that name, its prompts encoded for this tokenizer.

    data_file: rows from here (a file or glob), not the hub; k: samples per problem, 0 = the preset's; limit: problems,
    0 = all; think_gate: score only what follows </think>, None = if the tokenizer's chat template knows </think>;
    lcb_window: first and last contest date, YYYY-MM-DD. InputError for an unknown name, a bad row, an empty benchmark.
    """
    e = config.evaluation
    budget = e.max_new_tokens or config.rollout.max_new_tokens
    if name in procedural.DOMAINS:
        option = next((d for d in config.domain if d.name == name), Domain(name))
        held_out = dataclasses.replace(config, data=Data(eval=("procedural",)), domain=(option,))
        prompts = eval_prompts(held_out, tokenizer)
        return Benchmark(name, tuple(prompts[: limit or None]), k or e.k, e.temperature, budget)
    if name not in PRESETS:
        unknown(name)
    preset = PRESETS[name]
    if think_gate is None:
        think_gate = THINK_END in str(tokenizer.chat_template or "")
    encoder = Encoder(tokenizer, [dataclasses.replace(d, prompt_template="{prompt}") for d in config.domain])
    prompts, left_out = [], Counter[str]()
    for where, problem in problems(name, data_file, seed, lcb_window, left_out):
        spec = problem.spec | {"question": problem.question} | ({"think_gate": True} if think_gate else {})
        row = Row(f"{name}/{problem.id}", problem.domain, None, problem.prompt, None, spec)
        prompts.append(encoder.prompt(row, where))
        if limit and len(prompts) == limit:
            break
    if not prompts:
        raise InputError(
            f"--benchmarks {name}: no problem in {data_file or 'the dataset'}"
            + (f" ({dict(left_out)})" if left_out else "")
        )
    notes = [preset.note] if preset.note else []
    notes += [f"{n} rows left out: {reason}" for reason, n in left_out.items()]
    if lcb_window and name.startswith("lcb"):
        notes.append(f"contest dates {lcb_window[0]} to {lcb_window[1]}: {len(prompts)} problems")
    if think_gate:
        notes.append("only what follows </think> counts")
    longest = max(len(p.tokens) for p in prompts)
    if longest > config.rollout.max_prompt_tokens and config.rollout.engine == "vllm":
        raise InputError(
            f"--benchmarks {name}: its longest prompt has {longest} tokens, rollout.max_prompt_tokens is "
            f"{config.rollout.max_prompt_tokens}"
        )
    return Benchmark(name, tuple(prompts), k or preset.k, e.temperature, budget, tuple(notes))


def problems(
    name: str, data_file: str, seed: int, lcb_window: tuple[str, str] | None, left_out: Counter[str]
) -> Iterator[tuple[str, Problem]]:
    """("file:line", problem) of every row that counts; `left_out` counts the others by their reason."""
    seen = Counter[str]()
    for path in files([data_file]) if data_file else PRESETS[name].download():
        for where, record in read_records(path):
            try:
                problem = PRESETS[name].row(record, seed)
                if isinstance(problem, Problem):
                    check_spec(problem.domain, problem.spec)
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise InputError(f"{where}: not a row of {name}: {error}") from None
            if isinstance(problem, str):
                left_out[problem] += 1
            elif lcb_window and not lcb_window[0] <= problem.spec.get("date", lcb_window[0]) <= lcb_window[1]:
                left_out["outside the window"] += 1
            elif seen[problem.id] and name != "mmlu_redux":
                left_out["repeats an id"] += 1
            else:
                seen[problem.id] += 1
                if (n := seen[problem.id]) > 1:  # MMLU asks some questions in several subjects, and all were published
                    problem = dataclasses.replace(problem, id=f"{problem.id}-{n}")
                yield where, problem


def departures(benchmark: Benchmark) -> str:
    """In what a score of this benchmark is not comparable with the paper's; "" if in nothing that is known."""
    preset = PRESETS.get(benchmark.name)
    if preset is None:
        return ""
    pairs = (
        ("problems", len(benchmark.prompts), preset.problems or len(benchmark.prompts)),
        ("K", benchmark.k, preset.k),
        ("tokens", benchmark.max_new_tokens, PAPER_MAX_NEW_TOKENS),
    )
    odd = [f"{name} {mine:,} (the paper's {paper:,})" for name, mine, paper in pairs if mine != paper]
    return f"not the paper's setting: {', '.join(odd)}" if odd else ""


def details(benchmark: Benchmark, samples: Sequence[Sample], pool: VerifierPool) -> dict[str, float]:
    """Further numbers of a benchmark: IFEval's four levels, MMLU-Redux without its faulty rows."""
    if benchmark.name in ("ifeval", "ifbench"):
        out: dict[str, float] = {}
        sizes = [len(s.prompt.spec["constraints"]) for s in samples]
        for mode in ("strict", "loose"):
            for i, s in enumerate(samples):
                pool.submit(i, "if", s.text, {**s.prompt.spec, "mode": mode, "grading": "fraction"})
            shares = {i: verdict.reward for i, verdict in pool.drain()}
            out[f"{mode}_prompt"] = sum(share == 1 for share in shares.values()) / len(samples)
            out[f"{mode}_instruction"] = sum(shares[i] * n for i, n in enumerate(sizes)) / sum(sizes)
        return out
    if benchmark.name == "mmlu_redux":
        good = [s for s in samples if s.prompt.spec.get("error_type") == "ok"]
        return {"ok_rows": sum(s.reward for s in good if s.reward == s.reward) / len(good)} if good else {}
    return {}


# ---- command -------------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m m2rl.benchmarks",
        description="Write a benchmark's problems as plain rows, which `data.eval` of a training run and "
        "`python -m m2rl.data inspect --against` read.",
        epilog="Example: python -m m2rl.benchmarks aime24 --out data/eval/aime24.jsonl",
    )
    parser.add_argument("name", choices=[*PRESETS])
    parser.add_argument("--out", required=True, help="a .jsonl file")
    parser.add_argument("--data-file", default="", help="rows from here (a file or glob), not the hub")
    parser.add_argument("--seed", type=int, default=0, help="of GPQA's option order")
    o = parser.parse_args(argv)
    left_out, out, written = Counter[str](), Path(o.out), 0
    out.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(out) as lines:
        for _, p in problems(o.name, o.data_file, o.seed, None, left_out):
            head = {"id": f"{o.name}/{p.id}", "domain": p.domain, "benchmark": o.name, "prompt": p.prompt}
            lines.write(json.dumps(head | p.spec) + "\n")
            written += 1
    print(f"{out}  {written:,} problems of {o.name}")
    for reason, n in left_out.items():
        print(f"left out  {n:,}  {reason}")
    return 0


if __name__ == "__main__":
    exit_with(main)
