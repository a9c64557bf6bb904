"""Avg@K and pass@K with bootstrap confidence intervals over problems, and the evaluator that samples for them.

Avg@K of a problem = mean reward of its K samples; of a domain = mean over problems. The interval resamples problems,
the unit that the benchmark drew, not samples; `pass@k` is the unbiased estimator 1 - C(n-c, k) / C(n, k) (Chen et al.,
arXiv 2107.03374); majority@K is the reward of a problem's most frequent final answer.

    with Evaluator("folder") as evaluator:              # one engine and one verifier pool per architecture
        evaluator.score("folder", ["math", "if"], k=8)  # of a folder, a state dict or a live Policy: {name: Score}
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from m2rl import benchmarks, published
from m2rl.benchmarks import Benchmark
from m2rl.config import Config, Model, Rollout, build, read_toml
from m2rl.data import files
from m2rl.data.inspect import prompt_texts
from m2rl.data.overlap import Index
from m2rl.domains import procedural
from m2rl.domains.pool import VerifierPool
from m2rl.launch import exit_with, process_group
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
        float(means.mean()),
        bootstrap_ci(means, seed),
        float(np.mean([(r > 0.5).any() for r in rewards])),
        max(len(r) for r in rewards),
        len(problems),
        float(np.mean([len(s.tokens) for s in samples])),
        float(np.mean([s.finish == "length" for s in samples])),
        dict(Counter(str(s.status) for s in samples)),
        None if all(v is None for v in votes) else float(np.mean([v or 0.0 for v in votes])),
    )


def scored(benchmark: Benchmark, samples: Sequence[Sample], seed: int = 0) -> Score:
    """One benchmark's score with its details."""
    return dataclasses.replace(score_one(samples, seed), details=benchmarks.details(benchmark, samples))


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


# ---- sampling ------------------------------------------------------------------------------------------------------


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
        self.positions: int = getattr(self.architecture, "max_position_embeddings", None) or 1 << 40
        self.engine = self._build_engine(end_tokens(self.tokenizer, generation))
        r = self.config.rollout
        self.pool = VerifierPool(workers=r.verifier_workers, deadline_s=r.verifier_timeout_s, sandbox=r.sandbox)
        self.pool.__enter__()
        self.version = 0

    def _build_engine(self, end: set[int]) -> Engine:
        if self.config.rollout.engine == "vllm":
            from m2rl.rollout.vllm import VllmEngine  # the only road to vllm

            r, e = self.config.rollout, self.config.evaluation
            new = min(max(r.max_new_tokens, e.max_new_tokens), self.positions)
            prompt = min(r.max_prompt_tokens, self.positions - new)
            config = dataclasses.replace(
                self.config,
                rollout=dataclasses.replace(r, max_new_tokens=new, max_prompt_tokens=prompt),
                evaluation=dataclasses.replace(e, max_new_tokens=0),
            )
            return VllmEngine(config, self.path, self.device, end)
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
        )

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
            found.append(Benchmark(domain, mine, k or e.k, e.temperature, limit))
        return {b.name: scored(b, self.samples(b, seed=seed), seed) for b in found}


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


# ---- samples on disk -----------------------------------------------------------------------------------------------


