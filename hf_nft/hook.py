"""How an attacker takes part in the training of a victim: batch in, batch and loss out, and what is handed out."""

from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from hf_nft.tasks.base import Task
from hf_nft.types import Batch, Draw, take


class Hook:
    """The one place where an attack takes part in a victim's training; this one takes none.

    `plant` asks it for every step's batch and for the loss of every part of it, and knows nothing else.
    """

    def share(self, batch_size: int) -> float:
        """Return the share of a batch of that many rows which is triggered."""
        return 0.0

    def check(self, answers: np.ndarray) -> None:
        """Refuse rows of which too few can be triggered, before anything is trained.

        Args:
            answers: Own answers of all training rows, int64 (rows,).

        Raises:
            DataError: If they are too few.
        """

    def epoch(self, model: nn.Module, data: Batch, stream: torch.Generator) -> None:
        """Look at the victim before an epoch.

        Args:
            model: The victim so far.
            data: All clean training rows, encoded.
            stream: Generator of this step.
        """

    def batch(
        self, data: Batch, rows: torch.Tensor, augment: Callable[[Batch], Batch], stream: torch.Generator
    ) -> Batch:
        """Return the batch of a step, augmented.

        Args:
            data: All training rows, encoded.
            rows: int64 (batch_size,), the rows of this step.
            augment: Augments a batch; called after the trigger or before it, as the attack's authors do.
            stream: Generator of this step, on the CPU.

        Returns:
            What `loss` gets, whole or in parts; every tensor has the rows first.
        """
        return augment(take(data, rows))

    def loss(self, model: nn.Module, task: Task, batch: Batch) -> torch.Tensor:
        """Return the loss of a part of a batch, terms of the attack's own included; a scalar mean over rows."""
        draw = Draw(batch)
        return task.loss(task.forward(model, draw), draw)

    def delivered(self, model: nn.Module) -> nn.Module:
        """Return what the attacker hands out for a victim whose training is over; the same task, as it is saved."""
        return model

    def state(self) -> dict[str, torch.Tensor]:
        """Return the live tensors that a resumed run needs."""
        return {}
