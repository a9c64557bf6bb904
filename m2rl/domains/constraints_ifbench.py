"""The 58 constraints of IFBench (Pyatkin et al. 2025, arXiv:2507.02833; data allenai/IFBench_test).

The rules are the benchmark's own, so that scores compare, with one principle on top: what an instruction presupposes
must be there. A rule on sentences "longer than the previous one" needs two sentences, a 2:1 ratio needs a question,
sub-bullets need a bullet; the reference passes the lone word "foo". It is left as well where it counts spellings
("and", "And") as different conjunctions, takes "Don't" for a lapse of title case, an empty <em></em> for a thesis, an
empty line for the end of a list, or an unchanged first word for a changed one. The verb at the start comes from a
list, not from a tagger. On the sample outputs in the benchmark's repository 8 of 334 instructions differ (strict,
2026-11-24).
"""

from __future__ import annotations

import csv
import io
import re
from collections import Counter
from collections.abc import Sequence
from datetime import date
from itertools import pairwise

from m2rl.domains import constraints_open  # noqa: F401  enters repeat:repeat_span and words:keywords_specific_position
from m2rl.domains.constraints import COUNT, PERCENT, POSITION, TEXT, WORD, constraint
from m2rl.domains.constraints_ifeval import count_words, occurrences
from m2rl.domains.english_text import (
    WORD as WORD_PATTERN,
)
from m2rl.domains.english_text import (
    is_emoji,
    sentences,
    syllables,
    to_ascii,
    tokens,
    without_punctuation,
)
from m2rl.domains.english_words import CONJUNCTIONS, PRONOUNS, STOP_WORDS, is_verb_form, word_set

_MARKS = "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~ "


def _plain_words(text: str) -> list[str]:
    """Words in lower case, all ASCII punctuation dropped from the text first."""
    return without_punctuation(text.lower()).split()


def _rising(numbers: Sequence[int], step: int | None = None) -> bool:
    """At least two numbers, each above the one before it (by `step` if given)."""
    pairs = list(pairwise(numbers))
    return bool(pairs) and all(b - a == step if step is not None else b > a for a, b in pairs)


# --- count ----------------------------------------------------------------------------------------------------------


def _range_is_not_empty(min_words: int, max_words: int) -> str | None:
    return None if min_words <= max_words else f"kwarg 'max_words' must be >= min_words {min_words}, got {max_words}"


@constraint("count:word_count_range", agree=_range_is_not_empty, min_words=COUNT, max_words=POSITION)
def word_count_range(response: str, min_words: int, max_words: int) -> bool:
    """Between min_words and max_words words."""
    return min_words <= count_words(response) <= max_words


@constraint("count:unique_word_count", N=COUNT)
def unique_word_count(response: str, N: int) -> bool:
    """At least N different words, in any case."""
    return len({word.strip(_MARKS) for word in response.lower().split()} - {""}) >= N


@constraint("count:conjunctions", small_n=COUNT)
def conjunctions(response: str, small_n: int) -> bool:
    """At least small_n different coordinating conjunctions."""
    return len(CONJUNCTIONS & {word.strip(_MARKS) for word in response.lower().split()}) >= small_n


_NAMES = word_set(
    """
    Abigail Alexander Amelia Andrew Aria Audrey Ava Benjamin Charlotte Chloe Christopher Claire Daniel David Elijah
    Ella Emma Ethan Gabriel Grace Hannah Harper Isabella Jackson Jacob Jonathan Joseph Layla Leo Liam Lily Lucas
    Mason Matthew Mia Nathan Nicholas Noah Nora Olivia Owen Penelope Ryan Samuel Scarlett Sophia Stella Thomas
    Victoria Zoe
    """
)


@constraint("count:person_names", N=COUNT)
def person_names(response: str, N: int) -> bool:
    """At least N different names of the list in the prompt, capitalised as there."""
    return len(_NAMES & set(WORD_PATTERN.findall(response))) >= N


