"""The pull of the masks back towards 1.

Source: NFT paper, the regulariser (eta / N_c) * sum_l ||1 - m_l||_1; defenses.md 1.2.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from hf_nft.errors import ConfigError


def l1_to_one(masks: Mapping[str, Tensor] | Iterable[Tensor]) -> Tensor:
    """Distance of all masks from 1, summed over every entry of every layer and not averaged.

    Args:
        masks: Masks of any shape, as a mapping or a series; at least one.

    Returns:
        A scalar >= 0. Its subgradient at m = 1 is 0 (torch.abs), so untouched masks are not pushed.

    Raises:
        ConfigError: If there are no masks.
    """
    terms = [(1.0 - mask).abs().sum() for mask in (masks.values() if isinstance(masks, Mapping) else masks)]
    if not terms:
        raise ConfigError("l1_to_one: expected at least one mask, found none.")
    return torch.stack(terms).sum()


def penalty_coefficient(eta: float, shots_per_class: float) -> float:
    """Weight of `l1_to_one` in the loss: eta / N_c, so that more clean examples allow larger changes.

    Args:
        eta: >= 0; the release uses 0.001.
        shots_per_class: N_c = n / C, an average, so it need not be whole; > 0.

    Returns:
        The effective coefficient.

    Raises:
        ConfigError: If a value is out of range; the message lists all of them.
    """
    problems = []
    if not eta >= 0.0:
        problems.append(f"eta must be >= 0, found {eta}.")
    if not shots_per_class > 0.0:
        problems.append(f"shots_per_class must be > 0, found {shots_per_class}.")
    if problems:
        raise ConfigError("penalty_coefficient: " + " ".join(problems))
    return eta / shots_per_class
