"""One law for several architectures: known laws are found again, and what tables cannot tell is refused."""

import csv
import html
import re

import numpy as np
import pytest

from archlab.analysis import plots
from archlab.analysis.report import Report
from archlab.analysis.scaling.laws import DENSE, FINE_GRAINED, JOINT_EXPERTS, RECURSIVE
from archlab.analysis.scaling.points import Points, read_points
from archlab.analysis.scaling.pooled import best_experts, joined, law_named, pooled, settings, worth
from archlab.analysis.scaling.pooled_page import findings, write_section
from archlab.analysis.scaling.study import coefficients

PHI = 0.46
TRUTHS = {RECURSIVE: [6.2, 7.6, 0.6, 0.35, 0.37, PHI],
          JOINT_EXPERTS: [6.2, 7.6, 0.3, -0.35, 0.005, -0.25, -0.37, -0.01, 0.2],
          FINE_GRAINED: [4.0, 5.8, 7.6, 0.6, 0.6, 0.35, 0.37]}


def made(law, value, seed=0, noise=0.002, theta=None, **more):
    """The runs of one variant: four sizes, each on four numbers of tokens."""
    rng = np.random.default_rng([seed, round(8 * value)])
    N, D = np.repeat(np.geomspace(1e6, 3e7, 4), 4), np.tile(np.geomspace(2e7, 2e9, 4), 4)
    if law == RECURSIVE:  # without recursion nothing recurs
        more = {"N_once": N if value == 1 else 0.3 * N, "N_recurring": 0 * N if value == 1 else 0.7 * N} | more
    more = {law.needs[0]: np.full(16, float(value))} | more
    bare = Points(f"{law.needs[0]}-{value:g}", N, D, np.ones(16), 6 * N * D, more=more)
    loss = law.predict(np.array(TRUTHS[law] if theta is None else theta), bare) * np.exp(noise * rng.normal(size=16))
    return Points(bare.name, N, D, loss, bare.budget, more=more)


def several(law, values=(1, 2, 4), **how):
    return {p.name: p for p in (made(law, value, **how) for value in values)}


def value_of(one, name):
    return next(row for row in coefficients(one.study) if row["coefficient"] == name)


def section(one, out):
    """The section alone: its HTML, and its words."""
    out.mkdir(exist_ok=True)
    page = Report("Laws")
    write_section(page, one, plots.palette(one.parts), out)
    text = re.sub(r"<(style|script).*?</\1>", "", page.html(), flags=re.DOTALL)
    words = re.sub(r"<svg.*?</svg>", "", text, flags=re.DOTALL)
    return html.unescape(text), " ".join(html.unescape(re.sub(r"<[^>]+>", " ", words)).split())


@pytest.mark.parametrize("law", TRUTHS, ids=lambda law: law.name)
def test_a_known_law_is_found_within_its_intervals(law):
    one = pooled(several(law, (1, 2, 4, 8)), law, repetitions=200)
    held = [row["low"] <= true <= row["high"] for row, true in
            zip(coefficients(one.study), law.natural(np.array(TRUTHS[law])).values())]
    assert sum(held) >= len(held) - 1  # of intervals of 95%, of which no more than one should miss
    assert one.study.spread() == pytest.approx(0.002, rel=0.5)


def test_phi_is_the_true_one_and_told_apart():
    one = pooled(several(RECURSIVE), RECURSIVE, repetitions=200)
    phi = value_of(one, "phi")
    assert phi["low"] < PHI < phi["high"] and phi["high"] - phi["low"] < 0.2
    assert worth(one, 4) == pytest.approx(tuple(4 ** phi[key] for key in ("value", "low", "high")))
    assert "phi is between the two" in findings(one)[0] and "the interval here holds that" in findings(one)[2]


@pytest.mark.parametrize("phi, noise, told", [
    (0.0, 0.002, "not told apart from 0"), (1.0, 0.002, "not told apart from 1"), (0.5, 0.3, "undetermined"),
    (-0.5, 0.001, "below 0"), (1.6, 0.001, "above 1")])
