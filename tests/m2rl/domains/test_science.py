"""Science: the option a response ends on, by a strict grammar; adversarial prose; the reference's rule beside it."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from m2rl.domains import check_spec, verify

OPTIONS = {"A": "0 km", "B": "1 km", "C": "2 km", "D": "3 km"}


def letter(response, options=OPTIONS, **spec):
    """The option that a response is read as naming, by asking for each; None if unparsed."""
    found = [k for k in options if verify("science", response, {"answer": k, "options": options, **spec}).reward]
    assert len(found) < 2, f"{response!r} scores for {found}"
    return found[0] if found else None


ADVERSARIAL = [  # sentences whose every answer|option|choice tempts a loose rule
    ("We weigh each answer choice carefully. Answer: D", "D"),
    ("The answer is between B and D; final answer: D", "D"),
    ("The correct option depends on pH. Answer: A", "A"),
    ("The answer is a bit tricky. Answer: C", "C"),
    ("The answer depends on pH. Answer: B", "B"),
    ("My answer explains why H is strange.", None),
    ("Each choice is plausible. Option A is a trap. Answer: B", "B"),
    ("The answer: let me think. Answer: C", "C"),
    ("Answer: A. Wait, that is wrong.\nAnswer: B", "B"),
    ("Option C is correct? No. The answer is D.", "D"),
    ("I am sure. A is tempting; the answer is B.", "B"),
    ("I think the answer is B. No wait, the answer is D.", "D"),
    ("The answer is not A.", None),
    ("The answer is A or B.", None),
    ("The answer is a matter of taste.", None),
    ("Choice matters. An option is an option.", None),
    ("D", None),
    ("It must be D", None),
    ("", None),
]


@pytest.mark.parametrize(("response", "expected"), ADVERSARIAL, ids=[r or "empty" for r, _ in ADVERSARIAL])
def test_prose_does_not_decide(response, expected):
    assert letter(response) == expected


FORMS = [
    "\\boxed{%s}",
    "\\boxed{(%s)}",
    "\\boxed{\\text{%s}}",
    "\\boxed{\\text{(%s)}}",
    "\\boxed{\\mathrm{%s}}",
    "$\\boxed{%s}$",
    "Answer: %s",
    "Answer: %s.",
    "Answer: (%s)",
    "Answer: [%s]",
    "Answer:%s",
    "ANSWER: %s",
    "answer: %s",
    "Answer:\n\n%s",
    "Final answer: %s",
    "**Answer:** %s",
    "**Answer: %s**",
    "**Final Answer**: **%s**",
    "Answer: $\\mathbf{%s}$",
    "Answer: option %s",
    "The answer is %s.",
    "The answer is **%s**.",
    "The correct answer is (%s)",
    "So the final answer is: %s",
    'Answer: "%s"',
    "Answer: <%s>",
    "Answer: The correct answer is %s.",
    "Answer: %s because it is the farthest",
    "Answer: %s, since the others are too short.",
    "Therefore the answer is %s, because it is far.",
]


@pytest.mark.parametrize("form", FORMS)
def test_every_form_for_every_option_from_a_to_l(form):
    options = dict.fromkeys("ABCDEFGHIJKL", "")
    for k in options:
        assert letter(form % k, options) == k
        assert letter(f"Options A and B look alike. {form % k}", options) == k
        assert letter(form % k + "\n", list(options)) == k  # options as a list of letters


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("\\boxed{3 km}", "D"),
        ("Answer: 2 km", "C"),
        ("Answer: D) 3 km", "D"),
        ("Answer: D. 3 km", "D"),
        ("Answer: D: 3 km", "D"),
        ("Answer: (D) 3 km", "D"),
        ("Answer: D (3 km)", "D"),
        ("\\boxed{\\text{D) 3 km}}", "D"),
        ("Answer: d", "D"),
        ("Answer: D) about 3 km", "D"),
    ],
)
def test_an_option_may_be_named_by_its_text(response, expected):
    assert letter(response) == expected


HEDGES = (
    """
