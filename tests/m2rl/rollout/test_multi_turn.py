"""Conversations: the token stream equals the template's rendering, the mask says who wrote what, many run at once."""

import dataclasses
import json
import random
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

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

from m2rl.domains.agent import Episode, verify
from m2rl.domains.pool import VerifierPool
from m2rl.domains.workplace import load_world
from m2rl.policy import Policy
from m2rl.rollout.collect import collect
from m2rl.rollout.engine import Finished, Request
from m2rl.rollout.multi_turn import Conversation, environment_tokens, run_episodes
from m2rl.rollout.native import NativeEngine
from m2rl.types import Prompt, Verdict

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
    """Plays back texts: script[prompt tokens][i] is the i-th turn. Checks what every engine may rely on."""

    def __init__(self, tokenizer, turns_of, order_seed: int = 0) -> None:
        self.tokenizer, self.turns_of = tokenizer, turns_of
        self.flying: dict[int, tuple[Request, list[int]]] = {}
        self.requests: list[Request] = []
        self.cancelled: list[int] = []
        self.most = 0
        self.order = random.Random(order_seed)

    def submit(self, requests: Iterable[Request]) -> None:
        for request in requests:
            assert request.id not in self.flying
            assert request.max_new_tokens >= 1
            self.requests.append(request)
            self.flying[request.id] = (request, self.turns_of(request))
        self.most = max(self.most, len(self.flying))

    def poll(self) -> list[Finished]:
        done = self.order.sample(sorted(self.flying), self.order.randint(0, len(self.flying)))
        out = []
        for id in done:
            request, tokens = self.flying.pop(id)
            cut = tokens[: request.max_new_tokens]
            out.append(
                Finished(
                    id,
                    cut,
                    [-0.5 - 0.001 * i for i in range(len(cut))],
                    "stop" if len(cut) == len(tokens) else "length",
                    weight_version=3,
                )
            )
        return out

    def cancel(self, ids: Iterable[int]) -> list[Finished]:
        self.cancelled = list(ids)
        for id in self.cancelled:
            self.flying.pop(id)
        return []

    @property
    def pending(self) -> int:
        return len(self.flying)


@dataclass
class Seen:
    messages: list[dict[str, str]] | None
    done: bool


class Echo:
    """An environment that answers every turn twice, and is done after `turns`."""

    def __init__(self, turns: int, long: int = 0) -> None:
        self.left, self.heard, self.long = turns, [], long

    def step(self, text: str) -> Seen:
        self.heard.append(text)
        self.left -= 1
        if not self.left:
            return Seen(None, True)
        number = len(self.heard)
        return Seen(
            [
                {"role": "tool", "name": "a", "content": f"tool one, {number} é 日本" + "x" * self.long},
                {"role": "tool", "name": "b", "content": "[1, 2]"},
            ],
            False,
        )

    def verdict(self) -> Verdict:
        return Verdict(float(not self.left), "unparsed" if self.left else "ok", f"{len(self.heard)} turns")


def make_prompt(tokenizer, key: str, messages: list[dict], **options) -> Prompt:
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **options)
    return Prompt(id=f"agent/{key}", domain="agent", tokens=tuple(ids(tokenizer, text)), text=text, spec={})


def by_progress(tokenizer, prompt: Prompt, turns: list[str]):
    """The next turn to play back, told from how many assistant headers the request holds."""
    header = ids(tokenizer, "<|im_start|>assistant")

    def pick(request: Request) -> list[int]:
        assert request.tokens[: len(prompt.tokens)] == prompt.tokens
        rest = list(request.tokens[len(prompt.tokens) :])
        done = sum(rest[i : i + len(header)] == header for i in range(len(rest)))
        return ids(tokenizer, turns[done] + END)

    return pick


MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Look it up to me."}]
TURNS = [
    '<think>\nFirst.\n</think>\n\n<tool_call>\n{"name": "a"}\n</tool_call>',
    "Again tool toooool <tool_call>x",
    "The answer is 4.",
]