def test_what_is_said_of_phi_follows_from_its_interval(phi, noise, told):
    theta = [*TRUTHS[RECURSIVE][:5], phi]
    said = findings(pooled(several(RECURSIVE, noise=noise, theta=theta), RECURSIVE, repetitions=100))
    assert told in said[0] and ("count as" in " ".join(said)) == (told != "undetermined")


def test_settings_are_differences_of_the_law_at_equal_parameters():
    one = pooled(several(RECURSIVE, noise=0.0), RECURSIVE, repetitions=10)
    rows = settings(one)
    assert [row["recursions"] for row in rows] == pytest.approx([1, 2, 4])
    N, D = np.sqrt(1e6 * 3e7), np.sqrt(2e7 * 2e9)
    E, A, B = (RECURSIVE.natural(np.array(TRUTHS[RECURSIVE]))[key] for key in "EAB")
    loss = [E + A / (0.3 * N + r**PHI * 0.7 * N) ** 0.35 + B / D**0.37 for r in (1, 2, 4)]
    assert [row["loss"] for row in rows] == pytest.approx(loss, rel=1e-6)
    assert [row["saved"] for row in rows] == pytest.approx([loss[0] - x for x in loss], abs=1e-6)


@pytest.mark.parametrize("omega, told", [(0.2, {8}), (0.9, {1}), (0.3, {2, 8})])
def test_the_best_number_of_experts_is_that_of_a_search(omega, told):
    theta = [*TRUTHS[JOINT_EXPERTS][:8], omega]
    a, b, c, alpha, gamma, delta, beta, zeta, _ = theta
    found = set()
    for row in best_experts(pooled(several(JOINT_EXPERTS, (1, 2, 8), noise=1e-5, theta=theta), JOINT_EXPERTS, 20)):
        N = np.geomspace(1e6, 3e7, 2000)
        D, best = row["FLOPs"] / (6 * N), {}
        for x in (1, 2, 8):
            size, data = N ** (alpha + gamma * np.log(x)), D ** (beta + zeta * np.log(x))
            best[x] = (np.exp(a) * x**delta * size + np.exp(b) * x**omega * data + np.exp(c)).min()
        assert row["experts"] == min(best, key=best.get) and row["low"] <= row["experts"] <= row["high"]
        found.add(row["experts"])
    assert found == told


def test_experts_that_change_nothing_are_not_told_apart():
    theta = TRUTHS[JOINT_EXPERTS][:4] + [0, 0] + TRUTHS[JOINT_EXPERTS][6:7] + [0, 0]
    said = findings(pooled(several(JOINT_EXPERTS, theta=theta), JOINT_EXPERTS, repetitions=100))
    assert "E = 4 a loss" in said[0] and "not told apart from none" in said[0]


def test_experts_count_active_parameters_and_recursion_does_not():
    parts = {name: Points(p.name, 3 * p.N, p.D, p.loss, p.budget, more={**p.more, "N:6N": p.N})
             for name, p in several(JOINT_EXPERTS).items()}
    one = pooled(parts, JOINT_EXPERTS, repetitions=10)
    assert one.study.points.N.max() == pytest.approx(3e7) and "N is 6N" in one.counted
    assert "as the table gives it" in pooled(several(JOINT_EXPERTS), JOINT_EXPERTS, 10).counted
    parts = {name: Points(p.name, 3 * p.N, p.D, p.loss, p.budget, more={**p.more, "N:6N": p.N})
             for name, p in several(RECURSIVE).items()}
    assert pooled(parts, RECURSIVE, repetitions=10).study.points.N.max() == pytest.approx(9e7)


def test_joined_runs_keep_their_architecture_and_the_columns_of_all():
    one, other = made(RECURSIVE, 1), made(RECURSIVE, 2, odd=np.ones(16))
    both = joined({"one": one, "other": other})
    assert len(both) == 32 and both.labels[0] == "one: run 1" and both.labels[-1] == "other: run 16"
    assert set(both.more) == {"recursions", "N_once", "N_recurring"}
    np.testing.assert_array_equal(both.loss, [*one.loss, *other.loss])


