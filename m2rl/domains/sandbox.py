"""Programs of the model run shut in: no network, no processes, no files but the interpreter's libraries, a scratch
folder that vanishes, and limits on memory, time, output and file size.

    bwrap       a file system of its own (bubblewrap), all namespaces; Landlock inside where the kernel has it
    namespaces  user, PID, network, IPC and mount namespaces; Landlock closes the file system; a tmpfs as scratch
    landlock    Landlock alone, for containers that allow no namespaces; no scratch folder
    trusted     limits alone: files are readable and writable as the user's own. Only on request, and with a warning

Every level has the rlimits and the system-call filter of `seccomp` (trusted: where the machine is known). "auto" is the
first of the three that passes its own test, which tries to get out; if none does, `choose` refuses.

    Box(level).run(source, stdin=...)      -> Outcome     one child per call, forked from a warm process (about 1 ms)
    Box(level).run(source, calls=(f, [[args], ...]))
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import os
import platform
import select
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from m2rl.domains import seccomp
from m2rl.types import InputError

LEVELS = ("bwrap", "namespaces", "landlock", "trusted")
MEMORY_BYTES = 1 << 30
FILE_BYTES = 16 << 20
OUTPUT_BYTES = 8 << 20  # of stdout, and of the results of calls
START_S = 20.0  # for the warm process to answer; a loaded machine takes seconds
GRACE_S = 5.0  # beyond a deadline before the warm process itself counts as lost: a loaded machine takes seconds
PRELOAD = ("numpy",)  # libraries worth loading before the fork when a program names them
_SCRATCH = "/scratch"
_DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom", "/dev/random")
_CHILD = Path(__file__).with_name("sandbox_child.py")
_MODULES = (
    "string",
    "re",
    "datetime",
    "collections",
    "heapq",
    "bisect",
    "copy",
    "math",
    "random",
    "statistics",
    "itertools",
    "functools",
    "operator",
    "io",
    "sys",
    "json",
    "builtins",
    "typing",
)
PRELUDE = "".join(f"from {m} import *\nimport {m}\n" for m in _MODULES)
"""What LeetCode-style problems find imported, and the LiveCodeBench grader provides."""

End = Literal["exit", "error", "timeout", "output", "killed"]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one child did."""

    end: End  # exit; error: uncaught exception; timeout; output: more than 8 MiB; killed: by a signal
    out: str  # its stdout
    results: tuple[Any, ...]  # of calls that returned, in order
    detail: str  # the exception, if any


class BoxDied(RuntimeError):
    """The warm process ended or hung; it has been replaced."""


def choose(level: str = "auto") -> str:
    """The level that will be used; InputError if it, or for "auto" any, cannot be had here."""
    if level != "auto" and level not in LEVELS:
        raise InputError(f"sandbox must be auto or one of {', '.join(LEVELS)}, got {level!r}")
    if level == "trusted":
        return level
    reasons = []
    for name in LEVELS[:3] if level == "auto" else (level,):
        reason = probe(name)
        if reason is None:
            return name
        reasons.append(f"{name}: {reason}")
    tried = "; ".join(reasons)
    raise InputError(
        f"no isolation for programs of the model on this machine ({tried}). Install bubblewrap, "
        "allow user namespaces or Landlock, or set rollout.sandbox to trusted to run them without"
    )


@functools.cache
def probe(level: str) -> str | None:
    """None if a program at this level runs and cannot get out, else the reason. Tried once per process."""
    with tempfile.TemporaryDirectory(prefix="m2rl-probe-") as folder:
        secret = Path(folder, "secret")
        secret.write_text("secret")
        try:
            with Box(level) as box:
                outcome = box.run(_ESCAPES, stdin=json.dumps([str(secret), str(Path(folder, "new")), str(_CHILD)]))
        except (OSError, BoxDied, ValueError) as error:
            return str(error)
        if outcome.end != "exit" or outcome.out != "shut in":
            return f"its self-test failed: {outcome.out or outcome.detail or outcome.end}"
        return "it let a program write outside" if Path(folder, "new").exists() else None


_ESCAPES = """
import json, os, socket, sys
secret, new, project = json.load(sys.stdin)
def read(): open(secret).read()
def read_project(): open(project).read()
def write(): open(new, "w")
def network(): socket.socket().connect(("127.0.0.1", 9))
def fork(): os.fork()
def run(): os.execv(sys.executable, ["python", "-c", ""])
def signal(): os.kill(os.getppid() or 1, 0)
for attempt in (read, read_project, write, network, fork, run, signal):
    try:
        attempt()
    except ConnectionError:
        print("it reaches the network", end="")
        break
    except OSError:
        continue
    print("it lets a program", attempt.__name__, end="")
    break
else:
    print("shut in", end="")
"""


