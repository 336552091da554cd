"""Landmark attention over whole rows: the definition, the fast forms, and the view of a call that uses them."""

from landmark_llama.attention.reference import landmark_attention_reference
from landmark_llama.attention.whole_rows import WholeRows, landmark_attention

__all__ = ["WholeRows", "landmark_attention", "landmark_attention_reference"]
