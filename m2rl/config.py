"""One TOML file configures one run; dotted command-line options override it.

    load(["--config", "qwen3_4b_math", "--rollout.group-size", "8"]) -> (Config, False: not a dry run)

The dataclasses below are the whole vocabulary: an unknown key is an error with a suggestion, a wrong type names the
key. Names follow TRL and verl where those agree; README has the table.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import math
import tomllib
import typing
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from m2rl.types import InputError


@dataclass(frozen=True)
class Model:
    path: str = "embedded"
    """Folder of a Hugging Face causal LM, a hub id that is on this disk already, or "embedded": the built-in
    0.4M-parameter model."""
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    """What matrices are multiplied in. Master weights and optimizer state are always float32."""
    activation_checkpointing: bool = False
    """Recompute each decoder layer in the backward pass: less memory, about a third more compute."""
    compile: bool = False
    """torch.compile each decoder layer (CUDA)."""


@dataclass(frozen=True)
class Data:
    train: tuple[str, ...] = ("procedural",)
    """JSONL or parquet files (globs allowed), on the hub as hub:OWNER/NAME or hub:OWNER/NAME/GLOB[@REVISION], or
    "procedural": generated problems that never run out."""
    eval: tuple[str, ...] = ()
    """Held-out problems in the same formats; "procedural" for the generated ones. Empty = no evaluation."""
    default_domain: str = ""
    """Domain of rows that carry no `domain` of their own."""
    sloppy_scale: float = 1.0
    """SFT on "procedural" only: scales the share of flawed demonstrations (0 = all good)."""


@dataclass(frozen=True)
class Domain:
    name: str = ""
    """math, code, science, if, agent, or a domain of your own."""
    quota: int = 0
    """Exactly this many prompts per step; 0 = a share by weight."""
    weight: float = 0.0
    """Relative share of the step's prompts; 0 with quota 0 = in proportion to the number of rows."""
    system_prompt: str = ""
    """Put before chat prompts that have no system message of their own."""
    prompt_template: str = "{prompt}"
    """Wraps the last user message."""
    think_gate: bool = False
    """Score 0 without `</think>`, and score only what follows the last one."""
    teacher: str = ""
    """Distillation only: folder of the model that this domain's prompts learn from."""
    token_mass: float = 0.0
    """Distillation only: this domain's share of every step's token mass, relative to the other domains'; 0 in all =
    what quotas and objective.aggregation give."""
    preset: Literal["strict", "reference"] = "strict"
    """Scoring rules: ours, or the reference code's with its known defects (for comparison)."""
    tables_dir: str = ""
    """Agent only: folder of the workplace's tables (CSV)."""


@dataclass(frozen=True)
class Rollout:
    engine: Literal["native", "vllm"] = "native"
    """What generates: "native" runs anywhere; "vllm" needs the gpu extra."""
    prompts_per_step: int = 16
    """Prompts per optimizer step, over all ranks and domains."""
    group_size: int = 16
    """Samples per prompt."""
    max_prompt_tokens: int = 2048
    """Longer prompts are counted and skipped."""
    max_new_tokens: int = 1024
    """A response is cut here; a cut response has finish reason "length"."""
    temperature: float = 1.0
    """Of sampling, and of the log-probabilities that are trained. top-p, top-k and penalties are never used in
    training."""
    max_sequences: int = 256
    """Sequences decoded at once on one rank."""
    deterministic: bool = True
    """Deal prompts to the ranks by position and seed every response by itself: a run repeats. False: ranks pull prompts
    from one counter, so that none idles, and vLLM draws from one stream per engine."""
    carry_over: float = 0.0
    """Share of a step's groups that may be left unfinished and continue in the next, under importance sampling."""
    tensor_parallel: int = 1
    """vLLM: neighbouring ranks that share one engine. 1 = every rank holds a whole one."""
    kv_cache_gib: float = 1.0
    """vLLM: GiB of key/value cache per rank, fixed in bytes. `--dry-run` shows what it can hold."""
    park_optimizer: bool = False
    """vLLM on a GPU: Adam's moments wait in host memory during rollouts, 8 bytes per parameter more for the cache."""
    stall_timeout_s: float = 600.0
    """vLLM: a rank whose engine generates no token for so long prints its stacks and ends; the run can be resumed."""
    dynamic_sampling_rounds: int = 0
    """Replace zero-variance groups by further prompts, at most this many rounds (DAPO); 0 = off."""
    verifier_workers: int = 1
    """Worker processes that score responses, per rank."""
    verifier_timeout_s: float = 10.0
    """Wall time one response may take to verify; then its worker is killed and the status is "timeout"."""
    sandbox: Literal["auto", "trusted"] = "auto"
    """How programs of the model run: "auto" = the strongest isolation found, else refuse; "trusted" = rlimits only,
    with a warning every run."""


