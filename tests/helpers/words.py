"""The words of made-up texts."""

WORDS = ("the", "cat", "sat", "on", "a", "mat", "and", "dog", "ran", "to", "see", "one", "bird")
"""Few enough that a small model learns them in a few steps."""
