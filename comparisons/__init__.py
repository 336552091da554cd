"""Long-context methods side by side: one base model, the same tokens, one harness. Nothing imports it."""
