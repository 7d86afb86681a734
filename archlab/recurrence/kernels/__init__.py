"""Pallas kernels of the recurrences, for TPUs (Mosaic) and GPUs (Triton).

They are tested interpreted against the step-by-step forms, compiled for a TPU and lowered for a GPU; they have not been
timed on either.
"""
