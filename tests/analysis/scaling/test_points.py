"""Points: tables read, rows left out by name, and mixtures refused."""

import numpy as np
import pytest

from archlab.analysis.scaling.points import Points, read_points

OWN = "architecture,size,budget,tokens,seed,role,loss,diverged,corpus,tokenizer,context,N:counted,N:6N,experts,N_once"


def own(name="mamba", size=64, budget=6e9, tokens=1e4, seed=0, role="run", loss=2.0, diverged=False, corpus="stdlib",
        tokenizer="bytes", context=256, counted=1e5, naive=2e5, experts="", once=7):
    return ",".join(map(str, (name, size, budget, tokens, seed, role, loss, diverged, corpus, tokenizer, context,
                              counted, naive, experts, once)))


def table(path, header, *lines, end="\n"):
    path.write_text("\n".join((header, *lines)) + end)
    return path


def test_our_own_table_by_convention(tmp_path):
    path = table(tmp_path / "results.csv", OWN, own(), own(seed=1, loss=2.1), own("moe", experts=8, budget=1e10))
    reading = read_points(path)
    assert list(reading.points) == ["mamba", "moe"] and not reading.excluded
    mamba = reading.points["mamba"]
    np.testing.assert_array_equal(mamba.loss, [2.0, 2.1])  # two seeds are two points
    np.testing.assert_array_equal(mamba.C, [6e9, 6e9])
    np.testing.assert_array_equal(mamba.more["N_once"], [7, 7])
    assert "experts" not in mamba.more and reading.points["moe"].more["experts"] == 8
    assert reading.points["moe"].budget == 1e10
    assert reading.about == {"loss": "loss", "convention": "counted", "corpus": "stdlib", "tokenizer": "bytes",
                             "context": "256"}
    np.testing.assert_array_equal(read_points(path, "6N").points["mamba"].N, [2e5, 2e5])


@pytest.mark.parametrize("header, line", [
    ("C,N,D,loss", "99,2,5,3"), ("c,n,LOSS", "60,2,3"), (" D ,Flops,Loss", "5,60,3"),
    ("Model Size,Training FLOP,loss", "2,60,3"), ("\ufeffN,Tokens,loss", "2,5,3")])
def test_two_of_three_columns_of_others(tmp_path, header, line):
    points = read_points(table(tmp_path / "theirs.csv", header, line, end="")).points["theirs"]
    np.testing.assert_allclose((points.N[0], points.D[0], points.C[0], points.loss[0]), (2, 5, 60, 3))
    assert np.isnan(points.budget).all()


def test_costs_that_runs_share_are_the_budget(tmp_path):
    lines = [f"a,1e18,{n},3.0{n}" for n in (2, 3, 4)] + ["a,2e18,5,2.9", "b,1e18,2,3.1"]
    reading = read_points(table(tmp_path / "theirs.csv", "Model,C,N,loss", *lines))
    np.testing.assert_array_equal(reading.points["a"].budget, [1e18, 1e18, 1e18, np.nan])
    np.testing.assert_array_equal(reading.points["b"].budget, [1e18])


def test_rows_left_out_are_named(tmp_path):
    path = table(tmp_path / "results.csv", OWN, own(), own(size=1, diverged=True), own(size=2, loss="inf"),
                 own(size=3, loss="nan"), own(size=4, loss=-1), own(size=5, role="trial"), own(loss=2.5),
                 own(size=6, counted=""), own(size=7, tokens=0), own(size=8) + ",9", own(size=9),
                 own(size=10)[:30], end="")
    reading = read_points(path)
    np.testing.assert_array_equal(reading.points["mamba"].loss, [2, 2])
    reasons = ["diverged", "loss = 'inf'", "loss = 'nan'", "loss = '-1'", "on trial", "N is no positive",
               "D is no positive", "16 of 15 columns", "cut off", "same run as results.csv, line 2"]
    assert len(reading.excluded) == len(reasons)
    for (where, why), reason in zip(reading.excluded, reasons):
        assert reason in why and where.startswith("results.csv, line ")
    assert "loss 2 there, 2.5 here" in reading.excluded[-1].why


def test_a_last_number_cut_short_is_not_taken(tmp_path):
    path = table(tmp_path / "results.csv", OWN, own(), own(size=1, once=70000)[:-2], end="")
    assert len(read_points(path).points["mamba"]) == 1


def test_repeated_rows_of_others_without_seeds(tmp_path):
    reading = read_points(table(tmp_path / "theirs.csv", "N,D,loss", "2,5,3", "2,5,3.1", "2,5,3"))
    np.testing.assert_array_equal(reading.points["theirs"].loss, [3, 3.1])
    assert len(reading.excluded) == 1


def test_of_several_learning_rates_the_best_is_kept(tmp_path):
    header = OWN + ",learning_rate"
    path = table(tmp_path / "results.csv", header, own(loss=2.2) + ",0.01", own(loss=2.0) + ",0.003",
                 own(loss=2.1) + ",0.001", own(loss=2.0) + ",3e-3", own(loss=2.3, seed=1) + ",0.01")
    reading = read_points(path)
    np.testing.assert_array_equal(reading.points["mamba"].loss, [2.0, 2.3])  # of another seed there is one rate
    np.testing.assert_array_equal(reading.points["mamba"].more["learning_rate"], [0.003, 0.01])
    beaten, again, repeated = sorted(reading.excluded)
    assert "another learning rate did better: 0.003 in results.csv, line 3" in beaten.why and "line 2" in beaten.where
    assert "another learning rate" in again.why and "line 4" in again.where
    assert "same run as results.csv, line 3" in repeated.why


