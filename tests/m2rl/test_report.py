"""The report: its numbers against the study's files, and the page itself in a real headless Chromium."""

import html
import json
import re
import shutil
from html.parser import HTMLParser

import numpy as np
import pytest
import small_study
from without_torch import run_without_torch

from m2rl import browser, report
from m2rl.types import InputError

MODELS, DOMAINS = small_study.MODELS, small_study.DOMAINS
SETTINGS = {"seed": 0, "scale": 1.0, "k": 4}


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    folder = small_study.make(tmp_path_factory.mktemp("study") / "0")
    report.write(folder, MODELS, DOMAINS, SETTINGS)
    return folder


@pytest.fixture(scope="module")
def page(study):
    return (study / "report.html").read_text()


@pytest.fixture(scope="module")
def accuracy(study):
    """Model -> domain -> Avg@K, straight from the files."""
    out = {}
    for m in MODELS:
        rows = [json.loads(line) for line in (study / "samples" / f"{m}.jsonl").read_text().splitlines()]
        out[m] = {d: np.mean([r["reward"] for r in rows if r["domain"] == d]) for d in DOMAINS}
    return out


def text(markup: str) -> str:
    return html.unescape(re.sub(r"\s+", " ", re.sub("<[^>]+>", " ", markup)))


def section(page: str, name: str) -> str:
    return re.search(rf'<section id="{name}">(.*?)</section>', page, re.DOTALL).group(1)


def test_it_is_written_again_without_torch(study, page):
    run_without_torch("m2rl.report", str(study))
    again, dated = (study / "report.html").read_text(), r"<dt>written</dt><dd>[^<]*</dd>"
    assert re.sub(dated, "", again) == re.sub(dated, "", page)


def test_the_table_holds_every_score(page, accuracy, study):
    rows = re.findall(r"<tr><th scope=row>(.*?)</tr>", section(page, "scores"))
    names = {"sft": "SFT", "ties": "TIES", "distill": "distilled"}
    for m in MODELS:
        row = next(text(r) for r in rows if text(r).split()[0] == names.get(m, m))
        for d in DOMAINS:
            assert f" {100 * accuracy[m][d]:.1f} " in row
        assert f" {100 * np.mean(list(accuracy[m].values())):.1f} " in row
    line = next(x for x in (study / "table.md").read_text().splitlines() if x.startswith("| ties |"))
    assert f"{100 * accuracy['ties']['if']:.1f} [" in line


def test_the_answer_is_two_sentences_with_numbers_and_intervals(page, accuracy):
    answer = re.search(r"<p>(One mixed run.*?)</p>", section(page, "answer"), re.DOTALL).group(1)
    assert len(re.findall(r"\.(?:\s|$)", text(answer).strip())) == 2
    mean = {m: 100 * np.mean(list(accuracy[m].values())) for m in MODELS}
    for shown in (
        f"{mean['mixed']:.1f} [",
        f"TIES, at {mean['ties']:.1f} [",
        f"{mean['mixed'] - mean['ties']:+.1f} [+",
    ):
        assert shown in text(answer)
    assert "is ahead of the best of 2 merges" in text(answer) and "n = 48 problems" in text(section(page, "answer"))


def test_every_figure_has_an_alternative_a_caption_and_its_numbers(page, study):
    figures = re.findall(r"<figure .*?</figure>", page, re.DOTALL)
    assert len(figures) > 25
    for i, f in enumerate(figures, 1):
        for svg in re.findall(r"<svg [^>]*>", f):
            assert 'role="img"' in svg and len(re.search(r'aria-label="([^"]*)"', svg).group(1)) > 30
        assert (
            f"<b>Figure {i}.</b>" in f
            and "<summary>Numbers</summary>" in f
            and len(text(f.split("figcaption")[1])) > 20
        )
        name = re.search(r'data-name="([^"]*)"', f).group(1)
        assert (study / "figures" / f"{name}.svg").is_file()


def test_nothing_is_loaded_and_nothing_leaks_into_the_markup(page):
    assert "default-src 'none'" in page
    assert not re.search(r'(?:src|href)=["\']?(?!#)[^"\'>]*//', page) and "@import" not in page
    assert "says &lt;b&gt;" in page and "says <b>" not in page and "&lt;problem&gt;" in page
    assert len(page) < 3_000_000 and "nan" not in text(re.sub(r"<script>.*?</script>", "", page)).lower().split()


def test_the_contents_lead_to_every_section_and_tags_close(page):
    assert re.findall(r'<a href="#(\w+)">', page) == re.findall(r'<section id="(\w+)">', page)

    class Nesting(HTMLParser):
        def __init__(self):
            super().__init__()
            self.open, self.wrong = [], []

        def handle_starttag(self, tag, attrs):
            if tag not in ("meta", "br", "rect", "line", "circle", "polyline", "polygon"):
                self.open.append(tag)

        def handle_startendtag(self, tag, attrs):
            pass

        def handle_endtag(self, tag):
            if tag in ("rect", "line", "circle", "polyline", "polygon"):
                return
            if self.open.pop() != tag:
                self.wrong.append((tag, self.getpos()))

    parser = Nesting()
    parser.feed(page)
    assert not parser.wrong and not parser.open


def test_responses_can_be_opened_where_models_differ_most(page, study):
    shown = re.findall(r"<pre class=prompt>(.*?)</pre>", section(page, "samples"))
    assert len(shown) == report.EXAMPLES * len(DOMAINS)
    rates = {}
    for m in MODELS:
        for line in (study / "samples" / f"{m}.jsonl").read_text().splitlines():
            row = json.loads(line)
            if row["domain"] == "math":
                rates.setdefault(row["prompt"], {}).setdefault(m, []).append(row["reward"])
    spread = {p: np.std([np.mean(r) for r in by.values()]) for p, by in rates.items()}
    assert html.unescape(shown[0]) == max(sorted(spread), key=spread.get)


