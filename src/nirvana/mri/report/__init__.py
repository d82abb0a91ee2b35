"""Reports of brain slices whose facts can be counted: grammar, scores, samples, generation."""
