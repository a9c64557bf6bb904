"""The study's report: one HTML file that needs no network, and the same figures as files.

    write("runs/study", models, domains, settings)            report.html, table.md, figures/*.svg, analysis/findings.*
    python -m m2rl.report runs/study [--png]                  the same again; --png: figures/*.png through Chromium
    write(out, models, domains, settings, {0: a, 1: b, 2: c}) several seeds: means and intervals over seeds

Every number is computed here or read from the stages' files, none is typed in; every estimate stands with its n and its
95% interval (m2rl/comparison.py). Figures are the SVG of m2rl/analyze/figures.py, drawn for a laptop and for a phone;
report.js adds values under the pointer, series to hide and files to save, and the page reads the same without it. A
content security policy forbids the page to load anything.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import html
import itertools
import json
import os
import platform
import re
import tomllib
from collections.abc import Mapping, Sequence
from importlib import resources
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from m2rl import findings
from m2rl.analyze.figures import CSS, NARROW, THEME, Figure, Series, chart, heat_map, label, paint
from m2rl.analyze.output import PAPER
from m2rl.command import exit_with, whole_file
from m2rl.comparison import PAPER_NAMES, Comparison, Estimate, read, t_interval
from m2rl.findings import Finding
from m2rl.published import NINE, PUBLISHED
from m2rl.published import title as benchmark_title
from m2rl.types import InputError, Sample

EXAMPLES = 3  # problems per domain whose responses can be opened
BINS = 12  # points of a learning curve, each of at least three steps
NUMBER = "@figure@"  # where a figure's number goes
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data: blob:"
e = html.escape


def write(
    out: str | Path,
    models: Sequence[str],
    domains: Sequence[str],
    settings: Mapping[str, Any],
    folders: Mapping[int, str | Path] | None = None,
    *,
    png: bool = False,
) -> Path:
    """Write the report of one study folder, or of several seeds' (`folders`: seed -> study folder), into `out`.
    InputError for a missing stage, or models that were not scored on the same problems."""
    out = Path(out)
    given = {int(s): Path(f) for s, f in (folders or {int(settings.get("seed", 0)): out}).items()}
    c = Comparison([read(f, models, s) for s, f in given.items()], models, domains)
    checked = findings.check(c)
    findings.analysis(c, checked).write(out / "analysis")
    page = _Page(c)
    sections = [
        ("answer", "The answer", answer(c)),
        ("scores", "Scores", scores(c, page)),
        ("findings", "The paper's findings, checked", checks(c, checked, page)),
        ("merging", "Merge methods compared", merging(c, page)),
        ("learning", "Learning curves", learning(c, page)),
        *((name, SECTIONS[name][0], analysis(c, page, name)) for name in SECTIONS if _has(c, name)),
        ("costs", "What it cost", costs(c, page)),
        ("samples", "Sample responses", responses(c)),
        ("made", "How this was made", made(c, settings, given)),
    ]
    contents = "".join(f'<li><a href="#{key}">{e(title)}</a></li>' for key, title, _ in sections)
    title = "Mix or merge?"
    when = datetime.date.today().isoformat()
    n_seeds = f"{len(c.seeds)} seeds" if len(c.seeds) > 1 else "one seed"
    body = "".join(
        f'<section id="{key}">{f"<h2>{e(name)}</h2>" if key != "answer" else ""}{content}</section>'
        for key, name, content in sections
        if content
    )
    count = itertools.count(1)
    body = re.sub(NUMBER, lambda _: str(next(count)), body)  # figures are numbered as they stand on the page
    files = resources.files("m2rl")
    text = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        f"<title>{title} An m2rl study</title><style id=figure-style>{THEME}{CSS}</style>"
        f"<style>{(files / 'report.css').read_text(encoding='utf-8')}</style></head><body><div class=page>"
        f'<nav aria-label="Contents"><details open><summary>Contents</summary><ol>{contents}</ol></details></nav>'
        f"<main><h1>{title}</h1><p class=by>{len(c.models)} models, {len(c.domains)} domains, {n_seeds} · {when}</p>"
        f"{body}</main></div><div id=tip role=status hidden></div>"
        f"<script>{(files / 'report.js').read_text(encoding='utf-8')}</script></body></html>\n"
    )
    (out / "table.md").write_text(markdown(c), encoding="utf-8")
    folder = out / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    for figure in page.figures:
        (folder / f"{figure.name}.svg").write_text(figure.svg(), encoding="utf-8")
    kept = {"models": list(models), "domains": list(domains), "settings": dict(settings)}
    kept["folders"] = {str(s): os.path.relpath(f, out) for s, f in given.items()}
    (out / "report.json").write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    with whole_file(out / "report.html") as file:
        file.write(text)
    if png:
        pictures(folder, [f.name for f in page.figures])
    return out / "report.html"


def pictures(folder: Path, names: Sequence[str]) -> None:
    """Every figure's SVG as a PNG of twice its size, through headless Chromium."""
    from m2rl.browser import Browser

    with Browser() as browser:
        for name in names:
            page = browser.open(folder / f"{name}.svg")
            page.png(folder / f"{name}.png", of="svg", scale=2)
            page.close()