@dataclass(frozen=True)
class Objective:
    loss: Literal["grpo", "cispo", "gspo", "reinforce"] = "grpo"
    """grpo: clipped ratio; cispo: clipped weight; gspo: sequence ratio; reinforce: no ratio."""
    advantage: Literal["grpo", "dr_grpo", "rloo", "batch_std"] = "grpo"
    """grpo: (r - mean) / (std + 1e-6); dr_grpo: r - mean; rloo: leave-one-out mean; batch_std: std of the whole
    batch."""
    aggregation: Literal["sequence", "token", "constant", "domain"] = "sequence"
    """Denominator: mean over a sample's tokens, then samples; all tokens; samples x max_new_tokens; equal mass per
    domain."""
    clip_low: float = 0.2
    """The ratio of new to old probability is clipped below 1 - clip_low ..."""
    clip_high: float = 0.28
    """... and above 1 + clip_high (clip-higher)."""
    dual_clip: float = 0.0
    """Bound on the loss of negative advantages (PPO dual clip), e.g. 3; 0 = off."""
    tis_cap: float = 2.0
    """Truncated importance sampling: caps the trainer / engine probability ratio that corrects their mismatch; 0 =
    off."""
    kl_coef: float = 0.0
    """Of the KL to the reference policy (the starting weights); 0 = no reference model is loaded, no pass is run."""
    kl: Literal["k1", "k2", "k3"] = "k3"
    """Its estimator: -d, d^2 / 2, e^d - d - 1, with d = log(reference / policy)."""
    entropy_coef: float = 0.0
    """Of the entropy bonus; the entropy is logged in any case."""
    mask_truncated: bool = False
    """Leave responses cut by max_new_tokens out of the loss (DAPO's overlong filtering)."""
    updates_per_rollout: int = 1
    """Optimizer steps per rollout. 1 = strictly on-policy, no old-log-probability pass."""


@dataclass(frozen=True)
class Distill:
    divergence: Literal["sampled_reverse", "reverse", "forward"] = "sampled_reverse"
    """sampled_reverse: log pi_teacher - log pi_student of the sampled tokens as the advantage (the paper's); reverse,
    forward: KL(student || teacher), KL(teacher || student) over the whole vocabulary at every token."""


@dataclass(frozen=True)
class Optim:
    lr: float = 2e-6
    """Peak learning rate of AdamW."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """After the warm-up: constant, or down to min_lr_ratio * lr at the last step."""
    warmup_steps: int = 0
    """Steps of linear warm-up."""
    min_lr_ratio: float = 0.1
    """Final learning rate over lr, for linear and cosine."""
    beta1: float = 0.9
    beta2: float = 0.98
    """AdamW's second moment; beta1 is its first."""
    weight_decay: float = 0.1
    """Of matrices; norms and biases are not decayed."""
    max_grad_norm: float = 1.0
    """The gradient is scaled down to this norm; 0 = never."""


@dataclass(frozen=True)
class Train:
    steps: int = 200
    """Optimizer steps."""
    batch_size: int = 512
    """SFT only: sequences per step, over all ranks."""
    tokens_per_bin: int = 16384
    """Tokens of one packed forward and backward pass on one rank."""
    save_every: int = 20
    """Steps between checkpoints; 0 = only at the end."""
    keep_checkpoints: int = 2
    """Older ones are deleted."""
    replicas: int = 1
    """HSDP: copies of the sharded model, usually the number of nodes."""


