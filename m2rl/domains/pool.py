"""Verifiers in worker processes: warm, killed at a deadline, order-independent; nothing is lost when one dies.

    with VerifierPool(workers=2, deadline_s=10) as pool:
        pool.submit(key, domain, response, spec)
        for key, verdict in pool.poll(): ...

Tasks travel in messages of up to BATCH (a program counts as 8 of them) and are answered one by one, in order. The
deadline is of one task, from the answer to the one before it. A worker that misses it is killed with all it started,
and the task gets status timeout. A worker that dies otherwise is replaced and its tasks are sent again; the one it
died on a second time gets status error. Workers end with the thread that made the pool (PR_SET_PDEATHSIG), and import
no torch.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import select
import signal
import struct
import subprocess
import sys
import time
import warnings
from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from m2rl.domains import sandbox as sandbox_module
from m2rl.types import Verdict

BATCH = 32  # cheap verdicts are dominated by the round trip
COST = {"code": 8, "agent": 4}  # of a message's BATCH
RECYCLE_AFTER = 5000  # tasks; bounds what a leaking verifier can hold
QUEUE = 4096  # tasks that wait for a worker before submit() waits as well
ATTEMPTS = 2
WARM_S = 30.0  # to import what a domain needs, on top of the deadline, once per worker and domain
MEMORY_BYTES = 4 << 30  # address space of a worker
Task = tuple[int, str, str, Mapping[str, Any]]  # key, domain, response, spec


@dataclass(slots=True)
class _Worker:
    process: subprocess.Popen
    tasks: deque[Task] = field(default_factory=deque)  # sent and not yet answered
    deadline: float = 0.0  # of the first of them
    served: int = 0
    warm: set[str] = field(default_factory=set)  # domains it has imported
    outbox: memoryview | bytes = b""  # what its pipe has not taken yet
    inbox: bytearray = field(default_factory=bytearray)

    @property
    def to(self) -> int:
        assert self.process.stdin is not None
        return self.process.stdin.fileno()

    @property
    def back(self) -> int:
        assert self.process.stdout is not None
        return self.process.stdout.fileno()


class VerifierPool:
    """Worker processes that score responses. See the module for what a deadline and a death mean.

    workers: processes. deadline_s: wall time for one verdict. sandbox: "auto" | "trusted", or a level of
    `m2rl.domains.sandbox` by name; it is tried out when the first program is submitted, and InputError is raised
    there if this machine cannot isolate programs. "trusted" warns.

    counts: {domain: Counter of statuses} of all verdicts returned so far.
    """

    def __init__(self, workers: int = 1, deadline_s: float = 10.0, sandbox: str = "auto"):
        if workers < 1:
            raise ValueError(f"workers must be at least 1, got {workers}")
        if not deadline_s > 0:
            raise ValueError(f"deadline_s must be above 0, got {deadline_s}")
        if sandbox not in ("auto", *sandbox_module.LEVELS):
            raise ValueError(f"sandbox must be one of auto, {', '.join(sandbox_module.LEVELS)}, got {sandbox!r}")
        self.deadline_s, self.counts = deadline_s, dict[str, Counter[str]]()
        self._wanted, self._level = sandbox, ""
        self._queue: deque[Task] = deque()
        self._ready: list[tuple[int, Verdict]] = []
        self._attempts: Counter[int] = Counter()
        self._domain_of: dict[int, str] = {}
        self._workers = [self._start() for _ in range(workers)]

    def __enter__(self) -> VerifierPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def sandbox_level(self) -> str:
        """The level that programs run at; tries it out on first use. InputError if there is none."""
        if not self._level:
            self._level = sandbox_module.choose(self._wanted)
            if self._level == "trusted":
                warnings.warn(
                    'sandbox = "trusted": programs of the model run with limits only; they can read your files',
                    stacklevel=3,
                )
        return self._level

    @property
    def outstanding(self) -> int:
        """Tasks submitted whose verdicts poll() has not returned."""
        return len(self._domain_of)

    def submit(self, key: int, domain: str, response: str, spec: Mapping[str, Any]) -> None:
        """Hand in one response. Waits while QUEUE tasks wait already. ValueError for a key that is outstanding."""
        if not self._workers:
            raise ValueError("the pool is closed")
        if key in self._domain_of:
            raise ValueError(f"key {key} is outstanding already")
        if domain == "code":
            _ = self.sandbox_level  # refuses here, in the caller, where no isolation can be had
        self._domain_of[key] = domain
        self._queue.append((key, domain, response, spec))
        self._feed()
        while len(self._queue) > QUEUE:
            self._turn(0.1)

    def poll(self, timeout_s: float = 0.0) -> list[tuple[int, Verdict]]:
        """Verdicts that are ready, waiting up to `timeout_s` for the first."""
        until = time.monotonic() + timeout_s
        self._turn(0.0)
        while not self._ready and self._domain_of and (left := until - time.monotonic()) > 0:
            self._turn(left)
        out, self._ready = self._ready, []
        for key, verdict in out:
            self.counts.setdefault(self._domain_of.pop(key), Counter())[verdict.status] += 1
            self._attempts.pop(key, None)
        return out

    def drain(self) -> list[tuple[int, Verdict]]:
        """Every outstanding verdict."""
        out = []
        while self._domain_of:
            out += self.poll(1.0)
        return out

    def close(self) -> None:
        """End the workers and all they started; what is outstanding is dropped."""
        for worker in self._workers:
            self._stop(worker)
        self._workers, self._domain_of = [], {}
        self._queue.clear()
        self._ready.clear()

    # ---- workers ----

    def _start(self) -> _Worker:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "M2RL_PARENT": str(os.getpid())}
        process = subprocess.Popen(
            [sys.executable, "-m", "m2rl.domains.pool", str(self.deadline_s)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            start_new_session=True,
        )
        worker = _Worker(process)
        os.set_blocking(worker.to, False)
        return worker

    def _feed(self) -> None:
        """Give idle workers their next message."""
        for i, worker in enumerate(self._workers):
            if not self._queue:
                return
            if worker.tasks:
                continue
            if worker.served >= RECYCLE_AFTER:
                self._stop(worker)
                self._workers[i] = worker = self._start()
            most, cost = -(-len(self._queue) // len(self._workers)), 0
            while self._queue and cost < BATCH and len(worker.tasks) < most:
                cost += COST.get(self._queue[0][1], 1)
                worker.tasks.append(self._queue.popleft())
            payload = pickle.dumps((self._level or self._wanted, list(worker.tasks)))
            worker.outbox = memoryview(struct.pack("<Q", len(payload)) + payload)
            self._wind(worker)
            self._write(worker)

    def _wind(self, worker: _Worker) -> None:
        """Start the clock of a worker's first task."""
        if worker.tasks:
            extra = 0.0 if worker.tasks[0][1] in worker.warm else WARM_S
            worker.deadline = time.monotonic() + self.deadline_s + extra

    @staticmethod
    def _write(worker: _Worker) -> None:
        with contextlib.suppress(BlockingIOError, BrokenPipeError):  # a dead worker is noticed by _read
            while worker.outbox:
                worker.outbox = worker.outbox[os.write(worker.to, worker.outbox) :]

    def _turn(self, wait_s: float) -> None:
        """Read what has come, end what is overdue, hand out what waits."""
        busy = [w for w in self._workers if w.tasks]
        if busy:
            if not self._ready:
                wait_s = min(wait_s, max(0.0, min(w.deadline for w in busy) - time.monotonic()))
            poller = select.poll()
            for worker in busy:
                poller.register(worker.back, select.POLLIN)
                if worker.outbox:
                    poller.register(worker.to, select.POLLOUT)
            active = {fd for fd, _ in poller.poll(1000 * wait_s)}
            for worker in busy:
                if worker.to in active:
                    self._write(worker)
                if worker.back in active:
                    self._read(worker)
                elif time.monotonic() > worker.deadline:
                    self._end_first(worker, Verdict(0.0, "timeout", f"no verdict within {self.deadline_s:g} s"))
        self._feed()

    def _read(self, worker: _Worker) -> None:
        data = os.read(worker.back, 1 << 20)
        if not data:
            first = worker.tasks[0][0]
            self._attempts[first] += 1
            if self._attempts[first] >= ATTEMPTS:
                self._end_first(worker, Verdict(0.0, "error", "its verifier died twice"))
            else:
                self._replace(worker)
            return
        worker.inbox += data
        start = 0
        while len(worker.inbox) - start >= 8:
            size = struct.unpack_from("<Q", worker.inbox, start)[0]
            if len(worker.inbox) - start < 8 + size:
                break
            key, answer = pickle.loads(memoryview(worker.inbox)[start + 8 : start + 8 + size])
            start += 8 + size
            if key is None:
                worker.warm.add(answer)
            else:
                done = worker.tasks.popleft()
                assert done[0] == key, f"answer to {key}, expected {done[0]}"
                worker.served += 1
                self._ready.append((key, answer))
        del worker.inbox[:start]
        if start:
            self._wind(worker)

    def _end_first(self, worker: _Worker, verdict: Verdict) -> None:
        self._ready.append((worker.tasks.popleft()[0], verdict))
        self._replace(worker)

    def _replace(self, worker: _Worker) -> None:
        """A new worker in a place; what the old one had not answered goes back to the front of the queue."""
        self._stop(worker)
        self._queue.extendleft(reversed(worker.tasks))
        self._workers[self._workers.index(worker)] = self._start()

    @staticmethod
    def _stop(worker: _Worker) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(worker.process.pid, signal.SIGKILL)
        worker.process.wait()
        for pipe in (worker.process.stdin, worker.process.stdout):
            with contextlib.suppress(OSError):
                if pipe is not None:
                    pipe.close()


def _serve(deadline_s: float) -> None:
    """A worker: read a batch of tasks, answer one by one; ends with its parent."""
    import ctypes
    import resource

    from m2rl.domains import code, module, verify

    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != int(os.environ["M2RL_PARENT"]):
        return
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES if hard < 0 else min(hard, MEMORY_BYTES), hard))
    source, sink = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a verifier prints must not reach the answers
    code.limit_time(0.8 * deadline_s)
    warm = set()

    def answer(key: int | None, what: Any) -> None:
        payload = pickle.dumps((key, what))
        sink.write(struct.pack("<Q", len(payload)) + payload)
        sink.flush()

    while header := source.read(8):
        level, tasks = pickle.loads(source.read(struct.unpack("<Q", header)[0]))
        sandbox_module.use(level)
        for key, domain, response, spec in tasks:
            try:
                if domain not in warm:
                    warm.add(domain)
                    getattr(module(domain), "warm", lambda: None)()
                    answer(None, domain)
                verdict = verify(domain, response, spec)
            except Exception as error:
                verdict = Verdict(0.0, "error", f"{type(error).__name__}: {error}"[:200])
            answer(key, verdict)


if __name__ == "__main__":
    _serve(float(sys.argv[1]))
