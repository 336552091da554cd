"""What rows come to: perplexity and bits per byte with intervals over documents, paired differences, table, picture."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, log
from pathlib import Path

import numpy as np

RESAMPLES = 2000
FEWEST_DOCUMENTS = 5  # of an interval: resampling fewer makes it far too narrow
_TRAINED_AT = ": trained at "
# Okabe and Ito's colours, told apart with any kind of colour vision; markers tell them apart in print.
_STYLES = (("#0072B2", "o", "-"), ("#D55E00", "s", "--"), ("#009E73", "^", "-."), ("#CC79A7", "D", "--"))
_MORE_STYLES = (("#E69F00", "v", "-."), ("#56B4E9", "P", "--"), ("#000000", "X", ":"))


@dataclass(frozen=True)
class Measured:
    """The rows of one method, and how to call it."""

    label: str
    rows: Sequence[dict]
    training_context: int | None

    def lengths(self) -> list[int]:
        return sorted({row["length"] for row in self.rows})

    def documents(self, length: int) -> dict[str, np.ndarray]:
        """By digest: nats, tokens and bytes of what was scored in a document at this length."""
        sums: dict[str, np.ndarray] = defaultdict(lambda: np.zeros(3))
        for row in self.rows:
            if row["length"] == length:
                sums[row["digest"]] += (row["nll"], row["tokens"], row["bytes"])
        return dict(sorted(sums.items()))


def resampled(documents: Sequence[np.ndarray], seed: int) -> np.ndarray:
    """Sums (resamples, columns) over as many documents, drawn with replacement, of their numbers (columns,)."""
    number = len(documents)
    drawn = np.random.default_rng(seed).multinomial(number, [1 / number] * number, size=RESAMPLES)
    return drawn @ np.stack(documents)


def interval(values: np.ndarray, documents: int) -> tuple[float | None, float | None]:
    """The middle 95 % of resampled values; (None, None) for fewer than `FEWEST_DOCUMENTS`."""
    if documents < FEWEST_DOCUMENTS:
        return None, None
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)


def summarise(measured: Measured, seed: int) -> list[dict]:
    """One entry a length, shortest first. Losses are summed over all documents before they are divided."""
    summary = []
    for length in measured.lengths():
        documents = list(measured.documents(length).values())
        nll, tokens, size = np.sum(documents, axis=0)
        draws = resampled(documents, seed)
        low, high = interval(np.exp(draws[:, 0] / draws[:, 1]), len(documents))
        bits_low, bits_high = interval(draws[:, 0] / log(2) / draws[:, 2], len(documents))
        rows = [row for row in measured.rows if row["length"] == length]
        summary.append(
            {
                "method": measured.label,
                "length": length,
                "documents": len(documents),
                "windows": len(rows),
                "tokens": int(tokens),
                "bytes": int(size),
                "perplexity": exp(nll / tokens),
                "ci_low": low,
                "ci_high": high,
                "bits_per_byte": nll / log(2) / size,
                "bits_per_byte_ci_low": bits_low,
                "bits_per_byte_ci_high": bits_high,
                "seconds_per_window": sum(row["seconds"] for row in rows) / len(rows),
            }
        )
    return summary


def perplexity_ratio(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray], seed: int) -> dict:
    """Perplexity of ours over theirs, with its interval, both on the same documents: below 1, ours is better.

    ours, theirs: nats, tokens and bytes of each document, as `Measured.documents` gives them.
    """
    common = sorted(ours.keys() & theirs.keys())
    pairs = [np.concatenate([ours[name], theirs[name]]) for name in common]
    nll, tokens, _, other_nll, other_tokens, _ = np.sum(pairs, axis=0)
    draws = resampled(pairs, seed)
    low, high = interval(np.exp(draws[:, 0] / draws[:, 1] - draws[:, 3] / draws[:, 4]), len(pairs))
    ratio = exp(nll / tokens - other_nll / other_tokens)
    return {"documents": len(pairs), "perplexity_ratio": ratio, "ci_low": low, "ci_high": high}


def compare_methods(measured: Sequence[Measured], seed: int) -> list[dict]:
    """The first method against each other one, at every length that both have."""
    ours, *others = measured
    return [
        {
            "length": length,
            "method": ours.label,
            "against": other.label,
            **perplexity_ratio(ours.documents(length), other.documents(length), seed),
        }
        for other in others
        for length in sorted(set(ours.lengths()) & set(other.lengths()))
    ]


def compare_lengths(measured: Sequence[Measured], seed: int, base: int | None = None) -> list[dict]:
    """Each other context of a method against the one of `base` tokens; None: its shortest one."""
    gains = []
    for one in measured:
        against = one.lengths()[0] if base is None else base
        for length in one.lengths() if against in one.lengths() else []:
            if length != against:
                ratio = perplexity_ratio(one.documents(length), one.documents(against), seed)
                gains.append({"length": length, "method": one.label, "against": against, **ratio})
    return gains


def table(summary: Sequence[dict], differences: Sequence[dict] = (), gains: Sequence[dict] = ()) -> str:
    """A line a length and method, with the ratios of perplexities that there are."""
    width = max(len(entry["method"]) for entry in summary)
    against = {(entry["against"], entry["length"]): entry for entry in differences}
    gained = {(entry["method"], entry["length"]): entry for entry in gains}
    head = f"{'length':>8} {'method':<{width}} {'perplexity':>11} {'95 %':>15} {'bits/byte':>9} {'tokens':>9} {'s':>7}"
    if differences:
        head += f" | {differences[0]['method'] + ' / this':>22}"
    if gains:
        shortest = min(entry["length"] for entry in summary)
        base = {entry["against"] for entry in gains}
        head += f" | {'this / shortest' if base == {shortest} else f'this / {max(base)} tokens':>22}"
    lines = [head, "-" * len(head)]
    for entry in sorted(summary, key=lambda entry: entry["length"]):
        key = entry["method"], entry["length"]
        line = (
            f"{entry['length']:>8} {entry['method']:<{width}} {entry['perplexity']:>11.4g} {_interval_cell(entry)} "
            f"{entry['bits_per_byte']:>9.4f} {entry['tokens']:>9} {entry['seconds_per_window']:>7.2f}"
        )
        if differences:
            line += f" | {_ratio_cell(against.get(key))}"
        if gains:
            line += f" | {_ratio_cell(gained.get(key))}"
        lines.append(line.rstrip())
    return "\n".join(lines)


def _ratio_cell(entry: dict | None) -> str:
    if entry is None:
        return " " * 22
    interval = "" if entry["ci_low"] is None else f" ({entry['ci_low']:.3f}-{entry['ci_high']:.3f})"
    return f"{entry['perplexity_ratio']:.4f}{interval}".rjust(22)


def _interval_cell(entry: dict) -> str:
    return f"{'-':>15}" if entry["ci_low"] is None else f"{entry['ci_low']:.4g}-{entry['ci_high']:.4g}".rjust(15)


def plot_perplexity(measured: Sequence[Measured], seed: int, path: Path) -> None:
    """Perplexity over length, a line a method, with bars; dotted lines where each training context ends."""
    draw(measured, seed).savefig(path)


def draw(measured: Sequence[Measured], seed: int):
    """The figure, which needs no display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 5.0), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    styles = (_STYLES + _MORE_STYLES) * len(measured)
    for i, (one, style) in enumerate(zip(measured, styles, strict=False)):
        shift = 1.02 ** (i - (len(measured) - 1) / 2)  # keeps the bars of two methods apart
        _draw_line(axes, summarise(one, seed), one.label, shift, style)
    contexts: dict[int, list[tuple[str, str]]] = defaultdict(list)
    for one, (colour, _, _) in zip(measured, styles, strict=False):
        if one.training_context:
            contexts[one.training_context].append((one.label, colour))
    for context, methods in contexts.items():
        names = "all" if len(contexts) == 1 else ", ".join(name for name, _ in methods[:2])
        if len(contexts) > 1 and len(methods) > 2:  # a legend has to fit its picture
            names += f" and {len(methods) - 2} more"
        colour = "0.3" if len(contexts) == 1 else methods[0][1]
        label = f"{names}{_TRAINED_AT}{context:,} positions"
        axes.axvline(context, color=colour, linestyle=":", linewidth=1.5, label=label)
    _label(axes, sorted({length for one in measured for length in one.lengths()}), list(contexts))
    handles, labels = axes.get_legend_handles_labels()  # dotted lines come first; methods shall
    order = sorted(range(len(labels)), key=lambda i: _TRAINED_AT in labels[i])
    handles, labels = [handles[i] for i in order], [labels[i] for i in order]
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    return figure


