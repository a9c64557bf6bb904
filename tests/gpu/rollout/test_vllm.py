"""vLLM colocated with the trainer on a GPU, Qwen3-0.6B's shape: sleep and wake, addresses, memory, agreement."""

import gc
import importlib.util

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from m2rl.config import Config, Model, Rollout
from m2rl.policy import Packed, Policy, load_model, shard
from m2rl.rollout.engine import Request, generate
from m2rl.rollout.memory import free_cache, free_gib, park

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason='needs vLLM: pip install "m2rl[gpu]"'),
]
CONFIG = Config(
    model=Model(compute_dtype="bfloat16"),
    rollout=Rollout(engine="vllm", max_prompt_tokens=512, max_new_tokens=128, max_sequences=64, kv_cache_gib=8.0),
)
DEVICE = torch.device("cuda", 0)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    from m2rl.rollout.vllm import VllmEngine

    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    shape = Qwen3Config(
        vocab_size=151936,
        hidden_size=1024,
        num_hidden_layers=28,
        num_attention_heads=16,
        head_dim=128,
        num_key_value_heads=8,
        intermediate_size=3072,
        tie_word_embeddings=True,
        eos_token_id=1,
    )
    Qwen3ForCausalLM(shape).to(torch.bfloat16).save_pretrained(folder)
    policy = shard(Policy(load_model(folder)), DEVICE, torch.bfloat16)
    engine = VllmEngine(CONFIG, str(folder), DEVICE, [1])
    engine.sync(policy, 0)
    yield engine, policy
    engine.close()


def requests(n=32, new=64):
    return [Request(i, tuple((7 * j + i // 4) % 1000 + 5 for j in range(300)), i, new) for i in range(n)]


def mean_k3(policy, asked, answers):
    """Of the engine's log-probabilities under the trainer, nats."""
    total, count = 0.0, 0
    for r, a in zip(asked, answers):
        tokens = [*r.tokens, *a.tokens]
        rows = torch.arange(len(r.tokens) - 1, len(tokens) - 1, device=DEVICE)
        targets = torch.tensor(a.tokens, device=DEVICE)
        with torch.no_grad():
            logp, _ = policy(Packed.of([tokens], DEVICE), rows, targets, r.temperature, False)
        d = logp.float().cpu() - torch.tensor(a.logp)
        total, count = total + float((d.exp() - d - 1).sum()), count + len(d)
    return total / count


def test_cycles_keep_addresses_memory_and_log_probabilities(pair):
    engine, policy = pair
    assert engine.route == "in place"
    at = {n: p.data_ptr() for n, p in engine.model.named_parameters()}
    asked, asleep, awake = requests(), [], []
    for version in range(1, 6):
        engine.sleep()
        free_cache()
        asleep.append(free_gib(DEVICE))
        with pytest.raises(RuntimeError, match="wake before sync"):
            engine.wake()
        with torch.no_grad():
            for p in policy.parameters():
                p.mul_(1.001)
        engine.sync(policy, version)
        engine.verify(policy)
        engine.wake()
        awake.append(free_gib(DEVICE))
        answers = generate(engine, asked)
        assert {a.weight_version for a in answers} == {version}
        assert mean_k3(policy, asked[:4], answers[:4]) < 1e-3
        assert {n: p.data_ptr() for n, p in engine.model.named_parameters()} == at
    assert asleep[0] - awake[0] > CONFIG.rollout.kv_cache_gib  # the cache and the weights were given back
    assert max(asleep) - min(asleep) < 0.5 and max(awake) - min(awake) < 0.5  # nothing leaks, cycle by cycle


def test_greedy_output_survives_a_sleep_bitwise(pair):
    engine, policy = pair
    asked = [Request(i, r.tokens, 0, 32, 0.0) for i, r in enumerate(requests(4))]
    before = generate(engine, asked)
    engine.sleep()
    engine.sync(policy, 20)
    engine.wake()
    assert [a.tokens for a in generate(engine, asked)] == [a.tokens for a in before]


def test_parked_moments_free_their_memory_and_come_back(pair):
    _, policy = pair
    optimizer = torch.optim.AdamW(policy.parameters(), lr=0.0, fused=True)
    for p in policy.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    gc.collect()
    free_cache()
    before, size = free_gib(DEVICE), sum(p.numel() for p in policy.parameters()) * 8 / 2**30
    parked = park(optimizer)
    free_cache()
    assert free_gib(DEVICE) - before > 0.95 * size
    parked.restore()
    for state in optimizer.state.values():
        assert torch.isfinite(
            state["exp_avg"].to_local() if hasattr(state["exp_avg"], "to_local") else state["exp_avg"]
        ).all()
