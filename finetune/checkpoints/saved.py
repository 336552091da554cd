"""What a run trains, and whether all of it stands in the files that were written."""

from pathlib import Path

from safetensors import safe_open
from torch import nn

# peft's own parts of a name, which it leaves out of the names in its files: of an adapter, of a module trained whole
PEFT_PARTS = ("default", "modules_to_save")


def trained_weights(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """The shape of each weight that `model` trains, by its name in the saved file.

    To be asked before anything wraps the model: DDP, FSDP, activation checkpointing and compilation change names.
    """
    left_out = PEFT_PARTS if hasattr(model, "peft_config") else ()
    shapes = {}
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            name = ".".join(part for part in name.split(".") if part not in left_out)
            shapes[name] = tuple(getattr(weight, "ds_shape", weight.shape))  # DeepSpeed's own are empty
    return shapes


def find_loss(folder: Path, trained: dict[str, tuple[int, ...]]) -> str | None:
    """What the safetensors files in `folder` lack of `trained`, as a sentence; None if they hold all of it."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as weights:
            found |= {name: tuple(weights.get_slice(name).get_shape()) for name in weights.keys()}  # noqa: SIM118
    lost = [name for name, shape in trained.items() if found.get(name) != shape]
    if not lost:
        return None
    return (
        f"{folder}: {len(lost)} of the {len(trained)} trained weights were not saved as they are, the first of them "
        f"{lost[0]} of shape {trained[lost[0]]}; this is a fault of the program, the model there is not the trained one"
    )
