"""Conversations as `collect` holds them, on the agent's real environment.

The token stream equals the template's rendering, the mask says who wrote what, many run at once.
"""

import copy
import dataclasses
import itertools
import json
import random
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import office
import pytest
import tiny
import torch
from tokenizers import AddedToken, pre_tokenizers
from tokenizers import Tokenizer as RawTokenizer
from tokenizers.decoders import ByteLevel
from tokenizers.models import BPE
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from m2rl.domains import agent
from m2rl.domains.agent import Observation, verify
from m2rl.domains.pool import VerifierPool
from m2rl.policy import Policy
from m2rl.rollout.carry import CarryOver
from m2rl.rollout.collect import collect
from m2rl.rollout.engine import Finished, Request
from m2rl.rollout.multi_turn import environment_tokens
from m2rl.rollout.native import NativeEngine
from m2rl.types import Prompt, Sample, Verdict

END = "<|im_end|>"

# ChatML in Qwen's manner: tools in the system message, tool answers gathered in one user message.
TEMPLATE = """\
{%- if tools %}{{ '<|im_start|>system\\n' + (messages[0].content + '\\n\\n' if messages[0].role == 'system' else '') }}
{{- 'Tools:' }}{% for tool in tools %}{{ '\\n' + (tool | tojson) }}{% endfor %}{{ '<|im_end|>\\n' }}
{%- elif messages[0].role == 'system' %}{{ '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}{% endif %}
{%- for message in messages %}
{%- if message.role == 'tool' %}
{%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{ '<|im_start|>user' }}{% endif %}
{{- '\\n<tool_response>\\n' + message.content + '\\n</tool_response>' }}
{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{ '<|im_end|>\\n' }}{% endif %}
{%- elif message.role != 'system' %}{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{{ '<think>\\n' if thinking else '' }}{% endif %}"""


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory):
    """A byte-level tokenizer with a few merges, saved and loaded again as a user's would be."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("t", "o"), ("to", "o"), ("too", "l"), ("Ġ", "t"), ("e", "r"), ("Ċ", "Ċ")]
    vocab = {token: i for i, token in enumerate([*alphabet, *("".join(m) for m in merges)])}
    raw = RawTokenizer(BPE(vocab, merges))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = ByteLevel()
    raw.add_special_tokens([AddedToken(t, special=True) for t in ("<|endoftext|>", "<|im_start|>", END)])
    raw.add_tokens(
        [
            AddedToken(t, special=False, normalized=False)
            for t in ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
        ]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=raw, eos_token=END, pad_token="<|endoftext|>", chat_template=TEMPLATE
    )
    folder = tmp_path_factory.mktemp("tokenizer")
    fast.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def ids(tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


class ScriptedEngine:
    """Plays back what turns_of says a request is answered with, in random order; a held request does not finish."""

    def __init__(self, turns_of: Callable[[Request], list[int]], order_seed: int = 0) -> None:
        self.turns_of = turns_of
        self.held: Callable[[Request], bool] = lambda request: False
        self.flying: dict[int, tuple[Request, list[int]]] = {}
        self.requests: list[Request] = []
        self.most, self.version = 0, 3
        self.order = random.Random(order_seed)

    def submit(self, requests: Iterable[Request]) -> None:
        for request in requests:
            assert request.id not in self.flying
            assert request.max_new_tokens >= 1
            self.requests.append(request)
            self.flying[request.id] = (request, self.turns_of(request))
        self.most = max(self.most, len(self.flying))

    def poll(self) -> list[Finished]:
        ready = [id for id, (request, _) in sorted(self.flying.items()) if not self.held(request)]
        out = []
        for id in self.order.sample(ready, self.order.randint(0, len(ready))):
            request, tokens = self.flying.pop(id)
            cut = tokens[: request.max_new_tokens]
            out.append(self.finished(id, cut, "stop" if len(cut) == len(tokens) else "length"))
        return out

    def cancel(self, ids: Iterable[int]) -> list[Finished]:
        return [self.finished(id, self.flying.pop(id)[1][:2], "abort") for id in list(ids) if id in self.flying]

    def finished(self, id: int, tokens: list[int], finish: Any) -> Finished:
        return Finished(id, tokens, [-0.5 - 0.001 * i for i in range(len(tokens))], finish, self.version)

    @property
    def pending(self) -> int:
        return len(self.flying)


@pytest.fixture(scope="module")
def pool():
    with VerifierPool(workers=1) as pool:
        yield pool


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return office.write(tmp_path_factory.mktemp("office"))


def call(name: str, **arguments: Any) -> str:
    body = json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False)
    return f"<tool_call>\n{body}\n</tool_call>"


TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": {"properties": {arg: {"type": "string"}}}}}
    for name, arg in (("email_delete_email", "email_id"), ("email_search_emails", "query"))
]
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Delete my mail."}]
DELETE = call("email_delete_email", email_id="00000001")
TURNS = [
    f"<think>\nFirst.\n</think>\n\n{call('é 日本')}\n{DELETE}",
    f"Again tool toooool {DELETE}",
    "The answer is 4.",
]
ANSWERS = [
    ["Error: there is no tool named 'é 日本'.", "The email has been deleted."],
    ["Error: there is no email '00000001'."],
]


def make_prompt(tokenizer, tables: Path, key: str = "1", messages: Sequence[dict] = MESSAGES) -> Prompt:
    text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True, tools=TOOLS)
    truth = [{"name": "email_delete_email", "arguments": {"email_id": "00000001"}}]
    spec = {"tools": TOOLS, "ground_truth": truth, "tables_dir": str(tables)}
    return Prompt(f"agent/{key}", "agent", tuple(ids(tokenizer, text)), text, spec)


def rollout(engine, pool, tokenizer, prompts: Sequence[Prompt], n: int = 1, **options: Any) -> list[Sample]:
    options = {"seed": 1, "step": 2, "max_new_tokens": 4000, "temperature": 1.0, **options}
    return collect(engine, pool, tokenizer, prompts, n, **options)


def by_progress(tokenizer, prompt: Prompt, turns: Sequence[str]):
    """The next turn to play back, told from how many assistant headers the request holds."""
    header = ids(tokenizer, "<|im_start|>assistant")

    def pick(request: Request) -> list[int]:
        assert request.tokens[: len(prompt.tokens)] == prompt.tokens
        rest = list(request.tokens[len(prompt.tokens) :])
        done = sum(rest[i : i + len(header)] == header for i in range(len(rest)))
        return ids(tokenizer, turns[done] + END)

    return pick


@pytest.mark.parametrize("thinking", [False, True])
def test_every_context_is_what_the_template_renders(thinking: bool, tokenizer, pool, tables, monkeypatch):
    if thinking:  # a template that opens the model's thinking itself
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.chat_template = "{%- set thinking = true %}" + TEMPLATE
    heard: list[str] = []
    step = agent.Episode.step
    monkeypatch.setattr(agent.Episode, "step", lambda self, text: heard.append(text) or step(self, text))
    prompt = make_prompt(tokenizer, tables)
    engine = ScriptedEngine(by_progress(tokenizer, prompt, TURNS))
    (sample,) = rollout(engine, pool, tokenizer, [prompt])
    opening = "<think>\n" if thinking else ""  # written by the template: part of the prompt and the environment
    history = list(MESSAGES)
    for request, turn, answers in zip(engine.requests, TURNS, [*ANSWERS, []], strict=True):
        rendered = tokenizer.apply_chat_template(history, tokenize=False, add_generation_prompt=True, tools=TOOLS)
        assert rendered.endswith("<|im_start|>assistant\n" + opening)
        assert list(request.tokens) == ids(tokenizer, rendered)
        history.append({"role": "assistant", "content": opening + turn})
        history += [{"role": "tool", "content": answer} for answer in answers]
    final = tokenizer.apply_chat_template(history, tokenize=False, add_generation_prompt=False, tools=TOOLS)
    assert [*prompt.tokens, *sample.tokens] == ids(tokenizer, final.removesuffix("\n"))
    assert heard == [turn + END for turn in TURNS]


def test_the_mask_marks_exactly_what_the_model_wrote(tokenizer, pool, tables):
    prompt = make_prompt(tokenizer, tables)
    engine = ScriptedEngine(by_progress(tokenizer, prompt, TURNS))
    (sample,) = rollout(engine, pool, tokenizer, [prompt])
    assert len(sample.tokens) == len(sample.mask) == len(sample.logp)
    model = [t for t, m in zip(sample.tokens, sample.mask, strict=True) if m]
    assert model == [t for turn in TURNS for t in ids(tokenizer, turn + END)]
    assert all((lp < 0) == m for lp, m in zip(sample.logp, sample.mask, strict=True))
    environment = tokenizer.decode([t for t, m in zip(sample.tokens, sample.mask, strict=True) if not m])
    assert environment == "".join(
        "\n<|im_start|>user"
        + "".join(f"\n<tool_response>\n{answer}\n</tool_response>" for answer in answers)
        + "<|im_end|>\n<|im_start|>assistant\n"
        for answers in ANSWERS
    )
    assert (sample.reward, sample.status, sample.detail) == (1.0, "ok", "3 turns, 3 calls, 2 failed")
    assert (sample.finish, sample.weight_version) == ("stop", 3)


def test_generated_tokens_are_never_tokenised_again(tokenizer, pool, tables):
    """A model may spell "tool" letter by letter; the stream keeps its spelling."""
    spelled = [t for letter in "tool" for t in ids(tokenizer, letter)]
    assert spelled != ids(tokenizer, "tool")
    prompt = make_prompt(tokenizer, tables)

    def turns_of(request: Request) -> list[int]:
        first = len(request.tokens) == len(prompt.tokens)
        return [*spelled, *ids(tokenizer, (DELETE if first else "") + END)]

    engine = ScriptedEngine(turns_of)
    (sample,) = rollout(engine, pool, tokenizer, [prompt])
    assert sample.tokens[: len(spelled)] == spelled
    assert list(engine.requests[1].tokens[len(prompt.tokens) :][: len(spelled)]) == spelled
    assert sample.tokens[-len(spelled) - 1 :] == [*spelled, *ids(tokenizer, END)] and len(engine.requests) == 2


def test_an_end_of_turn_the_model_did_not_sample_is_the_environments(tokenizer):
    messages = [{"role": "tool", "name": "a", "content": "x"}]
    with_end = environment_tokens(ids(tokenizer, f"Yes.{END}"), messages, tokenizer)
    without = environment_tokens(ids(tokenizer, "Yes."), messages, tokenizer)
    assert without == [*ids(tokenizer, END), *with_end]
    other_end = environment_tokens(ids(tokenizer, "Yes.<|endoftext|>"), messages, tokenizer)
    assert other_end == without


def test_an_answer_that_holds_the_placeholder_is_no_trap(tokenizer):
    messages = [{"role": "tool", "name": "a", "content": "an-assistant-turn-stood-here!"}]
    assert "stood-here!" in tokenizer.decode(environment_tokens(ids(tokenizer, f"Yes.{END}"), messages, tokenizer))


@pytest.mark.parametrize(
    "template", ["{{ messages[0].content }}", "{% for m in messages %}{{ m.content * 2 }}{% endfor %}"]
)
def test_a_template_that_hides_or_repeats_turns_is_refused(template: str, tokenizer):
    class Odd:
        encode, decode = tokenizer.encode, tokenizer.decode

        def apply_chat_template(self, conversation, **options):
            return tokenizer.apply_chat_template(conversation, chat_template=template, **options)

    with pytest.raises(ValueError, match="must write an assistant turn once"):
        environment_tokens([], [{"role": "tool", "name": "a", "content": "x"}], Odd())


def test_the_budget_is_shared_by_model_and_environment(tokenizer, pool, tables):
    prompt = make_prompt(tokenizer, tables)
    turn = ids(tokenizer, TURNS[0] + END)
    answers = environment_tokens(turn, [{"role": "tool", "content": a} for a in ANSWERS[0]], tokenizer)

    def play(budget: int, turn: list[int] = turn):
        engine = ScriptedEngine(lambda request: turn)
        (sample,) = rollout(engine, pool, tokenizer, [prompt], max_new_tokens=budget)
        assert len(sample.tokens) <= budget
        assert [r.max_new_tokens for r in engine.requests] == [
            budget - (len(r.tokens) - len(prompt.tokens)) for r in engine.requests
        ]
        return sample, len(engine.requests)

    sample, requests = play(len(turn) + len(answers))  # no room for a turn after the tools' answers: they are not kept
    assert (sample.tokens, sample.mask, sample.finish, requests) == (turn, [True] * len(turn), "length", 1)
    assert (sample.status, sample.detail) == ("unparsed", "cut off in turn 2")
    sample, requests = play(len(turn) + len(answers) + 1)
    assert (sample.tokens, sample.finish, requests) == ([*turn, *answers, turn[0]], "length", 2)
    assert sample.mask == [True] * len(turn) + [False] * len(answers) + [True]
    sample, requests = play(len(turn) - 1)  # cut in the first turn: the environment never hears of it
    assert (sample.tokens, sample.finish, sample.detail, requests) == (turn[:-1], "length", "cut off in turn 1", 1)
    sample, requests = play(3 * len(turn) + 400)
    assert sample.finish == "length" and requests > 2
    assert sample.mask[-1]  # a sample never ends with the environment's tokens
    talkative = ids(tokenizer, 5 * call("email_search_emails", query="") + END)
    sample, requests = play(2000, talkative)
    assert (sample.tokens, sample.finish, requests) == (talkative, "length", 1)
    with pytest.raises(ValueError, match="max_new_tokens must be at least 1, got 0"):
        play(0)


def test_many_conversations_run_at_once_and_none_depends_on_the_order(tokenizer, pool, tables):
    """Case k calls a tool in its first k turns and answers then; the sixth turn is the last whatever it holds."""
    cases = range(8)
    prompts = [
        make_prompt(tokenizer, tables, str(k), [*MESSAGES, {"role": "user", "content": f"Case {k}"}]) for k in cases
    ]
    players = {p.tokens: by_progress(tokenizer, p, [DELETE] * k + ["Done."]) for k, p in zip(cases, prompts)}

    def turns_of(request: Request) -> list[int]:
        return next(play for tokens, play in players.items() if request.tokens[: len(tokens)] == tokens)(request)

    def run(order_seed: int):
        engine = ScriptedEngine(turns_of, order_seed)
        samples = rollout(engine, pool, tokenizer, prompts, 16)
        assert engine.most == 128
        assert engine.pending == 0
        return samples, {r.seed for r in engine.requests}, len(engine.requests)

    a, seeds, requests = run(0)
    b, seeds_b, _ = run(1)
    assert [(s.prompt.id, s.index) for s in a] == [(p.id, i) for p in prompts for i in range(16)]
    assert a == b
    assert seeds == seeds_b
    assert len(seeds) == requests == 16 * (1 + 2 + 3 + 4 + 5 + 6 + 6 + 6)  # every turn of every sample draws for itself
    turns = [sum(m for m, _ in itertools.groupby(s.mask)) for s in a]
    assert turns == [min(k + 1, 6) for k in cases for _ in range(16)]
    assert [s.reward for s in a] == [float(k > 0) for k in cases for _ in range(16)]
    assert all(s.finish == "stop" and s.mask[-1] for s in a)


def test_an_aborted_conversation_begins_again_in_the_next_step(tokenizer, pool, tables):
    """Its environment is a new one: the mail that it had deleted is there again. No token of it is kept."""
    done, slow, late = (make_prompt(tokenizer, tables, k, [{"role": "user", "content": k}]) for k in ("a", "b", "c"))
    players = {p.tokens: by_progress(tokenizer, p, [DELETE, "Deleted."]) for p in (done, slow, late)}
    engine = ScriptedEngine(lambda r: next(f for t, f in players.items() if r.tokens[: len(t)] == t)(r))

    def deleted(request: Request) -> bool:
        return request.tokens[: len(slow.tokens)] == slow.tokens != request.tokens

    def held(request: Request) -> bool:  # both slow ones stay in their second turn; the others wait until they are
        is_slow = request.tokens[: len(slow.tokens)] == slow.tokens
        return deleted(request) if is_slow else sum(deleted(r) for r, _ in engine.flying.values()) < 2

    engine.held, carry = held, CarryOver(1)
    first = rollout(engine, pool, tokenizer, [done, slow], 2, step=0, carry=carry)
    assert [(s.prompt.id, s.index, s.weight_version) for s in first] == [("agent/a", 0, 3), ("agent/a", 1, 3)]
    assert carry.places == [(0, 1)] and engine.pending == 0
    engine.held, engine.version, carry.allowance = lambda request: False, 4, 0
    begun, seen = len(engine.requests), []
    second = rollout(engine, pool, tokenizer, [late], 2, step=1, carry=carry, on_sample=seen.append)
    assert [(s.prompt.id, s.index) for s in second] == [("agent/b", 0), ("agent/b", 1), ("agent/c", 0), ("agent/c", 1)]
    assert [r.tokens for r in engine.requests[begun:][:2]] == [slow.tokens] * 2
    assert len({r.seed for r in engine.requests}) == len(engine.requests) == 8 + 8
    for s in [*first, *second]:
        assert (s.reward, s.status, s.detail) == (1.0, "ok", "2 turns, 1 calls, 0 failed")
        assert [t for t, m in zip(s.tokens, s.mask) if m] == ids(tokenizer, DELETE + END + "Deleted." + END)
    assert [s.weight_version for s in second] == [4] * 4 and len(seen) == 4


def test_a_sample_bears_the_version_of_its_oldest_turn(tokenizer, pool, tables):
    prompt = make_prompt(tokenizer, tables)
    play = by_progress(tokenizer, prompt, TURNS)

    def turns_of(request: Request) -> list[int]:
        engine.version += 1
        return play(request)

    engine = ScriptedEngine(turns_of)
    (sample,) = rollout(engine, pool, tokenizer, [prompt])
    assert (sample.weight_version, engine.version) == (4, 6)


def test_the_text_alone_tells_what_the_conversation_scored(tokenizer, pool, tables):
    prompt = make_prompt(tokenizer, tables)
    turns = [f"<think>\nLook.\n</think>\n\n{call('email_search_emails', query='')}", DELETE, "Deleted."]
    engine = ScriptedEngine(by_progress(tokenizer, prompt, turns))
    samples = rollout(engine, pool, tokenizer, [prompt], 16)
    assert [(s.reward, s.status) for s in samples] == [(1.0, "ok")] * 16
    assert "sender/recipient" in samples[0].text  # the mails it looked at
    assert prompt.text.count("<|im_start|>user") == 1  # the template was applied once
    assert "<|im_start|>system" in prompt.text and "<|im_start|>system" not in samples[0].text
    assert verify(samples[0].text, prompt.spec) == Verdict(1.0, "ok", samples[0].detail)


def test_conversations_and_single_turns_share_a_batch(tokenizer, pool, tables):
    """The environment judges the first, the verifiers the second."""
    talk = make_prompt(tokenizer, tables)
    sums = dataclasses.replace(
        make_prompt(tokenizer, tables, "m", [{"role": "user", "content": "1+1?"}]), domain="math", spec={"answer": "2"}
    )
    turns = by_progress(tokenizer, talk, [DELETE, "Deleted."])

    def turns_of(request: Request) -> list[int]:
        mine = request.tokens[: len(talk.tokens)] == talk.tokens
        return turns(request) if mine else ids(tokenizer, "\\boxed{2}" + END)

    seen: list[Sample] = []
    engine = ScriptedEngine(turns_of)
    samples = rollout(engine, pool, tokenizer, [talk, sums], 3, on_sample=seen.append)
    assert [s.prompt.domain for s in samples] == ["agent"] * 3 + ["math"] * 3
    assert [(s.reward, s.status) for s in samples] == [(1.0, "ok")] * 6
    assert len(seen) == 6 and len(engine.requests) == 3 * 2 + 3
    assert all(not all(s.mask) for s in samples[:3])
    assert all(s.mask is None and s.text == "\\boxed{2}" for s in samples[3:])


class Answering:
    """An environment that answers whatever it hears, `turns` - 1 times: a tiny model writes no tool calls."""

    def __init__(self, turns: int) -> None:
        self.left = turns

    def step(self, text: str) -> Observation:
        self.left -= 1
        if not self.left:
            return Observation(None, True, "answered")
        return Observation([{"role": "tool", "name": "a", "content": f"{self.left} é 日本"}], False, "")

    def verdict(self) -> Verdict:
        return Verdict(float(not self.left), "unparsed" if self.left else "ok")


def test_the_trained_stream_is_the_context_the_engine_sampled_from(tokenizer, pool, tables, monkeypatch):
    """One forward pass over the whole stream gives every generated token the log-probability the engine gave it."""
    monkeypatch.setattr(agent, "episode", lambda spec: Answering(4))
    model = tiny.model("qwen3", vocab=len(tokenizer))
    with torch.no_grad():
        model.get_output_embeddings().weight[tokenizer.eos_token_id] *= 2  # turns end now and then
    engine = NativeEngine(model.config, torch.device("cpu"), torch.float32, 8, {tokenizer.eos_token_id})
    engine.sync(Policy(model), 5)
    texts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": f"Hi {i}"}], tokenize=False, add_generation_prompt=True
        )
        for i in range(3)
    ]
    prompts = [Prompt(f"agent/{i}", "agent", tuple(ids(tokenizer, t)), t, {}) for i, t in enumerate(texts)]
    samples = rollout(engine, pool, tokenizer, prompts, 6, seed=0, step=0, max_new_tokens=350)
    assert len(samples) == 18
    assert max(sum(a and not b for a, b in zip(s.mask, s.mask[1:], strict=False)) for s in samples) >= 2  # three turns
    for s in samples:
        start = len(s.prompt.tokens)
        stream = torch.tensor([[*s.prompt.tokens, *s.tokens]])
        with torch.no_grad():
            logp = model(input_ids=stream).logits[0].log_softmax(-1)[start - 1 : -1]
        want = logp.gather(1, stream[0, start:, None])[:, 0].numpy()
        mask = np.array(s.mask)
        np.testing.assert_allclose(np.array(s.logp)[mask], want[mask], atol=2e-5)
