"""The seam between the loop and whatever generates text: six verbs, token ids in, token ids out.

`native.py` (default) and `vllm.py` implement `Engine`. The engine never sees a reward, a domain or a string.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

EVAL_STEP = -1  # evaluation draws from its own random stream, the same before, during and after training


@dataclass(frozen=True, slots=True)
class Request:
    """One response to generate."""

    id: int  # unique among the requests in flight; comes back with the result
    tokens: tuple[int, ...]  # prompt token ids
    seed: int  # 63 bits; the random draws of this response depend on it and on nothing else
    max_new_tokens: int
    temperature: float = 1.0  # 0 = greedy


@dataclass(slots=True)
class Finished:
    """One generated response."""

    id: int
    tokens: list[int]  # [R] the end token included when it was sampled
    logp: list[float]  # [R] log-probability of each token under the distribution it was drawn from, nats
    finish: Literal["stop", "length", "abort"]
    weight_version: int


class Engine(Protocol):
    """Continuous generation on one rank.

    `poll` advances the decoding of everything submitted and returns what finished meanwhile, possibly nothing; it never
    blocks for longer than one decoding step. Weights change only inside `sync`.
    """

    def submit(self, requests: Iterable[Request]) -> None: ...

    def poll(self) -> list[Finished]: ...

    def cancel(self, ids: Iterable[int]) -> list[Finished]:
        """Stop these requests; what they have so far comes back with finish='abort'."""
        ...

    @property
    def pending(self) -> int:
        """Requests submitted and not yet returned."""
        ...

    def sync(self, policy: Any, version: int) -> None:
        """Take the policy's weights; collective over the ranks. Drops every cached key and value."""
        ...

    def load(self, weights: Mapping[str, Any], version: int) -> None:
        """Take whole tensors by their Hugging Face names, e.g. a merge that was never on disk."""
        ...

    def sleep(self) -> None:
        """Give the accelerator's memory back to the trainer (no-op on CPU)."""
        ...

    def wake(self) -> None: ...

    def close(self) -> None: ...


def sample_seed(run_seed: int, step: int, prompt_id: str, index: int) -> int:
    """63-bit seed of one response: a function of the data alone, so it is the same on any rank, in any batch or
    order."""
    digest = hashlib.blake2b(f"{run_seed}/{step}/{prompt_id}/{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generate(engine: Engine, requests: Sequence[Request]) -> list[Finished]:
    """Submit all, wait for all; results in the order of the requests."""
    engine.submit(requests)
    done: dict[int, Finished] = {}
    while len(done) < len(requests):
        for finished in engine.poll():
            done[finished.id] = finished
    return [done[request.id] for request in requests]


__all__ = ["EVAL_STEP", "Engine", "Finished", "Request", "generate", "sample_seed"]