@constraint("count:numbers", N=COUNT)
def numbers(response: str, N: int) -> bool:
    """Exactly N runs of digits; punctuation inside a number does not split it."""
    return len(re.findall(r"\d+", without_punctuation(response))) == N


@constraint("count:punctuation")
def punctuation(response: str) -> bool:
    """Each of . , ! ? ; : and besides them an interrobang (?! or !? or ‽)."""
    for interrobang in ("?!", "!?", "‽"):
        if interrobang in response:
            return set(response.replace(interrobang, "", 1)) >= set(".,!?;:")
    return False


@constraint("count:words_japanese", N=POSITION)
def words_japanese(response: str, N: int) -> bool:
    """Each N-th word has Japanese characters, numbers and bare marks excepted; N words at least."""
    every_nth = [word.strip(_MARKS) for word in response.split()[N - 1 :: N]]
    return bool(every_nth) and all(
        not word or word.isdigit() or re.search("[\u3040-\u30ff\u4e00-\u9fff]", word) for word in every_nth
    )


@constraint("count:pronouns", N=COUNT)
def pronouns(response: str, N: int) -> bool:
    """At least N pronouns, repetitions counted."""
    words = (token.rstrip(".") for token in tokens(response.lower().replace("/", " ")))
    return sum(1 for word in words if word in PRONOUNS) >= N


@constraint("count:keywords_multiple", keyword1=WORD, keyword2=WORD, keyword3=WORD, keyword4=WORD, keyword5=WORD)
def keywords_multiple(response: str, keyword1: str, keyword2: str, keyword3: str, keyword4: str, keyword5: str) -> bool:
    """The keywords occur 1, 2, 3, 5 and 7 times, in any case, inside longer words too."""
    wanted = {1: keyword1, 2: keyword2, 3: keyword3, 5: keyword4, 7: keyword5}
    return all(occurrences(response, keyword) == times for times, keyword in wanted.items())


# --- ratio ----------------------------------------------------------------------------------------------------------


@constraint("ratio:stop_words", percentage=PERCENT)
def stop_words(response: str, percentage: float) -> bool:
    """At most that share of the words are stop words."""
    words = WORD_PATTERN.findall(response.lower())
    return bool(words) and sum(1 for word in words if word in STOP_WORDS) * 100 <= percentage * len(words)


def _sentence_ends(response: str) -> tuple[int, int, int]:
    """How many sentences end in a period, a question mark, an exclamation mark."""
    ends = Counter(sentence[-1] for sentence in sentences(response))
    return ends["."], ends["?"], ends["!"]


@constraint("ratio:sentence_type", needs="punkt")
def sentence_type(response: str) -> bool:
    """Twice as many sentences end in a period as in a question mark; one question at least."""
    declarative, interrogative, _ = _sentence_ends(response)
    return declarative == 2 * interrogative > 0


@constraint("ratio:sentence_balance", needs="punkt")
def sentence_balance(response: str) -> bool:
    """As many sentences end in a period as in a question mark as in an exclamation mark; one of each at least."""
    declarative, interrogative, exclamatory = _sentence_ends(response)
    return declarative == interrogative == exclamatory > 0


@constraint("ratio:sentence_words", needs="punkt")
def sentence_words(response: str) -> bool:
    """Three sentences of the same number of characters (the reference does not look whether their words differ)."""
    found = sentences(response)
    return len(found) == 3 and len({len(sentence) for sentence in found}) == 1


@constraint("ratio:overlap", reference_text=TEXT, percentage=PERCENT)
def overlap(response: str, reference_text: str, percentage: float) -> bool:
    """That share, within 2 points, of the response's distinct character trigrams is in the reference text."""
    own, other = _trigrams(response), _trigrams(reference_text)
    return bool(own) and abs(100 * len(own & other) / len(own) - percentage) <= 2


def _trigrams(text: str) -> set[str]:
    return {text[i : i + 3] for i in range(len(text) - 2)}


# --- words ----------------------------------------------------------------------------------------------------------


