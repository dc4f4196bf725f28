"""CLB: adversarial noise that hides the class, and four corner patterns, labels unchanged."""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn import functional as F

from hf_nft.attacks._artefacts import TrainedAttack, surrogate_of
from hf_nft.attacks._workshop import Workshop
from hf_nft.configs import check, setting
from hf_nft.hook import Hook
from hf_nft.tasks.base import Task
from hf_nft.types import Batch

LEFT = torch.tensor([[1.0, -1.0, -1.0], [-1.0, 1.0, -1.0], [1.0, -1.0, 1.0]])
"""The 3x3 pattern of both left corners, 1 white and -1 black; the right corners have its mirror image."""


@dataclasses.dataclass(frozen=True)
class Clb(TrainedAttack):
    """Target-class rows are made hard by PGD on a surrogate, then stamped in the corners; at test time only stamped.

    `x_{k+1} = clip(x_k + alpha sign(grad CE(f(x_k), y)))` within eps of x_0 and [0, 1], without a random start.

    Source: Turner, Tsipras, Madry, Label-Consistent Backdoor Attacks, arXiv 1912.02771, section 4; eps, steps and
    patterns of BackdoorBench and BackdoorBox. The surrogate is trained on adversarial examples (Wong et al., Fast is
    better than free, arXiv 2001.03994), since noise against a clean one transfers worse.
    """

    name = "clb"
    source = "https://arxiv.org/abs/1912.02771"
    clean_label = True
    label_maps = ("all_to_one",)
    default_base = "target_class"
    default_rate = 0.8  # at 1.0 the class is never seen clean
    tiny: ClassVar[dict[str, Any]] = {"steps": 3, "surrogate_epochs": 1}

    eps: float | None = setting(None, "largest noise in grey levels of 255; default 8 up to 32 pixels, 16 above")
    alpha: float = setting(1.5, "noise of one step in grey levels, > 0; as in BackdoorBench")
    steps: int = setting(100, "steps of the noise, >= 0; as in BackdoorBench")
    amplitude: float = setting(1.0, "amplitude of the corners in (0, 1]; 1 overwrites")
    size: int = setting(3, "side of a corner in pixels of a 32-pixel image; scaled with the image")
    surrogate_epochs: int = setting(10, "epochs of the surrogate, >= 1")

    def __post_init__(self) -> None:
        """Check the settings."""
        super().__post_init__()
        check(
            self,
            (self.eps is None or 0 < self.eps <= 255, f"eps: expected in (0, 255], found {self.eps}"),
            (self.alpha > 0, f"alpha: expected > 0, found {self.alpha}"),
            (self.steps >= 0, f"steps: expected >= 0, found {self.steps}"),
            (0 < self.amplitude <= 1, f"amplitude: expected in (0, 1], found {self.amplitude}"),
            (1 <= self.size <= 16, f"size: expected 1 to 16, found {self.size}"),
            (self.surrogate_epochs >= 1, f"surrogate_epochs: expected >= 1, found {self.surrogate_epochs}"),
        )

    def bound(self, side: int) -> float:
        """Return the largest noise, in [0, 1], for images of a side."""
        return (self.eps if self.eps is not None else 8.0 if side <= 32 else 16.0) / 255

    def nets(self, facts: dict[str, Any]) -> nn.ModuleDict:
        """Return the surrogate."""
        return nn.ModuleDict({"surrogate": surrogate_of(facts)})

    def trigger_batch(self, images: torch.Tensor) -> torch.Tensor:
        """Stamp the corners."""
        side = max(1, round(self.size * min(images.shape[2:]) / 32))
        cells = (torch.arange(side) * 3).div(side, rounding_mode="floor")  # nearest scaling of the 3x3 pattern
        left = LEFT[cells][:, cells].to(images.device) * self.amplitude
        change = torch.zeros_like(images[0, 0])
        for rows in (slice(None, side), slice(-side, None)):
            change[rows, :side], change[rows, -side:] = left, left.flip(1)
        return (images + change).clamp(0, 1)

    def poison_batch(self, images: torch.Tensor) -> torch.Tensor:
        """Make the images hard for the surrogate, then stamp them."""
        made, bound = self.made(), self.bound(min(images.shape[2:]))
        surrogate = made.net("surrogate", images.device)
        labels = torch.full((len(images),), self.target_class, device=images.device)

        def loss(noisy: torch.Tensor) -> torch.Tensor:
            return F.cross_entropy(surrogate(pixel_values=made.normalize(noisy)).logits, labels)

        noise = torch.zeros_like(images)
        return self.trigger_batch(ascended(loss, images, noise, bound, self.alpha / 255, self.steps))

    def learn(self, workshop: Workshop, nets: nn.ModuleDict) -> dict[str, Any]:
        """Train the surrogate on adversarial examples of its own."""
        bound = self.bound(min(workshop.data["pixels"].shape[2:]))
        model = workshop.surrogate(self.surrogate_epochs, self.seed, Adversarial(bound))
        nets["surrogate"].load_state_dict(model.state_dict())
        return {}


class Adversarial(Hook):
    """Trains on examples one random-start step of 1.25 eps away (arXiv 2001.03994, algorithm 3)."""

    def __init__(self, bound: float) -> None:
        self.bound = bound

    def loss(self, model: nn.Module, task: Task, batch: Batch) -> torch.Tensor:
        """Move the rows uphill, then return their loss."""

        def climbed(images: torch.Tensor) -> torch.Tensor:
            return super(Adversarial, self).loss(model, task, {**batch, "pixels": images * 255})

        images = batch["pixels"].float() / 255
        start = (torch.rand_like(images) * 2 - 1) * self.bound  # the loop seeds this step by step
        hard = ascended(climbed, images, start, self.bound, 1.25 * self.bound, 1)
        return climbed(hard)


def ascended(
    loss: Callable[[torch.Tensor], torch.Tensor],
    images: torch.Tensor,
    noise: torch.Tensor,
    bound: float,
    step: float,
    steps: int,
) -> torch.Tensor:
    """Move images uphill on a loss by signed gradients.

    Args:
        loss: Mean loss of images (n, 3, H, W) in [0, 1], a scalar.
        images: Where to start from.
        noise: First noise.
        bound: Largest noise per value.
        step: Noise added per step.
        steps: Number of steps.

    Returns:
        The moved images, in [0, 1].

    Source: Madry et al., Towards Deep Learning Models Resistant to Adversarial Attacks, arXiv 1706.06083, section 2.1.
    """
    moved = (images + noise).clamp(0, 1)
    for _ in range(steps):
        with torch.enable_grad():
            moved.requires_grad_(True)
            (gradient,) = torch.autograd.grad(loss(moved), moved)
        moved = (moved.detach() + step * gradient.sign()).clamp(images - bound, images + bound).clamp(0, 1)
    return moved.detach()