@pytest.mark.parametrize("thinking", [False, True])
def test_every_context_is_what_the_template_renders(tokenizer, thinking: bool):
    options = {"thinking": True} if thinking else {}
    prompt = make_prompt(tokenizer, "1", MESSAGES, **options)
    engine = ScriptedEngine(tokenizer, by_progress(tokenizer, prompt, TURNS))
    echo = Echo(3)
    (sample,) = run_episodes(
        engine,
        [prompt],
        lambda p: echo,
        tokenizer,
        group_size=1,
        max_new_tokens=4000,
        run_seed=1,
        step=2,
        template_options=options,
    )
    opening = "<think>\n" if thinking else ""  # written by the template: part of the prompt and the environment
    history = list(MESSAGES)
    for i, request in enumerate(engine.requests):
        rendered = tokenizer.apply_chat_template(history, tokenize=False, add_generation_prompt=True, **options)
        assert list(request.tokens) == ids(tokenizer, rendered)
        history += [{"role": "assistant", "content": opening + TURNS[i]}, *Echo(9).step("").messages]
        history[-2]["content"] = f"tool one, {i + 1} é 日本"
    assert len(engine.requests) == 3
    final = tokenizer.apply_chat_template(history[:-2], tokenize=False, add_generation_prompt=False, **options)
    assert [*prompt.tokens, *sample.tokens] == ids(tokenizer, final.removesuffix("\n"))
    assert echo.heard == [turn + END for turn in TURNS]


def test_the_mask_marks_exactly_what_the_model_wrote(tokenizer):
    prompt = make_prompt(tokenizer, "1", MESSAGES)
    engine = ScriptedEngine(tokenizer, by_progress(tokenizer, prompt, TURNS))
    (sample,) = run_episodes(
        engine, [prompt], lambda p: Echo(3), tokenizer, group_size=1, max_new_tokens=4000, run_seed=1, step=2
    )
    assert len(sample.tokens) == len(sample.mask) == len(sample.logp)
    model = [t for t, m in zip(sample.tokens, sample.mask, strict=True) if m]
    assert model == [t for turn in TURNS for t in ids(tokenizer, turn + END)]
    assert all((lp < 0) == m for lp, m in zip(sample.logp, sample.mask, strict=True))
    environment = tokenizer.decode([t for t, m in zip(sample.tokens, sample.mask, strict=True) if not m])
    assert environment == "".join(
        f"\n<|im_start|>user\n<tool_response>\ntool one, {i} é 日本\n</tool_response>\n<tool_response>\n[1, 2]\n"
        "</tool_response><|im_end|>\n<|im_start|>assistant\n"
        for i in (1, 2)
    )
    assert (sample.reward, sample.status, sample.detail) == (1.0, "ok", "3 turns")
    assert (sample.finish, sample.weight_version) == ("stop", 3)


def test_generated_tokens_are_never_tokenised_again(tokenizer):
    """A model may spell "tool" letter by letter; the stream keeps its spelling."""
    spelled = [t for letter in "tool" for t in ids(tokenizer, letter)]
    assert spelled != ids(tokenizer, "tool")
    prompt = make_prompt(tokenizer, "1", MESSAGES)
    engine = ScriptedEngine(tokenizer, lambda request: [*spelled, *ids(tokenizer, END)])
    (sample,) = run_episodes(
        engine, [prompt], lambda p: Echo(2), tokenizer, group_size=1, max_new_tokens=4000, run_seed=1, step=2
    )
    assert sample.tokens[: len(spelled)] == spelled
    assert list(engine.requests[1].tokens[len(prompt.tokens) :][: len(spelled)]) == spelled


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


def test_the_budget_is_shared_by_model_and_environment(tokenizer):
    prompt = make_prompt(tokenizer, "1", MESSAGES)
    turn = ids(tokenizer, TURNS[0] + END)

    def play(budget: int, long: int = 0):
        engine = ScriptedEngine(tokenizer, lambda request: turn)
        (sample,) = run_episodes(
            engine,
            [prompt],
            lambda p: Echo(9, long),
            tokenizer,
            group_size=1,
            max_new_tokens=budget,
            run_seed=1,
            step=2,
        )
        assert len(sample.tokens) <= budget
        assert [r.max_new_tokens for r in engine.requests] == [
            budget - (len(r.tokens) - len(prompt.tokens)) for r in engine.requests
        ]
        return sample, engine

    sample, engine = play(len(turn) + 10)  # no room for the tools' answers: they are not kept
    assert (sample.tokens, sample.mask, sample.finish, len(engine.requests)) == (turn, [True] * len(turn), "length", 1)
    assert sample.status == "unparsed"
    sample, engine = play(len(turn) - 1)  # cut in the first turn: the environment never hears of it
    assert (sample.tokens, sample.finish, sample.detail) == (turn[:-1], "length", "0 turns")
    sample, engine = play(3 * len(turn) + 400)
    assert sample.finish == "length"
    assert sample.mask[-1]  # a sample never ends with the environment's tokens
    sample, _ = play(2000, long=5000)
    assert (sample.tokens, sample.finish) == (turn, "length")