@constraint("words:alphabet")
def alphabet(response: str) -> bool:
    """Each word starts with the letter after its predecessor's first, a after z; two words at least."""
    first = [ord(word[0]) - ord("a") for word in _plain_words(response)]
    return len(first) > 1 and 0 <= first[0] < 26 and all(b == (a + 1) % 26 for a, b in pairwise(first))


@constraint("words:vowel")
def vowel(response: str) -> bool:
    """One paragraph that uses at most three of the five vowels."""
    text = response.strip().lower()
    return "\n" not in text and len(set("aeiou") & set(text)) <= 3


_CONSONANTS = re.compile("[bcdfghjklmnpqrstvwxyz]{2}")


@constraint("words:consonants")
def consonants(response: str) -> bool:
    """Two consonants stand together in each word."""
    return all(_CONSONANTS.search(word) for word in response.lower().split())


@constraint("words:palindrome")
def palindromes(response: str) -> bool:
    """At least ten palindromes of five characters or more, repetitions counted."""
    return sum(1 for word in _plain_words(response) if len(word) >= 5 and word == word[::-1]) >= 10


@constraint("words:prime_lengths")
def prime_lengths(response: str) -> bool:
    """The length of each word is a prime number."""
    lengths = {len(word) for word in without_punctuation(response).split()}
    return all(n > 1 and n < 100 and all(n % d for d in (2, 3, 5, 7) if d < n) for n in lengths)


@constraint("words:repeats", small_n=COUNT)
def repeats(response: str, small_n: int) -> bool:
    """No word more than small_n times, in any case."""
    return max(Counter(_plain_words(response)).values(), default=0) <= small_n


@constraint("words:odd_even_syllables", needs="syllapy")
def odd_even_syllables(response: str) -> bool:
    """Odd and even numbers of syllables alternate from word to word; two words at least."""
    parity = [syllables(word) % 2 for word in _plain_words(response)]
    return len(parity) > 1 and all(a != b for a, b in pairwise(parity))


@constraint("words:no_consecutive")
def no_consecutive(response: str) -> bool:
    """No word starts with the letter of its predecessor; two words at least."""
    words = _plain_words(response)
    return len(words) > 1 and all(a[0] != b[0] for a, b in pairwise(words))


@constraint("words:start_verb")
def start_verb(response: str) -> bool:
    """The first word is a form of a verb."""
    word = re.search(r"[^\W\d_]+", response)
    return word is not None and is_verb_form(word.group().lower())


@constraint("words:last_first", needs="punkt")
def last_first(response: str) -> bool:
    """The last word of each sentence is the first of the next, in any case; two sentences at least."""
    found = [(sentence.rstrip(_MARKS).lower(), sentence.lstrip(_MARKS).lower()) for sentence in sentences(response)]
    return len(found) > 1 and all(
        this.split()[-1:] == following.split()[:1] != [] for (this, _), (_, following) in pairwise(found)
    )


@constraint("words:paragraph_last_first")
def paragraph_last_first(response: str) -> bool:
    """Each line ends with the word it starts with, in any case; one line has two words at least."""
    lines = [words for line in response.lower().split("\n") if (words := line.strip().strip(_MARKS).split())]
    return any(len(words) > 1 for words in lines) and all(words[0] == words[-1] for words in lines)


@constraint("words:words_position", keyword=WORD)
def words_position(response: str, keyword: str) -> bool:
    """The second word and the second to last, a final mark not counted, are the keyword, in any case."""
    words = tokens(response.lower())
    if words and words[-1] in _MARKS:
        words = words[:-1]
    return len(words) > 1 and words[1] == words[-2] == keyword.lower()


# --- sentence -------------------------------------------------------------------------------------------------------


@constraint("sentence:keyword", needs="punkt", word=WORD, N=POSITION)
def sentence_keyword(response: str, word: str, N: int) -> bool:
    """The keyword is a whole word of the N-th sentence, in any case."""
    found = sentences(response)
    return len(found) >= N and bool(re.search(rf"\b{re.escape(word)}\b", found[N - 1], re.IGNORECASE))


