"""Tables of scores as Markdown, CSV and HTML, beside the numbers that arXiv 2602.12566 (v1) publishes.

Rows are benchmarks, columns are models; a cell is Avg@K in percent with its 95% interval, then the difference to the
published number where the model is one of the released checkpoints, told by its name; with a star if K, problems or
token budget are not the paper's.
"""

from __future__ import annotations

import csv
import html
import io
import re
from collections.abc import Collection, Iterable, Mapping, Sequence

from m2rl.benchmarks import PRESETS
from m2rl.scores import Score
from m2rl.types import STATUSES

NINE = ("aime24", "aime25", "lcb_v5", "lcb_v6", "hle", "gpqa_diamond", "ifeval", "ifbench", "mmlu_redux")
PUBLISHED: dict[str, dict[str, float]] = {  # checkpoint -> benchmark -> percent
    name: dict(zip(NINE, values))
    for name, values in {
        "Base": (9.65, 5.68, 16.50, 18.29, 4.45, 20.08, 35.12, 11.90, 30.91),
        "SFT": (54.90, 51.30, 51.27, 53.43, 5.24, 46.09, 79.48, 38.44, 79.05),
        "RL_Math": (71.51, 63.54, 56.99, 53.71, 5.93, 56.82, 83.18, 40.14, 80.14),
        "RL_Coding": (60.78, 55.57, 59.40, 55.43, 6.02, 49.12, 81.33, 39.80, 79.88),
        "RL_Science": (63.65, 57.19, 58.75, 54.57, 5.28, 56.19, 81.51, 38.10, 77.93),
        "RL_IF": (64.06, 61.67, 59.09, 55.43, 6.26, 49.37, 88.17, 56.12, 80.23),
        "RL_Multi": (73.85, 64.11, 59.77, 56.57, 5.84, 53.66, 90.34, 55.78, 80.00),
        "Average": (66.72, 61.82, 60.35, 53.71, 5.93, 53.03, 81.70, 39.80, 79.72),
        "SCE": (71.93, 66.93, 58.02, 50.29, 6.58, 58.46, 88.17, 50.68, 79.95),
        "TIES": (71.67, 66.72, 57.80, 53.14, 5.70, 56.19, 89.83, 53.74, 79.91),
        "TIES+DARE": (71.35, 67.71, 57.08, 50.86, 6.35, 55.05, 89.09, 52.38, 79.93),
        "TA": (74.27, 67.29, 50.58, 45.14, 6.02, 55.56, 85.40, 58.16, 78.19),
        "TA+DARE": (75.26, 67.55, 57.08, 48.00, 6.12, 55.05, 88.72, 53.74, 78.63),
        "MT-OPD": (71.41, 65.00, 57.50, 53.14, 6.44, 56.82, 90.76, 54.08, 78.19),
    }.items()
}
RELEASED = ("SFT", "RL_Math", "RL_Coding", "RL_Science", "RL_IF", "RL_Multi")
"""Of these the weights are public."""


def released(model: str) -> str | None:
    """The released checkpoint that a folder or hub id names, e.g. "x/RL_Math" or "m2rl-rl-math"; None for others."""
    last = [part for part in re.split(r"[/\\]", model) if part][-1:]
    key = re.sub(r"[^a-z0-9]", "", last[0].lower()).removeprefix("m2rl") if last else ""
    return next((name for name in RELEASED if key == re.sub(r"[^a-z0-9]", "", name.lower())), None)


Scores = Mapping[str, Mapping[str, Score]]  # model -> benchmark -> score
LEGEND = "Avg@K in percent [95% bootstrap interval over problems]"
DELTA = "difference to arXiv 2602.12566 (v1)"
APART = "* not in the paper's setting: see the notes"


def title(benchmark: str) -> str:
    return PRESETS[benchmark].title if benchmark in PRESETS else benchmark


def cells(scores: Scores, apart: Collection[str] = ()) -> list[list[tuple[str, str]]]:
    """Heading and rows of (value, difference to the published number or ""): one row per benchmark, one column per
    model, and the mean over the benchmarks that all models have. `apart`: benchmarks in another setting than the
    paper's; their differences carry a star."""
    models = list(scores)
    rows = [[("benchmark", ""), *((m, "") for m in models)]]
    for benchmark in dict.fromkeys(b for mine in scores.values() for b in mine):
        row = []
        for model in models:
            s = scores[model].get(benchmark)
            if s is None:
                row.append(("", ""))
                continue
            paper = PUBLISHED.get(released(model) or "", {}).get(benchmark)
            star = "*" if benchmark in apart else ""
            delta = "" if paper is None else f"{100 * s.avg_at_k - paper:+.2f}{star} (paper {paper:.2f})"
            row.append((f"{100 * s.avg_at_k:.2f} [{100 * s.ci95[0]:.1f}, {100 * s.ci95[1]:.1f}]", delta))
        first = next(s[benchmark] for s in scores.values() if benchmark in s)
        rows.append([(f"{title(benchmark)} (Avg@{first.k})", ""), *row])
    shared = [b for b in next(iter(scores.values())) if all(b in s for s in scores.values())]
    if len(shared) > 1:
        row = []
        for model in models:
            mean = 100 * sum(scores[model][b].avg_at_k for b in shared) / len(shared)
            known = PUBLISHED.get(released(model) or "", {})
            paper = sum(known.values()) / len(known) if known and set(known) == set(shared) else None
            star = "*" if set(shared) & set(apart) else ""
            row.append((f"{mean:.2f}", "" if paper is None else f"{mean - paper:+.2f}{star} (paper {paper:.2f})"))
        rows.append([("mean", ""), *row])
    return rows


