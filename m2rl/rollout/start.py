"""Starts the engine that `rollout.engine` names."""

from __future__ import annotations

import torch
from transformers import GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase

from m2rl.config import Config
from m2rl.rollout.engine import Engine
from m2rl.rollout.native import NativeEngine
from m2rl.types import InputError


def start_engine(
    config: Config, model: str, architecture: PretrainedConfig, device: torch.device, end: set[int]
) -> Engine:
    """An engine without weights for models of this architecture. model: the folder or id that vLLM reads it from; end:
    tokens that end a response."""
    if config.rollout.engine == "vllm":
        from m2rl.rollout.vllm import VllmEngine  # the only road to vllm

        return VllmEngine(config, model, device, end)
    dtype = getattr(torch, config.model.compute_dtype)
    return NativeEngine(architecture, device, dtype, config.rollout.max_sequences, end)


def end_tokens(tokenizer: PreTrainedTokenizerBase, generation: GenerationConfig | None) -> set[int]:
    """The tokens that end a response: the tokenizer's and the model's generation config's."""
    listed = generation.eos_token_id if generation is not None else None
    ids = {tokenizer.eos_token_id, *(listed if isinstance(listed, list) else [listed])}
    found = {i for i in ids if i is not None}
    if not found:
        raise InputError("neither the tokenizer nor generation_config.json names an end-of-sequence token")
    return found