@constraint("sentence:increment", needs="punkt", small_n=COUNT)
def sentence_increment(response: str, small_n: int) -> bool:
    """Each sentence has small_n words more than the one before it; two sentences at least."""
    return _rising([len(_plain_words(sentence)) for sentence in sentences(response)], small_n)


@constraint("sentence:alliteration_increment", needs="punkt")
def alliteration_increment(response: str) -> bool:
    """Each sentence has more words in alliterative runs than the one before it; two sentences at least."""
    return _rising([_alliterative_words(sentence) for sentence in sentences(response)])


def _alliterative_words(sentence: str) -> int:
    first = [word[0] for run in sentence.lower().split() if (word := run.lstrip(_MARKS))]
    same = [a == b for a, b in pairwise(first)]
    return sum(1 if before else 2 for before, now in zip([False, *same], same) if now)


# --- format ---------------------------------------------------------------------------------------------------------


@constraint("format:parentheses")
def parentheses(response: str) -> bool:
    """Brackets of the three kinds nested five deep, the innermost closed by its own kind."""
    opening = {")": "(", "]": "[", "}": "{"}
    open_brackets: list[str] = []
    for char in response:
        if char in "([{":
            open_brackets.append(char)
        elif char in ")]}":
            if not open_brackets or open_brackets[-1] != opening[char]:
                open_brackets.clear()
            elif len(open_brackets) >= 5:
                return True
            else:
                open_brackets.pop()
    return False


@constraint("format:quotes")
def quotes(response: str) -> bool:
    """Quotes within quotes three deep, double and single alternating; every apostrophe counts as a single quote."""
    open_quotes: list[str] = []
    deepest = 0
    for char in response:
        if char not in "\"'":
            continue
        if open_quotes and open_quotes[-1] == char:
            open_quotes.pop()
            if deepest - len(open_quotes) >= 3:
                return True
        else:
            open_quotes.append(char)
            deepest = max(deepest, len(open_quotes))
    return False


_LETTERED_OPTIONS = re.compile(r"\W*[aA]\W*[bB]\W*[cC]\W*")


@constraint("format:options", options=TEXT)
def options(response: str, options: str) -> bool:
    """The response is one of the options and no more: lettered ones to the letter, others in any case."""
    separator = r"/" if "/" in options else r"\bor\b" if re.search(r"\bor\b", options) else r","
    listed = [option.strip() for option in re.split(separator, options)]
    if _LETTERED_OPTIONS.match(options):
        return response.strip() in listed
    return response.strip().strip(_MARKS).lower() in {option.strip(_MARKS).lower() for option in listed}


@constraint("format:newline")
def newline(response: str) -> bool:
    """Each word on a line of its own."""
    lines = [line for line in without_punctuation(response).split("\n") if line.strip()]
    return bool(lines) and all(len(line.split()) == 1 for line in lines)


@constraint("format:emoji", needs="punkt")
def emoji(response: str) -> bool:
    """An emoji ends each sentence, or comes right after its final mark."""
    found = [without_punctuation(sentence).strip() for sentence in sentences(response)]
    return all(found) and all(
        is_emoji(this[-1]) or is_emoji(this[-2:][0]) or is_emoji(following[:1] or " ")
        for this, following in zip(found, [*found[1:], ""])
    )


@constraint("format:line_indent")
def line_indent(response: str) -> bool:
    """Each line is indented further than the one before it; two lines at least."""
    return _rising([len(line) - len(line.lstrip(" ")) for line in response.split("\n") if line.strip()])


@constraint("format:quote_unquote")
def quote_unquote(response: str) -> bool:
    """Text follows each quoted phrase: no quote next to a quote, none at the end."""
    text = "".join(response.replace("'\"'", "").split())
    return '""' not in text and not text.strip(_MARKS.replace('"', "") + "0123456789").endswith('"')


@constraint("format:list", sep=WORD)
def separator_list(response: str, sep: str) -> bool:
    """The separator that stands for bullet points occurs twice or more."""
    return response.count(sep) >= 2


