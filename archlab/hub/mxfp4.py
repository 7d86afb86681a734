"""Matrices in MXFP4, as gpt-oss publishes its experts: blocks of 32 numbers of four bits that share an exponent (OCP
Microscaling Formats, version 1.0, sections 5.1 and 5.3.3, 5.4.1). They are read as bfloat16, which holds them exactly.
"""

import ml_dtypes
import numpy as np

BLOCK = 32
FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)  # E2M1 without its sign, which is the highest bit
NUMBERS = np.concatenate([FP4, -FP4])
PAIRS = np.stack([NUMBERS[np.arange(256) % 16], NUMBERS[np.arange(256) // 16]], -1)  # of a byte, the low half first
POWERS = np.append(2.0 ** (np.arange(255) - 127), np.nan).astype(np.float32)  # E8M0, whose last is no number


def joined(found: dict) -> dict:
    """The tensors of a folder, with NAME for the pairs NAME_blocks [E, outputs, inputs/32, 16] and NAME_scales [E,
    outputs, inputs/32]: as if it were stored as [E, inputs, outputs] in bfloat16, which gpt-oss is when it is not
    quantised."""
    found = dict(found)
    for name in [name.removesuffix("_blocks") for name in found if name.endswith("_blocks")]:
        blocks, scales = found[f"{name}_blocks"], found.get(f"{name}_scales")
        if scales and blocks.kind == scales.kind == "U8" and blocks.shape == (*scales.shape, BLOCK // 2) \
                and len(scales.shape) == 3:
            experts, outputs, count = scales.shape
            del found[f"{name}_blocks"], found[f"{name}_scales"]
            found[name] = blocks._replace(kind="MXFP4", dtype=np.dtype(ml_dtypes.bfloat16), scales=scales,
                                          shape=(experts, count * BLOCK, outputs))
    return found


def decoded(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """[E, inputs, outputs] in bfloat16 of bytes [E, outputs, inputs/32, 16] and [E, outputs, inputs/32]."""
    numbers = PAIRS[blocks].reshape(*scales.shape, BLOCK)
    numbers *= POWERS[scales][..., None]
    return numbers.astype(ml_dtypes.bfloat16).reshape(*scales.shape[:2], -1).swapaxes(1, 2)
