"""The page of scaling laws: what it says follows from the runs, whatever they are."""

import csv
import html
import math
import re

import numpy as np
import pytest

from archlab.analysis import plots
from archlab.analysis.scaling import figures
from archlab.analysis.scaling.frontier import Multiplier, compute_for
from archlab.analysis.scaling.page import write_page
from archlab.analysis.scaling.points import Excluded, Points, Reading
from archlab.analysis.scaling.study import allocations, by_convention, coefficients, compared, study
from archlab.analysis.scaling.words import caveats, flops

PLAIN, SAVING = (1.2, 60.0, 90.0, 0.34, 0.30), (1.2, 50.0, 75.0, 0.34, 0.30)
THETAS = {law: np.array([*np.log([law[1], law[2], law[0]]), *law[3:]]) for law in (PLAIN, SAVING)}
BUDGETS = (1e14, 4e14, 1.6e15, 6.4e15)


def grid(name, law=PLAIN, noise=0.004, seed=0, budgets=BUDGETS, shift=1.0, **more):
    """An isoFLOP grid of five sizes about the optimum (times `shift`) of a known law."""
    E, A, B, alpha, beta = law
    C = np.repeat(budgets, 5)
    best = (alpha * A / (beta * B)) ** (1 / (alpha + beta)) * (C / 6) ** (beta / (alpha + beta))
    N = shift * best * np.tile(np.geomspace(1 / 4, 4, 5), len(budgets))
    D = C / (6 * N)
    loss = (E + A / N**alpha + B / D**beta) * np.exp(noise * np.random.default_rng(seed).normal(size=len(N)))
    rate = {"learning_rate": np.full(len(N), 0.003)}
    return Points(name, N, D, loss, C, tuple(f"size {i}" for i in range(len(N))), rate | more)


def page_of(out, *all_points, excluded=(), **settings):
    reading = Reading({p.name: p for p in all_points}, list(excluded), {"loss": "loss", "convention": "counted"})
    path = write_page(out, reading, {"preset": "test"}, "python -m this", repetitions=60, **settings)
    return path.read_text()