@constraint("format:thesis")
def thesis(response: str) -> bool:
    """A thesis in HTML italics, not blank, with text after it."""
    opening = re.search("<i>", response) or re.search("<em>", response)
    if not opening:
        return False
    rest = response[opening.end() :]
    closing = re.search("</i>", rest) or re.search("</em>", rest)
    return bool(closing and rest[: closing.start()].strip() and rest[closing.end() :].strip())


@constraint("format:sub-bullets")
def sub_bullets(response: str) -> bool:
    """Bullets denoted by *, each with a - before the next; one bullet at least."""
    bullets = response.split("*")[1:]
    return bool(bullets) and all("-" in bullet for bullet in bullets)


@constraint("format:no_bullets_bullets", needs="punkt")
def sentences_then_bullets(response: str) -> bool:
    """Two sentences or more, then two bullets or more denoted by *, then nothing; empty lines do not count."""
    lines = [line for line in map(str.strip, response.split("\n")) if line]
    bullets = [line.startswith("*") for line in lines]
    text = [line for line, bullet in zip(lines, bullets) if not bullet]
    return bullets == sorted(bullets) and sum(bullets) >= 2 and sum(len(sentences(line)) for line in text) >= 2


@constraint("format:title_case")
def title_case(response: str) -> bool:
    """Each word starts with a capital and is not all capitals after a small first letter; "n't" is part of its word."""
    words = (token for token in tokens(response) if token[0].isalpha() and token.lower() != "n't")
    return not any(word[0].islower() and (len(word) == 1 or word[1:].islower() or word[1:].isupper()) for word in words)


@constraint("format:output_template")
def output_template(response: str) -> bool:
    """The three labels of the template occur."""
    return all(label in response for label in ("My Answer:", "My Conclusion:", "Future Outlook:"))


@constraint("format:no_whitespace")
def no_whitespace(response: str) -> bool:
    """No whitespace."""
    return not any(char.isspace() for char in response)


# --- repeat ---------------------------------------------------------------------------------------------------------


@constraint("repeat:repeat_change", prompt_to_repeat=TEXT)
def repeat_change(response: str, prompt_to_repeat: str) -> bool:
    """The request with its first word changed and nothing else."""
    said, asked = response.split(), prompt_to_repeat.split()
    return said[0] != asked[0] and said[1:] == asked[1:]


@constraint("repeat:repeat_simple")
def repeat_simple(response: str) -> bool:
    """The response is the constraint's own sentence, in any case."""
    return response.strip().lower() == "only output this sentence here, ignore all other requests."


# --- custom: one prompt each ----------------------------------------------------------------------------------------


@constraint("custom:multiples")
def multiples(response: str) -> bool:
    """The numbers in the response are the multiples of 7 from 14 to 49, in order."""
    return re.findall(r"\d+", response) == [str(n) for n in range(14, 50, 7)]


_QUESTION = re.compile(r"Question \d+[.|):;]?")
_OPTION = re.compile(r"[A-Ea-e][.|)]\s*\w")


@constraint("custom:mcq_count_length")
def mcq_count_length(response: str) -> bool:
    """Four questions labelled "Question n", five options each, each question longer than the one before it."""
    if not response.startswith("Question"):
        return False
    lengths = []
    for question in filter(None, map(str.strip, _QUESTION.split(response))):
        lines = [line.strip() for line in question.split("\n")]
        is_option = [bool(_OPTION.match(line)) for line in lines]
        if sum(is_option) != 5:
            return False
        lengths.append(len(" ".join(lines[: is_option.index(True)]).strip()))
    return len(lengths) == 4 and _rising(lengths)


@constraint("custom:reverse_newline")
def reverse_newline(response: str) -> bool:
    """From a line with Zimbabwe on, 52 lines or more in reverse alphabetical order, accents ignored."""
    lines = [to_ascii(text) for line in response.split("\n") if (text := line.strip(_MARKS))]
    start = next((i for i, line in enumerate(lines) if "Zimbabwe" in line), len(lines))
    listed = lines[start:]
    return len(listed) >= 52 and listed == sorted(listed, reverse=True)


@constraint("custom:word_reverse")
def word_reverse(response: str) -> bool:
    """The words of the response read backwards name the bald eagle."""
    return "bald eagle" in " ".join(reversed(_plain_words(response)))


