"""Tables of scores as Markdown, CSV and HTML, beside the numbers that arXiv 2602.12566 (v1) publishes.

Rows are benchmarks, columns are models; a cell is Avg@K in percent with its 95% interval, then the difference to the
published number where the model is one of the released checkpoints, told by its name.
"""

from __future__ import annotations

import csv
import html
import io
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

from m2rl.benchmarks import PRESETS

if TYPE_CHECKING:
    from m2rl.evaluate import Score

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


def cells(scores: Mapping[str, Mapping[str, Score]]) -> list[list[str]]:
    """Heading and rows of text of {model: {benchmark: Score}}, and the mean of the benchmarks that all models have."""
    models = list(scores)
    rows = [["benchmark", *models]]
    shared = [b for b in next(iter(scores.values())) if all(b in s for s in scores.values())]
    for benchmark in dict.fromkeys(b for mine in scores.values() for b in mine):
        row = []
        for model in models:
            s = scores[model].get(benchmark)
            if s is None:
                row.append("")
                continue
            text = f"{100 * s.avg_at_k:.2f} [{100 * s.ci95[0]:.1f}, {100 * s.ci95[1]:.1f}]"
            paper = PUBLISHED.get(released(model) or "", {}).get(benchmark)
            row.append(
                text if paper is None else f"{text} ({100 * s.avg_at_k - paper:+.2f} to the paper's {paper:.2f})"
            )
        first = next(s[benchmark] for s in scores.values() if benchmark in s)
        title = PRESETS[benchmark].title if benchmark in PRESETS else benchmark
        rows.append([f"{title} (Avg@{first.k})", *row])
    if len(shared) > 1:
        rows.append(
            ["mean", *(f"{100 * sum(scores[m][b].avg_at_k for b in shared) / len(shared):.2f}" for m in models)]
        )
    return rows


def markdown(scores: Mapping[str, Mapping[str, Score]]) -> str:
    head, *rows = cells(scores)
    lines = [head, ["---", *("---:" for _ in head[1:])], *rows]
    return "\n".join("| " + " | ".join(c.replace("|", "\\|") for c in line) + " |" for line in lines) + "\n"


def as_csv(scores: Mapping[str, Mapping[str, Score]]) -> str:
    """One line per model and benchmark, every number of the score and the published one."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(
        [
            "model",
            "benchmark",
            "k",
            "problems",
            "avg_at_k",
            "ci95_low",
            "ci95_high",
            "pass_at_k",
            "majority_at_k",
            "mean_tokens",
            "truncated",
            "ok",
            "wrong",
            "unparsed",
            "timeout",
            "error",
            "published",
        ]
    )
    for model, mine in scores.items():
        for name, s in mine.items():
            statuses = (s.statuses.get(x, 0) for x in ("ok", "wrong", "unparsed", "timeout", "error"))
            writer.writerow(
                [
                    model,
                    name,
                    s.k,
                    s.problems,
                    s.avg_at_k,
                    *s.ci95,
                    s.pass_at_k,
                    "" if s.majority_at_k is None else s.majority_at_k,
                    s.mean_tokens,
                    s.truncated,
                    *statuses,
                    PUBLISHED.get(released(model) or "", {}).get(name, ""),
                ]
            )
    return out.getvalue()


def as_html(scores: Mapping[str, Mapping[str, Score]], notes: Mapping[str, tuple[str, ...]]) -> str:
    """One self-contained page: the table and the notes."""
    head, *rows = cells(scores)
    e = html.escape
    body = "".join(
        f"<tr><th scope=row>{e(r[0])}</th>" + "".join(f"<td>{e(c)}</td>" for c in r[1:]) + "</tr>" for r in rows
    )
    listed = "".join(f"<li>{e(name)}: {e('; '.join(found))}</li>" for name, found in notes.items() if found)
    heading = "".join(f"<th scope=col>{e(h)}</th>" for h in head)
    return (
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        "<title>Benchmarks</title><style>:root{color-scheme:light dark}body{font:15px system-ui;margin:2rem}"
        "table{border-collapse:collapse;display:block;overflow-x:auto}th,td{padding:.3rem .7rem;text-align:right;"
        "border-bottom:1px solid #8884}th:first-child{text-align:left}</style><h1>Benchmarks</h1>"
        "<p>Avg@K in percent with the 95% bootstrap interval over problems.</p>"
        f"<table><thead><tr>{heading}</tr></thead><tbody>{body}</tbody></table><ul>{listed}</ul></html>\n"
    )
