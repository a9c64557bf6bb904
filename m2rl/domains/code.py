"""Code: the program in the last fenced Python block passes every test, each run shut in by `sandbox`.

    spec  {"tests": {"inputs": [...], "outputs": [...]}}                     stdin text -> stdout text
          {"tests": {"fn_name": "f", "inputs": [[args], ...], "outputs": [...]}}   calls of Solution().f, or of f;
                    inputs and outputs may also be JSON texts, one argument per line (LiveCodeBench)
          {"time_limit_s": 4, "max_tests": 50, "prelude": false}                   optional

Texts are equal as in the LiveCodeBench grader: line by line without surrounding blanks, or number by number as exact
decimals. Results of calls are compared as JSON values. Every sample of a prompt meets the same tests (chosen by their
content), in order, until the first that fails. Expected outputs never enter the child.

Time: one test has `time_limit_s` of processor time, all tests together the budget of `limit_time`: what a program saves
on fast tests is there for slow ones, and a loaded machine (wall time) costs no reward before the budget is spent.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
import textwrap
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from decimal import Decimal, InvalidOperation
from typing import Any

from m2rl.domains import sandbox
from m2rl.types import Verdict

MAX_TESTS = 50
TIME_LIMIT_S = 4.0
REMEMBERED = 2048  # verdicts: the samples of a group often write the same program
_PYTHON = re.compile(r"(?:i?python|py|pypy|cpython)[0-9.]*|sage")

_budget_s = 8.0
_verdicts: OrderedDict[bytes, Verdict] = OrderedDict()


def limit_time(budget_s: float) -> None:
    """Wall time for all tests of one program, below the deadline of the process that calls `verify`."""
    global _budget_s
    _budget_s = budget_s


def check_spec(spec: Mapping[str, Any]) -> None:
    """ValueError, naming the key and the rule, unless the tests can be run."""
    tests = spec.get("tests")
    if not isinstance(tests, Mapping):
        raise ValueError(f"code needs key tests, {{inputs, outputs[, fn_name]}}, got {type(tests).__name__}")
    inputs, outputs, name = tests.get("inputs"), tests.get("outputs"), tests.get("fn_name")
    if not isinstance(inputs, list) or not isinstance(outputs, list) or not inputs:
        raise ValueError("code: tests.inputs and tests.outputs must be non-empty lists")
    if len(inputs) != len(outputs):
        raise ValueError(f"code: tests.inputs and .outputs must be equally long, got {len(inputs)} and {len(outputs)}")
    if name is None:
        for key, texts in (("inputs", inputs), ("outputs", outputs)):
            for i, text in enumerate(texts):
                if not isinstance(text, str):
                    kind = type(text).__name__
                    raise ValueError(f"code: without tests.fn_name, tests.{key}[{i}] must be a text, got {kind}")
    elif not isinstance(name, str) or not name.isidentifier():
        raise ValueError(f"code: tests.fn_name must be a Python name, got {name!r}")
    else:
        for i, (given, wanted) in enumerate(zip(inputs, outputs)):
            try:
                _arguments(given)
                json.dumps(_wanted(given, wanted))
            except (ValueError, TypeError) as error:
                raise ValueError(f"code: test {i} of {name}: {error}") from None
    limit = spec.get("time_limit_s", TIME_LIMIT_S)
    if isinstance(limit, bool) or not isinstance(limit, int | float) or not limit > 0:
        raise ValueError(f"code: time_limit_s must be above 0, got {limit!r}")
    most = spec.get("max_tests", MAX_TESTS)
    if isinstance(most, bool) or not isinstance(most, int) or most < 1:
        raise ValueError(f"code: max_tests must be at least 1, got {most!r}")


def warm() -> None:
    """Start the sandbox before a deadline counts."""
    sandbox.box()


def verify(response: str, spec: Mapping[str, Any]) -> Verdict:
    """ok / wrong / timeout; unparsed without a fenced block; error when the sandbox failed twice.

    preset "reference": the rules of the paper's code with their known defects, see `_reference`."""
    tests = spec["tests"]
    reference = spec.get("preset") == "reference"
    source = _reference_program(response) if reference else program(response)
    if source is None:
        return Verdict(0.0, "unparsed", "no fenced Python block")
    pairs = list(zip(tests["inputs"], tests["outputs"]))
    if reference:
        pairs = random.Random(response).sample(pairs, min(20, len(pairs)))
        source = _reference_wrapper(source)
    else:
        pairs = subset(pairs, spec.get("max_tests", MAX_TESTS))
    limit_s, prelude = float(spec.get("time_limit_s", TIME_LIMIT_S)), bool(spec.get("prelude", False))
    name = tests.get("fn_name")
    asked = (sandbox.box().level, source, name, pairs, limit_s, prelude, reference)
    key = hashlib.blake2b(repr(asked).encode("utf-8", "replace")).digest()
    if key in _verdicts:
        return _verdicts[key]
    try:
        verdict = _judge(source, name, pairs, limit_s, prelude, reference)
    except sandbox.BoxDied:
        try:
            verdict = _judge(source, name, pairs, limit_s, prelude, reference)
        except sandbox.BoxDied as error:
            return Verdict(0.0, "error", f"{error}, twice")
    _verdicts[key] = verdict
    if len(_verdicts) > REMEMBERED:
        _verdicts.popitem(last=False)
    return verdict


