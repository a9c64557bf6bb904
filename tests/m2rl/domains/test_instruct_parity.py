"""Our IFEval and IFBench verdicts against the reference checkers' own, on 250 generated responses per id.

The references are lm-eval's copy of IFEval (`pip install --no-deps lm-eval`, and nltk, langdetect, absl-py,
immutabledict), allenai/IFBench (its `ifbench` package, and emoji, syllapy) and allenai/open-instruct (its folder
open_instruct/IFEvalG on the path). Skipped where they are not installed; an
environment of their own without torch runs it with `pytest --noconftest -o addopts= --import-mode=importlib`. Both
sides split sentences with the same model and count the same stop words: NLTK's own are downloads.
"""

import importlib.util
import random
import re
import sys
import types
from pathlib import Path

import pytest

from m2rl.domains.constraints import CONSTRAINTS
from m2rl.domains.english_text import sentences
from m2rl.domains.english_words import STOP_WORDS

nltk = pytest.importorskip("nltk")
langdetect = pytest.importorskip("langdetect")
HERE = Path(__file__).parent
RESPONSES_PER_ID = 250


def has_pattern_characters(text, kwargs):
    return any(
        re.escape(word) != word for value in kwargs.values() for word in (value if isinstance(value, list) else [value])
    )


def is_one(units):
    return lambda text, kwargs: len(units(text)) < 2


def lines(text):
    return [line for line in text.split("\n") if line.strip()]


def plain_words(text):
    return re.sub(r"[^\w\s]", "", text).split()


def always(text, kwargs):
    return True


# Where we differ: id -> (why, the responses or kwargs it may happen on). Everything else has to agree.
IFEVAL_DIFFERENCES = {
    "keywords:existence": ("keywords are text to us and patterns to the reference", has_pattern_characters),
    "keywords:forbidden_words": ("keywords are text to us and patterns to the reference", has_pattern_characters),
    "detectable_content:postscript": (
        "the marker is text to us and a pattern to the reference",
        has_pattern_characters,
    ),
    "keywords:letter_frequency": (
        "the reference draws a random letter for # and !",
        lambda t, k: not k["letter"].isalpha(),
    ),
    "detectable_format:number_bullet_lists": ("a bare star", lambda t, k: "*" in map(str.strip, t.split("\n"))),
    "language:response_language": ("no letters: the reference says yes", lambda t, k: not re.search(r"[^\W\d_]", t)),
    "length_constraints:number_words": ("relations of our own", lambda t, k: k["relation"] == "exactly"),
    "change_case:english_capital": (
        "the reference guesses the language of a few words",
        lambda t, k: len(t.split()) < 40,
    ),
    "change_case:english_lowercase": (
        "the reference guesses the language of a few words",
        lambda t, k: len(t.split()) < 40,
    ),
}
IFBENCH_DIFFERENCES = {
    "count:unique_word_count": ("bare punctuation is a word to the reference", always),
    "count:conjunctions": ("the reference counts spellings", lambda t, k: True),
    "count:words_japanese": ("fewer than N words", lambda t, k: len(t.split()) < k["N"]),
    "ratio:sentence_type": ("no question", lambda t, k: not any(s.endswith("?") for s in sentences(t))),
    "ratio:sentence_balance": ("no sentence of any type", lambda t, k: not any(s[-1] in ".?!" for s in sentences(t))),
    "words:alphabet": ("one word", is_one(plain_words)),
    "words:odd_even_syllables": ("one word", is_one(plain_words)),
    "words:no_consecutive": ("one word", is_one(plain_words)),
    "words:last_first": ("one sentence", is_one(sentences)),
    "words:paragraph_last_first": ("one word a line", lambda t, k: all(len(plain_words(x)) < 2 for x in lines(t))),
    "words:start_verb": ("a list of verbs against a tagger", always),
    "words:keywords_specific_position": ("words against tokens", always),
    "words:words_position": ("words against tokens", always),
    "sentence:increment": ("one sentence", is_one(sentences)),
    "sentence:alliteration_increment": ("one sentence", is_one(sentences)),
    "format:options": ("whitespace around a lettered option", lambda t, k: t != t.strip()),
    "format:line_indent": (
        "one line, or a defect of the reference with empty lines",
        lambda t, k: len(lines(t)) < max(2, t.count("\n") + 1),
    ),
    "format:newline": ("lines of spaces", always),
    "format:sub-bullets": ("no bullet", lambda t, k: "*" not in t),
    "format:thesis": ("an empty <em></em>, or nothing after </em>", lambda t, k: "em>" in t or "i>" in t),
    "format:no_bullets_bullets": ("empty lines", lambda t, k: "\n\n" in t or t.endswith("\n")),
    "format:title_case": ('"Don\'t" is title case', lambda t, k: "'t" in t.lower()),
    "repeat:repeat_change": (
        "the first word is not changed",
        lambda t, k: t.split()[0] == k["prompt_to_repeat"].split()[0],
    ),
    "custom:csv_special_character": ("the reference does not look past the special character", always),
    "custom:csv_quotes": ("the reference does not look inside a field", always),
}