def test_learning_curves_count_the_domains_prompts(study):
    x, y, half = report.curve(study / "mixed", "code")
    assert len(x) == 5 and x[-1] < 16 * 4 and (np.diff(y) > 0).all() and (half > 0).all()
    assert report.curve(study / "nothing", "code") is None


def test_seeds_are_joined_into_means_over_seeds(study, tmp_path, accuracy):
    second = small_study.make(tmp_path / "1", seed=1)
    report.write(tmp_path, MODELS, DOMAINS, SETTINGS, {0: study, 1: second})
    page = (tmp_path / "report.html").read_text()
    assert "n = 2 seeds" in text(section(page, "answer")) and "Student t intervals over 2 seeds" in page
    other = [json.loads(line) for line in (second / "samples" / "mixed.jsonl").read_text().splitlines()]
    joined = (np.mean(list(accuracy["mixed"].values())) + np.mean([r["reward"] for r in other])) / 2
    assert f"One mixed run reaches {100 * joined:.1f} [" in text(section(page, "answer")).replace(" <b>", "")
    assert report.main([str(tmp_path)]) == 0
    cosine = [
        json.loads((f / "analysis" / "weights.json").read_text())["results"]["cosine"][0][1] for f in (study, second)
    ]
    found = re.search(r'data-name="cosine".*?<tbody><tr><th scope=row>math</th>.*?</tr>', page, re.DOTALL).group(0)
    shown = float(found.split("<td>")[2].partition("<")[0].replace("−", "-"))
    assert shown == pytest.approx(np.mean(cosine), rel=0.03)


def test_a_missing_stage_is_named(study, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(study, copy)
    (copy / "samples" / "ties.jsonl").unlink()
    with pytest.raises(InputError, match=r"no samples of ties: neither ties.jsonl nor ties/"):
        report.write(copy, MODELS, DOMAINS, SETTINGS)
    (copy / "analysis" / "weights.json").write_text("{")
    with pytest.raises(InputError, match=r"weights.json is not valid JSON"):
        report.write(copy, [m for m in MODELS if m != "ties"], DOMAINS, SETTINGS)
    for gone, named in (({"mixed"}, "mixed"), ({"ties", "average"}, "at least one merge")):
        with pytest.raises(InputError, match=f"a report compares with {named}, which is missing"):
            report.write(study, [m for m in MODELS if m not in gone], DOMAINS, SETTINGS)
    with pytest.raises(InputError, match=r"has no report.json"):
        report.main([str(tmp_path)])


needs_browser = pytest.mark.skipif(browser.find() is None, reason="no Chromium on PATH (apt-get install chromium)")


@pytest.fixture(scope="module")
def chromium():
    with browser.Browser() as found:
        yield found


@needs_browser
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_a_browser_shows_it_without_complaint(chromium, study, width, dark):
    page = chromium.open(study / "report.html", width=width, dark=dark)
    page.evaluate('document.querySelectorAll("details").forEach(d => { d.open = true; })')
    assert page.messages == []
    assert page.requests == [(study / "report.html").resolve().as_uri()]
    assert page.evaluate("document.documentElement.scrollWidth") == width
    colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert colour == ("rgb(20, 23, 28)" if dark else "rgb(255, 255, 255)")
    shown = '[...document.querySelectorAll("figure")].map(f => [...f.querySelectorAll("svg")].some(s => s.clientWidth))'
    assert all(page.evaluate(shown))
    cut = """[...document.querySelectorAll("figure svg")].filter(s => s.clientWidth).flatMap(s => {
        const b = s.getBoundingClientRect();
        return [...s.querySelectorAll("text")].filter(t => {
            const r = t.getBoundingClientRect();
            return r.width && (r.left < b.left - 3 || r.right > b.right + 3);
        }).map(t => t.textContent);
    })"""  # text that begins left of its figure or ends right of it
    assert page.evaluate(cut) == []
    page.close()


@needs_browser
def test_values_show_under_the_pointer_and_series_hide(chromium, study):
    page = chromium.open(study / "report.html")
    mark = "document.querySelector('figure[data-name=\"averages\"] circle')"
    page.evaluate(mark + ".scrollIntoView({block: 'center', behavior: 'instant'})")
    page.evaluate("new Promise(done => setTimeout(done, 300))")  # scrolling hides what was shown before it
    x, y = page.evaluate(f"(r => [r.x + r.width / 2, r.y + r.height / 2])({mark}.getBoundingClientRect())")
    page.call("Input.dispatchMouseEvent", {"type": "mouseMoved", "x": x, "y": y})
    tip = page.evaluate('document.getElementById("tip").hidden ? "" : document.getElementById("tip").textContent')
    assert re.match(r"mixed · \d+\.?\d* \[", tip)
    figure = "document.querySelector('figure[data-name=\"learning-math\"]')"
    shown = figure + '.querySelector("g[data-s=mixed]").getBoundingClientRect().width > 0'
    assert page.evaluate(shown)
    page.evaluate(figure + '.querySelector("button[data-s=mixed]").click()')
    assert not page.evaluate(shown)
    assert page.evaluate(figure + '.querySelectorAll(".tools button").length') == 2 and page.messages == []
    page.close()


@needs_browser
def test_pictures_of_figures(study, tmp_path):
    shutil.copytree(study / "figures", tmp_path / "figures")
    report.pictures(tmp_path / "figures", ["averages"])
    data = (tmp_path / "figures" / "averages.png").read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n" and int.from_bytes(data[16:20]) == 1440
