"""The study of adopting a pretrained Transformer."""
