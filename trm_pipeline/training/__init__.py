"""The training loop, its checkpoints, what it costs."""
