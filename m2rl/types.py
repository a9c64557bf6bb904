"""The nouns of m2rl: what flows through one training step. Read this file first.

    Prompt --engine--> Sample --verifier--> Verdict --objectives--> TrainRow --packing--> Bin --learner--> StepStats

TrainRow (objectives.py) and Bin (learner.py) hold arrays and tensors, and live with the code that makes them.

Tokens are the truth; text is derived from them for verifiers and logs only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

DOMAINS = ("math", "code", "science", "if", "agent")

Status = Literal["ok", "wrong", "unparsed", "timeout", "error"]
STATUSES: tuple[Status, ...] = ("ok", "wrong", "unparsed", "timeout", "error")
"""ok: judged right. wrong: judged and not right. unparsed: no answer found. timeout: the verifier or the program ran
out of time. error: the verifier failed on this input. Only `ok` may carry a reward above 0 in the binary domains."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """One question, tokenised once."""

    id: str  # stable across runs: "<domain>/<key of the row>"; seeds derive from it
    domain: str  # one of DOMAINS, or a user's own domain
    tokens: tuple[int, ...]  # what the model reads, chat template applied
    text: str  # the same as text, for logs
    spec: Mapping[str, Any]  # what the domain's verifier needs: answer, options, tests, constraints ...


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a verifier says of one response."""

    reward: float  # in [0, 1]
    status: Status
    detail: str = ""  # one short line for a human: which test failed, what was extracted


@dataclass(slots=True)
class Sample:
    """One response to one prompt, as the engine produced it and the verifier judged it."""

    prompt: Prompt
    index: int  # position in the prompt's group, 0..group_size-1
    tokens: list[int]  # [R] response token ids, the end token included when it was sampled
    logp: list[float]  # [R] behaviour log-probability of each token, nats, at the sampling temperature
    finish: Literal["stop", "length", "abort"]
    weight_version: int  # optimizer steps taken by the weights that sampled it
    mask: list[bool] | None = None  # [R] False where the environment wrote the token (multi-turn); None = all True
    text: str = ""
    reward: float = float("nan")  # NaN until verified, and for a sample that has to be left out
    status: Status | None = None
    detail: str = ""


@dataclass(slots=True)
class StepStats:
    """What one optimizer step reports; scalars on the host, read once at the end of the step."""

    loss: float
    grad_norm: float
    skipped: bool  # True when the gradient was not finite and no update was made
    tokens: int  # tokens through the model, prompts included, all ranks
    trained_tokens: int  # tokens with a non-zero weight, all ranks
    per_domain: dict[str, dict[str, float]] = field(default_factory=dict)  # entropy, mismatch k3, clip share ...


class InputError(ValueError):
    """The user's input is wrong. The message is one sentence naming the file, line, key and rule; commands print it,
    exit 2."""
