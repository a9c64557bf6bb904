"""Every figure is well-formed SVG with a title and a text alternative, at both widths, and plain JSON."""

import json
import math
import re
from xml.etree import ElementTree

import numpy as np
import pytest

from m2rl.analyze.figures import THEME, Figure, Series, bars, chart, heat_map, paint
from m2rl.analyze.output import Analysis, plain, to_csv

NAN = float("nan")
FIGURES = [
    heat_map("h", "Signed <&>", [[1.0, -0.5], [NAN, 0.0]], ["a", "b"], ["x", "a very long column name"], unit="nats"),
    heat_map("empty", "Nothing known", [[NAN]], ["a"], ["b"]),
    bars("b", "Bars", {"u": [1.0, NAN], "v": [-2.0, 0.0]}, ["one", "two"], y_title="share"),
    bars("s", "Stacked", {"u": [1.0, 3.0], "v": [2.0, 0.0]}, ["one", "two"], stacked=True),
    chart("l", "lines", "Lines", [Series("m", [0.0, 10.0, 20.0], [0.1, NAN, 0.4], [0.0, NAN, 0.3], [0.2, NAN, 0.5])]),
    chart("p", "points", "One point", [Series("m", [1.0], [2.0], labels=["expert"])], x_title="x", y_title="y"),
    chart("none", "points", "No points", [Series("m", [], [])]),
]


@pytest.mark.parametrize("figure", FIGURES, ids=lambda f: f.name)
def test_svg_is_well_formed_and_says_what_it_shows(figure: Figure):
    root = ElementTree.fromstring(figure.svg())
    tags = [e.tag.split("}")[1] for e in root]
    assert root.attrib["role"] == "img" and tags[:3] == ["title", "desc", "style"]
    assert root[0].text == figure.title and root[1].text == figure.alt and len(figure.alt) > 15
    assert "nan" not in figure.svg().lower().replace("nanometre", "")


@pytest.mark.parametrize("figure", FIGURES, ids=lambda f: f.name)
def test_json_and_back_draws_the_same(figure: Figure):
    stored = json.loads(json.dumps(plain(figure.as_dict()), allow_nan=False))
    assert Figure.from_dict(stored).svg() == figure.svg()


@pytest.mark.parametrize("figure", FIGURES, ids=lambda f: f.name)
def test_a_phone_gets_a_narrow_drawing_with_the_same_marks(figure: Figure):
    wide, narrow = (ElementTree.fromstring(figure.svg(w, standalone=False)) for w in (720, 360))
    assert float(narrow.attrib["width"]) <= 360 and float(wide.attrib["width"]) <= 720
    tips = [[t.text for t in root.iter("title")] for root in (wide, narrow)]
    assert tips[0] == tips[1]
    assert len(tips[0]) == sum(math.isfinite(v) for row in [*figure.z, *(s.y for s in figure.series)] for v in row)


def marks(figure: Figure, kind: str):
    return [e for e in ElementTree.fromstring(figure.svg(standalone=False)).iter(kind) if "class" in e.attrib]


def test_bars_have_the_length_of_their_values():
    lengths = [float(e.attrib["width"]) for e in marks(bars("b", "Bars", {"u": [1.0, 4.0]}, ["one", "two"]), "rect")]
    assert lengths[1] == pytest.approx(4 * lengths[0], abs=0.2)


def test_stacked_bars_begin_where_the_last_one_ends():
    found = marks(bars("s", "S", {"u": [1.0, 3.0], "v": [2.0, 1.0]}, ["one", "two"], stacked=True), "rect")
    x, w = ([float(e.attrib[k]) for e in found] for k in ("x", "width"))
    assert [x[2], x[3]] == pytest.approx([x[0] + w[0], x[1] + w[1]], abs=0.2)


def test_dots_and_intervals_lie_at_their_values():
    s = Series("u", ["one", "two"], [0.0, 10.0], [-5.0, 5.0], [5.0, 15.0])
    f = chart("d", "dots", "Dots", [s], line=0.0)
    at = [float(e.attrib["cx"]) for e in marks(f, "circle")]
    ends = [(float(e.attrib["x1"]), float(e.attrib["x2"])) for e in marks(f, "line") if e.attrib["class"] == "e"]
    unit = (at[1] - at[0]) / 10
    assert ends == [(pytest.approx(x - 5 * unit, abs=0.2), pytest.approx(x + 5 * unit, abs=0.2)) for x in at]
    assert [float(e.attrib["x1"]) for e in marks(f, "line") if e.attrib["class"] == "r"] == [
        pytest.approx(at[0], abs=0.1)
    ]


def test_a_name_has_one_colour_wherever_it_stands():
    assert paint("math") == paint("math", ["x", "math"]) != paint("code")
    assert len({paint(n) for n in ("sft", "math", "code", "science", "if", "mixed", "distill", "ties")}) == 8


def contrast(a: str, b: str) -> float:
    """WCAG 2 contrast ratio of two #rrggbb colours."""

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.03928 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_colours_can_be_seen_on_their_surface(scheme):
    found = dict(re.findall(r"--([\w-]+):(#[0-9a-f]{3,6})", THEME.split("@media")[scheme]))
    full = {k: v if len(v) == 7 else "#" + "".join(2 * x for x in v[1:]) for k, v in found.items()}
    for name in ("base", "math", "code", "science", "if", "mixed", "distill", "heat"):
        assert contrast(full[name], full["surface"]) >= 3, name  # WCAG 1.4.11: graphics
    for name in ("ink", "dim"):
        assert contrast(full[name], full["surface"]) >= 4.5, name  # WCAG 1.4.3: text
    assert contrast(full["on-heat"], full["heat"]) >= 4.5


def test_an_alternative_names_the_extremes():
    assert "smallest −0.5 (a, a very long column name), largest 1 (a, x)" in FIGURES[0].alt


def test_json_has_no_nan_and_csv_every_column(tmp_path):
    table = [{"a": 1, "b": NAN}, {"a": np.float64(2.5), "c": "x,y"}]
    analysis = Analysis("t", {"a": "one"}, "here", {"n": np.int64(3)}, {"m": np.array([[1.0, NAN]])}, {"rows": table})
    found = json.loads(analysis.write(tmp_path).read_text())
    assert found["results"]["m"] == [[1.0, None]] and found["inputs"]["n"] == 3
    assert (tmp_path / "t-rows.csv").read_text() == to_csv(table) == 'a,b,c\n1,,\n2.5,,"x,y"\n'
