"""Rows -> prompts and demonstrations in tokens, and the stateless mixture that draws them: batch = f(seed, step)."""

from __future__ import annotations

import glob
import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from transformers import PreTrainedTokenizerBase

from m2rl.config import Config, Domain
from m2rl.data import blend, hub
from m2rl.data.rows import Row, Shelf, files, normalise, positioned_records
from m2rl.domains import check_spec, procedural, reasoning_gym
from m2rl.types import InputError, Prompt

# ---- tokens --------------------------------------------------------------------------------------------------------

GENERATED = ("procedural", "reasoning_gym")  # in place of files
TEMPLATE_TOKENS = 128  # of roles and tool instructions, at most


def whereabouts(pattern: str) -> str:
    """Where an entry of data.train or data.eval comes from, "" if it is nowhere; nothing is read or downloaded."""
    if pattern in GENERATED:
        return "generated"
    if pattern.startswith(hub.PREFIX):
        return "on the hub, downloaded when the run starts"
    found = len(glob.glob(pattern, recursive=True))
    return f"{found} file(s)" if found else ""


class Encoder:
    """Rows to tokens: the domain's system prompt and template, then the tokenizer's chat template, each once."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, domains: Sequence[Domain] = ()):
        self.tokenizer, self.options = tokenizer, {d.name: d for d in domains}

    def _chat(self, row: Row, where: str) -> list[dict[str, Any]] | None:
        """The row as messages, or None for a text row under a tokenizer without a chat template."""
        option = self.options.get(row.domain, Domain(row.domain))
        self.check_template(row, where)
        if not self.tokenizer.chat_template:
            return None
        messages = [dict(m) for m in (row.messages or ({"role": "user", "content": row.prompt},))]
        if option.system_prompt and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": option.system_prompt})
        for m in reversed(messages):
            if m["role"] == "user":
                m["content"] = option.prompt_template.replace("{prompt}", str(m["content"]))
                break
        return messages

    def check_template(self, row: Row, where: str) -> None:
        """InputError for chat messages that the tokenizer cannot render."""
        if row.messages is not None and not self.tokenizer.chat_template:
            raise InputError(f"{where}: the row holds chat messages, and the tokenizer has no chat template")

    def _text(self, row: Row) -> str:
        option = self.options.get(row.domain, Domain(row.domain))
        return option.system_prompt + option.prompt_template.replace("{prompt}", row.prompt)

    def _ids(self, text: str, plain: bool) -> list[int]:
        return self.tokenizer(text, add_special_tokens=plain).input_ids

    def prompt(self, row: Row, where: str = "") -> Prompt:
        """The tokens a policy answers to."""
        messages = self._chat(row, where or row.id)
        tools = row.spec.get("tools")
        text = self._text(row) if messages is None else self._render(messages, True, where or row.id, tools)
        return Prompt(row.id, row.domain, tuple(self._ids(text, messages is None)), text, self.spec(row))

    def spec(self, row: Row) -> dict[str, Any]:
        """The row's spec with the options of its domain."""
        option = self.options.get(row.domain, Domain(row.domain))
        spec = dict(row.spec)
        spec |= {"think_gate": option.think_gate} if option.think_gate else {}
        spec |= {"preset": option.preset} if option.preset != "strict" else {}
        spec |= {"tables_dir": option.tables_dir} if option.tables_dir else {}
        return spec

    def _render(self, messages: list[dict[str, Any]], generation: bool, where: str, tools: Any = None) -> str:
        try:
            text = self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=generation, tools=tools
            )
            return str(text)
        except Exception as error:  # the template is a program of the model's author: it may raise anything
            raise InputError(f"{where}: the tokenizer's chat template refused the messages: {error}") from None

    def demonstration(self, row: Row, where: str = "") -> tuple[list[int], list[bool]]:
        """(tokens, trained): loss on assistant tokens only, the token that ends each turn included."""
        where = where or row.id
        messages = self._chat(row, where)
        if messages is None:
            if row.response is None:
                raise InputError(f"{where}: SFT needs key response, or messages that end with the assistant")
            head, tail = self._ids(self._text(row), True), self._ids(row.response, False)
            tail = [*tail, self.tokenizer.eos_token_id]
            return head + tail, [False] * len(head) + [True] * len(tail)
        if row.response is not None:
            messages.append({"role": "assistant", "content": row.response})
        if messages[-1]["role"] != "assistant":
            raise InputError(
                f"{where}: SFT needs messages that end with the assistant, or a prompt with a response; these messages "
                f"end with {messages[-1]['role']}"
            )
        tools = row.spec.get("tools")
        full = self._render(messages, False, where, tools)
        tokens: list[int] = []
        trained: list[bool] = []
        done = 0
        for i, m in enumerate(messages):
            if m["role"] != "assistant":
                continue
            before = self._render(messages[:i], True, where, tools)
            after = self._render(messages[: i + 1], False, where, tools)
            if not (full.startswith(before) and full.startswith(after) and len(after) >= len(before)):
                continue  # templates that rewrite earlier turns (Qwen3 drops their thinking): train the turns they keep
            end = len(after.rstrip("\n")) if full[: len(after)].endswith("\n") else len(after)
            for piece, train in ((full[done : len(before)], False), (full[len(before) : end], True)):
                ids = self._ids(piece, False)
                tokens += ids
                trained += [train] * len(ids)
            done = end
        if not any(trained):
            raise InputError(f"{where}: the chat template keeps no assistant turn to train on")
        return tokens, trained


