"""Verifications per second of instruction following, one core: rows of the embedded default, and rows like the blend's.

pytest bench/bench_instruct.py --benchmark-enable
"""

import random

import pytest

from m2rl.domains import instruct, procedural

WORDS = """
the of a time people Dr. river 3.50 we walked. It was late! Why? said and to town, house *bold* [name] P.S.
"""


def blend_rows(n, words, seed=0):
    """Made-up rows of one to three constraints in the blend's form, and a response of about `words` words to each."""
    rng, speak, vocabulary = random.Random(seed), random.Random(seed), WORDS.split()
    at_least = {"relation": "at least"}
    kinds = [
        ("keywords:existence", {"keywords": ["river", "town"]}),
        ("keywords:frequency", {"keyword": "time", "frequency": 3, **at_least}),
        ("keywords:forbidden_words", {"forbidden_words": ["car", "plane"]}),
        ("length_constraints:number_words", {"num_words": 200, **at_least}),
        ("length_constraints:number_sentences", {"num_sentences": 10, **at_least}),
        ("length_constraints:number_paragraphs", {"num_paragraphs": 2}),
        ("detectable_content:number_placeholders", {"num_placeholders": 4}),
        ("detectable_format:number_highlighted_sections", {"num_highlights": 2}),
        ("detectable_format:json_format", None),
        ("change_case:english_lowercase", None),
        ("change_case:capital_word_frequency", {"capital_frequency": 5, "capital_relation": "less than"}),
        ("punctuation:no_comma", None),
        ("first_word:first_word_sent", {"first_word": "river"}),
        ("last_word:last_word_answer", {"last_word": "town"}),
        ("count:lowercase_counting", {"N": 5}),
        ("count:count_unique", None),
        ("keywords:palindrome", None),
        ("letters:letter_counting", {"N": 50, **at_least}),
        ("startend:end_checker", {"end_phrase": "That is all."}),
    ]
    rows = []
    for _ in range(n):
        ids, kwargs = zip(*rng.sample(kinds, rng.randint(1, 3)))
        response = " ".join(speak.choice(vocabulary) for _ in range(words))
        rows.append((response, {"instruction_id_list": list(ids), "kwargs": list(kwargs)}))
    return rows


@pytest.mark.parametrize("mode", instruct.MODES)
@pytest.mark.parametrize("words", [100, 400, 2000])
def test_blend_rows(benchmark, words, mode):
    rows = [(response, {**spec, "mode": mode}) for response, spec in blend_rows(300, words)]
    benchmark.extra_info["verifications"] = len(rows)
    benchmark(lambda: [instruct.verify(response, spec) for response, spec in rows])


def test_embedded_rows(benchmark):
    problems = [procedural.problem("if", seed=0, index=i) for i in range(200)]
    rows = [(text, problem.spec) for problem in problems for text in (problem.good, problem.sloppy)]
    assert all(instruct.verify(problem.good, problem.spec).reward == 1.0 for problem in problems)
    benchmark.extra_info["verifications"] = len(rows)
    benchmark(lambda: [instruct.verify(response, spec) for response, spec in rows])
