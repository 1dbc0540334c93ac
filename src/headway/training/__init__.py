"""Training: configuration, the loop, optimizers, checkpoints with exact resume, metrics and progress."""
