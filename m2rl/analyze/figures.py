"""Figures as data, and one drawing of them: SVG that is a file, or part of a page that makes it interactive.

    figure = heat_map("kl-math", "KL(row || column), nats", z_RC, rows, columns)
    figure.svg()                           a standalone file, light and dark, with a title and a text alternative
    figure.svg(360, standalone=False)      the same drawn for a phone, to be put into a page that holds THEME and CSS

Every mark carries its value as text (a browser shows it under the pointer, the report's script as a tooltip), every
series is a group `data-s="name"` that a legend can hide. So the static export and the interactive figure are one
drawing of some 200 lines; plotly.js, which would add 4.5 MB to every report, needs a second one for the static files.

A name has one colour in all figures (THEME): the base grey, a domain and its expert the same colour, mixed and
distilled their own, everything else (merges) shades of one blue. The hues follow Okabe & Ito (2008), told apart with
the common colour-vision deficiencies; lines also differ in dash.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from html import escape
from typing import Any, Literal

import numpy as np

WIDE, NARROW = 720, 360  # px: for a column of text, for a phone or half a column
CHARACTER = 6.7  # px of one character of 12 px text, rather too wide than too narrow

Kind = Literal["heatmap", "bars", "stacked", "dots", "lines", "points"]

OTHERS = 6  # shades for names that have no colour of their own
NAMED = {  # name of a series -> colour of the theme
    **{name: name for name in ("math", "code", "science", "if", "agent", "mixed", "distill")},
    "sft": "base",
    "base": "base",
    **{  # merges: shades of one blue
        name: f"o{i % OTHERS}"
        for i, name in enumerate(
            [
                "average",
                "ta",
                "ties",
                "dare_ta",
                "dare_ties",
                "sce",
                "breadcrumbs",
                "della",
                "ram",
                "ram_plus",
                "model_stock",
                "karcher",
                "tsv_m",
                "iso_c",
            ]
        )
    },
    **{"here": "heat", "paper": "base"},
    **{"kept": "base", "inherited": "math", "novel": "science", "forgotten": "code", "lost": "mixed"},  # skills
}
LABELS = {  # how a reader knows a name
    **{"sft": "SFT", "distill": "distilled", "ta": "TA", "ties": "TIES", "dare_ta": "TA+DARE"},
    **{"dare_ties": "TIES+DARE", "sce": "SCE", "ram_plus": "RAM+", "model_stock": "Model Stock", "tsv_m": "TSV-M"},
    **{"iso_c": "Iso-C", "breadcrumbs": "Breadcrumbs", "della": "DELLA", "ram": "RAM", "karcher": "Karcher"},
    **{"own_teacher_kl": "KL to own expert", "neighbour_transfer": "neighbours", "mixture": "both"},
}
DASHES = ("", "6 3", "2 3")

THEME = """:root{color-scheme:light dark;--surface:#fff;--ink:#1c2027;--dim:#5b6270;--grid:#e7e9ee;--rule:#aab0bb;
--base:#767d89;--math:#0072b2;--code:#c98300;--science:#00875f;--if:#c2589a;--agent:#8a6d3b;--mixed:#d04a02;
--distill:#5a3fb5;--o0:#2b93c9;--o1:#4c6fa5;--o2:#56a8ad;--o3:#7a9bd1;--o4:#2e6f8e;--o5:#8fb3c4;
--heat:#0a5a9c;--cold:#b3541e;--on-heat:#fff;--on-mid:#1c2027}
@media(prefers-color-scheme:dark){:root{--surface:#14171c;--ink:#e7e9ee;--dim:#a0a7b4;--grid:#262b34;--rule:#555d6b;
--base:#9aa1ad;--math:#4aa8e0;--code:#eaab3a;--science:#35c297;--if:#e58cc1;--agent:#c4a471;--mixed:#ff8248;
--distill:#a893f5;--o0:#6cc1ee;--o1:#8fb0e3;--o2:#7fd0d4;--o3:#a9c3ef;--o4:#5fa9cc;--o5:#b9d3e0;
--heat:#63b3f0;--cold:#f0925c;--on-heat:#0b0e12;--on-mid:#0b0e12}}"""

CSS = """svg.m2rl{font:12px system-ui,-apple-system,"Segoe UI",Roboto,sans-serif;background:var(--surface);
font-variant-numeric:tabular-nums}svg.m2rl text{fill:var(--ink)}svg.m2rl .h{font-size:14px;font-weight:600}
svg.m2rl .t{fill:var(--dim);font-size:11px}svg.m2rl .v{font-size:10.5px}svg.m2rl .g{stroke:var(--grid)}
svg.m2rl .a{stroke:var(--rule)}svg.m2rl .r{stroke:var(--dim);stroke-dasharray:3 3}svg.m2rl .c{fill:var(--heat)}
svg.m2rl .c.n{fill:var(--cold)}svg.m2rl .v.hi{fill:var(--on-heat)}svg.m2rl .v.mid{fill:var(--on-mid)}
svg.m2rl .f{fill:var(--c)}svg.m2rl .l{stroke:var(--c);stroke-width:1.8;fill:none}
svg.m2rl .e{stroke:var(--c);stroke-width:1.6}
svg.m2rl .b{fill:var(--c);opacity:.15}svg.m2rl .p{fill:var(--c);stroke:transparent;stroke-width:9;pointer-events:all}
svg.m2rl .off{display:none}"""


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
    """What to draw; NaN is drawn as a gap. Bars and dots lie: their categories `x` go down the page, values across."""

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
    equal: bool = False  # one unit is as long across as it is up
    line: float | None = None  # a dashed reference at this value
    off: list[str] = field(default_factory=list)  # series that are hidden until a reader asks for them

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Figure:
        """The figure of an analysis's JSON, in which null stands for NaN."""

        def known(numbers: Any) -> Any:
            return numbers and [float("nan") if v is None else v for v in numbers]

        series = [
            Series(**{k: known(v) if k in ("y", "low", "high") else v for k, v in s.items()}) for s in values["series"]
        ]
        return cls(**{**values, "series": series, "z": [known(row) for row in values["z"]]})

    def svg(self, width: int = WIDE, *, standalone: bool = True) -> str:
        """Drawn `width` px wide at most. standalone: a whole document with title, legend and colours; else the drawing
        alone, whose colours are the page's."""
        top = _legend(self, width)[1] if standalone else 8.0
        body, w, height = (_heat_map if self.kind == "heatmap" else _rows if self.lies else _plane)(self, width, top)
        label = escape(f"{self.title}. {self.alt}", quote=True)
        head = f'viewBox="0 0 {w:.0f} {height:.0f}" width="{w:.0f}" height="{height:.0f}" role="img"'
        if not standalone:
            return f'<svg class="m2rl" {head} aria-label="{label}">{body}</svg>'
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" class="m2rl" {head} aria-label="{label}">'
            f"<title>{escape(self.title)}</title><desc>{escape(self.alt)}</desc><style>{THEME}{CSS}</style>"
            f'<text class="h" x="8" y="20">{escape(self.title)}</text>{_legend(self, width)[0]}{body}</svg>\n'
        )

    @property
    def lies(self) -> bool:
        return self.kind in ("bars", "stacked", "dots")

    def table(self) -> tuple[list[str], list[list[str]]]:
        """(heading, rows) of the numbers drawn."""
        if self.kind == "heatmap":
            return ["", *self.columns], [[r, *(_number(v) for v in row)] for r, row in zip(self.rows, self.z)]
        bounds = any(s.low is not None for s in self.series)
        named = any(s.labels for s in self.series)
        head = ["series", *(["what"] if named else []), self.x_title or "category", self.y_title or "value"]
        rows = []
        for s in self.series:
            for i, v in enumerate(s.y):
                x = s.x[i]
                row = [s.name, *([s.labels[i] if s.labels else ""] if named else [])]
                row += [x if isinstance(x, str) else _number(x), _number(v)]
                if bounds:
                    row += [_number(end[i]) if end is not None else "" for end in (s.low, s.high)]
                rows.append(row)
        return [*head, *(["low", "high"] if bounds else [])], rows


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
    name: str,
    kind: Kind,
    title: str,
    series: Sequence[Series],
    *,
    x_title: str = "",
    y_title: str = "",
    line: float | None = None,
    off: Sequence[str] = (),
) -> Figure:
    """Bars and dots over categories, or lines and points over numbers; the alternative lists each series' range."""
    parts = []
    for s in series:
        known = [v for v in s.y if math.isfinite(v)]
        parts.append(f"{s.name} {_number(min(known))} to {_number(max(known))}" if known else f"{s.name} no values")
    alt = f"{title}: {y_title or 'value'} over {x_title or 'categories'}; " + "; ".join(parts)
    return Figure(name, kind, title, alt, x_title, y_title, list(series), line=line, off=list(off))


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


def paint(name: str, others: Sequence[str] = ()) -> str:
    """The theme's colour of a name: its own, or a shade by its place among `others`."""
    if name in NAMED:
        return f"var(--{NAMED[name]})"
    rest = [n for n in others if n not in NAMED]
    return f"var(--o{rest.index(name) % OTHERS if name in rest else 0})"


def label(name: str) -> str:
    """How a reader knows a model."""
    return LABELS.get(name, name)


def _number(v: float) -> str:
    if not math.isfinite(v):
        return ""
    return (f"{v:.3g}" if 1e-3 <= abs(v) < 1e4 or v == 0 else f"{v:.1e}").replace("-", "−")


def _text(x: float, y: float, text: str, anchor: str = "start", extra: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{extra}>{escape(text)}</text>'


def _tip(*lines: str) -> str:
    return f"<title>{escape(' · '.join(line for line in lines if line))}</title>"


def _width(texts: Sequence[str]) -> float:
    return CHARACTER * max((len(t) for t in texts), default=1)


def _legend(f: Figure, width: float) -> tuple[str, float]:
    """(drawing, where the figure below it begins)."""
    names = [s.name for s in f.series]
    if len(names) < 2:
        return "", 36.0
    out, x, y = [], 8.0, 40.0
    for name in (n for n in names if n not in f.off):
        step = 26 + CHARACTER * len(label(name))
        if x + step > width and x > 8:
            x, y = 8.0, y + 18
        out.append(f'<rect x="{x:.1f}" y="{y - 9:.1f}" width="10" height="10" rx="2" fill="{paint(name, names)}"/>')
        out.append(_text(x + 15, y, label(name)))
        x += step
    return "".join(out), y + 14


def _heat_map(f: Figure, width: float, top: float) -> tuple[str, float, float]:
    rows, heads = [label(r) for r in f.rows], [label(c) for c in f.columns]
    left = 14 + _width(rows)
    columns = max(len(heads), 1)
    cell_w = min(64.0, (width - left - 8) / columns)
    tilted = _width(heads) > cell_w
    if tilted:  # the last head leans over the edge: it gets room
        lean = 0.74 * CHARACTER * len(heads[-1])
        cell_w = min(cell_w, (width - left - lean) / (columns - 0.5))
    top += 0.72 * _width(heads) + 10 if tilted else 14
    cell_h = max(17.0, min(30.0, cell_w * 0.72))
    right = left + columns * cell_w + (max(lean - cell_w / 2, 0.0) if tilted else 0.0)
    scale = max((abs(v) for row in f.z for v in row if math.isfinite(v)), default=0.0) or 1.0
    whole = all(2 * v == int(2 * v) for row in f.z for v in row if math.isfinite(v)) and f.unit != "%"
    longest = max((len(_cell(v, whole)) for row in f.z for v in row), default=1)
    out = []
    for j, c in enumerate(heads):
        x = left + (j + 0.5) * cell_w
        turn = f' transform="rotate(-45 {x:.1f} {top - 5:.1f})"' if tilted else ""
        out.append(_text(x, top - 5, c, "start" if tilted else "middle", turn))
    for i, row in enumerate(f.z):
        y = top + i * cell_h
        out.append(_text(left - 7, y + cell_h / 2 + 4, rows[i], "end"))
        for j, v in enumerate(row):
            if not math.isfinite(v):
                continue
            share = (abs(v) / scale) ** 0.5  # small divergences stay visible beside large ones
            x = left + j * cell_w
            out.append(
                f'<rect class="c{" n" if v < 0 else ""}" x="{x:.1f}" y="{y:.1f}" width="{cell_w - 1.5:.1f}" '
                f'height="{cell_h - 1.5:.1f}" rx="2" fill-opacity="{0.04 + 0.96 * share:.3f}">'
                f"{_tip(f'{rows[i]}, {heads[j]}', f'{v:.4g} {f.unit}')}</rect>"
            )
            if cell_w >= 5.9 * longest + 3:
                hi = " hi" if share > 0.74 else " mid" if share > 0.6 else ""
                out.append(
                    _text(
                        x + cell_w / 2,
                        y + cell_h / 2 + 4,
                        _cell(v, whole),
                        "middle",
                        f' class="v{hi}" pointer-events="none"',
                    )
                )
    return "".join(out), min(max(right + 8, 120.0), width), top + len(f.rows) * cell_h + 8


def _cell(v: float, whole: bool) -> str:
    """A value in a cell: counts as they are, else about three digits; no negative zero."""
    if not math.isfinite(v):
        return ""
    text = f"{v:g}" if whole else f"{v:.0f}" if abs(v) >= 100 else f"{v:.1f}" if abs(v) >= 10 else f"{v:.2f}"
    return (text[1:] if text.startswith("-") and not float(text) else text).replace("-", "−")


def _ticks(low: float, high: float, most: int = 6) -> list[float]:
    span = high - low or abs(high) or 1.0
    step = 10.0 ** math.floor(math.log10(span / most))
    step *= next(m for m in (1, 2, 5, 10) if span / (step * m) <= most)
    first = math.ceil(low / step - 1e-9) * step
    return [round(first + i * step, 12) for i in range(int((high - first) / step + 1e-9) + 1)]


def _spread(f: Figure, categories: Sequence[str]) -> tuple[float, float]:
    """Ends of the value axis, with a little air."""
    ys = [v for s in f.series for v in [*s.y, *(s.low or ()), *(s.high or ())] if math.isfinite(v)]
    if f.kind == "stacked":
        ys += [sum(s.y[i] for s in f.series if i < len(s.y) and math.isfinite(s.y[i])) for i in range(len(categories))]
    ys += [f.line] if f.line is not None else []
    low, high = min(ys, default=0.0), max(ys, default=1.0)
    if f.kind in ("bars", "stacked"):
        low, high = min(low, 0.0), max(high, 0.0)
    air = (high - low or abs(high) or 1.0) * 0.04
    return (low if low == 0 else low - air), high + air


def _rows(f: Figure, width: float, top: float) -> tuple[str, float, float]:
    """Bars, stacked bars and dots: one row per category."""
    names = list(dict.fromkeys(str(x) for s in f.series for x in s.x))
    low, high = _spread(f, names)
    wanted = 16 + _width([label(n) for n in names])
    above = wanted > 0.45 * width  # names too long to stand beside their rows stand over them
    left, right = 14.0 if above else wanted, width - 14.0
    many = len(f.series) if f.kind != "stacked" else 1
    thick = {1: 13.0, 2: 9.0}.get(many, 7.0)
    lift = 14.0 if above else 0.0
    slot = max(20.0, many * (thick + 1) + 8) + lift
    bottom = top + len(names) * slot

    def px(v: float) -> float:
        return left + (v - low) / (high - low or 1) * (right - left)

    out = []
    for t in _ticks(low, high, 6 if width > 500 else 4):
        out.append(f'<line class="g" x1="{px(t):.1f}" x2="{px(t):.1f}" y1="{top}" y2="{bottom:.1f}"/>')
        out.append(_text(px(t), bottom + 15, _number(t), "middle", ' class="t"'))
    for k, n in enumerate(names):
        if above:
            out.append(_text(8, top + k * slot + 13, label(n)))
        else:
            out.append(_text(left - 8, top + (k + 0.5) * slot + 4, label(n), "end"))
    if f.kind != "dots":
        out.append(f'<line class="a" x1="{px(0):.1f}" x2="{px(0):.1f}" y1="{top}" y2="{bottom:.1f}"/>')
    if f.line is not None:
        out.append(f'<line class="r" x1="{px(f.line):.1f}" x2="{px(f.line):.1f}" y1="{top}" y2="{bottom:.1f}"/>')
    base = dict.fromkeys(names, 0.0)
    every = [s.name for s in f.series]
    for i, s in enumerate(f.series):
        marks = []
        for j, v in enumerate(s.y):
            if not math.isfinite(v):
                continue
            name = str(s.x[j])
            k = names.index(name)
            middle = top + (k + 0.5) * slot + lift / 2 + (i - (many - 1) / 2) * (thick + 1) * (f.kind != "stacked")
            # one series: a category that has a colour of its own keeps it
            own = f' style="--c:{paint(name, names)}"' if len(every) == 1 and name in NAMED else ""
            ends = s.low is not None and s.high is not None and math.isfinite(s.low[j]) and math.isfinite(s.high[j])
            shown = _number(v) + (f" [{_number(s.low[j])}, {_number(s.high[j])}]" if ends else "")  # type: ignore[index]
            what = s.labels[j] if s.labels else ""
            tip = _tip(label(name), label(s.name) if len(every) > 1 else "", shown, what)
            if ends:
                marks.append(
                    f'<line class="e"{own} x1="{px(s.low[j]):.1f}" x2="{px(s.high[j]):.1f}" '  # type: ignore[index]
                    f'y1="{middle:.1f}" y2="{middle:.1f}"/>'
                )
            if f.kind == "dots":
                marks.append(f'<circle class="p"{own} cx="{px(v):.1f}" cy="{middle:.1f}" r="4.5">{tip}</circle>')
                continue
            start = base[name] if f.kind == "stacked" else 0.0
            base[name] += v if f.kind == "stacked" else 0.0
            x0, x1 = sorted((px(start), px(start + v)))
            marks.insert(
                len(marks) - ends,
                f'<rect class="f"{own} x="{x0:.1f}" y="{middle - thick / 2:.1f}" width="{max(x1 - x0, 0.6):.1f}" '
                f'height="{thick:.1f}" rx="1.5">{tip}</rect>',
            )
        out.append(_group(f, s.name, every, marks))
    out.append(_text((left + right) / 2, bottom + 32, f.y_title, "middle", ' class="t"'))
    return "".join(out), width, bottom + (40 if f.y_title else 24)


def _plane(f: Figure, width: float, top: float) -> tuple[str, float, float]:
    """Lines and points over numbers."""
    low, high = _spread(f, [])
    xs = [float(x) for s in f.series for x in s.x]
    x_low, x_high = min(xs, default=0.0), max(xs, default=1.0)
    air = (x_high - x_low or 1.0) * 0.03
    x_low, x_high = x_low - air, x_high + air
    left, right = 14 + _width([_number(t) for t in _ticks(low, high, 5)]), width - 12.0
    top += 16 if f.y_title else 0
    plot_h = (320.0 if f.equal else 240.0) if width > 500 else 190.0
    if f.equal:
        unit = max((x_high - x_low) / (right - left), (high - low) / plot_h)
        for_x, for_y = (unit * (right - left) - (x_high - x_low)) / 2, (unit * plot_h - (high - low)) / 2
        x_low, x_high, low, high = x_low - for_x, x_high + for_x, low - for_y, high + for_y
    ticks = _ticks(low, high, 5)
    bottom = top + plot_h

    def px(x: float) -> float:
        return left + (x - x_low) / (x_high - x_low) * (right - left)

    def py(y: float) -> float:
        return top + (high - y) / (high - low or 1) * plot_h

    out = []
    for t in ticks:
        out.append(f'<line class="g" x1="{left:.1f}" x2="{right}" y1="{py(t):.1f}" y2="{py(t):.1f}"/>')
        out.append(_text(left - 6, py(t) + 4, _number(t), "end", ' class="t"'))
    across = _ticks(x_low, x_high, 6 if width > 500 else 4)
    if xs and all(x == int(x) for x in xs):
        across = [t for t in across if t == int(t)]
    out += [_text(px(t), bottom + 16, _number(t), "middle", ' class="t"') for t in across]
    out.append(f'<line class="a" x1="{left:.1f}" x2="{right}" y1="{bottom}" y2="{bottom}"/>')
    if f.line is not None:
        out.append(f'<line class="r" x1="{left:.1f}" x2="{right}" y1="{py(f.line):.1f}" y2="{py(f.line):.1f}"/>')
    every = [s.name for s in f.series]
    taken: list[tuple[float, float, float]] = []  # where names of points stand: x, y, width
    for s in f.series:
        marks: list[str] = []
        known = [j for j, v in enumerate(s.y) if math.isfinite(v)]
        bounds = (
            []
            if s.low is None or s.high is None
            else [
                (px(float(s.x[j])), py(s.low[j]), py(s.high[j]), j)
                for j in known
                if math.isfinite(s.low[j]) and math.isfinite(s.high[j])
            ]
        )
        path = [f"{px(float(s.x[j])):.1f},{py(s.y[j]):.1f}" for j in known]
        if f.kind == "lines":
            if len(bounds) > 1:
                edge = [f"{x:.1f},{h:.1f}" for x, _, h, _ in bounds] + [
                    f"{x:.1f},{w:.1f}" for x, w, _, _ in bounds[::-1]
                ]
                marks.append(f'<polygon class="b" points="{" ".join(edge)}"/>')
            if len(path) > 1:
                rest = [n for n in every if n not in NAMED]
                dash = DASHES[rest.index(s.name) // 2 % len(DASHES)] if s.name in rest else ""
                style = f' stroke-dasharray="{dash}"' if dash else ""
                marks.append(f'<polyline class="l" points="{" ".join(path)}"{style}/>')
        else:
            marks += [
                f'<line class="e" opacity=".45" x1="{x:.1f}" x2="{x:.1f}" y1="{w:.1f}" y2="{h:.1f}"/>'
                for x, w, h, _ in bounds
            ]
        ends = {j: f" [{_number(s.low[j])}, {_number(s.high[j])}]" for _, _, _, j in bounds}  # type: ignore[index]
        radius = 4 if f.kind == "points" else 2.2 if len(path) > 24 else 3
        for j in known:
            what = label(s.labels[j]) if s.labels else ""
            shown = f"{f.x_title or 'x'} {_number(float(s.x[j]))}: {_number(s.y[j])}{ends.get(j, '')}"
            marks.append(
                f'<circle class="p" cx="{px(float(s.x[j])):.1f}" cy="{py(s.y[j]):.1f}" r="{radius}">'
                f"{_tip(what, label(s.name), shown)}</circle>"
            )
            wide = CHARACTER * len(label(s.name))
            over = px(float(s.x[j])) + 7 + wide > width
            box = (px(float(s.x[j])) + (-7 - wide if over else 7), py(s.y[j]) + 4, wide)
            free = all(abs(box[1] - y) > 12 or box[0] > x + w or x > box[0] + box[2] for x, y, w in taken)
            if f.equal and len(s.y) == 1 and free:  # a lone point is called by its name where there is room
                taken.append(box)
                marks.append(_text(box[0] + wide * over, box[1], label(s.name), "end" if over else "start"))
        out.append(_group(f, s.name, every, marks))
    out.append(_text((left + right) / 2, bottom + 33, f.x_title, "middle", ' class="t"'))
    if f.y_title:
        out.append(_text(4, top - 8, f.y_title, "start", ' class="t"'))
    return "".join(out), width, bottom + (41 if f.x_title else 24)


def _group(f: Figure, name: str, every: Sequence[str], marks: Sequence[str]) -> str:
    off = ' class="off"' if name in f.off else ""
    return f'<g data-s="{escape(name)}"{off} style="--c:{paint(name, every)}">{"".join(marks)}</g>'
