"""Figures as data: one description gives a static SVG without any library, and the figure that plotly.js draws.

    figure = heat_map("kl-math", "KL(row || column), nats", z_RC, rows, columns)
    figure.svg()     a standalone file, light and dark, with a title and a text alternative
    figure.plotly()  {"data": [...], "layout": {...}}: plain JSON for Plotly.newPlot

plotly.js (inside the `plotly` package, extra `study`) is the interactive library: it embeds itself into one HTML file.
It cannot write a picture without a browser, and matplotlib would be a second drawing of every figure: the
static export is therefore the hundred lines of SVG below, which need nothing installed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from html import escape
from typing import Any, Literal

import numpy as np

COLOURS = ("#3b6fb6", "#d1722f", "#3f9456", "#b34a4a", "#7d62b3", "#7c5c48", "#c46ba3", "#6f7681", "#a39a2c", "#2f9aa8")
WIDTH = 720
CHARACTER = 6.6  # px of one character of 12 px text

Kind = Literal["heatmap", "bars", "stacked", "lines", "points"]


@dataclass(frozen=True)
class Series:
    """One line, one set of bars, or one cloud of points."""

    name: str
    x: list[float] | list[str]
    y: list[float]
    low: list[float] | None = None  # ends of the interval around y
    high: list[float] | None = None
    labels: list[str] | None = None  # what a point is called


@dataclass(frozen=True)
class Figure:
    """What to draw; NaN is drawn as a gap."""

    name: str  # of its file
    kind: Kind
    title: str
    alt: str  # the text alternative: what a reader who cannot see the figure needs
    x_title: str = ""
    y_title: str = ""
    series: list[Series] = field(default_factory=list)
    z: list[list[float]] = field(default_factory=list)  # heatmap [rows, columns]
    rows: list[str] = field(default_factory=list)
    columns: list[str] = field(default_factory=list)
    unit: str = ""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def plotly(self) -> dict[str, Any]:
        """The figure in plotly.js's JSON schema; colours of the page are left to the page."""
        layout: dict[str, Any] = {
            "title": {"text": self.title},
            "xaxis": {"title": {"text": self.x_title}, "automargin": True},
            "yaxis": {"title": {"text": self.y_title}, "automargin": True},
        }
        if self.kind == "heatmap":
            layout["yaxis"]["autorange"] = "reversed"
            text = [[_number(v) for v in row] for row in self.z]
            data: list[dict[str, Any]] = [
                {
                    "type": "heatmap",
                    "z": [[_or_none(v) for v in row] for row in self.z],
                    "x": self.columns,
                    "y": self.rows,
                    "text": text,
                    "texttemplate": "%{text}",
                    "colorscale": "RdBu" if _signed(self.z) else "Blues",
                    "reversescale": not _signed(self.z),
                    "colorbar": {"title": {"text": self.unit}},
                    **({"zmid": 0} if _signed(self.z) else {}),
                }
            ]
            return {"data": data, "layout": layout}
        if self.kind in ("bars", "stacked"):
            layout["barmode"] = "stack" if self.kind == "stacked" else "group"
        data = []
        for i, s in enumerate(self.series):
            trace: dict[str, Any] = {
                "name": s.name,
                "x": s.x,
                "y": [_or_none(v) for v in s.y],
                "type": "bar" if self.kind in ("bars", "stacked") else "scatter",
                "marker": {"color": COLOURS[i % len(COLOURS)]},
            }
            if self.kind in ("lines", "points"):
                trace["mode"] = "lines+markers" if self.kind == "lines" else "markers"
            if s.labels:
                trace["text"] = s.labels
            if s.low is not None and s.high is not None:
                trace["error_y"] = {
                    "type": "data",
                    "symmetric": False,
                    "array": [_or_none(h - v) for v, h in zip(s.y, s.high)],
                    "arrayminus": [_or_none(v - w) for v, w in zip(s.y, s.low)],
                }
            data.append(trace)
        return {"data": data, "layout": layout}

    def svg(self) -> str:
        """A standalone SVG document."""
        body, height = _heat_map(self) if self.kind == "heatmap" else _chart(self)
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" class="m2rl-figure" viewBox="0 0 {WIDTH} {height:.0f}" '
            f'role="img" aria-labelledby="{escape(self.name)}-t {escape(self.name)}-d">'
            f'<title id="{escape(self.name)}-t">{escape(self.title)}</title>'
            f'<desc id="{escape(self.name)}-d">{escape(self.alt)}</desc>{STYLE}'
            f'<text class="h" x="8" y="20">{escape(self.title)}</text>{body}</svg>\n'
        )


