"""Verifications per second by domain, through a pool of two workers; the embedded default's batch; the soak.

    pytest bench/bench_verify.py --benchmark-only                the table, and bench/results/verify.json
    pytest bench/bench_verify.py --benchmark-only -k soak -s     20,000 verifications, 1 % of them hostile

Aims on 2 cores: math 300/s, science and IF 2,000/s, code 60 trivial programs/s. No program or answer of a run comes
twice, except where the name says groups: there samples repeat each other as a policy's do. per_second is wall time (the
median of five rounds) and suffers from whatever else runs; cpu_ms is what one verification costs in processor time, in
this process, the workers, the sandbox and its programs together, and 2000 / cpu_ms is what two idle cores could do.
"""

import itertools
import json
import os
import random
import statistics
import time
from pathlib import Path

import psutil
import pytest
from soak import soak

from m2rl.domains import procedural
from m2rl.domains.pool import VerifierPool

RESULTS = Path(__file__).parent / "results" / "verify.json"
COUNTER = itertools.count()


def math_integers(i):
    return f"Some working first. \\boxed{{{i}}}", {"answer": str(i + i % 2)}


def math_symbols(i):
    """Groups of 16 with one expected answer: half right as expected, two in another form, six wrong in six ways."""
    group, sample = divmod(i, 16)
    rng = random.Random(group)
    a, b = rng.randint(2, 99), rng.randint(2, 99)
    form = rng.choice(
        ["\\frac{%d}{%d}", "%d\\sqrt{%d}", "(%d, %d)", "\\{%d, %d\\}", "[%d, %d)", "x^2+%dx+%d", "%d\\pi+%d"]
    )
    want = form % (a, b)
    said = want if sample < 8 else f"{{{want}}}" if sample < 10 else form % (a + sample, b)
    return f"\\boxed{{{said}}}", {"answer": want}


def math_blend(i):
    """Four groups in five expect an integer."""
    return math_integers(i) if (i // 16) % 5 else math_symbols(i)


def science(i):
    options = {c: f"{i + k} km" for k, c in enumerate("ABCDEFGHIJ")}
    return "The options differ little. " * 40 + f"\nAnswer: {'ABCDEFGHIJ'[i % 10]}", {"answer": "C", "options": options}


def instructions(i):
    problem = procedural.problem("if", 1, i)
    return problem.good, problem.spec


def code_functions(i):
    program = f"```python\ndef f(x):\n return sum(v * {i} for v in x)\n```"
    return program, {"tests": {"fn_name": "f", "inputs": [[[1, 2, 3]]] * 4, "outputs": [6 * i] * 4}}


def code_scripts(i):
    return f"```python\nprint(int(input()) + {i})\n```", {"tests": {"inputs": ["1"], "outputs": [str(i + 1)]}}


KINDS = {
    "math, integers": ("math", math_integers, 2000),
    "math, groups of symbols": ("math", math_symbols, 320),
    "math, groups like the blend's": ("math", math_blend, 1600),
    "science": ("science", science, 2000),
    "if": ("if", instructions, 2000),
    "code, a function, 4 calls": ("code", code_functions, 128),
    "code, a script, 1 test": ("code", code_scripts, 128),
}


def record(name, value):
    """A number with its method: when, on what, how busy the machine was."""
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    known["command"] = "pytest bench/bench_verify.py --benchmark-only"
    value |= {"date": time.strftime("%Y-%m-%d"), "cores": os.cpu_count(), "load_1_min": round(os.getloadavg()[0], 1)}
    RESULTS.write_text(json.dumps(known | {name: value}, indent=1) + "\n")


def cpu_s():
    """Processor time so far of this process and all below it, ended ones included."""
    tree = [psutil.Process(), *psutil.Process().children(recursive=True)]
    return sum(sum(p.cpu_times()[:4]) for p in tree)


@pytest.fixture(scope="module")
def pool():
    with VerifierPool(2) as pool:
        yield pool


@pytest.mark.parametrize("kind", KINDS)
def test_throughput(benchmark, pool, kind):
    domain, make, n = KINDS[kind]

    def setup():
        first = 16 * (next(COUNTER) * n)  # no group is met twice
        return ([(i, *make(i)) for i in range(first, first + n)],), {}

    spent = []

    def judge(tasks):
        began = cpu_s()
        for key, response, spec in tasks:
            pool.submit(key, domain, response, spec)
        pool.drain()
        spent.append(cpu_s() - began)

    judge(setup()[0][0])  # imports
    benchmark.pedantic(judge, setup=setup, rounds=5)
    rate = round(n / benchmark.stats.stats.median)
    cpu_ms = round(1000 * statistics.median(spent[1:]) / n, 3)  # of a round in which a worker is recycled some is lost
    benchmark.extra_info |= {"per_second": rate, "cpu_ms": cpu_ms}
    sandbox = pool.sandbox_level if domain == "code" else None
    record(kind, {"per_second": rate, "cpu_ms": cpu_ms, "workers": 2, "sandbox": sandbox})


def test_the_embedded_defaults_batch(benchmark):
    """16 prompts x 16 samples of mixed quality, four domains, one worker."""
    step = itertools.count()

    def setup():
        seed, tasks = next(step), []
        for domain in procedural.DOMAINS:
            for i in range(4):
                problem = procedural.problem(domain, seed, i)
                tasks += [(domain, procedural.demonstration(problem, seed, k), problem.spec) for k in range(16)]
        return (tasks,), {}

    def judge(tasks):
        for key, task in enumerate(tasks):
            one.submit(key, *task)
        return one.drain()

    with VerifierPool(1) as one:
        judge(setup()[0][0])
        benchmark.pedantic(judge, setup=setup, rounds=15)
        median_ms = round(1000 * benchmark.stats.stats.median, 1)
        record("embedded batch of 256", {"median_ms": median_ms, "workers": 1, "sandbox": one.sandbox_level})


def test_soak(benchmark):
    report = benchmark.pedantic(soak, args=(20_000,), rounds=1)
    print(report)
    record("soak of 20000", {k: v for k, v in vars(report).items() if k != "surprising"})
    assert not (report.lost or report.surprising or report.survivors or report.files)
