"""A stalled engine ends its process with the reason; shared memory that a killed one left is removed, no other."""

import mmap
import os
import subprocess
import sys

import pytest

from m2rl.rollout.watchdog import EXIT_STATUS, Watchdog, remove_stale_segments

STALL = """
import ctypes, sys, time
from m2rl.rollout import watchdog
watchdog.GRACE_S = 1.0
dog = watchdog.Watchdog(1.0, "a fake engine")
def decode_forever():
    {stall}
for tokens in range(6):  # six tokens over two timeouts: no stall yet
    dog.progress(3, tokens)
    time.sleep(0.35)
{before}
decode_forever()
"""


def run(stall: str, before: str = "") -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", STALL.format(stall=stall, before=before)],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "RANK": "5"},
    )


def test_a_stall_ends_the_rank_with_reason_and_stacks():
    done = run("time.sleep(60)")
    assert done.returncode == EXIT_STATUS
    assert "rank 5: a fake engine generated no token for" in done.stderr and "3 requests in flight" in done.stderr
    assert "rollout.stall_timeout_s = 1" in done.stderr and "resumes from the last complete checkpoint" in done.stderr
    assert "decode_forever" in done.stderr  # the stack of the thread that hangs


def test_polling_without_a_token_is_a_stall_too():
    done = run("[(dog.progress(3, 5), time.sleep(0.05)) for _ in range(1000)]")
    assert done.returncode == EXIT_STATUS


def test_a_stall_that_holds_the_interpreter_lock_ends_as_well():
    done = run("ctypes.PyDLL(None).sleep(60)")  # no Python thread can run meanwhile
    assert done.returncode == 1 and "Timeout" in done.stderr and "decode_forever" in done.stderr


@pytest.mark.parametrize("idle", ["dog.progress(0, 6)", "dog.close()"])
def test_an_idle_or_closed_engine_is_never_a_stall(idle):
    """Training between two rollouts may take as long as it likes."""
    assert run("time.sleep(3.5)", idle).returncode == 0


def test_timeout_must_be_positive():
    with pytest.raises(ValueError, match="timeout_s must be above 0, got 0"):
        Watchdog(0, "an engine")


def test_only_segments_that_nobody_maps_are_removed(tmp_path):
    stale, used, other = (tmp_path / n for n in ("a-tp:0-cpushm_0", "b-tp:0-cpushm_1", "nccl-1"))
    for path in (stale, used, other):
        path.write_bytes(b"\0" * 4096)
    with open(used, "r+b") as file, mmap.mmap(file.fileno(), 0):
        assert remove_stale_segments("*-tp:*cpushm*", tmp_path) == ([stale.name], [used.name])
    assert not stale.exists() and used.exists() and other.exists()
    assert remove_stale_segments("*-tp:*cpushm*", tmp_path) == ([used.name], [])
    assert remove_stale_segments("*", tmp_path / "absent") == ([], [])
