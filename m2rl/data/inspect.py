"""What a file of training rows holds, and what in it would mislead a reward; `filter_rows` writes the rest.

    report = inspect(["math.jsonl"], against=Index(...))    one pass; rows are not held
    problems of a row: it cannot be read, its verifier cannot judge it, a trivial response earns its reward, its prompt
    repeats an earlier one, it shares 13 words in a row with a benchmark

Bias, per domain: the balance of labels, and the score of the best constant answer: what a policy that never reads the
prompt can earn. With `pass_rate` (or `reward`) in the rows, the rank correlation of length and reward: a policy learns
to write long if long responses win.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from m2rl.command import whole_file
from m2rl.data import blend
from m2rl.data.overlap import Index
from m2rl.data.rows import Row, files, normalise, read_records
from m2rl.domains import agent, check_spec, module, workplace
from m2rl.types import InputError

DROPPABLE = ("unreadable", "unverifiable", "lint", "duplicate", "overlap")
_SPECIFIC = re.compile(r"'[^']*'|\"[^\"]*\"|\b\d+\b")


@dataclass
class DomainReport:
    """What was found of one domain."""

    rows: int = 0
    dropped: bool = False  # not a domain but a category without a verifier; nothing of its rows is looked at
    problems: dict[str, Counter[str]] = field(default_factory=dict)  # kind -> message, specifics left out -> rows
    examples: dict[str, str] = field(default_factory=dict)  # message -> where, of its first row
    prompt_chars: list[int] = field(default_factory=list)
    labels: Counter[str] = field(default_factory=Counter)  # science letters, math answers, constant outputs of programs
    rewards: list[tuple[int, float]] = field(
        default_factory=list
    )  # (length of response or prompt in characters, reward)

    def note(self, kind: str, message: str, where: str) -> None:
        short = _SPECIFIC.sub("..", message)[:160]
        self.problems.setdefault(kind, Counter())[short] += 1
        self.examples.setdefault(short, where)

    @property
    def constant_score(self) -> tuple[str, float]:
        """(answer, share of rows it is right for) of the best constant answer."""
        if not self.labels:
            return "", 0.0
        label, count = self.labels.most_common(1)[0]
        return label, count / self.rows

    @property
    def length_correlation(self) -> float | None:
        """Spearman's rho of length and reward; None without rewards, or if either never varies."""
        if len(self.rewards) < 2:
            return None
        length, reward = (ranks(np.array(x, dtype=float)) for x in zip(*self.rewards))
        if not length.std() or not reward.std():
            return None
        return float(np.corrcoef(length, reward)[0, 1])

    def as_dict(self) -> dict[str, Any]:
        answer, share = self.constant_score
        chars = np.array(self.prompt_chars or [0])
        return {
            "rows": self.rows,
            "problems": {k: dict(v) for k, v in self.problems.items()},
            "examples": self.examples,
            "prompt_chars": {
                "median": float(np.median(chars)),
                "p95": float(np.percentile(chars, 95)),
                "max": int(chars.max()),
            },
            "labels": dict(self.labels.most_common(12)),
            "best_constant": {"answer": answer, "score": share},
            "length_reward_spearman": self.length_correlation,
        }


@dataclass(frozen=True)
class Finding:
    """One row and what is wrong with it."""

    where: str
    record: dict[str, Any] | None  # in the plain schema; None if it cannot be read
    domain: str
    problems: tuple[tuple[str, str], ...]  # (kind, message)


def ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 0, ties at their mean."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = counts.cumsum()
    return (last - (counts + 1) / 2)[inverse]


def examine(
    patterns: Sequence[str],
    report: dict[str, DomainReport],
    *,
    default_domain: str = "",
    against: Index | None = None,
    tables_dir: str = "",
) -> Iterator[Finding]:
    """Every row with its problems, in order; `report` fills as they pass."""
    seen: dict[bytes, str] = {}
    world = workplace.load_world(tables_dir) if tables_dir else None

    def unreadable(where: str, error: InputError, domain: str = default_domain or "?") -> Finding:
        found = report.setdefault(domain, DomainReport())
        found.rows += 1
        found.note("unreadable", str(error).removeprefix(f"{where}: "), where)
        return Finding(where, None, domain, (("unreadable", str(error)),))

    for path in files(patterns):
        for where, raw in read_records(path, broken=unreadable):
            try:
                record = blend.plain(raw, where)
                if isinstance(record, str):
                    report.setdefault(record, DomainReport(dropped=True)).rows += 1
                    continue
                row = normalise(record, where, default_domain)
            except InputError as error:
                yield unreadable(where, error, str(raw.get("domain") or default_domain or "?"))
                continue
            found = report.setdefault(row.domain, DomainReport())
            text = prompt_text(row)
            problems = list(_verifier_problems(row, text, world))
            key = hashlib.blake2b(" ".join(text.split()).encode(errors="replace"), digest_size=12).digest()
            if (first := seen.get(key)) is None:
                seen[key] = row.domain
            else:
                other = "this domain" if first == row.domain else f"domain {first}"
                problems.append(("duplicate", f"the prompt repeats an earlier one of {other}"))
            if against is not None and (name := against.find(text)):
                problems.append(("overlap", f"shares {against.n} words with {name.partition('/')[0]}"))
            found.rows += 1
            found.prompt_chars.append(len(text))
            if (label := constant_label(row)) is not None:
                found.labels[label] += 1
            reward = row.spec.get("reward", row.spec.get("pass_rate"))
            if isinstance(reward, int | float) and not isinstance(reward, bool):
                found.rewards.append((len(row.response) if row.response is not None else len(text), float(reward)))
            for kind, message in problems:
                found.note(kind, message, where)
            yield Finding(where, {**record, "domain": row.domain}, row.domain, tuple(problems))


