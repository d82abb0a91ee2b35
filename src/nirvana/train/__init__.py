"""Training: settings, the loop, the optimiser step, parallelism, checkpoints and export."""
