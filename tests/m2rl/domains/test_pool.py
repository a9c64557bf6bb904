"""The pool: verdicts as in one process, in any order; deadlines; deaths that lose nothing; no process left behind."""

import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from collections import Counter

import psutil
import pytest

from m2rl.domains import pool as pool_module
from m2rl.domains import procedural, verify
from m2rl.domains.pool import VerifierPool


@pytest.fixture
def own_domain(tmp_path, monkeypatch):
    """A domain of a user's own, known to the workers: spec["do"] says how its verifier behaves."""
    package = tmp_path / "m2rl_own"
    package.mkdir()
    (package / "sitecustomize.py").write_text(
        textwrap.dedent(
            """
            import sys, types
            source = '''
            import os, time
            from m2rl.types import Verdict
            def verify(response, spec):
                kind = spec["do"]
                if kind == "sleep": time.sleep(float(response))
                if kind == "spin": sum(range(10 ** 13))  # one C call: no signal handler ever runs
                if kind == "die": os._exit(3)
                if kind == "die once":
                    try: os.close(os.open(response, os.O_CREAT | os.O_EXCL))
                    except FileExistsError: return Verdict(1.0, "ok", "survived")
                    os._exit(3)
                if kind == "raise": raise RuntimeError("boom")
                if kind == "print": print("noise" * 1000, flush=True)
                return Verdict(1.0, "ok", str(os.getpid()))
            '''
            class Finder:
                def find_spec(self, name, path=None, target=None):
                    if name != "m2rl.domains.odd": return None
                    import importlib.machinery, importlib.util
                    return importlib.machinery.ModuleSpec(name, self)
                def create_module(self, spec): return types.ModuleType(spec.name)
                def exec_module(self, module): exec(source, module.__dict__)
            sys.meta_path.append(Finder())
            """
        )
    )
    monkeypatch.setenv("PYTHONPATH", str(package))
    return "odd"


def verdicts(tasks, workers=1, **options):
    with VerifierPool(workers, **options) as pool:
        for key, (domain, response, spec) in enumerate(tasks):
            pool.submit(key, domain, response, spec)
        return dict(pool.drain())


def embedded(n, seed=0):
    tasks = []
    for i in range(n):
        domain = procedural.DOMAINS[i % 4]
        problem = procedural.problem(domain, seed, i)
        tasks.append((domain, procedural.demonstration(problem, seed, i), problem.spec))
    return tasks


def alive(pids):
    return {p for p in pids if psutil.pid_exists(p) and psutil.Process(p).status() != psutil.STATUS_ZOMBIE}


def wait_until(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)


def test_verdicts_are_those_of_one_process_in_any_order_on_any_number_of_workers():
    tasks = embedded(80)
    alone = {k: verify(*task) for k, task in enumerate(tasks)}
    assert {v.status for v in alone.values()} >= {"ok", "wrong"}
    one = verdicts(tasks)
    assert {k: (v.reward, v.status) for k, v in one.items()} == {k: (v.reward, v.status) for k, v in alone.items()}
    order = random.Random(0).sample(range(80), 80)
    two = verdicts([tasks[i] for i in order], workers=2)
    assert {order[k]: v for k, v in two.items()} == one


def test_counts_are_per_domain_and_status(own_domain):
    with VerifierPool() as pool:
        pool.submit(0, "math", "\\boxed{1}", {"answer": "1"})
        pool.submit(1, "math", "\\boxed{2}", {"answer": "1"})
        pool.submit(2, "math", "no", {"answer": "1"})
        pool.submit(3, "if", "yes", {"constraints": [{"id": "punctuation:no_comma", "kwargs": {}}]})
        pool.submit(4, own_domain, "", {"do": "raise"})
        assert pool.outstanding == 5
        got = dict(pool.drain())
        assert pool.outstanding == 0
    assert pool.counts == {
        "math": Counter(ok=1, wrong=1, unparsed=1),
        "if": Counter(ok=1),
        own_domain: Counter(error=1),
    }
    assert "boom" in got[4].detail