def subset(pairs: Sequence[tuple[Any, Any]], most: int) -> list[tuple[Any, Any]]:
    """At most `most` tests in their order, chosen by the content of the tests alone."""
    if len(pairs) <= most:
        return list(pairs)
    content = hashlib.blake2b(repr(pairs).encode("utf-8", "replace")).digest()
    return [pairs[i] for i in sorted(random.Random(content).sample(range(len(pairs)), most))]


# ---- the program in a response ---------------------------------------------------------------------------------------

_LANGUAGE = re.compile(r"[ \t]*\{?\.?([\w+#.-]*)")
_QUOTE = re.compile(r"^\s*>\s?")
_ONE_LINE = re.compile(r"^\s*(?:[-*\d.]+\s+)?```(?:(\w+)[ \t]+)?([^`]+)```\s*$")


def program(response: str) -> str | None:
    """The last fenced block marked as Python, else the last unmarked one. An unclosed block ends with the text."""
    marked = unmarked = None
    for language, body in blocks(response):
        if not body.strip():
            continue
        if _PYTHON.fullmatch(language):
            marked = body
        elif not language:
            unmarked = body
    return marked if marked is not None else unmarked


def blocks(text: str, nested: bool = True) -> list[tuple[str, str]]:
    """(language in lower case, body) of every fenced block: ``` or ~~~, indented in a list, quoted with >, inside a
    block of Markdown, after text on its line, closed on a line of its own or at the end of one, or not at all."""
    found: list[tuple[str, str]] = []
    lines = text.replace("\r\n", "\n").split("\n")
    i = 0
    while i < len(lines):
        line = lines[i]
        i += 1
        if (single := _ONE_LINE.match(line)) and single.group(2).strip():
            found.append(((single.group(1) or "").lower(), single.group(2) + "\n"))
            continue
        start, fence = _opening(line)
        if not fence:
            continue
        before = line[:start].strip("-*+> \t0123456789.")
        language = _LANGUAGE.match(line, start + len(fence)).group(1).lower()  # type: ignore[union-attr]
        if before and not _PYTHON.fullmatch(language) and not before.endswith(":"):
            continue  # backticks within a sentence
        quoted = line.lstrip().startswith(">")
        body = list[str]()
        while i < len(lines):
            inner = _QUOTE.sub("", lines[i]) if quoted else lines[i]
            i += 1
            bare = inner.strip()
            if len(bare) >= len(fence) and set(bare) == {fence[0]}:
                break
            if bare.endswith(fence) and fence[0] == "`":
                body.append(inner.rstrip().rstrip("`"))
                break
            body.append(inner)
        text_in = "\n".join(body) + "\n"
        if text_in.lstrip("\n")[:1].isspace():  # no program starts so: it has the indentation of a list
            text_in = textwrap.dedent(text_in)
        found += blocks(text_in, False) if nested and language in ("markdown", "md") else [(language, text_in)]
    return found


def _opening(line: str) -> tuple[int, str]:
    """Where on a line a block opens, and its fence: the last run of backticks if they are three or more, else the first
    run of tildes behind it (no backtick may follow); an empty fence if it opens none."""
    end = line.rfind("`") + 1
    start = len(line[:end].rstrip("`"))
    if end - start < 3:
        start = line.find("~~~", end)
        end = len(line) - len(line[start:].lstrip("~")) if start >= 0 else start
    return start, line[start:end]


# ---- the tests -------------------------------------------------------------------------------------------------------