STYLE = """<style>.m2rl-figure{font:12px system-ui,sans-serif;background:#fff}
.m2rl-figure text{fill:#222}.m2rl-figure .h{font-size:14px;font-weight:600}.m2rl-figure .g{stroke:#ddd}
.m2rl-figure .a{stroke:#888}.m2rl-figure .e{stroke:#222}
@media (prefers-color-scheme:dark){.m2rl-figure{background:#16181c}.m2rl-figure text{fill:#e4e4e4}
.m2rl-figure .g{stroke:#333}.m2rl-figure .e{stroke:#e4e4e4}}
.m2rl-figure .on-dark{fill:#fff}.m2rl-figure .on-light{fill:#111}</style>"""


def heat_map(
    name: str, title: str, z_RC: Any, rows: Sequence[str], columns: Sequence[str], *, unit: str = "", alt: str = ""
) -> Figure:
    """A matrix with its values written into the cells; the alternative names the extremes unless `alt` is given."""
    z = np.asarray(z_RC, dtype=np.float64)
    if not alt:
        alt = f"{title}: a table of {len(rows)} rows and {len(columns)} columns"
        if np.isfinite(z).any():
            ends = []
            for f, fill in ((np.argmin, np.inf), (np.argmax, -np.inf)):
                r, c = divmod(int(f(np.where(np.isfinite(z), z, fill))), z.shape[1])
                ends.append(f"{_number(float(z[r, c]))} ({rows[r]}, {columns[c]})")
            alt += f"; smallest {ends[0]}, largest {ends[1]}"
    return Figure(name, "heatmap", title, alt, z=z.tolist(), rows=list(rows), columns=list(columns), unit=unit)


def chart(
    name: str, kind: Kind, title: str, series: Sequence[Series], *, x_title: str = "", y_title: str = ""
) -> Figure:
    """Bars over categories, or lines and points over numbers; the alternative lists each series' range."""
    parts = []
    for s in series:
        known = [v for v in s.y if math.isfinite(v)]
        parts.append(f"{s.name} {_number(min(known))} to {_number(max(known))}" if known else f"{s.name} no values")
    alt = f"{title}: {y_title or 'value'} over {x_title or 'categories'}; " + "; ".join(parts)
    return Figure(name, kind, title, alt, x_title, y_title, list(series))


def bars(
    name: str,
    title: str,
    columns: Mapping[str, Sequence[float]],
    categories: Sequence[str],
    *,
    stacked: bool = False,
    x_title: str = "",
    y_title: str = "",
) -> Figure:
    """One set of bars per entry of `columns`."""
    series = [Series(n, list(categories), [float(v) for v in values]) for n, values in columns.items()]
    return chart(name, "stacked" if stacked else "bars", title, series, x_title=x_title, y_title=y_title)


# ---- drawing ---------------------------------------------------------------------------------------------------------


def _or_none(v: float) -> float | None:
    return float(v) if math.isfinite(v) else None


def _number(v: float) -> str:
    if not math.isfinite(v):
        return ""
    return f"{v:.3g}" if abs(v) < 1e4 else f"{v:.2e}"


def _signed(z: Sequence[Sequence[float]]) -> bool:
    return any(v < 0 for row in z for v in row)


def _mix(share: float, end: tuple[int, int, int]) -> tuple[int, int, int]:
    r, g, b = (round(255 + (e - 255) * share) for e in end)
    return r, g, b