@dataclass(frozen=True)
class Evaluation:
    k: int = 8
    """Samples per problem: Avg@K."""
    problems: int = 160
    """Problems per domain, or per benchmark where rows name theirs, at most."""
    every: int = 0
    """Steps between evaluations during training; before and after are always run. 0 = only those."""
    temperature: float = 1.0
    """Of sampling in the evaluation; 0 = greedy."""
    max_new_tokens: int = 0
    """0 = as in rollout."""


@dataclass(frozen=True)
class Log:
    rollouts_per_step: int = 4
    """Samples written to rollouts.jsonl per domain and step."""
    tensorboard: bool = False
    """Also write <run_dir>/tensorboard (pip install tensorboard)."""
    wandb: str = ""
    """Weights & Biases project; empty = off."""


@dataclass(frozen=True)
class Config:
    name: str = "run"
    """Names the run folder, runs/<name>, unless run_dir is given."""
    algorithm: Literal["grpo", "sft", "distill"] = "grpo"
    """grpo: reinforcement learning on verifiable rewards; sft: supervised fine-tuning on demonstrations; distill: learn
    from one teacher per domain."""
    seed: int = 0
    """Every random draw derives from it."""
    run_dir: str = ""
    """Where everything of this run is written."""
    warm_start: str = ""
    """Config of an SFT run to start from; it is run first and cached in <run_dir>/warm_start."""
    warm_start_steps: int = 0
    """Overrides the steps of the warm start; 0 = its own."""
    resume: str = "auto"
    """auto: continue the unfinished run in the run folder from its newest complete checkpoint; never: start over; or a
    folder."""
    threads: int = 1
    """CPU threads per process."""
    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=Data)
    domain: tuple[Domain, ...] = ()
    rollout: Rollout = field(default_factory=Rollout)
    objective: Objective = field(default_factory=Objective)
    distill: Distill = field(default_factory=Distill)
    optim: Optim = field(default_factory=Optim)
    train: Train = field(default_factory=Train)
    evaluation: Evaluation = field(default_factory=Evaluation)
    log: Log = field(default_factory=Log)

    @property
    def folder(self) -> Path:
        return Path(self.run_dir or f"runs/{self.name}")


# What a resumed run may change without becoming another run.
RESUME_MAY_CHANGE = {
    "name",
    "run_dir",
    "resume",
    "threads",
    "log",
    "evaluation",
    "warm_start",
    "warm_start_steps",
    "train.steps",
    "train.save_every",
    "train.keep_checkpoints",
    "rollout.verifier_workers",
    "rollout.max_sequences",
    "rollout.kv_cache_gib",
    "rollout.park_optimizer",
    "rollout.stall_timeout_s",
}


def named_configs(studies: bool = False) -> list[str]:
    """Configs of runs that ship with m2rl, or of studies (study_*.toml, m2rl/study/)."""
    shipped = [p.name[:-5] for p in resources.files("m2rl.configs").iterdir() if p.name.endswith(".toml")]
    return sorted(name for name in shipped if name.startswith("study_") == studies)


def read_toml(name: str, studies: bool = False) -> tuple[dict[str, Any], str]:
    """The table of a run's (or a study's) file, by path or by the name of one that ships with m2rl, and where it was
    found."""
    path, shipped = Path(name), named_configs(studies)
    if path.is_file():
        text, where = path.read_text(encoding="utf-8"), str(path)
    else:
        stem = name.removesuffix(".toml")
        if stem in named_configs(not studies):
            command = "torchrun -m m2rl.train" if studies else "python -m m2rl.study"
            raise InputError(f"--config {name} is for {command}")
        if stem not in shipped:
            near = difflib.get_close_matches(stem, shipped, 1)
            raise InputError(
                f"--config {name}: no such file, and no shipped config of that name"
                f"{f'; did you mean {near[0]}?' if near else ''} (shipped: {', '.join(shipped)})"
            )
        packaged = resources.files("m2rl.configs") / f"{stem}.toml"
        text, where = packaged.read_text(encoding="utf-8"), f"m2rl/configs/{packaged.name}"
    try:
        return tomllib.loads(text), where
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{where}: not valid TOML: {error}") from None


