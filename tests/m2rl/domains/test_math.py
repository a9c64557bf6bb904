"""Math: which answer is read, which answers are equal, and that nothing can hang or crash the reading."""

import random
import re
import threading
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from m2rl.domains import answers, check_spec, math, verify


def status(response, answer, **options):
    return verify("math", response, {"answer": answer, **options}).status


# ---- which answer is read -----------------------------------------------------------------------------------------

READ = [  # (response, what is read)
    ("\\boxed{7}", "7"),
    ("so \\boxed{1} or rather \\boxed{2}", "2"),
    ("\\boxed{\\frac{1}{2}}", "\\frac{1}{2}"),
    ("\\boxed {3}", "3"),
    ("\\fbox{4}", "4"),
    ("\\boxed{\\{1, 2\\}}", "\\{1, 2\\}"),
    ("first \\boxed{5}, then \\boxed{6", "5"),  # the second never ends
    ("Answer: 42", "42"),
    ("Answer: 1\nno,\nAnswer: 2", "2"),
    ("**Answer:** 42", "42"),
    ("**Final Answer**: 42", "42"),
    ("The final answer is: 42", "42"),
    ("Therefore the answer is: 42", "42"),
    ("Answer:\n\n42", "42"),
    ("answer: 42", "42"),
    ("Answer: 41\n\\boxed{42}", "42"),
    ("\\boxed{42}\nAnswer: 41", "42"),  # a box comes before any line
    ("Answer:\n$$\n42\n$$\nDone.", "42"),
    ("Answer:\n\\[\n42\n\\]", "42"),
    ("Answer: `42`", "42"),
    ("42", None),
    ("", None),
    ("Answer:", None),
    ("the answers: 3", None),
    ("\\boxed", None),
    ("\\boxed{", None),
]


@pytest.mark.parametrize(("response", "read"), READ, ids=[r for r, _ in READ])
def test_the_answer_that_is_read(response, read):
    assert answers.final_answer(response) == read


@pytest.mark.parametrize(
    ("response", "answer", "right"),
    [
        ("\\boxed{1} and \\boxed{2}", "1,2", True),
        ("$\\boxed{2}$, $\\boxed{1}$", "1,2", True),
        ("\\boxed{1}, \\boxed{2}, and \\boxed{3}", "1,2,3", True),
        ("\\boxed{1}, \\boxed{2}", "2", False),  # several at once are no way to hedge
        ("\\boxed{1}. No: \\boxed{2}", "2", True),
        ("\\boxed{1}\n\\boxed{2}", "2", True),
        ("\\boxed{1} or \\boxed{2}", "1", False),
    ],
)
def test_boxes_in_a_row_are_one_answer(response, answer, right):
    assert (status(response, answer) == "ok") is right


@pytest.mark.parametrize("response", ["", "no", "42", "\\boxed{}", "Answer:   ", "\\boxed{ }"])
def test_no_answer_is_unparsed_not_wrong(response):
    assert status(response, "42") == "unparsed"


# ---- which are equal ----------------------------------------------------------------------------------------------