def test_learning_rates_of_others_without_seeds(tmp_path):
    lines = ["2,5,3.1,0.1", "2,5,3.0,0.2", "2,5,2.9,0.2", "2,7,2.8,0.1", "2,5,3.2,"]
    reading = read_points(table(tmp_path / "theirs.csv", "N,D,loss,learning_rate", *lines))
    np.testing.assert_array_equal(reading.points["theirs"].loss, [3.0, 2.9, 2.8, 3.2])
    assert [("line 2" in where, why.split(":")[0]) for where, why in reading.excluded] == \
           [(True, "another learning rate did better")]


def test_a_coarse_size_does_not_merge_models(tmp_path):
    reading = read_points(table(tmp_path / "theirs.csv", "size,seed,N,D,loss", "1B,0,1.01e9,5,3", "1B,0,1.04e9,5,2.9"))
    assert len(reading.points["theirs"]) == 2 and not reading.excluded


def test_costs_are_compared_as_numbers(tmp_path):
    costs = ("1e18", "1000000000000000000", "1.0000001e18", "1.001e18", "1.001e18")
    lines = [f"{C},{N},3" for N, C in enumerate(costs, start=2)]
    points = read_points(table(tmp_path / "theirs.csv", "C,N,loss", *lines)).points["theirs"]
    np.testing.assert_array_equal(points.budget, [1e18, 1e18, 1e18, np.nan, np.nan])


@pytest.mark.parametrize("column, other", [("transfer", "mup"), ("eval_rows", "64")])
def test_losses_that_do_not_compare_are_refused(tmp_path, column, other):
    path = table(tmp_path / "results.csv", f"{OWN},{column}", own() + ",128", own(seed=1) + f",{other}")
    with pytest.raises(ValueError, match=rf"different {column} in one fit: 128 .*{other} .*do not compare"):
        read_points(path)
    path = table(tmp_path / "results.csv", f"{OWN},{column}", own() + ",128")
    silent = table(tmp_path / "before.csv", OWN, own(seed=1))  # of tables that have the column alone
    assert read_points([path, silent]).about[column] == "128"


def test_the_highest_losses_are_dropped_of_each_architecture(tmp_path):
    lines = [f"{name},{n},7,{loss}" for name in "ab" for n, loss in ((1, 5), (2, 4), (3, 3))]
    reading = read_points(table(tmp_path / "theirs.csv", "model,N,D,loss", *lines), drop_highest=2)
    assert [list(points.loss) for points in reading.points.values()] == [[3], [3]]
    assert len(reading.excluded) == 4 and "drop_highest" in reading.excluded[0].why


@pytest.mark.parametrize("column, other", [("corpus", "shakespeare"), ("tokenizer", "bpe"), ("context", 512)])
def test_losses_in_different_units_are_refused(tmp_path, column, other):
    path = table(tmp_path / "results.csv", OWN, own(), own(seed=1), own("moe", **{column: other}))
    with pytest.raises(ValueError, match=rf"different {column}.* \(2 runs\), {other} \(1 runs\)"):
        read_points(path)
    table(tmp_path / "results.csv", OWN, own(), own(seed=1), own("moe", diverged=True, **{column: other}))
    read_points(path)  # a run that is not fitted does not matter


def test_several_tables_and_one_that_does_not_say(tmp_path):
    first = table(tmp_path / "a.csv", OWN, own())
    assert len(read_points([first, table(tmp_path / "b.csv", OWN, own(seed=1))]).points["mamba"]) == 2
    with pytest.raises(ValueError, match="corpus.*not stated"):
        read_points([first, table(tmp_path / "theirs.csv", "N,D,loss", "2,5,3")])


def test_refusals(tmp_path):
    path = table(tmp_path / "results.csv", OWN, own())
    with pytest.raises(ValueError, match="did you mean counted"):
        read_points(path, "countd")
    with pytest.raises(ValueError, match="no column 'los'; it has architecture, size"):
        read_points(path, loss="los")
    with pytest.raises(ValueError, match="drop_highest = -1"):
        read_points(path, drop_highest=-1)
    with pytest.raises(ValueError, match="no run is left to fit .1 x diverged"):
        read_points(table(tmp_path / "diverged.csv", OWN, own(diverged=True)))
    with pytest.raises(ValueError, match="no column 'loss'; it has no columns"):
        read_points(table(tmp_path / "empty.csv", "", end=""))
    with pytest.raises(ValueError, match="needs two of the columns C .* it has N, loss"):
        read_points(table(tmp_path / "one.csv", "N,loss", "1,2"))
    with pytest.raises(ValueError, match="column 'n' twice"):
        read_points(table(tmp_path / "twice.csv", "N,n,D,loss", "1,2,3,4"))
    with pytest.raises(ValueError, match="no column 'N:6N'"):
        read_points(table(tmp_path / "plain.csv", "N,D,loss", "1,2,3"), "6N")
    with pytest.raises(ValueError, match="at least one table"):
        read_points([])


def test_points_take_and_check_their_columns():
    points = Points("a", N=[1, 2, 3], D=[4, 5, 6], loss=[3, 2, 1], more={"experts": [8, 8, 16]})
    taken = points.take(np.array([2, 2, 0]))
    np.testing.assert_array_equal(taken.N, [3, 3, 1])
    np.testing.assert_array_equal(taken.more["experts"], [16, 16, 8])
    assert taken.labels == ("run 3", "run 3", "run 1") and len(points.take(points.loss > 1)) == 2
    with pytest.raises(ValueError, match="Points.D has shape"):
        Points("a", N=[1, 2], D=[1], loss=[1, 2])
    with pytest.raises(ValueError, match="Points.labels has 1"):
        Points("a", N=[1, 2], D=[1, 2], loss=[1, 2], labels=("one",))
