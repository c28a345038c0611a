"""Training: the state, the step, the loop around it, checkpoints and metrics."""
