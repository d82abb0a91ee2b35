"""Scores, comparisons, tables and pictures of reconstructions."""
