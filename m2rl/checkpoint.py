"""Checkpoints that survive anything: written beside, synced, renamed; complete or absent.

    <run>/checkpoints/step-000040/   model + optimizer shards, step, config, RNG; `torch.distributed.checkpoint` format
    <run>/model/                     the final model as a Hugging Face folder

A folder whose name is not `step-NNNNNN` is never read, so a process killed while saving leaves the last complete one.
A run is finished when summary.json stands in its folder: what ends before that is continued, its evaluation included.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from transformers import PreTrainedTokenizerBase

from m2rl.policy import Policy, full_parameters
from m2rl.types import InputError


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def complete(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(p for p in (folder / "checkpoints").glob("step-*") if p.is_dir() and (p / "state.json").is_file())


def _fsync_tree(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextlib.contextmanager
def atomic_folder(target: Path):
    """Yield a temporary sibling folder on every rank; rank 0 syncs and renames it to `target` when the block ends
    well. One that ends badly leaves nothing behind; OSError when the reason is a full disk."""
    partial, old = target.with_name(f".{target.name}.partial"), target.with_name(f".{target.name}.old")
    if rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    barrier()
    try:
        yield partial
        barrier()
        if rank() == 0:
            _fsync_tree(partial)
    except BaseException as error:  # as is torch's CheckpointException
        if rank() == 0:
            full = _full_disk(partial)
            shutil.rmtree(partial, ignore_errors=True)
            if full is not None:
                raise full from error
        raise
    if rank() == 0:
        if target.exists():
            target.rename(old)
        partial.rename(target)
        shutil.rmtree(old, ignore_errors=True)
        handle = os.open(target.parent, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)
    barrier()


def _full_disk(folder: Path) -> OSError | None:
    """The error of one more MiB. torch and safetensors report a full disk as errors of their own; the disk itself is
    sure."""
    try:
        with open(folder / "probe", "wb") as probe:
            probe.write(bytes(1 << 20))
            probe.flush()
            os.fsync(probe.fileno())
    except OSError as error:
        return OSError(error.errno, error.strerror, str(folder))
    return None


def remove(folder: Path) -> None:
    """Delete a checkpoint; hidden first, so that a kill halfway leaves none that looks complete."""
    hidden = folder.with_name(f".{folder.name}.old")
    folder.rename(hidden)
    shutil.rmtree(hidden)


def rng_state() -> dict[str, Any]:
    state = {"torch": torch.get_rng_state(), "numpy": np.random.get_state(), "python": random.getstate()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_rng_state(state: Mapping[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    np.random.set_state(state["numpy"])
    random.setstate(state["python"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


@contextlib.contextmanager
def _quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.distributed.checkpoint warns of its own deprecations on every save
        yield


def save(
    folder: Path,
    step: int,
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    config_toml: str,
    keep: int,
    extra: Mapping[str, Any],
) -> Path:
    """Write step `step` and drop all but the newest `keep`; collective. OSError (disk full) leaves the older ones
    intact."""
    target = folder / "checkpoints" / f"step-{step:06d}"
    with _quiet(), atomic_folder(target) as partial:
        model_state, optimizer_state = get_state_dict(policy, optimizer)
        dcp.save(
            {"model": model_state, "optimizer": optimizer_state},
            checkpoint_id=str(partial / "shards"),
            no_dist=not dist.is_initialized(),
        )
        torch.save(rng_state(), partial / f"rng-{rank()}.pt")
        if rank() == 0:
            (partial / "config.toml").write_text(config_toml)
            (partial / "state.json").write_text(json.dumps({"step": step, **extra}))
    if rank() == 0:
        for old in complete(folder)[:-keep]:
            remove(old)
        for left in target.parent.glob(".step-*"):  # by a process that was killed while it saved or deleted
            shutil.rmtree(left, ignore_errors=True)
    return target


def load(path: Path, policy: Policy, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Restore what `save` wrote, in place; collective. The saved `state.json` comes back."""
    state = json.loads((path / "state.json").read_text())
    with _quiet():
        model_state, optimizer_state = get_state_dict(policy, optimizer)
        target: dict[str, Any] = {"model": model_state, "optimizer": optimizer_state}
        dcp.load(target, checkpoint_id=str(path / "shards"), no_dist=not dist.is_initialized())
        set_state_dict(
            policy,
            optimizer,
            model_state_dict=target["model"],
            optim_state_dict=target["optimizer"],
            options=StateDictOptions(strict=True),
        )
    rng = path / f"rng-{rank()}.pt"
    if rng.exists():  # absent when the world has grown: nothing of ours draws from it, see Mixture and sample_seed
        set_rng_state(torch.load(rng, weights_only=False))
    return state


def export(target: Path, policy: Policy, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype) -> Path:
    """Write a Hugging Face folder that AutoModelForCausalLM.from_pretrained and vLLM load; collective."""
    state = {}
    for name, full in full_parameters(policy).items():  # gathered one by one; kept on rank 0 alone
        if rank() == 0:
            state[name] = full.to("cpu", dtype).contiguous()
    with atomic_folder(target) as partial:
        if rank() == 0:
            model = policy.model
            if model.config.tie_word_embeddings:
                state.pop("lm_head.weight", None)
            config = type(model.config).from_dict(model.config.to_dict())
            config.dtype = str(dtype).removeprefix("torch.")
            config.architectures = [type(model).__name__.removeprefix("FSDP")]
            from safetensors.torch import save_file

            save_file(state, partial / "model.safetensors", metadata={"format": "pt"})
            config.save_pretrained(partial)
            if model.generation_config is not None:
                model.generation_config.save_pretrained(partial)
            tokenizer.save_pretrained(partial)
    return target


def resume_path(folder: Path, resume: str, steps: int) -> Path | None:
    """The checkpoint to continue from: the newest complete one of an unfinished run, a given folder, or None to
    start. A run that took its last step and was killed before summary.json is unfinished."""
    if resume == "never":
        return None
    if resume != "auto":
        path = Path(resume)
        if not (path / "state.json").is_file():
            raise InputError(f"resume {resume}: not a complete checkpoint (no state.json in it)")
        return path
    found = complete(folder)
    if not found or (step_of(found[-1]) >= steps and (folder / "summary.json").is_file()):
        return None
    return found[-1]


def step_of(path: Path) -> int:
    """Optimizer steps taken before this checkpoint was written."""
    return json.loads((path / "state.json").read_text())["step"]
