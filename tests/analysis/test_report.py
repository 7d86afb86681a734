"""Reports and figures: whole, self-contained, and safe with any text."""

import re
from html.parser import HTMLParser

import numpy as np
import pytest

from archlab.analysis import plots
from archlab.analysis.report import Report, visible

NAMES = ["transformer", "mamba", "a<b>&\"c\" $x_"]
HOSTILE = '<script>alert("x")</script><img src=x onerror=alert(1)>'


def figures():
    colours, x = plots.palette(NAMES), np.linspace(1, 100, 30)
    series = {name: [(x, 3 / x + i), (x, 3.2 / x + i)] for i, name in enumerate(NAMES)}
    return {
        "loss": plots.lines(series, colours, "Loss", "tokens", "bits per byte"),
        "state": plots.lines({n: [(x[:4], x[:4] * 1e6)] for n in NAMES}, colours, "State", "context", "B", log="xy"),
        "speed": plots.scatter({n: (10.0 + i, 2.0) for i, n in enumerate(NAMES)}, colours, "Speed", "tokens/s", "loss"),
        "load": plots.heatmap(np.random.default_rng(0).dirichlet(np.ones(8), 4), "Load"),
    }


class Reader(HTMLParser):
    """Checks that elements are closed in order; keeps what was read."""

    VOID = {"meta", "br", "hr", "img", "input", "link"}

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.attributes, self.words, self.cells = [], [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, *a) for a in attrs]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, *a) for a in attrs]

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data):
        self.words.append(data)


@pytest.fixture(scope="module")
def page():
    report = Report("A & B", "of `--preset=quick` " + HOSTILE)
    report.section("Results")
    report.facts({"models": 3, HOSTILE: HOSTILE})
    report.text(f"First.\n\nSecond {HOSTILE}")
    report.code(HOSTILE)
    report.table(["model", "loss", "parameters"], [[NAMES[0], 1.5, 1_230_000], [NAMES[2], float("nan"), None],
                 [HOSTILE, 1.25, 30]], caption=HOSTILE, formats={"loss": ".3f"}, colours=plots.palette(NAMES))
    report.figures([(figure, HOSTILE) for figure in figures().values()])
    report.section(HOSTILE)
    report.coloured(["a", "\n", HOSTILE, "\x00", "\ud800"], [1, 2, 3, 1, float("nan")], "depth" + HOSTILE)
    report.coloured(list("text"), [0.001, 0.02, 0.1, 0.05], "step size")
    return report


def read(text):
    reader = Reader()
    reader.feed(text)
    reader.close()
    assert not reader.open
    return reader


def test_the_page_is_whole_and_needs_no_network(page, tmp_path):
    text = page.save(tmp_path / "report.html").read_text(encoding="utf-8")
    reader = read(text)
    assert "http" not in text and '"//' not in text and "@import" not in text
    references = [value for _, name, value in reader.attributes if name in ("src", "href", "xlink:href")]
    assert references and all(value.startswith("#") for value in references)
    assert not {"link", "iframe", "object", "img"} & set(reader.tags)


def test_text_is_shown_and_never_run(page):
    reader = read(page.html())
    assert reader.tags.count("script") == 1
    assert not [a for a in reader.attributes if a[1].startswith("on")]
    assert sum(HOSTILE in words for words in reader.words) >= 8
    assert "alert" not in "".join(re.findall(r"<script>(.*?)</script>", page.html(), re.DOTALL))


def test_references_inside_figures_point_into_their_own_figure(page):
    reader = read(page.html())
    ids = [value for _, name, value in reader.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    used = [value[1:] for _, name, value in reader.attributes if name == "href"]
    used += re.findall(r"url\(#([^)]*)\)", page.html())
    assert used and set(used) <= set(ids)


def test_tables_align_numbers_and_keep_exact_values(page):
    text = page.html()
    assert '<td class="number" data-value="1230000">1.23 M</td>' in text
    assert '<td class="number" data-value="1.5">1.500</td>' in text
    assert text.count('<td class="number">–</td>') + text.count('data-value="nan">–</td>') == 2
    assert '<td><i class="dot" style="background:#3f6fd8"></i>transformer</td>' in text


def test_coloured_text_scales_values_and_tells_them(page):
    text = page.html()
    assert [f'class="step" style="--v:{v}"' in text for v in ("0.33", "0.67", "1.00")] == [True] * 3
    assert '<span style="--v:0.00" title="step size: 0.001">t</span>' in text.replace("0.00100", "0.001")
    assert '<span style="--v:1.00" title="step size: 0.100">x</span>' in text
    assert visible("a\x00\n\x7f\t") == "a\u2400↵\n\u2421\t"


def test_wrong_shapes_are_named():
    with pytest.raises(ValueError, match="2 tokens but 1 values"):
        Report("x").coloured(["a", "b"], [1], "depth")
    with pytest.raises(ValueError, match="2 cells"):
        Report("x").table(["a", "b"], [[1]])


@pytest.mark.parametrize("kind", ["loss", "state", "speed", "load"])
def test_figures_are_saved_and_not_empty(kind, tmp_path):
    import matplotlib.image

    figure = figures()[kind]
    png, svg = plots.save(figure, tmp_path / "f.png"), plots.save(figure, tmp_path / "f.svg")
    pixels = matplotlib.image.imread(png)
    assert png.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and pixels.shape[0] > 300 and pixels[..., :3].std() > 0.02
    assert "<svg" in svg.read_text() and svg.read_text().count("<path") > 10


def test_colours_are_distinct_and_styles_stay_inside():
    import matplotlib

    before = dict(matplotlib.rcParams)
    assert len(set(plots.palette([str(i) for i in range(10)]).values())) == 10
    figures()
    assert dict(matplotlib.rcParams) == before


def test_a_curve_may_end_in_nan():
    x = np.arange(1.0, 20)
    y = np.where(x > 10, np.nan, 1 / x)
    figure = plots.lines({"a": [(x, y)], "b": [(x, y * np.nan)]}, plots.palette("ab"), "t", "x", "y")
    (line,) = figure.axes[0].lines
    assert np.isfinite(line.get_ydata()).all() and np.isfinite(figure.axes[0].get_ylim()).all()


def test_dots_tell_what_they_are_in_a_page_alone(tmp_path):
    figure, ax = plots.axes("t", "x", "y", "")
    plots.dots(ax, [1, 2, 3], [1, 4, 9], "#3f6fd8", ["first\nrun", HOSTILE, "#24292f"], marker="*", hollow=True)
    report = Report("x")
    report.figures([(figure, "")])
    text = report.html()
    reader = read(text)
    assert [words for words in reader.words if words in ("first\nrun", HOSTILE, "#24292f")] == [
        "first\nrun", HOSTILE, "#24292f"]  # each once, in order, and not taken for a colour of the figure
    assert text.count("<title>") == 4 and "<img" not in text
    assert len(re.findall(r'<g id="figure-1-dot-\d"><title>', text)) == 3
    assert "<title>" not in plots.save(figure, tmp_path / "f.svg").read_text().replace("<title>Matplotlib", "")
    with pytest.raises(ValueError):
        plots.dots(ax, [1, 2], [1, 2], "#3f6fd8", ["one label for two"])