EQUAL = [  # (expected, given)
    ("42", "42"),
    ("42", " 42 "),
    ("42", "42."),
    ("42", "+42"),
    ("42", "42.0"),
    ("25", "025"),
    ("1000", "1,000"),
    ("1000", "1{,}000"),
    ("1000", "1\\,000"),
    ("1000", "1000.00"),
    ("-3", "- 3"),
    ("0.5", ".5"),
    ("0.5", "1/2"),
    ("1/2", "\\frac{1}{2}"),
    ("\\frac{3}{4}", "\\dfrac{6}{8}"),
    ("-\\frac{1}{2}", "-0.5"),
    ("42", "$42$"),
    ("42", "\\(42\\)"),
    ("50\\%", "50"),
    ("50\\%", "0.5"),
    ("5", "5\\text{ cm}"),
    ("5", "\\$5"),
    ("90^\\circ", "90"),
    ("\\{1,2,3\\}", "\\{3, 2, 1\\}"),
    ("3,5", "5,3"),
    ("(1, 2, 3)", "(1.0, \\frac{4}{2}, 3)"),
    ("[0,1)", "\\left[0, 1\\right)"),
    ("(0.333333, 1)", "(1/3, 1)"),
    ("(1,2)", "(1, 2)"),
    ("[0,1)", "[0, 1)"),
    ("(-\\infty,2]\\cup[3,\\infty)", "[3,\\infty)\\cup(-\\infty,2]"),
    ("2\\sqrt{3}", "\\sqrt{12}"),
    ("x^2+2x+1", "(x+1)^2"),
    ("x^3+3x^2+3x+1", "(x+1)^3"),
    ("(x+1)^3", "x^3+3x^2+3x+1"),
    ("x=5", "5"),
    ("5", "x=5"),
    ("1024", "2^{10}"),
    ("1/3", "0.333333"),
    ("\\text{Yes}", "Yes"),
    ("\\pi", "\\pi"),
    ("1200", "1.2\\times 10^3"),
    ("\\begin{pmatrix}1&2\\\\3&4\\end{pmatrix}", "\\begin{pmatrix} 1 & 2 \\\\ 3 & 4 \\end{pmatrix}"),
]
DIFFERENT = [
    ("42", "43"),
    ("42", "-42"),
    ("42", "4 2 1"),
    ("42", "420"),
    ("42", "42.1"),
    ("1/2", "1/3"),
    ("1000", "100"),
    ("1000000007", "1000000008"),
    ("[0,1)", "(0,1)"),
    ("(1,2)", "(2,1)"),
    ("\\{1,2\\}", "\\{1,2,3\\}"),
    ("3,5", "3"),
    ("(1, 2)", "[1, 2]"),
    ("(1, 2)", "(1, 2, 3)"),
    ("(1, 2)", "(1, 3)"),
    ("2", "1 or 2"),
    ("1", "1,2"),
    ("\\sqrt{2}", "1.4"),
    ("\\pi", "3.14"),
    ("x^2+1", "x^2-1"),
    ("x+y", "x-y"),
    ("5", "5!"),
    ("0", "\\emptyset"),
    ("72", "the value is 72 or 73"),
    ("\\text{Yes}", "\\text{No}"),
]


@pytest.mark.parametrize(("want", "given_"), EQUAL, ids=[f"{a} is {b}" for a, b in EQUAL])
def test_equal(want, given_):
    verdict = verify("math", f"so \\boxed{{{given_}}}", {"answer": want})
    assert (verdict.reward, verdict.status) == (1.0, "ok"), verdict


@pytest.mark.parametrize(("want", "given_"), DIFFERENT, ids=[f"{a} is not {b}" for a, b in DIFFERENT])
def test_different(want, given_):
    verdict = verify("math", f"so \\boxed{{{given_}}}", {"answer": want})
    assert verdict.reward == 0.0 and verdict.status in ("wrong", "unparsed"), verdict


PAIRS = [
    (line, *re.split("  (==|!=)  ", line))
    for line in Path(__file__).with_name("math_pairs.txt").read_text("utf-8").splitlines()
    if not line.startswith("#")
]


@pytest.mark.parametrize(("want", "relation", "given_"), [p[1:] for p in PAIRS], ids=[p[0] for p in PAIRS])
def test_golden_pairs(want, relation, given_):
    for form in ("so \\boxed{%s}.", "So it is.\n**Answer:** %s"):
        assert verify("math", form % given_, {"answer": want}).reward == (relation == "=="), form


@pytest.mark.parametrize("form", ["\\boxed{{{}}}", "Answer: {}", "**Answer:** ${}$.", "The final answer is: {}"])
def test_right_and_wrong_numbers_in_every_form(form):
    rng = random.Random(form)
    for _ in range(50):
        n, off = rng.randint(-(10**6), 10**6), rng.choice([-10, -1, 1, 2, 1000])
        assert status(form.format(n), str(n)) == "ok"
        assert status(form.format(n + off), str(n)) == "wrong"


@given(st.fractions(max_denominator=500), st.fractions(max_denominator=500))
def test_plain_numbers_are_compared_exactly(a, b):
    for text in (f"{a.numerator}/{a.denominator}", f"\\frac{{{a.numerator}}}{{{a.denominator}}}"):
        assert math.number(text.replace("frac{-", "frac{-")) in (a, None if a < 0 and "frac" in text else a)
    both = math.compare(f"{a.numerator}/{a.denominator}", f"{b.numerator}/{b.denominator}")
    if a == b:
        assert both.status == "ok"
    elif abs(a - b) > Fraction(1, 1000):
        assert both.status == "wrong"


