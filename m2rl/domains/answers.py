"""Where a final answer stands in a response: the last \\boxed{...}, else what follows the last line-leading "Answer:"."""

from __future__ import annotations

import re

_ANSWER_LINE = re.compile(r"^[\s*_#>-]*(?:the\s+)?(?:final\s+)?answer(?:\s+is)?[\s*_]*:[\s*_]*(.*?)[\s*_]*$", re.IGNORECASE | re.MULTILINE)


def last_boxed(text: str) -> str | None:
    """The content of the last complete \\boxed{...} or \\fbox{...}, braces balanced."""
    end = len(text)
    while (start := max(text.rfind("\\boxed{", 0, end), text.rfind("\\fbox{", 0, end))) >= 0:
        opening = text.index("{", start)
        depth = 0
        for i in range(opening, len(text)):
            if text[i] == "{":
                depth += 1
            elif text[i] == "}":
                depth -= 1
                if depth == 0:
                    return text[opening + 1 : i]
        end = start
    return None


def last_answer_line(text: str) -> str | None:
    """What follows "Answer:" on the last line that begins so."""
    found = _ANSWER_LINE.findall(text)
    return found[-1] if found else None


def final_answer(text: str) -> str | None:
    boxed = last_boxed(text)
    if boxed is None:
        line = last_answer_line(text)
        return line or None
    return boxed
