"""What a command on several ranks does around its work: process group, device, signals."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

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
        # Gloo's threads outlive the group while a DeviceMesh holds it, and may still have to drop the tensors of the
        # last collective. Python up to 3.13 kills a thread that asks for the GIL once the interpreter is ending, and
        # the C++ around it aborts the process: let them have it before.
        if started:
            time.sleep(0.1)


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
