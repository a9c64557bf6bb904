"""Avg@K and pass@K with bootstrap confidence intervals over problems, and the evaluator that samples for them.

Avg@K of a problem = mean reward of its K samples; of a domain = mean over problems. The interval resamples problems,
the unit that the benchmark drew, not samples; `pass@k` is the unbiased estimator 1 - C(n-c, k) / C(n, k) (Chen et al.,
arXiv 2107.03374); majority@K is the reward of a problem's most frequent final answer.

    with Evaluator("folder") as evaluator:              # one engine and one verifier pool per architecture
        evaluator.score("folder", ["math", "if"], k=8)  # of a folder, a state dict or a live Policy: {name: Score}
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from m2rl import benchmarks
from m2rl.benchmarks import Benchmark
from m2rl.config import Config
from m2rl.domains.pool import VerifierPool
from m2rl.policy import Policy, load_model
from m2rl.rollout.collect import collect
from m2rl.rollout.engine import Engine
from m2rl.rollout.native import NativeEngine
from m2rl.types import InputError, Prompt, Sample

BOOTSTRAP = 2000
Weights = str | Path | Mapping[str, Tensor] | Policy
EVAL_STEP = -1  # evaluation draws from its own random stream, the same before, during and after training


@dataclass(frozen=True, slots=True)
class Score:
    """One domain or benchmark under one model."""

    avg_at_k: float  # in [0, 1]
    ci95: tuple[float, float]  # percentile bootstrap over problems
    pass_at_k: float
    k: int
    problems: int
    mean_tokens: float
    truncated: float  # share of samples cut by the token limit
    statuses: dict[str, int]
    majority_at_k: float | None = None  # reward of the most frequent final answer; None where answers have no such form
    details: dict[str, float] = field(default_factory=dict)  # a benchmark's further numbers, e.g. ifeval's loose level

    def as_dict(self) -> dict:
        return asdict(self)


def bootstrap_ci(values_P: np.ndarray, seed: int = 0, resamples: int = BOOTSTRAP) -> tuple[float, float]:
    """95% percentile interval of the mean of P problem scores."""
    if len(values_P) < 2:
        return (float(values_P.mean()),) * 2 if len(values_P) else (float("nan"),) * 2
    rng = np.random.default_rng(seed)
    counts = rng.multinomial(len(values_P), np.full(len(values_P), 1 / len(values_P)), size=resamples)
    low, high = np.quantile(counts @ values_P / len(values_P), [0.025, 0.975])
    return float(low), float(high)


def pass_at_k(correct: int, n: int, k: int) -> float:
    """1 - C(n-c, k) / C(n, k), as a product that does not overflow."""
    if n - correct < k:
        return 1.0
    return 1.0 - float(np.prod(1.0 - k / np.arange(n - correct + 1, n + 1)))


def score(samples: Sequence[Sample], seed: int = 0) -> dict[str, Score]:
    """Scores per domain of samples that carry rewards; a missing reward (NaN) counts as 0 and shows in the statuses."""
    domains: dict[str, list[Sample]] = {}
    for s in samples:
        domains.setdefault(s.prompt.domain, []).append(s)
    return {domain: score_one(mine, seed) for domain, mine in domains.items()}


def score_one(samples: Sequence[Sample], seed: int = 0) -> Score:
    """One score of all samples, whatever their domains; a missing reward (NaN) counts as 0."""
    if not samples:
        raise ValueError("samples must not be empty")
    problems: dict[str, list[Sample]] = {}
    for s in samples:
        problems.setdefault(s.prompt.id, []).append(s)
    rewards = [np.nan_to_num(np.array([s.reward for s in group])) for group in problems.values()]
    means = np.array([r.mean() for r in rewards])
    votes = [majority(group) for group in problems.values()]
    return Score(
        float(means.mean()), bootstrap_ci(means, seed), float(np.mean([(r > 0.5).any() for r in rewards])),
        max(len(r) for r in rewards), len(problems), float(np.mean([len(s.tokens) for s in samples])),
        float(np.mean([s.finish == "length" for s in samples])), dict(Counter(str(s.status) for s in samples)),
        None if all(v is None for v in votes) else float(np.mean([v or 0.0 for v in votes])))


def majority(group: Sequence[Sample]) -> float | None:
    """Mean reward of the samples that gave a problem's most frequent final answer, the first of them on a tie. Samples
    without an answer do not vote; None if the domain has no final answers."""
    if group[0].prompt.domain not in benchmarks.ANSWER_DOMAINS:
        return None
    answers = [benchmarks.vote(s.text) for s in group]
    votes = Counter(a for a in answers if a is not None)
    if not votes:
        return 0.0
    winner = votes.most_common(1)[0][0]
    return float(np.mean([np.nan_to_num(s.reward) for s, a in zip(group, answers) if a == winner]))


def average(scores: Mapping[str, Score]) -> float:
    """Unweighted mean of Avg@K over domains."""
    return float(np.mean([s.avg_at_k for s in scores.values()]))


# ---- sampling --------------------------------------------------------------------------------------------------------


def end_tokens(tokenizer: PreTrainedTokenizerBase, generation: GenerationConfig | None) -> set[int]:
    """The tokens that end a response: the tokenizer's and the model's generation config's."""
    listed = generation.eos_token_id if generation is not None else None
    ids = {tokenizer.eos_token_id, *(listed if isinstance(listed, list) else [listed])}
    found = {i for i in ids if i is not None}
    if not found:
        raise InputError("neither the tokenizer nor generation_config.json names an end-of-sequence token")
    return found


