"""Safetensors by mmap, without torch: read a checkpoint's headers, give tensors as addresses, write shards in place.

    file = [8 bytes: header length N][N bytes: JSON {name: {dtype, shape, data_offsets}}][tensor bytes]

A checkpoint is a folder (or a hub id that is already in the local cache) with `model.safetensors`, or with shards and
`model.safetensors.index.json`. Every malformed file is an InputError that names it, before any tensor is touched.
"""

from __future__ import annotations

import itertools
import json
import math
import mmap
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from m2rl.types import InputError

ITEM_BYTES = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U64": 8,
    "U32": 4,
    "U16": 2,
    "U8": 1,
    "BOOL": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F8_E8M0": 1,
    "C64": 8,
}
DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}  # names of torch -> of safetensors
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where one tensor lies."""

    name: str
    dtype: str  # a key of ITEM_BYTES
    shape: tuple[int, ...]
    file: Path
    begin: int  # byte offset in the file
    size: int  # bytes


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of one file. InputError if it is truncated, its header is not JSON, or its offsets do not fit."""
    total = path.stat().st_size
    with open(path, "rb") as handle:
        head = handle.read(8)
        length = int.from_bytes(head, "little")
        if len(head) < 8 or 8 + length > total:
            raise InputError(f"{path} is truncated: its header needs {8 + length} bytes, the file has {total}")
        try:
            header = json.loads(handle.read(length))
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path} is not a safetensors file: its header is not JSON ({error})") from None
    if not isinstance(header, dict):
        raise InputError(f"{path} is not a safetensors file: its header is a {type(header).__name__}, not a mapping")
    found, spans = {}, []
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        try:
            dtype, shape, (begin, end) = entry["dtype"], tuple(map(int, entry["shape"])), entry["data_offsets"]
        except (KeyError, TypeError, ValueError):
            raise InputError(f"{path}: tensor {name} must have dtype, shape and data_offsets, got {entry!r}") from None
        if not all(type(x) is int and x >= 0 for x in (*entry["shape"], begin, end)):
            raise InputError(f"{path}: tensor {name} must have sizes and offsets that are integers >= 0, got {entry!r}")
        if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
            raise InputError(f"{path}: tensor {name} has dtype {dtype}, which is not known")
        if end - begin != math.prod(shape) * ITEM_BYTES[dtype]:
            raise InputError(
                f"{path}: tensor {name} {dtype}{list(shape)} needs {math.prod(shape) * ITEM_BYTES[dtype]} bytes, "
                f"its offsets give {end - begin}"
            )
        if begin < 0 or 8 + length + end > total:
            raise InputError(
                f"{path} is truncated: tensor {name} ends at byte {8 + length + end}, the file has {total}"
            )
        spans.append((begin, end, name))
        found[name] = TensorInfo(name, dtype, shape, path, 8 + length + begin, end - begin)
    spans.sort()
    for (_, end, first), (begin, _, second) in itertools.pairwise(spans):
        if begin < end:
            raise InputError(f"{path}: tensors {first} and {second} overlap")
    return found


