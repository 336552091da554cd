"""The heat map of an answer: where in the memory each layer read, and each step."""

from __future__ import annotations

import io
import warnings

import torch
from torch import Tensor

COLUMNS = 160  # places of the memory that are told apart


def heat_map(weights: Tensor, tokens: list[str]) -> bytes:
    """A PNG with two panels: places of the memory by layer, and by step.

    Args:
        weights: (steps, layers, blocks), as from `passages.block_weights`.
        tokens: of the answer, one a step.

    Raises:
        ValueError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("a heat map needs matplotlib: pip install matplotlib") from error

    steps, layers, blocks = weights.shape
    by_layer, by_step = weights.mean(0), weights.mean(1)
    figure = Figure(figsize=(10, 2.2 + 0.3 * layers + 3.2), layout="constrained", dpi=110)
    upper, lower = figure.subplots(2, 1, height_ratios=[0.3 * layers + 0.6, 3.2])
    by_layer, by_step = (_in_places(x).sqrt().numpy() for x in (by_layer, by_step))
    most = max(by_layer.max(), by_step.max())
    settings = {"aspect": "auto", "interpolation": "nearest", "cmap": "Oranges", "vmin": 0, "vmax": most}
    # the colour is the square root of the share, so that small ones are seen
    upper.imshow(by_layer, extent=(0, 100, layers - 0.5, -0.5), **settings)
    upper.set(xlabel="place in the memory (%)", ylabel="layer", yticks=range(layers), title="Where each layer reads")
    image = lower.imshow(by_step.T, extent=(-0.5, steps - 0.5, 100, 0), **settings)
    lower.set(xlabel="token of the answer", ylabel="place (%)", title="Where each token of the answer was read")
    if steps <= 40:
        # "$" would begin a formula
        labels = ["".join(filter(str.isprintable, text)).strip().replace("$", r"\$") or "·" for text in tokens[:steps]]
        lower.set_xticks(range(len(labels)), labels, rotation=60, fontsize=8)
    figure.colorbar(image, ax=[upper, lower], label="share of attention, square root", shrink=0.7)
    written = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # is drawn as a box
        figure.savefig(written, format="png")
    return written.getvalue()


def _in_places(weights: Tensor) -> Tensor:
    """(rows, blocks) summed to (rows, COLUMNS), or as they are where there are fewer blocks."""
    rows, blocks = weights.shape
    if blocks <= COLUMNS:
        return weights
    place = torch.arange(blocks) * COLUMNS // blocks
    return weights.new_zeros(rows, COLUMNS).index_add_(1, place, weights)
