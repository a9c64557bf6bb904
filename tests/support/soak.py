"""A long mixed run through the verifier pool, one task in a hundred hostile: what came back, and what is left.

soak(20_000) -> Report
"""

import glob
import os
import random
import tempfile
import time
from dataclasses import dataclass, field

import psutil

from m2rl.domains import procedural
from m2rl.domains.pool import VerifierPool

HOSTILE_PROGRAMS = {  # what may come of each; never a reward
    "import os\nwhile True: os.fork()": {"wrong", "timeout"},
    "x = bytearray(1 << 33)": {"wrong"},
    "while True: pass": {"timeout"},
    "import time\ntime.sleep(100)": {"timeout", "wrong"},
    "while True: print('x' * 10000)": {"wrong", "timeout"},
    "import os, signal\nos.kill(os.getppid(), signal.SIGKILL)": {"wrong", "error"},
    "import os\nfor i in range(10**6): open(f'f{i}', 'w').write('x')": {"wrong", "timeout", "error"},
    "import sys\nsys.setrecursionlimit(10**9)\ndef f(): f()\nf()": {"wrong", "timeout"},
    "import ctypes\nctypes.string_at(0)": {"wrong"},
    "import os\nos.write(3, b'{\"output\": 1}\\n' * 99)\nos._exit(0)": {"wrong"},
}
HOSTILE_ANSWERS = ["9^{9^{9^9}}", "99999!", "(" * 200, "\\sum_{k=1}^{10^9}k^k", "{" * 5000, "\\frac{1}{0}"]


@dataclass
class Report:
    tasks: int
    seconds: float
    lost: list[int] = field(default_factory=list)
    surprising: list[str] = field(default_factory=list)  # a verdict that is not what the task deserves
    statuses: dict[str, dict[str, int]] = field(default_factory=dict)
    rss_mib: list[float] = field(default_factory=list)  # workers and all they started, after each quarter
    processes: list[int] = field(default_factory=list)  # at the same moments
    survivors: list[str] = field(default_factory=list)
    files: list[str] = field(default_factory=list)


def task(i: int) -> tuple[str, str, dict, set[str]]:
    """(domain, response, spec, statuses it may get), a function of i."""
    rng = random.Random(f"soak/{i}")
    if rng.random() < 0.01:
        if rng.random() < 0.5:
            source = rng.choice(list(HOSTILE_PROGRAMS))
            spec = {"tests": {"inputs": [""], "outputs": ["never"]}}
            return "code", f"```python\n{source}\n# {i}\n```", spec, HOSTILE_PROGRAMS[source]
        answer = rng.choice(HOSTILE_ANSWERS)
        return "math", f"\\boxed{{{answer}}}", {"answer": "42"}, {"wrong", "timeout", "unparsed"}
    domain = rng.choices(procedural.DOMAINS, (4, 1, 3, 3))[0]
    problem = procedural.problem(domain, 0, i)
    kind = rng.random()
    if kind < 0.6:
        return domain, problem.good, dict(problem.spec), {"ok"}
    if kind < 0.9:
        return domain, "nothing", dict(problem.spec), {"wrong", "unparsed"}
    return domain, rng.randbytes(200).decode("latin-1"), dict(problem.spec), {"wrong", "unparsed"}


def soak(n: int, workers: int = 2, deadline_s: float = 5.0) -> Report:
    """Submit n tasks and take every verdict back."""
    before, files = set(_descendants()), set(_files())
    began = time.monotonic()
    report = Report(n, 0.0)
    waiting = set()

    def take(done):
        for key, verdict in done:
            waiting.remove(key)
            domain, response, _, allowed = task(key)
            if verdict.status not in allowed or (verdict.reward > 0) != (verdict.status == "ok"):
                report.surprising.append(f"{key} {domain} {response[:60]!r}: {verdict}")

    with VerifierPool(workers, deadline_s=deadline_s) as pool:
        for key in range(n):
            domain, response, spec, _ = task(key)
            waiting.add(key)
            pool.submit(key, domain, response, spec)
            take(pool.poll())
            if key % (n // 4) == n // 4 - 1:
                take(pool.drain())
                tree = _descendants()
                report.rss_mib.append(round(sum(_rss(p) for p in tree) / 2**20, 1))
                report.processes.append(len(tree) - len(before))
        take(pool.drain())
        report.statuses = {domain: dict(counts) for domain, counts in pool.counts.items()}
    report.seconds = round(time.monotonic() - began, 1)
    report.lost = sorted(waiting)
    end = time.monotonic() + 10
    while (left := set(_descendants()) - before) and time.monotonic() < end:
        time.sleep(0.05)
    report.survivors = [str(p) for p in left]
    report.files = sorted(set(_files()) - files)
    return report


def _descendants() -> list[psutil.Process]:
    return psutil.Process(os.getpid()).children(recursive=True)


def _rss(process: psutil.Process) -> int:
    try:
        return process.memory_info().rss
    except psutil.NoSuchProcess:
        return 0


def _files() -> list[str]:
    return glob.glob(os.path.join(tempfile.gettempdir(), "m2rl-*"))