def read_json(path: Path) -> dict[str, Any]:
    """A JSON mapping, {} where there is no file. InputError names a file that is something else."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise InputError(f"{path} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise InputError(f"{path} must hold a JSON mapping, got a {type(content).__name__}")
    return content


def resolve_folder(model: str | os.PathLike) -> Path:
    """A local folder, or the snapshot of a hub id in the local cache. InputError if neither exists; nothing is
    downloaded."""
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise InputError(f"{path} is a file: give the folder of a checkpoint")
    name = str(model)
    if name.count("/") == 1 and not name.startswith((".", "/", "~")):
        home = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()
        cache = Path(os.environ.get("HF_HUB_CACHE", home / "hub")) / f"models--{name.replace('/', '--')}"
        reference = cache / "refs" / "main"
        snapshots = (
            [cache / "snapshots" / reference.read_text().strip()]
            if reference.exists()
            else sorted((cache / "snapshots").glob("*"))
        )
        for snapshot in snapshots[-1:]:
            if snapshot.is_dir():
                return snapshot
        raise InputError(
            f"{name} is neither a folder nor in the local hub cache ({cache}): download it first, for instance "
            f"with `hf download {name}`"
        )
    raise InputError(f"{path} does not exist")


class Checkpoint:
    """The headers of a checkpoint, and its bytes as addresses of mapped memory.

    `tensors` maps names to TensorInfo, in the order of the files; files are mapped when first used.
    """

    def __init__(self, model: str | os.PathLike) -> None:
        self.source = str(model)
        self.folder = resolve_folder(model)
        self.config = read_json(self.folder / "config.json")
        self.tensors: dict[str, TensorInfo] = {}
        weight_map = self._weight_map()
        for path in self._files(weight_map):
            for name, info in read_header(path).items():
                if name in self.tensors:
                    raise InputError(f"{name} is in two files: {self.tensors[name].file} and {path}")
                self.tensors[name] = info
        for name, file in weight_map.items():
            if name not in self.tensors or self.tensors[name].file.name != file:
                raise InputError(f"{self.folder / INDEX} says that {file} holds {name}, which it does not")
        self.files = list(dict.fromkeys(info.file for info in self.tensors.values()))
        self.state = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in self.files]
        self._maps: dict[Path, tuple[mmap.mmap, int]] = {}

    def _weight_map(self) -> dict[str, str]:
        """tensor -> file name, as the index says; {} where there is no index."""
        index = self.folder / INDEX
        found = read_json(index).get("weight_map", {} if not index.is_file() else None)
        if not isinstance(found, dict) or not all(isinstance(file, str) for file in found.values()):
            raise InputError(f"{index} is not a safetensors index: it has no weight_map of file names")
        return found

    def _files(self, weight_map: Mapping[str, str]) -> list[Path]:
        if weight_map:
            names = sorted(set(weight_map.values()))
            missing = [n for n in names if not (self.folder / n).is_file()]
            if missing:
                raise InputError(
                    f"{self.folder / INDEX} names {missing[0]}, which does not exist "
                    f"({len(missing)} of {len(names)} shards are missing)"
                )
            return [self.folder / n for n in names]
        if (self.folder / SINGLE).is_file():
            return [self.folder / SINGLE]
        if (self.folder / "adapter_config.json").is_file():
            raise InputError(
                f"{self.folder} is a LoRA adapter: merge it into its base model first "
                "(peft: PeftModel.from_pretrained(...).merge_and_unload().save_pretrained(...)), then give that folder"
            )
        others = sorted(p.name for p in self.folder.glob("*.safetensors"))
        if len(others) == 1:
            return [self.folder / others[0]]
        if others:
            raise InputError(f"{self.folder} has {len(others)} safetensors files but no {INDEX}")
        if list(self.folder.glob("*.bin")):
            raise InputError(
                f"{self.folder} has .bin weights: convert them to safetensors first (transformers: "
                "AutoModelForCausalLM.from_pretrained(...).save_pretrained(...))"
            )
        raise InputError(f"{self.folder} has no safetensors weights")

    def address(self, name: str) -> int:
        """Memory address of a tensor's first byte; it stays valid while this object lives."""
        info = self.tensors[name]
        if info.file not in self._maps:
            with open(info.file, "rb") as handle:
                if os.fstat(handle.fileno()).st_size == 0:
                    raise InputError(f"{info.file} is empty")
                view = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)
            view.madvise(mmap.MADV_SEQUENTIAL)
            self._maps[info.file] = (view, np.frombuffer(view, np.uint8).ctypes.data)
        return self._maps[info.file][1] + info.begin

    def bytes(self, name: str) -> np.ndarray:
        """A tensor's raw bytes, uint8 [size], mapped."""
        info = self.tensors[name]
        self.address(name)
        return np.frombuffer(self._maps[info.file][0], np.uint8, info.size, info.begin)

    def release(self, names: Iterable[str]) -> None:
        """Unmap the pages of tensors that are done (they stay in the page cache): resident memory stays small."""
        for name in names:
            info = self.tensors[name]
            if info.file in self._maps and info.size:
                first = info.begin // mmap.PAGESIZE * mmap.PAGESIZE
                self._maps[info.file][0].madvise(mmap.MADV_DONTNEED, first, info.begin + info.size - first)

    def release_all(self) -> None:
        """The same for every mapped file; safe while another thread reads: it faults the page in again."""
        for view, _ in list(self._maps.values()):
            view.madvise(mmap.MADV_DONTNEED)

    def check_unchanged(self) -> None:
        """InputError if a file's size or time changed since the headers were read."""
        for path, (name, size, time_ns) in zip(self.files, self.state):
            now = path.stat()
            if (now.st_size, now.st_mtime_ns) != (size, time_ns):
                raise InputError(f"{self.folder / name} changed while it was being merged")


