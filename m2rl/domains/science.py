"""Science: which of the row's own options does the response end on? A strict grammar over its final statement.

    spec = {"answer": "C", "options": {"A": "...", ...} | ["A", "B", ...], "output_regex": "..." (optional)}

In this order: the row's `output_regex` (its last match), the last \\boxed{...}, the last "Answer: ...", the last "the
answer is X." with X at the end of its sentence. A statement counts if it is one option's letter, alone or with its
text, or one option's text; "A or B" names none, and what the response said before its final statement never counts.
Without options the answer is judged as in `math`.

preset "reference": the loose rule of the paper's reference code, for comparison: its first hit of
answer|option|choice (is|:)? LETTER in any case, else "X is the correct", else the last capital standing alone.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from m2rl.domains import math
from m2rl.domains.answers import last_answer_line, last_boxed_list
from m2rl.types import Verdict

REGEX_CHARS = 20_000  # a row's own regex reads the end of the response
_WRAPPER = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf|mathit|mathsf|operatorname|boldsymbol|bf|rm)\b\s{0,3}")
_SPOKEN = re.compile(
    r"\b(?:answer|option|choice) (?:is|would be|must be) (?:option |choice )?[*_(\[{$]{0,3}([A-Z])[*_)\]}$]{0,3}"
    r"(?=[.!]?[*_]{0,2}(?:\s*$|\s*\n|\s+[A-Z(]|[.!]\s|,? (?:because|since)\b))",
    re.MULTILINE,
)
_REFERENCE = (
    re.compile(r"(?:answer|option|choice)\s{0,20}(?:is|:)?\s{0,20}([A-Z])", re.IGNORECASE),
    re.compile(r"([A-Z])\s{0,20}(?:is the correct)", re.IGNORECASE),
)
_HEAD = re.compile(
    r"(?:(?:the )?(?:correct |final |best )?(?:option|choice|answer)(?: is)? )?(?:option |choice )?"
    r"[(\[]?([a-z0-9]{1,2})[)\]]?(?:\s{0,3}[).:\-–—=]\s{0,3}(.*)|\s\((.*)\)?|,? (?:because|since)\b.*)?[.!]?$",
    re.DOTALL | re.IGNORECASE,
)
_DENIED = re.compile(r"\b(?:not|wrong|incorrect|false)\b", re.IGNORECASE)
_CAPITAL = re.compile(r"\b([A-Z])\b")


def check_spec(spec: Mapping[str, Any]) -> None:
    answer, options = spec.get("answer"), spec.get("options")
    if options is None:
        math.check_spec(spec)
        return
    if not isinstance(answer, str) or not answer.strip():
        raise ValueError(f"science needs key answer, a non-empty string, got {answer!r}")
    known = list(_options(options))
    if len(known) < 2:
        raise ValueError(f"science: options must be letters, or letter -> text, at least two, got {options!r}"[:200])
    if answer.strip().upper() not in known:
        raise ValueError(f"science: answer {answer!r} is not one of the options {', '.join(known)}")
    if (pattern := spec.get("output_regex")) is not None:
        try:
            re.compile(pattern)
        except (re.error, TypeError, RecursionError) as error:
            raise ValueError(f"science: output_regex {pattern!r} is not a regular expression: {error}") from None


def _options(options: Any) -> dict[str, str]:
    """LETTER -> text, from letter -> text, a list of such, or a list of letters."""
    if isinstance(options, Mapping):
        return {str(k).strip().upper(): str(v or "") for k, v in options.items()}
    if isinstance(options, list | tuple | str):
        merged: dict[str, str] = {}
        for entry in options:
            merged |= _options(entry) if isinstance(entry, Mapping) else {str(entry).strip().upper(): ""}
        return merged
    return {}


def verify(response: str, spec: Mapping[str, Any]) -> Verdict:
    if spec.get("options") is None:
        return math.verify(response, spec)
    options = _options(spec["options"])
    if spec.get("preset") == "reference":
        letter = _reference_letter(response, options)
    else:
        letter = _final_letter(response, options, spec.get("output_regex"))
    if letter is None:
        return Verdict(0.0, "unparsed", "no final statement names one option")
    ok = letter == str(spec["answer"]).strip().upper()
    return Verdict(float(ok), "ok" if ok else "wrong", letter)


def _final_letter(response: str, options: Mapping[str, str], pattern: str | None) -> str | None:
    if pattern:
        found = list(re.finditer(pattern, response[-REGEX_CHARS:], re.IGNORECASE))
        if found:
            groups = [g for g in found[-1].groups() if g] or [found[-1].group()]
            if (letter := named(groups[0], options)) is not None:
                return letter
    for statement in (last_boxed_list(response), last_answer_line(response)):
        if statement is not None and (letter := named(statement, options)) is not None:
            return letter
        if statement is not None and _letters_in(statement, options):
            return None  # it names several: a hedge is no answer, and nothing else counts
    spoken = [m.group(1) for m in _SPOKEN.finditer(response)]
    return spoken[-1] if spoken and spoken[-1] in options else None


def named(statement: str, options: Mapping[str, str]) -> str | None:
    """The one option that a statement is: "B", "(b)", "\\text{B}", "B) 3 km", "Option B.", or the text of B."""
    text = _bare(statement)
    head = _HEAD.match(text)
    if head and (letter := head.group(1).upper()) in options:
        rest = (head.group(2) or head.group(3) or "").strip(" ).")
        own = _bare(options[letter]).lower() == rest.lower()
        others = {_bare(t).lower() for k, t in options.items() if k != letter and t}
        if not rest or own:
            return letter
        other = rest.lower() in others or _letters_in(rest, options) or _DENIED.search(rest)
        return None if other else letter
    same = [k for k, t in options.items() if t and _bare(t).lower() == text.lower()]
    return same[0] if len(same) == 1 else None


def _letters_in(text: str, options: Mapping[str, str]) -> set[str]:
    """Options named by a capital standing alone."""
    return {c for c in _CAPITAL.findall(_WRAPPER.sub(" ", text)) if c in options and c not in ("I",)}


def _bare(text: str) -> str:
    """Without LaTeX dress and end marks."""
    text = _WRAPPER.sub(" ", text).replace("\\,", " ").replace("\\ ", " ")
    return " ".join(re.sub(r"[{}$*_`]|\\[()\[\]]", " ", text).split()).strip(" .;,\"'“”‘’<>")


def _reference_letter(response: str, options: Mapping[str, str]) -> str | None:
    for pattern in _REFERENCE:
        if found := pattern.search(response):
            letter = found.group(1).upper()
            return letter if letter in options else None
    capitals = [c for c in _CAPITAL.findall(response) if c in options]
    return capitals[-1] if capitals else None
