"""Checkpoints and the finished model: written so that a kill leaves whole files, checked before a run resumes."""
