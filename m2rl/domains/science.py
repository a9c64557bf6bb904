"""Science multiple choice (and short numeric answers): a strict final-answer grammar over the row's own options."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from m2rl.domains import math
from m2rl.domains.answers import final_answer
from m2rl.types import Verdict

_LETTER = re.compile(r"^[\s(\[*_$\\{]*(?:text|mathrm|mathbf|textbf)?[{\s]*([A-Za-z])[\s}$*_]*(?:[).:\]].*)?$", re.DOTALL)


def check_spec(spec: Mapping[str, Any]) -> None:
    answer, options = spec.get("answer"), spec.get("options")
    if not isinstance(answer, str) or not answer.strip():
        raise ValueError(f"science needs key answer, a non-empty string, got {answer!r}")
    if options is not None and answer.strip().upper() not in letters(options):
        raise ValueError(f"science: answer {answer!r} is not one of the options {', '.join(letters(options))}")


def letters(options: Any) -> list[str]:
    return [str(x).upper() for x in options]


def verify(response: str, spec: Mapping[str, Any]) -> Verdict:
    options = spec.get("options")
    if options is None:
        return math.verify(response, spec)
    found = final_answer(response)
    match = _LETTER.match(found) if found else None
    letter = match.group(1).upper() if match else None
    if letter not in letters(options):
        text = {" ".join(str(v).lower().split()): k.upper() for k, v in options.items()} if isinstance(options, Mapping) else {}
        letter = text.get(" ".join((found or "").lower().split()))
    if letter is None:
        return Verdict(0.0, "unparsed", f"no option letter in {found!r}" if found else "no final answer")
    ok = letter == str(spec["answer"]).strip().upper()
    return Verdict(float(ok), "ok" if ok else "wrong", letter)
