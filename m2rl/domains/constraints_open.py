"""The 29 constraints that open-instruct's IF-RLVR training adds to IFEval (Pyatkin et al. 2025, arXiv:2507.02833).

The RL blend's instruction rows use them beside IFEval's. Here the prompt's sentence is the rule. The reference checkers
deviate from it: they count punctuation as words (counting_composition, count_unique, keyword_specific_position,
start_end), compare a first word with its comma attached (first_word_*), read the end of a span as excluded though the
prompt says included, find a forbidden word only between two spaces (exclude_word_harder), and let a lone letter be a
palindrome and a lone word satisfy rules on pairs and on several sentences. None of that is kept.
"""

from __future__ import annotations

import re
from itertools import pairwise

from m2rl.domains.constraints import COUNT, LETTER, POSITION, RELATION, TEXT, WORD, constraint, holds, integer
from m2rl.domains.constraints_ifeval import (
    forbidden_words,
    frequency,
    letter_frequency,
    occurrences,
    parts,
    starred_paragraphs,
)
from m2rl.domains.english_text import bare, sentences

# --- copies ---------------------------------------------------------------------------------------------------------


@constraint("copy:copy", "copy:copying_simple", prompt_to_repeat=TEXT)
def copy(response: str, prompt_to_repeat: str) -> bool:
    """The response is the request and nothing else, in any case."""
    return response.strip().lower() == prompt_to_repeat.strip().lower()


@constraint("copy:copying_multiple", prompt_to_repeat=TEXT, N=POSITION)
def copying_multiple(response: str, prompt_to_repeat: str, N: int) -> bool:
    """The response is the request N times, ****** between the copies."""
    copies = response.split("******")
    return len(copies) == N and all(copy(one, prompt_to_repeat) for one in copies)


def _span_exists(prompt_to_repeat: str, n_start: int, n_end: int) -> str | None:
    if not prompt_to_repeat[n_start : n_end + 1].strip():
        return f"kwargs 'n_start' {n_start} and 'n_end' {n_end} select nothing of the prompt to repeat"
    return None


@constraint(
    "new:copy_span_idx", "repeat:repeat_span", agree=_span_exists, prompt_to_repeat=TEXT, n_start=COUNT, n_end=COUNT
)
def copy_span(response: str, prompt_to_repeat: str, n_start: int, n_end: int) -> bool:
    """The response is the request's characters n_start to n_end, both included, in any case."""
    return copy(response, prompt_to_repeat[n_start : n_end + 1])


def _phrase_has_a_centre(phrase: str, small_n: int) -> str | None:
    if len(phrase.split()) < 3:
        return f"kwarg 'phrase' must have at least three words, got {phrase!r}"
    return None


@constraint("copy:repeat_phrase", agree=_phrase_has_a_centre, phrase=WORD, small_n=POSITION)
def repeat_phrase(response: str, phrase: str, small_n: int) -> bool:
    """The phrase small_n times, each time with exactly one word inside it replaced."""
    words = phrase.split()
    opening, closing = words[0] + " ", " " + words[-1]
    found = []
    for line in response.split("\n"):
        at = line.find(opening)
        while at >= 0 and (end := line.find(closing, at + len(opening))) >= 0:
            found.append(line[at : end + len(closing)].split())
            at = line.find(opening, end + len(closing))
    return len(found) == small_n and all(
        len(said) == len(words) and sum(a != b for a, b in zip(said, words)) == 1 for said in found
    )


# --- keywords -------------------------------------------------------------------------------------------------------

constraint("keywords:word_count_different_numbers", keyword=WORD, frequency=COUNT, relation=RELATION)(frequency)
constraint("letters:letter_counting2", letter=LETTER, let_frequency=COUNT, let_relation=RELATION)(letter_frequency)


@constraint("keywords:word_once", keyword=WORD)
def word_once(response: str, keyword: str) -> bool:
    """The keyword occurs exactly once, in any case."""
    return occurrences(response, keyword) == 1


@constraint("count:count_increment_word", keyword1=WORD, keyword2=WORD)
def count_increment_word(response: str, keyword1: str, keyword2: str) -> bool:
    """The first keyword once, the second twice, in any case."""
    return occurrences(response, keyword1) == 1 and occurrences(response, keyword2) == 2


@constraint("keywords:exclude_word_harder", keyword=WORD, instruction=TEXT.otherwise(None))
def exclude_word_harder(response: str, keyword: str, instruction: str | None) -> bool:
    """The keyword, which is one of the request's own words, does not occur as a whole word, in any case."""
    return forbidden_words(response, (keyword,))


@constraint("keywords:no_adjacent_consecutive")
def no_adjacent_consecutive(response: str) -> bool:
    """No word starts with the letter of the alphabet after its predecessor's first; two words at least."""
    first = [word[0].lower() for word in response.split()]
    return len(first) > 1 and not any(a.isalpha() and b.isalpha() and _follows(a, b) for a, b in pairwise(first))


def _follows(a: str, b: str) -> bool:
    return len(a) == len(b) == 1 and ord(b) - ord(a) == 1


@constraint("keywords:palindrome")
def palindrome(response: str) -> bool:
    """A word of three letters or more that reads the same backwards."""
    words = (bare(word) for word in response.split())
    return any(len(word) > 2 and word.isalpha() and word == word[::-1] for word in words)