class SampleLog:
    """Samples of one model and benchmark as JSONL, one file per rank, so that a killed evaluation goes on where it was.

    known: what earlier runs left, by (prompt id, index); their tokens are placeholders, only the number counts.
    """

    def __init__(self, folder: Path, benchmark: Benchmark, identity: Mapping[str, Any], rank: int):
        settings = {
            **identity,
            "benchmark": benchmark.name,
            "temperature": benchmark.temperature,
            "max_new_tokens": benchmark.max_new_tokens,
        }
        prompts = {p.id: p for p in benchmark.prompts}
        folder.mkdir(parents=True, exist_ok=True)
        saved = folder / "settings.json"
        if saved.is_file() and (old := json.loads(saved.read_text())) != settings:
            changed = sorted(k for k in {*old, *settings} if old.get(k) != settings.get(k))
            raise InputError(
                f"{folder} holds samples made with other settings ({', '.join(changed)}): name another --out, or "
                "delete it"
            )
        self.known: dict[tuple[str, int], Sample] = {}
        for path in sorted(folder.glob("samples.*.jsonl")):
            for line in path.read_text(encoding="utf-8").split("\n"):
                try:
                    row = json.loads(line)
                    prompt = prompts[row["id"]]
                except (json.JSONDecodeError, KeyError):
                    continue  # the last line of a killed process; a problem that is not asked for now
                if row["prompt"] != fingerprint(prompt.tokens):
                    raise InputError(
                        f"{path}: sample {row['sample']} of {prompt.id!r} answers another prompt: name another --out"
                    )
                reward = float("nan") if row["reward"] is None else row["reward"]
                self.known[prompt.id, row["sample"]] = Sample(
                    prompt,
                    row["sample"],
                    [0] * row["tokens"],
                    [],
                    row["finish"],
                    0,
                    text=row["response"],
                    reward=reward,
                    status=row["status"],
                    detail=row["detail"],
                )
        self.folder, self.settings, self.rank = folder, settings, rank

    def open(self) -> None:
        """Start to write; after every rank has read."""
        if self.rank == 0:
            (self.folder / "settings.json").write_text(json.dumps(self.settings, indent=1) + "\n")
        path = self.folder / f"samples.{self.rank}.jsonl"
        torn = path.is_file() and path.stat().st_size and not path.read_bytes().endswith(b"\n")
        self.file = open(path, "a", encoding="utf-8")  # noqa: SIM115 - closed by close
        if torn:
            self.file.write("\n")

    def write(self, s: Sample) -> None:
        self.file.write(
            json.dumps(
                {
                    "id": s.prompt.id,
                    "prompt": fingerprint(s.prompt.tokens),
                    "sample": s.index,
                    "domain": s.prompt.domain,
                    "reward": None if math.isnan(s.reward) else s.reward,
                    "status": s.status,
                    "detail": s.detail,
                    "finish": s.finish,
                    "tokens": len(s.tokens),
                    "response": s.text,
                }
            )
            + "\n"
        )
        self.file.flush()

    def close(self) -> None:
        self.file.close()


def fingerprint(parts: Iterable[Any]) -> str:
    digest = hashlib.blake2b(digest_size=12)
    for part in parts:
        digest.update(repr(part).encode())
    return digest.hexdigest()


