"""Evaluation of language models: likelihoods of text, benchmark tasks, recall, comparison."""