def legend(rows: list[list[tuple[str, str]]]) -> str:
    deltas = [delta for row in rows for _, delta in row if delta]
    parts = [
        LEGEND,
        *([f"below it the {DELTA}"] if deltas else []),
        *([APART] if any("*" in d for d in deltas) else []),
    ]
    return "; ".join(parts)


def markdown(scores: Scores, apart: Collection[str] = ()) -> str:
    rows = cells(scores, apart)
    head, *body = [["<br>".join(filter(None, cell)).replace("|", "\\|") for cell in row] for row in rows]
    lines = [head, ["---", *("---:" for _ in head[1:])], *body]
    return "\n".join("| " + " | ".join(row) + " |" for row in lines) + f"\n\n{legend(rows)}.\n"


def plain(scores: Scores, apart: Collection[str] = ()) -> str:
    """The table for a console."""
    rows = cells(scores, apart)
    texts = [[" ".join(filter(None, cell)) for cell in row] for row in rows]
    width = [max(len(row[i]) for row in texts) for i in range(len(texts[0]))]
    lines = ["  ".join([row[0].ljust(width[0]), *(t.rjust(w) for t, w in zip(row[1:], width[1:]))]) for row in texts]
    return "\n".join(lines) + f"\n{legend(rows)}.\n".replace("below it the", "then the")


COLUMNS = (
    "k",
    "problems",
    "avg_at_k",
    "ci95_low",
    "ci95_high",
    "pass_at_k",
    "majority_at_k",
    "mean_tokens",
    "truncated",
)


def numbers(s: Score) -> dict[str, float | None]:
    """Every number of a score by name, the paper's columns first."""
    values = (s.k, s.problems, s.avg_at_k, *s.ci95, s.pass_at_k, s.majority_at_k, s.mean_tokens, s.truncated)
    return dict(zip(COLUMNS, values)) | {status: s.statuses.get(status, 0) for status in STATUSES}


def as_csv(scores: Scores) -> str:
    """One line per model and benchmark: every number of the score, the published one, then pass@k and details as
    name=value."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["model", "benchmark", *COLUMNS, *STATUSES, "published", "details"])
    for model, mine in scores.items():
        for name, s in mine.items():
            published = PUBLISHED.get(released(model) or "", {}).get(name, "")
            more = {f"pass@{k}": p for k, p in s.pass_at.items()} | s.details
            values = ["" if v is None else v for v in numbers(s).values()]
            writer.writerow([model, name, *values, published, " ".join(f"{k}={v:.4f}" for k, v in more.items())])
    return out.getvalue()


STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; padding: 1rem; max-width: 84rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2rem; } .wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .7rem; border-bottom: 1px solid #8884; }
th, td { text-align: right; white-space: nowrap; vertical-align: top; }
th:first-child, td.text { text-align: left; } thead th { border-bottom-width: 2px; }
tr.mean > * { font-weight: 600; border-top: 2px solid #8884; }
small { display: block; opacity: .75; font-weight: 400; }
"""


def as_html(scores: Scores, notes: Mapping[str, Sequence[str]], apart: Collection[str] = ()) -> str:
    """One self-contained page, light and dark: the paper's table, all numbers of every score, and the notes."""
    e = html.escape
    rows = cells(scores, apart)
    head, *body = rows

    def cell(value: str, delta: str) -> str:
        value, _, interval = value.partition(" [")
        small = "".join(f"<small>{e(text)}</small>" for text in (f"[{interval}" if interval else "", delta) if text)
        return f"<td>{e(value)}{small}</td>"

    first = "".join(
        f"<tr{' class=mean' if row[0][0] == 'mean' else ''}><th scope=row>{e(row[0][0])}</th>"
        + "".join(cell(*c) for c in row[1:])
        + "</tr>"
        for row in body
    )
    second = "".join(
        f"<tr><th scope=row>{e(title(name))}</th><td class=text>{e(model)}</td>"
        f"<td>{s.problems:,}</td><td>{100 * s.avg_at_k:.2f}</td>"
        f"<td>{', '.join(f'{k}: {100 * p:.1f}' for k, p in s.pass_at.items())}</td>"
        f"<td>{'' if s.majority_at_k is None else f'{100 * s.majority_at_k:.1f}'}</td>"
        f"<td>{s.mean_tokens:,.0f}</td><td>{100 * s.truncated:.1f}%</td>"
        + "".join(f"<td>{s.statuses.get(status, 0):,}</td>" for status in STATUSES)
        + f"<td class=text>{e(', '.join(f'{k} {100 * v:.1f}' for k, v in s.details.items()))}</td></tr>"
        for name in dict.fromkeys(b for mine in scores.values() for b in mine)
        for model, mine in scores.items()
        if (s := mine.get(name)) is not None
    )
    columns = ("benchmark", "model", "problems", "Avg@K", "pass@k, by k", "majority@K", "tokens", "cut", *STATUSES)
    listed = "".join(f"<li><b>{e(title(name))}</b>: {e('; '.join(found))}</li>" for name, found in notes.items())

    def table(headings: Iterable[str], lines: str) -> str:
        heading = "".join(f"<th scope=col>{e(h)}</th>" for h in headings)
        return f"<div class=wide><table><thead><tr>{heading}</tr></thead><tbody>{lines}</tbody></table></div>"

    return (
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f"<title>Benchmarks</title><style>{STYLE}</style><h1>Benchmarks</h1><p>{e(legend(rows))}.</p>"
        f"{table((h for h, _ in head), first)}<h2>All numbers</h2>"
        "<p>In percent. tokens: mean length of a response; cut: ended by the token limit; the five columns after it "
        f"count samples by what the verifier said.</p>{table((*columns, 'details'), second)}"
        f"<h2>Notes</h2><ul>{listed}</ul></html>\n"
    )