class Evaluator:
    """One engine and one verifier pool for all models of one architecture; give it weights and benchmarks, get scores.

    config: its model.compute_dtype, rollout (engine, max_sequences, verifier_*), evaluation and [[domain]] are used.
    Collective over the ranks when torch.distributed is initialised: every rank gets every score.
    """

    def __init__(self, model: str | Path, config: Config | None = None, *, device: torch.device | None = None):
        """model: a Hugging Face folder or id; its architecture and tokenizer are read, its weights are not."""
        self.config = config or Config()
        self.path = str(model)
        try:
            self.architecture = AutoConfig.from_pretrained(self.path)
            self.tokenizer = AutoTokenizer.from_pretrained(self.path)
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise InputError(f"model {self.path}: not a Hugging Face model folder or id ({reason})") from None
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
        self.engine = self._build_engine(end_tokens(self.tokenizer, generation))
        r = self.config.rollout
        self.pool = VerifierPool(workers=r.verifier_workers, deadline_s=r.verifier_timeout_s, sandbox=r.sandbox)
        self.pool.__enter__()
        self.version = 0

    def _build_engine(self, end: set[int]) -> Engine:
        if self.config.rollout.engine == "vllm":
            from m2rl.rollout.vllm import VllmEngine  # the only road to vllm

            return VllmEngine(self.config, self.path, self.device, end)
        return NativeEngine(self.architecture, self.device, self.dtype, self.config.rollout.max_sequences, end)

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
            raise InputError(f"{where}: not of the architecture of {self.path}: {len(odd)} tensors differ in name, "
                             f"first {odd[0]}")
        for name, tensor in given.items():
            if tensor.shape != self.shapes[name]:
                raise InputError(f"{where}: not of the architecture of {self.path}: {name} is {tuple(tensor.shape)}, "
                                 f"expected {tuple(self.shapes[name])}")
        self.version += 1
        self.engine.load(given, self.version)

    def benchmark(self, item: str | Benchmark, k: int = 0) -> Benchmark:
        found = benchmarks.load(item, self.tokenizer, self.config) if isinstance(item, str) else item
        return dataclasses.replace(found, k=k) if k else found

    def samples(self, benchmark: Benchmark, *, seed: int = 0, known: Mapping[tuple[str, int], Sample] | None = None,
                on_sample: Callable[[Sample], None] | None = None) -> list[Sample]:
        """K verified samples of every problem under the weights taken last, in the benchmark's order."""
        return collect(self.engine, self.pool, self.tokenizer, benchmark.prompts, benchmark.k, seed=seed,
                       step=EVAL_STEP, max_new_tokens=benchmark.max_new_tokens, temperature=benchmark.temperature,
                       known=known, on_sample=on_sample)

    def score(self, weights: Weights, what: Sequence[str | Benchmark | Prompt], *, k: int = 0,
              seed: int = 0) -> dict[str, Score]:
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
            found.append(Benchmark(domain, mine, k or e.k, e.temperature, limit))
        return {b.name: score_one(self.samples(b, seed=seed), seed) for b in found}


def evaluate_model(model: str | Path, what: Sequence[str | Benchmark | Prompt], *, k: int = 0, seed: int = 0,
                   config: Config | None = None, **rollout: Any) -> dict[str, Score]:
    """Scores of one model by benchmark name (or by domain, for prompts). Further arguments override keys of
    config.rollout: engine="native" or "vllm", max_new_tokens, max_sequences, verifier_workers ..."""
    config = config or Config()
    config = dataclasses.replace(config, rollout=dataclasses.replace(config.rollout, **rollout))
    with Evaluator(model, config) as evaluator:
        return evaluator.score(model, what, k=k, seed=seed)
