"""Training data: simulated and measured scans as batches."""
