"""Figures of a run: where the masks of each layer ended, and how every stage's loss went.

`draw_*` builds a figure, `*_figure` saves it; no global state of matplotlib is read or changed. Colours are told apart
by people with any kind of colour vision (one hue from light to dark; Okabe and Ito's palette).
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap, LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter
from torch import Tensor

from hf_nft.errors import DataError

BINS = 20  # cells of equal width over [0, 1]; the last one includes 1
MOST_NAMES = 70  # layer names that fit a figure; beyond it every second, third ... is written
VERMILLION, BLUE = "#D55E00", "#0072B2"
COLOURS = (BLUE, "#E69F00", "#009E73", "#CC79A7", "#56B4E9", VERMILLION, "#000000")
DASHES = ("-", "--", ":", "-.")
DPI = 150
CAPTIONS = {"masks": "Masks by layer", "loss": "Loss of every stage"}
"""Figures that a run folder may hold in `figures/`, in the order of the card."""


@dataclass(frozen=True)
class LayerMasks:
    """What the mask figure says about one layer.

    Attributes:
        name: Layer name without the part that all layers share.
        shares: float64 (BINS,): share of the layer's units in each cell; adds up to 1.
        floor: Lowest value its masks may take; None if not known.
        off: Units at 0.
        held: Units at the floor, if that is above 0.
        units: Number of units.
    """

    name: str
    shares: np.ndarray
    floor: float | None
    off: int
    held: int
    units: int


def figures_of(folder: Path) -> list[tuple[str, str]]:
    """List the figures of a run folder: captions with paths relative to it.

    Args:
        folder: The folder that holds `figures/`.

    Returns:
        Those that are there; figures of unknown names come last, under their name.
    """
    names = sorted(file.stem for file in (folder / "figures").glob("*.png"))
    ordered = [name for name in CAPTIONS if name in names] + [name for name in names if name not in CAPTIONS]
    return [(CAPTIONS.get(name, name), f"figures/{name}.png") for name in ordered]


def mask_facts(masks: Mapping[str, Tensor], floors: Mapping[str, float]) -> list[LayerMasks]:
    """Collect what the mask figure shows.

    Args:
        masks: Layer name -> masks of shape (units,), in [0, 1].
        floors: Layer name -> floor; layers may be missing.

    Returns:
        One entry per layer, in order; layers without units are left out.
    """
    names = short_names(list(masks))
    facts = []
    for short, (name, mask) in zip(names, masks.items(), strict=True):
        values = mask.detach().float().cpu().flatten()
        if not values.numel():
            continue
        counts = torch.bincount((values.clamp(0, 1) * BINS).long().clamp(max=BINS - 1), minlength=BINS)
        floor = floors.get(name)
        off = int((values <= 0).sum())
        # comparing in the masks' own precision: a projection to 0.8 leaves float32(0.8), which is above it
        low = int((values <= torch.tensor(floor).float()).sum()) if floor is not None and floor > 0 else off
        facts.append(LayerMasks(short, counts.double().numpy() / len(values), floor, off, low - off, len(values)))
    return facts


def draw_masks(facts: Sequence[LayerMasks]) -> Figure:
    """Draw one strip per layer, first layer on top, and beside it how many units are off or at the floor.

    Args:
        facts: At least one layer.

    Returns:
        The figure: axes `strips`, `low` and the colour scale.
    """
    rows = len(facts)
    height = min(14.0, max(3.2, 1.5 + 0.19 * rows))
    figure = Figure(figsize=(9.0, height), dpi=DPI, layout="constrained")
    strips, low = figure.subplots(1, 2, sharey=True, width_ratios=[3, 1])
    _draw_strips(figure, strips, facts)
    _draw_low(low, facts)
    every = math.ceil(rows / MOST_NAMES)
    size = 8 if rows <= 40 else 6
    strips.set_yticks(
        list(range(0, rows, every)), [fact.name for fact in facts[::every]], fontsize=size, parse_math=False
    )
    strips.set_ylim(rows - 0.5, -0.5)
    strips.set_ylabel("masked layer, in order")
    units = sum(fact.units for fact in facts)
    off = sum(fact.off for fact in facts)
    figure.suptitle(f"{units} masks in {rows} layer{'s' * (rows > 1)}, {off} of them at 0", fontsize=11)
    return figure


def _draw_strips(figure: Figure, axes: Axes, facts: Sequence[LayerMasks]) -> None:
    axes.set_label("strips")
    shares = np.stack([fact.shares for fact in facts])
    smallest = min(1 / fact.units for fact in facts)
    mesh = axes.pcolormesh(
        np.linspace(0, 1, BINS + 1),
        np.arange(len(facts) + 1) - 0.5,
        np.ma.masked_equal(shares, 0),  # empty cells stay white: one single unit must stand out from none
        cmap=ListedColormap(colormaps["Blues"](np.linspace(0.2, 1, 200))),
        norm=LogNorm(vmin=min(smallest, 0.01), vmax=1),
    )
    known = [(row, fact.floor) for row, fact in enumerate(facts) if fact.floor]  # 0 is the edge of the axes anyway
    if known:
        at = [row for row, _ in known]
        lines = axes.vlines(
            [floor for _, floor in known], [row - 0.5 for row in at], [row + 0.5 for row in at],
            color=VERMILLION, linewidth=2, label="floor", clip_on=False,
        )  # fmt: skip
        axes.legend(handles=[lines], loc="lower right", bbox_to_anchor=(1, 1), frameon=False, fontsize=8, borderpad=0)
    axes.set_xlim(0, 1)
    axes.set_xlabel("mask value (1: unit unchanged, 0: unit off)")
    bar = figure.colorbar(mesh, ax=axes, location="left", pad=0.02, aspect=40, shrink=0.9)
    bar.set_label("share of the layer's units (white: none)", fontsize=8)
    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:g} %"))
    bar.ax.yaxis.set_minor_formatter(NullFormatter())
    bar.ax.tick_params(labelsize=7)


def _draw_low(axes: Axes, facts: Sequence[LayerMasks]) -> None:
    axes.set_label("low")
    rows = list(range(len(facts)))
    off, held = [fact.off for fact in facts], [fact.held for fact in facts]
    if any(off) or not any(held):
        axes.barh(rows, off, color=VERMILLION, label="at 0")
    if any(held):
        axes.barh(rows, held, left=off, color=BLUE, hatch="///", edgecolor="white", label="at the floor, above 0")
    most = max(1, *(a + b for a, b in zip(off, held, strict=True)))
    for row, total in enumerate(a + b for a, b in zip(off, held, strict=True)):
        if total:
            axes.text(total + 0.02 * most, row, str(total), va="center", fontsize=6 if len(facts) > 40 else 7)
    axes.set_xlim(0, 1.2 * most)
    axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes.tick_params(axis="y", length=0, labelleft=False)
    axes.set_xlabel("units")
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), frameon=False, fontsize=8, borderpad=0)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def mask_figure(masks: Mapping[str, Tensor], floors: Mapping[str, float], path: Path) -> None:
    """Save the distribution of the masks, layer by layer, as a PNG.

    Args:
        masks: Layer name -> masks of shape (units,), in [0, 1].
        floors: Layer name -> floor; layers may be missing.
        path: File to write.

    Raises:
        DataError: If there is no mask.
    """
    facts = mask_facts(masks, floors)
    if not facts:
        raise DataError("mask_figure: expected masks, found none. Draw it for runs with an adapter only.")
    draw_masks(facts).savefig(path)


def group_stages(names: Sequence[str]) -> dict[str, list[str]]:
    """Put repetitions of a stage together: `exposure 1/6: unlearn` belongs to `exposure: unlearn`.

    Args:
        names: Stage names, in order.

    Returns:
        Group -> its stages, both in order of appearance; a stage that is not repeated is its own group.
    """
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(re.sub(r"\s*\b\d+\s*/\s*\d+\b", "", name).strip() or name, []).append(name)
    return groups


def draw_losses(losses: Mapping[str, Sequence[float]]) -> Figure:
    """Draw the loss of every stage: one panel per group of repeated stages, in order, one line per stage.

    Args:
        losses: Stage name -> loss of every step; at least one stage with a step.

    Returns:
        The figure, with one axes per group labelled with its name.
    """
    groups = group_stages([name for name, values in losses.items() if len(values)])
    columns = min(3, len(groups))
    lines = math.ceil(len(groups) / columns)
    figure = Figure(figsize=(max(6.0, 3.6 * columns), 0.4 + 2.9 * lines), dpi=DPI, layout="constrained")
    panels = list(figure.subplots(lines, columns, squeeze=False).flat)
    for number, (axes, (group, stages)) in enumerate(zip(panels, groups.items(), strict=False), start=1):
        _draw_group(axes, f"{number}. {_printable(group)}" if len(groups) > 1 else _printable(group), stages, losses)
        axes.set_label(group)
    for axes in panels[len(groups) :]:
        axes.remove()
    figure.supylabel("loss (nats)", fontsize=10)
    return figure


def _draw_group(axes: Axes, title: str, stages: Sequence[str], losses: Mapping[str, Sequence[float]]) -> None:
    for i, stage in enumerate(stages):
        values = np.asarray(losses[stage], dtype=np.float64)
        steps = np.arange(1.0, len(values) + 1)
        colour, dash = COLOURS[i % len(COLOURS)], DASHES[i // len(COLOURS) % len(DASHES)]
        window = len(values) // 50
        if window > 1:  # long stages: the noise stays visible, the trend gets a line
            axes.plot(steps, values, color=colour, linewidth=0.6, alpha=0.3)
            values = np.convolve(values, np.ones(window) / window, mode="valid")
            steps = steps[: len(values)] + (window - 1) / 2
        marker = "o" if len(values) == 1 else None
        axes.plot(steps, values, color=colour, linestyle=dash, linewidth=1.3, marker=marker, label=_ordinal(stage, i))
    axes.set_title(f"{title} ({len(stages)}x)" if len(stages) > 1 else title, fontsize=10, parse_math=False)
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.grid(alpha=0.25)
    axes.tick_params(labelsize=8)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    if 1 < len(stages) <= 12:
        axes.legend(fontsize=7, ncols=2 if len(stages) > 4 else 1, framealpha=0.7, loc="best")


def loss_figure(losses: Mapping[str, Sequence[float]], path: Path) -> None:
    """Save the losses of a run as a PNG; writes nothing if no stage made a step, as for the control `identity`.

    Args:
        losses: Stage name -> loss of every step, in order.
        path: File to write.
    """
    if any(len(values) for values in losses.values()):
        draw_losses(losses).savefig(path)


def _ordinal(stage: str, index: int) -> str:
    found = re.search(r"\b(\d+\s*/\s*\d+)\b", stage)
    return found.group(1) if found else str(index + 1)


def short_names(names: list[str]) -> list[str]:
    """Strip whole leading name parts that all layers share, and cut what is left to a length that fits."""
    parts = [name.split(".") for name in names]
    shared = 0
    while len(names) > 1 and all(len(p) > shared + 1 and p[shared] == parts[0][shared] for p in parts):
        shared += 1
    kept = [_printable(".".join(p[shared:])) for p in parts]
    return [name if len(name) <= 40 else f"...{name[-37:]}" for name in kept]


def _printable(text: str) -> str:
    """Replace what the figure's font may lack."""
    return "".join(char if " " <= char <= "~" else "?" for char in text)
