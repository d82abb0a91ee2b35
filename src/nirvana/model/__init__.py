"""The model, on one device; it knows nothing of training."""
