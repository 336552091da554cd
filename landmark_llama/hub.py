"""What a saved model carries so that transformers finds its classes without `import landmark_llama`.

`config.json` names, in `auto_map`, a module that lies beside it and only imports this package. So
`AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)` gives the installed classes, no copies of them.
"""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import Any

LOADER = "landmark_llama_classes.py"  # no model*: that is how files of weights are told from an adapter
ENDINGS = {"AutoConfig": "Config", "AutoModel": "Model", "AutoModelForCausalLM": "ForCausalLM"}  # of class names


class InstalledClass:
    """Mixin of the classes that `auto_map` names: it leads to the installed class, which is never copied."""

    @classmethod
    def register_for_auto_class(cls, *args: Any, **kwargs: Any) -> None:
        """Does nothing, for subclasses outside this package what transformers does.

        transformers calls it after loading through `auto_map`. From then on it would copy the file of the class into
        each folder that is saved to, and make a second class of the copy.
        """
        if cls.__module__.partition(".")[0] != __package__:
            super().register_for_auto_class(*args, **kwargs)


def write_loader(folder: str | PathLike[str], stem: str) -> None:
    """Writes the module that `auto_map` names into `folder`, which is made if need be."""
    path = Path(folder) / LOADER
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        f"from landmark_llama import {', '.join(stem + ending for ending in ENDINGS.values())}  # noqa: F401\n",
        encoding="utf-8",
    )


def auto_map(given: dict[str, Any] | None, stem: str) -> dict[str, Any]:
    """Where the Auto classes find those of a family, whose names begin with `stem`.

    Of the map that a configuration was given, what names code in the same folder stays: that of a subclass.
    """
    ours = {auto: f"{LOADER.removesuffix('.py')}.{stem}{ending}" for auto, ending in ENDINGS.items()}
    return {**ours, **{name: code for name, code in (given or {}).items() if "--" not in str(code)}}
