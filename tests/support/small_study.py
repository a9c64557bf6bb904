"""The folder that a study leaves behind, made in seconds: tiny models, real merges, chance responses, real analyses."""

import json
from pathlib import Path

import numpy as np
import tiny
import torch

from m2rl.analyze import efficiency, information, policies, skills, weights
from m2rl.merge import merge
from m2rl.policy import Policy, load_model
from m2rl.samples import write_samples
from m2rl.types import Prompt, Sample

DOMAINS = ("math", "code", "science", "if")
MERGES = {"average": {"method": "average"}, "ties": {"method": "ties", "density": 0.5, "lam": 1.5}}
MODELS = ("sft", *DOMAINS, "mixed", *MERGES, "distill")
SKILL = {"sft": 0.4, "mixed": 0.9, "average": 0.6, "ties": 0.75, "distill": 0.8}  # chance of a right response
VOCAB = 13


def skill(model: str, domain: str) -> float:
    return SKILL.get(model, 0.9 if model == domain else 0.4)


def make(folder: Path, seed: int = 0, problems: int = 12, k: int = 4) -> Path:
    """Everything that the report reads, as the study's stages write it."""
    rng = np.random.default_rng(seed)
    generator = torch.Generator().manual_seed(seed)
    base = tiny.model(vocab=VOCAB, seed=seed)
    folders = {}
    for name in MODELS:
        if name in MERGES:
            folders[name] = folder / "merges" / name
            experts = [str(folders[d]) for d in DOMAINS]
            merge(str(folders["sft"]), experts, **MERGES[name], out=str(folders[name]), progress=False, sync=False)
            continue
        changed = tiny.model(vocab=VOCAB, seed=seed)
        changed.load_state_dict(base.state_dict())
        with torch.no_grad():
            for p in changed.parameters() if name != "sft" else ():
                p += 0.02 * torch.randn(p.shape, generator=generator) * (torch.rand(p.shape, generator=generator) < 0.5)
        folders[name] = folder / name / "model"
        changed.save_pretrained(folders[name])
    samples = {}
    for name in MODELS:
        samples[name] = []
        for d in DOMAINS:
            for i in range(problems):
                prompt = Prompt(f"{d}/{i}", d, tuple(rng.integers(3, VOCAB, 4).tolist()), f"{d} <problem> {i}?", {})
                for index in range(k):
                    right = bool(rng.random() < skill(name, d))
                    tokens = rng.integers(3, VOCAB, int(rng.integers(2, 6))).tolist()
                    samples[name].append(
                        Sample(
                            prompt,
                            index,
                            tokens,
                            [-1.0] * len(tokens),
                            "stop",
                            0,
                            text=f"{name} says <b>{index}</b>",
                            reward=float(right),
                            status="ok" if right else "wrong",
                        )
                    )
        write_samples(folder / "samples" / f"{name}.jsonl", samples[name], name)
    for run in (*DOMAINS, "mixed", "distill", "sft"):
        rows = []
        for step in range(16):
            row = {"step": step, "step_s": 0.5, "tokens": 100, "trained_tokens": 60, "memory/resident_gib": 0.5}
            for d in [run] if run in DOMAINS else DOMAINS:
                row |= {f"{d}/reward": 0.4 + 0.03 * step, f"{d}/groups": 4}
            rows.append(json.dumps(row))
        (folder / run / "metrics.jsonl").write_text("\n".join(rows) + "\n")
        listed = [f'[[domain]]\nname = "{d}"\nquota = 4\n' for d in ([run] if run in DOMAINS else DOMAINS)]
        (folder / run / "config.toml").write_text("".join(listed))
    out = folder / "analysis"
    paths = {n: str(f) for n, f in folders.items()}
    weights.analyze(weights.measure(paths["sft"], {n: p for n, p in paths.items() if n != "sft"}), base="sft").write(
        out
    )
    kept = {n: Policy(load_model(p)).eval().requires_grad_(False) for n, p in folders.items()}
    kl = policies.kl_matrix(kept, {n: s[::4] for n, s in samples.items()})
    accuracy = policies.accuracies(samples)
    policies.analyze(kl, accuracy, base="sft", experts={d: d for d in DOMAINS}, resamples=100).write(out)
    rewards = {n: skills.rewards_of(s) for n, s in samples.items()}
    skills.analyze(rewards, base="sft", experts=list(DOMAINS), resamples=200).write(out)
    information.analyze(kl, rewards, base="sft", resamples=100).write(out)
    kinds = {"sft": "sft", "mixed": "mixed", "distill": "distill"}
    runs = [efficiency.read_run(folder / n, n, kinds.get(n, "expert")) for n in ("sft", *DOMAINS, "mixed", "distill")]
    efficiency.analyze([*runs, efficiency.merge_cost("merges", 1.5)]).write(out)
    return folder
