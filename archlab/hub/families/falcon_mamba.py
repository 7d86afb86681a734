"""FalconMamba (arXiv:2410.05355): Mamba with norms, without gains, on dt, B and C."""

from archlab.hub.families import mamba
from archlab.hub.family import Blocks, Family, each
from archlab.layers.norms import RMSNorm
from archlab.recurrence.mamba import Mamba


def read(f):
    return mamba.read(f, RMSNorm(f.take("mixer_rms_eps"), gain=False))


def write(config):
    return {**mamba.write(config), "mixer_rms_eps": each(config, Mamba)[0].inner_norm.eps}


FAMILY = Family(("falcon_mamba",), "FalconMambaForCausalLM", mamba.DEFAULTS | dict(mixer_rms_eps=1e-6), read, write,
                mamba.OUTER, (Blocks(mamba.BLOCK, "backbone.layers.{i}."),), base="backbone.")
