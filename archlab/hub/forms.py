"""Forms of a block: how attention, MLP and their norms stand to each other. Families that have several say the names of
a block's parts once, and `placed` puts them where each form has them."""

from archlab.layers.config import LayerConfig
from archlab.layers.norms import Norm, Normalise
from archlab.layers.residual import Residual
from archlab.layers.sequence import Parallel, Sequence

SEQUENTIAL = {"attention": "layers/0/layer", "mlp": "layers/1/layer",
              "norm1": "layers/0/before", "norm2": "layers/1/before"}
PARALLEL = {"attention": "layer/layers/0", "mlp": "layer/layers/1", "norm1": "before"}
TWO_NORMS = {"attention": "layer/layers/0/layers/1", "mlp": "layer/layers/1/layers/1",
             "norm1": "layer/layers/0/layers/0/norm", "norm2": "layer/layers/1/layers/0/norm"}


def sequential(attention: LayerConfig, mlp: LayerConfig, norm: Norm) -> LayerConfig:
    """One after the other (GPT-2, Llama): `SEQUENTIAL`."""
    return Sequence(Residual(attention, norm), Residual(mlp, norm))


def parallel(attention: LayerConfig, mlp: LayerConfig, norm: Norm) -> LayerConfig:
    """Side by side on one norm (GPT-J): `PARALLEL`."""
    return Residual(Parallel(attention, mlp), norm)


def two_norms(attention: LayerConfig, mlp: LayerConfig, norm: Norm) -> LayerConfig:
    """Side by side, each with a norm of its own of the same input (GPT-NeoX): `TWO_NORMS`."""
    return Residual(Parallel(*(Sequence(Normalise(norm), layer) for layer in (attention, mlp))), before=None)


def placed(parts: dict, *forms: dict) -> dict:
    """A table of `Blocks` from one whose paths begin with a part, {"attention/out": "dense.weight"}: its entries for
    each of the forms."""
    table = {}
    for form in forms:
        for path, name in parts.items():
            part, _, rest = path.partition("/")
            if part in form:
                table[f"{form[part]}/{rest}"] = name
    return table