def read_config(name: str) -> tuple[Config, str]:
    """A run's config, not checked yet, and where it was found."""
    table, where = read_toml(name)
    return build(Config, table, where), where


def build(cls: type, table: Any, where: str, key: str = "") -> Any:
    """A dataclass from a TOML table; InputError names the file, the dotted key and the rule."""
    if not isinstance(table, dict):
        raise InputError(f"{where}: {key or 'top level'} must be a table, got {table!r}")
    hints = typing.get_type_hints(cls)
    values = {}
    for name, value in table.items():
        dotted = f"{key}.{name}" if key else name
        if name not in hints:
            near = difflib.get_close_matches(name, hints, 1)
            raise InputError(f"{where}: unknown key {dotted}{f', did you mean {near[0]}?' if near else ''}")
        values[name] = _convert(hints[name], value, where, dotted)
    return cls(**values)


def _convert(hint: Any, value: Any, where: str, key: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return build(typing.cast(type, hint), value, where, key)
    origin = typing.get_origin(hint)
    if origin is Literal:
        choices = typing.get_args(hint)
        if value not in choices:
            near = difflib.get_close_matches(str(value), [str(c) for c in choices], 1)
            raise InputError(
                f"{where}: {key} must be one of {', '.join(map(repr, choices))}, got {value!r}"
                f"{f'; did you mean {near[0]!r}?' if near else ''}"
            )
        return value
    if origin is tuple:
        if isinstance(value, str):
            value = [value]
        if not isinstance(value, list):
            raise InputError(f"{where}: {key} must be a list, got {value!r}")
        return tuple(_convert(typing.get_args(hint)[0], v, where, f"{key}[{i}]") for i, v in enumerate(value))
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (hint is not bool and isinstance(value, bool)):
        raise InputError(f"{where}: {key} must be {hint.__name__}, got {value!r}")
    return value


def check(config: Config, where: str) -> Config:
    """The rules between and inside keys; InputError names the first that is broken."""

    def need(ok: bool, message: str) -> None:
        if not ok:
            raise InputError(f"{where}: {message}")

    r, o, t, opt = config.rollout, config.objective, config.train, config.optim
    if config.algorithm == "distill":
        need(bool(config.domain), "distillation needs a [[domain]] with a teacher for every domain")
        for d in config.domain:
            need(bool(d.teacher), f"domain {d.name}: distillation needs its teacher, the folder of a model")
        masses = [d.token_mass for d in config.domain]
        need(
            all(m > 0 for m in masses) or not any(masses),
            f"token_mass must be above 0 in every [[domain]] or in none, got {', '.join(map(str, masses))}",
        )
        need(o.updates_per_rollout == 1, "distillation makes one update per rollout: objective.updates_per_rollout = 1")
        for key, value in {
            "rollout.carry_over": r.carry_over,
            "rollout.dynamic_sampling_rounds": r.dynamic_sampling_rounds,
            "objective.kl_coef": o.kl_coef,
        }.items():
            need(not value, f"distillation does not read {key}, got {value}")
    if config.algorithm != "sft":
        need(
            r.group_size >= 2 or config.algorithm == "distill",
            f"rollout.group_size must be at least 2 for GRPO (a group of {r.group_size} has no advantage)",
        )
        for key in ("prompts_per_step", "max_new_tokens", "max_prompt_tokens", "max_sequences", "verifier_workers"):
            need(getattr(r, key) >= 1, f"rollout.{key} must be at least 1, got {getattr(r, key)}")
        need(r.verifier_timeout_s > 0, f"rollout.verifier_timeout_s must be above 0, got {r.verifier_timeout_s}")
        need(
            r.dynamic_sampling_rounds >= 0,
            f"rollout.dynamic_sampling_rounds must not be negative, got {r.dynamic_sampling_rounds}",
        )
        need(r.temperature > 0, f"rollout.temperature must be above 0, got {r.temperature}")
        need(0 <= r.carry_over < 1, f"rollout.carry_over must be in [0, 1), got {r.carry_over}")
        if r.carry_over:
            need(not r.deterministic, "rollout.carry_over needs rollout.deterministic = false: it depends on timing")
            need(
                o.tis_cap > 0,
                "rollout.carry_over needs objective.tis_cap above 0: its tokens are older than the policy",
            )
            need(not r.dynamic_sampling_rounds, "rollout.carry_over and dynamic_sampling_rounds exclude each other")
            need(r.tensor_parallel == 1, "rollout.carry_over needs rollout.tensor_parallel = 1")
        need(r.tensor_parallel >= 1, f"rollout.tensor_parallel must be at least 1, got {r.tensor_parallel}")
        need(
            r.tensor_parallel == 1 or r.engine == "vllm", 'rollout.tensor_parallel above 1 needs rollout.engine "vllm"'
        )
        need(r.kv_cache_gib > 0, f"rollout.kv_cache_gib must be above 0, got {r.kv_cache_gib}")
        need(r.stall_timeout_s > 0, f"rollout.stall_timeout_s must be above 0, got {r.stall_timeout_s}")
        need(0 <= o.clip_low <= 1, f"objective.clip_low must be in [0, 1], got {o.clip_low}")
        need(o.clip_high >= 0, f"objective.clip_high must not be negative, got {o.clip_high}")
        need(o.tis_cap >= 0, f"objective.tis_cap must not be negative, got {o.tis_cap}")
        need(
            o.updates_per_rollout >= 1, f"objective.updates_per_rollout must be at least 1, got {o.updates_per_rollout}"
        )
        need(
            o.updates_per_rollout <= r.prompts_per_step,
            "objective.updates_per_rollout must not exceed rollout.prompts_per_step",
        )
        need(o.kl_coef >= 0, f"objective.kl_coef must not be negative, got {o.kl_coef}")
        need(o.dual_clip == 0 or o.dual_clip > 1, f"objective.dual_clip must be 0 (off) or above 1, got {o.dual_clip}")
        quotas = sum(d.quota for d in config.domain)
        need(
            quotas <= r.prompts_per_step,
            f"domain quotas add up to {quotas}, more than rollout.prompts_per_step {r.prompts_per_step}",
        )
        need(
            not config.domain or any(not d.quota for d in config.domain) or quotas == r.prompts_per_step,
            f"domain quotas add up to {quotas}, not to rollout.prompts_per_step {r.prompts_per_step}",
        )
    else:
        need(t.batch_size >= 1, f"train.batch_size must be at least 1, got {t.batch_size}")
    need(t.steps >= 1, f"train.steps must be at least 1, got {t.steps}")
    need(t.tokens_per_bin >= 16, f"train.tokens_per_bin must be at least 16, got {t.tokens_per_bin}")
    need(t.keep_checkpoints >= 1, f"train.keep_checkpoints must be at least 1, got {t.keep_checkpoints}")
    need(t.replicas >= 1, f"train.replicas must be at least 1, got {t.replicas}")
    need(t.save_every >= 0, f"train.save_every must not be negative, got {t.save_every}")
    need(config.threads >= 1, f"threads must be at least 1, got {config.threads}")
    need(opt.lr > 0, f"optim.lr must be above 0, got {opt.lr}")
    for key in ("beta1", "beta2"):
        need(0 <= getattr(opt, key) < 1, f"optim.{key} must be in [0, 1), got {getattr(opt, key)}")
    for key in ("warmup_steps", "weight_decay", "max_grad_norm", "min_lr_ratio"):
        need(getattr(opt, key) >= 0, f"optim.{key} must not be negative, got {getattr(opt, key)}")
    e = config.evaluation
    for key in ("k", "problems"):
        need(getattr(e, key) >= 1, f"evaluation.{key} must be at least 1, got {getattr(e, key)}")
    for key in ("every", "temperature", "max_new_tokens"):
        need(getattr(e, key) >= 0, f"evaluation.{key} must not be negative, got {getattr(e, key)}")
    for f in dataclasses.fields(config):
        for key, value in vars(part).items() if dataclasses.is_dataclass(part := getattr(config, f.name)) else ():
            need(not isinstance(value, float) or math.isfinite(value), f"{f.name}.{key} must be finite, got {value}")
    need(bool(config.data.train), "data.train must name at least one file")
    need(all(d.name for d in config.domain), "every [[domain]] needs a name")
    names = [d.name for d in config.domain]
    need(len(set(names)) == len(names), f"a domain is listed twice in [[domain]]: {', '.join(names)}")
    for d in config.domain:
        need(d.quota >= 0 and d.weight >= 0, f"domain {d.name}: quota and weight must not be negative")
        need("{prompt}" in d.prompt_template, f"domain {d.name}: prompt_template must contain {{prompt}}")
    return config


HELP = """\
Train one language model on several domains with verifiable rewards.

  torchrun -m m2rl.train                                           the built-in model on generated problems, 3 minutes
  torchrun -m m2rl.train --config my.toml                          your model and data (README, "Real input")
  torchrun -m m2rl.train --config my.toml --dry-run                what it would do and need; trains nothing
  torchrun -m m2rl.train --config my.toml --rollout.group-size 8   any key of the config, overridden

--config FILE|NAME   a TOML file, or a config that ships with m2rl ({names}); default embedded
--dry-run            resolve everything, print the plan, train nothing

The same command continues a run that was interrupted; --resume never starts it over. What is group_size = 8 under \
[rollout] in TOML is --rollout.group-size 8 here; --domain.1.quota 8 sets the second [[domain]]. Every key:"""


def load(argv: list[str]) -> tuple[Config, bool]:
    """Parse a command line: --config and dotted overrides of any key make the config; whether it has --dry-run."""
    first = argparse.ArgumentParser(add_help=False)
    first.add_argument("--config", default="embedded")
    first.add_argument("--dry-run", action="store_true")
    known, rest = first.parse_known_args(argv)
    config, where = read_config(known.config)
    if rest:
        import tyro  # here: its import costs 0.3 s that the run without overrides need not pay

        where = f"{where} with {' '.join(rest)}"
        helping = not {"-h", "--help"}.isdisjoint(rest)
        config = tyro.cli(
            Config,
            # every [[domain]] has the same keys: help shows them once
            default=dataclasses.replace(config, domain=config.domain[:1]) if helping else config,
            args=rest,
            prog="torchrun -m m2rl.train",
            config=(tyro.conf.FlagConversionOff,),
            description=HELP.format(names=", ".join(named_configs())),
        )
    return check(config, where), known.dry_run


def to_toml(config: Config) -> str:
    """The resolved config as TOML, for the run folder; `build(Config, tomllib.loads(text))` gives it back."""

    def scalar(value: Any) -> str:
        if isinstance(value, bool):
            return str(value).lower()
        if isinstance(value, tuple):
            return "[" + ", ".join(scalar(v) for v in value) + "]"
        if isinstance(value, str):
            escaped = value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n").replace("\t", "\\t")
            return f'"{escaped}"'
        return repr(value)

    plain, tables = [], []
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if dataclasses.is_dataclass(value):
            tables.append(f"\n[{f.name}]\n" + "\n".join(f"{k} = {scalar(v)}" for k, v in vars(value).items()))
        elif f.name == "domain":
            tables += ["\n[[domain]]\n" + "\n".join(f"{k} = {scalar(v)}" for k, v in vars(d).items()) for d in value]
        else:
            plain.append(f"{f.name} = {scalar(value)}")
    return "\n".join(plain + tables) + "\n"


def differing_keys(saved: Config, now: Config) -> list[str]:
    """Dotted keys in which two configs differ, of those that a resumed run must not change."""

    def flat(config: Config) -> dict[str, Any]:
        out: dict[str, Any] = {}
        for f in dataclasses.fields(config):
            value = getattr(config, f.name)
            if dataclasses.is_dataclass(value):
                out |= {f"{f.name}.{k}": v for k, v in vars(value).items()}
            else:
                out[f.name] = value
        return out

    a, b = flat(saved), flat(now)
    return [k for k in a if a[k] != b[k] and k not in RESUME_MAY_CHANGE and k.split(".")[0] not in RESUME_MAY_CHANGE]
