"""The 29 constraints of open-instruct: for each, responses that satisfy it and that break it in one way each."""

import pytest
from constraint_cases import check, check_every_id_has_two_of_each_kind, rows

from m2rl.domains import instruct

ASK = "Name a bird that sings."
TWO_EACH = "Red owls sing. Old oaks bend.\n***\nWe walk home. You stay here.\n* * *\nRain fell hard. All was still."

# id -> [(kwargs, satisfying, violating)]
CASES = {
    "copy:copy": [
        ({"prompt_to_repeat": f" {ASK}\n"}, [ASK], ["A wren."]),
        ({"prompt_to_repeat": ASK}, [ASK, f" {ASK.upper()}\n"], [f"{ASK} A wren.", "Name a bird"]),
    ],
    "copy:copying_simple": [({"prompt_to_repeat": ASK}, [ASK, ASK.lower()], ["A wren.", f"Sure: {ASK}"])],
    "copy:copying_multiple": [
        (
            {"prompt_to_repeat": ASK, "N": 2},
            [f"{ASK}\n******\n{ASK}", f"{ASK}******{ASK.lower()}"],
            [ASK, f"{ASK}\n***\n{ASK}", f"{ASK}******{ASK}******{ASK}", f"{ASK}******A wren."],
        )
    ],
    "new:copy_span_idx": [
        (
            {"prompt_to_repeat": ASK, "n_start": 0, "n_end": 3},
            ["Name", " name "],
            ["Nam", "Name a", "0 to 3"],
        ),
        ({"prompt_to_repeat": ASK, "n_start": 5, "n_end": 10}, ["a bird"], ["a bir", "bird"]),
    ],
    "copy:repeat_phrase": [
        ({"phrase": "old oak bends", "small_n": 1}, ["The old elm bends."], ["The old oak bends."]),
        (
            {"phrase": "The old oak bends low", "small_n": 2},
            [
                "The old elm bends low. The young oak bends low",
                "First: The old oak leans low\nThen: The old oak sways low.",
            ],
            [
                "The old elm bends low.",  # once
                "The old elm bends low. The old oak bends low.",  # one unchanged
                "The old elm bends low. The new elm bends low.",  # two words changed
                "The old elm bends low. The elm bends low.",  # a word missing
                "The old elm bends low. " * 3,
            ],
        ),
    ],
    "keywords:word_count_different_numbers": [
        ({"keyword": "tea", "frequency": 2, "relation": "at least"}, ["Tea and tea", "tea tea tea"], ["tea", "coffee"]),
        ({"keyword": "tea", "frequency": 2, "relation": "less than"}, ["Tea", "no"], ["tea tea", "team of steam"]),
    ],
    "letters:letter_counting2": [
        ({"letter": "o", "let_frequency": 2, "let_relation": "at least"}, ["too", "On or"], ["to", "he"]),
        ({"letter": "o", "let_frequency": 1, "let_relation": "less than"}, ["he"], ["to", "On"]),
    ],
    "keywords:word_once": [
        ({"keyword": " tea "}, ["tea."], ["coffee"]),
        ({"keyword": "tea"}, ["Some Tea.", "a team"], ["coffee", "tea and tea"]),
    ],
    "count:count_increment_word": [
        (
            {"keyword1": "tea", "keyword2": "rum"},
            ["Tea, rum and rum", "rum tea rum"],
            ["tea rum", "tea tea rum rum", "rum rum", "tea rum rum rum"],
        )
    ],
    "keywords:exclude_word_harder": [
        (
            {"keyword": "bird", "instruction": ASK},
            ["A wren sings.", "birds sing"],
            ["The bird sings", "bird", "A Bird.", "a bird, maybe"],
        )
    ],
    "keywords:no_adjacent_consecutive": [
        ({}, ["cats eat apples", "zoo animals", "b a 1 2"], ["a bird", "the Umbrella", "red SUN"])
    ],
    "keywords:palindrome": [
        ({}, ["a Level plain", "my (kayak)"], ["a b c I", "ee oo", "eel", "11", "111", "plain words"])
    ],
    "keywords:keyword_specific_position": [
        (
            {"keyword": "owl", "n": 2, "m": 3},
            ["One. The old owl, now.", "A? Well, see Owl go."],
            ["The old owl.", "One. The owl sat.", "One. The old bird. owl"],
        )
    ],
    "keywords:start_end": [
        ({}, ["Owl by owl", "Peace, we want peace", "owl owl"], ["owl", "Owl by owl.", "Owl by night"])
    ],
    "first_word:first_word_answer": [
        ({"first_word": "owl"}, ["Owl at night", '"owl," he said'], ["An owl", "Owls fly", "night owl"])
    ],
    "last_word:last_word_answer": [
        ({"last_word": "owl"}, ["see the owl", 'the "Owl"!'], ["owl night", "owls", "the night-owl"])
    ],
    "first_word:first_word_sent": [
        ({"first_word": "owls"}, ["Owls fly. Owls sing!", "owls fly"], ["Owls fly. They sing!", "The owls."]),
        ({"first_word": ["owls"]}, ["Owls, then. Owls."], ["Owls. An owl."]),
    ],
    "last_word:last_word_sent": [
        ({"last_word": "owl"}, ["See the owl. Is it an owl?", "owl"], ["See the owl. It flies.", "The owl flies."])
    ],
    "detectable_format:sentence_hyphens": [
        (
            {},
            ["One is red.-Two is blue.\n", "A red one!-A blue one?-All right."],
            ["One. Two.", "One.- Two.", "One-two. Three."],
        )
    ],
    "detectable_format:square_brackets": [
        ({}, ["[one] [two]", "[one]\n[two.]"], ["[one] two", "[one two]", "one", "(one) [two]"])
    ],
    "detectable_format:bigram_wrapping": [
        ({}, ["<<I am>> <<at home>>", "<<I am>> here"], ["I am at home", "<<I am>> at home", "<<I>> <<am>>", "<<I am"])
    ],
    "paragraphs:paragraphs": [({}, ["one\n***\ntwo", "one *** two"], ["one", "one\n\ntwo", "a *** b *** c"])],
    "paragraphs:paragraphs2": [({}, ["one\n\ntwo", "one\nand\n\ntwo\n\n"], ["one\ntwo", "a\n\nb\n\nc", "a\n\n\n\nb"])],
    "punctuation:punctuation_dot": [({}, ["one, two", "Yes!"], ["one. two", "3.5"])],
    "punctuation:punctuation_exclamation": [({}, ["one, two.", "Yes"], ["Yes!", "a != b"])],
    "count:lowercase_counting": [({"N": 2}, ["ONE two Three four", "ALL CAPS"], ["one two three", "I am not a bird"])],
    "letters:letter_counting": [
        ({"N": 4, "relation": "at least"}, ["owls", "a b c d 1"], ["owl", "1234"]),
        ({"N": 4, "relation": "less than"}, ["owl", "1234"], ["owls", "a b c d"]),
    ],
    "count:counting_composition": [
        (
            {"n_sent": 2, "n_words": 3},
            [TWO_EACH, TWO_EACH.replace("* * *", "***").replace("owls", "owls'")],
            [
                TWO_EACH.replace("* * *", ""),  # two paragraphs
                TWO_EACH.replace("Red owls", "Owls"),  # a sentence of two words
                TWO_EACH + " It is late.",  # three sentences
            ],
        )
    ],
    "count:count_unique": [({}, ["Owls sing. Oaks bend.", "one, two, three."], ["the owl and the oak", "No. Oh no!"])],
}


@pytest.mark.parametrize(("id", "kwargs", "response", "good"), rows(CASES))
def test_a_case(id, kwargs, response, good):
    check(id, kwargs, response, good)


def test_every_id_has_two_cases_of_each_kind():
    check_every_id_has_two_of_each_kind(CASES, 29)


@pytest.mark.parametrize(
    ("id", "kwargs", "message"),
    [
        (
            "new:copy_span_idx",
            {"prompt_to_repeat": ASK, "n_start": 9, "n_end": 3},
            "'n_start' 9 and 'n_end' 3 select nothing",
        ),
        ("new:copy_span_idx", {"prompt_to_repeat": ASK, "n_start": 4, "n_end": 4}, "select nothing"),
        ("copy:repeat_phrase", {"phrase": "old oak", "small_n": 2}, "'phrase' must have at least three words"),
        ("copy:copying_multiple", {"prompt_to_repeat": ASK, "N": 0}, "'N' must be an integer >= 1"),
    ],
)
def test_kwargs_that_no_response_can_satisfy_are_refused(id, kwargs, message):
    with pytest.raises(ValueError, match=f"{id}: .*{message}"):
        instruct.check_spec({"constraints": [{"id": id, "kwargs": kwargs}]})
