"""Benchmarks: named sets of problems with the K, token budget and temperature they are scored at.

    load("math", tokenizer, config)  ->  Benchmark(name, prompts, k, temperature, max_new_tokens, notes)

The embedded domains are generated; they never run out and need no file.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from m2rl.config import Config, Data, Domain
from m2rl.data import eval_prompts
from m2rl.domains import procedural
from m2rl.domains.answers import final_answer
from m2rl.types import InputError, Prompt


@dataclass(frozen=True, slots=True)
class Benchmark:
    """Problems and how they are sampled."""

    name: str
    prompts: tuple[Prompt, ...]
    k: int  # samples per problem
    temperature: float
    max_new_tokens: int
    notes: tuple[str, ...] = ()  # what a reader of the score has to know


def load(name: str, tokenizer: PreTrainedTokenizerBase, config: Config) -> Benchmark:
    """The benchmark of that name, its prompts encoded for this tokenizer. InputError for an unknown name."""
    e = config.evaluation
    if name in procedural.DOMAINS:
        option = next((d for d in config.domain if d.name == name), Domain(name))
        held_out = dataclasses.replace(config, data=Data(eval=("procedural",)), domain=(option,))
        return Benchmark(name, tuple(eval_prompts(held_out, tokenizer)), e.k, e.temperature,
                         e.max_new_tokens or config.rollout.max_new_tokens)
    near = difflib.get_close_matches(name, procedural.DOMAINS, 1)
    raise InputError(f"--benchmarks: unknown benchmark {name}{f', did you mean {near[0]}?' if near else ''} "
                     f"(there are: {', '.join(procedural.DOMAINS)})")


# ---- final answers ---------------------------------------------------------------------------------------------------

ANSWER_DOMAINS = ("math", "science")
"""Domains whose responses end in an answer that can be voted on."""


def vote(text: str) -> str | None:
    """The final answer of a response, normalised for counting votes, not for judging; None if there is none."""
    found = final_answer(text.rpartition("</think>")[2])
    if found is None:
        return None
    found = re.sub(r"\\(?:text|mathrm|textbf|mathbf)\{([^{}]*)\}", r"\1", found)
    return re.sub(r"[\s$*_,.;()]|\\[,;! ]", "", found).lower() or None
