"""From pictures to pixels: what an image processor does to the geometry, and the one that stands in for timm's."""

import math
from collections.abc import Mapping
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image
from transformers import BitImageProcessorPil
from transformers.image_utils import SizeDict

from hf_nft.errors import DataError

LARGEST_SIDE = 2048
"""Pixels of the largest side that a processor may ask for; the largest classifiers of the Hub see some 800."""
UNREADABLE = (OSError, SyntaxError, ValueError, AttributeError, Image.DecompressionBombError)
"""What Pillow raises on files that are no pictures, damaged ones, and those that claim to be absurdly large."""
LUMINANCE = (0.299, 0.587, 0.114)
"""Weights of red, green and blue in a grey image, as Pillow has them. Source: ITU-R BT.601."""


class Fit:
    """The map behind `ImageClassification.fit`: new images, so that `datasets` stores PNG and not the source's JPEG.

    Args:
        processor: An image processor.
    """

    def __init__(self, processor: Any) -> None:
        self.processor = processor

    def __call__(self, rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
        """Return the images of rows at the size the model sees."""
        return {"image": [Image.fromarray(pixels) for pixels in sized(self.processor, rows["image"])]}


def sized(processor: Any, images: list[Image.Image]) -> np.ndarray:
    """Return images of any mode and size as RGB at the size the model sees.

    Args:
        processor: An image processor.
        images: Pictures.

    Returns:
        uint8 of shape (images, height, width, 3).
    """
    rgb = [_rgb(image) for image in images]
    if all(image.size == exact_size(processor) for image in rgb):
        return stacked(rgb)
    out = processor(images=rgb, do_rescale=False, do_normalize=False, return_tensors="np")
    pixels = np.asarray(out["pixel_values"], dtype=np.float32).transpose(0, 2, 3, 1)
    return pixels.round().clip(0, 255).astype(np.uint8)


def stacked(images: list[Image.Image]) -> np.ndarray:
    """Return RGB images of one size as they are, uint8 of shape (images, height, width, 3)."""
    return np.stack([np.asarray(image) for image in images])


def grey(pixels: torch.Tensor) -> torch.Tensor:
    """Return the luminance of RGB pixels.

    Args:
        pixels: float (rows, 3, H, W).

    Returns:
        float (rows, 1, H, W); what was grey keeps its value.
    """
    weights = torch.tensor(LUMINANCE, dtype=pixels.dtype, device=pixels.device)
    return torch.einsum("nchw,c->nhw", pixels, weights)[:, None]


def stored_images(dataset: datasets.Dataset) -> datasets.Dataset:
    """Take columns that hold picture files for images, as tables have them that other libraries wrote.

    Args:
        dataset: Rows as stored.

    Returns:
        The rows; columns of type binary, or with the fields `bytes` and `path`, are images now.
    """
    for name, feature in dataset.features.items():
        file = isinstance(feature, dict) and feature.keys() == {"bytes", "path"}
        if file or (isinstance(feature, datasets.Value) and feature.dtype in ("binary", "large_binary")):
            dataset = dataset.cast_column(name, datasets.Image())
    return dataset


def exact_size(processor: Any) -> tuple[int, int] | None:
    """Return (width, height) if the processor resizes to exactly that and does no more geometry."""
    size = getattr(processor, "size", None) or {}
    exact = getattr(processor, "do_resize", False) and not getattr(processor, "do_center_crop", False)
    if not exact or "height" not in size or "width" not in size:
        return None
    return int(size["width"]), int(size["height"])


def check_sides(processor: Any) -> None:
    """Refuse a processor that makes pictures of an absurd size, before memory is taken for one.

    Args:
        processor: An image processor.

    Raises:
        DataError: If a side that it asks for exceeds `LARGEST_SIDE`.
    """
    for name in ("size", "crop_size", "pad_size"):
        asked = getattr(processor, name, None)
        for kind, side in dict(asked if isinstance(asked, Mapping | SizeDict) else {"": asked}).items():
            if isinstance(side, int | float) and side > LARGEST_SIDE and "pixels" not in kind:
                raise DataError(
                    f"image processor: expected sides of at most {LARGEST_SIDE} pixels, found {name} = {side:.6g}."
                )


def constants(processor: Any) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Read the normalisation of an image processor.

    Args:
        processor: An image processor.

    Returns:
        Mean and standard deviation, float32 (1, 3 or 1, 1, 1), and what pixels in [0, 255] are multiplied by before.

    Raises:
        DataError: If they are no such numbers.
    """
    mean = getattr(processor, "image_mean", None) if getattr(processor, "do_normalize", False) else None
    std = getattr(processor, "image_std", None) if mean is not None else None
    scale = processor.rescale_factor if getattr(processor, "do_rescale", True) else 1.0
    try:
        shift, spread = (torch.tensor(given).float().view(1, -1, 1, 1) for given in (mean or [0.0], std or [1.0]))
        if {shift.shape[1], spread.shape[1]} - {1, 3}:
            raise ValueError("neither one number nor one for each channel")
        if not (shift.isfinite().all() and spread.isfinite().all() and spread.gt(0).all() and 0 < float(scale) < 256):
            raise ValueError("a deviation or a scale of no use")
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(
            f"image processor: expected means and deviations, one or three each, found {str(mean)[:60]} and "
            f"{str(std)[:60]} after a scale of {str(scale)[:20]}. Mend preprocessor_config.json."
        ) from error
    return shift, spread, float(scale)


def from_timm(data_config: Mapping[str, Any]) -> BitImageProcessorPil:
    """Return the processor of transformers that does what timm's evaluation transform does.

    Args:
        data_config: `input_size` (channels, height, width), `crop_pct`, `crop_mode`, `interpolation`, `mean`, `std`.

    Returns:
        Resize, centre crop, rescale, normalise.

    Raises:
        ValueError: If timm does something else with these images.

    Source: timm.data.transforms_factory.transforms_imagenet_eval.
    """
    _, height, width = data_config["input_size"]
    mode = data_config.get("crop_mode") or "center"
    scaled = [math.floor(side / data_config.get("crop_pct", 0.875)) for side in (height, width)]
    if mode not in ("center", "squash") or (mode == "center" and height != width):
        raise ValueError(f"crop_mode {mode} at {height} x {width}")
    size = {"shortest_edge": scaled[0]} if mode == "center" else {"height": scaled[0], "width": scaled[1]}
    return BitImageProcessorPil(
        size=size,
        crop_size={"height": height, "width": width},
        resample=Image.Resampling[data_config.get("interpolation", "bilinear").upper()],
        image_mean=list(data_config["mean"]),
        image_std=list(data_config["std"]),
        do_convert_rgb=True,
    )


def unreadable(error: Exception) -> DataError:
    """Return the error that says that a picture cannot be read, and why."""
    why = "an empty cell" if isinstance(error, AttributeError) else str(error)[:150]
    return DataError(f"images: expected readable images, found one that is not ({why}). Remove or replace it.")


def _rgb(image: Image.Image) -> Image.Image:
    """Convert any mode to RGB; 16-bit grey is scaled, not clipped; an alpha channel is dropped."""
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image, dtype=np.uint32) >> 8).clip(0, 255).astype(np.uint8))
    return image if image.mode == "RGB" else image.convert("RGB")
