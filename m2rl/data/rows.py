"""Rows on disk -> Row: one line of JSONL or parquet, normalised but not tokenised.

A row is {"prompt": text or [{"role", "content"}], "domain": ..., and what its verifier needs: "answer", "options",
"tests", "constraints" ...}; a demonstration has "messages" ending with the assistant, or "prompt" and "response".
Everything else in a row is handed to the verifier untouched. Bad input is an InputError with file, line, key, rule.
"""

from __future__ import annotations

import glob
import hashlib
import json
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet

from m2rl.data import hub
from m2rl.types import InputError

NOT_SPEC = {"prompt", "messages", "response", "domain", "id"}


@dataclass(frozen=True, slots=True)
class Row:
    """One line of a file, normalised but not tokenised."""

    id: str
    domain: str
    messages: tuple[Mapping[str, Any], ...] | None  # chat form
    prompt: str  # text form; "" in chat form
    response: str | None  # demonstration in text form
    spec: Mapping[str, Any]


def files(patterns: Sequence[str]) -> list[Path]:
    """The files that paths, globs and hub addresses (hub.py) name, in sorted order per pattern; InputError for one that
    names none."""
    out = []
    for pattern in patterns:
        if pattern.startswith(hub.PREFIX):
            out += hub.addressed(pattern)
            continue
        found = sorted(Path(p) for p in glob.glob(pattern, recursive=True) if Path(p).is_file())
        if not found:
            raise InputError(f"data: no file {pattern}")
        out += found
    return out


Broken = Callable[[str, InputError], object]  # ("file:line", what is wrong with the line)


def read_records(
    path: Path, containing: Sequence[bytes] = (), broken: Broken | None = None
) -> Iterator[tuple[str, dict[str, Any]]]:
    """("file:line", record) of a .jsonl or .parquet file, streamed. JSONL lines with none of `containing` are skipped
    unparsed; one that is no JSON object goes to `broken`, or raises without it."""
    for where, _, record in positioned_records(path, containing, broken):
        yield where, record


def positioned_records(
    path: Path, containing: Sequence[bytes] = (), broken: Broken | None = None
) -> Iterator[tuple[str, int, dict[str, Any]]]:
    """("file:line", byte offset of the line or -1 for parquet, record)."""
    if path.suffix == ".parquet":
        try:
            n = 0
            for batch in pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=1024):
                for record in batch.to_pylist():
                    n += 1
                    yield f"{path}:{n}", -1, record
        except (pyarrow.ArrowInvalid, OSError) as error:
            raise InputError(f"{path}: not a readable parquet file ({error})") from None
        return
    if path.suffix not in (".jsonl", ".json"):
        raise InputError(f"{path}: a data file must end in .jsonl or .parquet")
    offset = 0
    with open(path, "rb") as lines:  # bytes end lines at \n alone: U+2028 may stand inside a string
        for n, line in enumerate(lines, 1):
            if line.strip() and (not containing or any(part in line for part in containing)):
                try:
                    yield f"{path}:{n}", offset, _json(line, f"{path}:{n}")
                except InputError as error:
                    if broken is None:
                        raise
                    broken(f"{path}:{n}", error)
            offset += len(line)


def _json(line: bytes, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"{where}: malformed JSON: {error.msg} at column {error.colno}") from None
    except RecursionError:
        raise InputError(f"{where}: malformed JSON: nested too deeply") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: not UTF-8 text ({error})") from None
    if not isinstance(record, dict):
        raise InputError(f"{where}: a row must be a JSON object, got {type(record).__name__}")
    return record


class Shelf:
    """Records of many files by index, without holding them: a JSONL line is its offset, a parquet record its JSON."""

    def __init__(self) -> None:
        self.paths: list[Path] = []
        self.file, self.offset = array("i"), array("q")  # of each record; file -1: held[offset]
        self.held: list[bytes] = []

    def __len__(self) -> int:
        return len(self.file)

    def add(self, path: Path, offset: int, record: Mapping[str, Any]) -> None:
        if offset < 0:
            self.file.append(-1)
            self.offset.append(len(self.held))
            self.held.append(json.dumps(record, default=str).encode())
            return
        if not self.paths or self.paths[-1] != path:
            self.paths.append(path)
        self.file.append(len(self.paths) - 1)
        self.offset.append(offset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if self.file[index] < 0:
            return json.loads(self.held[self.offset[index]])
        path = self.paths[self.file[index]]
        with open(path, "rb") as lines:
            lines.seek(self.offset[index])
            return _json(lines.readline(), f"{path} at byte {self.offset[index]}")


def normalise(record: Mapping[str, Any], where: str, default_domain: str = "") -> Row:
    """A record in the plain schema as a Row; InputError names file, line, key and rule."""
    domain = record.get("domain") or default_domain
    if not domain:
        raise InputError(f"{where}: key domain is missing and data.default_domain is not set")
    prompt, messages, response = record.get("prompt"), record.get("messages"), record.get("response")
    chat = messages if messages is not None else prompt if isinstance(prompt, list) else None
    if chat is not None:
        ok = (
            isinstance(chat, list)
            and chat
            and all(isinstance(m, dict) and isinstance(m.get("role"), str) and "content" in m for m in chat)
        )
        if not ok:
            raise InputError(
                f"{where}: {'messages' if messages is not None else 'prompt'} must be a list of "
                "{role, content} messages"
            )
    elif not isinstance(prompt, str) or not prompt:
        raise InputError(f"{where}: key prompt must be a non-empty string or a list of messages, got {prompt!r}")
    if response is not None and not isinstance(response, str):
        raise InputError(f"{where}: key response must be a string, got {type(response).__name__}")
    spec = {k: v for k, v in record.items() if k not in NOT_SPEC and v is not None}
    key = record.get("id")
    if key is None:
        content = json.dumps([prompt, chat], sort_keys=True, default=str).encode()
        key = hashlib.blake2b(content, digest_size=8).hexdigest()
    return Row(
        f"{domain}/{key}",
        str(domain),
        tuple(chat) if chat is not None else None,
        "" if chat is not None else str(prompt),
        response,
        spec,
    )