def _judge(
    source: str, name: str | None, pairs: Sequence[tuple[Any, Any]], limit_s: float, prelude: bool, reference: bool
) -> Verdict:
    if name is not None:
        return _judge_calls(source, name, pairs, limit_s)
    began, box = time.monotonic(), sandbox.box()
    for i, (stdin, want) in enumerate(pairs):
        label, left = f"test {i + 1} of {len(pairs)}", _budget_s - (time.monotonic() - began)
        if left <= 0.05:
            return Verdict(0.0, "timeout", f"{label}: {_budget_s:g} s for all tests are spent")
        outcome = box.run(source, stdin, cpu_s=min(limit_s, left), wall_s=left, prelude=prelude)
        if outcome.end == "timeout":
            return Verdict(0.0, "timeout", f"{label}: ran out of time")
        if outcome.end != "exit":
            return Verdict(0.0, "wrong", f"{label}: {_ended(outcome)}")
        same = outcome.out.strip() == want.strip() if reference else same_text(outcome.out, want)
        if not same:
            return Verdict(0.0, "wrong", f"{label}: printed {_short(outcome.out)}, expected {_short(want)}")
    return Verdict(1.0, "ok", f"{len(pairs)} tests")


def _judge_calls(source: str, name: str, pairs: Sequence[tuple[Any, Any]], limit_s: float) -> Verdict:
    arguments = [_arguments(given) for given, _ in pairs]
    outcome = sandbox.box().run(
        source, calls=(name, arguments), cpu_s=_budget_s, wall_s=_budget_s, call_s=2 * limit_s, prelude=True
    )
    for i, (given, want) in enumerate(pairs):
        label = f"test {i + 1} of {len(pairs)}"
        if i >= len(outcome.results):
            return Verdict(0.0, "timeout" if outcome.end == "timeout" else "wrong", f"{label}: {_ended(outcome)}")
        got, wanted = outcome.results[i], json.loads(json.dumps(_wanted(given, want)))
        if got != wanted:
            return Verdict(0.0, "wrong", f"{label}: returned {_short(got)}, expected {_short(wanted)}")
    return Verdict(1.0, "ok", f"{len(pairs)} tests")


def _arguments(given: Any) -> list[Any]:
    """The arguments of one call: a list, or JSON text with one argument per line."""
    if isinstance(given, str):
        return [json.loads(line) for line in given.split("\n") if line.strip()]
    if not isinstance(given, list):
        raise ValueError(f"an input must be the list of its arguments, got {type(given).__name__}")
    return given


def _wanted(given: Any, want: Any) -> Any:
    return json.loads(want) if isinstance(given, str) and isinstance(want, str) else want


_ENDS = {
    "exit": "ended early",
    "error": "exit with an error",
    "timeout": "ran out of time",
    "output": "too much output",
    "killed": "killed by a signal or at its memory limit",
}


def _ended(outcome: sandbox.Outcome) -> str:
    return outcome.detail or _ENDS[outcome.end]


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return repr(text if len(text) <= 60 else text[:60] + "...")


def same_text(got: str, want: str) -> bool:
    """Line by line: equal without surrounding blanks, or the same exact decimals ("1.0 2" and "1 2.00")."""
    mine, gold = got.strip().split("\n"), want.strip().split("\n")
    return len(mine) == len(gold) and all(a.strip() == b.strip() or _same_decimals(a, b) for a, b in zip(mine, gold))


def _same_decimals(a: str, b: str) -> bool:
    x, y = a.split(), b.split()
    if len(x) != len(y):
        return False
    try:
        return all(Decimal(p) == Decimal(q) for p, q in zip(x, y))
    except (InvalidOperation, ValueError):
        return False


# ---- the paper's rules -----------------------------------------------------------------------------------------------


def _reference_program(response: str) -> str | None:
    """From after the first ```python to the last ```, glueing blocks together; nothing without a closing fence."""
    start = response.find("```python")
    end = response.rfind("```")
    return response[start + 9 : end].strip() if 0 <= start < end else None


def _reference_wrapper(source: str) -> str:
    """The program inside `try` with stdout replaced: loses the output before sys.exit(), sys.stdout.buffer, __future__
    imports, the layout of triple-quoted texts, and resource, psutil and joblib."""
    body = "".join(f"    {line}\n" for line in source.split("\n"))
    return f"""import io as _io, sys as _sys
for _name in ("resource", "psutil", "joblib"):
    _sys.modules[_name] = None
_real, _sys.stdout = _sys.stdout, _io.StringIO()
try:
{body}    pass
except Exception as _error:
    _real.write(f"Error: {{_error}}")
else:
    _real.write(_sys.stdout.getvalue())
"""