def test_many_episodes_run_at_once_and_none_depends_on_the_order(tokenizer):
    prompts = [make_prompt(tokenizer, str(i), [*MESSAGES, {"role": "user", "content": f"Case {i}"}]) for i in range(8)]
    texts = {p.tokens: [f"Step {k} of {i}" for k in range(5)] for i, p in enumerate(prompts)}

    def turns_of(request: Request) -> list[int]:
        for prompt in prompts:
            if request.tokens[: len(prompt.tokens)] == prompt.tokens:
                return by_progress(tokenizer, prompt, texts[prompt.tokens])(request)
        raise AssertionError("a request that starts with no prompt")

    def run(order_seed: int):
        engine = ScriptedEngine(tokenizer, turns_of, order_seed)
        samples = list(
            run_episodes(
                engine,
                prompts,
                lambda p: Echo(1 + int(p.id[6:]) % 5),
                tokenizer,
                group_size=16,
                max_new_tokens=4000,
                run_seed=1,
                step=2,
            )
        )
        assert engine.most == 128
        assert engine.pending == 0
        return {(s.prompt.id, s.index): s for s in samples}, {r.seed for r in engine.requests}, len(engine.requests)

    a, seeds, requests = run(0)
    b, seeds_b, _ = run(1)
    assert len(a) == 128
    assert a == b
    assert seeds == seeds_b
    assert len(seeds) == requests  # every turn of every sample draws for itself
    assert {len(s.mask) - sum(s.mask) > 0 for s in a.values()} == {True, False}


def test_single_turn_prompts_pass_through_unverified(tokenizer):
    prompts = [make_prompt(tokenizer, "1", MESSAGES), make_prompt(tokenizer, "2", MESSAGES)]
    engine = ScriptedEngine(tokenizer, lambda request: ids(tokenizer, TURNS[2] + END))
    samples = list(
        run_episodes(
            engine,
            prompts,
            lambda p: Echo(1) if p.id == "agent/2" else None,
            tokenizer,
            group_size=2,
            max_new_tokens=100,
            run_seed=1,
            step=2,
        )
    )
    plain = [s for s in samples if s.prompt.id == "agent/1"]
    assert len(samples) == 4
    assert all(s.mask is None and s.reward != s.reward and s.status is None and s.text == TURNS[2] for s in plain)
    assert all(s.status == "ok" for s in samples if s.prompt.id == "agent/2")


def test_closing_early_cancels_what_is_in_flight(tokenizer):
    prompt = make_prompt(tokenizer, "1", MESSAGES)
    engine = ScriptedEngine(tokenizer, lambda request: ids(tokenizer, END))
    samples = run_episodes(
        engine, [prompt], lambda p: Echo(2), tokenizer, group_size=9, max_new_tokens=900, run_seed=1, step=2
    )
    next(samples)
    samples.close()
    assert engine.cancelled
    assert engine.pending == 0


def test_aborted_samples_are_left_out_and_the_oldest_weights_count(tokenizer):
    prompt = make_prompt(tokenizer, "1", MESSAGES)
    talk = Conversation(prompt, 0, Echo(9), tokenizer, max_new_tokens=900, run_seed=1, step=2)
    turn = ids(tokenizer, TURNS[0] + END)
    assert not talk.take(Finished(0, turn, [-1.0] * len(turn), "stop", 4))
    assert talk.take(Finished(0, turn[:2], [-1.0] * 2, "abort", 5))
    sample = talk.sample()
    assert (sample.finish, sample.status, sample.weight_version) == ("abort", None, 4)
    assert sample.reward != sample.reward
    with pytest.raises(ValueError, match="over"):
        talk.take(Finished(0, turn, [-1.0] * len(turn), "stop", 4))


def test_wrong_arguments_and_a_busy_engine_are_refused(tokenizer):
    prompt = make_prompt(tokenizer, "1", MESSAGES)
    engine = ScriptedEngine(tokenizer, lambda request: ids(tokenizer, END))
    common = {"max_new_tokens": 9, "run_seed": 1, "step": 2}
    with pytest.raises(ValueError, match="group_size"):
        next(run_episodes(engine, [prompt], lambda p: None, tokenizer, group_size=0, **common))
    with pytest.raises(ValueError, match="max_new_tokens"):
        next(run_episodes(engine, [prompt], lambda p: None, tokenizer, group_size=1, **{**common, "max_new_tokens": 0}))
    engine.submit([Request(0, prompt.tokens, 1, 9)])
    with pytest.raises(ValueError, match="idle"):
        next(run_episodes(engine, [prompt], lambda p: None, tokenizer, group_size=1, **common))


# ---- with the real environment, and with the real engine ----