def _readable() -> list[str]:
    """What the interpreter and its installed libraries need: not /etc, not the project, not the home."""
    paths = {
        "/lib",
        "/lib64",
        "/usr/lib",
        "/usr/lib64",
        "/usr/local/lib",
        "/etc/ld.so.cache",
        _python(),
        *(str(Path(sys.base_prefix, name)) for name in ("lib", "lib64")),
        *(sysconfig.get_paths()[key] for key in ("stdlib", "platstdlib")),
        *_packages(),
    }
    return sorted(p for p in paths if os.path.exists(p))


def _python() -> str:
    return os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable)


def _packages() -> list[str]:
    return list(dict.fromkeys(sysconfig.get_paths()[key] for key in ("purelib", "platlib")))


def _bwrap(readable: Sequence[str]) -> list[str]:
    program = shutil.which("bwrap")
    if program is None:
        raise OSError("bubblewrap (bwrap) is not installed")
    command = [
        program,
        "--unshare-all",
        "--die-with-parent",
        "--new-session",
        "--cap-drop",
        "ALL",
        "--clearenv",
        "--hostname",
        "sandbox",
    ]
    for key, value in _environment(_SCRATCH).items():
        command += ["--setenv", key, value]
    command += ["--size", str(64 << 20), "--tmpfs", _SCRATCH]
    for path in readable:  # sorted: a folder comes before what lies in it
        command += (
            ["--symlink", os.readlink(path), path]
            if path in ("/lib", "/lib64") and os.path.islink(path)
            else ["--ro-bind", path, path]
        )
    for device in _DEVICES:
        command += ["--dev-bind", device, device]
    return [*command, "--remount-ro", "/", "--chdir", _SCRATCH]


def _environment(home: str) -> dict[str, str]:
    return {
        "HOME": home,
        "TMPDIR": home,
        "LANG": "C.UTF-8",
        "PYTHONHASHSEED": "0",
        "PYTHONUTF8": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
    }


