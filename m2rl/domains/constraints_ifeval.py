"""The 25 constraints of IFEval (Zhou et al. 2023, arXiv:2311.07911, section 2; data google/IFEval).

The rules are the benchmark's own, so that scores compare, except where its reference contradicts its prompt or is
random: keywords are literal text and not regular expressions, `letter` may be any character (the data asks for "#"
and "!"), a text whose language cannot be detected is not in the language asked for, and English is told by
`is_english`, not by a random detector.
"""

from __future__ import annotations

import json
import re
from functools import lru_cache

from m2rl.domains.constraints import (
    COUNT,
    LETTER,
    POSITION,
    RELATION,
    TEXT,
    WORD,
    WORDS,
    Kwarg,
    constraint,
    holds,
)
from m2rl.domains.english_text import WORD as WORD_PATTERN
from m2rl.domains.english_text import is_english, sentences, tokens
from m2rl.domains.english_words import word_set


def count_words(response: str) -> int:
    """Runs of letters, digits and underscores: "don't" is two."""
    return len(WORD_PATTERN.findall(response))


# --- keywords -------------------------------------------------------------------------------------------------------


def occurrences(response: str, keyword: str) -> int:
    """Occurrences of the keyword anywhere, inside longer words too, in any case."""
    return response.lower().count(keyword.lower())


@constraint("keywords:existence", keywords=WORDS)
def existence(response: str, keywords: tuple[str, ...]) -> bool:
    """Each keyword occurs, in any case."""
    low = response.lower()
    return all(keyword.lower() in low for keyword in keywords)


@constraint("keywords:frequency", keyword=WORD, frequency=COUNT, relation=RELATION)
def frequency(response: str, keyword: str, frequency: int, relation: str) -> bool:
    """The keyword occurs that often, in any case, inside longer words too."""
    return holds(occurrences(response, keyword), relation, frequency)


@constraint("keywords:forbidden_words", forbidden_words=WORDS)
def forbidden_words(response: str, forbidden_words: tuple[str, ...]) -> bool:
    """None of the words occurs as a whole word, in any case."""
    low = response.lower()
    return not any(
        word.lower() in low and re.search(rf"(?<!\w){re.escape(word)}(?!\w)", response, re.IGNORECASE)
        for word in forbidden_words
    )


@constraint("keywords:letter_frequency", letter=LETTER, let_frequency=COUNT, let_relation=RELATION)
def letter_frequency(response: str, letter: str, let_frequency: int, let_relation: str) -> bool:
    """The letter (any one character) occurs that often, in any case."""
    return holds(response.lower().count(letter), let_relation, let_frequency)


# --- language and length --------------------------------------------------------------------------------------------

LANGUAGES = word_set(
    """
    af ar bg bn ca cs cy da de el en es et fa fi fr gu he hi hr hu id it ja kn ko lt lv mk ml mr ne nl no pa pl pt ro ru
    sk sl so sq sv sw ta te th tl tr uk ur vi zh-cn zh-tw
    """
)
"""ISO 639-1 codes that langdetect's profiles cover."""


def _language(value: object) -> str:
    if value not in LANGUAGES:
        raise ValueError(f"must be a language code langdetect knows ({', '.join(sorted(LANGUAGES))})")
    return str(value)


@lru_cache(maxsize=1)
def _detector_factory():
    import langdetect.detector_factory as factory

    factory.DetectorFactory.seed = 0  # its sampling is random otherwise
    factory.init_factory()
    return factory._factory


@constraint("language:response_language", needs="langdetect", language=Kwarg(_language))
def response_language(response: str, language: str) -> bool:
    """The most probable language of the whole response is the one asked for."""
    from langdetect.lang_detect_exception import LangDetectException

    detector = _detector_factory().create()
    detector.append(response)
    try:
        return detector.detect() == language
    except LangDetectException:  # no letters at all
        return False


@constraint("length_constraints:number_words", num_words=COUNT, relation=RELATION)
def number_words(response: str, num_words: int, relation: str) -> bool:
    """The response has that many words."""
    return holds(count_words(response), relation, num_words)


@constraint("length_constraints:number_sentences", needs="punkt", num_sentences=COUNT, relation=RELATION)
def number_sentences(response: str, num_sentences: int, relation: str) -> bool:
    """The response has that many sentences."""
    return holds(len(sentences(response)), relation, num_sentences)


_THREE_STARS = re.compile(r"\s?\*\*\*\s?")


def parts(text: str, separator: str | re.Pattern[str]) -> list[str] | None:
    """The pieces between separators, a blank one at either end left out; None if a piece inside is blank."""
    pieces = separator.split(text) if isinstance(separator, re.Pattern) else text.split(separator)
    if len(pieces) > 1 and not pieces[-1].strip():
        del pieces[-1]
    if pieces and not pieces[0].strip():
        del pieces[0]
    return pieces if all(piece.strip() for piece in pieces) else None


def starred_paragraphs(response: str) -> list[str] | None:
    """Paragraphs between *** dividers; None if two dividers have nothing between them."""
    return parts(response, _THREE_STARS)


@constraint("length_constraints:number_paragraphs", num_paragraphs=COUNT)
def number_paragraphs(response: str, num_paragraphs: int) -> bool:
    """Exactly that many paragraphs, with *** between them."""
    found = starred_paragraphs(response)
    return found is not None and len(found) == num_paragraphs


def _nth_exists(num_paragraphs: int, nth_paragraph: int, first_word: str) -> str | None:
    if nth_paragraph > num_paragraphs:
        return f"kwarg 'nth_paragraph' must be <= num_paragraphs {num_paragraphs}, got {nth_paragraph}"
    return None