# ---- sources -------------------------------------------------------------------------------------------------------


class Source(Protocol):
    """Prompts (or demonstrations) of one domain, by index; size None = unlimited."""

    size: int | None

    def prompt(self, index: int) -> Prompt: ...

    def demonstration(self, index: int) -> tuple[list[int], list[bool]]: ...


class FileSource:
    """Rows of one domain on disk, read and tokenised when drawn."""

    def __init__(self, domain: str, shelf: Shelf, encoder: Encoder):
        self.domain, self.shelf, self.encoder = domain, shelf, encoder
        self.size: int | None = len(shelf)

    def row(self, index: int) -> Row:
        where = f"{self.domain} row {index}"
        record = blend.plain(self.shelf[index], where)
        assert not isinstance(record, str)  # load_sources left such rows out
        return normalise(record, where, self.domain)

    def prompt(self, index: int) -> Prompt:
        return self.encoder.prompt(self.row(index))

    def demonstration(self, index: int) -> tuple[list[int], list[bool]]:
        return self.encoder.demonstration(self.row(index))


class ProceduralSource:
    """Generated problems of one embedded domain; demonstrations of mixed quality."""

    size: int | None = None

    def __init__(self, domain: str, seed: int, encoder: Encoder, sloppy_scale: float = 1.0):
        self.domain, self.seed, self.encoder, self.sloppy_scale = domain, seed, encoder, sloppy_scale

    def prompt(self, index: int) -> Prompt:
        problem = procedural.problem(self.domain, self.seed, index)
        return self.encoder.prompt(
            Row(f"{self.domain}/{problem.prompt}", self.domain, None, problem.prompt, None, problem.spec)
        )

    def demonstration(self, index: int) -> tuple[list[int], list[bool]]:
        problem = procedural.problem(self.domain, self.seed, index)
        response = procedural.demonstration(problem, self.seed, index, self.sloppy_scale)
        return self.encoder.demonstration(Row("", self.domain, None, problem.prompt, response, {}))


class ReasoningGymSource:
    """Generated problems of one task of Reasoning Gym."""

    size: int | None = None

    def __init__(self, domain: str, seed: int, encoder: Encoder):
        self.domain, self.seed, self.encoder = domain, seed, encoder
        self.prompt(0)  # an unknown task, or a missing library, shows here

    def prompt(self, index: int) -> Prompt:
        question, spec = reasoning_gym.problem(self.domain, self.seed, index)
        return self.encoder.prompt(Row(f"{self.domain}/{self.seed}-{index}", self.domain, None, question, None, spec))

    def demonstration(self, index: int) -> tuple[list[int], list[bool]]:
        raise InputError(f"domain {self.domain}: Reasoning Gym has problems, not demonstrations; SFT needs other data")


def generated(config: Config) -> list[str]:
    """The [[domain]]s that "procedural" stands for."""
    return [d.name for d in config.domain if not d.name.startswith(reasoning_gym.PREFIX)]