def test_office_episodes_end_to_end(tokenizer, tmp_path: Path):
    world = load_world(office.write(tmp_path))
    call = {"name": "email_delete_email", "arguments": {"email_id": "00000001"}}
    tools = [
        {"type": "function", "name": name, "parameters": {"properties": {}}}
        for name in ("email_delete_email", "email_search_emails")
    ]
    spec = {"tools": tools, "ground_truth": [call], "tables_dir": str(tmp_path)}
    messages = [{"role": "user", "content": "Delete my mail."}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, tools=tools)
    prompt = Prompt("agent/7", "agent", tuple(ids(tokenizer, text)), text, spec)
    look = '<tool_call>{"name": "email_search_emails", "arguments": {}}</tool_call>'
    turns = ["<think>\nLook.\n</think>\n\n" + look, f"<tool_call>\n{json.dumps(call)}\n</tool_call>", "Deleted."]
    engine = ScriptedEngine(tokenizer, by_progress(tokenizer, prompt, turns))
    samples = list(
        run_episodes(
            engine,
            [prompt],
            lambda p: Episode(p.spec, world),
            tokenizer,
            group_size=16,
            max_new_tokens=4000,
            run_seed=1,
            step=2,
        )
    )
    assert [(s.reward, s.status) for s in samples] == [(1.0, "ok")] * 16
    assert "sender/recipient" in samples[0].text  # the mails it looked at
    assert text.count("<|im_start|>user") == 1  # the template was applied once
    assert "<|im_start|>system" not in samples[0].text
    assert verify(samples[0].text, spec) == Verdict(1.0, "ok", samples[0].detail)  # the text alone tells the same


def test_collect_holds_conversations_where_the_domain_is_one(tokenizer, tmp_path: Path):
    """Agent prompts and ordinary ones in one batch: the environment judges the first, the verifiers the second."""
    office.write(tmp_path)
    call = {"name": "email_delete_email", "arguments": {"email_id": "00000001"}}
    tools = [{"type": "function", "name": "email_delete_email", "parameters": {"properties": {}}}]
    spec = {"tools": tools, "ground_truth": [call], "tables_dir": str(tmp_path)}
    agent_prompt = dataclasses.replace(
        make_prompt(tokenizer, "a", [{"role": "user", "content": "Delete my mail."}], tools=tools),
        domain="agent",
        spec=spec,
    )
    sums = dataclasses.replace(
        make_prompt(tokenizer, "m", [{"role": "user", "content": "1+1?"}]), domain="math", spec={"answer": "2"}
    )
    turns = by_progress(tokenizer, agent_prompt, [f"<tool_call>\n{json.dumps(call)}\n</tool_call>", "Deleted."])

    def turns_of(request: Request) -> list[int]:
        mine = request.tokens[: len(agent_prompt.tokens)] == agent_prompt.tokens
        return turns(request) if mine else ids(tokenizer, "\\boxed{2}" + END)

    seen = []
    with VerifierPool(workers=1) as pool:
        engine = ScriptedEngine(tokenizer, turns_of)
        samples = collect(
            engine,
            pool,
            tokenizer,
            [agent_prompt, sums],
            3,
            seed=1,
            step=2,
            max_new_tokens=4000,
            temperature=1.0,
            on_sample=seen.append,
        )
    assert [s.prompt.domain for s in samples] == ["agent"] * 3 + ["math"] * 3
    assert [(s.reward, s.status) for s in samples] == [(1.0, "ok")] * 6
    assert len(seen) == 6 and len(engine.requests) == 3 * 2 + 3
    assert all(not all(s.mask) for s in samples[:3]) and all(s.mask is None for s in samples[3:])
    assert verify(samples[0].text, spec).reward == 1.0


def test_the_trained_stream_is_the_context_the_engine_sampled_from(tokenizer):
    """One forward pass over the whole stream gives every generated token the log-probability the engine gave it."""
    model = tiny.model("qwen3", vocab=len(tokenizer))
    with torch.no_grad():
        model.get_output_embeddings().weight[tokenizer.eos_token_id] *= 2  # turns end now and then
    engine = NativeEngine(model.config, torch.device("cpu"), torch.float32, 8, {tokenizer.eos_token_id})
    engine.sync(Policy(model), 5)
    prompts = [make_prompt(tokenizer, str(i), [{"role": "user", "content": f"Hi {i}"}]) for i in range(3)]
    samples = list(
        run_episodes(
            engine, prompts, lambda p: Echo(4), tokenizer, group_size=6, max_new_tokens=350, run_seed=0, step=0
        )
    )
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