def test_agrees_with_math_verify_on_generated_answers():
    from math_verify import parse
    from math_verify import verify as theirs

    rng = random.Random(0)

    def answer():
        a, b = rng.randint(1, 12), rng.randint(1, 12)
        return rng.choice(
            [
                f"{a}",
                f"-{a}",
                f"{a}/{b}",
                f"\\frac{{{a}}}{{{b}}}",
                f"{a}.5",
                f"{a}\\sqrt{{{b}}}",
                f"{a}\\pi",
                f"({a}, {b})",
                f"[{a}, {a + b}]",
                f"\\{{{a}, {b}\\}}",
                f"x^2+{a}",
                f"{a}x+{b}",
                f"{a}\\%",
            ]
        )

    for _ in range(120):
        want = answer()
        mine = want if rng.random() < 0.3 else answer()
        expected = theirs(parse(f"\\boxed{{{want}}}"), parse(f"\\boxed{{{mine}}}"))
        assert (status(f"\\boxed{{{mine}}}", want) == "ok") == expected, (want, mine)


# ---- what the paper's reference code does -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("response", "ours", "reference"),
    [
        ("Answer: 42", "ok", "unparsed"),
        ("\\boxed{42}\nAnswer: 42", "ok", "unparsed"),
        ("Answer: \\boxed{42}", "ok", "ok"),
        ("\\boxed{42}", "ok", "ok"),
        ("Answer: \\boxed{41}", "wrong", "wrong"),
    ],
)
def test_the_reference_preset_has_the_reference_defects(response, ours, reference):
    assert status(response, "42") == ours
    assert status(response, "42", preset="reference", think_gate=False) == reference


# ---- nothing hangs ------------------------------------------------------------------------------------------------

HOSTILE = [
    "9^{9^{9^9}}",
    "10^{10^{10}}!",
    "9^9^9",
    "99999!",
    "2^{99999999}",
    "\\sum_{k=1}^{10^9}k^k",
    "\\prod_{k=1}^{10^9}k",
    "\\int_0^1 x^x dx",
    "(" * 300 + "1" + ")" * 300,
    "{" * 20 + "1" + "}" * 20,
    "1e1000000000",
    "7" * 100_000,
    "\\frac{1}{0}",
    "1/0",
    "\\sqrt{" * 20 + "2" + "}" * 20,
    "\\begin{pmatrix}" + "1&" * 50 + "\\end{pmatrix}",
    "\\text{" * 30 + "}" * 30,
    "\x00\ud800\u202e",
]


@pytest.mark.parametrize("answer", HOSTILE, ids=[a[:24].encode("ascii", "replace").decode() for a in HOSTILE])
def test_hostile_answers_score_nothing(answer):
    assert verify("math", f"\\boxed{{{answer}}}", {"answer": "42"}).reward == 0.0


def test_towers_of_numbers_are_not_computed_and_polynomials_are():
    for tower in HOSTILE[:8]:
        assert "not worth computing" in verify("math", f"\\boxed{{{tower}}}", {"answer": "42"}).detail
    assert status("\\boxed{x^3+3x^2+3x+1}", "(x+1)^3") == "ok"
    assert status("\\boxed{9^{9^9}}", "9^{9^9}") == "ok"  # the expected text itself


@pytest.mark.parametrize(
    "piece", ["\\boxed{", "\\boxed{}", "answer:", "answer: ", "{", "}", "*", "_ ", "\n", "$", "\\", "# > - "]
)
def test_a_long_response_of_one_repeated_piece_is_read_in_linear_time(piece):
    answers.final_answer(piece * 100_000)  # quadratic reading would take hours


@settings(max_examples=150, deadline=None)
@given(st.text(alphabet="0123456789+-*/^!.,(){}[]$% xy\\", max_size=24) | st.text(max_size=40))
def test_no_input_crashes(text):
    for response in (text, f"\\boxed{{{text}}}", f"Answer: {text}"):
        if not math._HUGE.search(text) and text.count("^") < 2 and "!" not in text:
            assert verify("math", response, {"answer": "42"}).status in ("ok", "wrong", "unparsed", "timeout")


def test_off_the_main_thread_the_status_is_error_not_wrong():
    got = []
    thread = threading.Thread(target=lambda: got.append(verify("math", "\\boxed{y+1}", {"answer": "1+y"})))
    thread.start()
    thread.join()
    assert got[0].status == "error" and "main thread" in got[0].detail


@pytest.mark.parametrize("answer", [None, "", "  ", [], True, {"a": 1}, "9" * 2000])
def test_a_bad_row_is_a_load_time_error(answer):
    with pytest.raises(ValueError, match="answer"):
        check_spec("math", {"answer": answer})


@pytest.mark.parametrize("answer", ["1", 1, 0.5, "\\frac{1}{2}"])
def test_a_good_row(answer):
    check_spec("math", {"answer": answer})
    assert status(f"\\boxed{{{answer}}}", answer) == "ok"