# Where the sentence in the prompt is our rule and the reference's code another, see constraints_open.
OPEN_DIFFERENCES = {
    "count:count_unique": ("punctuation is a word to the reference", always),
    "count:counting_composition": ("punctuation is a word to the reference", always),
    "keywords:keyword_specific_position": ("punctuation is a word to the reference", always),
    "keywords:start_end": ("punctuation is a word to the reference", always),
    "first_word:first_word_answer": ("the reference compares a word with its comma", always),
    "first_word:first_word_sent": ("the reference compares a word with its comma", always),
    "last_word:last_word_answer": ("the reference drops marks inside a word", always),
    "last_word:last_word_sent": ("the reference drops marks inside a word", always),
    "new:copy_span_idx": ("the reference leaves out the end of the span", always),
    "keywords:exclude_word_harder": ("the reference looks between two spaces only", always),
    "keywords:palindrome": ("a lone letter is a palindrome to the reference", always),
    "keywords:no_adjacent_consecutive": ("a lone word satisfies the reference", always),
    "detectable_format:bigram_wrapping": ("a lone word satisfies the reference", always),
    "detectable_format:sentence_hyphens": ("a lone sentence satisfies the reference", always),
}


# --- references -----------------------------------------------------------------------------------------------------


class _Punkt:
    tokenize = staticmethod(lambda text: list(sentences(text)))


@pytest.fixture
def offline_nltk(monkeypatch):
    """NLTK with our sentence model and our stop words in place of those it would download."""
    from nltk.tokenize.destructive import NLTKWordTokenizer

    words = NLTKWordTokenizer()
    find = nltk.data.find
    langdetect.DetectorFactory.seed = 0
    monkeypatch.setattr(nltk, "sent_tokenize", _Punkt.tokenize)
    monkeypatch.setattr(nltk, "word_tokenize", lambda text: [w for s in sentences(text) for w in words.tokenize(s)])
    monkeypatch.setattr(nltk, "download", lambda *args, **kwargs: False)
    monkeypatch.setattr(nltk.data, "load", lambda *args, **kwargs: _Punkt)
    stop_words = types.SimpleNamespace(words=lambda language: sorted(STOP_WORDS))
    monkeypatch.setattr(nltk.corpus, "stopwords", stop_words)
    monkeypatch.setattr(nltk.data, "find", lambda name, *args: None if "punkt" in name else find(name, *args))


def lm_eval_checkers():
    """lm-eval's IFEval task without the rest of lm-eval, which needs torch and more."""
    spec = importlib.util.find_spec("lm_eval")
    if spec is None:
        pytest.skip("lm-eval is not installed")
    folder = Path(spec.origin).parent / "tasks" / "ifeval"
    for name in ("lm_eval", "lm_eval.tasks", "lm_eval.tasks.ifeval"):
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__path__ = [str(folder)]
    return importlib.import_module("lm_eval.tasks.ifeval.instructions_registry").INSTRUCTION_DICT


# --- generated responses --------------------------------------------------------------------------------------------

