"""Who sees whom: the mask that segments, positions and a sliding window imply."""

from jaxtyping import Array, Bool, Int


def visible(query_segments: Int[Array, "B T"], query_positions: Int[Array, "B T"], key_segments: Int[Array, "B S"],
            key_positions: Int[Array, "B S"], window: int | None = None) -> Bool[Array, "B T S"]:
    """Which keys each query sees: those of its own document, not later, and fewer than `window` places back."""
    distance = query_positions[:, :, None] - key_positions[:, None, :]
    seen = (query_segments[:, :, None] == key_segments[:, None, :]) & (key_segments > 0)[:, None, :] & (distance >= 0)
    return seen if window is None else seen & (distance < window)
