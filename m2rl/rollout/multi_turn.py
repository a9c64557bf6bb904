"""Conversations on an engine: several turns, one token stream, and a mask that says who wrote what.

    prompt | turn 1 | tools' answers | turn 2 | ...       tokens  [R], after the prompt
             True     False            True                mask    [R], trained only where True
             logp     0                logp                logp    [R], nats

The prompt carries the chat template already; it is applied there once and never again. What the model generated is
never tokenised again either: the environment's tokens are what the template puts between one assistant turn and the
next (end of turn, the tool messages, the header of the next turn), tokenised by themselves and appended. So the stream
that is trained on is, token for token, the context that the next turn was sampled from, and it equals the template's
own rendering of the whole conversation wherever the model's tokens are the tokenizer's.

`Conversation` is one such stream; `m2rl.rollout.collect` keeps many of them in flight on one engine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol

from m2rl.rollout.engine import Finished, Request, sample_seed
from m2rl.types import Prompt, Sample, Verdict


class Tokenizer(Protocol):
    """What is used of a Hugging Face tokenizer."""

    def apply_chat_template(
        self, conversation: list[dict[str, str]], *, tokenize: bool, add_generation_prompt: bool
    ) -> Any: ...
    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]: ...
    def decode(self, token_ids: list[int], *, skip_special_tokens: bool) -> str: ...


class Observation(Protocol):
    @property
    def messages(self) -> list[dict[str, str]] | None: ...
    @property
    def done(self) -> bool: ...


class Environment(Protocol):
    """The other side of one conversation, e.g. `m2rl.domains.agent.Episode`."""

    def step(self, text: str) -> Observation:
        """Answer one assistant turn."""
        ...

    def verdict(self) -> Verdict:
        """Score the conversation; one that is not done was cut short."""
        ...


_TURN = "an-assistant-turn-stood-here"  # plain text that no template rewrites
_LONGEST_END = 8  # tokens in which an assistant turn's end may overlap what the model wrote


def environment_tokens(tokens: Sequence[int], messages: Sequence[Mapping[str, str]], tokenizer: Tokenizer) -> list[int]:
    """The token ids [E] that stand between an assistant turn and the next one.

    tokens: what precedes, ending with the assistant turn as it was sampled; its end-of-turn token is not repeated when
    the model sampled it. messages: the environment's answers, e.g. {"role": "tool", "name": ..., "content": ...}.
    Raises ValueError if the template does not write an assistant turn exactly once.
    """
    turn = _TURN
    while any(turn in message["content"] for message in messages):
        turn += "!"
    conversation = [{"role": "user", "content": "?"}, {"role": "assistant", "content": turn}, *map(dict, messages)]
    text = tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
    if text.count(turn) != 1:
        raise ValueError(f"the chat template must write an assistant turn once, it wrote it {text.count(turn)} times")
    new = tokenizer.encode(text.partition(turn)[2], add_special_tokens=False)
    for n in range(min(_LONGEST_END, len(tokens), len(new)), 0, -1):
        if list(tokens[-n:]) == new[:n]:
            return new[n:]
    return new


class Conversation:
    """One response in the making: its tokens, mask and log-probabilities so far, and what to ask of the engine next."""

    def __init__(
        self,
        prompt: Prompt,
        index: int,
        environment: Environment,
        tokenizer: Tokenizer,
        *,
        max_new_tokens: int,
        run_seed: int,
        step: int,
        temperature: float,
    ) -> None:
        """max_new_tokens: of the whole response, shared by the model's and the environment's tokens."""
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
        self.prompt, self.index, self.environment = prompt, index, environment
        self.tokens: list[int] = []
        self.mask: list[bool] = []
        self.logp: list[float] = []
        self.turns = 0
        self._tokenizer = tokenizer
        self._max_new_tokens, self._temperature = max_new_tokens, temperature
        self._run_seed, self._step = run_seed, step
        self._finish: Literal["stop", "length", "abort"] = "stop"
        self._weight_version = 0

    def request(self, id: int) -> Request:
        """The next turn. Its seed depends on the prompt, the index and the turn, not on the order of events."""
        turn = f"/turn{self.turns}" if self.turns else ""  # the first turn draws as a single-turn response does
        return Request(
            id=id,
            tokens=(*self.prompt.tokens, *self.tokens),
            seed=sample_seed(self._run_seed, self._step, self.prompt.id + turn, self.index),
            max_new_tokens=self._max_new_tokens - len(self.tokens),
            temperature=self._temperature,
        )

    def take(self, turn: Finished) -> bool:
        """Take in one turn, whole or cut, and let the environment answer; True once nothing more is to be generated."""
        self._weight_version = min(self._weight_version, turn.weight_version) if self.turns else turn.weight_version
        self.turns += 1
        self._finish = turn.finish
        self.tokens += turn.tokens
        self.mask += [True] * len(turn.tokens)
        self.logp += turn.logp
        if turn.finish != "stop":
            return True
        seen = self.environment.step(self._tokenizer.decode(turn.tokens, skip_special_tokens=False))
        if seen.done:
            return True
        new = environment_tokens(self.tokens, seen.messages or (), self._tokenizer)
        if len(self.tokens) + len(new) >= self._max_new_tokens:
            self._finish = "length"  # no room for another turn: nothing after the model's last token is kept
            return True
        self.tokens += new
        self.mask += [False] * len(new)
        self.logp += [0.0] * len(new)
        return False

    def sample(self) -> Sample:
        """The finished sample, verified by its environment."""
        verdict = self.environment.verdict()
        return Sample(
            prompt=self.prompt,
            index=self.index,
            tokens=self.tokens,
            logp=self.logp,
            finish=self._finish,
            weight_version=self._weight_version,
            mask=self.mask,
            text=self._tokenizer.decode(self.tokens, skip_special_tokens=False),
            reward=verdict.reward,
            status=verdict.status,
            detail=verdict.detail,
        )


__all__ = ["Conversation", "Environment", "Tokenizer", "environment_tokens"]