def changed(parts, name, values=None):
    """With another column, or without it."""
    more = lambda p: {k: v for k, v in p.more.items() if k != name} | ({} if values is None else {name: values})
    return {key: Points(p.name, p.N, p.D, p.loss, more=more(p)) for key, p in parts.items()}


DEAD = made(RECURSIVE, 2, N_recurring=np.zeros(16))


@pytest.mark.parametrize("parts, law, told", [
    (several(JOINT_EXPERTS, (4,)), JOINT_EXPERTS, "on experts = 4 alone: must vary"),
    (several(RECURSIVE, (2,)), RECURSIVE, "on recursions = 2 alone: must vary"),
    (several(FINE_GRAINED, (2, 4)), FINE_GRAINED, "on granularity = 2 and 4: must be at least 3 different"),
    (several(FINE_GRAINED, (1, 2, 4), experts=np.full(16, 8.0)), FINE_GRAINED, "one expansion rate.*is 2 to 8"),
    (changed(several(RECURSIVE), "N_once"), RECURSIVE, "needs the column N_once"),
    (several(RECURSIVE), JOINT_EXPERTS, "needs the column experts; the points have"),
    ({k: p.take([0, 1, 6]) for k, p in several(JOINT_EXPERTS, (1, 2)).items()}, JOINT_EXPERTS,
     "9 coefficients and there are 6 runs"),
    ({"plain": made(RECURSIVE, 1), "dead": DEAD}, RECURSIVE, "N_recurring = 0 with recursions = 2 in dead: run 1"),
    (changed(several(RECURSIVE), "N_once", np.full(16, -1.0)), RECURSIVE, "N_once = -1.0.*not below 0"),
])
def test_runs_that_tell_no_law_are_refused_with_the_reason(parts, law, told, tmp_path):
    one = pooled(parts, law, repetitions=10)
    assert one.study.fit is None and re.search(told, one.study.refused)
    assert f"There is no such law: {one.study.refused}." in section(one, tmp_path)[1]
    assert (tmp_path / "pooled.csv").read_text().strip() == "law,coefficient,value,low,high,standard_error"


def test_laws_go_by_names_with_hyphens():
    assert law_named("joint-experts") == JOINT_EXPERTS and law_named("dense") == DENSE
    with pytest.raises(ValueError, match="did you mean recursive"):
        law_named("recursion")
    with pytest.raises(ValueError, match="dense.*must be one of joint-experts"):
        pooled(several(RECURSIVE), DENSE)


def table(path, parts):
    names = [*next(iter(parts.values())).more]
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["architecture", "N", "D", "loss", *names])
        for p in parts.values():
            writer.writerows([p.name, p.N[i], p.D[i], p.loss[i], *(p.more[name][i] for name in names)]
                             for i in range(len(p)))
    return path


@pytest.mark.parametrize("law, told", [(RECURSIVE, "r recursions are worth r^phi"),
                                       (JOINT_EXPERTS, "the least loss is that of E ="),
                                       (FINE_GRAINED, "No term of this law grows with G")], ids=lambda x: str(x)[:9])
def test_the_section_tells_of_a_table(law, told, tmp_path):
    reading = read_points(table(tmp_path / "t.csv", several(law, (1, 2, 4, 8))))
    one = pooled(reading.points, law, repetitions=40)
    text, words = section(one, tmp_path / "out")
    assert "One law for all" in words and told in words and law.formula in words and "http" not in text
    with (tmp_path / "out" / "pooled.csv").open() as file:
        rows = {row["coefficient"]: float(row["value"]) for row in csv.DictReader(file)}
    assert rows == {key: float(value) for key, value in one.study.fit.coefficients.items()}
    assert (tmp_path / "out" / "one_law_residuals.png").stat().st_size > 1000
    figure = text[text.index("<svg"):text.index("</svg>")]
    assert all(name in figure for name in reading.points) and "% from the law" in figure
