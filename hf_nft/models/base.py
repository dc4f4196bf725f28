"""Architectures that `plant` can train from scratch: one file each, named like the file."""

import dataclasses
from abc import ABC, abstractmethod
from typing import Any, ClassVar

import datasets
import numpy as np
from torch import nn
from transformers import ViTImageProcessorPil

CIFAR_MEAN, CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
"""Normalisation of the NFT, ANP and RNP releases; others use a standard deviation of (0.247, 0.243, 0.261)."""


@dataclasses.dataclass(frozen=True)
class Architecture(ABC):
    """Builds an untrained model and its processor for a data set; settings are the dataclass fields."""

    name: ClassVar[str]
    task: ClassVar[str]
    """Name of the task its models do."""

    @abstractmethod
    def build(self, train: datasets.Dataset, seed: int) -> tuple[nn.Module, Any]:
        """Return a freshly initialised model and its processor.

        Args:
            train: Training rows with the task's canonical columns; tells labels or vocabulary.
            seed: Seed of the initial weights.
        """


def label_names(train: datasets.Dataset) -> list[str]:
    """Return the class names of a data set; the numbers themselves where it has no names."""
    feature = train.features["label"]
    if isinstance(feature, datasets.ClassLabel):
        return list(feature.names)
    return [str(i) for i in range(int(np.max(np.asarray(train["label"]))) + 1)]


def image_processor(side: int) -> ViTImageProcessorPil:
    """Return a processor that resizes to a square and normalises with CIFAR-10's constants."""
    size = {"height": side, "width": side}
    return ViTImageProcessorPil(do_resize=True, size=size, image_mean=list(CIFAR_MEAN), image_std=list(CIFAR_STD))