# ---- the parts of a page ---------------------------------------------------------------------------------------------


class _Page:
    """Draws the figures, and remembers them for their files."""

    def __init__(self, c: Comparison):
        self.c = c
        self.figures: list[Figure] = []

    def figure(self, figure: Figure, caption: str, how: str = "", *, small: bool = False) -> str:
        """One figure with its caption, legend, numbers; drawn twice unless it is `small`: for a laptop and a phone."""
        self.figures.append(figure)
        names = [s.name for s in figure.series]
        legend = ""
        if len(names) > 1:
            legend = "".join(
                f'<button type=button data-s="{e(n)}" aria-pressed={"false" if n in figure.off else "true"}>'
                f'<span class=sw style="--c:{paint(n, names)}"></span>{e(label(n))}</button>'
                for n in names
            )
            legend = f'<div class=legend role=group aria-label="Show or hide">{legend}</div>'
        narrow = figure.svg(NARROW, standalone=False)
        drawn = (
            f"<div>{narrow}</div>"
            if small
            else f"<div class=wide>{figure.svg(standalone=False)}</div><div class=narrow>{narrow}</div>"
        )
        head, rows = figure.table()
        numbers = f"<details><summary>Numbers</summary>{table(head, [[e(x) for x in row] for row in rows])}</details>"
        how = f" <span class=how>{e(how)}</span>" if how else ""
        return (
            f'<figure data-name="{e(figure.name)}"><p class=ft>{e(figure.title)}</p>{legend}{drawn}<figcaption>'
            f"<b>Figure {NUMBER}.</b> {e(caption)}{how}</figcaption>"
            f"<div class=tools>{numbers}</div></figure>"
        )


