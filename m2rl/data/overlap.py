"""Shared 13-grams of words: how much of one text stands in another, whatever its case, punctuation and line breaks."""

from __future__ import annotations

import re
from collections.abc import Iterable

WORDS = 13  # GPT-3's choice (arXiv 2005.14165, appendix C)
_WORD = re.compile(r"\w+")


def words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def grams(text: str, n: int = WORDS) -> set[int]:
    """Hashes of the n-grams of a text; of the whole text if it has fewer words, none if it has none."""
    found = words(text)
    if not found:
        return set()
    return {hash(tuple(found[i : i + n])) for i in range(max(len(found) - n + 1, 1))}


class Index:
    """The n-grams of some texts; `find` names a text that shares one."""

    def __init__(self, texts: Iterable[tuple[str, str]], n: int = WORDS):
        """texts: (name, text)."""
        self.n, self.by_gram = n, dict[int, str]()
        for name, text in texts:
            for gram in grams(text, n):
                self.by_gram.setdefault(gram, name)

    def find(self, text: str) -> str | None:
        found = words(text)
        if len(found) >= self.n:
            for i in range(len(found) - self.n + 1):
                if name := self.by_gram.get(hash(tuple(found[i : i + self.n]))):
                    return name
            return None
        return self.by_gram.get(hash(tuple(found))) if found else None
