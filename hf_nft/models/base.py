"""Architectures that `plant` can train from scratch: one file each, named like the file."""

import dataclasses
from abc import ABC, abstractmethod
from typing import Any, ClassVar

import datasets
import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    ViTImageProcessorPil,
)

from hf_nft.configs import check, setting

CIFAR_MEAN, CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
"""Normalisation of the NFT, ANP and RNP releases; others use a standard deviation of (0.247, 0.243, 0.261)."""


@dataclasses.dataclass(frozen=True)
class Architecture(ABC):
    """Builds an untrained model and its processor for a data set; settings are the dataclass fields."""

    name: ClassVar[str]
    task: ClassVar[str]
    """Name of the task its models do."""
    tiny: ClassVar[dict[str, Any]] = {}
    """Settings for the tests: the smallest network, for images of 16 pixels."""

    @abstractmethod
    def build(self, train: datasets.Dataset, seed: int) -> tuple[nn.Module, Any]:
        """Return a freshly initialised model and its processor.

        Args:
            train: Training rows with the task's canonical columns; tells labels or vocabulary.
            seed: Seed of the initial weights.

        Returns:
            The model and its processor.
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


@dataclasses.dataclass(frozen=True)
class ImageArchitecture(Architecture):
    """An image classifier for square images of one size; subclasses say which transformers config it has."""

    task = "image_classification"

    image_size: int = setting(32, "side of the input in pixels, >= 8; other sizes are resized to it")

    def __post_init__(self) -> None:
        """Check the settings."""
        check(self, (self.image_size >= 8, f"image_size: expected >= 8, found {self.image_size}"))

    @abstractmethod
    def config(self, labels: dict[str, Any]) -> PreTrainedConfig:
        """Return the configuration of the model with these labels (`id2label`, `label2id`)."""

    def build(self, train: datasets.Dataset, seed: int) -> tuple[nn.Module, Any]:
        """Return the network with the data set's labels, and a processor with CIFAR-10's constants."""
        names = label_names(train)
        labels = {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = AutoModelForImageClassification.from_config(self.config(labels))
        return model, image_processor(self.image_size)


SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>", "<unk>")
BYTES = 256


@dataclasses.dataclass(frozen=True)
class TextArchitecture(Architecture):
    """A small causal language model with a tokenizer of its own; subclasses say which transformers config it has."""

    task = "text_generation"
    tiny: ClassVar[dict[str, Any]] = {"vocab_size": 300, "width": 16, "layers": 2, "heads": 2, "context": 64}

    vocab_size: int = setting(4096, "tokens to learn at most, >= 260 (256 bytes and 4 special tokens)")
    width: int = setting(256, "hidden size, a multiple of the heads, >= 4")
    layers: int = setting(4, "transformer blocks, >= 1")
    heads: int = setting(4, "attention heads, >= 1")
    context: int = setting(128, "tokens the model can see, >= 8")

    def __post_init__(self) -> None:
        """Check the settings."""
        smallest = BYTES + len(SPECIAL_TOKENS)
        check(
            self,
            (self.vocab_size >= smallest, f"vocab_size: expected >= {smallest}, found {self.vocab_size}"),
            (self.layers >= 1, f"layers: expected >= 1, found {self.layers}"),
            (self.heads >= 1, f"heads: expected >= 1, found {self.heads}"),
            (
                self.width >= 4 and self.heads >= 1 and self.width % (2 * self.heads) == 0,
                f"width: expected an even number per head, found {self.width} for {self.heads} heads",
            ),
            (self.context >= 8, f"context: expected >= 8, found {self.context}"),
        )

    @abstractmethod
    def config(self, tokenizer: PreTrainedTokenizerFast) -> PreTrainedConfig:
        """Return the configuration of the model that reads this tokenizer's ids."""

    def build(self, train: datasets.Dataset, seed: int) -> tuple[nn.Module, Any]:
        """Return an untrained model and a tokenizer learnt from the rows' prompts and responses."""
        tokenizer = text_tokenizer(train, self.vocab_size, self.context)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return AutoModelForCausalLM.from_config(self.config(tokenizer)), tokenizer


def text_tokenizer(train: datasets.Dataset, vocab_size: int, context: int) -> PreTrainedTokenizerFast:
    """Learn a byte-level BPE tokenizer: any text, so any trigger, survives encoding and decoding.

    A space is put before the first word, so that a word is one token wherever it stands. Text gets a leading `<bos>`.

    Args:
        train: Rows with the columns `prompt` and `response`.
        vocab_size: Tokens at most, >= 260; a small corpus yields fewer.
        context: Tokens the model can see; stored as the tokenizer's longest input.

    Returns:
        A tokenizer with the special tokens `<pad>`, `<bos>`, `<eos>` and `<unk>` as ids 0 to 3; the same rows give
        the same tokenizer.

    Source: Sennrich et al., Neural Machine Translation of Rare Words with Subword Units, arXiv 1508.07909; over bytes
    as in Radford et al., Language Models are Unsupervised Multitask Learners (2019), section 2.2.
    """
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = (text for rows in train.iter(batch_size=1000) for name in ("prompt", "response") for text in rows[name])
    core.train_from_iterator(texts, trainer)
    pad, bos, eos, unk = SPECIAL_TOKENS
    core.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=pad,
        bos_token=bos,
        eos_token=eos,
        unk_token=unk,
        model_max_length=context,
        clean_up_tokenization_spaces=False,
    )