def reasoning_gym_domains(config: Config) -> list[str]:
    names = [d.name for d in config.domain if d.name.startswith(reasoning_gym.PREFIX)]
    if not names:
        raise InputError('data: "reasoning_gym" needs a [[domain]] for each task, e.g. name = "rg_gcd"')
    return names


@dataclass(frozen=True)
class Loaded:
    """What a set of files held."""

    sources: dict[str, Source]
    skipped: dict[str, int]  # domain -> rows longer than the limit


def surely_short(row: Row, option: Domain, limit: int) -> bool:
    """Whether a prompt fits without asking a tokenizer: a token is at least one byte, and a chat template adds few."""
    texts = [
        row.prompt,
        *(str(m["content"]) for m in row.messages or ()),
        json.dumps(row.spec.get("tools") or ""),
        option.system_prompt,
        option.prompt_template,
    ]
    return sum(len(t) if t.isascii() else len(t.encode(errors="replace")) for t in texts) + TEMPLATE_TOKENS <= limit


def load_sources(
    patterns: Sequence[str],
    config: Config,
    tokenizer: PreTrainedTokenizerBase,
    *,
    verifiable: bool,
    held_out: bool = False,
) -> Loaded:
    """All rows of the files by domain, over-long prompts counted and skipped, every spec checked when `verifiable`.

    [[domain]] says which domains are wanted, and all of them have to be there; not so where rows are `held_out`.
    """
    encoder = Encoder(tokenizer, config.domain)
    limit = config.rollout.max_prompt_tokens
    sources: dict[str, Source] = {}
    if "procedural" in patterns:
        for domain in generated(config) or list(procedural.DOMAINS):
            if domain not in procedural.DOMAINS:
                raise InputError(
                    f"data.train: no procedural problems for domain {domain!r} "
                    f"(there are: {', '.join(procedural.DOMAINS)})"
                )
            sources[domain] = ProceduralSource(domain, config.seed, encoder, config.data.sloppy_scale)
    shelves: dict[str, Shelf] = {}
    skipped: Counter[str] = Counter()
    asked = set() if held_out else {d.name for d in config.domain}
    if "reasoning_gym" in patterns:
        for domain in reasoning_gym_domains(config):
            sources[domain] = ReasoningGymSource(domain, config.seed, encoder)
    for path in files([p for p in patterns if p not in GENERATED]):
        for where, offset, record in positioned_records(path):
            whole = blend.plain(record, where)
            if isinstance(whole, str):
                skipped[whole] += 1
                continue
            row = normalise(whole, where, config.data.default_domain)
            if asked and row.domain not in asked:
                skipped[f"{row.domain} (not in [[domain]])"] += 1
                continue
            if verifiable:
                try:
                    check_spec(row.domain, encoder.spec(row))
                except ValueError as error:
                    raise InputError(f"{where}: {error}") from None
                encoder.check_template(row, where)
                option = encoder.options.get(row.domain, Domain(row.domain))
                if not surely_short(row, option, limit) and len(encoder.prompt(row, where).tokens) > limit:
                    skipped[row.domain] += 1
                    continue
            elif row.domain not in shelves:
                encoder.demonstration(row, where)  # the first row of a domain shows whether the template fits
            shelves.setdefault(row.domain, Shelf()).add(path, offset, record)
    for domain, shelf in shelves.items():
        sources[domain] = FileSource(domain, shelf, encoder)
    missing = sorted(asked - sources.keys())
    if missing or not sources:
        what = f"no row of domain {', '.join(missing)}" if missing else "no usable row"
        raise InputError(f"data: {what} in {', '.join(patterns)}" + (f" (skipped: {dict(skipped)})" if skipped else ""))
    return Loaded(sources, dict(skipped))


# ---- mixture -------------------------------------------------------------------------------------------------------


