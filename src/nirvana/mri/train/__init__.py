"""The training of a codec."""
