"""Programs out of responses, tests, comparison, the paper's rules: what scores and what does not."""

import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from m2rl.domains import check_spec, code, sandbox, verify
from m2rl.types import STATUSES, InputError

SQUARE = {"tests": {"inputs": ["3\n", "5\n", "-2\n"], "outputs": ["9\n", "25\n", "4\n"]}}
GOOD = "n = int(input())\nprint(n * n)"


@pytest.fixture(scope="module", autouse=True)
def isolated():
    try:
        sandbox.choose("auto")
    except InputError as error:
        pytest.skip(str(error))


def fenced(source, language="python"):
    return f"```{language}\n{source}\n```"


def reward(source, spec=SQUARE):
    return verify("code", fenced(source), spec)


def paper(response, spec=SQUARE):
    """By the paper's rules, after its </think> gate."""
    return verify("code", f"</think>{response}", {**spec, "preset": "reference"})


# ---- fences


@pytest.mark.parametrize(
    "response",
    [
        fenced(GOOD),
        fenced(GOOD, "py"),
        fenced(GOOD, "python3"),
        fenced(GOOD, "Python"),
        fenced(GOOD, ""),
        fenced(GOOD, " python"),
        fenced(GOOD, "python title=square.py"),
        fenced(GOOD, "{python}"),
        fenced(GOOD, "{.python .numberLines}"),
        fenced(GOOD, "python3.11"),
        fenced(GOOD, "ipython3"),
        fenced(GOOD, "python:main.py"),
        fenced("    " + GOOD.replace("\n", "\n    ")),  # indented as a whole
        "> Quoted:\n> ```python\n> n = int(input())\n>\n> print(n * n)\n> ```",
        f"````markdown\nThe program:\n```python\n{GOOD}\n```\n````",
        f"~~~python\n{GOOD}\n~~~",
        f"````python\n{GOOD}\n````",
        f"```python\n{GOOD}",  # never closed
        f"```python\n{GOOD}```",  # closed at the end of a line
        f"Here it is: ```python\n{GOOD}\n```",
        fenced(GOOD).replace("\n", "\r\n"),
        "1. First\n   ```python\n   n = int(input())\n   print(n * n)\n   ```\nDone.",
        f"{fenced('print(0)')}\nNo, better:\n{fenced(GOOD)}",  # the last one counts
        f"{fenced(GOOD)}\nFor 3 it prints\n```\n9\n```",  # an unmarked block after a marked one is not the program
        f"{fenced(GOOD)}\n```text\n9\n```",
        f"{fenced('int main() { return 0; }', 'cpp')}\n{fenced(GOOD)}\n{fenced('fn main() {}', 'rust')}",
        f"{fenced(GOOD)}\nIt runs in O(1) time, see `n * n`.",
        "```python n = int(input()); print(n * n)```",
        f"I write `x` and ``` inline.\n\n{fenced(GOOD)}",
        f"```python\n{GOOD}\ns = '''\n``` not a fence\n'''\n```",
    ],
)
def test_every_fence_convention_is_read(response):
    assert verify("code", response, SQUARE).status == "ok"


@pytest.mark.parametrize("response", ["", "no program", GOOD, fenced(GOOD, "cpp"), "`print(1)`", "``` ```"])
def test_without_a_python_block_the_status_is_unparsed(response):
    assert verify("code", response, SQUARE) == verify("code", response, SQUARE)
    assert verify("code", response, SQUARE).status == "unparsed"


@pytest.mark.parametrize(
    "piece", ["```md\n", "> ```python\n> x\n", "```md\n```python\nx\n```\n", "~~~\n", "```python```"]
)
def test_thousands_of_fences_are_read_in_linear_time(piece):
    code.program(piece * 20_000)  # one inside the other they would nest too deep


@pytest.mark.parametrize(
    "line", ["~" * 50_000 + "`", "~~~ " * 50_000 + "`", "`~" * 50_000, "``` " * 50_000, "> " * 50_000]
)
def test_a_long_line_is_read_in_linear_time(line):
    assert code.program(line) is None


@given(st.text(alphabet="`~\n py{}.#x>md", max_size=80))
def test_blocks_never_fails(text):
    assert all(isinstance(body, str) for _, body in code.blocks(text))


# ---- what passes and what does not


