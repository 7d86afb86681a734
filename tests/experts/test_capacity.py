"""Capacities against a slow queue: who finds room, in every order, with and without a second try."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from archlab.experts.capacity import Capacity

E, B, T, k = 4, 3, 9, 2


def slow_fit(capacity, experts, gates, room):
    """One choice after another through queues that are lists."""
    asked, kept = np.array(experts), np.full(experts.shape, E)
    for b in range(B):
        load = np.zeros(E, int)
        tokens = list(range(T))
        if capacity.order == "priority":
            tokens.sort(key=lambda t: -gates[b, t].max())
        queue = [(t, j) for t in tokens for j in range(k)]
        if capacity.order != "time":
            queue.sort(key=lambda slot: slot[1])
        tried = {t: {e for e in experts[b, t] if e < E} for t in tokens}
        for turn in range(capacity.reroute + 1):
            if turn:  # everyone who found no room asks for the token's next best, and only then do they queue
                for t in tokens:
                    for j in range(k):
                        if asked[b, t, j] < E and kept[b, t, j] == E:
                            rest = [e for e in np.argsort(-gates[b, t], kind="stable") if e not in tried[t]]
                            if rest:
                                asked[b, t, j] = rest[0]
                                tried[t].add(rest[0])
                            else:
                                queue = [slot for slot in queue if slot != (t, j)]
            for t, j in queue:
                e = asked[b, t, j]
                if e < E and kept[b, t, j] == E and load[e] < room[b]:
                    kept[b, t, j] = e
                    load[e] += 1
    return asked, kept


@pytest.mark.parametrize("order", ["time", "choice", "priority"])
@pytest.mark.parametrize("reroute", [0, 1, 3])
@pytest.mark.parametrize("room", [[1, 2, 4], [3, 9, 0]])
def test_against_queues(order, reroute, room):
    capacity = Capacity(1.0, order=order, reroute=reroute)
    logits = np.random.default_rng(0).normal(size=(B, T, E)) + [2, 0.5, 0, 0]
    gates = np.exp(logits)
    experts = np.argsort(-gates, -1)[..., :k]
    experts[1, 6:] = E  # padding
    asked, kept = jax.jit(capacity.fit)(jnp.asarray(experts), jnp.asarray(gates, jnp.float32), jnp.asarray(room))
    want_asked, want_kept = slow_fit(capacity, experts, gates, np.asarray(room))
    np.testing.assert_array_equal(kept, want_kept)
    np.testing.assert_array_equal(asked, want_asked)
    for b in range(B):
        assert np.bincount(np.asarray(kept)[b].ravel(), minlength=E + 1)[:E].max() <= room[b]


def test_a_second_try_finds_room():
    """All tokens want expert 0; with one try each goes to its own second best, and nothing is left."""
    gates = jnp.zeros((1, 4, 4)).at[..., 0].set(9.0) + jnp.eye(4)[None]
    experts = jnp.zeros((1, 4, 1), jnp.int32)
    assert Capacity(1.0).fit(experts, gates, jnp.array([1]))[1][0, :, 0].tolist() == [0, 4, 4, 4]
    assert Capacity(1.0, reroute=1).fit(experts, gates, jnp.array([1]))[1][0, :, 0].tolist() == [0, 1, 2, 3]


def test_priority_keeps_the_weightiest():
    gates = jnp.array([[[0.1], [0.9], [0.5], [0.7]]])
    kept = Capacity(1.0, order="priority").fit(jnp.zeros((1, 4, 1), jnp.int32), gates, jnp.array([2]))[1]
    assert kept[0, :, 0].tolist() == [1, 0, 1, 0]


def test_room():
    """min(n, ceil(factor k n / E)), exactly, also where float arithmetic would round up a whole number."""
    assert Capacity(1.25).room(2, 8, 16)[[0, 1, 8, 16]].tolist() == [0, 1, 3, 5]
    assert Capacity(1.1).room(1, 11, 100)[[10, 50, 100]].tolist() == [1, 5, 10]
    assert Capacity(5.0).room(2, 4, 6).tolist() == [0, 1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("fields, named", [
    (dict(factor=0.0), "Capacity.factor = 0.0"),
    (dict(factor=-1), "Capacity.factor = -1"),
    (dict(factor=1.0, rows=0), "Capacity.rows = 0"),
    (dict(factor=1.0, reroute=-1), "Capacity.reroute = -1"),
    (dict(factor=1.0, order="size"), "Capacity.order = 'size'"),
])
def test_bad_fields(fields, named):
    with pytest.raises(ValueError, match=named):
        Capacity(**fields)
