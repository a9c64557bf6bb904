"""The study's one-file report: headline, Avg@K table, costs, the analyses' figures and tables; no network, no script.

Every number is computed here or read from the stages' files; nothing is typed in. Light and dark follow the reader's
setting, wide tables scroll on a phone, each figure is SVG with a text alternative.
"""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from m2rl.analyze.samples import read_folder
from m2rl.analyze.skills import paired_bootstrap, rewards_of
from m2rl.evaluate import Score, average, score

STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.6rem; } h2 { margin-top: 2.5rem; border-top: 1px solid var(--line); padding-top: 1rem; }
.headline { font-size: 1.15rem; background: var(--soft); padding: 1rem; border-radius: .5rem; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .7rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } td small { opacity: .7; }
figure { margin: 1rem 0; overflow-x: auto; } svg { max-width: 100%; height: auto; } pre { white-space: pre-wrap; }
summary { cursor: pointer; padding: .3rem 0; } details { border-bottom: 1px solid var(--line); }
"""
EXAMPLES = 3  # sample responses per model and domain that can be opened
ROWS = 40  # of an analysis table that are shown; the CSV beside the report holds all


T95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23)  # two-sided 95% quantiles of t, df 1 to 10


def write(
    folder: Path,
    models: Sequence[str],
    domains: Sequence[str],
    settings: Mapping[str, Any],
    folders: Mapping[int, Path] | None = None,
) -> Path:
    """Write report.html and table.md from the samples and analyses in the study's folder; of several seeds the table of
    means with Student's t intervals, and the first seed's report."""
    if folders:
        found = [
            {n: score(x) for n, x in read_folder(f / "samples", models, tokens=False).items()} for f in folders.values()
        ]
        first = write(next(iter(folders.values())), models, domains, settings)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "table.md").write_text(over_seeds(found, domains), encoding="utf-8")
        (folder / "report.html").write_text(first.read_text(encoding="utf-8"), encoding="utf-8")
        return folder / "report.html"
    samples = read_folder(folder / "samples", models, tokens=False)
    scores = {name: score(samples[name]) for name in models}
    rewards = {name: rewards_of(samples[name]) for name in models}
    merged = [n for n in models if n not in ("sft", "mixed", "distill", *domains)]
    best = max(merged, key=lambda n: average(scores[n]))
    parts = [
        "<h1>Mix or merge?</h1>",
        f'<p class="headline">{headline(scores, rewards, best, domains)}</p>',
        f"<p>{html.escape(', '.join(f'{k} {v}' for k, v in settings.items()))}. Avg@K in %, 95% bootstrap interval "
        "over problems in small type; the last column is the mean over domains.</p>",
        table(scores, domains),
        "<h2>What each expert's gain became</h2>",
        retention(scores, domains, merged),
    ]
    parts += [analysis(json.loads(p.read_text()), p.parent) for p in sorted((folder / "analysis").glob("*.json"))]
    parts.append("<h2>Sample responses</h2>")
    for name in models:
        parts.append(f"<details><summary>{html.escape(name)}</summary>")
        for domain in domains:
            for s in [s for s in samples[name] if s.prompt.domain == domain][:EXAMPLES]:
                text = f"{s.prompt.text}\n→ {s.text}\n[{s.status}, reward {s.reward:g}]"
                parts.append(f"<pre>{html.escape(text)}</pre>")
        parts.append("</details>")
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Mix or merge? An m2rl study</title><style>{STYLE}</style></head><body>{''.join(parts)}</body></html>"
    )
    (folder / "table.md").write_text(markdown(scores, domains), encoding="utf-8")
    partial = folder / ".report.html.partial"
    partial.write_text(page, encoding="utf-8")
    return partial.rename(folder / "report.html")


def headline(
    scores: Mapping[str, Mapping[str, Score]],
    rewards: Mapping[str, Mapping[str, np.ndarray]],
    best: str,
    domains: Sequence[str],
) -> str:
    """Two sentences: mixed against the best merge with the paired interval, and both against the start."""
    problems = sorted(rewards["mixed"])
    mixed, merged = (np.array([rewards[name][p].mean() for p in problems]) for name in ("mixed", best))
    d = paired_bootstrap(mixed, merged)
    verdict = "ahead of" if d.low > 0 else "behind" if d.high < 0 else "not distinguishable from"
    mean = {n: 100 * average(scores[n]) for n in ("sft", "mixed", best, "distill")}
    return (
        f"One mixed run reaches {mean['mixed']:.1f} on average over {', '.join(domains)} and is {verdict} the best of "
        f"the merges, {html.escape(best)}, at {mean[best]:.1f}: difference {100 * d.mean:+.1f} points, 95% interval "
        f"{100 * d.low:+.1f} to {100 * d.high:+.1f} over problems. Both started at {mean['sft']:.1f}; distilling the "
        f"experts gives {mean['distill']:.1f}. The merge was picked on these same problems, which flatters it."
    )


def table(scores: Mapping[str, Mapping[str, Score]], domains: Sequence[str]) -> str:
    rows = ["<tr><th>model</th>" + "".join(f"<th>{d}</th>" for d in domains) + "<th>average</th></tr>"]
    for name, per in scores.items():
        cells = ""
        for d in domains:
            low, high = (100 * x for x in per[d].ci95)
            cells += f"<td>{100 * per[d].avg_at_k:.1f}<br><small>{low:.1f} – {high:.1f}</small></td>"
        rows.append(f"<tr><td>{html.escape(name)}</td>{cells}<td>{100 * average(per):.1f}</td></tr>")
    return f'<div class="wide"><table>{"".join(rows)}</table></div>'


def over_seeds(found: Sequence[Mapping[str, Mapping[str, Score]]], domains: Sequence[str]) -> str:
    """Mean Avg@K over seeds, plus or minus half of the 95% t interval."""
    lines = [f"| model | {' | '.join(domains)} | average |", "|---|" + "---:|" * (len(domains) + 1)]
    for name in found[0]:
        rows = [[100 * s[name][d].avg_at_k for d in domains] + [100 * average(s[name])] for s in found]
        mean, spread = np.mean(rows, axis=0), np.std(rows, axis=0, ddof=1) / len(found) ** 0.5
        t = T95[min(len(found) - 1, len(T95)) - 1]
        lines.append(f"| {name} | {' | '.join(f'{m:.1f} ± {t * x:.1f}' for m, x in zip(mean, spread))} |")
    return "\n".join(lines) + "\n"


def markdown(scores: Mapping[str, Mapping[str, Score]], domains: Sequence[str]) -> str:
    lines = [f"| model | {' | '.join(domains)} | average |", "|---|" + "---:|" * (len(domains) + 1)]
    for name, per in scores.items():
        cells = " | ".join(f"{100 * per[d].avg_at_k:.1f}" for d in domains)
        lines.append(f"| {name} | {cells} | {100 * average(per):.1f} |")
    return "\n".join(lines) + "\n"


def retention(scores: Mapping[str, Mapping[str, Score]], domains: Sequence[str], merged: Sequence[str]) -> str:
    """(model - sft) / (expert - sft) on the expert's own domain: 100% keeps the whole gain."""
    rows = ["<tr><th>share of the expert's gain kept, %</th>" + "".join(f"<th>{d}</th>" for d in domains) + "</tr>"]
    for name in (*merged, "mixed", "distill"):
        cells = ""
        for d in domains:
            start, expert = scores["sft"][d].avg_at_k, scores[d][d].avg_at_k
            kept = f"{100 * (scores[name][d].avg_at_k - start) / (expert - start):.0f}" if expert > start else "no gain"
            cells += f"<td>{kept}</td>"
        rows.append(f"<tr><td>{html.escape(name)}</td>{cells}</tr>")
    return f'<div class="wide"><table>{"".join(rows)}</table></div>'


