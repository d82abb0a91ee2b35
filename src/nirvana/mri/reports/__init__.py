"""Reports of brain slices: grammar, samples, training, reading, scores, and reports of a scan."""