def rows_of(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def words_of(page):
    page = re.sub(r"<(style|script)>.*?</\1>", "", page, flags=re.DOTALL)
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", page)).split())


one_worker = pytest.mark.xdist_group("scaling page")  # so that the page is made once


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("page") / "new"
    few = grid("few").take(slice(0, 4))
    page_of(out, grid("plain"), grid("saving", SAVING, seed=1), grid("twin", seed=2), few,
            excluded=[Excluded("results.csv, line 7: twin", "diverged")])
    return out


@one_worker
def test_the_page_needs_no_network_and_has_every_figure(folder):
    page = (folder / "scaling.html").read_text()
    assert "http" not in page and "@import" not in page and page.count("<script>") == 1
    drawn = {path.stem for path in folder.glob("*.png")}
    assert drawn == {"loss_for_compute", "multipliers", "optimal_N", "optimal_D", "residuals_N", "residuals_C",
                     "isoflop_plain", "isoflop_saving", "isoflop_twin", "isoflop_few"}
    assert page.count("<svg") == len(drawn)


@one_worker
def test_multipliers_are_the_true_ones_and_twins_are_not_told_apart(folder):
    rows = rows_of(folder / "multipliers.csv")
    assert {(row["architecture"], row["reference"]) for row in rows} == {("saving", "plain"), ("twin", "plain")}
    for row in rows:
        loss, ratio, low, high = (float(row[key]) for key in ("loss", "ratio", "low", "high"))
        mine = SAVING if row["architecture"] == "saving" else PLAIN
        true = compute_for(THETAS[mine], loss) / compute_for(THETAS[PLAIN], loss)
        assert low <= true <= high and abs(ratio / true - 1) < 0.15
        assert row["verdict"] == ("saves" if mine == SAVING else "not distinguishable")
    words = words_of((folder / "scaling.html").read_text())
    assert "saving needs 0." in words and "twin against plain : not distinguishable" in words


@one_worker
def test_what_has_no_law_is_shown_with_the_reason_and_what_was_left_out(folder):
    words = words_of((folder / "scaling.html").read_text())
    assert "few has no law" in words and "has 5 coefficients and there are 4 runs" in words
    assert "results.csv, line 7: twin diverged" in words
    assert "few" not in {row["architecture"] for row in rows_of(folder / "fits.csv")}


@one_worker
def test_fits_are_written_with_all_digits(folder):
    one = study(grid("plain"), repetitions=60)
    rows = {row["coefficient"]: row for row in rows_of(folder / "fits.csv") if row["architecture"] == "plain"}
    assert list(rows) == ["A", "B", "E", "alpha", "beta", "a", "b"]
    for name, value in one.fit.coefficients.items():
        assert float(rows[name]["value"]) == value  # to the last bit
    assert all(float(row["low"]) < float(row["value"]) < float(row["high"]) for row in rows.values())


@one_worker
def test_every_run_tells_what_it_is(folder):
    page = (folder / "scaling.html").read_text()
    first = page[page.index("<svg"):page.index("</svg>")]
    told = [html.unescape(title) for title in re.findall(r"<title>(.*?)</title>", first, re.DOTALL)]
    assert len(told) == 3 * 20 + 4
    points = grid("plain")
    ratio = points.D[0] / points.N[0]
    assert told[0] == (f"plain\nsize 0\nN = {points.N[0] / 1000:.0f} k, {ratio:.0f} tokens per parameter\n"
                       f"C = 1e14 FLOPs\nloss {points.loss[0]:.4f}\nlearning rate 0.003")


@pytest.mark.parametrize("shape", ["one", "one budget", "four points", "apart", "others"])
def test_hard_cases_still_make_a_page(shape, tmp_path):
    far = (3.5, *PLAIN[1:])
    points = {"one": [grid("a", budgets=BUDGETS[:3])],
              "one budget": [grid("a", budgets=(1e14,)), grid("b", budgets=(1e14,))],
              "four points": [grid("a").take(slice(0, 4))], "apart": [grid("a"), grid("b", far)],
              "others": [Points("a", *(getattr(grid("a"), key) for key in ("N", "D", "loss")))]}[shape]
    words = words_of(page_of(tmp_path, *points))
    said = {"one": "a was run alone", "one budget": "tokens that follow from the size", "four points": "a has no law",
            "apart": "not comparable: their frontiers reached no loss in common", "others": "a was run alone"}[shape]
    assert said in words
    assert rows_of(tmp_path / "multipliers.csv") == []
    assert bool(rows_of(tmp_path / "fits.csv")) == (shape in ("one", "apart", "others"))


def test_names_are_shown_and_never_run_or_followed(tmp_path):
    hostile = '../../<img src=x onerror=alert(1)> `$x_'
    page = page_of(tmp_path / "in", grid(hostile))
    assert "<img" not in page and html.escape(hostile) in page
    assert {path.name for path in tmp_path.iterdir()} == {"in"}
    assert "isoflop_.._.._img_src_x_onerror_alert_1_x_.png" in {path.name for path in (tmp_path / "in").iterdir()}


def test_settings_that_are_not_there_are_refused(tmp_path):
    with pytest.raises(ValueError, match="reference = 'plian'.*plain"):
        page_of(tmp_path, grid("plain"), reference="plian")
    with pytest.raises(ValueError, match="by = 'luck'"):
        page_of(tmp_path, grid("plain"), by="luck")


def test_any_architecture_can_be_the_reference():
    studies = {p.name: study(p, repetitions=60) for p in (grid("plain"), grid("saving", SAVING, seed=1))}
    (there,), (back,) = (compared(studies, name, 3).values() for name in studies)
    assert (there.a, there.b, back.a, back.b) == ("saving", "plain", "plain", "saving")
    np.testing.assert_allclose(there.ratio * back.ratio, 1, rtol=1e-9)
    assert (there.high < 1).all() and (back.low > 1).all() and len(there.losses) == 3


def test_caveats_follow_from_the_runs():
    once, wide = study(grid("once"), 60), study(grid("wide", noise=0.03), 60)
    said = " ".join(caveats({"once": once}, {}))
    assert "No (N, D) was run twice" in said and f"{flops(6.4e15)} FLOPs they are a guess" in said
    assert "left open" not in said and "outside" not in said
    assert "left open by the runs are E" in " ".join(caveats({"wide": wide}, {}))
    p, q = grid("seeds", seed=1), grid("seeds", seed=2)
    both = (np.concatenate([getattr(p, key), getattr(q, key)]) for key in ("N", "D", "loss", "budget"))
    assert "20 of `seeds`" in " ".join(caveats({"seeds": study(Points("seeds", *both), 60)}, {}))
    aside = " ".join(caveats({"aside": study(grid("aside", shift=6.0, noise=0), 60)}, {}))
    assert "the minimum of 4 of 4 isoFLOP parabolas lies outside" in aside


def test_allocations_are_flagged_beyond_the_runs_and_enclose_the_truth():
    one = study(grid("plain"), repetitions=60)
    rows = allocations(one)
    assert [row["extrapolated"][:1] for row in rows] == [""] * 4 + ["C"] * 2
    assert rows[-1]["FLOPs"] == pytest.approx(6.4e16)
    for row in rows:
        assert 6 * row["N"] * row["D"] == pytest.approx(row["FLOPs"]) and row["N_low"] < row["N"] < row["N_high"]
    assert [row["extrapolated"] for row in allocations(one, [1e12, 1e15])] == ["C, N, D", ""]


def test_exponents_by_convention_are_those_of_the_law_in_other_units():
    points = grid("plain", noise=0)
    more = {"N:counted": points.N, "N:twice": 2 * points.N, "N:root": points.N**0.5, "N:one": np.ones(len(points))}
    found = by_convention(Points("plain", points.N, points.D, points.loss, more=more))
    alpha, beta = PLAIN[3:]
    plain = beta / (alpha + beta)
    assert found["counted"] == pytest.approx(plain, abs=1e-6) and found["twice"] == pytest.approx(plain, abs=1e-6)
    assert found["root"] == pytest.approx(beta / (2 * alpha + beta), abs=1e-6) and found["one"] is None


def test_bounds_without_end_are_drawn_to_the_edge():
    at = np.array([2.0, 1.9, 1.8])
    m = Multiplier("a", "b", at, np.array([0.5, 0.6, math.inf]), np.zeros(3), np.full(3, math.inf))
    figure = figures.multipliers({"a": m}, plots.palette(["a"]), "b", "loss")
    (ax,) = figure.axes
    assert np.isfinite(ax.get_ylim()).all() and ax.get_ylim()[0] > 0 and ax.get_xlim()[0] > ax.get_xlim()[1]


def test_coefficients_have_intervals_even_where_factors_overflow():
    one = study(grid("wide", noise=0.05, budgets=BUDGETS[:3]), repetitions=60)
    rows = coefficients(one)
    assert all(np.isfinite(row["value"]) and row["low"] <= row["high"] for row in rows)


@pytest.mark.parametrize("value, words", [(1e14, "1e14"), (1.6e15, "1.6e15"), (3.14159e18, "3.1e18"), (1e9, "1e9")])
def test_flops_are_told_short(value, words):
    assert flops(value) == words
