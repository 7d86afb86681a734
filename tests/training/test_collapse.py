"""Collapse: told once, when an expert has starved for long enough, and again only after it has recovered."""

import numpy as np
import pytest

from archlab.training.collapse import Watch

FAIR, LOW, ENOUGH = np.full(4, 0.25), 0.024, 0.026  # a tenth of the fair share is 0.025


def load(**shares):
    """Loads of four experts: as given for e0 to e3, the rest shared out evenly."""
    given = {int(name[1]): share for name, share in shares.items()}
    rest = (1 - sum(given.values())) / (4 - len(given))
    return np.array([given.get(e, rest) for e in range(4)])


def told(watch, loads, first=1):
    """(step, experts) of each event of the one layer "a"."""
    events = [(step, event) for step, now in enumerate(loads, first) for event in watch.look(step, {"a": now})]
    return [(step, event.experts) for step, event in events]


def test_one_event_after_exactly_so_many_steps():
    assert told(Watch(3), [load(e2=LOW)] * 2 + [FAIR]) == []
    assert told(Watch(3), [FAIR] + [load(e2=LOW)] * 9) == [(4, [2])]
    assert told(Watch(3), [load(e2=ENOUGH)] * 9) == []


def test_the_default_is_a_hundred_steps():
    assert told(Watch(), [load(e0=0.0)] * 250) == [(100, [0])]


def test_a_step_with_enough_begins_the_count_anew():
    starving, fed = load(e1=LOW), load(e1=ENOUGH)
    assert told(Watch(3), [starving, starving, fed, starving, starving, starving, starving]) == [(6, [1])]
    assert told(Watch(2), [starving, starving, starving, fed, starving, starving]) == [(2, [1]), (6, [1])]


def test_experts_that_began_together_are_told_together_and_others_apart():
    loads = [load(e0=LOW), load(e0=LOW, e1=LOW, e3=LOW), load(e0=LOW, e1=LOW, e3=LOW)]
    assert told(Watch(2), loads) == [(2, [0]), (3, [1, 3])]


def test_words_name_layer_path_and_expert():
    watch, layers = Watch(2), {"body/unit/0": FAIR, "body/unit/1": load(e3=0.0)}
    assert watch.look(11, layers) == []
    (event,) = watch.look(12, layers)
    assert event.layer == 2 and event.since == 11
    assert str(event) == ("layer 2 (body/unit/1), expert 3: under 10% of the fair share of tokens for 2 steps, since "
                          "step 11")
    watch = Watch(1)
    assert "experts 0, 3:" in str(watch.look(1, {"a": load(e0=0.0, e3=0.0)})[0])


@pytest.mark.parametrize("stop", range(1, 8))
def test_what_is_remembered_goes_on_wherever_a_run_was_cut(stop):
    loads = [load(e2=LOW)] * 3 + [FAIR] + [load(e1=LOW)] * 6
    whole, first = Watch(3), Watch(3)
    expected = told(whole, loads)
    assert expected == [(3, [2]), (7, [1])]
    before = told(first, loads[:stop])
    assert before + told(Watch(3, dict(first.since)), loads[stop:], stop + 1) == expected


def test_a_step_without_tokens_starves_nobody():
    assert told(Watch(1), [np.zeros(4)]) == []
    assert told(Watch(1), [np.ones(1)] * 3) == []
