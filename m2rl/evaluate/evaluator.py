"""Weights -> scores: one engine and one verifier pool for all models of one architecture."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from m2rl import benchmarks
from m2rl.benchmarks import Benchmark
from m2rl.config import Config, Model, Rollout, read_config
from m2rl.domains import procedural
from m2rl.domains.pool import VerifierPool
from m2rl.policy import Policy, load_model, reading_model
from m2rl.rollout.collect import Progress, collect
from m2rl.rollout.engine import EVAL_STEP
from m2rl.rollout.start import end_tokens, start_engine
from m2rl.sample_log import fingerprint
from m2rl.scores import Score, score_one
from m2rl.types import InputError, Prompt, Sample

Weights = str | Path | Mapping[str, Tensor] | Policy


class Evaluator:
    """One engine and one verifier pool for all models of one architecture; give it weights and benchmarks, get scores.

    config: its model.compute_dtype, rollout (engine, max_sequences, verifier_*), evaluation and [[domain]] are used.
    Collective over the ranks when torch.distributed is initialised: every rank gets every score.
    """

    def __init__(
        self,
        model: str | Path,
        config: Config | None = None,
        *,
        device: torch.device | None = None,
        whole_device: bool = False,
    ):
        """model: a Hugging Face folder or id; its architecture and tokenizer are read, its weights are not.
        whole_device: vLLM on a GPU may cache keys and values in all memory that is free, not in rollout.kv_cache_gib.
        """
        self.config = config or Config()
        self.path = str(model)
        with reading_model(f"model {self.path}: not a Hugging Face model folder or id"):
            self.architecture = AutoConfig.from_pretrained(self.path)
            self.tokenizer = AutoTokenizer.from_pretrained(self.path)
        self.device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.dtype: torch.dtype = getattr(torch, self.config.model.compute_dtype)
        with torch.device("meta"):
            empty = AutoModelForCausalLM.from_config(self.architecture)
        empty.tie_weights()
        self.shapes = {name: p.shape for name, p in empty.named_parameters()}
        self.tied = {name for name, _ in empty.named_parameters(remove_duplicate=False)} - self.shapes.keys()
        try:
            generation = GenerationConfig.from_pretrained(self.path)
        except OSError:
            generation = None
        end = end_tokens(self.tokenizer, generation)
        self.engine = start_engine(self._fitted(whole_device), self.path, self.architecture, self.device, end)
        r = self.config.rollout
        self.pool = VerifierPool(workers=r.verifier_workers, deadline_s=r.verifier_timeout_s, sandbox=r.sandbox)
        self.pool.__enter__()
        self.version = 0

    def _fitted(self, whole_device: bool) -> Config:
        """The config with the lengths and the cache that vLLM is given on this device."""
        config = fitted(self.config, self.positions)
        if not whole_device or self.device.type != "cuda":
            return config
        weights = sum(shape.numel() for shape in self.shapes.values()) * self.dtype.itemsize
        room = cache_gib(torch.cuda.mem_get_info(self.device)[0], weights)
        return dataclasses.replace(config, rollout=dataclasses.replace(config.rollout, kv_cache_gib=room))

    @property
    def positions(self) -> int:
        """Tokens that the model can read, prompt and response together."""
        return getattr(self.architecture, "max_position_embeddings", None) or 1 << 40

    def __enter__(self) -> Evaluator:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self.engine.close()
        self.pool.__exit__(None, None, None)

    def take(self, weights: Weights) -> None:
        """Put weights into the engine: a folder, tensors by Hugging Face name, or a policy in training."""
        if isinstance(weights, Policy):
            self.version += 1
            self.engine.sync(weights, self.version)
            return
        where = "weights"
        if isinstance(weights, (str, Path)):
            where, weights = f"model {weights}", dict(load_model(weights, self.dtype).named_parameters())
        given = {name: tensor for name, tensor in weights.items() if name not in self.tied}
        if given.keys() != self.shapes.keys():
            odd = sorted(given.keys() ^ self.shapes.keys())
            raise InputError(
                f"{where}: not of the architecture of {self.path}: {len(odd)} tensors differ in name, first {odd[0]}"
            )
        for name, tensor in given.items():
            if tensor.shape != self.shapes[name]:
                raise InputError(
                    f"{where}: not of the architecture of {self.path}: {name} is {tuple(tensor.shape)}, "
                    f"expected {tuple(self.shapes[name])}"
                )
        self.version += 1
        self.engine.load(given, self.version)

    def benchmark(self, item: str | Benchmark, k: int = 0, **options: Any) -> Benchmark:
        """The benchmark of that name (options as of `benchmarks.load`), its budget cut to the model's positions."""
        found = benchmarks.load(item, self.tokenizer, self.config, **options) if isinstance(item, str) else item
        longest = max(len(p.tokens) for p in found.prompts)
        room = getattr(self.engine, "max_length", self.positions) - longest  # a vLLM engine is built for a length
        if room < 1:
            raise InputError(
                f"{found.name}: its longest prompt has {longest} tokens, which is all that {self.path} can read"
            )
        if room < found.max_new_tokens:
            note = f"budget cut from {found.max_new_tokens} to the {room} tokens that the model can read"
            found = dataclasses.replace(found, max_new_tokens=room, notes=(*found.notes, note))
        return dataclasses.replace(found, k=k) if k else found

    def samples(
        self,
        benchmark: Benchmark,
        *,
        seed: int = 0,
        known: Mapping[tuple[str, int], Sample] | None = None,
        on_sample: Callable[[Sample], None] | None = None,
        progress: Progress | None = None,
    ) -> list[Sample]:
        """K verified samples of every problem under the weights taken last, in the benchmark's order."""
        return collect(
            self.engine,
            self.pool,
            self.tokenizer,
            benchmark.prompts,
            benchmark.k,
            seed=seed,
            step=EVAL_STEP,
            max_new_tokens=benchmark.max_new_tokens,
            temperature=benchmark.temperature,
            known=known,
            on_sample=on_sample,
            progress=progress,
        )

    def scored(self, benchmark: Benchmark, samples: Sequence[Sample], seed: int = 0) -> Score:
        """One benchmark's score with its further numbers."""
        return dataclasses.replace(score_one(samples, seed), details=benchmarks.details(benchmark, samples, self.pool))

    def score(
        self, weights: Weights, what: Sequence[str | Benchmark | Prompt], *, k: int = 0, seed: int = 0
    ) -> dict[str, Score]:
        """Scores by benchmark name, or by domain where `what` are prompts.

        k: samples per problem, 0 = the benchmark's own (for prompts evaluation.k).
        """
        self.take(weights)
        e = self.config.evaluation
        prompts = [p for p in what if isinstance(p, Prompt)]
        found = [self.benchmark(item, k) for item in what if not isinstance(item, Prompt)]
        for domain in dict.fromkeys(p.domain for p in prompts):
            mine = tuple(p for p in prompts if p.domain == domain)
            limit = e.max_new_tokens or self.config.rollout.max_new_tokens
            found.append(self.benchmark(Benchmark(domain, mine, k or e.k, e.temperature, limit)))
        return {b.name: self.scored(b, self.samples(b, seed=seed), seed) for b in found}