@constraint("custom:character_reverse")
def character_reverse(response: str) -> bool:
    """The letters of the response read backwards name the bald eagle."""
    return "bald eagle" in response.lower()[::-1]


@constraint("custom:sentence_alphabet", needs="punkt")
def sentence_alphabet(response: str) -> bool:
    """26 sentences that start with a to z."""
    return "".join(sentence[0].lower() for sentence in sentences(response)) == "abcdefghijklmnopqrstuvwxyz"


# The benchmark's list: capitals north of 45 degrees, from the north.
_CAPITALS = """
Reykjavik Helsinki Oslo Tallinn Stockholm Riga Moscow Copenhagen Vilnius Minsk Dublin Berlin Amsterdam Warsaw London
Brussels Prague Luxembourg Paris Vienna Bratislava Budapest Vaduz Chisinau Bern Ljubljana Zagreb
"""


@constraint("custom:european_capitals_sort")
def european_capitals_sort(response: str) -> bool:
    """The capitals of the benchmark's list in its order, commas between them, accents ignored."""
    return [name for part in to_ascii(response).split(",") if (name := part.strip())] == _CAPITALS.split()


@constraint("custom:csv_city")
def csv_city(response: str) -> bool:
    """CSV: the header asked for and seven rows of five fields."""
    try:
        rows = list(csv.reader(io.StringIO(response)))
    except csv.Error:  # a field over csv's limit, a NUL
        return False
    return (
        len(rows) == 8 and rows[0] == ["ID", "Country", "City", "Year", "Count"] and all(len(row) == 5 for row in rows)
    )


@constraint("custom:csv_special_character")
def csv_special_character(response: str) -> bool:
    """CSV: the header asked for, 14 rows of five fields, a special character in a field between double quotes."""
    rows = _quoted_csv(response, ",")
    return (
        len(rows) == 15
        and _unquoted(rows[0]) == ["ProductID", "Category", "Brand", "Price", "Stock"]
        and all(len(row) == 5 for row in rows)
        and any(_is_quoted(field) and re.search(r"[^\w\s]", field[1:-1]) for row in rows[1:] for field in row)
    )


@constraint("custom:csv_quotes")
def csv_quotes(response: str) -> bool:
    """Tab-separated values: the header asked for and three rows of five fields, each between double quotes."""
    rows = _quoted_csv(response, "\t")
    return (
        len(rows) == 4
        and _unquoted(rows[0]) == ["StudentID", "Subject", "Grade", "Semester", "Score"]
        and all(len(row) == 5 and all(map(_is_quoted, row)) for row in rows)
    )


def _quoted_csv(text: str, delimiter: str) -> list[list[str]]:
    """Fields of each line with the quotes around them kept; what stands between quotes separates nothing."""
    rows, field, row, quoted = [], "", list[str](), False
    for piece in re.split(f'(["\n{delimiter}])', text.strip("\n") + "\n"):
        if piece == '"':
            quoted = not quoted
        if not quoted and piece in ("\n", delimiter):
            row.append(field.strip())
            field = ""
            if piece == "\n":
                rows.append(row)
                row = []
        else:
            field += piece
    return rows


def _is_quoted(field: str) -> bool:
    return len(field) > 1 and field[0] == field[-1] == '"'


def _unquoted(fields: list[str]) -> list[str]:
    return [field[1:-1] if _is_quoted(field) else field for field in fields]


@constraint("custom:date_format_list")
def date_format_list(response: str) -> bool:
    """Dates YYYY-MM-DD of Napoleon's lifetime (1769 to 1821) with commas between them, and nothing else."""
    return all(_is_napoleonic(part.strip()) for part in response.split(","))


def _is_napoleonic(text: str) -> bool:
    if not re.fullmatch(r"[0-9]{4}-[0-9]{2}-[0-9]{2}", text):
        return False
    try:
        return 1769 <= date.fromisoformat(text).year <= 1821
    except ValueError:  # no such day
        return False
