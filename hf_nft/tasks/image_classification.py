"""Image classification: pixels as uint8 on the device, geometry by the model's own processor, CE under MixUp.

Rows are encoded as `pixels` (rows, 3, H, W) uint8 and `labels` (rows,) int64. Augmentation is the reference's: pad
4/32 of the side, random crop, horizontal flip; it comes before normalisation, mixing after (same as the published
order, crop -> flip -> normalise -> MixUp).
"""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import datasets
import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

from hf_nft.errors import DataError
from hf_nft.hub import first_line
from hf_nft.tasks._divergence import kl_to, soften
from hf_nft.tasks._labels import by_number, fold
from hf_nft.tasks._pixels import (
    UNREADABLE,
    Fit,
    check_sides,
    constants,
    exact_size,
    from_timm,
    grey,
    sized,
    stacked,
    stored_images,
    unreadable,
)
from hf_nft.tasks.base import Metric, Task
from hf_nft.types import Batch, Draw, Inputs

LABEL_COLUMNS = ("label", "labels", "fine_label", "class", "target")


@dataclass(eq=False)
class ImageClassification(Task):
    """One label per RGB image."""

    name = "image_classification"
    auto_class = "AutoModelForImageClassification"
    pipeline_tag = "image-classification"
    architectures = ("ForImageClassification",)
    input_column = "image"
    target_column = "label"
    blank: ClassVar[dict[str, list[Any]]] = {"image": [Image.new("RGB", (224, 224))], "label": [0]}
    axes = 2
    augmentations = ("crop_flip", "crop")  # signs and digits must not be mirrored
    metrics = (
        Metric("acc", "accuracy", "clean", "label", "target"),
        Metric("asr", "attack_success_rate", "triggered", "label", "attack"),
        Metric("racc", "accuracy", "triggered", "label", "target"),
    )

    def __post_init__(self) -> None:
        """Read the normalisation of the image processor."""
        check_sides(self.processor)
        self._mean, self._std, self._scale = constants(self.processor)

    @classmethod
    def load_processor(cls, folder: str) -> Any:
        """Load the image processor of a model folder (Pillow backend where torchvision is absent)."""
        from transformers import AutoImageProcessor

        try:
            processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=False)
            return from_timm(processor.data_config) if hasattr(processor, "data_config") else processor
        except Exception as error:  # a stranger's files reach every line of a processor's code
            raise DataError(
                f"{folder}: expected an image processor (preprocessor_config.json), found none that loads "
                f"({first_line(error)})."
            ) from error

    @classmethod
    def standardize(cls, dataset: datasets.Dataset, columns: Mapping[str, str]) -> datasets.Dataset:
        """Rename the image and the label column to `image` and `label`."""
        dataset = stored_images(dataset)
        features = dataset.features
        images = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
        classes = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
        image = columns.get("image") or ("image" if "image" in images else images[0] if len(images) == 1 else None)
        named = [name for name in LABEL_COLUMNS if name in features]
        label = columns.get("label") or (named[0] if named else classes[0] if len(classes) == 1 else None)
        for role, name, flag in (("image", image, "image"), ("label", label, "label")):
            if name is None or name not in features:
                raise DataError(
                    f"{role} column: expected {name or 'one that can be recognised'!r}, found columns "
                    f"{list(features)}. Name it with --column {flag}=NAME."
                )
        if not isinstance(features[image], datasets.Image):
            raise DataError(f"column '{image}': expected images, found {features[image]}. Name it with --column.")
        if not isinstance(features[label], datasets.ClassLabel | datasets.Value):
            raise DataError(
                f"column '{label}': expected labels, found {features[label]}. Name it with --column label=NAME."
            )
        kept = dataset.select_columns([image, label])
        renamed = kept.rename_columns({k: v for k, v in ((image, "image"), (label, "label")) if k != v})
        if renamed.features["image"] != datasets.Image():  # undecoded, or grey whatever is put in
            renamed = renamed.cast_column("image", datasets.Image())
        values = np.asarray(renamed["label"])
        if values.dtype.kind in "Of" and any(value is None or value != value for value in values):
            raise DataError("column 'label': expected a label in every row, found rows without. Remove those rows.")
        if values.dtype.kind == "f" and not (values % 1).any():  # whole numbers, as tables with gaps hold them
            renamed = renamed.cast_column("label", datasets.Value("int64"))
        elif values.dtype.kind not in "iu":
            names = sorted({str(value) for value in values})
            feature = datasets.ClassLabel(names=names)
            renamed = renamed.map(lambda row: {"label": str(row["label"])}).cast_column("label", feature)
        if values.dtype.kind in "iuf" and values.min() < 0:
            raise DataError(
                "column 'label': expected labels >= 0, found -1 (an unlabelled split?). Choose another split."
            )
        return renamed

    def align(self, dataset: datasets.Dataset, model: nn.Module) -> datasets.Dataset:
        """Map labels to the model's ids, by name, else by id with a warning.

        Args:
            dataset: Rows with canonical columns.
            model: The suspect.

        Returns:
            The rows with the model's label numbers.

        Raises:
            DataError: If names overlap only in part, or a label has no place in the model.
        """
        names: Any = model.config.id2label  # type: ignore[union-attr]
        wanted = [str(names.get(i, f"LABEL_{i}")) for i in range(self.classes(model))]  # a PVT may have fewer names
        feature = dataset.features["label"]
        have = feature.names if isinstance(feature, datasets.ClassLabel) else None
        if have is not None:
            ids = {fold(name): i for i, name in enumerate(wanted)}
            if len(ids) < len(wanted) and len(have) != len(wanted):
                twice = sorted({name for name in wanted if ids[fold(name)] != wanted.index(name)})
                raise DataError(
                    f"labels: expected a name for each of the model's classes, found {twice[:5]} more than once. Pass "
                    f"a data set that has all {len(wanted)} classes in the model's order."
                )
            matched = [ids.get(fold(name)) for name in have] if len(ids) == len(wanted) else [None]
            if all(i is not None for i in matched):
                if matched == list(range(len(wanted))):
                    return dataset
                target = datasets.Features({**dataset.features, "label": datasets.ClassLabel(names=wanted)})
                return dataset.map(
                    lambda rows: {"label": [matched[y] for y in rows["label"]]}, batched=True, features=target
                )
            if any(i is not None for i in matched):
                lost = [name for name, i in zip(have, matched, strict=True) if i is None]
                raise DataError(
                    f"labels: expected every data set label among the model's {wanted[:8]}, found {lost[:5]} missing. "
                    f"Rename the labels or choose the data set the model was trained on."
                )
        count = len(have) if have else 1 + int(np.max(np.asarray(dataset["label"][:])))
        if count > len(wanted):
            raise DataError(
                f"labels: expected at most the model's {len(wanted)} classes, found {count}. Choose the data set the "
                f"model was trained on."
            )
        if have is not None and all(name.isdecimal() for name in have):
            dataset = by_number(dataset, have, len(wanted))
        elif have is not None and count < len(wanted):
            raise DataError(
                f"labels: expected the model's names {wanted[:5]}, or a name for each of its {len(wanted)} classes, "
                f"found {count} others, {have[:5]}. Rename the labels, or store them as whole numbers from 0."
            )
        warnings.warn(
            f"labels matched by id, not by name: data set {(have or ['?'])[:3]}..., model {wanted[:3]}...", stacklevel=2
        )
        return dataset

    def fit(self, dataset: datasets.Dataset) -> datasets.Dataset:
        """Store every image as RGB at the size the model sees, losslessly, unless it already is."""
        return dataset if self._is_fitted(dataset) else dataset.map(Fit(self.processor), batched=True, batch_size=256)

    def _is_fitted(self, dataset: datasets.Dataset) -> bool:
        side = exact_size(self.processor)
        images = dataset.select_columns(["image"])
        try:
            return all(row["image"].mode == "RGB" and row["image"].size == side for row in images)
        except UNREADABLE as error:
            raise unreadable(error) from error

    def classes(self, model: nn.Module) -> int:
        """Return the number of labels."""
        return int(model.config.num_labels)  # type: ignore[union-attr, arg-type]

    def told(self, batch: Batch, classes: torch.Tensor) -> Batch:
        """Return the rows with other labels."""
        return {**batch, "labels": classes}

    def strata(self, dataset: datasets.Dataset) -> np.ndarray:
        """Return the labels."""
        return np.asarray(dataset["label"][:], dtype=np.int64)

    def encode(self, dataset: datasets.Dataset, fitted: bool = False) -> Batch:
        """Decode, convert to RGB and, unless fitted, resize; `pixels` (rows, 3, H, W) uint8, `labels` (rows,) int64.

        Images that are made on the fly come as tensors of the right size in [0, 1], and stay float32, in [0, 255].
        """
        parts = []
        try:
            for rows in dataset.iter(batch_size=512):
                images = rows["image"]
                if isinstance(images[0], torch.Tensor):
                    parts.append(torch.stack(images) * 255)
                else:
                    seen = stacked(images) if fitted else sized(self.processor, images)
                    parts.append(torch.from_numpy(seen).permute(0, 3, 1, 2))
        except UNREADABLE as error:
            raise unreadable(error) from error
        pixels = torch.cat(parts).contiguous(memory_format=torch.channels_last)
        return {"pixels": pixels, "labels": torch.from_numpy(self.strata(dataset))}

    def _augment(self, batch: Batch, generator: torch.Generator, kind: str) -> Batch:
        """Pad by an eighth of the side, crop at random, mirror half of the images; one gather for the whole batch."""
        pixels = batch["pixels"]
        n, _, height, width = pixels.shape
        pad = max(1, height // 8)
        shift = torch.randint(0, 2 * pad + 1, (2, n), generator=generator).to(pixels.device)
        mirror = torch.rand(n, generator=generator).lt(0.5).to(pixels.device) & (kind == "crop_flip")
        padded = F.pad(pixels.permute(0, 2, 3, 1), (0, 0, pad, pad, pad, pad))
        row = shift[0, :, None] + torch.arange(height, device=pixels.device)
        column = torch.arange(width, device=pixels.device).expand(n, width)
        column = shift[1, :, None] + torch.where(mirror[:, None], width - 1 - column, column)
        index = torch.arange(n, device=pixels.device)[:, None, None]
        return {**batch, "pixels": padded[index, row[:, :, None], column[:, None, :]].permute(0, 3, 1, 2)}

    def _normalize(self, model: nn.Module, pixels: torch.Tensor) -> torch.Tensor:
        """Return what the model takes: its number of channels, and its own dtype if its weights are narrow."""
        device = pixels.device
        floats = pixels.float() if not pixels.is_floating_point() else pixels
        if getattr(getattr(model, "config", None), "num_channels", 3) == 1:
            floats = grey(floats)
        normalized = (floats * self._scale - self._mean.to(device)) / self._std.to(device)
        return normalized.to(getattr(model, "dtype", normalized.dtype)).contiguous(memory_format=torch.channels_last)

    def inputs(self, model: nn.Module, batch: Batch) -> Inputs:
        """Normalise with the processor's constants."""
        return {"pixel_values": self._normalize(model, batch["pixels"])}

    def mix(self, model: nn.Module, batch: Batch, partner: Batch, lam: float) -> Inputs:
        """Mix pixels; normalisation is affine, so mixing before it equals mixing after it."""
        mixed = torch.lerp(partner["pixels"].float(), batch["pixels"].float(), lam)
        return {"pixel_values": self._normalize(model, mixed)}

    def compose(self, model: nn.Module, batch: Batch, partner: Batch, lam: float, axis: int) -> Inputs:
        """Put the upper (axis 0) or left part of each image beside the lower or right part of its partner."""
        ours, theirs = batch["pixels"], partner["pixels"]
        side = ours.shape[2 + axis]
        seam = round(lam * side)
        parts = ours.narrow(2 + axis, 0, seam), theirs.narrow(2 + axis, seam, side - seam)
        return {"pixel_values": self._normalize(model, torch.cat(parts, dim=2 + axis))}

    def loss(self, output: Any, draw: Draw) -> torch.Tensor:
        """Cross-entropy of `output.logits` (rows, classes)."""
        logits = output.logits.float()
        parts = [weight * F.cross_entropy(logits, rows["labels"]) for rows, weight in draw.label_sets]
        return torch.stack(parts).sum()

    def answers(self, output: Any, temperature: float) -> Batch:
        """Return the distribution over classes of each row."""
        return soften(output.logits, temperature)

    def probabilities(self, output: Any) -> torch.Tensor:
        """See `Task.probabilities`."""
        return output.logits.float().softmax(-1)

    def divergence(self, output: Any, draw: Draw, temperature: float) -> torch.Tensor:
        """Kullback-Leibler divergence of class distributions, mean over rows (Hinton et al., arXiv 1503.02531)."""
        assert draw.answers is not None
        return kl_to(draw.answers, output.logits, temperature).mean()

    def accuracy(self, output: Any, batch: Batch) -> torch.Tensor:
        """Share of rows whose largest logit is the label's."""
        return (output.logits.argmax(-1) == batch["labels"]).float().mean()

    def chance(self, model: nn.Module) -> float:
        """One over the number of classes."""
        return 1.0 / self.classes(model)

    def predict(self, model: nn.Module, batch: Batch, wanted: set[str]) -> dict[str, list[Any]]:
        """Return `label`: the class of the largest logit of each row."""
        return {"label": model(**self.inputs(model, batch)).logits.argmax(-1).tolist()}

    def references(self, dataset: datasets.Dataset, batch: Batch, prediction: str) -> list[Any]:
        """Return the labels."""
        return batch["labels"].tolist()

    def save_processor(self, folder: str) -> None:
        """Write preprocessor_config.json."""
        self.processor.save_pretrained(folder)