def test_an_overdue_task_is_a_timeout_and_the_others_are_judged(own_domain):
    tasks = [(own_domain, "", {"do": "ok"}), (own_domain, "60", {"do": "sleep"}), (own_domain, "", {"do": "ok"})]
    tasks += [(own_domain, "", {"do": "spin"}), ("math", "\\boxed{1}", {"answer": "1"})]
    got = verdicts(tasks, deadline_s=0.5)
    assert [got[i].status for i in range(5)] == ["ok", "timeout", "ok", "timeout", "ok"]
    assert [got[i].reward for i in (1, 3)] == [0.0, 0.0]


def test_the_deadline_is_of_one_task_not_of_a_message(own_domain):
    got = verdicts([(own_domain, "0.3", {"do": "sleep"})] * 6, deadline_s=1.0)  # 1.8 s in one message
    assert {v.status for v in got.values()} == {"ok"}


def test_a_task_that_kills_its_worker_twice_is_an_error_and_costs_nobody_else(own_domain):
    tasks = [(own_domain, "", {"do": "die" if i == 7 else "ok"}) for i in range(20)]
    got = verdicts(tasks)
    assert [i for i in range(20) if got[i].status != "ok"] == [7]
    assert got[7].status == "error"


def test_a_task_whose_worker_dies_once_is_tried_again(own_domain, tmp_path):
    got = verdicts([(own_domain, str(tmp_path / "mark"), {"do": "die once"})])
    assert got[0].detail == "survived"


def test_a_killed_worker_loses_nothing(own_domain):
    with VerifierPool(2) as pool:
        for key in range(30):
            pool.submit(key, own_domain, "0.03", {"do": "sleep"})
        done = pool.poll(10)
        for worker in pool._workers:
            os.kill(worker.process.pid, signal.SIGKILL)
        done += pool.drain()
    assert sorted(k for k, _ in done) == list(range(30))
    assert {v.status for _, v in done} == {"ok"}


def test_what_a_verifier_prints_does_not_reach_the_answers(own_domain):
    got = verdicts([(own_domain, "", {"do": "print"})] * 3)
    assert {v.status for v in got.values()} == {"ok"}


def test_workers_are_recycled(own_domain, monkeypatch):
    monkeypatch.setattr(pool_module, "RECYCLE_AFTER", 5)
    monkeypatch.setattr(pool_module, "BATCH", 5)
    got = verdicts([(own_domain, "", {"do": "ok"})] * 20)
    assert len(got) == 20 and len({v.detail for v in got.values()}) == 4  # detail = the worker's pid


def test_the_queue_is_bounded(own_domain, monkeypatch):
    monkeypatch.setattr(pool_module, "QUEUE", 4)
    monkeypatch.setattr(pool_module, "BATCH", 2)
    with VerifierPool() as pool:
        for key in range(40):
            pool.submit(key, own_domain, "0.005", {"do": "sleep"})
            assert len(pool._queue) <= 4
        assert len(pool.drain()) == 40


def test_a_message_larger_than_any_pipe():
    tasks = [("math", "x" * 3_000_000 + "\\boxed{1}", {"answer": "1"})] * 3
    assert [v.status for v in verdicts(tasks).values()] == ["ok"] * 3


def test_submit_does_not_wait_for_a_worker_that_does_not_read():
    with VerifierPool() as pool:
        worker = pool._workers[0].process.pid
        os.kill(worker, signal.SIGSTOP)
        before = signal.signal(signal.SIGALRM, lambda *_: os.kill(worker, signal.SIGCONT))  # a write that waits, ends
        signal.alarm(20)
        pool.submit(0, "math", "x" * 3_000_000 + "\\boxed{1}", {"answer": "1"})
        assert signal.alarm(0) > 0, "submit waited"
        signal.signal(signal.SIGALRM, before)
        os.kill(worker, signal.SIGCONT)
        assert pool.drain()[0][1].status == "ok"


def test_no_process_outlives_the_pool(own_domain):
    with VerifierPool(2) as pool:
        pool.submit(0, "code", "```python\nprint(input())\n```", {"tests": {"inputs": ["1"], "outputs": ["1"]}})
        assert pool.drain()[0][1].status == "ok"
        pool.submit(1, own_domain, "60", {"do": "sleep"})
        started = {
            p.pid for w in pool._workers for p in [psutil.Process(w.process.pid)] for p in [p, *p.children(True)]
        }
        assert len(started) > 2  # a sandbox among them
    wait_until(lambda: not alive(started))


