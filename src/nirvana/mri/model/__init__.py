"""The codec: its networks, its configuration, its files, and reports as tokens."""
