"""Which rank rolls out which prompt, and the counters by which ranks agree on it while they decode."""

from __future__ import annotations

import os
from collections.abc import Iterator
from datetime import timedelta

import torch.distributed as dist


class Sharing:
    """Deals the prompts of one rollout to the ranks. Construction, and every rollout's `deal`, is collective.

    By position (the default) rank r takes prompts r, r + ranks, ...: a run repeats. With `pull` every rank draws its
    next prompt from one counter whenever it has room, so that the rank with the short responses takes more of them
    and none idles. Ranks that hold one engine together (tensor_parallel) are dealt the same prompts.
    """

    def __init__(self, pull: bool = False, tensor_parallel: int = 1):
        rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self.engine, self.engines = rank // tensor_parallel, world // tensor_parallel
        self.member, self.members = rank % tensor_parallel, tensor_parallel
        self.pull, self.rollouts = pull and self.engines > 1, 0
        self._store: dist.TCPStore | None = None
        self._own: dict[str, int] = {}
        if self.pull:
            host = os.environ.get("MASTER_ADDR", "127.0.0.1")
            port = [0]
            if rank == 0:
                self._store = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False)
                port = [self._store.port]
            dist.broadcast_object_list(port, src=0)
            if rank != 0:
                self._store = dist.TCPStore(host, port[0], is_master=False, timeout=timedelta(minutes=5))

    def deal(self, prompts: int) -> Iterator[int]:
        """Indices below `prompts` for this rank's engine, one at a time; with `pull`, drawn when asked for."""
        self.rollouts += 1
        if not self.pull:
            return iter(range(self.engine, prompts, self.engines))
        return self._pulled(prompts)

    def _pulled(self, prompts: int) -> Iterator[int]:
        turn = 0
        while True:
            # One member draws for the engine; the others read what it drew, for all must make the same calls.
            key = f"{self.rollouts}/draw/{self.engine}/{turn}"
            assert self._store is not None
            if self.member == 0:
                drawn = self.add("prompt") - 1
                if self.members > 1:
                    self._store.set(key, str(drawn))
            else:
                drawn = int(self._store.get(key))
            if drawn >= prompts:
                return
            yield drawn
            turn += 1

    def add(self, counter: str, amount: int = 1) -> int:
        """Add to a counter of this rollout that all ranks share; what it stands at then. Starts at 0."""
        if self._store is not None:
            return self._store.add(f"{self.rollouts}/{counter}", amount)
        key = f"{self.rollouts}/{counter}"
        self._own[key] = self._own.get(key, 0) + amount
        return self._own[key]