def _text(x: float, y: float, text: str, anchor: str = "start", extra: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{extra}>{escape(text)}</text>'


def _heat_map(f: Figure) -> tuple[str, float]:
    left = 16 + CHARACTER * max((len(r) for r in f.rows), default=1)
    cell_w = (WIDTH - left - 12) / max(len(f.columns), 1)
    tilted = CHARACTER * max((len(c) for c in f.columns), default=1) > cell_w
    top = 40 + (0.75 * CHARACTER * max((len(c) for c in f.columns), default=1) if tilted else 8)
    cell_h = max(20.0, min(36.0, cell_w * 0.7))
    known = [abs(v) for row in f.z for v in row if math.isfinite(v)]
    scale = max(known, default=0.0) or 1.0
    out = []
    for j, c in enumerate(f.columns):
        x = left + (j + 0.5) * cell_w
        if tilted:
            out.append(_text(x, top - 6, c, "start", f' transform="rotate(-45 {x:.1f} {top - 6:.1f})"'))
        else:
            out.append(_text(x, top - 6, c, "middle"))
    for i, row in enumerate(f.z):
        y = top + i * cell_h
        out.append(_text(left - 8, y + cell_h / 2 + 4, f.rows[i], "end"))
        for j, v in enumerate(row):
            if not math.isfinite(v):
                continue
            share = (abs(v) / scale) ** 0.5  # small divergences stay visible beside large ones
            r, g, b = _mix(share, (178, 58, 50) if v < 0 else (24, 78, 140))
            x = left + j * cell_w
            shade = "on-dark" if 0.3 * r + 0.59 * g + 0.11 * b < 140 else "on-light"
            out.append(
                f'<rect x="{x:.1f}" y="{y:.1f}" width="{cell_w - 1:.1f}" height="{cell_h - 1:.1f}" '
                f'fill="rgb({r},{g},{b})">'
                f"<title>{escape(f.rows[i])}, {escape(f.columns[j])}: {v:.6g} {escape(f.unit)}</title></rect>"
            )
            if cell_w > 30:
                out.append(_text(x + cell_w / 2, y + cell_h / 2 + 4, _number(v), "middle", f' class="{shade}"'))
    return "".join(out), top + len(f.rows) * cell_h + 12


def _ticks(low: float, high: float) -> list[float]:
    span = high - low or abs(high) or 1.0
    step = 10.0 ** math.floor(math.log10(span / 4))
    step *= next(m for m in (1, 2, 5, 10) if span / (step * m) <= 6)
    first = math.ceil(low / step - 1e-9) * step
    return [first + i * step for i in range(int((high - first) / step + 1e-9) + 1)]


def _chart(f: Figure) -> tuple[str, float]:
    categories = f.kind in ("bars", "stacked") or any(isinstance(x, str) for s in f.series for x in s.x)
    names = list(dict.fromkeys(str(x) for s in f.series for x in s.x)) if categories else []
    ys = [v for s in f.series for v in [*s.y, *(s.low or ()), *(s.high or ())] if math.isfinite(v)]
    if f.kind == "stacked":
        ys += [sum(s.y[i] for s in f.series if i < len(s.y) and math.isfinite(s.y[i])) for i in range(len(names))]
    low, high = min(ys, default=0.0), max(ys, default=1.0)
    if f.kind in ("bars", "stacked"):
        low, high = min(low, 0.0), max(high, 0.0)
    high = high + (high - low or 1) * 0.05
    xs = [float(x) for s in f.series for x in s.x] if not categories else [0.0, float(len(names))]
    x_low, x_high = min(xs, default=0.0), max(xs, default=1.0)
    if not categories:
        margin = (x_high - x_low or 1.0) * 0.03
        x_low, x_high = x_low - margin, x_high + margin
    left, right, top = 64.0, 12.0, 56.0
    slot = (WIDTH - left - right) / max(len(names), 1)
    tilted = categories and CHARACTER * max((len(n) for n in names), default=0) > slot
    bottom = 40 + (0.75 * CHARACTER * max(len(n) for n in names) if tilted else 12)
    plot_h, out = 240.0, []
    height = top + plot_h + bottom

    def px(x: float) -> float:
        return left + (x - x_low) / (x_high - x_low or 1) * (WIDTH - left - right)

    def py(y: float) -> float:
        return top + (high - y) / (high - low or 1) * plot_h

    for t in _ticks(low, high):
        out.append(f'<line class="g" x1="{left}" x2="{WIDTH - right}" y1="{py(t):.1f}" y2="{py(t):.1f}"/>')
        out.append(_text(left - 6, py(t) + 4, _number(t), "end"))
    if categories:
        for i, n in enumerate(names):
            x, y = left + (i + 0.5) * slot, top + plot_h + 16
            if tilted:
                out.append(_text(x, y, n, "end", f' transform="rotate(-45 {x:.1f} {y:.1f})"'))
            else:
                out.append(_text(x, y, n, "middle"))
    else:
        out += [_text(px(t), top + plot_h + 16, _number(t), "middle") for t in _ticks(x_low, x_high)]
    out.append(_text((left + WIDTH - right) / 2, height - 6, f.x_title, "middle"))
    out.append(_text(8, top - 8, f.y_title))
    at = left
    for i, s in enumerate(f.series):
        if len(f.series) > 1:
            out.append(f'<rect x="{at:.1f}" y="28" width="10" height="10" fill="{COLOURS[i % len(COLOURS)]}"/>')
            out.append(_text(at + 14, 37, s.name))
            at += 24 + CHARACTER * len(s.name)
    base = dict.fromkeys(names, 0.0)
    for i, s in enumerate(f.series):
        colour, path = COLOURS[i % len(COLOURS)], []
        for j, v in enumerate(s.y):
            if not math.isfinite(v):
                continue
            if f.kind in ("bars", "stacked"):
                k = names.index(str(s.x[j]))
                if f.kind == "stacked":
                    x, w, start = left + k * slot + 0.15 * slot, 0.7 * slot, base[names[k]]
                    base[names[k]] += v
                else:
                    w = 0.8 * slot / len(f.series)
                    x, start = left + k * slot + 0.1 * slot + i * w, 0.0
                y0, y1 = sorted((py(start), py(start + v)))
                out.append(
                    f'<rect x="{x:.1f}" y="{y0:.1f}" width="{max(w - 1, 0.5):.1f}" height="{y1 - y0:.1f}" '
                    f'fill="{colour}">'
                    f"<title>{escape(s.name)}, {escape(str(s.x[j]))}: {v:.6g}</title></rect>"
                )
                centre = x + w / 2
            else:
                at_x = s.x[j]
                centre = left + (names.index(at_x) + 0.5) * slot if isinstance(at_x, str) else px(float(at_x))
                path.append(f"{centre:.1f},{py(v):.1f}")
                label = s.labels[j] if s.labels else s.name
                out.append(
                    f'<circle cx="{centre:.1f}" cy="{py(v):.1f}" r="3.5" fill="{colour}">'
                    f"<title>{escape(label)}: {escape(str(s.x[j]))}, {v:.6g}</title></circle>"
                )
            if s.low is not None and s.high is not None and math.isfinite(s.low[j]) and math.isfinite(s.high[j]):
                out.append(
                    f'<line class="e" x1="{centre:.1f}" x2="{centre:.1f}" '
                    f'y1="{py(s.low[j]):.1f}" y2="{py(s.high[j]):.1f}"/>'
                )
        if f.kind == "lines" and len(path) > 1:
            out.append(f'<polyline fill="none" stroke="{colour}" stroke-width="2" points="{" ".join(path)}"/>')
    out.append(f'<line class="a" x1="{left}" x2="{WIDTH - right}" y1="{top + plot_h}" y2="{top + plot_h}"/>')
    return "".join(out), height