@constraint(
    "keywords:keyword_specific_position",
    "words:keywords_specific_position",
    needs="punkt",
    keyword=WORD,
    n=POSITION,
    m=POSITION,
)
def keyword_specific_position(response: str, keyword: str, n: int, m: int) -> bool:
    """The keyword is the m-th word of the n-th sentence, in any case."""
    found = sentences(response)
    if len(found) < n:
        return False
    words = sentence_words(found[n - 1])
    return len(words) >= m and words[m - 1] == bare(keyword)


def sentence_words(sentence: str) -> list[str]:
    """Words in lower case with the punctuation around them taken off; marks that stand alone are no words."""
    return [word for word in map(bare, sentence.split()) if word]


@constraint("keywords:start_end")
def start_end(response: str) -> bool:
    """Two words or more, the last the same as the first, and nothing after it."""
    words = response.split()
    return len(words) > 1 and bare(words[0]) == words[-1].lower() != ""


# --- first and last words -------------------------------------------------------------------------------------------


@constraint("first_word:first_word_answer", first_word=WORD)
def first_word_answer(response: str, first_word: str) -> bool:
    """The response starts with the word, in any case."""
    return bare(response.split(maxsplit=1)[0]) == bare(first_word)


@constraint("last_word:last_word_answer", last_word=WORD)
def last_word_answer(response: str, last_word: str) -> bool:
    """The response ends with the word, punctuation after it allowed, in any case."""
    return bare(response.rsplit(maxsplit=1)[-1]) == bare(last_word)


@constraint("first_word:first_word_sent", needs="punkt", first_word=WORD)
def first_word_sent(response: str, first_word: str) -> bool:
    """Each sentence starts with the word, in any case."""
    return all(first_word_answer(sentence, first_word) for sentence in sentences(response))


@constraint("last_word:last_word_sent", needs="punkt", last_word=WORD)
def last_word_sent(response: str, last_word: str) -> bool:
    """Each sentence ends with the word before its punctuation, in any case."""
    return all(last_word_answer(sentence, last_word) for sentence in sentences(response))


# --- format ---------------------------------------------------------------------------------------------------------


@constraint("detectable_format:sentence_hyphens", needs="punkt")
def sentence_hyphens(response: str) -> bool:
    """Two sentences or more, a hyphen and no space between them, and no other hyphen."""
    pieces = response.strip().split("-")
    return len(pieces) > 1 and tuple(pieces) == sentences(response.strip().replace("-", " "))


@constraint("detectable_format:square_brackets")
def square_brackets(response: str) -> bool:
    """Each word stands in its own square brackets."""
    return all(word.startswith("[") and word.endswith("]") for word in response.split())


@constraint("detectable_format:bigram_wrapping")
def bigram_wrapping(response: str) -> bool:
    """Each pair of words stands in <<double angular brackets>>; a last odd word may stand alone."""
    words = response.split()
    pairs = list(zip(words[::2], words[1::2]))
    return bool(pairs) and all(
        a.startswith("<<") and b.endswith(">>") and not a.endswith(">>") and not b.startswith("<<") for a, b in pairs
    )


@constraint("paragraphs:paragraphs")
def two_starred_paragraphs(response: str) -> bool:
    """Two paragraphs with *** between them."""
    found = starred_paragraphs(response)
    return found is not None and len(found) == 2


@constraint("paragraphs:paragraphs2")
def two_spaced_paragraphs(response: str) -> bool:
    """Two paragraphs with an empty line between them."""
    found = parts(response, "\n\n")
    return found is not None and len(found) == 2


@constraint("punctuation:punctuation_dot")
def no_dot(response: str) -> bool:
    """No period."""
    return "." not in response


@constraint("punctuation:punctuation_exclamation")
def no_exclamation(response: str) -> bool:
    """No exclamation mark."""
    return "!" not in response


# --- counts ---------------------------------------------------------------------------------------------------------

_LOWERCASE_WORD = re.compile(r"\b[a-z]+\b")
_ASCII_LETTER = re.compile(r"[a-zA-Z]")
_DIVIDER = re.compile(r"\* ?\* ?\*")  # the prompt of counting_composition writes the divider with spaces


@constraint("count:lowercase_counting", N=COUNT)
def lowercase_counting(response: str, N: int) -> bool:
    """At most N words in lower case."""
    return len(_LOWERCASE_WORD.findall(response)) <= N


@constraint("letters:letter_counting", N=COUNT, relation=RELATION)
def letter_counting(response: str, N: int, relation: str) -> bool:
    """That many letters in all."""
    return holds(len(_ASCII_LETTER.findall(response)), relation, N)


@constraint("count:counting_composition", needs="punkt", n_sent=integer(1), n_words=integer(1))
def counting_composition(response: str, n_sent: int, n_words: int) -> bool:
    """Three paragraphs with *** between them, n_sent sentences in each, n_words words in each sentence."""
    paragraphs = parts(response, _DIVIDER)
    if paragraphs is None or len(paragraphs) != 3:
        return False
    split = [sentences(paragraph) for paragraph in paragraphs]
    return all(
        len(found) == n_sent and all(len(sentence_words(sentence)) == n_words for sentence in found) for found in split
    )


@constraint("count:count_unique")
def count_unique(response: str) -> bool:
    """No word occurs twice, in any case."""
    words = sentence_words(response)
    return len(words) == len(set(words))
