"""Pallas kernels of the recurrences, for TPUs (Mosaic) and GPUs (Triton).

Tests run them interpreted, against the step-by-step forms, and lower them for both. They have also been compiled for
both without a device (a TPU v5e; compute capability 9.0). None has run on a device yet, so none has been timed.
"""
