"""Tasks: every target follows from the row's own inputs (by slow solvers that share nothing with the generators), rows
depend on seed and number alone, runs resume, and processes share rows."""

import collections
import dataclasses
import json
import re
from fractions import Fraction

import chex
import numpy as np
import pytest

from archlab.data.tasks import TASKS, Draws, MQAR, Needle, get_task, task_batches, test_batches
from archlab.data.tasks import (Addition, Compression, Copying, FuzzyRecall, InContextRecall, InductionHeads, ListOps,
                                Memorisation, ModularArithmetic, Parity, Phonebook, SelectiveCopying, WordProblem)
from archlab.data.tasks.tracking import group_table

test_batches.__test__ = False  # a name, not a test
SMALL = {name: task for name, task in TASKS.items() if task.context <= 300}
SMALL["list-ops-short"] = ListOps(shortest=40, length=120, depth=6, arguments=9)


def rows_of(task, count=20, training=False, seed=3):
    """(inputs of the document, {place: target}) of some rows."""
    batch = task.make(Draws(seed, "train" if training else "test", range(count)), training)
    for ids, targets, segments, weights in zip(batch.ids, batch.targets, batch.segments, batch.weights):
        yield ids[segments > 0].tolist(), {int(t): int(targets[t]) for t in np.flatnonzero(weights)}


def solve_mqar(task, x):
    values, answers = {}, {}
    for t, token in enumerate(x):
        if t < 2 * task.pairs:
            if t % 2:
                values[x[t - 1]] = token
        elif token in values:
            answers[t] = values[token]
    assert len(values) == len(set(values.values())) == task.pairs
    return answers


def solve_induction(task, x):
    marks = [t for t, token in enumerate(x) if token == task.symbols - 1]
    assert marks[-1] == len(x) - 1
    return {t: x[marks[0] + 1] for t in marks[1:]}


def solve_recall(task, x):
    seen, answers, quiet = {}, {}, task.symbols - task.noise_symbols
    for t in range(0, len(x), 2):
        if x[t] >= quiet:
            continue
        if x[t] in seen:
            answers[t] = seen[x[t]]
        if t + 1 < len(x):
            assert seen.setdefault(x[t], x[t + 1]) == x[t + 1]
    return answers


def solve_fuzzy(task, x):
    """Reads motifs as a reader would: the key half and the value half of the symbols alternate."""
    half, text, answers, known = (task.symbols - 1) // 2, x, {}, {}
    t = next(i for i, token in enumerate(text) if token != task.symbols - 1)
    while t < len(text):
        begin = t
        while t < len(text) and text[t] < half:
            t += 1
        middle = t
        while t < len(text) and text[t] >= half:
            t += 1
        key, value = tuple(text[begin:middle]), text[middle:t]
        if key in known:
            answers.update({middle - 1 + i: token for i, token in enumerate(known[key])})
        elif t < len(text):
            known[key] = value
        assert len(key) == task.motif
    return answers


def solve_selective(task, x):
    data = [token for token in x if token < task.symbols - 2]
    begin = x.index(task.symbols - 1)
    assert len(data) == task.tokens and all(token < task.symbols for token in x)
    return {begin + i: token for i, token in enumerate(data)}


def solve_copying(task, x):
    mark = x.index(task.letters)
    answer = x[:mark][::-1] if task.backwards else x[:mark]
    assert task.shortest <= mark <= task.length and answer[:-1] == x[mark + 1:]
    return {mark + i: token for i, token in enumerate(answer)}


