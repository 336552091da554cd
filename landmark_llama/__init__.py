"""Landmark LLaMA: LLaMA models that read texts far longer than they were trained on, by landmark attention."""
