"""What is known about a suspect before any mask is trained."""

import dataclasses
from typing import Any

import torch


@dataclasses.dataclass
class Finding:
    """What was found before any mask is trained.

    Attributes:
        augment: Augmentation to train under.
        cut: Units to cut, int64 (units,), in the masks' order.
        evidence: What they were chosen by, for the record.
        doubts: Reasons to distrust the choice, as (code, sentence).
    """

    augment: str
    cut: torch.Tensor = dataclasses.field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    evidence: dict[str, Any] = dataclasses.field(default_factory=dict)
    doubts: tuple[tuple[str, str], ...] = ()

    def add(self, cuts: list[torch.Tensor], evidence: dict[str, Any]) -> None:
        """Take in what one way of looking found."""
        self.cut = torch.cat([self.cut, *cuts]).unique()
        self.evidence |= evidence

    def doubt(self, code: str, text: str) -> None:
        """Note a reason to distrust the choice."""
        self.doubts += ((code, text),)