def solve_addition(task, x):
    """Python's own addition, of numbers to the base."""
    plus, equals = x.index(task.base), x.index(task.base + 1)
    value = lambda digits: sum(digit * task.base**i for i, digit in enumerate(digits))
    total, size = value(x[:plus]) + value(x[plus + 1:equals]), equals - plus - 1
    assert task.shortest <= size == plus <= task.length
    answer = [total // task.base**i % task.base for i in range(size + 1)]
    assert total < task.base**(size + 1) and x[equals + 1:] == answer[:-1]
    return {equals + i: digit for i, digit in enumerate(answer)}


def solve_compression(task, x):
    assert x[task.length - 1] == task.symbols - 1
    return {task.length + i: token for i, token in enumerate(x[:task.length - 1])}


def solve_memorisation(task, x):
    asked = [(t, x[t - 1]) for t in range(len(x)) if x[t] == task.symbols - 1]
    return {t: MEMORY[key] for t, key in asked}


def solve_parity(task, x):
    return {len(x) - 1: x.count(1) % 2}


def solve_arithmetic(task, x):
    """Python's own arithmetic on the written expression."""
    signs = {task.modulus + i: sign for i, sign in enumerate("+-*=()")}
    assert signs[x[-1]] == "=" and task.shortest - 1 <= len(x) <= task.length
    return {len(x) - 1: eval("".join(signs.get(token, str(token)) for token in x[:-1])) % task.modulus}


def solve_words(task, x):
    if task.group.startswith("Z"):
        return {len(x) - 1: sum(x) % int(task.group[1:])}
    elements, holding = ELEMENTS[task.group], list(range(5))
    for token in x:  # where each of five things lies, moved by one permutation after the other
        holding = [elements[token][place] for place in holding]
    return {len(x) - 1: elements.index(tuple(holding))}


def solve_list(task, x):
    names = {10: "least(", 11: "most(", 12: "middle(", 13: "last_digit(", 14: "),"}
    words = {"least": lambda *v: min(v), "most": lambda *v: max(v), "last_digit": lambda *v: sum(v) % 10,
             "middle": lambda *v: int(Fraction(sorted(v)[(len(v) - 1) // 2] + sorted(v)[len(v) // 2], 2))}
    assert task.shortest <= len(x) <= task.length
    return {len(x) - 1: eval("".join(names.get(token, f"{token},") for token in x).rstrip(","), words)}


def solve_phonebook(task, x):
    text = bytes(x).decode()
    book, questions = text.split("\n\n")
    numbers = dict(line.split(": ") for line in book.split("\n"))
    answers = {}
    for found in re.finditer(r"(\w+): ", questions):
        at = len(book) + 2 + found.end()
        answers.update({at - 1 + i: ord(digit) for i, digit in enumerate(numbers[found[1]])})
    return answers


def solve_needle(task, x):
    text = bytes(x).decode()
    (key,) = re.findall(r"The pass key is (\d{5})\. ", text)
    at = text.index("It is ") + len("It is ")
    assert re.fullmatch(r"(\d{4})", text[at:]) and key.startswith(text[at:])
    return {at - 1 + i: ord(digit) for i, digit in enumerate(key)}


SOLVERS = {MQAR: solve_mqar, InductionHeads: solve_induction, InContextRecall: solve_recall, FuzzyRecall: solve_fuzzy,
           SelectiveCopying: solve_selective, Copying: solve_copying, Addition: solve_addition,
           Compression: solve_compression,
           Memorisation: solve_memorisation, Parity: solve_parity, ModularArithmetic: solve_arithmetic,
           WordProblem: solve_words, ListOps: solve_list, Phonebook: solve_phonebook, Needle: solve_needle}
MEMORY = dict(pair for x, answers in rows_of(Memorisation(), 200, seed=9) for pair in
              ((x[t - 1], target) for t, target in answers.items()))


def _all_permutations(even):
    found = [()]
    for _ in range(5):
        found = [p + (i,) for p in found for i in range(5) if i not in p]
    sign = lambda p: sum(p[i] > p[j] for i in range(5) for j in range(i + 1, 5)) % 2
    return [p for p in found if not even or sign(p) == 0]


ELEMENTS = {"S5": _all_permutations(False), "A5": _all_permutations(True)}


def test_every_kind_of_task_has_a_solver():
    assert {type(task) for task in TASKS.values()} == set(SOLVERS)


@pytest.mark.parametrize("name", SMALL)
def test_targets_follow_from_the_inputs(name):
    task = SMALL[name]
    for test in {name: task, **task.tests()}.values():
        if test.context <= 600:
            test = dataclasses.replace(test, every=False) if hasattr(test, "every") else test
            for x, answers in rows_of(test):
                assert answers and answers == SOLVERS[type(test)](test, x)


@pytest.mark.parametrize("name", SMALL)
def test_rows_depend_on_seed_and_number_alone(name):
    task = SMALL[name]
    whole = task.make(Draws(1, "train", range(6)), True)
    chex.assert_shape([whole.ids, whole.targets, whole.segments, whole.weights], (6, task.context))
    assert [a.dtype for a in (whole.ids, whole.targets, whole.segments, whole.weights)] == [np.int32] * 3 + [np.float32]
    assert 0 <= whole.ids.min() and whole.ids.max() < task.vocab and whole.targets.max() < task.vocab
    assert set(np.unique(whole.weights)) <= {0, 1} and not whole.weights[whole.segments == 0].any()
    assert (np.diff(whole.segments) <= 0).all()  # padding comes last
    for numbers in ([4], [5, 2]):
        some = task.make(Draws(1, "train", numbers), True)
        chex.assert_trees_all_equal(some, _pick(whole, numbers))
    others = [task.make(Draws(seed, split, range(6)), True).ids.tobytes() for seed, split in
              ((1, "train"), (2, "train"), (1, "validation"), (1, "test"))]
    assert len(set(others)) == 4 and len({row.tobytes() for row in whole.ids}) == 6


def _pick(batch, numbers):
    take = lambda a: None if a is None else a[numbers]
    return type(batch)(*(take(getattr(batch, field.name)) for field in dataclasses.fields(batch)))


def test_training_targets_where_they_differ():
    recall, noisy = get_task("mad-in-context-recall"), get_task("mad-noisy-recall")
    for task in (recall, noisy, get_task("mad-fuzzy-recall")):
        batch = task.make(Draws(0, "train", range(4)), True)
        assert batch.weights.all()
        np.testing.assert_array_equal(batch.ids[:, 1:], batch.targets[:, :-1])  # all next tokens
    quiet = noisy.make(Draws(0, "test", range(50)), False)
    assert abs((quiet.ids[:, ::2] >= 16).mean() - 0.2) < 0.03
    for x, answers in rows_of(get_task("parity-tiny"), training=True):
        assert [answers[t] for t in range(len(x))] == [sum(x[:t + 1]) % 2 for t in range(len(x))]
    for x, answers in rows_of(get_task("s5"), training=True):
        for t in range(len(x)):
            assert answers[t] == solve_words(get_task("s5"), x[:t + 1])[t]
    marks = InductionHeads(length=40, marks=6)
    for x, answers in rows_of(marks, training=True):
        assert 1 <= len(answers) <= 5 and answers == solve_induction(marks, x)
        assert {x[t + 1] for t in answers if t + 1 < len(x)} == set(answers.values())


def test_tests_have_other_lengths_and_depths():
    assert [t.length for t in Parity().tests().values()] == [40, 80, 160, 240]
    assert all(t.shortest == t.length and not t.make(Draws(0, "test", [0]), False).weights[:, :-1].any()
               for t in get_task("parity-tiny").tests().values())
    lengths = [int(label) for label in get_task("induction-heads").tests()]
    assert lengths[0] == 256 and min(lengths) == 2**6 and max(lengths) == 2**14
    grid = Needle(length=256).grid()
    for (depth, length), task in grid.items():
        for x, _ in rows_of(task, 2):
            hay = length + 1 - len(Needle.NEEDLE) - len(Needle.QUESTION)
            place = bytes(x).index(b"The pass key")
            assert len(x) == length and abs(place - depth * hay) < 40  # to the nearest sentence
    assert {depth for depth, _ in grid} == {0, 0.25, 0.5, 0.75, 1} and {length for _, length in grid} == {
        256, 512, 1024, 2048}


def test_queries_of_mqar_crowd_behind_the_pairs():
    """The gaps follow the power law: against a slow draw, one query after the other, each from what is left."""
    task, rng = MQAR(symbols=64, length=40, pairs=3), np.random.default_rng(0)
    first = lambda t: (t - 6) // 2
    ours = collections.Counter(first(t) for _, answers in rows_of(task, 4000) for t in answers)
    share = np.arange(1, 18.0) ** -0.99
    slow = collections.Counter()
    for _ in range(4000):
        left = share.copy()
        for _ in range(3):
            place = rng.choice(17, p=left / left.sum())
            slow[place], left[place] = slow[place] + 1, 0
    for place in range(17):
        assert abs(ours[place] - slow[place]) < 5 * np.sqrt(slow[place]) + 10
    noisy = next(rows_of(MQAR(noise=True)))[0]
    assert len(set(noisy)) > 40


def test_draws_are_uniform_and_independent():
    draws = Draws(0, "train", range(2000))
    numbers = draws.uniform(50)
    assert abs(numbers.mean() - 0.5) < 0.005 and abs(numbers.var() - 1 / 12) < 0.002
    assert np.abs(np.corrcoef(numbers[:, :20].T) - np.eye(20)).max() < 0.12  # between numbers of a row
    assert np.abs(np.corrcoef(numbers[:40]) - np.eye(40)).max() < 0.7  # between rows
    counts = np.bincount(draws.below(7, 50).ravel(), minlength=7)
    assert counts.min() > 0.95 * 100_000 / 7 and counts.sum() == 100_000
    chosen = draws.choose(5, 5)
    assert (np.sort(chosen) == np.arange(5)).all() and np.bincount(chosen[:, 0]).min() > 330
    assert draws.choose(5, 0).shape == (2000, 0)


@pytest.mark.parametrize("name", ["parity-tiny", "mqar-tiny", "list-ops-tiny"])
def test_resuming_equals_going_on(name):
    task = get_task(name)
    whole = [b for b, _ in zip(task_batches(task, 4, seed=5), range(6))]
    first = task_batches(task, 4, seed=5)
    chex.assert_trees_all_equal([next(first), next(first)], whole[:2])
    state = json.loads(json.dumps(first.get_state()))
    second = task_batches(task, 4, seed=5)
    second.set_state(state)
    chex.assert_trees_all_equal([next(second) for _ in range(4)], whole[2:])
    shared = [task_batches(task, 4, 5, index, 2) for index in range(2)]
    shared[0].set_state(state), shared[1].set_state(state)
    rows = sorted(row.tobytes() for part in shared for row in next(part).ids)
    assert rows == sorted(row.tobytes() for row in whole[2].ids)


def test_sides_of_a_task():
    task = get_task("mqar-tiny")
    held_out = test_batches(task, 4, 8)
    for _ in range(2):  # it can be read again
        assert [b.ids.shape for b in held_out] == [(4, 32)] * 2
    seen = {row.tobytes() for b in list(held_out) + list(test_batches(task, 4, 8, "validation")) for row in b.ids}
    seen |= {row.tobytes() for b, _ in zip(task_batches(task, 4, 0), range(4)) for row in b.ids}
    assert len(seen) == 8 + 8 + 16


@pytest.mark.parametrize("make, words", [
    (lambda: MQAR(length=15), "MQAR.length = 15: must be at least 4 pairs = 16"),
    (lambda: MQAR(symbols=8), "MQAR.symbols = 8: must be at least 10"),
    (lambda: Parity(shortest=9, length=8), "length = 8: must be at least shortest = 9"),
    (lambda: ModularArithmetic(every=True), "every = True: must be False"),
    (lambda: Addition(shortest=3, length=2), "Addition.length = 2: must be at least shortest = 3"),
    (lambda: WordProblem(group="S6"), "group = 'S6': did you mean S5"),
    (lambda: InContextRecall(noise_share=0.1), "noise_symbols = 0"),
    (lambda: InductionHeads(length=8, marks=5), "marks = 5: must be from 2 to length / 2 = 4"),
    (lambda: Needle(depth=1.5), "depth = 1.5"),
    (lambda: ListOps(depth=1).make(Draws(0, "test", [0]), False), "none of 10,000 lists had 500 to 2000 tokens"),
    (lambda: get_task("parrity"), "no task named 'parrity'; did you mean parity"),
    (lambda: task_batches(get_task("parity"), 3, 0, 0, 2), "batch is 3"),
    (lambda: task_batches(get_task("parity"), 3, -1), "seed is -1"),
    (lambda: test_batches(get_task("parity"), 3, 4), "rows is 4; it must be a multiple of batch = 3"),
    (lambda: test_batches(get_task("parity"), 3, 3, "train"), "split is 'train'"),
])
def test_bad_input(make, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        make()


def test_groups():
    for name, size in (("S5", 120), ("A5", 60), ("Z7", 7)):
        table = group_table(name)
        assert table.shape == (size, size) and all(len(set(row)) == size for row in (*table, *table.T))
        i, j, k = np.random.default_rng(0).integers(0, size, (3, 200))
        np.testing.assert_array_equal(table[table[i, j], k], table[i, table[j, k]])
    assert (group_table("A5") != group_table("A5").T).any()