@dataclass(frozen=True)
class Layout:
    """Where every output tensor goes, decided before anything is written."""

    files: dict[str, int]  # file name -> bytes
    headers: dict[str, bytes]
    place: dict[str, tuple[str, int]]  # tensor name -> (file name, byte position)
    dtypes: dict[str, str]  # tensor name -> safetensors dtype
    total: int  # bytes of tensors

    @property
    def bytes(self) -> int:
        return sum(self.files.values())


def plan_layout(tensors: Sequence[tuple[str, str, tuple[int, ...]]], shard_bytes: int) -> Layout:
    """Split (name, dtype, shape) in order into shards of at most `shard_bytes` (a larger tensor gets its own)."""
    shards: list[list[tuple[str, str, tuple[int, ...], int]]] = [[]]
    held = 0
    for name, dtype, shape in tensors:
        size = math.prod(shape) * ITEM_BYTES[dtype]
        if shards[-1] and held + size > shard_bytes:
            shards.append([])
            held = 0
        shards[-1].append((name, dtype, shape, size))
        held += size
    files, headers, place = {}, {}, {}
    for i, shard in enumerate(shards):
        file = SINGLE if len(shards) == 1 else f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        at = 0
        for name, dtype, shape, size in shard:
            header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + size]}
            at += size
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        headers[file] = len(text).to_bytes(8, "little") + text
        for name, *_ in shard:
            place[name] = (file, len(headers[file]) + header[name]["data_offsets"][0])
        files[file] = len(headers[file]) + at
    dtypes = {name: dtype for name, dtype, _ in tensors}
    return Layout(files, headers, place, dtypes, sum(files.values()) - sum(len(h) for h in headers.values()))


class ShardWriter:
    """The output files of a layout, allocated in full and written at final positions."""

    def __init__(self, folder: Path, layout: Layout) -> None:
        self.layout, self.folder = layout, folder
        self.handles: dict[str, int] = {}
        self._synced: dict[str, int] = {}  # file -> its modification time when it was last sent to the disk
        try:
            for name, size in layout.files.items():
                handle = os.open(folder / name, os.O_RDWR | os.O_CREAT, 0o644)
                self.handles[name] = handle
                if os.fstat(handle).st_size != size:
                    os.ftruncate(handle, size)
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(handle, 0, size)  # a full disk shows here, before any work
                os.pwrite(handle, layout.headers[name], 0)
        except OSError:
            self.close()
            raise

    def where(self, tensor: str) -> tuple[int, int]:
        file, position = self.layout.place[tensor]
        return self.handles[file], position

    def write(self, tensor: str, data: np.ndarray) -> None:
        handle, position = self.where(tensor)
        view = memoryview(np.ascontiguousarray(data).reshape(-1).view(np.uint8).data)
        while view:
            written = os.pwrite(handle, view, position)
            view, position = view[written:], position + written

    def read(self, tensor: str, size: int) -> np.ndarray:
        handle, position = self.where(tensor)
        start = position // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
        if size == 0:
            return np.empty(0, np.uint8)
        view = mmap.mmap(handle, position - start + size, access=mmap.ACCESS_READ, offset=start)
        return np.frombuffer(view, np.uint8, size, position - start)

    def write_back(self) -> None:
        """Send to the disk what was written since the last call. OSError if that failed: an fsync may not repeat it."""
        for name, handle in self.handles.items():
            time_ns = os.fstat(handle).st_mtime_ns
            if time_ns != self._synced.get(name):
                getattr(os, "fdatasync", os.fsync)(handle)
                self._synced[name] = time_ns

    def finish(self, sync: bool) -> None:
        """Index, then everything to disk."""
        if len(self.layout.files) > 1:
            index = {
                "metadata": {"total_size": self.layout.total},
                "weight_map": {n: f for n, (f, _) in self.layout.place.items()},
            }
            (self.folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
        if sync:
            for handle in self.handles.values():
                os.fsync(handle)
        self.close()

    def close(self) -> None:
        for handle in self.handles.values():
            os.close(handle)
        self.handles = {}


def write_file(path: Path, tensors: Mapping[str, np.ndarray], dtypes: Mapping[str, str]) -> None:
    """A small safetensors file from arrays whose bytes are already those of `dtypes` (bfloat16 as uint16)."""
    layout = plan_layout([(n, dtypes[n], a.shape) for n, a in tensors.items()], 1 << 62)
    with open(path, "wb") as handle:
        handle.write(layout.headers[SINGLE])
        for array in tensors.values():
            handle.write(np.ascontiguousarray(array).tobytes())