def test_all_tests_must_pass_and_the_first_failure_is_named():
    assert reward(GOOD).reward == 1
    verdict = reward("n = int(input())\nprint(n * n if n > 0 else 0)")
    assert (verdict.reward, verdict.status) == (0, "wrong") and "test 3 of 3" in verdict.detail
    assert "ZeroDivisionError" in reward("1 / 0").detail
    assert reward("print(").status == "wrong"


SIX = {
    "output before sys.exit()": f"import sys\n{GOOD}\nsys.exit()",
    "output before exit(0)": f"{GOOD}\nexit(0)",
    "bytes to sys.stdout.buffer": "import sys\nn = int(input())\nsys.stdout.buffer.write(str(n * n).encode())",
    "a __future__ import": f"from __future__ import annotations\n{GOOD}",
    "import resource": f"import resource\n{GOOD}",
    "import psutil": f"import psutil\n{GOOD}",
    "a triple-quoted text that keeps its layout": 'n = int(input())\ns = """\n"""\nprint(n * n if len(s) == 1 else 0)',
    "a fence that is never closed": None,
}


@pytest.mark.parametrize("name", SIX)
def test_what_the_papers_code_wrongly_fails_passes_here_and_fails_in_its_preset(name):
    response = f"```python\n{GOOD}" if SIX[name] is None else fenced(SIX[name])
    assert verify("code", response, SQUARE).reward == 1
    if "import psutil" in response:
        pytest.importorskip("psutil")
    assert paper(response).reward == 0


def test_the_papers_code_glues_blocks():
    two = f"{fenced('x = 1')}\nand then\n{fenced(GOOD)}"
    assert verify("code", two, SQUARE).reward == 1
    assert paper(two).reward == 0
    assert paper(fenced(GOOD)).reward == 1


def test_the_papers_code_draws_other_tests_for_other_samples():
    spec = {"tests": {"inputs": [f"{i}\n" for i in range(40)], "outputs": [f"{i * i}" for i in range(40)]}}
    wrong_once = "n = int(input())\nprint(n * n if n != 7 else 0)"
    rewards = {paper(f"{'.' * i}\n{fenced(wrong_once)}", spec).reward for i in range(12)}
    assert rewards == {0, 1}
    assert {verify("code", f"{'.' * i}\n{fenced(wrong_once)}", spec).reward for i in range(3)} == {0}


def test_the_subset_of_tests_depends_on_the_tests_alone():
    pairs = [(str(i), str(i)) for i in range(200)]
    chosen = code.subset(pairs, 50)
    assert len(chosen) == 50 == len(set(chosen)) and chosen == sorted(chosen, key=pairs.index)
    random.seed(1)
    assert code.subset(pairs, 50) == chosen != code.subset(pairs[1:], 50)
    assert code.subset(pairs, 200) == pairs


def test_it_stops_at_the_first_failure(monkeypatch):
    seen = []
    run = sandbox.Box.run
    monkeypatch.setattr(
        sandbox.Box,
        "run",
        lambda self, source, stdin=None, **kw: (seen.append(stdin), run(self, source, stdin, **kw))[1],
    )
    assert reward("input(); print(25)").status == "wrong"
    assert seen == ["3\n"]


def test_the_same_program_is_run_once(monkeypatch):
    reward(GOOD + "  # once")
    monkeypatch.setattr(sandbox.Box, "run", None)
    assert reward(GOOD + "  # once").reward == 1


def test_expected_outputs_never_leave_this_process(monkeypatch):
    sent = []
    run = sandbox.Box.run
    monkeypatch.setattr(
        sandbox.Box, "run", lambda self, *a, **kw: (sent.append(json.dumps([a, kw])), run(self, *a, **kw))[1]
    )
    stdin = {"tests": {"inputs": ["a"], "outputs": ["gold-1234"]}}
    calls = {"tests": {"fn_name": "f", "inputs": [["a"]], "outputs": ["gold-1234"]}}
    assert reward("print('gold-' + str(1233 + 1))", stdin).reward == 1
    assert reward("def f(x): return 'gold-' + str(1233 + 1)", calls).reward == 1
    assert len(sent) == 2 and not any("gold-1234" in text for text in sent)


