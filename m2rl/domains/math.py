"""Math: the last boxed answer, else the last "Answer:" line, equals the expected answer.

    spec = {"answer": "3/4" | 7 | "\\\\frac{3}{4}" ...}

Decided by the first that can: the same text; both plain numbers (exact, so 0.1 + 0.2 is 0.3 and 025 is 25); lists of
plain numbers; math-verify for fractions against decimals, sets, intervals, tuples, percentages, symbols. Before lists
and math-verify both sides are rewritten (`plain`): Unicode as LaTeX, pi, wrappers such as \\text{...}, units in words.
Two of math-verify's verdicts are not kept: a set is no tuple or interval, and 1011_3 is not 1011_2. "3 or 4" is no 3.

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

from m2rl.domains.answers import last_answer_line, last_boxed, last_boxed_list
from m2rl.domains.english_words import word_set
from m2rl.types import Verdict

MAX_ANSWER_CHARS = 256
TIMEOUT_S = 3
_SPACE = re.compile(r"(?<![0-9])\s+|\s+(?![0-9])")  # all but between digits: "1 1/2" is not 11/2
_NUMBER = re.compile(
    r"([+-]?)\s?(?:([0-9]{1,100}(?:[, ][0-9]{3}){0,20})(?:\.([0-9]{0,100}))?|\.([0-9]{1,100}))"
    r"(?:\s?/\s?([0-9]{1,100}))?$"
)
_MIXED = re.compile(
    r"([+-]?)([0-9]{1,100})(?: ([0-9]{1,100})\s?/\s?([0-9]{1,100})|\s?\\[dt]?frac\{([0-9]{1,100})\}\{([0-9]{1,100})\})$"
)
_FRACTION = re.compile(r"([+-]?)\\[dt]?frac\{([0-9]{1,100})\}\{([0-9]{1,100})\}$")
_REPEATING = re.compile(r"([+-]?)([0-9]{1,20})\.([0-9]{0,20})\\(?:overline|bar|dot)\s?\{([0-9]{1,20})\}$")
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
    boxed = last_boxed_list(response)
    return (last_answer_line(response) if boxed is None else boxed) or None


def compare(found: str, want: str) -> Verdict:
    """An answer against the expected one, both without their box."""
    if not found:
        return Verdict(0.0, "unparsed", "an empty answer")
    if len(found) > MAX_ANSWER_CHARS and found != want:
        return Verdict(0.0, "wrong", f"an answer of {len(found)} characters")
    if _SPACE.sub("", found) == _SPACE.sub("", want):
        return Verdict(1.0, "ok", found)
    if (same := _same_number(found, want)) is None:
        found, want = plain(found), plain(want)
        same = _same_number(found, want)
    if same is None:
        same = _same_list(found, want)
    if same is None:
        same = _same_in_base(found, want)
    if same is None and len(want) > 2 and want.isalpha() and found.casefold() == want.casefold():
        same = True
    if same is not None:
        return Verdict(float(same), "ok" if same else "wrong", found)
    if number(want) is not None and len(offers := _OR.split(found)) > 1:  # "3 or 4" is no 3; "1/2 or 0.5" is a half
        right = all(compare(_undressed(offer.strip(" ()")), want).reward for offer in offers)
        return Verdict(float(right), "ok" if right else "wrong", found)
    if _HUGE.search(found) and not _HUGE.search(want):
        return Verdict(0.0, "wrong", f"not worth computing: {found}")
    return _symbolic(found, want)


def _same_number(found: str, want: str) -> bool | None:
    """Are two plain numbers equal? None: one is none, or they differ and may have been rounded."""
    mine, gold = number(found), number(want)
    if mine is None or gold is None:
        return None
    return True if mine == gold else False if mine.denominator == gold.denominator == 1 else None


def _undressed(text: str) -> str:
    """Without math delimiters and a full stop around it."""
    text = text.strip()
    for left, right in (("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]")):
        bare = text.rstrip(". ")
        if text.startswith(left) and bare.endswith(right) and len(bare) >= len(left) + len(right):
            text = bare[len(left) : len(bare) - len(right)].strip()
    return text[:-1].rstrip() if text.endswith(".") and not text.endswith("..") else text


_UNICODE = str.maketrans(
    {c: rf"\frac{{{a}}}{{{b}}}" for c, a, b in zip("½⅓⅔¼¾⅕⅙⅛", "11213111", "23344568")}
    | {c: f"^{n}" for n, c in enumerate("⁰¹²³⁴⁵⁶⁷⁸⁹")}
    | {"−": "-", "–": "-", "—": "-", "×": "\\times ", "·": "\\cdot ", "÷": "/", "°": "^\\circ "}
    | {"≤": "\\le ", "≥": "\\ge ", "≠": "\\neq ", "∪": "\\cup ", "∩": "\\cap ", "∅": "\\emptyset ", "∈": "\\in "}
    | {"π": "\\pi ", "θ": "\\theta ", "∞": "\\infty "}
)
_WRAPPED = re.compile(
    r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mathit|mathsf|operatorname|boldsymbol|bm)\s?\{([^{}]*)\}$"
)
_LEAD = re.compile(
    r"(?:the )?(?:final )?answer(?: is)?\s?:?\s?(?=[^a-z])|\\text\{\s*(?:the )?(?:final )?answer(?: is)?:?\s*\}",
    re.IGNORECASE,
)
_EXPONENT = re.compile(r"([+-]?[0-9]+(?:\.[0-9]+)?)[eE]([+-]?[0-9]{1,3})$")
_UNITS = word_set(
    """
    mm cm dm km in ft yd mi mg kg lb lbs oz ml mL cl dl min s sec hr hrs h mph kmh kph Hz kHz MHz kJ kW MW kPa Pa eV K
    rad deg sq cu m/s m^2 m^3
    """
)
_NO_UNITS = word_set(
    """
    million billion trillion thousand hundred dozen half thirds quarters factorial squared cubed percent plus minus
    times divided over mod modulo and but not sqrt sin cos tan cot sec csc log exp theta alpha beta gamma infinity
    """
)
_WITH_UNIT = re.compile(r"(.*[0-9})])(?:\s|\\ |\\,|~){1,3}([A-Za-z][A-Za-z. /^0-9-]{0,60})$")


@functools.lru_cache(8192)
def plain(text: str) -> str:
    """An answer in the one spelling of the many that are compared: Unicode as LaTeX, no wrapper, no unit in words."""
    text = text.translate(_UNICODE)
    if text.count("$") == 2 and "\\$" not in text:  # "$12$ apples"
        text = text.replace("$", "")
    if lead := _LEAD.match(text):
        text = text[lead.end() :]
    while wrapped := _WRAPPED.match(text):
        text = wrapped.group(1).strip()
    text = re.sub(r"√\s?([0-9]+|[a-zA-Z]|\(([^()]*)\))", lambda m: rf"\sqrt{{{m.group(2) or m.group(1)}}}", text)
    text = re.sub(r"(?<![\\A-Za-z])pi(?![A-Za-z])", r"\\pi ", text).replace("\\varnothing", "\\emptyset")
    if exponent := _EXPONENT.match(text):
        text = rf"{exponent.group(1)} \times 10^{{{int(exponent.group(2))}}}"
    if found := _WITH_UNIT.match(text):
        unit = found.group(2).strip(" .")
        if unit in _UNITS or all(map(_is_unit, re.split(r"[\s/-]+", unit))):
            text = found.group(1)
    return text.strip()


def _is_unit(word: str) -> bool:
    """A word that says what is counted or measured. One of one or two letters may be a variable, if it is no unit."""
    word = re.sub(r"\^?[23]$", "", word.rstrip("."))
    return word in _UNITS or (len(word) >= 3 and word.isalpha() and word.lower() not in _NO_UNITS)


_OR = re.compile(r"\\text\s?\{[\s(]*or\s*\}|\\lor\b|\\vee\b|\bor\b")
_IN_BASE = re.compile(r"([0-9A-Za-z]+)_\{?([0-9]{1,2})\}?$")


def _same_in_base(found: str, want: str) -> bool | None:
    """Two numerals with their bases written: the same only if both are. None: one has no base."""
    mine, gold = _IN_BASE.match(found), _IN_BASE.match(want)
    return None if mine is None or gold is None else mine.groups() == gold.groups()


def number(text: str) -> Fraction | None:
    """A plain number: digits with or without thousands separators, a decimal (repeating ones as 0.1\\overline{6}), a
    quotient, a \\frac of two integers, a mixed number."""
    text = text.replace("{,}", ",").replace("\\!", "").replace("\\,", "").strip("$ ")
    if found := _FRACTION.match(text):
        top, bottom = int(found.group(2)), int(found.group(3))
    elif found := _NUMBER.match(text):
        whole, decimals = re.sub("[, ]", "", found.group(2) or ""), found.group(3) or found.group(4) or ""
        top, bottom = int(whole + decimals or "0"), 10 ** len(decimals) * int(found.group(5) or 1)
    elif found := _MIXED.match(text):
        over, bottom = (int(found.group(3) or found.group(5)), int(found.group(4) or found.group(6)))
        top = int(found.group(2)) * bottom + over
    elif found := _REPEATING.match(text):
        fixed, period = found.group(3), found.group(4)
        bottom = 10 ** len(fixed) * (10 ** len(period) - 1)
        top = int(found.group(2) + fixed + period) - int(found.group(2) + fixed)
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


def _same_list(found: str, want: str) -> bool | None:
    """Do lists in the same brackets hold the same numbers, sets and bare lists in any order? None: ask others."""
    mine, gold = _numbers(found), _numbers(want)
    if mine is None or gold is None:
        return None
    if mine[0] != gold[0]:  # a set is no tuple and no interval; a bare list may stand for either
        return False if "{}" in (mine[0], gold[0]) and "" not in (mine[0], gold[0]) else None
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
    if "\\pm" in text or "\\mp" in text:  # one text for both signs is two values
        text = ", ".join(text.replace("\\pm", a).replace("\\mp", b) for a, b in (("+", "-"), ("-", "+")))
    latex = LatexExtractionConfig(boxed_match_priority=0)
    targets = [latex] if expected else [latex, ExprExtractionConfig()]
    return parse(f"\\boxed{{{text}}}", targets, parsing_timeout=TIMEOUT_S, raise_on_error=True)
