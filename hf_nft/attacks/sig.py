"""SIG: a horizontal sinusoid added to images of the target class, labels unchanged."""

import dataclasses

import numpy as np
import torch

from hf_nft.attacks._image import ImageAttack
from hf_nft.configs import check, setting


@dataclasses.dataclass(frozen=True)
class SIG(ImageAttack):
    """`x' = clip(x + v)`, `v(i, j) = D sin(2 pi j f / W)` in grey levels of 255, the same for all rows and channels.

    Source: Barni, Kallas, Tondi, ICIP 2019, equation 1; D = 40, f = 6 as in BackdoorBench.
    """

    name = "sig"
    source = "https://arxiv.org/abs/1902.11237"
    clean_label = True
    label_maps = ("all_to_one",)
    default_base = "target_class"
    default_rate = 0.8  # at 1.0 the class is never seen clean and its accuracy collapses

    delta: float = setting(40.0, "amplitude D in grey levels, in (0, 255]")
    frequency: float = setting(6.0, "cycles per image width, > 0")

    def __post_init__(self) -> None:
        """Check the settings."""
        super().__post_init__()
        check(
            self,
            (0 < self.delta <= 255, f"delta: expected in (0, 255], found {self.delta}"),
            (self.frequency > 0, f"frequency: expected > 0, found {self.frequency}"),
        )

    def trigger(self, image: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
        """Add the sinusoid and clip."""
        width = image.shape[2]
        wave = torch.sin(2 * torch.pi * torch.arange(width) * self.frequency / width)
        return (image + self.delta / 255 * wave).clamp(0, 1)
