"""The 25 IFEval constraints: for each, responses that satisfy it and responses that break it in one way each."""

import pytest
from constraint_cases import check, check_every_id_has_two_of_each_kind, rows

from m2rl.domains import instruct

ENGLISH = "the river was quiet and we walked along it until the lights of the town came on one by one"
FRENCH = (
    "la rivière était calme et nous avons marché le long de la rive jusque dans la nuit avec les enfants du village"
)
SPANISH = "el río estaba tranquilo y caminamos por la orilla hasta que las luces del pueblo se encendieron una por una"
LESS, LEAST = "less than", "at least"

# id -> [(kwargs, satisfying, violating)]
CASES = {
    "keywords:existence": [
        ({"keywords": ["Lamp"]}, ["a lamp"], ["a limp"]),
        (
            {"keywords": ["lamp", "oil"]},
            ["A lamp needs oil.", "Lamplight from boiled seeds"],
            ["A lamp.", "oil, la mp"],
        ),
        ({"keywords": ["c++"]}, ["I like C++ most."], ["I like cc most.", "c+"]),
    ],
    "keywords:frequency": [
        (
            {"keyword": "tea", "frequency": 2, "relation": LEAST},
            ["Tea, more tea", "a team of steam"],
            ["tea", "coffee"],
        ),
        ({"keyword": "tea", "frequency": 2, "relation": LESS}, ["tea", "coffee"], ["tea tea", "TEA for the team"]),
    ],
    "keywords:forbidden_words": [
        ({"forbidden_words": ["cat", "dog"]}, ["concatenate", "doghouses"], ["the cat", "A Dog."]),
        ({"forbidden_words": ["c++"]}, ["c is fine", "c+"], ["Use C++ here", "(c++)"]),
    ],
    "keywords:letter_frequency": [
        ({"letter": "E", "let_frequency": 3, "let_relation": LEAST}, ["EeL eel", "tree trees"], ["eel", "no such"]),
        ({"letter": "#", "let_frequency": 2, "let_relation": LEAST}, ["#a #b", "##"], ["#a", "hash"]),
        ({"letter": "q", "let_frequency": 1, "let_relation": LESS}, ["none here"], ["Quit", "aqua"]),
    ],
    "language:response_language": [
        ({"language": "en"}, [ENGLISH, ENGLISH.upper()], [FRENCH, "12345"]),
        ({"language": "fr"}, [FRENCH], [ENGLISH, SPANISH]),
        ({"language": "es"}, [SPANISH], [FRENCH, "?!"]),
        ({"language": "ru"}, ["Река была тихой, и мы долго шли по берегу."], [ENGLISH]),
    ],
    "length_constraints:number_sentences": [
        (
            {"num_sentences": 2, "relation": LEAST},
            ["One. Two.", "Is it? Yes. Good."],
            ["One.", "Dr. Hill paid 3.50 here"],
        ),
        ({"num_sentences": 2, "relation": LESS}, ["Only one.", "Mr. Hill came"], ["One. Two.", "A? Yes! No."]),
    ],
    "length_constraints:number_paragraphs": [
        ({"num_paragraphs": 2}, ["one\n***\ntwo", "one *** two ***"], ["one", "a\n***\nb\n***\nc", "a\n***\n***\nb"]),
        ({"num_paragraphs": 1}, ["one", "***\none"], ["a\n***\nb", "***"]),
    ],
    "length_constraints:number_words": [
        ({"num_words": 3, "relation": LEAST}, ["one two three", "don't go"], ["one two", "one-two"]),
        ({"num_words": 3, "relation": LESS}, ["one two", "a  b !"], ["one two three", "a b c d"]),
        ({"num_words": 3, "relation": "exactly"}, ["one two three"], ["one two", "a b c d"]),
    ],
    "length_constraints:nth_paragraph_first_word": [
        (
            {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "Then"},
            ["First this.\n\nThen that.", 'First this.\n\n"then, that."'],
            [
                "Then this.\n\nNow that.",
                "A\n\nThen b\n\nc",
                "A.\nThen b.",
                "A\n\nThenceforth b",
                "A\n\n \n\nThen b",
                "\n\nA\n\nThen b",
            ],
        ),
    ],
    "detectable_content:number_placeholders": [
        ({"num_placeholders": 2}, ["[name] of [town]", "[a][b][c]"], ["[name]", "[na\nme] [x]", "name town", "[[x]"]),
    ],
    "detectable_content:postscript": [
        ({"postscript_marker": "P.S."}, ["Bye.\nP.S. Call me", "p. s. call"], ["Bye. PS call me", "P.S call", "Bye"]),
        ({"postscript_marker": "P.P.S"}, ["Bye.\nP.P.S call", "p. p. s. call"], ["P.S. call me", "PPS"]),
        ({"postscript_marker": "N.B."}, ["Bye.\nn.b. this"], ["nxbx", "P.S."]),
    ],
    "detectable_format:number_bullet_lists": [
        ({"num_bullets": 2}, ["* one\n* two", "List:\n - one\n - two", "* a\n- b"], ["* one", "* a\n* b\n* c"]),
        ({"num_bullets": 1}, ["**bold**\n* one", "- a"], ["**bold**\n** two", "one - two", "-\n-"]),
    ],
    "detectable_format:constrained_response": [
        ({}, ["My answer is yes.", "Well. My answer is maybe."], ["My answer is yes", "my answer is no.", "Yes."]),
    ],
    "detectable_format:number_highlighted_sections": [
        ({"num_highlights": 2}, ["*one* and *two*", "**one** and *two*"], ["*one*", "** **", "*one\ntwo* x", "a * b"]),
        ({"num_highlights": 1}, ["**one**", "see *this*"], ["****", "* point", "* *"]),
    ],
    "detectable_format:multiple_sections": [
        (
            {"section_spliter": "Section", "num_sections": 2},
            ["Section 1\na\nSection 2\nb", "Section1 Section2 Section3"],
            ["Section 1\na", "SECTION 1 SECTION 2", "Section A Section B"],
        ),
    ],
    "detectable_format:json_format": [
        (
            {},
            ['{"a": [1, 2]}', '```json\n{"a": null}\n```', "```\n[]\n```"],
            ["{'a': 1}", 'Here: {"a": 1}', "[" * 9999],
        ),
    ],
    "detectable_format:title": [
        ({}, ["<<A song>>\nla", "say <<<x>>>"], ["<A song>", "<< >>", "<<a\nb>>", "<<>>", "<<a>"]),
    ],
    "combination:two_responses": [
        (
            {},
            ["one ****** two", "******\none\n******\ntwo\n******"],
            ["one", "one ****** one", "a ****** b ****** c", "a *** b"],
        ),
    ],
    "combination:repeat_prompt": [
        ({"prompt_to_repeat": " Name a bird.\n"}, ["Name a bird. A wren."], ["Name birds"]),
        (
            {"prompt_to_repeat": "Name a bird."},
            ["Name a bird. A wren.", "  name A bird.\nwren"],
            ["A wren.", "Name a fish."],
        ),
    ],
    "startend:end_checker": [
        ({"end_phrase": "that is all."}, ["So. That is ALL.", '"that is all." '], ["That is all", "that is all. Bye"]),
    ],
    "startend:quotation": [
        ({}, ['"A wren."', ' "a" and "b" '], ["A wren.", '"A wren.', '"', "'A wren.'"]),
    ],
    "change_case:english_capital": [
        ({}, [ENGLISH.upper(), "TWO WORDS! 3"], ["Two WORDS", FRENCH.upper(), "123", "ДВА СЛОВА"]),
    ],
    "change_case:english_lowercase": [
        ({}, [ENGLISH, "two words! 3"], ["Two words", SPANISH, "123", "два слова"]),
    ],
    "change_case:capital_word_frequency": [
        (
            {"capital_frequency": 2, "capital_relation": LEAST},
            ["I saw NASA", "OK, GO.", "A-B WOW"],
            ["I saw", "Nasa Went Up", "iPHONE"],
        ),
        ({"capital_frequency": 1, "capital_relation": LESS}, ["no Capital words"], ["I do", "OK"]),
    ],
    "punctuation:no_comma": [({}, ["one; two", "one. two"], ["one, two", "1,000"])],
}


