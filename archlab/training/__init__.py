"""Training: the step, the loop, optimizers, checkpoints and metrics."""
