"""Hostile programs at the weakest level that has to stop them, and at the strongest there is here. See hostile.py."""

import ctypes
import importlib.util
import os
import platform
import secrets
import string
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import psutil
import pytest

from m2rl.domains import code, sandbox, seccomp
from m2rl.types import InputError

_spec = importlib.util.spec_from_file_location("hostile", Path(__file__).with_name("hostile.py"))
hostile = importlib.util.module_from_spec(_spec)
sys.modules["hostile"] = hostile
_spec.loader.exec_module(hostile)

VICTIM = """
import os, socket, sys, threading, time
word = os.environ["WORD"]
held = [word.encode() * 100]
tcp, unix = socket.create_server(("127.0.0.1", 0)), socket.socket(socket.AF_UNIX)
unix.bind(sys.argv[1]); unix.listen()
def serve(server):
    while True:
        try:
            peer = server.accept()[0]
            peer.sendall(word.encode())
            peer.close()
        except OSError:
            pass
for server in (tcp, unix):
    threading.Thread(target=serve, args=(server,), daemon=True).start()
print(tcp.getsockname()[1], flush=True)
time.sleep(600)
"""


class Scene:
    """What an attack wants: a word in a file, behind two sockets, and in a process."""

    def __init__(self, folder):
        self.word = f"word-{secrets.token_hex(16)}"
        self.folder = folder
        self.secret = folder / "answers.json"
        self.secret.write_text(self.word)
        self.secret.chmod(0o644)
        socket = folder / "socket"
        self.victim = subprocess.Popen(
            [sys.executable, "-c", VICTIM, str(socket)], stdout=subprocess.PIPE, env={**os.environ, "WORD": self.word}
        )
        self.values = {
            "SECRET": self.secret,
            "FOLDER": folder,
            "SOCKET": socket,
            "PID": self.victim.pid,
            "PORT": int(self.victim.stdout.readline()),
            "HOME": Path.home(),
            "PROJECT": Path(__file__).parents[2],
        }
        self.before = self.look()

    def look(self):
        status = self.secret.stat()
        outside = [
            p
            for d in (sysconfig.get_paths()["purelib"], os.path.dirname(os.__file__), "/", "/tmp")
            if (p := Path(d, "left_by_attack.py")).exists()
        ]
        return (
            self.secret.read_text(),
            status.st_mode,
            status.st_uid,
            status.st_mtime_ns,
            status.st_nlink,
            sorted(p.name for p in self.folder.iterdir()),
            outside,
        )

    def program(self, source):
        return string.Template(source).safe_substitute({k: str(v) for k, v in self.values.items()})


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    ctypes.CDLL(None).prctl(36, 1)  # orphans become children of this process: PR_SET_CHILD_SUBREAPER
    scene = Scene(tmp_path_factory.mktemp("scene"))
    yield scene
    scene.victim.kill()
    scene.victim.communicate()
    sandbox.use("auto")
    ctypes.CDLL(None).prctl(36, 0)


def strongest():
    try:
        return sandbox.choose("auto")
    except InputError:
        return None


def cases():
    """Level by level, so that each is started once; what only burns time, at one."""
    best = strongest() or "bwrap"
    for level in hostile.LEVELS:
        for attack in hostile.ATTACKS:
            if level == attack.stopped_by or (level == best and attack not in hostile.RESOURCES):
                yield pytest.param(attack, level, id=f"{attack.name}-{level}")


def living():
    """Processes below this one, dead ones reaped, the victim and what it started aside."""
    found = []
    for p in psutil.Process().children(recursive=True):
        try:
            if p.status() == psutil.STATUS_ZOMBIE:
                os.waitpid(p.pid, os.WNOHANG)
            else:
                found.append(p.pid)
        except (psutil.NoSuchProcess, ChildProcessError):
            continue
    return found


@pytest.mark.parametrize("attack, level", cases())
def test_it_gains_and_leaves_nothing(scene, attack, level):
    if level != "trusted" and (reason := sandbox.probe(level)):
        pytest.skip(f"{level}: {reason}")
    if platform.machine() not in seccomp.machines():
        pytest.skip(f"no system-call filter for {platform.machine()}: a fork bomb would be one")
    sandbox.use(level)
    sandbox.box()
    count = len(living())
    spec = {"tests": {"inputs": ["word\n"], "outputs": [scene.word]}, "time_limit_s": 0.3}
    code.limit_time(3)
    verdict = code.verify(f"```python\n{scene.program(attack.source)}```", spec)
    assert verdict.reward == 0 and verdict.status in ("wrong", "timeout"), verdict
    assert scene.word not in verdict.detail.partition("expected")[0]
    assert scene.look() == scene.before
    assert scene.victim.poll() is None and psutil.Process(scene.victim.pid).status() != psutil.STATUS_STOPPED
    # a program of its own, or its verdict would be remembered and nothing run
    honest = code.verify(f"```python\nprint('{scene.word}')  # {attack.name}\n```", spec | {"time_limit_s": 4})
    assert honest.reward == 1, honest
    deadline = time.monotonic() + 5
    while len(living()) > count and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(living()) <= count


def test_there_are_enough_and_each_names_its_level():
    assert len(hostile.ATTACKS) >= 40
    assert len({a.name for a in hostile.ATTACKS}) == len(hostile.ATTACKS)
    assert {a.stopped_by for a in hostile.ATTACKS} <= set(hostile.LEVELS)


def test_the_prize_is_real(scene):
    """Without isolation of files the word can be had: the attacks on it would score if nothing stopped them."""
    sandbox.use("trusted")
    attack = next(a for a in hostile.FILES if a.name == "reads the answers")
    spec = {"tests": {"inputs": [""], "outputs": [scene.word]}}
    assert code.verify(f"```python\n{scene.program(attack.source)}```", spec).reward == 1
    asks = [a for a in hostile.NETWORK if a.name in ("asks a server", "asks a Unix socket")]
    assert len(asks) == 2
    for ask in asks:
        done = subprocess.run([sys.executable, "-c", scene.program(ask.source)], capture_output=True, text=True)
        assert done.stdout.strip() == scene.word
