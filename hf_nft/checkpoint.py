"""What an interrupted run leaves behind to go on from."""

import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hf_nft.errors import OutputError


@dataclass
class Checkpoint:
    """Where a run keeps its state, and how often; `path=None` keeps nothing on disk.

    Attributes:
        path: File of the checkpoint.
        every: Steps between two writes.
        resume: Whether to go on from the file.
        facts: What must agree between the interrupted run and this one.
    """

    path: Path | None = None
    every: int = 100
    resume: bool = False
    facts: dict[str, Any] = field(default_factory=dict)

    def write(self, state: dict[str, Any]) -> None:
        """Replace the file in one move.

        Args:
            state: Tensors, numbers and texts, nested in dicts and lists.

        Raises:
            OutputError: If it cannot be written.
        """
        if self.path is not None:
            part = self.path.with_suffix(".part")
            try:
                torch.save({"facts": self.facts, **state}, part)
                part.replace(self.path)
            except (OSError, RuntimeError) as error:  # torch turns a full disk into a RuntimeError
                why = getattr(error, "strerror", None) or "a disk that is full or cannot be written"
                raise OutputError(f"checkpoint {self.path}: expected to write it, found {why}. Make room.") from error

    def read(self) -> dict[str, Any] | None:
        """Read the saved state if there is one to go on from.

        Returns:
            The state, or None.

        Raises:
            OutputError: If the file belongs to a run with other settings, or does not load.
        """
        if not self.resume or self.path is None or not self.path.exists():
            return None
        try:
            state: dict[str, Any] = torch.load(self.path, weights_only=True)
            changed = [key for key in self.facts if state["facts"].get(key) != self.facts[key]]
        except Exception as error:  # torch.load raises almost anything on a damaged file
            raise OutputError(
                f"--resume: expected a checkpoint, found one that does not load. Remove {self.path.parent}."
            ) from error
        if changed:
            raise OutputError(
                f"--resume: expected the settings of the interrupted run, found other {', '.join(changed)}. "
                f"Repeat its command, or remove {self.path.parent} to start afresh."
            )
        return state


def checksum(model: nn.Module) -> int:
    """Tell one model from another with the same shapes, so that a run is not gone on with on other weights.

    Args:
        model: Any model.

    Returns:
        CRC-32 of all parameters and buffers.
    """
    total = 0
    for tensor in model.state_dict().values():
        total = zlib.crc32(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy(), total)
    return total