def quotas(domains: Sequence[Domain], sources: Mapping[str, Source], total: int) -> dict[str, int]:
    """Items per step and domain, exactly `total` in all: fixed quotas first, the rest by weight, largest remainder."""
    options = {d.name: d for d in domains} or {name: Domain(name) for name in sources}
    fixed = {n: d.quota for n, d in options.items() if d.quota}
    rest = total - sum(fixed.values())
    free = {n: float(sources[n].size or 1) for n, d in options.items() if not d.quota}
    if any(d.weight for d in options.values()):
        free = {n: options[n].weight for n in free}
    elif len({sources[n].size is None for n in free}) > 1:
        endless = next(n for n in free if sources[n].size is None)
        raise InputError(
            f"domain {endless} never runs out, so its share cannot follow the number of rows: give every [[domain]] a "
            "weight or a quota"
        )
    mass = sum(free.values())
    share = {n: rest * w / mass for n, w in free.items()} if mass else {}
    out = fixed | {n: int(s) for n, s in share.items()}
    by_remainder = sorted(share, key=lambda n: (int(share[n]) - share[n], list(options).index(n)))
    for n in by_remainder[: total - sum(out.values())]:
        out[n] += 1
    return {n: out[n] for n in options}


class Mixture:
    """Which items each step draws: a pure function of (seed, step, round), so a resumed run needs no data state."""

    def __init__(self, sources: Mapping[str, Source], quota: Mapping[str, int], seed: int, rounds: int = 1):
        self.sources, self.quota, self.seed, self.rounds = sources, dict(quota), seed, rounds
        self._order: dict[tuple[str, int], np.ndarray] = {}

    def indices(self, step: int, round: int = 0) -> list[tuple[str, int]]:
        """(domain, row index) of every item of a step; domains interleaved so that none starts last. Each epoch of a
        finite source is its own permutation; dynamic sampling's later rounds have their own places in the stream."""
        out: list[tuple[str, int]] = []
        for place in range(max(self.quota.values(), default=0)):
            for domain, quota in self.quota.items():
                if place < quota:
                    position = (step * self.rounds + round) * quota + place
                    out.append((domain, self._row(domain, position)))
        return out

    def _row(self, domain: str, position: int) -> int:
        size = self.sources[domain].size
        if size is None:
            return position
        epoch, place = divmod(position, size)
        if (domain, epoch) not in self._order:
            key = int.from_bytes(
                hashlib.blake2b(f"{self.seed}/{domain}/{epoch}".encode(), digest_size=16).digest(), "little"
            )
            self._order = {k: v for k, v in self._order.items() if k[0] != domain or k[1] >= epoch - 1}
            self._order[domain, epoch] = np.random.Generator(np.random.Philox(key=key)).permutation(size)
        return int(self._order[domain, epoch][place])

    def batch(self, step: int, round: int = 0) -> list[Prompt]:
        return [self.sources[d].prompt(i) for d, i in self.indices(step, round)]


def eval_prompts(config: Config, tokenizer: PreTrainedTokenizerBase) -> list[Prompt]:
    """The held-out problems: at most evaluation.problems per domain, or per benchmark where rows name theirs, of any
    domain, trained or not; the same ones for every model."""
    if not config.data.eval:
        return []
    encoder = Encoder(tokenizer, config.domain)
    out: list[Prompt] = []
    if "procedural" in config.data.eval:
        for domain in generated(config) or procedural.DOMAINS:
            out += [
                encoder.prompt(Row(f"{domain}/{problem.prompt}", domain, None, problem.prompt, None, problem.spec))
                for problem in procedural.eval_set(domain, config.evaluation.problems)
            ]
    if "reasoning_gym" in config.data.eval:
        for domain in reasoning_gym_domains(config):
            held_out = ReasoningGymSource(domain, config.seed + reasoning_gym.HELD_OUT, encoder)
            out += [held_out.prompt(i) for i in range(config.evaluation.problems)]
    patterns = [p for p in config.data.eval if p not in GENERATED]
    if patterns:
        loaded = load_sources(patterns, config, tokenizer, verifiable=True, held_out=True)
        taken = Counter[str]()
        for source in loaded.sources.values():
            assert isinstance(source, FileSource)
            for i in range(len(source.shelf)):
                row = source.row(i)
                name = str(row.spec.get("benchmark", row.domain))
                taken[name] += 1
                if taken[name] <= config.evaluation.problems:
                    out.append(encoder.prompt(row))
    return out
