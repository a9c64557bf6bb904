"""The embedded default's own constraints, beside the IFEval ids it uses; cheap enough to judge every sample of every
step."""

from __future__ import annotations

from m2rl.domains.constraints import COUNT, WORD, constraint
from m2rl.domains.constraints_ifeval import count_words
from m2rl.domains.english_text import WORD as WORD_PATTERN


@constraint("embedded:exact_words", num_words=COUNT)
def exact_words(response: str, num_words: int) -> bool:
    """Exactly that many words."""
    return count_words(response) == num_words


@constraint("embedded:start_with_word", word=WORD)
def start_with_word(response: str, word: str) -> bool:
    """The first word is this one, in any case."""
    first = WORD_PATTERN.search(response)
    return first is not None and first.group().lower() == word.lower()


@constraint("embedded:use_commas")
def use_commas(response: str) -> bool:
    """At least one comma."""
    return "," in response
