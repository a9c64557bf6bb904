"""Every figure is well-formed SVG with a title and a text alternative, and plain JSON for plotly.js."""

import json
import math
from xml.etree import ElementTree

import numpy as np
import pytest

from m2rl.analyze.figures import Figure, Series, bars, chart, heat_map
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
    assert root.attrib["role"] == "img" and tags[:2] == ["title", "desc"]
    assert root[0].text == figure.title and root[1].text == figure.alt and len(figure.alt) > 15
    assert "nan" not in figure.svg().lower().replace("nanometre", "")


@pytest.mark.parametrize("figure", FIGURES, ids=lambda f: f.name)
def test_plotly_json_holds_the_same_values(figure: Figure):
    found = json.loads(json.dumps(figure.plotly(), allow_nan=False))
    assert found["layout"]["title"]["text"] == figure.title
    if figure.kind == "heatmap":
        assert found["data"][0]["z"] == [[None if math.isnan(v) else v for v in row] for row in figure.z]
    else:
        assert [t["name"] for t in found["data"]] == [s.name for s in figure.series]
    assert json.dumps(plain(figure.as_dict()), allow_nan=False)


def test_bars_have_the_height_of_their_values():
    root = ElementTree.fromstring(bars("b", "Bars", {"u": [1.0, 4.0]}, ["one", "two"]).svg())
    heights = [float(e.attrib["height"]) for e in root if e.tag.endswith("rect")]
    assert heights[1] == pytest.approx(4 * heights[0], abs=0.2)


def test_an_alternative_names_the_extremes():
    assert "smallest -0.5 (a, a very long column name), largest 1 (a, x)" in FIGURES[0].alt


def test_json_has_no_nan_and_csv_every_column(tmp_path):
    table = [{"a": 1, "b": NAN}, {"a": np.float64(2.5), "c": "x,y"}]
    analysis = Analysis("t", {"a": "one"}, "here", {"n": np.int64(3)}, {"m": np.array([[1.0, NAN]])}, {"rows": table})
    found = json.loads(analysis.write(tmp_path).read_text())
    assert found["results"]["m"] == [[1.0, None]] and found["inputs"]["n"] == 3
    assert (tmp_path / "t-rows.csv").read_text() == to_csv(table) == 'a,b,c\n1,,\n2.5,,"x,y"\n'
