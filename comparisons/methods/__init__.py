"""The methods, one file each: the module's name is the method's, and its `build` makes the reader."""

from importlib import import_module

from transformers import LlamaForCausalLM

from comparisons.reader import Reader


def build(module: str, base: LlamaForCausalLM, **options) -> Reader:
    """The reader that `comparisons/methods/MODULE.py` makes of a base model, with the options of a configuration."""
    return import_module(f"comparisons.methods.{module}").build(base, **options)
