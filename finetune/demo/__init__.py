"""The demo's own data: documents written on this machine, and a tokenizer trained on them. No download."""
