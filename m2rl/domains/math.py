"""Math: the last boxed answer, else the last "Answer:" line, equals the expected answer.

    spec = {"answer": "3/4" | 7 | "\\\\frac{3}{4}" ...}

Decided by the first that can: the same text; both plain numbers (exact, so 0.1 + 0.2 is 0.3 and 025 is 25);
math-verify for fractions against decimals, sets, intervals, tuples, units, percentages, symbols.

math-verify bounds itself with SIGALRM, which a main thread alone receives, and not inside one long C call: so it runs
on the main thread of a worker process of `pool`, which kills the worker at its deadline. Elsewhere the status is
error, never a silent 0. Answers longer than MAX_ANSWER_CHARS are wrong unread; numbers too large to be worth
computing (10^{10^{10}}!) are wrong unless they are the expected text.

preset "reference": the paper's reference code looks for the box only after the last "Answer:", and takes no answer
without one."""

from __future__ import annotations

import functools
import logging
import re
import threading
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

from m2rl.domains.answers import last_answer_line, last_boxed
from m2rl.types import Verdict

MAX_ANSWER_CHARS = 256
TIMEOUT_S = 3
_NUMBER = re.compile(
    r"([+-]?)\s?(?:([0-9]{1,100}(?:,[0-9]{3}){0,20})(?:\.([0-9]{0,100}))?|\.([0-9]{1,100}))"
    r"(?:\s?/\s?([0-9]{1,100}))?$"
)
_FRACTION = re.compile(r"([+-]?)\\[dt]?frac\{([0-9]{1,100})\}\{([0-9]{1,100})\}$")
_HUGE = re.compile(
    r"[0-9)}]\s?\^\s?\{?\s?\(?[0-9]{1,20}\s?[\^!]|\^\{?\(?[0-9]{5,}|[0-9]{4,}!|\\(?:sum|prod|int)(?![a-z])|[{(]{12}"
)
"""Towers of numbers, large exponents and factorials, sums and integrals left to do, heaps of braces."""


def check_spec(spec: Mapping[str, Any]) -> None:
    answer = spec.get("answer")
    if not isinstance(answer, str | int | float) or isinstance(answer, bool) or not str(answer).strip():
        raise ValueError(f"key answer must be a non-empty string or a number, got {answer!r}")
    if len(str(answer)) > 4 * MAX_ANSWER_CHARS:
        raise ValueError(f"key answer must have at most {4 * MAX_ANSWER_CHARS} characters, got {len(str(answer))}")


def verify(response: str, spec: Mapping[str, Any]) -> Verdict:
    """ok / wrong / unparsed; timeout when math-verify ran out of time, error when it could not run."""
    found = _found(response, spec.get("preset") == "reference")
    if found is None:
        return Verdict(0.0, "unparsed", "no \\boxed{} and no Answer: line")
    return compare(_undressed(found), _undressed(str(spec["answer"])))


def _found(response: str, reference: bool) -> str | None:
    if reference:
        return last_boxed(response.rpartition("Answer:")[2])
    boxed = last_boxed(response)
    return (last_answer_line(response) if boxed is None else boxed) or None


def compare(found: str, want: str) -> Verdict:
    """An answer against the expected one, both without their box."""
    if not found:
        return Verdict(0.0, "unparsed", "an empty answer")
    if len(found) > MAX_ANSWER_CHARS and found != want:
        return Verdict(0.0, "wrong", f"an answer of {len(found)} characters")
    if "".join(found.split()) == "".join(want.split()):
        return Verdict(1.0, "ok", found)
    mine, gold = number(found), number(want)
    if mine is not None and gold is not None:
        if mine == gold:
            return Verdict(1.0, "ok", found)
        if mine.denominator == gold.denominator == 1:
            return Verdict(0.0, "wrong", found)
    if (same := _same_numbers(found, want)) is not None:
        return Verdict(float(same), "ok" if same else "wrong", found)
    if _HUGE.search(found) and not _HUGE.search(want):
        return Verdict(0.0, "wrong", f"not worth computing: {found}")
    return _symbolic(found, want)


