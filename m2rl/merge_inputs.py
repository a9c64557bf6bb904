"""The models of a merge, checked against each other by their headers and configurations, before a tensor is read."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from m2rl_kernels import native

from m2rl.safetensors_io import DTYPES, Checkpoint, TensorInfo, read_json
from m2rl.types import InputError

CODES = {safetensors: native.DTYPE_CODES[name] for name, safetensors in DTYPES.items()}  # "BF16" -> 1
# Configuration that changes what the same weights compute: a merge across different values is meaningless.
SAME_CONFIG = (
    "model_type",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "rms_norm_eps",
    "rope_theta",
    "rope_parameters",
    "rope_scaling",
    "tie_word_embeddings",
)


def warn(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr)


@dataclass
class Inputs:
    """A base and its experts, checked against each other."""

    base: Checkpoint | None
    experts: list[Checkpoint]
    merged: list[str]  # float tensors, in file order
    copied: list[str]  # other types: taken from the donor, must agree

    @property
    def donor(self) -> Checkpoint:
        """Whose configuration, tokenizer and non-float tensors the output gets."""
        return self.base or self.experts[0]

    @property
    def all(self) -> list[Checkpoint]:
        return [*([self.base] if self.base else []), *self.experts]

    def info(self, name: str) -> TensorInfo:
        return self.donor.tensors[name]


def open_inputs(base: str | os.PathLike | None, experts: Sequence[str | os.PathLike]) -> Inputs:
    """Open and check. InputError names the first thing that does not fit."""
    if not experts:
        raise InputError("--experts needs at least one model, got none")
    found = Inputs(Checkpoint(base) if base is not None else None, [Checkpoint(e) for e in experts], [], [])
    seen: dict[Path, str] = {}
    for checkpoint in found.experts:
        real = checkpoint.folder.resolve()
        if real in seen:
            warn(f"{checkpoint.source} is given twice as an expert")
        if found.base and real == found.base.folder.resolve():
            warn(f"expert {checkpoint.source} is the base itself: it adds nothing")
        seen[real] = checkpoint.source
    donor = found.donor
    for other in found.all:
        if other is donor:
            continue
        _check_names(donor, other)
        for name, info in donor.tensors.items():
            _check_tensor(donor, other, info, other.tensors[name])
        _check_config(donor, other)
        _check_tokenizer(donor, other)
    order = sorted(donor.tensors.values(), key=lambda info: (donor.files.index(info.file), info.begin))
    for info in order:
        (found.merged if info.dtype in CODES else found.copied).append(info.name)
    return found


def _check_names(donor: Checkpoint, other: Checkpoint) -> None:
    missing, extra = sorted(set(donor.tensors) - set(other.tensors)), sorted(set(other.tensors) - set(donor.tensors))
    for name, have, lack in [*((n, donor, other) for n in missing), *((n, other, donor) for n in extra)]:
        if name.startswith("lm_head") or name.endswith("embed_tokens.weight"):
            raise InputError(
                f"{name} is in {have.source} but not in {lack.source}: one ties the output head to the embedding "
                f"and the "
                f"other does not (tie_word_embeddings: {have.config.get('tie_word_embeddings')} and "
                f"{lack.config.get('tie_word_embeddings')}); save both the same way"
            )
    if missing:
        raise InputError(f"{other.source} lacks {len(missing)} tensors that {donor.source} has, first {missing[0]}")
    if extra:
        raise InputError(f"{other.source} has {len(extra)} tensors that {donor.source} lacks, first {extra[0]}")


def _check_tensor(donor: Checkpoint, other: Checkpoint, a: TensorInfo, b: TensorInfo) -> None:
    if a.shape != b.shape:
        if (
            len(a.shape) == len(b.shape) == 2
            and a.shape[1] == b.shape[1]
            and ("embed" in a.name or "lm_head" in a.name)
        ):
            raise InputError(
                f"{a.name}: vocabulary sizes differ by {abs(a.shape[0] - b.shape[0])} rows ({a.shape[0]} in "
                f"{donor.source}, "
                f"{b.shape[0]} in {other.source}); resize one to the other first"
            )
        raise InputError(f"{a.name} has shape {list(a.shape)} in {donor.source} and {list(b.shape)} in {other.source}")
    if (a.dtype in CODES) != (b.dtype in CODES) or (a.dtype not in CODES and a.dtype != b.dtype):
        raise InputError(f"{a.name} has dtype {a.dtype} in {donor.source} and {b.dtype} in {other.source}")


def _check_config(donor: Checkpoint, other: Checkpoint) -> None:
    a, b = donor.config, other.config
    for key in SAME_CONFIG:
        if a and b and a.get(key) != b.get(key) and key in a and key in b:
            raise InputError(f"config.json: {key} is {a[key]} in {donor.source} and {b[key]} in {other.source}")


def _vocabulary(folder: Path) -> Any:
    path = folder / "tokenizer.json"
    if path.is_file():
        content = read_json(path)
        model = content.get("model", {})
        try:
            added = [(t["id"], t["content"]) for t in content.get("added_tokens", [])]
            return {"vocab": model.get("vocab"), "merges": model.get("merges"), "added": added}
        except (AttributeError, KeyError, TypeError):
            raise InputError(f"{path} is not a tokenizer: it must hold a model and added_tokens") from None
    path = folder / "vocab.json"
    return read_json(path) or None


def _check_tokenizer(donor: Checkpoint, other: Checkpoint) -> None:
    def digest(folder: Path) -> list[bytes]:
        return [
            hashlib.sha256(p.read_bytes()).digest()
            for n in ("tokenizer.json", "vocab.json")
            if (p := folder / n).is_file()
        ]

    first, second = digest(donor.folder), digest(other.folder)
    if not first or not second or first == second:
        return
    a, b = _vocabulary(donor.folder), _vocabulary(other.folder)
    if a != b:
        sizes = [len(v.get("vocab") or ()) if isinstance(v, dict) and "vocab" in v else len(v or ()) for v in (a, b)]
        raise InputError(
            f"the tokenizers of {donor.source} and {other.source} differ ({sizes[0]} and {sizes[1]} entries in the "
            "vocabulary): the same row of the embedding means different tokens"
        )
