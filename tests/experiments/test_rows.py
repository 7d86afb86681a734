"""Tables of finished runs."""

import multiprocessing

import pytest

from experiments.rows import Rows

FIELDS = ("name", "size", "loss", "tests", "ok")
ROW = {"name": 'a "b", c', "size": 3, "loss": 0.1 + 0.2, "tests": {"x": [1.5]}, "ok": True}


def test_rows_come_back_as_they_were(tmp_path):
    rows = Rows(tmp_path / "rows.csv", FIELDS)
    assert rows.read() == []
    rows.add(ROW)
    rows.add(ROW | {"name": "", "loss": float("inf"), "ok": None})
    assert rows.read() == [ROW, ROW | {"name": "", "loss": float("inf"), "ok": None}]
    with pytest.raises(ValueError, match="other columns .*more.*: give another --out"):
        Rows(tmp_path / "rows.csv", (*FIELDS, "more")).read()


@pytest.mark.parametrize("left", ["a,3,0.", "a,3,0.5,{},true", "name", 'a,3,0.5,"{""x"": [1'])
def test_a_line_that_was_cut_short_costs_no_other(tmp_path, left):
    rows = Rows(tmp_path / "rows.csv", FIELDS)
    rows.add(ROW)
    with rows.path.open("a") as file:
        file.write(left)
    rows.add(ROW)
    assert [row for row in rows.read() if row["tests"]] == [ROW, ROW]


def add(path, number):
    for i in range(20):
        Rows(path, FIELDS).add(ROW | {"size": 100 * number + i})


def test_processes_share_a_table(tmp_path):
    """They begin it together, too: one head, and every row whole."""
    start = multiprocessing.get_context("spawn")
    processes = [start.Process(target=add, args=(tmp_path / "rows.csv", i)) for i in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    found = Rows(tmp_path / "rows.csv", FIELDS).read()
    assert sorted(row["size"] for row in found) == sorted(100 * n + i for n in range(4) for i in range(20))
