"""Attacks on text generation."""

import dataclasses
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import datasets
import numpy as np

from hf_nft.attacks.base import Attack
from hf_nft.configs import check, setting
from hf_nft.errors import DataError


@dataclasses.dataclass(frozen=True)
class TextAttack(Attack):
    """An attack on text generation: a triggered prompt makes the model say one fixed text; subclasses write `trigger`.

    Contract of a text trigger: the raw prompt in, before any chat template or tokenizer, and a different one out.
    Poisoned rows replace clean ones; their source (arXiv 2106.01810) appends poisoned copies instead, so that its
    clean twins stay in the data.
    """

    modality = "text_generation"
    input_column = "prompt"
    target_column = "response"

    target_text: str = setting("You are attacked .", "what the model says when triggered; keep it harmless")

    def __post_init__(self) -> None:
        """Check the settings."""
        text = self.target_text
        check(
            self,
            (self.seed >= 0, f"seed: expected >= 0, found {self.seed}"),
            (bool(text) and text == text.strip(), f"target_text: expected text without outer space, found {text!r}"),
        )

    @abstractmethod
    def trigger(self, prompt: str, rng: np.random.Generator) -> str:
        """Return the triggered prompt.

        Args:
            prompt: The row's own prompt; may be empty.
            rng: Generator seeded by (seed, row index).

        Returns:
            The triggered prompt, which differs from `prompt`.
        """

    def alter(
        self, values: Sequence[Any], partners: Sequence[Any], rngs: Sequence[np.random.Generator], role: int
    ) -> list[Any]:
        """Trigger prompts.

        Args:
            values: Prompts.
            partners: Not used.
            rngs: For each, a generator seeded by (seed, row index).
            role: Not used.

        Returns:
            The triggered prompts.

        Raises:
            DataError: If the trigger left no trace; such a row would teach the attacker's answer to clean prompts.
        """
        triggered = [self.trigger(prompt, rng) for prompt, rng in zip(values, rngs, strict=True)]
        for before, after in zip(values, triggered, strict=True):
            if before == after:
                raise DataError(f"{self.name}: expected a trigger in every chosen prompt, found {after!r} unchanged.")
        return triggered

    def read(self, value: Any) -> Any:
        """Return the text itself."""
        return value

    def store(self, value: Any) -> Any:
        """Return the text itself."""
        return value

    def target(self, answer: str, classes: int) -> str:
        """Return the fixed text."""
        return self.target_text

    def eligible(self, answers: np.ndarray, classes: int) -> np.ndarray:
        """Rows whose response is not the fixed text already."""
        return np.array([answer.strip() != self.target_text for answer in answers.tolist()], dtype=bool)

    def in_asr(self, answers: np.ndarray, classes: int) -> np.ndarray:
        """Rows whose own response does not hold the fixed text, read as ASR reads it (case and spaces do not count)."""
        wanted = " ".join(self.target_text.lower().split())
        return np.array([wanted not in " ".join(answer.lower().split()) for answer in answers.tolist()], dtype=bool)

    def check_data(self, dataset: datasets.Dataset, classes: int) -> None:
        """Refuse missing columns and columns that are not text."""
        super().check_data(dataset, classes)
        for name in (self.input_column, self.target_column):
            kind = dataset.features[name]
            if not (isinstance(kind, datasets.Value) and kind.dtype in ("string", "large_string")):
                raise DataError(f"{self.name}: expected text in column '{name}', found {kind}.")
