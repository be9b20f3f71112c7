"""Pretrain a small language model from raw text to a benchmarked Hugging Face folder."""

__version__ = "0.1.0"
