"""`--dry-run`: everything a run resolves to, printed, and nothing trained: model, data, memory per GPU by phase, tokens
per step."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, Qwen3Config

from m2rl import embedded
from m2rl.config import Config, to_toml
from m2rl.data import whereabouts
from m2rl.rollout.memory import kv_bytes_per_token

# Published shapes, so that a plan needs neither the network nor the weights.
QWEN3_SHAPES = {  # hidden, layers, heads, kv heads, ff, tied
    "0.6B": (1024, 28, 16, 8, 3072, True),
    "1.7B": (2048, 28, 16, 8, 6144, True),
    "4B": (2560, 36, 32, 8, 9728, True),
    "8B": (4096, 36, 32, 8, 12288, False),
    "14B": (5120, 40, 40, 8, 17408, False),
}
GB = 1e9
GPU_GB = (80, 141)
USABLE = 0.95  # of a GPU's memory; the rest is lost to fragmentation
CONTEXT_AND_GRAPHS = 3.5 * GB  # CUDA context, NCCL, captured graphs (estimate)


def model_config(path: str) -> tuple[PretrainedConfig, str]:
    """The architecture and where it was found."""
    if path == "embedded":
        return embedded.build_model(len(embedded.build_tokenizer()), 0).config, "built in"
    if Path(path).is_dir():
        return AutoConfig.from_pretrained(path), "local folder"
    try:
        return AutoConfig.from_pretrained(path, local_files_only=True), "hub cache"
    except (OSError, ValueError):
        for size, (hidden, layers, heads, kv, ff, tied) in QWEN3_SHAPES.items():
            if f"Qwen3-{size}" in path or f"qwen3-{size.lower()}" in path.lower():
                return Qwen3Config(
                    vocab_size=151936,
                    hidden_size=hidden,
                    num_hidden_layers=layers,
                    num_attention_heads=heads,
                    num_key_value_heads=kv,
                    head_dim=128,
                    intermediate_size=ff,
                    tie_word_embeddings=tied,
                ), (f"not on this disk; planned with the published Qwen3-{size} shape")
    return Qwen3Config(), "not on this disk, shape unknown"


def count_parameters(config: PretrainedConfig) -> int:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    model.tie_weights()
    return sum(p.numel() for p in model.parameters())


def memory_rows(config: Config, shape: PretrainedConfig, parameters: int, world: int) -> dict[str, dict[str, float]]:
    """Bytes per GPU by phase and use; arithmetic on the shapes, not a measurement."""
    r, shards = config.rollout, world // config.train.replicas
    low = 2 if config.model.compute_dtype == "bfloat16" else 4
    layers, hidden = shape.num_hidden_layers, shape.hidden_size
    bin_tokens = config.train.tokens_per_bin
    kept_of_a_layer = 17  # rows of width `hidden` per token, roughly, of attention and MLP together
    checkpointed = layers + kept_of_a_layer  # inputs of all layers, and one layer in full while it is recomputed
    rows_kept = checkpointed if config.model.activation_checkpointing else layers * kept_of_a_layer
    per_token = rows_kept * hidden * low
    master, moments = 4 * parameters / shards, 8 * parameters / shards
    cache = r.kv_cache_gib * 2**30
    if r.engine == "native":
        cache = kv_bytes_per_token(config, shape) * r.max_sequences * (r.max_prompt_tokens + r.max_new_tokens)
    rows = {
        "train": {
            "fp32 master + Adam m, v": master + moments,
            # FSDP reduces after the last bin only: until then every rank accumulates the whole gradient
            "fp32 gradients, whole until the last bin": 4.0 * parameters,
            "unsharded layers in flight": low * parameters * (1 if shards == 1 else 3 / layers),
            "activations of one bin": float(per_token * bin_tokens),
            "log-prob cache": float(min(5 * 2**30, 2 * bin_tokens * shape.vocab_size)),
        },
        "rollout": {
            "fp32 master": master,
            "Adam m, v" + (" (on the host)" if r.park_optimizer else ""): 0.0 if r.park_optimizer else moments,
            "engine weights": low * parameters / r.tensor_parallel,
            "KV cache" + (", all sequences at full length" if r.engine == "native" else ""): float(cache),
        },
    }
    if r.engine == "vllm" and shards > 1:  # SyncPlan's: two buckets, each a shard and the whole
        bucket = max(256 * 2**20, low * shape.vocab_size * hidden)
        rows["rollout"]["weight sync, two buckets"] = 2 * (1 + 1 / shards) * bucket
    if config.algorithm == "distill":
        for phase in rows.values():
            phase["fp32 weights of the teacher"] = 4 * parameters / shards
    if r.engine == "native":  # nothing of it sleeps
        rows["train"] |= {"engine weights": rows["rollout"]["engine weights"], "KV cache": float(cache)}
    if config.algorithm == "sft":
        del rows["rollout"]
    return rows


def memory_table(config: Config, shape: PretrainedConfig, parameters: int, world: int) -> Table:
    """The rows with their totals, and which GPUs each phase fits."""
    table = Table(title=f"Memory per GPU with {world} (estimate)", title_justify="left")
    table.add_column("phase")
    table.add_column("what")
    table.add_column("GB", justify="right")
    for phase, parts in memory_rows(config, shape, parameters, world).items():
        for what, size in parts.items():
            table.add_row(phase, what, f"{size / GB:.1f}")
        total = sum(parts.values()) + CONTEXT_AND_GRAPHS
        fits = ", ".join(f"{size} GB: {'fits' if total <= size * GB * USABLE else 'too small'}" for size in GPU_GB)
        table.add_row(phase, f"[bold]total with context ({fits})", f"[bold]{total / GB:.1f}")
        table.add_section()
    return table


def print_plan(config: Config) -> None:
    """Print the resolved config and what it costs; needs no GPU, no weights and no data on this disk."""
    out = Console(highlight=False, soft_wrap=True)
    shape, found = model_config(config.model.path)
    parameters = count_parameters(shape)
    world = int(os.environ.get("WORLD_SIZE", 1))
    out.print(to_toml(config), markup=False)
    out.print(f"Model      {config.model.path}: {parameters:,} parameters ({found})")
    for pattern in (*config.data.train, *config.data.eval):
        out.print(f"Data       {pattern}: {whereabouts(pattern) or 'NOT FOUND here; the run needs it'}")
    if config.algorithm != "sft":
        r = config.rollout
        samples = r.prompts_per_step * r.group_size
        out.print(
            f"Step       {r.prompts_per_step} prompts x {r.group_size} samples = {samples:,} sequences, at most "
            f"{samples * (r.max_prompt_tokens + r.max_new_tokens):,} tokens, "
            f"{config.objective.updates_per_rollout} optimizer step(s)"
        )
    else:
        out.print(f"Step       {config.train.batch_size:,} sequences, {config.train.steps:,} steps")
    if config.model.path != "embedded":
        for n in sorted({world, 1, 8}):
            if n % config.train.replicas == 0:
                out.print(memory_table(config, shape, parameters, n))
        if config.algorithm != "sft" and config.rollout.engine == "vllm":
            tokens = int(config.rollout.kv_cache_gib * 2**30 / kv_bytes_per_token(config, shape))
            length = config.rollout.max_prompt_tokens + config.rollout.max_new_tokens
            out.print(
                f"KV cache   {config.rollout.kv_cache_gib:g} GiB per rank hold {tokens:,} tokens: {tokens // length} "
                f"sequences at full length, {tokens // config.rollout.max_sequences:,} tokens each at "
                f"{config.rollout.max_sequences}; where the rollout is too large: lower rollout.kv_cache_gib, or set "
                "rollout.park_optimizer"
            )
    out.print(f"Bins       {config.train.tokens_per_bin:,} tokens per forward and backward pass on a rank")
    out.print("Dry run: nothing was loaded, trained or written.")
