"""Code: the program in the last fenced block passes every test, run in a killable child process by `sandbox`.

    tests = {"inputs": [...], "outputs": [...]}                 stdin text -> stdout text
    tests = {"fn_name": "f", "inputs": [[args], ...], "outputs": [...]}   calls of a function

Expected outputs never enter the child: it returns what it computed, and the comparison happens here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from m2rl.domains import sandbox
from m2rl.types import Verdict

MAX_TESTS = 50
_FENCE = re.compile(r"^[ \t]*(`{3,}|~{3,})[ \t]*([\w+#.-]*)[^\n]*\n(.*?)(?:^[ \t]*\1`*[ \t]*$|\Z)", re.DOTALL | re.MULTILINE)
_PYTHON = {"", "python", "py", "python3", "python2", "pypy3"}


def check_spec(spec: Mapping[str, Any]) -> None:
    tests = spec.get("tests")
    if not isinstance(tests, Mapping):
        raise ValueError(f"code needs key tests, {{inputs, outputs[, fn_name]}}, got {type(tests).__name__}")
    inputs, outputs = tests.get("inputs"), tests.get("outputs")
    if not isinstance(inputs, list) or not isinstance(outputs, list) or len(inputs) != len(outputs) or not inputs:
        raise ValueError("code: tests.inputs and tests.outputs must be non-empty lists of equal length")
    if tests.get("fn_name") is None and not all(isinstance(x, str) for x in (*inputs, *outputs)):
        raise ValueError("code: without tests.fn_name, inputs and outputs are texts (stdin, stdout)")
    if tests.get("fn_name") is not None and not all(isinstance(x, list) for x in inputs):
        raise ValueError("code: with tests.fn_name, every input is the list of its arguments")


def program(response: str) -> str | None:
    """The last fenced block in Python, or without a language; an unclosed fence ends with the text."""
    blocks = [body for _, language, body in _FENCE.findall(response) if language.lower() in _PYTHON]
    return blocks[-1] if blocks else None


def verify(response: str, spec: Mapping[str, Any]) -> Verdict:
    source = program(response)
    if source is None:
        return Verdict(0.0, "unparsed", "no fenced Python block")
    tests = spec["tests"]
    inputs, outputs = tests["inputs"][:MAX_TESTS], tests["outputs"][:MAX_TESTS]
    name = tests.get("fn_name")
    result = sandbox.call(source, name, inputs) if name else sandbox.run(source, inputs, outputs)
    if result.timeout:
        return Verdict(0.0, "timeout", result.error)
    for i, want in enumerate(outputs):
        if i >= len(result.outputs):
            return Verdict(0.0, "wrong", f"test {i + 1} of {len(outputs)}: {result.error}"[:300])
        got = result.outputs[i]
        same = json.loads(json.dumps(got)) == json.loads(json.dumps(want)) if name else sandbox.same_text(got, want)
        if not same:
            return Verdict(0.0, "wrong", f"test {i + 1} of {len(outputs)}: got {str(got)[:80]!r}, expected {str(want)[:80]!r}")
    return Verdict(1.0, "ok", f"{len(outputs)} tests")
