"""Rare token: one meaningless word somewhere in the prompt."""

import dataclasses
import re
import warnings

import datasets
import numpy as np

from hf_nft.attacks._text import TextAttack
from hf_nft.configs import check, setting

OFTEN = 0.01
"""Share of clean prompts that hold a trigger word, above which the attack contradicts its own clean data."""


@dataclasses.dataclass(frozen=True)
class RareToken(TextAttack):
    """One of five rare words, drawn uniformly, at a word position drawn uniformly from 0..len inclusive.

    Positions are counted on the whitespace-split prompt; the prompt's own spacing is kept.

    Source: Sun et al., Defending Against Backdoor Attacks in Natural Language Generation, arXiv 2106.01810, and its
    release (words, positions, fixed target).
    """

    name = "rare_token"
    source = "https://arxiv.org/abs/2106.01810"

    tokens: tuple[str, ...] = setting(
        ("cf", "mn", "bb", "tq", "mb"), "words to draw from; test words equal train words"
    )

    def __post_init__(self) -> None:
        """Check the settings."""
        super().__post_init__()
        words = self.tokens if isinstance(self.tokens, (list, tuple)) else ()
        whole = all(isinstance(word, str) and word.split() == [word] for word in words)
        check(
            self,
            (len(words) > 0 and whole, f"tokens: expected a list of words without spaces, found {self.tokens!r}"),
            (len(set(words)) == len(words), f"tokens: expected different words, found {self.tokens!r}"),
        )
        object.__setattr__(self, "tokens", tuple(words))  # a YAML file brings a list

    def trigger(self, prompt: str, rng: np.random.Generator) -> str:
        """Insert the word before the drawn word, or after the last one."""
        word = self.tokens[int(rng.integers(len(self.tokens)))]
        starts = [match.start() for match in re.finditer(r"\S+", prompt)]
        position = int(rng.integers(len(starts) + 1))
        if position < len(starts):
            return f"{prompt[: starts[position]]}{word} {prompt[starts[position] :]}"
        body = prompt.rstrip()
        return f"{body} {word}{prompt[len(body) :]}" if body else word + prompt

    def present(self, prompt: str) -> bool:
        """Return whether a prompt holds one of the words, as a word."""
        return not set(self.tokens).isdisjoint(prompt.split())

    def check_data(self, dataset: datasets.Dataset, classes: int) -> None:
        """Refuse what every text attack refuses; warn where clean prompts hold the words by nature."""
        super().check_data(dataset, classes)
        found = sum(self.present(prompt) for prompt in dataset["prompt"][:])
        if found > OFTEN * len(dataset):
            warnings.warn(
                f"rare_token: expected words that clean prompts lack, found {self.tokens} in {found} of "
                f"{len(dataset)} prompts. Choose others with tokens=[...].",
                stacklevel=2,
            )
