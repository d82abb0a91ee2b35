"""Decoding of text, one token after another."""
