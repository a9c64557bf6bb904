"""A run must end rather than hang: what watches the engine's tokens, and what an earlier hard end has left behind."""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from pathlib import Path

EXIT_STATUS = 75  # EX_TEMPFAIL: start the same command again, it resumes from the last complete checkpoint
GRACE_S = 10.0  # after the timeout, for a process whose interpreter lock is held and whose Python threads are stuck


class Watchdog:
    """Ends this process when requests are in flight and no token has come for `timeout_s` seconds.

    `progress` is told of every change; a daemon thread does the waiting. On a stall it prints the reason and the stacks
    of all threads to stderr and exits with status 75; torchrun then ends the other ranks. Should the stall hold the
    interpreter lock, faulthandler's own thread does the same GRACE_S later.
    """

    def __init__(self, timeout_s: float, what: str):
        if not timeout_s > 0:
            raise ValueError(f"timeout_s must be above 0, got {timeout_s}")
        self.timeout_s, self.what = timeout_s, what
        self.pending, self.tokens, self.since, self._armed_at = 0, 0, time.monotonic(), 0.0
        self._closed = threading.Event()
        threading.Thread(target=self._wait, name="m2rl-watchdog", daemon=True).start()

    def progress(self, pending: int, tokens: int) -> None:
        """pending: requests in flight; tokens: any number that changes whenever a token is generated."""
        now = time.monotonic()
        if pending == 0 or self.pending == 0 or tokens != self.tokens:
            self.since = now
        if pending == 0 and self.pending:
            faulthandler.cancel_dump_traceback_later()
            self._armed_at = 0.0
        elif pending and self.since == now and now - self._armed_at > min(1.0, self.timeout_s / 4):  # starts a thread
            faulthandler.dump_traceback_later(self.timeout_s + GRACE_S, exit=True)
            self._armed_at = now
        self.pending, self.tokens = pending, tokens

    def close(self) -> None:
        self._closed.set()
        faulthandler.cancel_dump_traceback_later()

    def _wait(self) -> None:
        while not self._closed.wait(min(self.timeout_s / 4, 5.0)):
            silent = time.monotonic() - self.since
            if self.pending and silent > self.timeout_s:
                rank = os.environ.get("RANK", "0")
                print(
                    f"m2rl: rank {rank}: {self.what} generated no token for {silent:.0f} s with {self.pending} "
                    f"requests in flight (rollout.stall_timeout_s = {self.timeout_s:g}); this rank ends with status "
                    f"{EXIT_STATUS}, the same command resumes from the last complete checkpoint. Stacks:",
                    file=sys.stderr,
                    flush=True,
                )
                faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
                sys.stderr.flush()
                os._exit(EXIT_STATUS)


def remove_stale_segments(pattern: str, folder: Path = Path("/dev/shm")) -> tuple[list[str], list[str]]:
    """Delete this user's shared-memory segments matching `pattern` that no process maps any more.

    A process that ends hard (a kill, the watchdog) leaves its named segments behind, and the next cannot create them.
    Returns the names deleted and the names still in use.
    """
    mine = [p for p in folder.glob(pattern) if p.stat().st_uid == os.getuid()] if folder.is_dir() else []
    if not mine:
        return [], []
    mapped = set()
    for maps in Path("/proc").glob("[0-9]*/maps"):
        try:
            text = maps.read_text(errors="replace")
        except OSError:  # gone meanwhile, or another user's
            continue
        mapped |= {p for p in mine if str(p) in text}
    stale = [p for p in mine if p not in mapped]
    for path in stale:
        path.unlink(missing_ok=True)
    return sorted(p.name for p in stale), sorted(p.name for p in mapped)