@constraint(
    "length_constraints:nth_paragraph_first_word",
    agree=_nth_exists,
    num_paragraphs=POSITION,
    nth_paragraph=POSITION,
    first_word=WORD,
)
def nth_paragraph_first_word(response: str, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    """Exactly that many paragraphs, an empty line between them, and the nth starts with the word, in any case."""
    pieces = response.split("\n\n")
    if sum(1 for piece in pieces if piece.strip()) != num_paragraphs:
        return False
    words = pieces[nth_paragraph - 1].split(maxsplit=1)  # blank pieces keep their position: the prompt forbids them
    if not words:
        return False
    opening = words[0].lstrip("'").lstrip('"').lower()
    return re.split(r"[.,?!'\"]", opening, maxsplit=1)[0] == first_word.lower()


# --- content and format ---------------------------------------------------------------------------------------------


@constraint("detectable_content:number_placeholders", num_placeholders=COUNT)
def number_placeholders(response: str, num_placeholders: int) -> bool:
    """At least that many [placeholders], each on one line."""
    found = 0
    for line in response.split("\n"):
        at = line.find("[")
        while at >= 0 and (end := line.find("]", at)) >= 0:
            found += 1
            at = line.find("[", end)
    return found >= num_placeholders


@constraint("detectable_content:postscript", postscript_marker=WORD)
def postscript(response: str, postscript_marker: str) -> bool:
    """The postscript marker occurs, in any case; P.S. and P.P.S may have spaces after their periods."""
    low = response.lower()
    if postscript_marker == "P.P.S":
        return bool(re.search(r"p\.\s?p\.\s?s", low))
    if postscript_marker == "P.S.":
        return bool(re.search(r"p\.\s?s\.", low))
    return postscript_marker.lower() in low


@constraint("detectable_format:number_bullet_lists", num_bullets=COUNT)
def number_bullet_lists(response: str, num_bullets: int) -> bool:
    """Exactly that many lines that open with one * or with -."""
    lines = [line.lstrip() for line in response.split("\n")]
    stars = sum(1 for line in lines if line.startswith("*") and line[1:2] not in ("*", ""))
    return stars + sum(1 for line in lines if line.startswith("-")) == num_bullets


@constraint("detectable_format:constrained_response")
def constrained_response(response: str) -> bool:
    """One of the three set answers occurs."""
    return any(f"My answer is {answer}." in response for answer in ("yes", "no", "maybe"))


@constraint("detectable_format:number_highlighted_sections", num_highlights=COUNT)
def number_highlighted_sections(response: str, num_highlights: int) -> bool:
    """At least that many *highlighted* or **highlighted** pieces, each on one line and not blank."""
    single = [piece for piece in re.findall(r"\*[^\n*]*\*", response) if piece.strip("*").strip()]
    double = [piece for piece in re.findall(r"\*\*[^\n*]*\*\*", response) if piece[2:-2].strip()]
    return len(single) + len(double) >= num_highlights


@constraint("detectable_format:multiple_sections", section_spliter=WORD, num_sections=COUNT)
def multiple_sections(response: str, section_spliter: str, num_sections: int) -> bool:
    """At least that many section marks: the splitter and a number."""
    return len(re.findall(re.escape(section_spliter) + r"\s?\d", response)) >= num_sections


@constraint("detectable_format:json_format")
def json_format(response: str) -> bool:
    """The whole response is JSON, a ``` fence around it allowed."""
    text = response.strip()
    for fence in ("```json", "```Json", "```JSON", "```"):
        text = text.removeprefix(fence)
    try:
        json.loads(text.removesuffix("```").strip())
    except (ValueError, RecursionError):  # RecursionError: brackets nested some thousand deep
        return False
    return True


@constraint("detectable_format:title")
def title(response: str) -> bool:
    """A <<title>> on one line, not blank."""
    for line in response.split("\n"):
        start, end = line.find("<<"), line.rfind(">>")
        if 0 <= start < end - 2 and line[start:end].lstrip("<").rstrip(">").strip():
            return True
    return False


# --- combinations, start and end, case, punctuation -----------------------------------------------------------------


@constraint("combination:two_responses")
def two_responses(response: str) -> bool:
    """Two different answers with ****** between them."""
    found = parts(response, "******")
    return found is not None and len(found) == 2 and found[0].strip() != found[1].strip()


@constraint("combination:repeat_prompt", prompt_to_repeat=TEXT)
def repeat_prompt(response: str, prompt_to_repeat: str) -> bool:
    """The response starts with the prompt, in any case."""
    return response.strip().lower().startswith(prompt_to_repeat.strip().lower())


@constraint("startend:end_checker", end_phrase=WORD)
def end_checker(response: str, end_phrase: str) -> bool:
    """The response ends with the phrase, in any case; double quotes around the response are ignored."""
    return response.strip().strip('"').lower().endswith(end_phrase.lower())


@constraint("startend:quotation")
def quotation(response: str) -> bool:
    """The whole response stands between double quotes."""
    text = response.strip()
    return len(text) > 1 and text[0] == text[-1] == '"'


@constraint("change_case:english_capital")
def english_capital(response: str) -> bool:
    """English without a lower-case letter."""
    return response.isupper() and is_english(response)


@constraint("change_case:english_lowercase")
def english_lowercase(response: str) -> bool:
    """English without a capital."""
    return response.islower() and is_english(response)


@constraint("change_case:capital_word_frequency", capital_frequency=COUNT, capital_relation=RELATION)
def capital_word_frequency(response: str, capital_frequency: int, capital_relation: str) -> bool:
    """That many tokens without a lower-case letter."""
    return holds(sum(1 for token in tokens(response) if token.isupper()), capital_relation, capital_frequency)


@constraint("punctuation:no_comma")
def no_comma(response: str) -> bool:
    """No comma."""
    return "," not in response
