"""Figures: what is drawn is checked on the artists, not on pixels."""

import itertools
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from hf_nft.errors import DataError
from hf_nft.reporting.figures import (
    BINS,
    draw_losses,
    draw_masks,
    group_stages,
    loss_figure,
    mask_facts,
    mask_figure,
)

MASKS = {
    "net.layer1.bn": torch.tensor([1.0, 1.0, 0.5, 0.0]),
    "net.layer2.bn": torch.tensor([0.8, 1.0]),  # 0.8 in float32 lies above the floor 0.8
}
FLOORS = {"net.layer1.bn": 0.0, "net.layer2.bn": 0.8}


def png_size(path: Path) -> tuple[int, int]:
    header = path.read_bytes()[:24]
    assert header.startswith(b"\x89PNG")
    width, height = struct.unpack(">II", header[16:24])
    return width, height


def test_mask_facts() -> None:
    first, second = mask_facts(MASKS, FLOORS)
    assert (first.name, second.name) == ("layer1.bn", "layer2.bn")
    assert (first.off, first.held, second.off, second.held) == (1, 0, 0, 1)
    assert first.shares[[0, BINS // 2, BINS - 1]].tolist() == [0.25, 0.25, 0.5]
    assert second.shares.sum() == 1


def test_mask_figure_shows_the_facts() -> None:
    figure = draw_masks(mask_facts(MASKS, FLOORS))
    axes = {ax.get_label(): ax for ax in figure.axes}
    strips, low = axes["strips"], axes["low"]
    assert [label.get_text() for label in strips.get_yticklabels()] == ["layer1.bn", "layer2.bn"]
    cells = strips.collections[0].get_array().reshape(2, BINS)
    assert cells.compressed().tolist() == [0.25, 0.25, 0.5, 0.5, 0.5]
    floors = strips.collections[1].get_segments()
    assert np.asarray(floors).tolist() == [[[0.8, 0.5], [0.8, 1.5]]]
    assert [bar.get_width() for bar in low.patches] == [1, 0, 0, 1]
    assert [text.get_text() for text in low.texts] == ["1", "1"]
    assert figure.get_suptitle() == "6 masks in 2 layers, 1 of them at 0"
    assert strips.yaxis_inverted()


def test_many_layers_stay_readable(tmp_path: Path) -> None:
    masks = {f"model.layers.{i}.attention.output": torch.rand(16) for i in range(160)}
    figure = draw_masks(mask_facts(masks, {}))
    strips = next(ax for ax in figure.axes if ax.get_label() == "strips")
    assert len(strips.get_yticks()) == 54  # every third
    assert figure.get_size_inches()[1] <= 14
    figure.canvas.draw()
    boxes = [label.get_window_extent() for label in strips.get_yticklabels()]
    assert all(below.y1 <= above.y0 for above, below in itertools.pairwise(boxes))


def test_mask_figure_writes_a_png(tmp_path: Path) -> None:
    names = {"net.$\\frac$.x": torch.ones(3), "net.\u540d\u524d.x": torch.zeros(2), "net.none.x": torch.ones(0)}
    mask_figure(names, {}, tmp_path / "masks.png")
    width, height = png_size(tmp_path / "masks.png")
    assert width == 1350
    assert 400 <= height <= 2100
    with pytest.raises(DataError, match="expected masks"):
        mask_figure({}, {}, tmp_path / "none.png")


def test_stages_are_grouped_in_order() -> None:
    names = ["exposure 1/2: unlearn", "exposure 1/2: relearn", "exposure 2/2: unlearn", "masks", "3/4"]
    assert group_stages(names) == {
        "exposure: unlearn": ["exposure 1/2: unlearn", "exposure 2/2: unlearn"],
        "exposure: relearn": ["exposure 1/2: relearn"],
        "masks": ["masks"],
        "3/4": ["3/4"],
    }


def test_loss_figure_has_a_panel_per_group_and_a_line_per_stage() -> None:
    losses = {"exposure 1/2: unlearn": [-1.0, -2.0], "exposure 2/2: unlearn": [-3.0], "masks": [2.0, 1.0, 0.5]}
    figure = draw_losses({**losses, "skipped": []})
    first, second = figure.axes
    assert [first.get_title(), second.get_title()] == ["1. exposure: unlearn (2x)", "2. masks"]
    assert [line.get_ydata().tolist() for line in first.lines] == [[-1.0, -2.0], [-3.0]]
    assert [text.get_text() for text in first.get_legend().get_texts()] == ["1/2", "2/2"]
    assert second.lines[0].get_xdata().tolist() == [1, 2, 3]
    assert second.get_xlabel() == "step"
    assert figure.get_supylabel() == "loss (nats)"


def test_long_stages_get_a_centred_trend() -> None:
    raw, trend = draw_losses({"plant": [float(i) for i in range(1, 501)]}).axes[0].lines
    assert len(raw.get_xdata()) == 500
    np.testing.assert_allclose(trend.get_xdata(), trend.get_ydata())


def test_loss_figure_writes_a_png_or_nothing(tmp_path: Path) -> None:
    loss_figure({f"stage {c}": [1.0, 0.5] for c in "abcde"}, tmp_path / "loss.png")
    assert png_size(tmp_path / "loss.png") == (1620, 930)
    loss_figure({"masks": []}, tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()