def test_no_process_outlives_a_killed_parent(own_domain, tmp_path):
    program = tmp_path / "parent.py"
    program.write_text(
        textwrap.dedent(
            """
            import sys, time, psutil
            from m2rl.domains.pool import VerifierPool
            if __name__ == "__main__":
                pool = VerifierPool(2)
                pool.submit(0, "code", "```python\\nprint(1)\\n```", {"tests": {"inputs": [""], "outputs": ["1"]}})
                pool.drain()
                pool.submit(1, "odd", "", {"do": "spin"})  # its worker will not look at its pipes
                pool.poll(1.0)
                print(*[p.pid for p in psutil.Process().children(recursive=True)], flush=True)
                time.sleep(60)
            """
        )
    )
    parent = subprocess.Popen([sys.executable, str(program)], stdout=subprocess.PIPE, text=True)
    started = {int(p) for p in parent.stdout.readline().split()}
    assert len(started) >= 3
    parent.kill()
    parent.wait()
    parent.stdout.close()
    wait_until(lambda: not alive(started))


def test_workers_import_no_torch_and_not_the_main_program(tmp_path):
    program = tmp_path / "main_program.py"
    program.write_text(
        textwrap.dedent(
            """
            import pathlib, sys
            sys.stderr.write("imported\\n")
            from m2rl.domains.pool import VerifierPool
            with VerifierPool(1) as pool:  # unguarded on purpose: workers must not run this file again
                pool.submit(0, "math", "\\\\boxed{1+x}", {"answer": "x+1"})
                pool.submit(1, "if", "hello", {"constraints": [{"id": "punctuation:no_comma", "kwargs": {}}]})
                print([v.status for _, v in sorted(pool.drain())])
                maps = pathlib.Path(f"/proc/{pool._workers[0].process.pid}/maps").read_text()
                print("torch" in maps)
            """
        )
    )
    ran = subprocess.run([sys.executable, str(program)], capture_output=True, text=True, timeout=120)
    assert ran.stdout.split("\n")[:2] == ["['ok', 'ok']", "False"], ran.stderr
    assert ran.stderr.count("imported") == 1


def test_where_programs_cannot_be_isolated_submit_refuses(monkeypatch):
    from m2rl.domains import sandbox
    from m2rl.types import InputError

    monkeypatch.setattr(sandbox, "probe", lambda level: "not here")
    with VerifierPool() as pool:
        pool.submit(0, "math", "\\boxed{1}", {"answer": "1"})  # other domains do not need it
        with pytest.raises(InputError, match="trusted"):
            pool.submit(1, "code", "```\n1\n```", {"tests": {"inputs": [""], "outputs": [""]}})
        assert len(pool.drain()) == 1


def test_trusted_warns_and_runs():
    with VerifierPool(sandbox="trusted") as pool, pytest.warns(UserWarning, match="trusted"):
        pool.submit(0, "code", "```python\nprint(1)\n```", {"tests": {"inputs": [""], "outputs": ["1"]}})
        assert pool.drain()[0][1].status == "ok" and pool.sandbox_level == "trusted"


@pytest.mark.parametrize(
    ("options", "rule"),
    [({"workers": 0}, "workers"), ({"deadline_s": 0}, "deadline_s"), ({"sandbox": "none"}, "sandbox")],
)
def test_bad_arguments(options, rule):
    with pytest.raises(ValueError, match=rule):
        VerifierPool(**options)


def test_a_key_is_one_task_at_a_time():
    with VerifierPool() as pool:
        pool.submit(0, "math", "\\boxed{1}", {"answer": "1"})
        with pytest.raises(ValueError, match="outstanding"):
            pool.submit(0, "math", "\\boxed{1}", {"answer": "1"})
        pool.drain()
        pool.submit(0, "math", "\\boxed{1}", {"answer": "1"})
        assert len(pool.drain()) == 1
    with pytest.raises(ValueError, match="closed"):
        pool.submit(1, "math", "", {"answer": "1"})