def test_time_is_of_all_tests_together(monkeypatch):
    monkeypatch.setattr(code, "_budget_s", 2.5)
    slow = "import time\nend = time.time() + 1.1\nwhile time.time() < end: pass\n" + GOOD
    verdict = reward(slow)
    assert verdict.status == "timeout" and "test 1 " not in verdict.detail  # the first was within its own limit
    assert reward("while True: pass", {**SQUARE, "time_limit_s": 0.3}).status == "timeout"


def test_a_wrong_answer_before_an_endless_call_is_wrong_not_timeout():
    spec = {"tests": {"fn_name": "f", "inputs": [[1], [2]], "outputs": [1, 2]}, "time_limit_s": 0.4}
    assert reward("def f(x):\n while x == 2: pass\n return 0", spec).status == "wrong"
    assert reward("def f(x):\n while x == 2: pass\n return x", spec).status == "timeout"


# ---- calls


@pytest.mark.parametrize(
    "source, inputs, outputs",
    [
        ("def f(a, b): return a + b", [[1, 2], ["x", "y"]], [3, "xy"]),
        (
            "class Solution:\n    def f(self, nums: List[int], k: Optional[int]) -> int: return sum(nums) * k",
            [[[1, 2], 3]],
            [9],
        ),
        ("class Solution:\n    def f(self, x): return x + 1\ndef f(x): return x", [[1]], [2]),
        ("def f(x): return (x, [x, (x,)])", [[1]], [[1, [1, [1]]]]),
        ("def f(x): return {x: x}", [[1]], [{"1": 1}]),
        ("def f(x): return x / 2", [[1]], [0.5]),
        ("def f(x): return Counter(x).most_common(1)[0][0]", [["aab"]], ["a"]),
        ("f = lambda x: x", [[None], [True], [[[]]]], [None, True, [[]]]),
        ("import numpy as np\ndef f(x): return np.cumsum(x)", [[[1, 2]]], [[1, 3]]),
        ("def f(a, b): return a + b", ["1\n2", '"x"\n"y"'], ["3", '"xy"']),  # LiveCodeBench's own form
        ("def f(s): return s", ['"a b"'], ['"a b"']),
    ],
)
def test_calls_of_a_function_or_method(source, inputs, outputs):
    spec = {"tests": {"fn_name": "f", "inputs": inputs, "outputs": outputs}}
    check_spec("code", spec)
    assert reward(source, spec).reward == 1, reward(source, spec)


@pytest.mark.parametrize("name", ["search", "insert", "permutations", "product", "gcd", "add", "pow", "load"])
def test_a_method_may_have_the_name_of_a_library_function(name):
    spec = {"tests": {"fn_name": name, "inputs": [[[4, 5], 5]], "outputs": [1]}}
    assert reward(f"class Solution:\n    def {name}(self, nums, x): return nums.index(x)", spec).reward == 1


@pytest.mark.parametrize(
    "source",
    [
        "def g(x): return 1",
        "def f(): return 1",
        "def f(x): print(1)",
        "def f(x): yield 1",
        "def f(x): return {1}",
        "def f(x): return '1'",
        "def f(x): return float('nan')",
        "class A(int):\n    def __eq__(self, other): return True\ndef f(x): return A(7)",
        "class Any:\n    def __eq__(self, other): return True\ndef f(x): return Any()",
        "import os, json\nos.write(3, b'{\"output\": 2}\\n')\ndef f(x): return 1",
        "import os\nos._exit(0)",
        "def f(x): raise SystemExit",
        "f = 1",
    ],
)
def test_calls_that_do_not_return_the_value_score_nothing(source):
    assert reward(source, {"tests": {"fn_name": "f", "inputs": [[0]], "outputs": [1]}}).reward == 0


# ---- comparison, as the LiveCodeBench grader does it


@pytest.mark.parametrize(
    "got, want, same",
    [
        ("1 2\n3", "1 2\n3\n", True),
        ("  1 2  \n3\n\n", "1 2\n3", True),
        ("\n1", "1", True),
        ("1.0", "1", True),
        ("1e3 2.50", "1000 2.5", True),
        ("1 2", "1  2", True),
        ("a b", "a  b", False),
        ("1.0000001", "1", False),
        ("50000000000000000", "50000000000000001", False),
        ("1\n\n2", "1\n2", False),
        ("Yes", "YES", False),
        ("1 2", "1 2 3", False),
        ("x 1", "x 1.0", False),
        ("", "0", False),
        ("nan", "nan", True),
        ("inf", "Infinity", True),
        ("-0", "0", True),
        ("0x10", "16", False),
        ("1_000", "1000", True),
        ("٣", "3", True),
    ],
)
def test_texts_are_compared_line_by_line_or_as_exact_decimals(got, want, same):
    assert code.same_text(got, want) is same