def analysis(content: Mapping[str, Any], folder: Path) -> str:
    """One analysis: definitions, figures, tables."""
    name = content["analysis"]
    out = [f"<h2>{html.escape(name.capitalize())}</h2>", "<details><summary>Definitions and source</summary><ul>"]
    out += [f"<li><b>{html.escape(k)}</b>: {html.escape(v)}</li>" for k, v in content["definitions"].items()]
    out.append(f"</ul><p>{html.escape(content['source'])}</p></details>")
    for path in sorted(folder.glob(f"{name}-*.svg")):
        svg = path.read_text(encoding="utf-8")
        out.append(f"<figure>{svg[svg.index('<svg') :]}</figure>")
    for title, rows in content["tables"].items():
        if not rows:
            continue
        keys = list(dict.fromkeys(k for row in rows for k in row))
        head = "".join(f"<th>{html.escape(k)}</th>" for k in keys)
        body = "".join("<tr>" + "".join(f"<td>{cell(row.get(k))}</td>" for k in keys) + "</tr>" for row in rows[:ROWS])
        more = (
            f"<p>The first {ROWS} of {len(rows)} rows; all are in {name}-{title}.csv.</p>" if len(rows) > ROWS else ""
        )
        out.append(
            f"<details><summary>{html.escape(title)} ({len(rows)} rows)</summary>"
            f'<div class="wide"><table><tr>{head}</tr>{body}</table></div>{more}</details>'
        )
    return "".join(out)


def cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return "" if value is None else html.escape(str(value))