def weights_identity(model: str) -> str:
    """Changes when a folder's weights are written again; a hub id stands for itself."""
    found = sorted(Path(model).glob("*.safetensors"))
    return fingerprint((p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in found) if found else model


# ---- command -------------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="torchrun -m m2rl.evaluate", description="Score models on benchmarks: Avg@K.")
    parser.add_argument(
        "--model", nargs="+", required=True, help="Hugging Face folders or ids of one architecture or several"
    )
    parser.add_argument(
        "--benchmarks", required=True, help=f"comma-separated, of {', '.join(benchmarks.names())}; or `paper`"
    )
    parser.add_argument("--k", type=int, default=0, help="samples per problem; 0 = the paper's")
    parser.add_argument(
        "--seed", type=int, default=0, help="of the samples, of GPQA's option order and of the intervals"
    )
    parser.add_argument("--out", default="runs/evaluation", help="folder for samples and tables; the same one resumes")
    parser.add_argument(
        "--data-file", action="append", default=[], metavar="NAME=FILE", help="rows from here, not the hub"
    )
    parser.add_argument("--limit", type=int, default=0, help="problems per benchmark, at most; 0 = all")
    parser.add_argument(
        "--max-new-tokens", type=int, default=0, help=f"0 = {benchmarks.PAPER_MAX_NEW_TOKENS}, the paper's"
    )
    parser.add_argument("--temperature", type=float, default=-1.0, help=f"default {benchmarks.PAPER_TEMPERATURE}")
    parser.add_argument(
        "--think-gate",
        choices=("auto", "on", "off"),
        default="auto",
        help="score only what follows </think>; auto: if the chat template knows it",
    )
    parser.add_argument(
        "--lcb-window", default="", metavar="FROM:TO", help="LiveCodeBench contest dates, YYYY-MM-DD:YYYY-MM-DD"
    )
    parser.add_argument(
        "--train-data", nargs="+", default=[], metavar="FILE", help="count prompts sharing 13 words with these"
    )
    parser.add_argument("--engine", choices=("native", "vllm"), default="", help="overrides the config's")
    parser.add_argument("--config", default="", help="a config whose model, rollout and [[domain]] keys are used")
    o = parser.parse_args(argv)
    wanted = [n for part in o.benchmarks.split(",") for n in (benchmarks.PRESETS if part == "paper" else [part]) if n]
    config = evaluation_config(wanted, o.config, o.engine, o.temperature, o.max_new_tokens)
    check_options(o, wanted)
    with process_group(config.threads) as device:
        return run(o, wanted, config, device)


def evaluation_config(
    wanted: Sequence[str], named: str = "", engine: str = "", temperature: float = -1.0, max_new_tokens: int = 0
) -> Config:
    """The config that was named; the built-in model's if only embedded domains are asked; else the paper's budget."""
    embedded = all(name in procedural.DOMAINS for name in wanted)
    if named or embedded:
        table, where = read_toml(named or "embedded")
        config = build(Config, table, where)
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
    if temperature >= 0:
        e = dataclasses.replace(e, temperature=temperature)
    if max_new_tokens:
        e = dataclasses.replace(e, max_new_tokens=max_new_tokens)
    return dataclasses.replace(config, rollout=rollout, evaluation=e)


def check_options(o: argparse.Namespace, wanted: Sequence[str]) -> None:
    """Everything that can be wrong before a model loads; fills o.files and o.window."""
    for name in wanted:
        if name not in benchmarks.names():
            benchmarks.unknown(name)
    if not wanted:
        raise InputError("--benchmarks names none")
    if o.k < 0 or o.limit < 0 or o.max_new_tokens < 0:
        raise InputError("--k, --limit and --max-new-tokens must not be negative")
    o.files = {}
    for item in o.data_file:
        name, equals, path = item.partition("=")
        if not equals or name not in benchmarks.PRESETS:
            raise InputError(f"--data-file {item}: must be NAME=FILE, NAME one of {', '.join(benchmarks.PRESETS)}")
        o.files[name] = path
        files([path])
    o.window = None
    if o.lcb_window:
        o.window = tuple(o.lcb_window.split(":"))
        if len(o.window) != 2 or not all(re.fullmatch(r"\d{4}-\d\d-\d\d", day) for day in o.window):
            raise InputError(f"--lcb-window {o.lcb_window}: must be YYYY-MM-DD:YYYY-MM-DD")


def run(o: argparse.Namespace, wanted: Sequence[str], config: Config, device: torch.device) -> int:
    """Every model on every benchmark, then the tables."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    out = Path(o.out)
    scores: dict[str, dict[str, Score]] = {}
    notes: dict[str, tuple[str, ...]] = {}
    evaluator, family = None, ""

    def say(text: str) -> None:
        if rank == 0:
            print(text, flush=True)

    try:
        for model in o.model:
            name = model_name(model, scores)
            if evaluator is None or family != architecture_key(model):
                if evaluator is not None:
                    evaluator.close()
                evaluator, family = Evaluator(model, config, device=device), architecture_key(model)
                tasks = [
                    evaluator.benchmark(
                        n,
                        data_file=o.files.get(n, ""),
                        seed=o.seed,
                        k=o.k,
                        limit=o.limit,
                        think_gate={"auto": None, "on": True, "off": False}[o.think_gate],
                        lcb_window=o.window,
                    )
                    for n in wanted
                ]
                notes = {b.name: (*b.notes, contamination(b, o.train_data)) for b in tasks}
            evaluator.take(model)
            scores[name] = {}
            for benchmark in tasks:
                identity = {"model": weights_identity(model), "seed": o.seed}
                log = SampleLog(out / name / benchmark.name, benchmark, identity, rank)
                if dist.is_initialized():
                    dist.barrier()
                log.open()
                try:
                    samples = evaluator.samples(benchmark, seed=o.seed, known=log.known, on_sample=log.write)
                finally:
                    log.close()
                scores[name][benchmark.name] = s = scored(benchmark, samples, o.seed)
                say(
                    f"{name}  {benchmark.name}  Avg@{s.k} {100 * s.avg_at_k:.2f}"
                    f" [{100 * s.ci95[0]:.1f}, {100 * s.ci95[1]:.1f}]"
                    f"  pass@{s.k} {100 * s.pass_at_k:.1f}  {s.problems} problems  {s.mean_tokens:.0f} tokens"
                    f"  {100 * s.truncated:.1f}% cut  {s.statuses}"
                )
    finally:
        if evaluator is not None:
            evaluator.close()
    if rank == 0:
        record = {
            "seed": o.seed,
            "notes": notes,
            "engine": config.rollout.engine,
            "world_size": dist.get_world_size() if dist.is_initialized() else 1,
            "temperature": config.evaluation.temperature,
            "max_new_tokens": {b.name: b.max_new_tokens for b in tasks},
            "bootstrap": BOOTSTRAP,
            "scores": {m: {b: s.as_dict() for b, s in mine.items()} for m, mine in scores.items()},
        }
        (out / "scores.json").write_text(json.dumps(record, indent=1) + "\n")
        (out / "table.md").write_text(published.markdown(scores))
        (out / "table.csv").write_text(published.as_csv(scores))
        (out / "table.html").write_text(published.as_html(scores, notes))
        say("\n" + published.markdown(scores))
        for name, found in notes.items():
            say(f"{name}: {'; '.join(found)}")
        say(f"Files  {out}/  (scores.json, table.md, table.csv, table.html, <model>/<benchmark>/samples.*.jsonl)")
    return 0


def model_name(model: str, taken: Mapping[str, Any]) -> str:
    """A short name of a model that no other has: the last part of its path, more of it where that is taken."""
    parts = [p for p in model.split("/") if p not in ("", ".", "..")]
    for n in range(1, len(parts) + 1):
        if (name := "-".join(parts[-n:])) not in taken:
            return name
    raise InputError(f"--model {model} is given twice")


def architecture_key(model: str) -> str:
    """Equal for models that one engine and one set of encoded prompts can serve."""
    try:
        config = AutoConfig.from_pretrained(model).to_dict()
        tokenizer = AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise InputError(
            f"model {model}: not a Hugging Face model folder or id ({str(error).splitlines()[0]})"
        ) from None
    shape = {
        k: v for k, v in config.items() if k not in ("_name_or_path", "transformers_version", "dtype", "torch_dtype")
    }
    return fingerprint([sorted(shape.items(), key=str), sorted(tokenizer.get_vocab().items()), tokenizer.chat_template])


def contamination(benchmark: Benchmark, train_data: Sequence[str]) -> str:
    """How many problems share 13 words in a row with the training prompts, or that nobody looked."""
    if not train_data:
        return "overlap with training data not checked (--train-data)"
    index = Index((p.id, p.spec.get("question", p.text)) for p in benchmark.prompts)
    hit = {name for text in prompt_texts(train_data) if (name := index.find(text))}
    return f"{len(hit)} of {len(benchmark.prompts)} problems share 13 words in a row with the training data"


if __name__ == "__main__":
    exit_with(main)
