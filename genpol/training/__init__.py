"""The training loop, evaluation, checkpoints and logging."""
