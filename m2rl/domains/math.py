"""Math: the last boxed answer (or "Answer:" line) equals the expected one, by exact match first, by math-verify otherwise.

math-verify bounds itself with SIGALRM, which works on a main thread only: call this from a worker process of `pool`.
"""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from typing import Any

from m2rl.domains.answers import final_answer
from m2rl.types import Verdict

MAX_ANSWER_CHARS = 256
TIMEOUT_S = 3


def check_spec(spec: Mapping[str, Any]) -> None:
    answer = spec.get("answer")
    if not isinstance(answer, str | int | float) or isinstance(answer, bool) or not str(answer).strip():
        raise ValueError(f"math needs key answer, a non-empty string or number, got {answer!r}")


def verify(response: str, spec: Mapping[str, Any]) -> Verdict:
    """ok / wrong / unparsed; timeout when math-verify ran out of time, error when it failed."""
    found = final_answer(response)
    if found is None:
        return Verdict(0.0, "unparsed", "no \\boxed{} and no Answer: line")
    found, want = found.strip(), str(spec["answer"]).strip()
    if len(found) > MAX_ANSWER_CHARS:
        return Verdict(0.0, "wrong", f"answer of {len(found)} characters")
    if _plain(found) == _plain(want):
        return Verdict(1.0, "ok", found)
    mine, gold = _number(found), _number(want)
    if mine is not None and gold is not None:
        return Verdict(float(mine == gold), "ok" if mine == gold else "wrong", found)
    return _symbolic(found, want)


def _plain(text: str) -> str:
    return "".join(text.strip("$ .").split())


def _number(text: str) -> Fraction | None:
    try:
        return Fraction(text.replace(",", "").strip("$ "))
    except (ValueError, ZeroDivisionError):
        return None


def _symbolic(found: str, want: str) -> Verdict:
    from math_verify import parse, verify
    from math_verify.errors import TimeoutException

    try:
        gold = parse(f"\\boxed{{{want}}}", parsing_timeout=TIMEOUT_S)
        mine = parse(f"\\boxed{{{found}}}", parsing_timeout=TIMEOUT_S)
        if not mine:
            return Verdict(0.0, "unparsed", found)
        ok = bool(verify(gold, mine, timeout_seconds=TIMEOUT_S))
    except TimeoutException:
        return Verdict(0.0, "timeout", found)
    return Verdict(float(ok), "ok" if ok else "wrong", found)