A or B|A, B|A/B|A and B|A-B|A; B|A B|(A)(B)|A. B|A) B|not A|A (or B)|B) 0 km|A, or perhaps D|any|E
A 1 km|AB|one of A, B, C, D|A: wrong|A - incorrect|A) is not it
""".strip()
    .replace("\n", "|")
    .split("|")
)


def test_boxes_in_a_row_are_a_hedge():
    assert letter("\\boxed{A} or \\boxed{B}") is None
    assert letter("$\\boxed{A}$, $\\boxed{B}$") is None
    assert letter("\\boxed{A}. No: \\boxed{B}") == "B"


@pytest.mark.parametrize("hedge", HEDGES)
@pytest.mark.parametrize("form", ["\\boxed{%s}", "Answer: %s"])
def test_a_hedge_names_no_option(form, hedge):
    assert letter(form % hedge) is None


def test_a_hedge_does_not_fall_back_on_what_was_said_before():
    assert letter("The answer is A.\nAnswer: A or B") is None
    assert letter("Answer: A\n\\boxed{B, C}") is None


def test_a_box_that_is_no_option_gives_way_to_the_answer_line():
    assert letter("the mass is \\boxed{7.4} g\nAnswer: D") == "D"


@pytest.mark.parametrize(
    ("pattern", "response", "expected"),
    [
        (r"Final choice -> ([A-D])", "Final choice -> B", "B"),
        (r"Final choice -> ([A-D])", "Final choice -> A\nFinal choice -> C", "C"),
        (r"final choice -> ([a-d])", "Final choice -> B", "B"),
        (r"Final choice -> (.*)", "Final choice -> 2 km", "C"),
        (r"Final choice -> ([A-D])", "no such line\nAnswer: D", "D"),
        (r"<<[A-D]>>|<<(\w)>>", "<<D>>", "D"),  # without a group, what it matched
    ],
)
def test_the_rows_own_regex_comes_first(pattern, response, expected):
    assert letter(response, output_regex=pattern) == expected


def test_options_as_the_blend_writes_them():
    verdict = verify("science", "Answer: B", {"answer": "B", "options": [{"A": "x"}, {"B": "y"}]})
    assert verdict.reward == 1.0


def test_without_options_the_answer_is_judged_as_in_math():
    assert verify("science", "\\boxed{3600}", {"answer": "3600"}).reward == 1.0
    assert verify("science", "\\boxed{360}", {"answer": "3600"}).status == "wrong"


@pytest.mark.parametrize(
    ("response", "gold", "ours", "reference"),
    [  # the reference's own misreadings, reproduced under its preset and not without
        ("We weigh each answer choice carefully. Answer: D", "D", 1.0, 0.0),
        ("The answer is between B and D; final answer: D", "D", 1.0, 0.0),
        ("The correct option depends on pH. Answer: A", "D", 0.0, 1.0),
        ("The answer is a bit tricky. Answer: C", "A", 0.0, 1.0),
        ("Answer: C", "C", 1.0, 1.0),
    ],
)
def test_the_reference_preset_has_the_reference_defects(response, gold, ours, reference):
    spec = {"answer": gold, "options": OPTIONS}
    assert verify("science", response, spec).reward == ours
    assert verify("science", response, {**spec, "preset": "reference", "think_gate": False}).reward == reference


def test_unparsed_is_not_wrong():
    spec = {"answer": "A", "options": OPTIONS}
    assert verify("science", "I do not know.", spec).status == "unparsed"
    assert verify("science", "Answer: B", spec).status == "wrong"


def test_guessing_every_letter_does_not_pay():
    rng = random.Random(0)
    for _ in range(100):
        said = " ".join(f"Answer: {k}." for k in rng.sample(list(OPTIONS), 4))
        assert letter(said) == said[-2]


@given(st.text(alphabet="ABCDabcd answeriscoptn:.()[]{}\\$*_/,\n", max_size=120))
def test_at_most_one_option_scores_whatever_is_said(text):
    letter(text)
    letter(f"\\boxed{{{text}}}")


@pytest.mark.parametrize(
    "piece", ["answer is A ", "option ", "(", "\\boxed{A}", "Answer: A or", "\\text", "the answer is ", "\n"]
)
def test_a_long_response_is_read_in_linear_time(piece):
    verify("science", piece * 50_000, {"answer": "A", "options": OPTIONS})


@pytest.mark.parametrize(
    ("spec", "rule"),
    [
        ({"answer": "E", "options": OPTIONS}, "not one of the options"),
        ({"answer": "", "options": OPTIONS}, "answer"),
        ({"answer": "A", "options": []}, "options"),
        ({"answer": "A", "options": 3}, "options"),
        ({"answer": "A", "options": OPTIONS, "output_regex": "("}, "output_regex"),
        ({}, "answer"),
    ],
)
def test_a_bad_row_is_a_load_time_error(spec, rule):
    with pytest.raises(ValueError, match=rule):
        check_spec("science", spec)


def test_good_rows():
    check_spec("science", {"answer": "b", "options": OPTIONS, "output_regex": "x"})
    check_spec("science", {"answer": "B", "options": ["A", "B"]})
    check_spec("science", {"answer": "3600"})
