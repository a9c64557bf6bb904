"""Tiny random models of the architectures users bring, and the rows and prompts that tests feed them."""

import numpy as np
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from m2rl.objectives import TrainRow

VOCAB = 97
FAMILIES = {
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
}


def model(
    family: str = "qwen3", tied: bool = True, vocab: int = VOCAB, attention: str = "sdpa", seed: int = 0
) -> PreTrainedModel:
    """2 layers, H=64, 4 heads over 2 key/value heads, random weights large enough that predictions differ."""
    torch.manual_seed(seed)
    config_class, model_class = FAMILIES[family]
    config = config_class(
        vocab_size=vocab,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        intermediate_size=96,
        tie_word_embeddings=tied,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=2,
        max_position_embeddings=512,
    )
    config._attn_implementation = attention
    made = model_class(config).eval()
    with torch.no_grad():
        for p in made.parameters():
            if p.ndim == 2:
                p.copy_(torch.randn(p.shape) / p.shape[1] ** 0.5)
    return made


def sequences(lengths, seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(3, VOCAB, n).tolist() for n in lengths]


def rows(lengths=(9, 17, 2, 12, 30, 5, 8, 21), seed: int = 0, domains: int = 2) -> list[TrainRow]:
    """Rows with random advantages, weights, masks and behaviour log-probabilities near the policy's."""
    rng = np.random.default_rng(seed)
    out = []
    for i, tokens in enumerate(sequences(lengths, seed)):
        trained = np.zeros(len(tokens), dtype=bool)
        trained[1 + rng.integers(0, len(tokens) - 1) :] = True
        n = int(trained.sum())
        out.append(
            TrainRow(
                tokens,
                trained,
                float(rng.uniform(0.01, 0.1)),
                float(rng.normal()),
                i % domains,
                rng.uniform(-6, -3, n).astype(np.float32),
            )
        )
    return out
