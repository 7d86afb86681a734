"""Rotary positions in config.json, in all their spellings: `rope_theta` and `rope_scaling` of the hub's older files,
`rope_parameters` of transformers 5, for all layers or for each type of layer."""

import dataclasses

from archlab.attention.positions import Rotary
from archlab.attention.scaling import DynamicNTK, LinearScaling, Llama3Scaling, LongRoPE, YaRN
from archlab.hub.fields import Fields
from archlab.layers.config import near

ORIGINAL = "original_max_position_embeddings"
SCALINGS = {  # rope_type: (ours, {our field: theirs})
    "linear": (LinearScaling, {"factor": "factor"}),
    "dynamic": (DynamicNTK, {"factor": "factor"}),
    "yarn": (YaRN, {"factor": "factor", "original": ORIGINAL, "attention_factor": "attention_factor",
                    **{name: name for name in ("beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate")}}),
    "longrope": (LongRoPE, {"short": "short_factor", "long": "long_factor", "original": ORIGINAL, "factor": "factor",
                            "attention_factor": "attention_factor"}),
    "llama3": (Llama3Scaling, {"factor": "factor", "low": "low_freq_factor", "high": "high_freq_factor",
                               "original": ORIGINAL}),
}
FULL, SLIDING = "full_attention", "sliding_attention"  # the types of layers


def read_rotary(fields: Fields, head_size: int, *, base: float = 10000.0, share: float | None = None,
                interleaved: bool = False) -> Rotary:
    """The rotary positions of heads of `head_size` channels.

    Args: base: of the family, where config.json gives none. share: likewise, the part of the channels that is turned;
      None for families that always turn all (transformers does not look at the field there).
    """
    fields.take("rope_parameters", None)
    rope = fields.inside("rope_scaling" if "rope_scaling" in fields else "rope_parameters")
    return _read(fields, rope, head_size, fields.take("rope_theta", base), share, interleaved)


def read_rotary_by_type(fields: Fields, head_size: int, *, full: float, sliding: float) -> dict[str, Rotary]:
    """{type of layer: its positions}. full, sliding: the bases where none is written.

    In the older spelling `rope_theta` and `rope_scaling` are about the full layers alone.
    """
    both = fields.inside("rope_parameters")
    older = "rope_scaling" in fields
    return {FULL: _read(fields, fields.inside("rope_scaling") if older else both.inside(FULL), head_size,
                        fields.take("rope_theta", full)),
            SLIDING: _read(fields, both.inside(SLIDING), head_size, sliding)}


def _read(fields: Fields, rope: Fields, head_size: int, base: float, share: float | None = None,
          interleaved: bool = False) -> Rotary:
    base = rope.take("rope_theta", base)
    turned = rope.take("partial_rotary_factor", fields.take("partial_rotary_factor", share or 1.0))
    if share is None and turned != 1:
        fields.refuse(f"partial_rotary_factor = {turned} is not supported: this family turns all channels")
    size = int(head_size * turned)
    if size % 2:
        fields.refuse(f"partial_rotary_factor = {turned}: turns {size} of {head_size} channels, an odd number")
        size += 1
    return Rotary(float(base), None if size == head_size else size, interleaved, _read_scaling(fields, rope))


def _read_scaling(fields: Fields, rope: Fields):
    kind = rope.take("rope_type", rope.take("type", None)) or "default"
    if kind in ("su", "yarn") and "long_factor" in rope:  # early Phi 3
        kind = "longrope"
    if kind == "default":
        return None
    if kind not in SCALINGS:
        fields.refuse(f"{rope.where}rope_type = {kind!r} is not supported; {near(str(kind), [*SCALINGS])}")
        return None
    scaling, names = SCALINGS[kind]
    longest = fields.take("max_position_embeddings", None)
    original = fields.take(ORIGINAL, None) or rope.take(ORIGINAL, None) or longest
    values = {ours: rope.take(theirs, None) for ours, theirs in names.items()} | {"original": original}
    if values["factor"] is None and kind in ("yarn", "longrope"):
        values["factor"] = longest / original
    if kind == "dynamic":  # stretched from what the model was made for, wherever else that is written
        values["original"] = longest
    for field in dataclasses.fields(scaling):
        if field.default is dataclasses.MISSING and values.get(field.name) is None:
            fields.refuse(f"{rope.where}{names.get(field.name, field.name)} is missing, which {kind} needs")
            return None
    allowed = {field.name for field in dataclasses.fields(scaling)}
    return scaling(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()
                      if value is not None and name in allowed})


def write_rotary(rotary: Rotary, head_size: int, partial: bool = False) -> dict:
    """The fields of config.json that say `rotary`, in both spellings. partial: for a family that turns only a part of
    the channels where it is not told."""
    values = {"rope_theta": rotary.base}
    if partial or rotary.size is not None:
        values["partial_rotary_factor"] = (rotary.size or head_size) / head_size
    if rotary.scaling is None:
        return {**values, "rope_parameters": {"rope_type": "default", **values}}
    kind, names = next((kind, names) for kind, (ours, names) in SCALINGS.items() if ours is type(rotary.scaling))
    scaling = {theirs: getattr(rotary.scaling, ours) for ours, theirs in names.items()}
    scaling = {"rope_type": kind, **{name: value for name, value in scaling.items() if value is not None}}
    original = getattr(rotary.scaling, "original", None)
    if kind == "dynamic":
        values["max_position_embeddings"] = original
    elif original is not None:
        values |= {ORIGINAL: original, "max_position_embeddings": round(original * rotary.scaling.factor)}
    turned = {name: values[name] for name in ("rope_theta", "partial_rotary_factor") if name in values}
    return {**values, "rope_parameters": {**scaling, **turned}, "rope_scaling": scaling}


def write_rotary_by_type(positions: dict[str, Rotary], head_size: int) -> dict:
    """The fields of config.json that say positions for each type of layer; the older spelling cannot."""
    written = {kind: write_rotary(rotary, head_size) for kind, rotary in positions.items()}
    longest = {"max_position_embeddings": fields["max_position_embeddings"] for fields in written.values()
               if "max_position_embeddings" in fields}
    return {**longest, "rope_parameters": {kind: fields["rope_parameters"] for kind, fields in written.items()}}
