"""Prompts -> verified samples: decoding and verification overlap, ranks share the prompts, every rank gets every sample."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch.distributed as dist
from transformers import PreTrainedTokenizerBase

from m2rl.domains.pool import VerifierPool
from m2rl.rollout.engine import Engine, Finished, Request, sample_seed
from m2rl.types import Prompt, Sample


class Progress(Protocol):
    def __call__(self, done: int, total: int) -> None: ...


def collect(engine: Engine, pool: VerifierPool, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], n: int, *,
            seed: int, step: int, max_new_tokens: int, temperature: float, progress: Progress | None = None,
            gather: bool = True, known: Mapping[tuple[str, int], Sample] | None = None,
            on_sample: Callable[[Sample], None] | None = None) -> list[Sample]:
    """`n` samples per prompt, verified, group by group in the order of `prompts`.

    Rank r rolls out prompts r, r + world, ...; with `gather` every rank returns the samples of all. Draws depend only on
    (seed, step, prompt id, sample index), so the result does not depend on the number of ranks. Samples in `known`, by
    (prompt id, index), are not generated again; `on_sample` sees every other one of this rank as soon as it is verified.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    mine = list(range(rank, len(prompts), world))
    slots = [(p, i) for p in mine for i in range(n)]
    known = known or {}
    samples = [known.get((prompts[p].id, i)) for p, i in slots]
    engine.submit(Request(k, prompts[p].tokens, sample_seed(seed, step, prompts[p].id, i), max_new_tokens, temperature)
                  for k, (p, i) in enumerate(slots) if samples[k] is None)
    end_ids = set(tokenizer.all_special_ids)
    verified = sum(s is not None for s in samples)

    def settle(results) -> int:
        for key, verdict in results:
            sample = samples[key]
            assert sample is not None
            sample.status, sample.detail = verdict.status, verdict.detail
            sample.reward = verdict.reward
            if on_sample:
                on_sample(sample)
        return len(results)

    while engine.pending:
        for finished in engine.poll():
            p, i = slots[finished.id]
            samples[finished.id] = sample = _sample(finished, prompts[p], i, tokenizer, end_ids)
            pool.submit(finished.id, sample.prompt.domain, sample.text, sample.prompt.spec)
        verified += settle(pool.poll(0.0))
        if progress:
            progress(verified, len(slots))
    while verified < len(slots):
        verified += settle(pool.poll(0.5))
        if progress:
            progress(verified, len(slots))
    done = [s for s in samples if s is not None]
    if world == 1 or not gather:
        return done
    parts: list[list[Sample]] = [[] for _ in range(world)]
    dist.all_gather_object(parts, done)
    by_prompt = {(r + j * world): part[j * n : (j + 1) * n] for r, part in enumerate(parts) for j in range(len(part) // n)}
    return [s for p in range(len(prompts)) for s in by_prompt[p]]


def _sample(finished: Finished, prompt: Prompt, index: int, tokenizer: PreTrainedTokenizerBase, end_ids: set[int]) -> Sample:
    tokens = finished.tokens
    text = tokenizer.decode(tokens[:-1] if tokens and tokens[-1] in end_ids else tokens, skip_special_tokens=True)
    return Sample(prompt, index, tokens, finished.logp, finished.finish, finished.weight_version, text=text)

