"""Verifiers in worker processes: warm, killable at a deadline, order-independent; nothing is lost when one dies.

    with VerifierPool(workers=2, deadline_s=10) as pool:
        pool.submit(key, domain, response, spec)
        for key, verdict in pool.poll(): ...
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
from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from m2rl.types import Verdict

BATCH = 32  # tasks per message: cheap verdicts are dominated by the round trip
RECYCLE_AFTER = 5000  # tasks; bounds what a leaking verifier can hold
ATTEMPTS = 2
Task = tuple[int, str, str, Mapping[str, Any]]  # key, domain, response, spec


@dataclass(slots=True)
class _Worker:
    process: subprocess.Popen
    tasks: list[Task] = field(default_factory=list)  # sent and not yet answered
    deadline: float = 0.0  # of the task at the head
    served: int = 0
    buffer: bytearray = field(default_factory=bytearray)


class VerifierPool:
    """`deadline_s` bounds one task from the moment its worker starts on it; then the worker is killed and the status is timeout."""

    def __init__(self, workers: int = 1, deadline_s: float = 10.0, sandbox: str = "auto"):
        if workers < 1:
            raise ValueError(f"workers must be at least 1, got {workers}")
        self.deadline_s, self.sandbox = deadline_s, sandbox
        self.queue: deque[Task] = deque()
        self.ready: list[tuple[int, Verdict]] = []
        self.attempts: Counter[int] = Counter()
        self.counts: dict[str, Counter[str]] = {}
        self.domain_of: dict[int, str] = {}
        self.workers = [self._start() for _ in range(workers)]

    def __enter__(self) -> VerifierPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self) -> _Worker:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "M2RL_PARENT": str(os.getpid())}
        process = subprocess.Popen([sys.executable, "-m", "m2rl.domains.pool", self.sandbox], stdin=subprocess.PIPE,
                                   stdout=subprocess.PIPE, env=environment, start_new_session=True)
        return _Worker(process)

    def submit(self, key: int, domain: str, response: str, spec: Mapping[str, Any]) -> None:
        self.domain_of[key] = domain
        self.queue.append((key, domain, response, spec))
        self._feed()

    def _feed(self) -> None:
        for i, worker in enumerate(self.workers):
            if self.queue and not worker.tasks:
                if worker.served >= RECYCLE_AFTER:
                    self._stop(worker)
                    self.workers[i] = worker = self._start()
                worker.tasks = [self.queue.popleft() for _ in range(min(BATCH, -(-len(self.queue) // len(self.workers))))]
                worker.deadline = time.monotonic() + self.deadline_s + (20.0 if not worker.served else 0.0)  # imports
                self._send(worker)

    def _send(self, worker: _Worker) -> None:
        payload = pickle.dumps([(k, d, r, dict(s)) for k, d, r, s in worker.tasks])
        with contextlib.suppress(BrokenPipeError):  # a dead worker is noticed by poll
            worker.process.stdin.write(struct.pack("<Q", len(payload)) + payload)
            worker.process.stdin.flush()

    def poll(self, timeout_s: float = 0.0) -> list[tuple[int, Verdict]]:
        """Verdicts that are ready, waiting up to `timeout_s` for the first."""
        until = time.monotonic() + timeout_s
        while True:
            busy = [w for w in self.workers if w.tasks]
            if not busy and not self.ready:
                return []
            wait = 0.0 if self.ready else max(0.0, min(until, *(w.deadline for w in busy)) - time.monotonic())
            readable = select.select([w.process.stdout for w in busy], [], [], wait)[0] if busy else []
            for worker in busy:
                if worker.process.stdout in readable:
                    self._read(worker)
                elif worker.tasks and time.monotonic() > worker.deadline:
                    self._end_head(worker, Verdict(0.0, "timeout", f"no verdict within {self.deadline_s:g} s"))
            self._feed()
            if self.ready or time.monotonic() >= until:
                out, self.ready = self.ready, []
                for key, verdict in out:
                    self.counts.setdefault(self.domain_of.pop(key), Counter())[verdict.status] += 1
                    self.attempts.pop(key, None)
                return out

    def drain(self) -> list[tuple[int, Verdict]]:
        """Every outstanding verdict."""
        out = []
        while self.queue or self.ready or any(w.tasks for w in self.workers):
            out += self.poll(1.0)
        return out

    def _read(self, worker: _Worker) -> None:
        data = os.read(worker.process.stdout.fileno(), 1 << 20)
        if not data:  # died while working on its head task: that one is tried once more, the others just move on
            head = worker.tasks[0]
            self.attempts[head[0]] += 1
            if self.attempts[head[0]] >= ATTEMPTS:
                self._end_head(worker, Verdict(0.0, "error", "its verifier died twice"))
            else:
                self._replace(worker, worker.tasks)
            return
        worker.buffer += data
        while len(worker.buffer) >= 8:
            size = struct.unpack_from("<Q", worker.buffer)[0]
            if len(worker.buffer) < 8 + size:
                break
            key, verdict = pickle.loads(bytes(worker.buffer[8 : 8 + size]))
            del worker.buffer[: 8 + size]
            assert worker.tasks[0][0] == key
            worker.tasks.pop(0)
            worker.served += 1
            worker.deadline = time.monotonic() + self.deadline_s
            self.ready.append((key, verdict))

    def _end_head(self, worker: _Worker, verdict: Verdict) -> None:
        self.ready.append((worker.tasks[0][0], verdict))
        self._replace(worker, worker.tasks[1:])

    def _replace(self, worker: _Worker, unfinished: list[Task]) -> None:
        self._stop(worker)
        self.queue.extendleft(reversed(unfinished))
        self.workers[self.workers.index(worker)] = self._start()

    @staticmethod
    def _stop(worker: _Worker) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(worker.process.pid, signal.SIGKILL)
        worker.process.wait()
        worker.process.stdin.close()
        worker.process.stdout.close()

    def close(self) -> None:
        for worker in self.workers:
            self._stop(worker)
        self.workers = []


def _serve() -> None:
    """A worker: read a batch of tasks, answer one by one; ends with its parent."""
    import ctypes

    from m2rl.domains import verify

    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != int(os.environ["M2RL_PARENT"]):
        return
    source, sink = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a verifier prints must not reach the answers
    while header := source.read(8):
        for key, domain, response, spec in pickle.loads(source.read(struct.unpack("<Q", header)[0])):
            try:
                verdict = verify(domain, response, spec)
            except Exception as error:
                verdict = Verdict(0.0, "error", f"{type(error).__name__}: {error}"[:200])
            payload = pickle.dumps((key, verdict))
            sink.write(struct.pack("<Q", len(payload)) + payload)
            sink.flush()


if __name__ == "__main__":
    _serve()
