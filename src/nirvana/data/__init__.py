"""Data of language models: documents, tokenizers, token shards and the loader."""
