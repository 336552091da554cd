"""Checkpoints: their files, conversion from LLaMA, and what the paper's released code left."""