def _draw_line(axes, entries: Sequence[dict], label: str, shift: float, style: tuple[str, str, str]) -> None:
    colour, marker, line = style
    x, y = [entry["length"] * shift for entry in entries], [entry["perplexity"] for entry in entries]
    ends = [(entry["ci_low"] or entry["perplexity"], entry["ci_high"] or entry["perplexity"]) for entry in entries]
    below = [max(0.0, value - low) for value, (low, _) in zip(y, ends, strict=True)]
    above = [max(0.0, high - value) for value, (_, high) in zip(y, ends, strict=True)]
    axes.errorbar(x, y, (below, above), label=label, color=colour, marker=marker, linestyle=line, capsize=3)


def _label(axes, lengths: Sequence[int], contexts: Sequence[int]) -> None:
    from matplotlib.ticker import LogLocator, MaxNLocator, ScalarFormatter

    axes.set_xscale("log", base=2)
    axes.set_xlim(min([*lengths, *contexts]) / 1.25, max([*lengths, *contexts]) * 1.25)
    axes.set_xticks(lengths, [f"{length:,}" for length in lengths], rotation=45 if len(lengths) > 8 else 0)
    low, high = axes.get_ylim()
    if high > 4 * max(low, 1):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    else:
        axes.yaxis.set_major_locator(MaxNLocator(6))
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.minorticks_off()
    axes.set_xlabel("context (tokens)")
    axes.set_ylabel("perplexity of a token")
    axes.grid(alpha=0.25)
