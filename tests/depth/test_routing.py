"""Who passes: the pure functions of routing against per-token loops."""

from fractions import Fraction

import jax
import numpy as np
import pytest

from archlab.depth.routing import as_share, budget, choose_best, choose_within_budget
from tests.helpers import tokens_of


@pytest.mark.parametrize("capacity, share", [(2 / 3, Fraction(2, 3)), (0.125, Fraction(1, 8)), (1.0, Fraction(1))])
def test_share_is_exact(capacity, share):
    assert as_share(capacity) == share
    assert all(budget(share, n) == n * share.numerator // share.denominator for n in range(100))


def within_budget_loop(wish, share, segments):
    chosen = np.zeros_like(wish)
    for row in range(len(wish)):
        document, seen, passed = None, 0, 0
        for t, segment in enumerate(segments[row]):
            if segment == 0:
                continue
            if segment != document:
                document, seen, passed = segment, 0, 0
            seen += 1
            if wish[row, t] and passed < int(share * seen):
                chosen[row, t] = True
                passed += 1
    return chosen


@pytest.mark.parametrize("share", [Fraction(1), Fraction(2, 3), Fraction(1, 5), Fraction(1, 50)])
def test_budget_against_loop(share):
    """In one piece and in many: the number that passed is all that need be carried."""
    rng, T = np.random.default_rng(0), 30
    segments = np.sort(rng.integers(1, 5, (6, T)), axis=1)
    segments[1, 20:] = segments[2] = 0
    wish = (rng.random((6, T)) < np.linspace(0.2, 1, 6)[::-1, None]) & (segments > 0)
    tokens = tokens_of(segments)
    expected = within_budget_loop(wish, share, segments)
    choose = jax.jit(lambda wish, places, real, passed: choose_within_budget(wish, share, places, real, passed))
    for cuts in ((T,), (1, 8, 1, 20), (1,) * T):
        passed, at, found = np.zeros(6, np.int32), 0, []
        for width in cuts:
            piece = slice(at, at + width)
            chosen, passed = choose(wish[:, piece], tokens.positions[:, piece], tokens.real[:, piece], passed)
            found.append(chosen)
            at += width
        np.testing.assert_array_equal(np.concatenate(found, 1), expected)
    assert (expected.sum(1) <= budget(share, T)).all()  # however many documents stand in a row
    assert share < Fraction(1, 10) or expected.any()


def test_full_share_stops_nobody():
    wish = np.random.default_rng(1).random((3, 20)) < 0.5
    tokens = tokens_of(np.ones((3, 20)))
    choose = jax.jit(lambda *a: choose_within_budget(a[0], Fraction(1), *a[1:])[0])
    chosen = choose(wish, tokens.positions, tokens.real, np.zeros(3, np.int32))
    np.testing.assert_array_equal(chosen, wish)


def test_best_against_loop():
    """The highest scores among candidates; a padded row counts its real tokens only; never fewer than one."""
    rng, T, share = np.random.default_rng(2), 16, Fraction(2, 5)
    scores = rng.normal(size=(4, T))
    candidates, counts = rng.random((4, T)) < 0.7, np.array([16, 9, 2, 16], np.int32)
    candidates[1, 9:] = candidates[2, 2:] = False
    candidates[2, 0], candidates[3] = True, np.arange(T) == 11
    expected = np.zeros_like(candidates)
    for row in range(4):
        wanted = max(1, int(share * int(counts[row])))
        for t in sorted(np.flatnonzero(candidates[row]), key=lambda t: -scores[row, t])[:wanted]:
            expected[row, t] = True
    chosen = jax.jit(lambda *a: choose_best(a[0], a[1], share, budget(share, a[2])))(scores, candidates, counts)
    np.testing.assert_array_equal(chosen, expected)
    np.testing.assert_array_equal(expected.sum(1), [6, 3, 1, 1])
