"""Programs of the model run in a forked child with resource limits and a deadline; its whole process group is killed after."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import io
import json
import os
import resource
import select
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

CPU_S = 2
WALL_S = 4.0
MEMORY_BYTES = 1 << 30
OUTPUT_BYTES = 1 << 20
FILE_BYTES = 1 << 20
_PR_SET_PDEATHSIG, _PR_SET_NO_NEW_PRIVS = 1, 38


@dataclass(slots=True)
class Result:
    """What a program computed, test by test, until it ended or was ended."""

    outputs: list[Any] = field(default_factory=list)
    error: str = "no output"
    timeout: bool = False


def call(source: str, name: str, arguments: Sequence[Sequence[Any]]) -> Result:
    """Define the program once and call its function on every list of arguments, in one child."""
    return _call(source, name, json.dumps(arguments))


@functools.lru_cache(4096)  # the samples of a group often write the same program
def _call(source: str, name: str, arguments: str) -> Result:
    def child(out: int) -> None:
        namespace: dict[str, Any] = {"__name__": "__main__"}
        with os.fdopen(out, "w") as pipe:
            try:
                exec(compile(source, "program.py", "exec"), namespace)
                function = namespace[name] if name in namespace else getattr(namespace["Solution"](), name)
                for args in json.loads(arguments):
                    pipe.write(json.dumps({"output": function(*args)}) + "\n")
            except BaseException as error:
                pipe.write(json.dumps({"error": f"{type(error).__name__}: {error}"[:200]}) + "\n")

    data, timeout = _in_child(child, b"")
    result = Result(timeout=timeout, error="ran out of time" if timeout else "no output")
    for line in data.decode("utf-8", "replace").splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            break
        if "output" in record:
            result.outputs.append(record["output"])
        else:
            result.error = str(record.get("error"))
    return result


def run(source: str, inputs: Sequence[str], expected: Sequence[str]) -> Result:
    """Run the program once per stdin text; stops at the first output that is not the expected one."""
    result = Result()
    for text, want in zip(inputs, expected):
        def child(out: int) -> None:
            os.dup2(out, 1)
            sys.stdin = io.TextIOWrapper(os.fdopen(0, "rb"), encoding="utf-8")
            sys.stdout = io.TextIOWrapper(os.fdopen(1, "wb"), encoding="utf-8", write_through=False)
            try:
                exec(compile(source, "program.py", "exec"), {"__name__": "__main__"})
            finally:
                sys.stdout.flush()

        data, timeout = _in_child(child, text.encode())
        if timeout:
            result.timeout, result.error = True, "ran out of time"
            break
        result.outputs.append(data.decode("utf-8", "replace"))
        if not same_text(result.outputs[-1], want):
            break
    return result


def same_text(got: str, want: str) -> bool:
    """Equal line by line, trailing blanks and blank end lines aside."""
    return [line.rstrip() for line in got.rstrip().split("\n")] == [line.rstrip() for line in want.rstrip().split("\n")]


def _in_child(work, stdin: bytes) -> tuple[bytes, bool]:
    """Run `work(pipe)` in a limited child of its own process group; its pipe's bytes and whether it ran out of time."""
    read, write = os.pipe()
    with tempfile.TemporaryDirectory(prefix="m2rl-") as folder, tempfile.TemporaryFile() as feed:
        feed.write(stdin)
        feed.seek(0)
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                os.close(read)
                _limit(folder, feed.fileno())
                work(write)
                status = 0
            except BaseException:
                pass
            finally:
                with contextlib.suppress(BaseException):
                    sys.stdout.flush()
                os._exit(status)
        os.close(write)
        data, deadline, timeout = bytearray(), time.monotonic() + WALL_S, False
        while len(data) < OUTPUT_BYTES:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([read], [], [], left)[0]:
                timeout = True
                break
            chunk = os.read(read, 65536)
            if not chunk:
                break
            data += chunk
        os.close(read)
        for kill in (lambda: os.killpg(pid, signal.SIGKILL), lambda: os.kill(pid, signal.SIGKILL)):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                kill()
        _, status = os.waitpid(pid, 0)
        if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGXCPU:
            timeout = True
    return bytes(data), timeout


def _limit(folder: str, stdin: int) -> None:
    os.setsid()
    libc = ctypes.CDLL(None)
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(stdin, 0)
    os.dup2(null, 1)
    os.dup2(null, 2)
    os.chdir(folder)
    for number in range(1, signal.NSIG):
        with contextlib.suppress(OSError, ValueError):
            signal.signal(number, signal.SIG_DFL)
    for limit, value in ((resource.RLIMIT_CPU, CPU_S), (resource.RLIMIT_AS, MEMORY_BYTES), (resource.RLIMIT_FSIZE, FILE_BYTES),
                         (resource.RLIMIT_NOFILE, 64), (resource.RLIMIT_CORE, 0)):
        resource.setrlimit(limit, (value, value))