def _undressed(text: str) -> str:
    """Without math delimiters and a full stop around it."""
    text = text.strip()
    for left, right in (("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]")):
        bare = text.rstrip(". ")
        if text.startswith(left) and bare.endswith(right) and len(bare) >= len(left) + len(right):
            text = bare[len(left) : len(bare) - len(right)].strip()
    return text[:-1].rstrip() if text.endswith(".") and not text.endswith("..") else text


def number(text: str) -> Fraction | None:
    """A plain number: digits with or without thousands separators, a decimal, a quotient, a \\frac of two integers."""
    text = text.replace("{,}", ",").replace("\\!", "").replace("\\,", "").strip("$ ")
    if found := _FRACTION.match(text):
        top, bottom = int(found.group(2)), int(found.group(3))
    elif found := _NUMBER.match(text):
        whole, decimals = (found.group(2) or "").replace(",", ""), found.group(3) or found.group(4) or ""
        top, bottom = int(whole + decimals or "0"), 10 ** len(decimals) * int(found.group(5) or 1)
    else:
        return None
    return Fraction(-top if found.group(1) == "-" else top, bottom) if bottom else None


_OPEN, _CLOSE = {"(": "(", "[": "[", "\\{": "{", "": ""}, {")": ")", "]": "]", "\\}": "}", "": ""}
_SEQUENCE = re.compile(r"(\(|\[|\\\{|)([^()\[\]{}]{1,256})(\)|\]|\\\}|)$")


def _numbers(text: str) -> tuple[str, list[Fraction]] | None:
    """(brackets, elements) of a tuple, interval, set or bare list of two or more plain numbers."""
    found = _SEQUENCE.match(text.replace("\\left", "").replace("\\right", "").replace(" ", ""))
    if found is None or "," not in found.group(2):
        return None
    elements = [number(part) for part in found.group(2).split(",")]
    known = [x for x in elements if x is not None]
    if len(known) < len(elements) or re.fullmatch(r"[0-9]{1,3}(,[0-9]{3})+", found.group(2)):  # 1,000 may be one number
        return None
    return _OPEN[found.group(1)] + _CLOSE[found.group(3)], known


def _same_numbers(found: str, want: str) -> bool | None:
    """Do lists in the same brackets hold the same numbers, sets and bare lists in any order? None: ask others."""
    mine, gold = _numbers(found), _numbers(want)
    if mine is None or gold is None or mine[0] != gold[0]:
        return None
    a, b = (mine[1], gold[1]) if gold[0] not in ("", "{}") else (sorted(set(mine[1])), sorted(set(gold[1])))
    if a == b:
        return True
    whole = all(x.denominator == 1 for x in (*a, *b))
    return False if whole or len(a) != len(b) else None  # decimals may be rounded


def warm() -> None:
    """Import sympy and its parser, a second or two, before a deadline counts."""
    _symbolic("\\frac{1}{x}", "x")


@functools.lru_cache(8192)
def _symbolic(found: str, want: str) -> Verdict:
    if threading.current_thread() is not threading.main_thread():
        return Verdict(0.0, "error", "math-verify needs the main thread of its process: judge through a pool")
    from math_verify import verify
    from math_verify.errors import TimeoutException

    try:
        gold, mine = _parsed(want, True), _parsed(found, False)
        if not mine:
            return Verdict(0.0, "unparsed", found)
        ok = bool(verify(gold, mine, timeout_seconds=TIMEOUT_S, raise_on_error=True))
    except TimeoutException:
        return Verdict(0.0, "timeout", found)
    except (Exception, RecursionError) as error:  # sympy fails in many ways on what is not mathematics
        return Verdict(0.0, "wrong", f"{found} ({type(error).__name__})")
    return Verdict(float(ok), "ok" if ok else "wrong", found)


@functools.lru_cache(1024)  # a group has one expected answer, and its samples repeat each other
def _parsed(text: str, expected: bool) -> list[Any]:
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse

    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    latex = LatexExtractionConfig(boxed_match_priority=0)
    targets = [latex] if expected else [latex, ExprExtractionConfig()]
    return parse(f"\\boxed{{{text}}}", targets, parsing_timeout=TIMEOUT_S, raise_on_error=True)
