"""The memory plan counts what each phase holds."""

import dataclasses

import pytest
from transformers import Qwen3Config

from m2rl.config import Config, Model, Rollout
from m2rl.plan import kv_bytes_per_token, memory_rows

QWEN3_4B = Qwen3Config(vocab_size=151936, hidden_size=2560, num_hidden_layers=36, num_attention_heads=32,
                       num_key_value_heads=8, head_dim=128, intermediate_size=9728)  # fmt: skip
PARAMETERS = 4_022_468_096
VLLM = Config(model=Model(compute_dtype="bfloat16"), rollout=Rollout(engine="vllm", kv_cache_gib=48.0))


def test_rollout_of_4b_on_one_gpu():
    rows = memory_rows(VLLM, QWEN3_4B, PARAMETERS, 1)["rollout"]
    assert rows == {"fp32 master": 4 * PARAMETERS, "Adam m, v": 8 * PARAMETERS, "engine weights": 2 * PARAMETERS,
                    "KV cache": 48 * 2**30}  # fmt: skip
    assert kv_bytes_per_token(VLLM, QWEN3_4B) == 2 * 8 * 128 * 36 * 2


def test_weights_that_are_gathered_need_two_buckets():
    """The embedding is larger than a bucket of 256 MiB, so a bucket is its size."""
    rows = memory_rows(VLLM, QWEN3_4B, PARAMETERS, 8)["rollout"]
    assert rows["weight sync, two buckets"] == 2 * (1 + 1 / 8) * 2 * 151936 * 2560
    assert rows["fp32 master"] == 4 * PARAMETERS / 8 and rows["engine weights"] == 2 * PARAMETERS


def test_parked_moments_and_tensor_parallelism_take_less():
    rollout = dataclasses.replace(VLLM.rollout, park_optimizer=True, tensor_parallel=2)
    config = dataclasses.replace(VLLM, rollout=rollout)
    rows = memory_rows(config, QWEN3_4B, PARAMETERS, 2)["rollout"]
    assert rows["Adam m, v (on the host)"] == 0 and rows["fp32 master"] == 2 * PARAMETERS
    assert rows["engine weights"] == PARAMETERS and kv_bytes_per_token(config, QWEN3_4B) == 8 * 128 * 36 * 2


@pytest.mark.parametrize("engine", ["native", "vllm"])
def test_what_sleeps_is_not_in_the_training_phase(engine):
    config = dataclasses.replace(VLLM, rollout=dataclasses.replace(VLLM.rollout, engine=engine))
    rows = memory_rows(config, QWEN3_4B, PARAMETERS, 1)
    assert ("engine weights" in rows["train"]) == (engine == "native")


def test_the_gradient_is_whole_on_every_rank_until_the_last_bin():
    """As FSDP2 keeps it where gradient synchronisation is off for the earlier bins."""
    rows = [memory_rows(VLLM, QWEN3_4B, PARAMETERS, world)["train"] for world in (1, 8)]
    assert [r["fp32 gradients, whole until the last bin"] for r in rows] == [4 * PARAMETERS] * 2
    assert [r["fp32 master + Adam m, v"] for r in rows] == [12 * PARAMETERS, 1.5 * PARAMETERS]
