"""A merged checkpoint on its way to the disk: a folder beside `--out`, a journal to resume from, the card, a rename."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from m2rl_kernels import merge_passes as passes
from m2rl_kernels.merge_recipe import Recipe

from m2rl.merge_inputs import CODES, Inputs
from m2rl.safetensors_io import DTYPES, Layout, ShardWriter, TensorInfo, plan_layout
from m2rl.types import InputError

COPIED = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
    "preprocessor_config.json",
)


class Journal:
    """One line per finished tensor: its name and the checksum of what was written. The first line names the merge."""

    def __init__(self, folder: Path, fingerprint: str) -> None:
        self.path, self.fingerprint = folder / "journal.jsonl", fingerprint
        self.handle = open(self.path, "a+")  # noqa: SIM115 - lives as long as the merge
        try:
            fcntl.flock(self.handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InputError(f"another process is writing {folder}") from None

    def finished(self) -> dict[str, dict[str, Any]] | None:
        """name -> entry; None if the journal belongs to another merge or is empty."""
        self.handle.seek(0)
        lines = self.handle.read().splitlines()
        entries = []
        for line in lines:
            try:
                entries.append(json.loads(line))
            except ValueError:
                break  # the line a crash cut short
        if not entries or entries[0].get("fingerprint") != self.fingerprint:
            return None
        return {entry["tensor"]: entry for entry in entries[1:]}

    def restart(self) -> None:
        self.handle.seek(0)
        self.handle.truncate()
        self.add(fingerprint=self.fingerprint)

    def add(self, **entry: Any) -> None:
        self.handle.write(json.dumps(entry) + "\n")
        self.handle.flush()

    def close(self) -> None:
        self.handle.close()


@dataclass
class Output:
    """One merged checkpoint being written."""

    recipe: Recipe
    folder: Path
    layout: Layout
    partial: Path
    journal: Journal
    writer: ShardWriter
    done: dict[str, dict[str, Any]] = field(default_factory=dict)  # tensor -> journal entry


def output_folder(folder: Path, inputs: Mapping[str, Path], overwrite: bool) -> Path:
    """`--out` without symbolic links. InputError where it is taken, or where replacing it would harm an input (name ->
    folder)."""
    folder = folder.resolve()  # the work lies beside what is renamed, not beside a link to it
    for source, path in inputs.items():
        real = path.resolve()
        if folder == real:
            raise InputError(f"--out {folder} is the input {source} itself: choose another --out")
        if real in folder.parents:
            raise InputError(f"--out {folder} lies inside the input {source}: choose another --out")
        if folder in real.parents:
            raise InputError(f"--out {folder} holds the input {source}: choose another --out")
    if folder.is_mount():
        raise InputError(f"--out {folder} is a mount point, which cannot be renamed: give a folder inside it")
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--out {folder} is a file: give a folder")
    if folder.exists() and any(folder.iterdir()) and not overwrite:
        raise InputError(f"{folder} exists and is not empty: choose another --out, or pass --overwrite")
    return folder


def open_output(
    inputs: Inputs, chosen: Recipe, folder: Path, *, dtype: str | None, shard_bytes: int, resume: bool, overwrite: bool
) -> Output:
    folder = output_folder(folder, {c.source: c.folder for c in inputs.all}, overwrite)
    layout = plan_layout(
        [(i.name, out_dtype(i, dtype), i.shape) for i in map(inputs.info, [*inputs.merged, *inputs.copied])],
        shard_bytes,
    )
    partial = folder.with_name(f".{folder.name}.partial")
    fingerprint = hashlib.sha256(
        json.dumps(
            {
                "recipe": chosen.describe(),
                "layout": sorted(layout.files.items()),
                "dtype": dtype,
                "per_tensor": chosen.per_tensor is not None,
                "inputs": [[str(c.folder.resolve()), c.state] for c in inputs.all],
                "version": _version(),
            },
            default=str,
        ).encode()
    ).hexdigest()
    journal = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        existed = partial.exists()
        held = sum(p.stat().st_blocks * 512 for p in partial.glob("*.safetensors")) if existed else 0
        free = shutil.disk_usage(folder.parent).free
        need = layout.bytes + (64 << 20 if layout.bytes > 64 << 20 else 1 << 20) - held
        if free < need:
            raise InputError(
                f"{folder.parent} has {volume(free)} free, the merge needs {volume(need)}: nothing was written"
            )
        partial.mkdir(exist_ok=True)
        journal = Journal(partial, fingerprint)
        done = journal.finished() if resume else None
        if existed and done is None:
            found = "found an unfinished merge"
            if resume:
                reason = "is a different one" if journal.path.stat().st_size else "has lost its journal"
                found = f"the unfinished merge in {partial} {reason}"
            print(f"{found}: starting over", file=sys.stderr)
        if done is None:
            for stale in partial.glob("*.safetensors"):
                stale.unlink()
            journal.restart()
        writer = ShardWriter(partial, layout)
    except OSError as error:
        if journal is not None:
            journal.close()
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            shutil.rmtree(partial, ignore_errors=True)
            raise InputError(
                f"the disk of {folder.parent} is full: {volume(layout.bytes)} could not be allocated"
            ) from None
        raise InputError(f"cannot write {folder}: {error.strerror} ({error.filename})") from None
    output = Output(chosen, folder, layout, partial, journal, writer)
    for name, entry in (done or {}).items():
        data = writer.read(name, entry["bytes"])  # trust what is on the disk, not what was meant to be there
        if passes.checksum(data.ctypes.data, data.nbytes) == entry["checksum"][-1]:
            output.done[name] = entry
    if output.done:
        print(f"resuming: {len(output.done)} of {len(layout.place)} tensors are already written", file=sys.stderr)
    return output


def volume(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.2f} MB"


def out_dtype(info: TensorInfo, dtype: str | None) -> str:
    return DTYPES[dtype] if dtype and info.dtype in CODES else info.dtype


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("m2rl")
    except PackageNotFoundError:
        return "unknown"


def finish(inputs: Inputs, output: Output, summary: dict[str, Any], *, dtype: str | None, sync: bool) -> None:
    """Configuration, tokenizer and card beside the weights; then everything to disk, and the rename."""
    donor = inputs.donor.folder
    config = dict(inputs.donor.config)
    if config:
        stored = dtype or {v: k for k, v in DTYPES.items()}.get(
            inputs.info(max(inputs.merged, key=lambda n: inputs.info(n).size)).dtype
        )
        for key in ("dtype", "torch_dtype"):
            if key in config:
                config[key] = stored
        if not {"dtype", "torch_dtype"} & set(config):
            config["dtype"] = stored
        (output.partial / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    for path in [*(donor / n for n in COPIED), *donor.glob("*.py")]:
        if path.is_file():
            shutil.copyfile(path, output.partial / path.name)
    record = {
        "tool": f"m2rl.merge {_version()}",
        "numpy": np.__version__,
        "python": sys.version.split()[0],
        "recipe": output.recipe.describe(),
        "dtype": dtype or "as the base",
        **summary,
    }
    (output.partial / "merge.json").write_text(json.dumps(record, indent=2, default=str) + "\n")
    (output.partial / "README.md").write_text(card(inputs, output.recipe, record))
    output.writer.finish(sync)
    if sync:
        for path in output.partial.iterdir():
            _sync(path)
    output.journal.path.unlink()  # last: until then an interruption can be continued
    output.journal.close()
    if sync:
        _sync(output.partial)
    if output.folder.exists():
        old = output.folder.with_name(f".{output.folder.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        output.folder.rename(old)
        output.partial.rename(output.folder)
        shutil.rmtree(old)
    else:
        output.partial.rename(output.folder)
    if sync:
        _sync(output.folder.parent)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def card(inputs: Inputs, r: Recipe, record: Mapping[str, Any]) -> str:
    """The model card: what was merged, how, from which bytes."""
    rule = r.rule
    lines = [
        "---",
        "library_name: transformers",
        "tags:",
        "- merge",
        "base_model:",
        *(f"- {json.dumps(c.source)}" for c in inputs.all),  # quoted: a path may hold what YAML reads otherwise
        "---",
        "",
        f"# {Path(inputs.donor.source).name}, merged with {r.method}",
        "",
        f"    {rule.formula}        ({rule.source})",
        "",
        "| model | weight | content checksum |",
        "|---|---|---|",
    ]
    weights = ["base"] * (inputs.base is not None) + ["by tensor" if r.per_tensor else w for w in r.weights]
    lines += [f"| {m['source']} | {w} | {m['content']} |" for m, w in zip(record["models"], weights)]
    lines += [
        f"| **this merge** | | {record['content of the merge']} |",
        "",
        f"Made by {record['tool']} (numpy {record['numpy']}, Python {record['python']}). Every choice:",
        "",
        "```json",
        json.dumps(record["recipe"], indent=2, default=str),
        "```",
        "",
        "The content checksum is a 64-bit checksum per tensor, hashed over names, types and shapes: it does not "
        "depend on sharding, "
        "and is not cryptographic.",
        "",
    ]
    return "\n".join(lines)
