"""Where a final answer stands in a response: the last \\boxed{...}, else what follows the last "Answer:".

Every function is linear in the text: a response may be 100k tokens of anything.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

MAX_BOX_CHARS = 4096
_BOX = re.compile(r"\\(?:boxed|fbox)\s{0,4}\{")
_BETWEEN = re.compile(r"[$\s]*(?:,|,?\s*(?:and|or)|,?\s*\\text\{\s*(?:and|or)\s*\})[$\s]*$")
_ANSWER = re.compile(r"\banswer\b[ \t*_]{0,8}(?:is[ \t*_]{0,8})?[:：][ \t*_]{0,8}", re.IGNORECASE)


def _boxes(text: str) -> Iterator[tuple[int, int, str]]:
    """(start, end, content) of the complete boxes among the last 16, the last first."""
    for mark in list(_BOX.finditer(text))[-16:][::-1]:
        depth, i, end = 1, mark.end(), min(len(text), mark.end() + MAX_BOX_CHARS)
        while i < end:
            c = text[i]
            if c == "\\":
                i += 1  # an escaped brace
            elif c == "{":
                depth += 1
            elif c == "}":
                depth -= 1
                if depth == 0:
                    yield mark.start(), i + 1, text[mark.end() : i]
                    break
            i += 1


def last_boxed(text: str) -> str | None:
    """The content of the last complete \\boxed{...} or \\fbox{...}, braces balanced, at most MAX_BOX_CHARS long."""
    return next((content for _, _, content in _boxes(text)), None)


def last_boxed_list(text: str) -> str | None:
    """As `last_boxed`, but boxes with a comma, "and" or "or" between them and nothing else are one answer: "1, 2"."""
    parts, follows = list[str](), None
    for start, end, content in _boxes(text):
        if follows is not None and not (end < follows <= end + 24 and _BETWEEN.match(text, end, follows)):
            break
        parts.insert(0, content)
        follows = start
    return ", ".join(parts) if parts else None


def last_answer_line(text: str) -> str | None:
    """What follows the last "Answer:" ("The final answer is: ", "**Answer:**" ...) on its line, or on the next one."""
    last = None
    for last in _ANSWER.finditer(text):  # noqa: B007
        pass
    if last is None:
        return None
    rest = text[last.end() : last.end() + MAX_BOX_CHARS].lstrip("*_ \t").lstrip()
    for opening, closing in (("$$", "$$"), ("\\[", "\\]")):  # displayed: its delimiters stand on lines of their own
        if rest.startswith(opening) and (end := rest.find(closing, 2)) > 0:
            return rest[2:end].strip()
    return rest.partition("\n")[0].strip(" \t\r*_`")


def final_answer(text: str) -> str | None:
    """The last box, else the last answer line; None if there is neither, or nothing in it."""
    boxed = last_boxed(text)
    if boxed is None:
        return last_answer_line(text) or None
    return boxed