SUBJECTS = [
    "The owl",
    "An old man",
    "My neighbour",
    "She",
    "Dr. Hill",
    "Emma",
    "The U.S. team",
    "A small, grey cat",
    "Trees",
]
VERBS = ["sees", "was", "did not like", "doesn't know", "paid 3.50 for", "can't find", "went to", "said that it's"]
OBJECTS = [
    "the river",
    "some oil",
    "1,000 birds",
    "*bold* ideas",
    '"quoted" words',
    "NASA",
    "the well-known oak",
    "tea (green)",
]
ENDS = [".", ".", ".", "!", "?", "...", '."', "", " 🦉.", ". 🌳"]
OPENINGS = ["", "", "", "Write it down. ", "Sure! ", "* ", "- ", "1. ", "<<Poem>>\n", "**Note:** "]
JOINS = ["\n", "\n\n", "\n***\n", "\n\n* ", "\n- ", "\n******\n", " "]
PIECES = [
    *".,!?;:-*\"'()[]<>#\n\t ae1AB",
    "\n\n",
    "***",
    "******",
    " the ",
    " And ",
    "P.S. ",
    "<<",
    ">>",
    "🦉",
    "n't",
    " 7 ",
    "Section 1\n",
]


def sentence(rng):
    return f"{rng.choice(SUBJECTS)} {rng.choice(VERBS)} {rng.choice(OBJECTS)}{rng.choice(ENDS)}"


def document(rng):
    def paragraph():
        return rng.choice(OPENINGS) + " ".join(sentence(rng) for _ in range(rng.randint(1, 4)))

    text = rng.choice(JOINS).join(paragraph() for _ in range(rng.randint(1, 4)))
    return rng.choice([str.lower, str.upper, str.title, *[str] * 7])(text)


def mutated(text, rng):
    for _ in range(rng.randint(1, 3)):
        at = rng.randint(0, len(text))
        end = min(len(text), at + rng.randint(1, 6))
        kind = rng.randrange(8)
        if kind < 3:
            text = text[:at] + rng.choice(PIECES) + text[at:]
        elif kind < 5:
            text = text[:at] + text[end:]
        elif kind == 5:
            text = f"{text} {sentence(rng)}"
        elif kind == 6:
            text = text + rng.choice(JOINS) + text
        else:
            text = text.swapcase()
    return text


def disagreements(cases, checkers, differences):
    """(id, ours, the reference's, response) of each disagreement not accounted for, and the number compared."""
    found, compared = [], 0
    for id, rows in cases.items():
        rng = random.Random(id)
        for kwargs, good, bad in rows:
            seeds = [*good, *bad]
            extra = RESPONSES_PER_ID // len(rows) - len(seeds)
            drawn = [mutated(rng.choice(seeds), rng) if rng.random() < 0.7 else document(rng) for _ in range(extra)]
            for response in filter(str.strip, seeds + drawn):
                ours = CONSTRAINTS[id].check(response, **CONSTRAINTS[id].bind(kwargs))
                try:
                    checker = checkers[id](id)
                    checker.build_description(**kwargs)
                    theirs = bool(checker.check_following(response))
                except Exception:  # the benchmarks score a crash as not followed
                    theirs = False
                compared += 1
                if ours != theirs and not (id in differences and differences[id][1](response, kwargs)):
                    found.append((id, ours, theirs, response))
    return found, compared


def cases_of(name):
    spec = importlib.util.spec_from_file_location(name, HERE / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.CASES


def test_ifeval_agrees_with_lm_eval(offline_nltk):
    pytest.importorskip("absl")
    found, compared = disagreements(cases_of("test_instruct_ifeval"), lm_eval_checkers(), IFEVAL_DIFFERENCES)
    assert not found, "\n".join(map(repr, found))
    assert compared > 24 * RESPONSES_PER_ID


def test_ifbench_agrees_with_ifbench(offline_nltk):
    ifbench = pytest.importorskip("ifbench.instructions_registry", exc_type=ImportError)
    found, compared = disagreements(cases_of("test_instruct_ifbench"), ifbench.INSTRUCTION_DICT, IFBENCH_DIFFERENCES)
    assert not found, "\n".join(map(repr, found))
    assert compared > 57 * RESPONSES_PER_ID


def test_open_instruct_agrees_with_open_instruct(offline_nltk):
    reference = pytest.importorskip(
        "open_instruct.IFEvalG.instructions_registry", exc_type=ImportError
    ).INSTRUCTION_DICT
    assert reference.keys() <= CONSTRAINTS.keys()
    found, compared = disagreements(cases_of("test_instruct_open"), reference, OPEN_DIFFERENCES)
    assert not found, "\n".join(map(repr, found))
    assert compared > 28 * RESPONSES_PER_ID * 0.99