def livecodebench(got, want):
    """The rule of its stdin grader, restated."""
    from decimal import Decimal

    a, b = ([line.strip() for line in text.strip().split("\n")] for text in (got, want))
    if len(a) != len(b):
        return False
    for x, y in zip(a, b):
        if x == y:
            continue
        try:
            if [Decimal(p) for p in x.split()] != [Decimal(p) for p in y.split()]:
                return False
        except ArithmeticError:
            return False
    return True


NUMBERS = st.sampled_from(["1", "1.0", "01", "2", "1e0", "-0", "x", "Yes"])
LINES = st.lists(st.lists(NUMBERS, max_size=3).map(" ".join), max_size=3).map("\n".join)


@settings(max_examples=300, deadline=None)
@given(LINES, LINES, st.sampled_from(["", "\n", "  ", "\n\n"]))
def test_comparison_agrees_with_livecodebench(got, want, end):
    assert code.same_text(got + end, want) == livecodebench(got + end, want)


# ---- rows


@pytest.mark.parametrize(
    "spec, message",
    [
        ({}, "key tests"),
        ({"tests": {"inputs": [], "outputs": []}}, "non-empty"),
        ({"tests": {"inputs": ["1"]}}, "non-empty lists"),
        ({"tests": {"inputs": ["1", "2"], "outputs": ["1"]}}, "got 2 and 1"),
        ({"tests": {"inputs": ["1", 2], "outputs": ["1", "2"]}}, r"tests.inputs\[1\] must be a text, got int"),
        ({"tests": {"inputs": ["1"], "outputs": [None]}}, r"tests.outputs\[0\]"),
        ({"tests": {"fn_name": "", "inputs": [[1]], "outputs": [1]}}, "Python name"),
        ({"tests": {"fn_name": "f", "inputs": [1], "outputs": [1]}}, "test 0 of f: an input must be the list"),
        ({"tests": {"fn_name": "f", "inputs": ["{"], "outputs": ["1"]}}, "test 0 of f"),
        ({**SQUARE, "time_limit_s": 0}, "time_limit_s"),
        ({**SQUARE, "time_limit_s": True}, "time_limit_s"),
        ({**SQUARE, "max_tests": 0}, "max_tests"),
    ],
)
def test_a_row_that_cannot_be_judged_is_refused_with_its_key(spec, message):
    with pytest.raises(ValueError, match=message):
        check_spec("code", spec)


def test_a_good_row_passes_the_check():
    check_spec("code", SQUARE)
    check_spec(
        "code", {"tests": {"fn_name": "f", "inputs": [[1]], "outputs": [[2]]}, "time_limit_s": 2, "max_tests": 5}
    )


@settings(max_examples=25, deadline=None)
@given(st.text(max_size=60))
def test_no_program_breaks_the_verifier(source):
    verdict = reward(source, {"tests": {"inputs": ["1"], "outputs": ["never printed"]}, "time_limit_s": 0.5})
    assert verdict.status in STATUSES and verdict.status != "error" and verdict.reward == 0


@pytest.mark.parametrize("source", ["\x00", "\ud800", "print('\ud800')", "#" * 10**6, "é = 1", "\ufeffprint(1)"])
def test_odd_sources_end_in_a_verdict(source):
    assert reward(source, {"tests": {"inputs": ["1"], "outputs": ["2"]}}).status == "wrong"


def test_a_sandbox_that_keeps_dying_is_an_error_not_a_wrong_answer(monkeypatch):
    def run(self, *args, **kwargs):
        raise sandbox.BoxDied("gone")

    monkeypatch.setattr(sandbox.Box, "run", run)
    verdict = reward(GOOD + "  # never judged")
    assert (verdict.reward, verdict.status) == (0, "error") and "gone" in verdict.detail
