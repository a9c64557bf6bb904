"""Prompts -> verified samples: verification overlaps decoding, ranks share prompts, every rank gets every sample."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch.distributed as dist
from transformers import PreTrainedTokenizerBase

from m2rl.domains import agent
from m2rl.domains.pool import VerifierPool
from m2rl.rollout.carry import CarryOver, Group
from m2rl.rollout.engine import Engine, Finished, Request, sample_seed
from m2rl.rollout.multi_turn import Conversation
from m2rl.rollout.sharing import Sharing
from m2rl.types import Prompt, Sample

ASK_EVERY_S = 0.05  # how often a rank asks what the others have finished; alone it need not ask


class Progress(Protocol):
    def __call__(self, done: int, total: int) -> None: ...


def collect(
    engine: Engine,
    pool: VerifierPool,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    n: int,
    *,
    seed: int,
    step: int,
    max_new_tokens: int,
    temperature: float,
    progress: Progress | None = None,
    known: Mapping[tuple[str, int], Sample] | None = None,
    on_sample: Callable[[Sample], None] | None = None,
    sharing: Sharing | None = None,
    ahead: int = 0,
    carry: CarryOver | None = None,
) -> list[Sample]:
    """`n` samples per prompt, verified, group by group in the order of `prompts`.

    `sharing` says which prompts are this rank's; every rank returns the samples of all. Draws depend on (seed, step,
    prompt id, sample index) alone, so the result does not depend on the number of ranks. Samples in
    `known`, by (prompt id, index), are not generated again; `on_sample` sees every other one of this rank as soon as it
    is verified. Agent prompts are conversations: their environment answers and judges here, between two polls.

    ahead: where ranks pull prompts, the requests that each keeps in flight. carry: the last groups may continue in the
    next call with the same object, whose result they then begin.
    """
    sharing = sharing or Sharing()
    known = known or {}
    groups: list[Group] = []
    talks: dict[int, Conversation] = {}  # by request id: responses of several turns
    flying: list[tuple[Group, int]] = []  # by request id
    waiting: dict[int, Sample] = {}  # by request id, at the verifiers
    end_ids = set(tokenizer.all_special_ids)
    verified = 0

    def start(group: Group) -> None:
        groups.append(group)
        requests = []
        for i, sample in enumerate(group.samples):
            if sample is None and group.prompt.domain == "agent":
                talks[len(flying)] = talk = Conversation(
                    group.prompt,
                    i,
                    agent.episode(group.prompt.spec),
                    tokenizer,  # type: ignore[arg-type]
                    max_new_tokens=max_new_tokens,
                    run_seed=seed,
                    step=step,
                    temperature=temperature,
                )
                requests.append(talk.request(len(flying)))
                flying.append((group, i))
            elif sample is None:
                begun, name = group.begun.get(i), group.prompt.id
                tokens = group.prompt.tokens
                if begun is not None:
                    tokens, name = (*tokens, *begun.tokens), f"{name}/carried"
                limit = max_new_tokens - len(begun.tokens if begun else ())
                requests.append(Request(len(flying), tokens, sample_seed(seed, step, name, i), limit, temperature))
                flying.append((group, i))
        engine.submit(requests)

    def finish(finished: Finished) -> None:
        nonlocal verified
        group, i = flying[finished.id]
        if (talk := talks.get(finished.id)) is not None:
            if finished.finish == "abort":
                return  # begun again in the next step: its environment does not outlive this one
            if not talk.take(finished):
                engine.submit([talk.request(finished.id)])
                return
            group.samples[i] = sample = talk.sample()
            verified += 1
            if on_sample and i % sharing.members == sharing.member:
                on_sample(sample)
            count(group)
            return
        whole = joined(group.begun.pop(i, None), finished)
        if whole.finish == "abort":
            group.begun[i] = whole
            return
        group.samples[i] = sample = _sample(whole, group.prompt, i, tokenizer, end_ids)
        if i % sharing.members == sharing.member:  # ranks of one engine share the verification
            waiting[finished.id] = sample
            pool.submit(finished.id, sample.prompt.domain, sample.text, sample.prompt.spec)
        count(group)

    def count(group: Group) -> None:
        if group.complete and carry is not None:
            sharing.add("carried done" if group.place[0] != step else "new done")

    def settle(timeout_s: float) -> None:
        nonlocal verified
        for key, verdict in pool.poll(timeout_s):
            sample = waiting.pop(key)
            sample.status, sample.detail, sample.reward = verdict.status, verdict.detail, verdict.reward
            verified += 1
            if on_sample:
                on_sample(sample)
        if progress:
            progress(verified, len(flying))

    mine, dealt, asked = sharing.deal(len(prompts)), False, 0.0
    for group in carry.take() if carry is not None else ():
        start(group)
    while True:
        while not dealt and (not sharing.pull or engine.pending < max(ahead, 1)):
            p = next(mine, None)
            dealt = p is None
            if p is not None:
                start(Group((step, p), prompts[p], [known.get((prompts[p].id, i)) for i in range(n)]))
        if not engine.pending:
            break
        for finished in engine.poll():
            finish(finished)
        settle(0.0)
        if carry is not None and dealt and (sharing.engines == 1 or time.monotonic() - asked > ASK_EVERY_S):
            asked = time.monotonic()
            if carry.enough(sharing, len(prompts)):
                for finished in engine.cancel(range(len(flying))):
                    finish(finished)
    while waiting:
        settle(0.5)
    if carry is not None:
        carry.leave([g for g in groups if not g.complete])
    done = [
        (g.place, i, s)
        for g in groups
        if g.complete
        for i, s in enumerate(g.samples)
        if i % sharing.members == sharing.member
    ]
    world = dist.get_world_size() if dist.is_initialized() else 1
    if world > 1:
        parts: list = [None] * world
        dist.all_gather_object(parts, done)
        done = [entry for part in parts for entry in part]
    return [s for _, _, s in sorted(done, key=lambda entry: entry[:2]) if s is not None]


def joined(begun: Finished | None, more: Finished) -> Finished:
    """A response that was begun by earlier weights, with its continuation."""
    if begun is None:
        return more
    return Finished(
        more.id,
        begun.tokens + more.tokens,
        begun.logp + more.logp,
        more.finish,
        min(begun.weight_version, more.weight_version),
    )


def _sample(
    finished: Finished, prompt: Prompt, index: int, tokenizer: PreTrainedTokenizerBase, end_ids: set[int]
) -> Sample:
    tokens = finished.tokens
    text: Any = tokenizer.decode(tokens[:-1] if tokens and tokens[-1] in end_ids else tokens, skip_special_tokens=True)
    return Sample(prompt, index, tokens, finished.logp, finished.finish, finished.weight_version, text=text)
