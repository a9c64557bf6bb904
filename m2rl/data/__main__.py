"""The blends as plain files, and what a file of training rows holds.

python -m m2rl.data convert train.jsonl --out data/rl --source dapo=dapo.parquet --source skywork=skywork.parquet
    the paper's RL blend -> data/rl/{math,code,science,if,agent}.jsonl; its math rows point into DAPO-Math-17k and
    Skywork-OR1, whose files (or `hub`) --source names. Files are paths, globs or hub:OWNER/NAME/GLOB[@REVISION]
python -m m2rl.data convert 'sft/*.jsonl' --out data/sft --domain math
    SFT rows: reasoning content, tool calls and "-" prompts as chat templates take them
python -m m2rl.data inspect data/rl/math.jsonl --against aime24=aime24.jsonl --filter data/rl/math.clean.jsonl
    rows, lengths, unverifiable and trivially won rows, repeats, overlap with benchmarks, bias; the rest to a file
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO, TypeVar

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from m2rl.command import exit_with, named
from m2rl.data import blend
from m2rl.data.inspect import DROPPABLE, DomainReport, examine, filter_rows
from m2rl.data.overlap import Index
from m2rl.data.rows import files, read_records
from m2rl.display import Display
from m2rl.types import InputError


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m m2rl.data", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="convert|inspect")
    c = commands.add_parser("convert", help="the RL blend or SFT files as one plain JSONL file per domain")
    c.add_argument("files", nargs="+", help="JSONL or parquet; globs and hub:OWNER/NAME/GLOB allowed")
    c.add_argument("--out", required=True, help="folder for <domain>.jsonl and convert.json")
    c.add_argument(
        "--source",
        action="append",
        default=[],
        metavar="NAME=FILE",
        help="where placeholders point: dapo, skywork (a file, a glob or `hub`); taco/train, apps/train ...",
    )
    c.add_argument("--domain", default="", help="domain of rows that name none (SFT files)")
    c.add_argument(
        "--drop-unresolved", action="store_true", help="count placeholders without a source, instead of refusing"
    )
    i = commands.add_parser("inspect", help="counts, problems and bias per domain")
    i.add_argument("files", nargs="+", help="JSONL or parquet; globs and hub:OWNER/NAME/GLOB allowed")
    i.add_argument("--domain", default="", help="domain of rows that name none")
    i.add_argument(
        "--against",
        action="append",
        default=[],
        metavar="NAME=FILE",
        help="benchmark file: training prompts that share 13 words in a row with it are reported",
    )
    i.add_argument("--tables-dir", default="", help="the workplace's tables: agent rows are replayed")
    i.add_argument("--filter", default="", metavar="FILE", help="write the rows without problems here")
    i.add_argument("--keep", default="", help=f"problems that --filter lets pass, of {','.join(DROPPABLE)}")
    i.add_argument("--json", default="", metavar="FILE", help="write the report here as well")
    options = parser.parse_args(argv)
    if options.command == "convert":
        counts = convert(
            options.files,
            Path(options.out),
            named(options.source, "--source"),
            options.domain,
            options.drop_unresolved,
        )
        print_counts(counts, Path(options.out))
        return 0
    keep = [k for k in options.keep.split(",") if k]
    if odd := set(keep) - set(DROPPABLE):
        raise InputError(f"--keep {','.join(sorted(odd))}: must be of {', '.join(DROPPABLE)}")
    arguments: dict[str, Any] = {
        "default_domain": options.domain,
        "tables_dir": options.tables_dir,
        "against": benchmark_index(named(options.against, "--against")),
    }
    report: dict[str, DomainReport] = {}
    findings, written = counted(examine(options.files, report, **arguments), "inspect"), None
    if options.filter:
        written = filter_rows(findings, Path(options.filter), keep)
    else:
        collections.deque(findings, maxlen=0)
    if options.json:
        Path(options.json).write_text(json.dumps({d: r.as_dict() for d, r in report.items()}, indent=1) + "\n")
    print_report(report)
    if written is not None:
        print(f"{written:,} of {sum(r.rows for r in report.values()):,} rows written to {options.filter}")
    return 0


T = TypeVar("T")


def counted(items: Iterable[T], title: str) -> Iterator[T]:
    """The items, counted on the terminal as they pass."""
    display = Display(stderr=True)
    if not display.console.is_terminal:
        yield from items
        return
    display.start(title)
    try:
        for n, item in enumerate(items):
            if n % 100 == 0:
                display.update(n, "rows")
            yield item
    finally:
        display.stop()


def convert(
    patterns: Sequence[str], out: Path, sources: dict[str, str], domain: str = "", drop_unresolved: bool = False
) -> dict[str, Counter[str]]:
    """Write <out>/<domain>.jsonl and convert.json; {"written": ..., "dropped": ...} counts. Nothing is held but the
    source rows that placeholders name, and no file appears until all are complete."""
    found = blend.Sources(sources)
    paths = files(patterns)
    wanted = {key for path in paths for key in _placeholders(path)}
    found.load(wanted)
    counts: dict[str, Counter[str]] = {"written": Counter(), "dropped": Counter()}
    out.mkdir(parents=True, exist_ok=True)
    outputs: dict[str, TextIO] = {}
    with contextlib.ExitStack() as stack:
        for path in paths:
            for where, record in counted(read_records(path), f"convert {path.name}"):
                key = blend.placeholder(record, where)
                if drop_unresolved and key is not None and key not in found.rows:
                    counts["dropped"][f"placeholder of {key[0]} without --source"] += 1
                    continue
                row = blend.plain(record, where, found)
                if isinstance(row, str):
                    counts["dropped"][row] += 1
                    continue
                name = str(row.get("domain") or domain)
                if not name:
                    raise InputError(f"{where}: key domain is missing: name it with --domain")
                if not re.fullmatch(r"[\w.-]+", name):
                    raise InputError(f"{where}: domain {name!r} cannot name a file: letters, digits, _ . - only")
                if name not in outputs:
                    stack.callback(_partial(out, name).unlink, missing_ok=True)  # of a conversion that fails
                    outputs[name] = stack.enter_context(open(_partial(out, name), "w", encoding="utf-8"))
                outputs[name].write(json.dumps({**row, "domain": name}, default=str) + "\n")
                counts["written"][name] += 1
        for name, file in outputs.items():
            file.close()
            _partial(out, name).rename(out / f"{name}.jsonl")
    (out / "convert.json").write_text(json.dumps({"from": [str(p) for p in paths], **counts}, indent=1) + "\n")
    return counts


def _partial(out: Path, name: str) -> Path:
    return out / f".{name}.jsonl.partial"


def _placeholders(path: Path) -> Iterator[blend.Key]:
    # Most rows are whole: only lines that could be placeholders are parsed in this pass.
    for where, record in read_records(path, containing=(b"_hf_placeholder", b'"-"')):
        if key := blend.placeholder(record, where):
            yield key


def benchmark_index(sources: dict[str, str]) -> Index | None:
    """The prompts of benchmark files, by their usual keys."""
    if not sources:
        return None

    def texts() -> Iterator[tuple[str, str]]:
        for name, pattern in sources.items():
            for path in files([pattern]):
                for where, record in read_records(path):
                    text = next(
                        (
                            record[k]
                            for k in ("prompt", "problem", "question", "Problem", "Question", "question_content")
                            if record.get(k)
                        ),
                        None,
                    )
                    if isinstance(text, list):
                        text = "\n".join(str(m.get("content")) for m in text)
                    if not text:
                        raise InputError(f"{where}: no key prompt, problem or question to compare with")
                    yield f"{name}/{where}", str(text)

    return Index(texts())


def print_counts(counts: dict[str, Counter[str]], out: Path) -> None:
    for name, n in sorted(counts["written"].items()):
        print(f"{out / name}.jsonl  {n:,} rows")
    for reason, n in counts["dropped"].most_common():
        print(f"dropped  {n:,}  {reason}")


def print_report(report: dict[str, DomainReport]) -> None:
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 180)
    table = Table(title="Rows by domain", title_justify="left")
    table.add_column("")
    lines: dict[str, list[str]] = {}
    domains = {d: r for d, r in sorted(report.items()) if not r.dropped}
    for domain, found in domains.items():
        table.add_column(domain, justify="right")
        d: dict[str, Any] = found.as_dict()
        chars, constant, rho = d["prompt_chars"], d["best_constant"], d["length_reward_spearman"]
        cells = {"rows": f"{found.rows:,}"}
        cells |= {f"chars, {name}": f"{chars[name]:,.0f}" for name in ("median", "p95", "max")}
        cells |= {kind: f"{sum(found.problems.get(kind, Counter()).values()):,}" for kind in DROPPABLE}
        cells["best constant"] = constant["answer"][:24] or "-"
        cells["its score"] = f"{100 * constant['score']:.1f}%" if constant["answer"] else "-"
        cells["length ~ reward"] = "-" if rho is None else f"{rho:+.2f}"
        for name, text in cells.items():
            lines.setdefault(name, []).append(text)
    for name, texts in lines.items():
        table.add_row(name, *(escape(text) for text in texts))
    console.print(table)
    for reason, left in report.items():
        if left.dropped:
            console.print(f"dropped: {left.rows:,} x {reason}", markup=False)
    for domain, found in domains.items():
        if found.labels and len(found.labels) <= 26:
            shares = (f"{label} {100 * n / found.rows:.1f}%" for label, n in sorted(found.labels.items()))
            console.print(f"{domain} labels: {', '.join(shares)}", markup=False)
        for kind, messages in found.problems.items():
            for message, n in messages.most_common(5):
                console.print(f"{domain} {kind}: {n:,} x {message} (first: {found.examples[message]})", markup=False)


if __name__ == "__main__":
    exit_with(main)
