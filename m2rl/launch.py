"""What every command does around its work: process group, device, signals, and errors as one line with an exit
status."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from m2rl.types import InputError

COLLECTIVE_TIMEOUT = timedelta(minutes=60)  # a rank may wait this long for the longest rollout of another


@contextlib.contextmanager
def process_group(threads: int, always: bool = False) -> Iterator[torch.device]:
    """Join the ranks that torchrun started and yield this rank's device. Without torchrun the process is alone: no
    group, or a group of one if `always` (FSDP's mixed precision needs one)."""
    torch.set_num_threads(threads)
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    torchrun = "WORLD_SIZE" in os.environ
    started = (torchrun or always) and not dist.is_initialized()
    if started:
        alone: dict[str, Any] = {} if torchrun else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=COLLECTIVE_TIMEOUT, **alone)
    try:
        yield device
    finally:
        if started and dist.is_initialized() and "vllm" not in sys.modules:  # vLLM ends the groups itself, at exit
            dist.destroy_process_group()


class Stopping:
    """SIGTERM and SIGINT ask the run to save and end; `agreed` tells every rank the same answer at the same step."""

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[int, object] = {}

    def __enter__(self) -> Stopping:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _on_signal(self, number: int, frame: object) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt  # a second Ctrl-C does not wait for the step to end
        self.requested = True

    def agreed(self) -> bool:
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return self.requested
        flag = torch.tensor([int(self.requested)])
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag.item())


def on_rank_0(work: Callable[[], object]) -> None:
    """Run on one rank while the others wait; its InputError is raised on all of them."""
    alone = not dist.is_initialized() or dist.get_world_size() == 1
    if alone:
        work()
        return
    message: list[str | None] = [None]
    if dist.get_rank() == 0:
        try:
            work()
        except (InputError, OSError) as error:
            message = [str(error)]
    dist.broadcast_object_list(message, src=0)
    if message[0] is not None:
        raise InputError(message[0])


def exit_with(main: Callable[[], int | None]) -> None:
    """Run a command; wrong input and a full disk become one line and exit status 2, Ctrl-C status 130."""
    try:
        sys.exit(main() or 0)
    except InputError as error:
        _end(str(error))
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        where = f" writing {Path(error.filename)}" if error.filename else ""
        _end(f"the disk is full{where}; checkpoints saved before are intact")
    except KeyboardInterrupt:
        sys.exit(130)
    except SystemExit as stop:
        if stop.code == 2:  # the option parser has said what is wrong
            _tell_torchrun("the command line is wrong: see the message above")
        raise


def _end(message: str) -> NoReturn:
    if is_leader():
        print(f"m2rl: {message}", file=sys.stderr, flush=True)
    _tell_torchrun(f"m2rl: {message}")
    sys.exit(2)


def _tell_torchrun(message: str) -> None:
    """torchrun ends its own long report with what this file says: there the reason is read even by who missed it."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        shown = {"py_callstack": message, "timestamp": int(time.time())}
        report = {"message": {"message": message, "extraInfo": shown}}
        with contextlib.suppress(OSError):
            Path(path).write_text(json.dumps(report))


def is_leader() -> bool:
    return os.environ.get("RANK", "0") == "0"


@contextlib.contextmanager
def leader_speaks() -> Iterator[None]:
    """What every rank would print is printed once."""
    if is_leader():
        yield
        return
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        yield
