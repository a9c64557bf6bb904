"""Our code verdicts against the LiveCodeBench grader's own, on generated programs and tests.

The reference is LiveCodeBench/LiveCodeBench's folder lcb_runner, on the path; skipped where it is not. Its grader runs
programs unprotected and breaks the process it runs in: it gets one of its own, and programs of this file alone.
"""

import json
import random
import subprocess
import sys

import pytest

from m2rl.domains import sandbox, verify
from m2rl.types import InputError

pytest.importorskip("lcb_runner.evaluation.testing_util", exc_type=ImportError)

GRADER = """
import json, os, sys
from lcb_runner.evaluation.testing_util import run_test
for line in sys.stdin:
    sample, source = json.loads(line)
    read, write = os.pipe()
    if os.fork() == 0:
        out = os.dup(1)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        results, _ = run_test({"input_output": json.dumps(sample)}, test=source, timeout=1)
        os.write(write, b"1" if all(r is True for r in results) else b"0")
        os._exit(0)
    os.wait()
    os.close(write)
    print(int(os.read(read, 1) == b"1"), flush=True)
    os.close(read)
"""

SHOW = [
    "print({})",
    "print(str({}) + '  ')",
    "print({}, end='')",
    "print('\\n' + str({}) + '\\n\\n')",
    "print(float({}))",
    "print('%.3f' % {})",
    "print({}, 0)",
    *["print({})"] * 6,
    "print({}); print({})",
    "import sys; sys.stdout.write(str({}))",
    "print({}); exit()",
    "print({}); raise SystemExit(1)",
    "print({}); 1 / 0",
    "print('yes' if {} > 4 else 'no')",
    "print(Decimal({}))",  # no such name: the header has decimal's neighbours only
    "print(*sorted([{}, 3]))",
    "print(Counter(str({})).most_common(1)[0][0])",  # imported by the header
    "def main():\n    print({})\nif __name__ == '__main__':\n    main()",
    "while True: pass",
    "print(",
    "",
]
READ = ["n = int(input())", "import sys\nn = int(sys.stdin.readline())", "import sys\nn = int(sys.stdin.read())"]
OF_N = ["n * n", "n + n", "n * n if n != 5 else 24", "2 ** n", "n / 2", "-n"]

RETURN = [
    "{}",
    "str({})",
    "[{}, n]",
    "({}, n)",
    "float({})",
    "bool({})",
    "None",
    "{{'a': {}}}",
    "[]",
    "{}; print(1)",
    "1 / 0",
]
SHAPES = ["n_", "str(n_)", "[n_, n]", "[n_, n]", "float(n_)", "n_ > 0", "None", "{'a': n_}", "[]", "n_", "n_"]
FUNCTION = [
    *["def f(n):\n    return {}"] * 3,
    "class Solution:\n    def f(self, n: int) -> Optional[int]:\n        return {}",
    "class Solution:\n    def g(self, n): return {}\n    def f(self, n): return self.g(n)",
    "def f(self, n):\n    return {}",
    "def g(n):\n    return {}",
    "f = lambda n: {}",
]


def stdin_cases(rng):
    """(sample in the grader's form, source)."""
    for _ in range(150):
        expression, other = rng.choice(OF_N), rng.choice(OF_N)
        wanted = expression if rng.random() < 0.8 else other
        inputs = [rng.randint(1, 9) for _ in range(rng.randint(1, 3))]
        show = rng.choice(["{}"] * 6 + ["{}\n", "{}.0", " {} \n", "{} 0", "{}\n{}", "{}.000"])
        outputs = [show.replace("{}", str(eval(wanted, {"n": n}))) for n in inputs]
        source = rng.choice(READ) + "\n" + rng.choice(SHOW).replace("{}", f"({expression})")
        yield {"inputs": [f"{n}\n" for n in inputs], "outputs": outputs}, source


def call_cases(rng):
    for _ in range(150):
        expression, other = rng.choice(OF_N[:4]), rng.choice(OF_N[:4])
        wanted = expression if rng.random() < 0.8 else other
        inputs = [rng.randint(1, 9) for _ in range(rng.randint(1, 3))]
        shape, said = rng.choice(list(zip(SHAPES, RETURN)))
        said = said if rng.random() < 0.7 else rng.choice(RETURN)
        outputs = [eval(shape, {"n": n, "n_": eval(wanted, {"n": n})}) for n in inputs]
        body = said.replace("{}", f"({expression})").replace("{{", "{").replace("}}", "}")
        source = rng.choice(FUNCTION).replace("{}", body if "lambda" not in body else "n")
        sample = {"fn_name": "f", "inputs": [json.dumps(n) for n in inputs], "outputs": list(map(json.dumps, outputs))}
        yield sample, source


@pytest.mark.parametrize("cases", [stdin_cases, call_cases])
def test_verdicts_are_the_graders(cases):
    try:
        sandbox.choose("auto")
    except InputError as error:
        pytest.skip(str(error))
    rows = list(cases(random.Random(cases.__name__)))
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    done = subprocess.run([sys.executable, "-c", GRADER], input=lines, capture_output=True, text=True, check=True)
    theirs = list(map(int, done.stdout.split()))
    assert len(theirs) == len(rows) and 0.1 < sum(theirs) / len(rows) < 0.9
    differ = []
    for (sample, source), expected in zip(rows, theirs):
        spec = {"tests": sample, "time_limit_s": 1, "prelude": True}
        ours = verify("code", f"```python\n{source}\n```", spec)
        if ours.reward != expected:
            differ.append((expected, ours, sample, source))
    assert not differ, "\n".join(map(repr, differ))
