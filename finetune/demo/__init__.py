"""The demo's training text and its tokenizer."""
