"""Where a final answer stands in a response: the last \\boxed{...}, else what follows the last "Answer:".

Every function is linear in the text: a response may be 100k tokens of anything.
"""

from __future__ import annotations

import re

MAX_BOX_CHARS = 4096
_BOX = re.compile(r"\\(?:boxed|fbox)\s{0,4}\{")
_ANSWER = re.compile(r"\banswer\b[ \t*_]{0,8}(?:is[ \t*_]{0,8})?[:：][ \t*_]{0,8}", re.IGNORECASE)


def last_boxed(text: str) -> str | None:
    """The content of the last complete \\boxed{...} or \\fbox{...}, braces balanced, at most MAX_BOX_CHARS long."""
    for found in reversed([m.end() for m in _BOX.finditer(text)][-16:]):
        depth, i, end = 1, found, min(len(text), found + MAX_BOX_CHARS)
        while i < end:
            c = text[i]
            if c == "\\":
                i += 1  # an escaped brace
            elif c == "{":
                depth += 1
            elif c == "}":
                depth -= 1
                if depth == 0:
                    return text[found:i]
            i += 1
    return None


def last_answer_line(text: str) -> str | None:
    """What follows the last "Answer:" ("The final answer is: ", "**Answer:**" ...) on its line, or on the next one."""
    last = None
    for last in _ANSWER.finditer(text):  # noqa: B007
        pass
    if last is None:
        return None
    rest = text[last.end() : last.end() + MAX_BOX_CHARS].lstrip("*_ \t")
    return rest.lstrip().partition("\n")[0].strip(" \t\r*_")


def final_answer(text: str) -> str | None:
    """The last box, else the last answer line; None if there is neither, or nothing in it."""
    boxed = last_boxed(text)
    if boxed is None:
        return last_answer_line(text) or None
    return boxed