def inspect(patterns: Sequence[str], **options: Any) -> dict[str, DomainReport]:
    """The report of some files by domain; options as of `examine`."""
    report: dict[str, DomainReport] = {}
    for _ in examine(patterns, report, **options):
        pass
    return report


def filter_rows(findings: Iterable[Finding], out: Path, keep: Sequence[str] = ()) -> int:
    """Write the rows without problems (of other kinds than `keep`) as JSONL, all or nothing; how many they are."""
    written = 0
    out.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(out) as lines:
        for finding in findings:
            if finding.record is not None and all(kind in keep for kind, _ in finding.problems):
                lines.write(json.dumps(finding.record, default=str) + "\n")
                written += 1
    return written


def prompt_text(row: Row) -> str:
    """What the user says, without system message or tools."""
    return row.prompt or "\n".join(str(m["content"]) for m in row.messages or () if m["role"] == "user")


def prompt_texts(patterns: Sequence[str]) -> Iterator[str]:
    """The user's side of every row that can be read."""
    for path in files(patterns):
        for where, raw in read_records(path):
            try:
                record = blend.plain(raw, where)
                if not isinstance(record, str):
                    yield prompt_text(normalise(record, where, "?"))
            except InputError:
                continue


def _verifier_problems(row: Row, text: str, world: workplace.World | None) -> Iterator[tuple[str, str]]:
    try:
        json.dumps(dict(row.spec), default=str, ensure_ascii=False).encode()
        text.encode()
    except UnicodeEncodeError:
        yield "unreadable", "half a surrogate pair in the text, which no tokenizer reads"
        return
    if row.response is not None or (row.messages and row.messages[-1]["role"] == "assistant"):
        return  # a demonstration: nothing is verified
    try:
        if row.domain != "agent" or world is not None:
            check_spec(row.domain, row.spec if world is None else {**row.spec, "tables_dir": world.folder})
        else:
            agent.ground_truth(row.spec)
    except ValueError as error:
        yield "unverifiable", str(error)
        return
    yield from (("lint", message) for message in lint(row, world))


def lint(row: Row, world: workplace.World | None = None) -> list[str]:
    """What is odd about a row that its verifier accepts."""
    spec = row.spec
    if row.domain == "agent":
        return agent.lint(spec, world) if world is not None else []
    if row.domain == "math" and len(str(spec["answer"])) > module("math").MAX_ANSWER_CHARS:
        return ["the answer is longer than the verifier reads: no response can score"]
    if row.domain == "code":
        outputs = spec["tests"]["outputs"]
        return ["every expected output is empty: printing nothing scores"] if not any(map(str, outputs)) else []
    if row.domain == "science" and isinstance(spec.get("options"), dict):
        texts = [" ".join(str(t).lower().split()) for t in spec["options"].values()]
        problems = ["two options have the same text"] if len(set(texts)) < len(texts) else []
        if pattern := spec.get("output_regex"):
            try:
                re.compile(pattern)
            except re.error as error:
                problems.append(f"output_regex does not compile: {error}")
        return problems
    found = getattr(module(row.domain), "lint", None)
    return found(spec) if found is not None else []


def constant_label(row: Row) -> str | None:
    """The response that would be right whatever the prompt says: a letter, an answer, a program's only output."""
    answer, tests = row.spec.get("answer"), row.spec.get("tests")
    if answer is not None:
        return str(answer).strip()
    if isinstance(tests, dict) and tests.get("outputs"):
        outputs = {str(o).strip() for o in tests["outputs"]}
        return f"print({next(iter(outputs))[:40]!r})" if len(outputs) == 1 else None
    return None