def evaluation_config(
    wanted: Sequence[str],
    given: str = "",
    engine: Literal["", "native", "vllm"] = "",
    temperature: float | None = None,
    max_new_tokens: int = 0,
) -> Config:
    """The config that was given; the built-in model's if only embedded domains are asked; else the paper's budget."""
    embedded = all(name in procedural.DOMAINS for name in wanted)
    if given or embedded:
        config, _ = read_config(given or "embedded")
    else:
        cores = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        config = Config(
            model=Model(compute_dtype="bfloat16" if torch.cuda.is_available() else "float32"),
            rollout=Rollout(
                max_prompt_tokens=8192,
                max_new_tokens=benchmarks.PAPER_MAX_NEW_TOKENS,
                verifier_workers=max(1, min(8, cores)),
                kv_cache_gib=48.0 if torch.cuda.is_available() else 1.0,
                verifier_timeout_s=120.0,  # LiveCodeBench: dozens of tests of up to 6 s
            ),
        )
    rollout, e = config.rollout, config.evaluation
    if engine:
        rollout = dataclasses.replace(rollout, engine=engine)
    if temperature is not None:
        e = dataclasses.replace(e, temperature=temperature)
    if max_new_tokens:
        e = dataclasses.replace(e, max_new_tokens=max_new_tokens)
    return dataclasses.replace(config, rollout=rollout, evaluation=e)


def fitted(config: Config, positions: int) -> Config:
    """The config with no more prompt and response together than the model has positions: vLLM refuses more."""
    r, e = config.rollout, config.evaluation
    new = max(r.max_new_tokens, e.max_new_tokens)
    if r.max_prompt_tokens + new <= positions:
        return config
    new = min(new, positions - 1)
    return dataclasses.replace(
        config,
        rollout=dataclasses.replace(r, max_prompt_tokens=positions - new, max_new_tokens=new),
        evaluation=dataclasses.replace(e, max_new_tokens=0),
    )


def cache_gib(free_bytes: int, weights_bytes: int) -> float:
    """GiB for keys and values beside the weights and 4 GiB of activations, nine tenths of the device in all."""
    return max(1.0, (0.9 * free_bytes - weights_bytes) / 2**30 - 4)


def evaluate_model(
    model: str | Path,
    what: Sequence[str | Benchmark | Prompt],
    *,
    k: int = 0,
    seed: int = 0,
    config: Config | None = None,
    **rollout: Any,
) -> dict[str, Score]:
    """Scores of one model by benchmark name (or by domain, for prompts). Further arguments override keys of
    config.rollout: engine="native" or "vllm", max_new_tokens, max_sequences, verifier_workers ..."""
    config = config or Config()
    config = dataclasses.replace(config, rollout=dataclasses.replace(config.rollout, **rollout))
    with Evaluator(model, config) as evaluator:
        return evaluator.score(model, what, k=k, seed=seed)


def architecture_key(model: str) -> str:
    """Equal for models that one engine and one set of encoded prompts can serve."""
    with reading_model(f"model {model}: not a Hugging Face model folder or id"):
        config = AutoConfig.from_pretrained(model).to_dict()
        tokenizer = AutoTokenizer.from_pretrained(model)
    shape = {
        k: v for k, v in config.items() if k not in ("_name_or_path", "transformers_version", "dtype", "torch_dtype")
    }
    return fingerprint([sorted(shape.items(), key=str), sorted(tokenizer.get_vocab().items()), tokenizer.chat_template])