def table(head: Sequence[str], rows: Sequence[Sequence[str]], *, classes: str = "") -> str:
    """Cells are HTML; the first of a row is its heading. A row of one cell heads a group."""
    body = ""
    for row in rows:
        if len(row) == 1:
            body += f"<tr class=group><th scope=rowgroup colspan={len(head)}>{row[0]}</th></tr>"
            continue
        body += f"<tr><th scope=row>{row[0]}</th>"
        body += "".join(x if x.startswith("<td") else f"<td>{x}</td>" for x in row[1:]) + "</tr>"
    top = "".join(f"<th scope=col>{e(h)}</th>" for h in head)
    style = f' class="{classes}"' if classes else ""
    return (
        f"<div class=scroll tabindex=0><table{style}><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def swatch(model: str, models: Sequence[str] = ()) -> str:
    return f'<span class=sw style="--c:{paint(model, models)}"></span>{e(label(model))}'


def percent(x: Estimate, sign: str = "") -> str:
    """A share as "81.2 [78.0, 84.1]"."""
    return f"{100 * x.value:{sign}.1f} [{100 * x.low:{sign}.1f}, {100 * x.high:{sign}.1f}]".replace("-", "−")


def cell(x: Estimate, best: bool = False, digits: int = 1) -> str:
    low, high = (f"{100 * v:.{digits}f}".replace("-", "−") for v in (x.low, x.high))
    dash = " – " if x.low < 0 else "–"
    text = f"{100 * x.value:.{digits}f}<small>{low}{dash}{high}</small>".replace("-", "−")
    return f"<td class=best>{text}</td>" if best else f"<td>{text}</td>"


def over(x: Estimate) -> str:
    return f"n = {x.n} {x.over}"


def interval(c: Comparison) -> str:
    """How the intervals of this report were made, in words."""
    if len(c.seeds) > 1:
        return f"95% Student t intervals over {len(c.seeds)} seeds"
    return "95% bootstrap intervals over held-out problems"


def groups(c: Comparison) -> list[tuple[str, list[str]]]:
    found = [
        ("Start", [c.base]),
        ("Experts, one domain each", list(c.domains)),
        ("One run on all domains", ["mixed"]),
        ("Merges of the experts", c.merges),
        ("Distilled from the experts", ["distill"]),
    ]
    return [(title, [m for m in models if m in c.models]) for title, models in found]


# ---- the sections ----------------------------------------------------------------------------------------------------


def answer(c: Comparison) -> str:
    """The verdict, then two sentences: mixed against the best merge, and where both come from."""
    best, many = c.best_merge, len(c.merges)
    d = c.difference("mixed", best)
    mixed, merged, base, taught = (c.mean(m) for m in ("mixed", best, c.base, "distill"))
    own = c.estimate(lambda at: sum(at(x, x) for x in c.domains) / len(c.domains))
    ties = c.difference("mixed", "ties") if "ties" in c.models else None
    word = "Mix." if d.low > 0 else "Merge." if d.high < 0 else "Too close to call."
    verdict = "is ahead of" if d.low > 0 else "is behind" if d.high < 0 else "is not distinguishable from"
    notes = [f"Avg@{_k(c)} in points, {interval(c)} ({over(d)})."]
    notes.append("The best merge is the one with the highest score on these same problems, which flatters it.")
    if ties and best != "ties":
        notes.append(f"Against TIES, the paper's choice, mixing gives {percent(ties, '+')}.")
    return (
        f"<div class=answer><p class=verdict>{word}</p>"
        f"<p>One mixed run reaches <b>{percent(mixed)}</b> on average over "
        f"{e(', '.join(c.domains))} and {verdict} the best of {many} merges, {e(label(best))}, at "
        f"<b>{percent(merged)}</b>: a difference of <b>{percent(d, '+')}</b> points. Both started from "
        f"{percent(base)}; the experts reach {percent(own)} on their own domains, and distilling all of them into one "
        f"model gives {percent(taught)}.</p>"
        f"<p class=dim>{' '.join(notes)}</p></div>"
    )


def _k(c: Comparison) -> str:
    """K, or the K of every benchmark."""
    found = list(dict.fromkeys(c.k.values()))
    return str(found[0]) if len(found) == 1 else " or ".join(map(str, sorted(found)))


def scores(c: Comparison, page: _Page) -> str:
    """The table of all models, and the averages as a figure."""
    at = {(m, d): c.mean(m, d) for m in c.models for d in (*c.benchmarks, None)}
    top = {d: max(at[m, d].value for m in c.models) for d in (*c.benchmarks, None)}
    rows: list[list[str]] = []
    for title, models in groups(c):
        if models:
            rows.append([e(title)])
        rows += [
            [swatch(m, c.models), *(cell(at[m, d], at[m, d].value == top[d]) for d in (*c.benchmarks, None))]
            for m in models
        ]
    counts = ", ".join(f"{benchmark_title(b)} {len(c.problems[b])}" for b in c.benchmarks)
    order = sorted(c.models, key=lambda m: at[m, None].value, reverse=True)
    dots = chart(
        "averages",
        "dots",
        "Average over domains",
        [
            Series(
                "Avg@K",
                list(order),
                [100 * at[m, None].value for m in order],
                [100 * at[m, None].low for m in order],
                [100 * at[m, None].high for m in order],
            )
        ],
        y_title="Avg@K, %",
        line=100 * at["mixed", None].value if "mixed" in c.models else None,
    )
    return (
        f"<p>Avg@{_k(c)} in %{', mean over seeds' if len(c.seeds) > 1 else ''}: the mean reward of {_k(c)} samples at "
        f"temperature 1 on each held-out problem "
        f"({e(counts)} problems). Small type: {interval(c)}. Bold: the highest of a column, which need not "
        "be significant.</p>"
        + table(["model", *(benchmark_title(b) for b in c.benchmarks), "average"], rows)
        + page.figure(
            dots,
            f"All {len(order)} models by their unweighted mean over {len(c.domains)} domains; the dashed line is the "
            "mixed run.",
            f"{interval(c)}; {over(at[order[0], None])}.",
        )
        + published(c)
    )


def published(c: Comparison) -> str:
    """The paper's table: beside ours where the benchmark is the same, else by itself."""
    names = {m: PAPER_NAMES[m] for m in c.models if m in PAPER_NAMES}
    same = [b for b in c.benchmarks if b in NINE]
    if same:
        rows = []
        for m, theirs in names.items():
            row = [swatch(m, c.models)]
            for d in same:
                ours = c.mean(m, d)
                paper = PUBLISHED[theirs][d]
                row.append(f"<td>{percent(ours)}<small>paper {paper:.2f}, {100 * ours.value - paper:+.2f}</small></td>")
            rows.append(row)
        return "<h3>Ours beside the paper's</h3>" + table(["model", *(benchmark_title(d) for d in same)], rows)
    rows = []
    for m, theirs in names.items():
        numbers = [PUBLISHED[theirs][b] for b in NINE]
        rows.append([swatch(m, c.models), *(f"{x:.2f}" for x in numbers), f"{np.mean(numbers):.2f}"])
    return (
        "<details class=more><summary>The paper's own table (Qwen3-4B, nine benchmarks)</summary>"
        f"<p class=dim>{e(PAPER)}, version 1. Other benchmarks than ours, so cells do not compare; the checks below "
        "apply the same expression to both tables. The paper gives no intervals.</p>"
        + table(["model", *(benchmark_title(b) for b in NINE), "mean"], rows)
        + "</details>"
    )


def checks(c: Comparison, checked: Sequence[Finding], page: _Page) -> str:
    """Verdicts as a figure (those in points) and as a list with claim, test, numbers."""
    counts = {v: sum(f.verdict == v for f in checked) for v in findings.VERDICTS}
    summary = ", ".join(f"{v} {n}" for v, n in counts.items())
    drawn = [f for f in checked if f.estimate is not None and f.unit == "points"]
    names = [f.name for f in drawn]
    series = [
        Series(
            "here",
            names,
            [100 * f.estimate.value for f in drawn if f.estimate],
            [100 * f.estimate.low for f in drawn if f.estimate],
            [100 * f.estimate.high for f in drawn if f.estimate],
            [f.verdict for f in drawn],
        )
    ]
    theirs = [f for f in drawn if f.paper is not None]
    if theirs:
        series.append(Series("paper", [f.name for f in theirs], [100 * f.paper for f in theirs if f.paper is not None]))
    figure = chart(
        "findings",
        "dots",
        "Findings measured in points",
        series,
        y_title="points of Avg@K, as each test says",
        line=0.0,
    )
    items = {True: "", False: ""}
    for f in checked:
        items[f.ours] += _finding(f)
    return (
        f"<p>{len(checked)} claims: {summary}. A claim holds only if its whole 95% interval is on its side of the "
        f"bound in its test; comparable means within ±{100 * findings.MARGIN:g} points. Intervals are not adjusted for "
        "the number of claims unless the test says so.</p>"
        + page.figure(
            figure,
            "Every finding that is a difference of scores: what was measured here, and the same expression of the "
            "paper's table.",
            f"{interval(c)}; the paper gives no intervals and has other benchmarks. Tests: below.",
        )
        + f"<ul class=findings>{items[False]}</ul><h3>What this repository promises of its own study</h3>"
        + f"<ul class=findings>{items[True]}</ul>"
    )


def _finding(f: Finding) -> str:
    scale, unit, digits, sign = {
        "points": (100, "points", 1, "+"),
        "share": (100, "%", 1, ""),
        "nats": (1, "nats", 3, "+"),
        "ratio": (1, "", 3, ""),
    }[f.unit]
    number = ""
    if f.estimate is not None:
        x = f.estimate
        value, low, high = (f"{scale * v:{sign}.{digits}f}" for v in (x.value, x.low, x.high))
        number = f"<b>{value} {unit}</b><small>95%: {low} to {high}</small><small>{over(x)}</small>"
    if f.paper is not None:
        number += f"<small>paper {scale * f.paper:{sign}.{digits}f}{'' if unit == 'points' else ' ' + unit}</small>"
    style = {"holds": "holds", "does not hold": "not", "undecided": "undecided"}.get(f.verdict, "untested")
    test = f"<small>Test: {e(f.test)}.</small>" if f.test else ""
    note = f"<small>{e(f.note[:1].upper() + f.note[1:])}.</small>" if f.note else ""
    return (
        f'<li><span class="tag {style}">{f.verdict}</span><div><b>{e(f.name)}</b><span>{e(f.claim)}</span>{test}{note}'
        f"</div><div class=number>{number.replace('-', '−')}</div></li>"
    )


def merging(c: Comparison, page: _Page) -> str:
    """Every way of joining the experts against the mixed run, and what each kept of the experts' gains."""
    joined = [*c.merges, "distill"]
    found = {m: c.difference(m, "mixed") for m in joined}
    order = sorted(joined, key=lambda m: found[m].value, reverse=True)
    against = chart(
        "against-mixed",
        "dots",
        "Joined experts minus the mixed run",
        [
            Series(
                "difference",
                list(order),
                [100 * found[m].value for m in order],
                [100 * found[m].low for m in order],
                [100 * found[m].high for m in order],
            )
        ],
        y_title="difference of the average, points",
        line=0.0,
    )
    kept = {(m, d): c.kept(m, d) for m in [*c.merges, "mixed", "distill"] for d in c.domains}
    rows = []
    for m in [*c.merges, "mixed", "distill"]:
        row = [swatch(m, c.models)]
        for d in c.domains:
            x = kept[m, d]
            row.append("<td class=dim>no gain</td>" if x is None else cell(x, digits=0))
        known = [kept[m, d].value for d in c.domains if kept[m, d] is not None]  # type: ignore[union-attr]
        row.append(f"{100 * min(known):.0f}" if known else "")
        rows.append(row)
    heat = heat_map(
        "kept",
        "Share of the expert's gain kept, %",
        [
            [100 * x.value if (x := kept[m, d]) is not None else float("nan") for d in c.domains]
            for m in [*c.merges, "mixed", "distill"]
        ],
        [*c.merges, "mixed", "distill"],
        c.domains,
        unit="%",
    )
    return (
        page.figure(
            against,
            "Each merge, and the distilled model, against the mixed run: to the right of the line it is better.",
            f"Differences are paired on problems and seeds; {interval(c)}, {over(found[order[0]])}.",
        )
        + page.figure(
            heat,
            "What every method kept of each expert's gain on the expert's own domain; 100 keeps all of it.",
            "(model − base) / (expert − base), Avg@K on the expert's domain. Empty where the expert's gain is not "
            "above 0.",
        )
        + "<details class=more><summary>With intervals</summary><p class=dim>Share kept in %, "
        + f"{interval(c)}; last column: the domain that keeps least.</p>"
        + table(["model", *c.domains, "least"], rows)
        + "</details>"
    )


def curve(folder: Path, domain: str) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """(prompts of the domain seen, mean reward, its half interval) in BINS bins of steps; None without a record."""
    path = folder / "metrics.jsonl"
    if not path.is_file() or not (folder / "config.toml").is_file():
        return None
    config = tomllib.loads((folder / "config.toml").read_text(encoding="utf-8"))
    quota = next(d["quota"] for d in config["domain"] if d["name"] == domain)  # distilling forms no groups
    steps: dict[int, tuple[float, float]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if f"{domain}/reward" in row and "step_s" in row:
            steps[int(row["step"])] = (float(row[f"{domain}/reward"]), float(row[f"{domain}/groups"] or quota))
    if not steps:
        return None
    values = [steps[k] for k in sorted(steps)]
    seen = np.cumsum([n for _, n in values])
    parts = np.array_split(np.arange(len(values)), max(1, min(BINS, len(values) // 3)))
    reward = np.array([v for v, _ in values])
    ends = np.array([t_interval(reward[p].tolist()) for p in parts])
    return np.array([seen[p].mean() for p in parts]), ends[:, 0], ends[:, 2] - ends[:, 0]


def learning(c: Comparison, page: _Page) -> str:
    """Training reward by domain: its expert, the mixed run, the distilled model."""
    out = []
    for d in c.domains:
        series = []
        for run in (d, "mixed", "distill"):
            found = [x for s in c.seeds if (x := curve(s.folder / run, d)) is not None]
            if not found:
                continue
            size = min(len(x[0]) for x in found)
            x, y = (np.mean([f[i][:size] for f in found], axis=0) for i in (0, 1))
            half = found[0][2]
            if len(found) > 1:
                ends = [t_interval([f[1][i] for f in found]) for i in range(size)]
                low, high = [v[1] for v in ends], [v[2] for v in ends]
            else:
                low, high = (y - half).clip(0, 1).tolist(), (y + half).clip(0, 1).tolist()
            series.append(Series(run, x.tolist(), y.tolist(), low, high))
        if series:
            start = c.mean(c.base, d).value
            out.append(
                page.figure(
                    chart(
                        f"learning-{d}",
                        "lines",
                        d,
                        series,
                        x_title=f"{d} prompts seen",
                        y_title="mean reward",
                        line=start,
                    ),
                    f"{d}: its expert, the mixed run and the distilled model.",
                    small=True,
                )
            )
    if not out:
        return ""
    how = "t intervals over seeds" if len(c.seeds) > 1 else "t intervals over the steps of a point"
    return (
        "<p>Mean reward of the responses sampled in training, over the prompts of that domain seen so far: the mixed "
        "run and the distilled model share every step among the domains. Each point is the mean of three or more "
        f"steps; bands: 95% {how}. Dashed: Avg@K of the base on held-out problems.</p>"
        f"<div class=grid>{''.join(out)}</div>"
    )


# Captions of the analyses' figures: name -> (what is seen, small). Those not listed stand under "More figures".
SECTIONS: dict[str, tuple[str, str, dict[str, str]]] = {
    "policies": (
        "How far the policies are from each other",
        "Divergence between policies on each domain's prompts, and whether it explains accuracy.",
        {
            "kl-*": "KL from the row's policy to the column's on {} prompts, along the row's own responses.",
            "explained": "Variance of accuracy explained by the KL to the domain's own expert, by the accuracy of the "
            "neighbouring experts, and by both.",
            "accuracy-neighbour-transfer": "Accuracy of every policy and domain against the mean accuracy of its "
            "neighbours among the experts.",
            "accuracy-own-teacher-kl": "Accuracy of every policy and domain against its KL to the domain's own expert.",
        },
    ),
    "weights": (
        "What training changed in the weights",
        "Updates relative to the base: how large, where, and how much two models' updates share.",
        {
            "map": "",
            "cosine": "Cosine between the updates of two models; 0 is orthogonal.",
            "overlap-large": "How much more often than by chance two models' largest tenth of changes coincide "
            "(1 = as often as if independent).",
            "layers": "Size of the update relative to the base's weights, by layer.",
            "rank": "Effective rank of the updates relative to the largest possible, by layer.",
        },
    ),
    "skills": (
        "Which skills each model has",
        "A problem counts as solved when more than half of its samples are right.",
        {
            "flows": "Every model's problems by where the skill comes from: kept from the base, inherited from an "
            "expert, novel, forgotten by training, lost from the experts.",
            "overlap": "Jaccard overlap of the sets of solved problems.",
            "flips": "Problems that the row solves and the column does not; on the diagonal the noise of one model "
            "against itself.",
        },
    ),
    "information": (
        "The price of accuracy in nats",
        "How far a policy moved from the base, and how much accuracy it gained for it.",
        {
            "budget": "Gain over the base against the KL from it, one point per model and domain.",
            "efficiency": "Share of the nats that the change of accuracy needs at least.",
        },
    ),
    "verification": (
        "Telling right from wrong",
        "Whether a model's own probability tells right responses from wrong ones.",
        {
            "outcome": "AUROC of the row judging the column's responses from the final answer alone (0.5 = chance).",
            "process": "AUROC of the row judging the column's responses step by step up to the horizon.",
            "horizon": "Self-verification by the number of steps seen.",
            "training": "Self-discrimination during training.",
        },
    ),
}
SMALL = ("kl-*", "explained", "accuracy-neighbour-transfer", "accuracy-own-teacher-kl", "layers", "rank")


def _has(c: Comparison, name: str) -> bool:
    return all(name in s.analyses for s in c.seeds)


def analysis(c: Comparison, page: _Page, name: str) -> str:
    """One analysis: definitions, figures with captions, tables."""
    _, lead, captions = SECTIONS[name]
    contents = [s.analyses[name] for s in c.seeds]
    drawn = {
        f["name"]: mean_figure([Figure.from_dict(_figure(x, f["name"])) for x in contents])
        for f in contents[0]["figures"]
    }
    if name == "weights":
        drawn = {"map": weight_map(c)} | drawn
        captions = captions | {
            "map": "The models in the plane that holds most of their updates: the base is the origin, and the distance "
            "from it the size of an update, as far as the plane shows it."
            + (f" Seed {c.seeds[0].seed} alone." if len(c.seeds) > 1 else "")
        }
    seeds = f" Mean over {len(c.seeds)} seeds." if len(c.seeds) > 1 else ""
    out, grid, more = [f"<p>{e(lead)}{e(seeds)}</p>"], [], []
    for key, figure in drawn.items():
        if figure is None:
            continue
        pattern = key if key in captions else f"{key.partition('-')[0]}-*"
        text = captions.get(pattern, "").format(key.partition("-")[2])
        how = _how(contents[0], name, key)
        if not text:
            more.append(page.figure(_limited(c, figure), f"{figure.title}.", how))
        elif pattern in SMALL:
            grid.append(page.figure(_limited(c, figure), text, how, small=True))
        else:
            out.append(page.figure(_limited(c, figure), text, how))
    first = out[:1] + ([f"<div class=grid>{''.join(grid)}</div>"] if grid else []) + out[1:]
    if name == "weights":
        first = out + ([f"<div class=grid>{''.join(grid)}</div>"] if grid else [])
    if more:
        first.append(f"<details class=more><summary>More figures ({len(more)})</summary>{''.join(more)}</details>")
    first.append(definitions(contents[0]))
    return "".join(first)


def _figure(content: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = next((f for f in content["figures"] if f["name"] == name), None)
    if found is None:
        raise InputError(f"the {content['analysis']} analysis of one seed has no figure {name}: run the study again")
    return found


def _limited(c: Comparison, figure: Figure) -> Figure:
    """Where every model is a series: the merges but the best are hidden at first."""
    hidden = [s.name for s in figure.series if s.name in c.merges and s.name not in (c.best_merge, "ties")]
    return dataclasses.replace(figure, off=hidden) if figure.kind in ("lines", "bars") else figure


def _how(content: Mapping[str, Any], name: str, key: str) -> str:
    """n and settings of one figure, from the analysis's own record."""
    inputs = content["inputs"]
    if name == "policies":
        prompts = inputs["prompts"]
        domain = key.partition("-")[2]
        n = f"{prompts[domain]} prompts" if domain in prompts else f"{sum(prompts.values())} prompts"
        return (
            f"Nats per response over the whole vocabulary; {n}; standard errors in the table."
            if key.startswith("kl-")
            else f"{n}."
        )
    if name == "weights":
        size = inputs["sketch_size"]
        return f"{inputs['parameters']:,} parameters in {inputs['tensors']} tensors" + (
            f"; projection to {size} dimensions." if key == "projected" else "."
        )
    if name == "skills":
        return f"{inputs['problems']['all']} problems, {inputs['samples_per_problem']} samples each."
    if name == "information" and key == "budget":
        return "Bars: 95% bootstrap interval over prompts."
    return ""


def mean_figure(figures: Sequence[Figure]) -> Figure | None:
    """The mean over seeds of one figure: cells and values are averaged, clouds of points are joined."""
    first = figures[0]
    if len(figures) == 1:
        return first
    if first.kind == "heatmap":
        return heat_map(
            first.name, first.title, np.mean([f.z for f in figures], axis=0), first.rows, first.columns, unit=first.unit
        )
    series = []
    for i, s in enumerate(first.series):
        mine = [f.series[i] for f in figures]
        if first.kind == "points":
            series.append(
                Series(
                    s.name,
                    [x for m in mine for x in m.x],  # type: ignore[arg-type]
                    [y for m in mine for y in m.y],
                    labels=[x for m in mine for x in m.labels or [m.name] * len(m.y)],
                )
            )
            continue
        ends = [t_interval([m.y[j] for m in mine]) for j in range(len(s.y))]
        mean, low, high = ([v[k] for v in ends] for k in (0, 1, 2))
        stacked = first.kind == "stacked"  # their ends are sums of parts: an interval has no place there
        series.append(Series(s.name, s.x, mean, *(() if stacked else (low, high))))
    return chart(first.name, first.kind, first.title, series, x_title=first.x_title, y_title=first.y_title)


def weight_map(c: Comparison) -> Figure | None:
    """Two principal axes of the updates, from their inner products: |d_i| |d_j| cosine_ij. Of the first seed."""
    content = c.seeds[0].analyses["weights"]
    names = content["inputs"]["models"]
    norm = {r["model"]: r["norm"] for r in content["results"]["updates"]}
    size = np.array([norm[m] for m in names])
    cosine = np.array([[np.nan if v is None else v for v in row] for row in content["results"]["cosine"]])
    if not np.isfinite(cosine).all():
        return None
    values, vectors = np.linalg.eigh(cosine * np.outer(size, size))
    values, vectors = values[::-1].clip(0), vectors[:, ::-1]
    at = vectors[:, :2] * np.sqrt(values[:2])
    share = values[:2] / values.sum()
    series = [Series(c.base, [0.0], [0.0], labels=["the base"])]
    series += [Series(m, [float(x)], [float(y)], labels=[f"|update| {norm[m]:.3g}"]) for m, (x, y) in zip(names, at)]
    figure = chart(
        "map",
        "points",
        "Where training and merging went",
        series,
        x_title=f"first axis, {share[0]:.0%} of the squared length",
        y_title=f"second axis, {share[1]:.0%}",
    )
    return dataclasses.replace(figure, equal=True)


def definitions(content: Mapping[str, Any]) -> str:
    items = "".join(f"<dt>{e(k)}</dt><dd>{e(v)}</dd>" for k, v in content["definitions"].items())
    files = ", ".join(f"{content['analysis']}-{t}.csv" for t in content["tables"])
    return (
        f"<details class=more><summary>Definitions, source and files</summary><dl>{items}</dl><p class=dim>"
        f"{e(content['source'])}</p><p class=dim>In the folder analysis: {content['analysis']}.json, {e(files)}.</p>"
        "</details>"
    )


def costs(c: Comparison, page: _Page) -> str:
    """Hours, steps, tokens, energy by run; the mixed run beside the experts, here and in the paper."""
    if not _has(c, "efficiency"):
        return ""
    contents = [s.analyses["efficiency"] for s in c.seeds]
    runs, unit = contents[0]["tables"]["runs"], contents[0]["inputs"]["unit"]

    def mean(name: str, key: str) -> float | None:
        found = [r[key] for x in contents for r in x["tables"]["runs"] if r["name"] == name]
        return None if not found or None in found else float(np.mean(found))

    def hours(i: int) -> tuple[float, float, float]:
        return t_interval([x["tables"]["runs"][i]["device_hours"] * 60 for x in contents])

    rows = []
    for r in runs:
        row = [swatch(r["name"], c.models), f"{60 * (mean(r['name'], 'device_hours') or 0):.2f}"]
        counts = (mean(r["name"], key) or 0 for key in ("steps", "tokens", "trained_tokens"))
        row += [f"{n:,.0f}" if r["steps"] else "–" for n in counts]
        energy, peak = mean(r["name"], "energy_kwh"), mean(r["name"], "peak_gib")
        row += ["–" if energy is None else f"{energy:.3f}", "–" if peak is None else f"{peak:.2f}"]
        rows.append(row)
    ends = [hours(i) for i in range(len(runs))]
    drawn = chart(
        "hours",
        "bars",
        f"{unit.replace('hours', 'minutes')} of training by run",
        [
            Series(
                "minutes",
                [r["name"] for r in runs],
                [v[0] for v in ends],
                *(([v[1] for v in ends], [v[2] for v in ends]) if len(contents) > 1 else ()),
            )
        ],
        y_title=unit.replace("hours", "minutes"),
    )
    paper = contents[0]["results"]["paper"]
    lines = []
    for what, title in (("mixed", "The mixed run"), ("distilled", "Distillation")):
        ratios = [x["results"]["ratios"].get(f"{what}_over_experts_device_hours") for x in contents]
        if None in ratios:
            continue
        value, low, high = t_interval(ratios)
        spread = f" [{low:.0%}, {high:.0%}] over {len(ratios)} seeds" if len(ratios) > 1 else " (one seed, no interval)"
        steps = float(np.mean([x["results"]["ratios"][f"{what}_over_experts_steps"] for x in contents]))
        lines.append(
            f"{title} took {value:.0%}{spread} of the experts' {unit} together, with {steps:.0%} of their steps; in "
            f"the paper {paper[f'{what}_over_experts_device_hours']:.1%}."
        )
    device = " and ".join(sorted({r["device"].upper() for r in runs}))
    return (
        f"<p>{e(' '.join(lines))} Ratios of hours follow from how long each run is set to be: they are choices of a "
        "recipe, not outcomes.</p>"
        + page.figure(
            drawn,
            f"Time of training on {device}, generation and verification included, evaluation not.",
            f"Sum of the steps' wall seconds × devices; n = {len(contents)} run{'s' * (len(contents) > 1)} each.",
        )
        + table(["run", unit.replace("hours", "minutes"), "steps", "tokens", "trained tokens", "kWh", "peak GiB"], rows)
        + "<p class=dim>Energy is NVML's counter; a dash where there is none. The merges' minutes are one wall time "
        "of all of them, reading and writing included.</p>" + definitions(contents[0])
    )


def responses(c: Comparison) -> str:
    """Per domain the problems on which the models differ most, with one response of every model."""
    s = c.seeds[0]
    out = [
        f"<p>Per domain the {EXAMPLES} problems on which the models' pass rates differ most, with the first of each "
        f"model's {_k(c)} samples{f' (seed {s.seed})' if len(c.seeds) > 1 else ''}. Chosen by spread, not by hand; all "
        "samples are in the folder samples.</p>"
    ]
    by: dict[str, dict[str, list[Sample]]] = {m: {} for m in c.models}
    for m, mine in s.samples.items():
        for x in mine:
            by[m].setdefault(x.prompt.id, []).append(x)
    for d in c.domains:
        ids = [p for p in s.rewards[c.base] if s.domain_of[p] == d]
        spread = {p: float(np.std([s.rewards[m][p].mean() for m in c.models])) for p in ids}
        out.append(f"<h3>{e(d)}</h3>")
        for p in sorted(ids, key=lambda p: (-spread[p], p))[:EXAMPLES]:
            first = by[c.base][p][0]
            rows = []
            for m in c.models:
                x = min(by[m][p], key=lambda x: x.index)
                right = x.reward > 0.5
                rate = f"{int((s.rewards[m][p] > 0.5).sum())}/{len(s.rewards[m][p])}"
                mark = f"<span class={'right' if right else 'wrong'}>{'✓' if right else '✗'} {e(x.status or '')}</span>"
                rows.append(
                    [
                        swatch(m, c.models),
                        rate,
                        f"<td class=text>{mark}</td>",
                        f"<td class=text><pre>{e(x.text)}</pre></td>",
                    ]
                )
            asked = re.sub(r"^<[^<>\s]+>", "", first.prompt.text.strip())  # the tokenizer's begin token
            title = " ".join(asked.split())
            out.append(
                f"<details class=more><summary>{e(title[:110])}{'…' if len(title) > 110 else ''}</summary>"
                f"<pre class=prompt>{e(asked)}</pre>"
                + table(["model", "right", "this sample", "response"], rows, classes="rolls")
                + "</details>"
            )
    return "".join(out)


def made(c: Comparison, settings: Mapping[str, Any], folders: Mapping[int, Path]) -> str:
    """Settings, software, where the files are."""
    items = {
        **{str(k): str(v) for k, v in settings.items() if k != "k"},
        "seed" if len(c.seeds) == 1 else "seeds": ", ".join(str(s.seed) for s in c.seeds),
        "samples": f"{_k(c)} per problem at temperature 1",
        "problems": ", ".join(f"{benchmark_title(b)} {len(c.problems[b])}" for b in c.benchmarks),
        "intervals": interval(c),
        "software": f"Python {platform.python_version()}, torch {version('torch')}, numpy {np.__version__}",
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs, {gpu() or 'no GPU'}",
        "written": datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        **({"folders": ", ".join(f.name for f in folders.values())} if len(folders) > 1 else {}),
    }
    listed = "".join(f"<dt>{e(k)}</dt><dd>{e(v)}</dd>" for k, v in items.items())
    return (
        f"<p>After {e(PAPER)}. The command <code>python -m m2rl.study</code> trained, merged, distilled, sampled, "
        "analysed and wrote this page; the same command continues or repeats it. Beside this file: table.md, samples/, "
        f"analysis/ (JSON and CSV of every number), figures/ (SVG).</p><dl>{listed}</dl>"
    )


def gpu() -> str:
    """The first GPU's name by NVML, "" without one; torch, which knows it too, takes seconds to import."""
    try:
        import pynvml

        pynvml.nvmlInit()
        return str(pynvml.nvmlDeviceGetName(pynvml.nvmlDeviceGetHandleByIndex(0)))
    except Exception:  # no NVML, no driver, or no device
        return ""


def markdown(c: Comparison) -> str:
    """The table of scores for a README."""
    lines = [f"| model | {' | '.join(c.benchmarks)} | average |", "|---|" + "---:|" * (len(c.benchmarks) + 1)]
    for m in c.models:
        numbers = [c.mean(m, d) for d in (*c.benchmarks, None)]
        text = " | ".join(f"{100 * x.value:.1f} [{100 * x.low:.1f}, {100 * x.high:.1f}]" for x in numbers)
        lines.append(f"| {m} | {text} |")
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m m2rl.report", description="Write a study's report again, from its files."
    )
    parser.add_argument("folder", help="the study's folder (--out of m2rl.study)")
    parser.add_argument("--png", action="store_true", help="every figure also as PNG (needs Chromium on PATH)")
    o = parser.parse_args(argv)
    out = Path(o.folder)
    if not (out / "report.json").is_file():
        raise InputError(f"{out} has no report.json: run python -m m2rl.study --out {out} first")
    kept = json.loads((out / "report.json").read_text(encoding="utf-8"))
    folders = {int(s): out / f for s, f in kept["folders"].items()}
    print(write(out, kept["models"], kept["domains"], kept["settings"], folders, png=o.png))
    return 0


if __name__ == "__main__":
    exit_with(main)
