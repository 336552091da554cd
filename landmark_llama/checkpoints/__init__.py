"""Checkpoints: reading and writing their files, converting a LLaMA, importing what the paper's released code saved."""