@pytest.mark.parametrize(("id", "kwargs", "response", "good"), rows(CASES))
def test_a_case(id, kwargs, response, good):
    check(id, kwargs, response, good)


def test_every_id_has_two_cases_of_each_kind():
    check_every_id_has_two_of_each_kind(CASES, 25)


def test_language_detection_is_repeatable():
    spec = {"constraints": [{"id": "language:response_language", "kwargs": {"language": "en"}}]}
    mixed = "la table est red et the chair est blue mais big and petite"
    assert len({instruct.verify(mixed, spec).reward for _ in range(20)}) == 1


@pytest.mark.parametrize(
    "text",
    [
        "der hund lief schnell durch den wald und sah die alte katze nicht",
        "o cachorro correu pela floresta e viu a gata velha que dormia na sombra",
        "ang aso ay tumakbo nang mabilis sa gubat at hindi nakita ang matandang pusa",
        "köpek ormanda hızla koştu ve uyuyan yaşlı kediyi bir türlü görmedi",
        "lorem ipsum dolor sit amet consectetur adipiscing elit sed eiusmod tempor " * 4,
        "собака быстро бежала по лесу",
    ],
)
def test_lower_case_in_another_language_is_not_english(text):
    assert instruct.verify(text, {"constraints": [{"id": "change_case:english_lowercase"}]}).status == "wrong"


def test_a_few_words_are_english_whatever_they_are():
    spec = {"constraints": [{"id": "change_case:english_lowercase"}]}
    assert instruct.verify("el gato que duerme en casa", spec).status == "ok"
    assert instruct.verify("el gato que duerme en la casa", spec).status == "wrong"
