"""Training: configuration, token shards, optimiser, checkpoints and the one training loop."""
