"""The built-in model: a 0.42M-parameter Qwen3 (2 layers, d=128) and its tokenizer, made here from nothing.

Small enough for GRPO to lift it by tens of points in two minutes on a CPU, and an ordinary Hugging Face folder once
saved: everything that reads it is the code that reads a 4B checkpoint.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from m2rl.domains.procedural import VOCABULARY

SPECIAL = ("<pad>", "<eos>", "<bos>", "<unk>")
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}{{ m.content }}{{ eos_token }}"
    "{% else %}{{ m.content }}\n{% endif %}{% endfor %}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Greedy longest match over VOCABULARY: WordPiece without word boundaries or a continuation prefix."""
    vocabulary = {piece: i for i, piece in enumerate((*SPECIAL, *VOCABULARY))}
    inner = Tokenizer(
        models.WordPiece(vocabulary, unk_token="<unk>", max_input_chars_per_word=1 << 20, continuing_subword_prefix="")
    )
    inner.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def build_model(vocab_size: int, seed: int) -> Qwen3ForCausalLM:
    """Matrices N(0, 1/fan_in), residual outputs scaled by 1/sqrt(2 layers), embeddings N(0, 0.02^2); float32."""
    config = Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        intermediate_size=384,
        max_position_embeddings=256,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
        tie_word_embeddings=True,
        attention_bias=False,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=2,
        dtype="float32",
    )
    model = Qwen3ForCausalLM(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim == 2:
                scale = 0.02 if "embed" in name else 1 / math.sqrt(p.shape[1])
                if name.endswith(("o_proj.weight", "down_proj.weight")):
                    scale /= math.sqrt(2 * config.num_hidden_layers)
                p.copy_(torch.randn(p.shape, generator=generator) * scale)
    return model


def save(folder: Path, seed: int) -> None:
    """Write the untrained model and its tokenizer as a Hugging Face folder."""
    tokenizer = build_tokenizer()
    build_model(len(tokenizer), seed).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