class Box:
    """A warm process at one level. OSError if it does not start; used by one thread at a time."""

    def __init__(self, level: str):
        if level not in LEVELS:
            raise ValueError(f"level must be one of {', '.join(LEVELS)}, got {level!r}")
        self.level = level
        self.owner = os.getpid()
        self._start()

    def __enter__(self) -> Box:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self) -> None:
        readable, level = _readable(), self.level
        self.folder = tempfile.mkdtemp(prefix="m2rl-") if level == "trusted" else ""
        scratch = {"bwrap": _SCRATCH, "namespaces": _mount_point(readable)}.get(level, self.folder)
        machine = platform.machine()
        known = level != "trusted" or machine in seccomp.machines()
        code, pid_offsets = seccomp.program(machine) if known else (b"", [])
        config = {
            "level": level,
            "namespaces": level == "namespaces",
            "readable": readable,
            "devices": _DEVICES,
            "landlock": {"bwrap": "optional", "trusted": ""}.get(level, "required"),
            "scratch": scratch,
            "filter": code.hex(),
            "pid_offsets": pid_offsets,
            "packages": _packages(),
            "prelude_source": PRELUDE,
            "memory_bytes": MEMORY_BYTES,
            "file_bytes": FILE_BYTES,
            "parent": 0 if level == "bwrap" else os.getpid(),
        }
        inside = _bwrap(readable) if level == "bwrap" else []
        command = [*inside, _python(), "-s", "-S", "-P", "-c", _CHILD.read_text(), json.dumps(config)]
        self.control, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with far:
            self.process = subprocess.Popen(
                command,
                stdin=far.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                env=_environment(scratch or "/"),
                cwd="/",
                start_new_session=level == "trusted",  # the other levels end with their owner's process group
            )
        try:
            ready = self._receive(START_S)
        except BoxDied:
            self.process.kill()
            assert self.process.stderr is not None
            text = self.process.stderr.read().decode("utf-8", "replace").strip()
            self.close()
            raise OSError(text.splitlines()[-1][:300] if text else f"no answer within {START_S:g} s") from None
        if not ready.get("ready"):
            self.close()
            raise OSError(str(ready.get("error")))

    def run(
        self,
        source: str,
        stdin: str | None = None,
        calls: tuple[str, Sequence[Sequence[Any]]] | None = None,
        *,
        cpu_s: float = 4.0,
        wall_s: float = 8.0,
        call_s: float | None = None,
        prelude: bool = False,
    ) -> Outcome:
        """Run a program once. `calls` = (function or method of Solution, argument lists): results instead of stdout.

        cpu_s bounds processor time (rounded up to seconds), wall_s all of it, call_s the wall time of one call. BoxDied
        if the warm process ended under it: it has been replaced, and the program may be tried again.
        """
        job: dict[str, Any] = {"source": source, "prelude": prelude}
        if calls is not None:
            job |= {"name": calls[0], "arguments": calls[1]}
        limits = {"cpu_s": cpu_s, "wall_s": wall_s, "preload": [m for m in PRELOAD if m in source]}
        out, out_end = os.pipe()
        report, report_end = os.pipe()
        feed = (stdin or "").encode("utf-8", "surrogatepass")
        given = (_memory(json.dumps(job).encode()), _memory(feed), out_end, report_end)
        try:
            try:
                socket.send_fds(self.control, [json.dumps(limits).encode()], given)
            finally:
                for fd in given:
                    os.close(fd)
            return self._watch(out, report, wall_s, call_s or wall_s)
        except (OSError, BoxDied) as error:
            self.close()
            self._start()
            raise BoxDied(f"the sandbox's warm process ended ({error})") from None
        finally:
            os.close(out)
            os.close(report)

    def _watch(self, out: int, report: int, wall_s: float, call_s: float) -> Outcome:
        """Read what the program writes until its end is told; have it ended at too much output or a call's deadline."""
        poll = select.poll()
        data = {out: bytearray(), report: bytearray()}
        for fd in (out, report, self.control.fileno()):
            poll.register(fd, select.POLLIN)
        began = called = time.monotonic()
        told, end = False, cast(End | None, None)
        while end is None:
            now = time.monotonic()
            if now > began + wall_s + GRACE_S:
                raise BoxDied("it does not answer")
            late, much = now > called + call_s, max(map(len, data.values())) > OUTPUT_BYTES
            if not told and (late or much):
                told = True
                self.control.send(json.dumps({"kill": "output" if much else "timeout"}).encode())
            for fd, _ in poll.poll(250):
                if fd == self.control.fileno():
                    end = self._receive(1.0)["end"]
                    continue
                chunk = os.read(fd, 1 << 18)
                if not chunk:
                    poll.unregister(fd)
                if not told:
                    data[fd] += chunk
                if fd == report:
                    called = now
        for fd, seen in data.items():  # what was left in the pipes
            os.set_blocking(fd, False)
            with contextlib.suppress(BlockingIOError):
                while len(seen) <= OUTPUT_BYTES and (chunk := os.read(fd, 1 << 18)):
                    seen += chunk
        if end == "exit" and max(map(len, data.values())) > OUTPUT_BYTES:
            end = "output"
        return _outcome(end, bytes(data[out]), bytes(data[report]))

    def _receive(self, timeout_s: float) -> dict[str, Any]:
        if not select.select([self.control], [], [], timeout_s)[0]:
            raise BoxDied("it does not answer")
        message = self.control.recv(1 << 16)
        if not message:
            raise BoxDied("it is gone")
        return json.loads(message)

    def close(self) -> None:
        """End the warm process, and by its namespaces or the kernel's parent-death signal everything it started."""
        if os.getpid() != self.owner:  # a fork of the owner must not end what it does not own
            return
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        self.control.close()
        if self.folder:
            shutil.rmtree(self.folder, ignore_errors=True)
        if self.process.stderr is not None:
            self.process.stderr.close()


def _memory(data: bytes) -> int:
    """A descriptor of an anonymous file with this content."""
    fd = os.memfd_create("m2rl")
    with open(fd, "wb", closefd=False) as file:
        file.write(data)
    os.lseek(fd, 0, os.SEEK_SET)
    return fd


def _mount_point(readable: Sequence[str]) -> str:
    """A folder that a tmpfs may cover in the program's own mount namespace: nothing it reads lies below."""
    for folder in ("/mnt", "/media", "/srv", "/var/tmp", "/tmp"):
        if os.path.isdir(folder) and not any(f"{p}/".startswith(f"{folder}/") for p in readable):
            return folder
    return ""


def _outcome(end: End, out: bytes, report: bytes) -> Outcome:
    results, detail = [], ""
    for line in report.splitlines():
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):  # the program wrote into the report, or ended within a line
            break
        if not isinstance(record, dict):
            break
        if "output" in record:
            results.append(record["output"])
        else:
            detail = str(record.get("error"))[:300]
    return Outcome(end, out.decode("utf-8", "surrogateescape"), tuple(results), detail)


# ---- this process's box ----------------------------------------------------------------------------------------------

_settings = {"level": "auto"}
_box: Box | None = None


def use(level: str) -> None:
    """The level that `box` has from now on; "auto" chooses at its first use."""
    global _box
    if _box is not None and _settings["level"] != level:
        _box.close()
        _box = None
    _settings["level"] = level


def box() -> Box:
    """The one box of this process, started at its first use."""
    global _box
    if _box is None or _box.owner != os.getpid():
        _box = Box(choose(_settings["level"]))
        atexit.register(_box.close)
    return _box
