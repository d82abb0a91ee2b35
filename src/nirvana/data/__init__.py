"""What language models are trained on and score."""
