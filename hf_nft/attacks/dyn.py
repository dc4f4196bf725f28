"""Input-aware dynamic attack: a small pattern of its own for every image."""

import dataclasses
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn import functional as F

from hf_nft.attacks._artefacts import TrainedAttack
from hf_nft.attacks._nets import PatternNet, stages
from hf_nft.attacks._workshop import Workshop
from hf_nft.configs import check, setting
from hf_nft.errors import DataError
from hf_nft.loop import Stage
from hf_nft.types import Draw

ADAM = {"betas": (0.5, 0.9)}
TINY = 1e-7


@dataclasses.dataclass(frozen=True)
class Dyn(TrainedAttack):
    """`x' = x + m (p - x)`, `m = 1/2 + tanh(20 M(x) - 10) / 2`, `p = G(x)`; Dyn-one and Dyn-all by the label map.

    The artefact holds M, trained first, and G, trained together with a classifier on triggered, cross and clean rows;
    both networks see normalised images. The victim is another classifier, trained on what they make, where the paper
    hands out the one that G was trained with: so one artefact serves any victim. Covers are the paper's cross rows: an
    image under another image's mask and pattern, label unchanged, without which the trigger would become universal.

    Source: Nguyen and Tran, Input-Aware Dynamic Backdoor Attack, NeurIPS 2020, arXiv 2010.08138, sections 3.2 to 3.4;
    values of the release.
    """

    name = "dyn"
    source = "https://arxiv.org/abs/2010.08138"
    hooked = True
    after_augmentation = True
    tiny: ClassVar[dict[str, Any]] = {"width": 2, "mask_epochs": 1, "train_epochs": 1, "batch_size": 20}

    cover_ratio: float = setting(1.0, "cross rows per poisoned row, >= 0; as published")
    width: int = setting(32, "channels of the networks' first stage, >= 1; as published")
    density: float = setting(0.032, "mean of the mask that is not punished, in (0, 1); as published")
    density_weight: float = setting(100.0, "weight of a larger mask, >= 0; as published")
    diversity_weight: float = setting(1.0, "weight of the diversity of masks and patterns, >= 0; as published")
    mask_epochs: int = setting(25, "epochs of the mask network, >= 1; as published")
    train_epochs: int = setting(100, "epochs of the pattern network beside a classifier, >= 1; as in BackdoorBench")
    train_rate: float = setting(0.1, "share of triggered rows in its batches, as many are cross rows; as published")
    batch_size: int = setting(128, "rows per step, at least 1 / train_rate; as published")
    generator_lr: float = setting(0.01, "learning rate of both networks (Adam), > 0; as published")
    classifier_lr: float = setting(0.01, "learning rate of the classifier (SGD, momentum 0.9), > 0; as published")
    accumulate: bool = setting(False, "never reset the pattern network's gradients, as the release does by oversight")

    def __post_init__(self) -> None:
        """Check the settings."""
        super().__post_init__()
        check(
            self,
            (self.cover_ratio >= 0, f"cover_ratio: expected >= 0, found {self.cover_ratio}"),
            (self.width >= 1, f"width: expected >= 1, found {self.width}"),
            (0 < self.density < 1, f"density: expected in (0, 1), found {self.density}"),
            (min(self.density_weight, self.diversity_weight) >= 0, "density_weight, diversity_weight: expected >= 0"),
            (min(self.mask_epochs, self.train_epochs) >= 1, "mask_epochs, train_epochs: expected >= 1"),
            (0 < self.train_rate <= 0.5, f"train_rate: expected in (0, 0.5], found {self.train_rate}"),
            (
                int(self.train_rate * self.batch_size + TINY) >= 1,
                f"batch_size: expected at least 1 / train_rate, found {self.batch_size}",
            ),
            (min(self.generator_lr, self.classifier_lr) > 0, "generator_lr, classifier_lr: expected > 0"),
        )

    def check_size(self, width: int, height: int) -> None:
        """Refuse sides that cannot be halved as often as the networks do."""
        super().check_size(width, height)
        factor = 2 ** stages(min(width, height))
        if width % factor or height % factor:
            raise DataError(f"dyn: expected sides that are multiples of {factor}, found {width}x{height}.")

    def nets(self, facts: dict[str, Any]) -> nn.ModuleDict:
        """Return the mask and the pattern network."""
        side = min(facts["height"], facts["width"])
        return nn.ModuleDict({"mask": PatternNet(1, side, self.width), "pattern": PatternNet(3, side, self.width)})

    def trigger_batch(self, images: torch.Tensor) -> torch.Tensor:
        """Put on every image its own pattern."""
        return self._stamped(images, images)

    def cover_batch(self, images: torch.Tensor, partners: torch.Tensor, stream: torch.Generator) -> torch.Tensor:
        """Put on every image its partner's pattern."""
        return self._stamped(images, partners)

    def _stamped(self, images: torch.Tensor, owners: torch.Tensor) -> torch.Tensor:
        made = self.made()
        with torch.no_grad():
            seen = made.normalize(owners)
            mask = sharpened(made.net("mask", images.device)(seen))
            return torch.lerp(images, made.net("pattern", images.device)(seen), mask)

    def learn(self, workshop: Workshop, nets: nn.ModuleDict) -> dict[str, Any]:
        """Train the mask network, freeze it, then train the pattern network beside a classifier."""
        mask, pattern = nets["mask"], nets["pattern"]
        first = self._learn_masks(workshop, mask.train())
        mask.eval().requires_grad_(False)
        second = self._learn_patterns(workshop, mask, pattern.train())
        return {"mask_loss": first[-1], "first_loss": second[0], "last_loss": second[-1]}

    def _learn_masks(self, workshop: Workshop, mask: nn.Module) -> list[float]:
        """Stage A: sparse masks that differ as the images do."""
        per_epoch = max(1, len(workshop.rows) // self.batch_size)
        draws = workshop.draws(2 * self.batch_size, augment=True)

        def objective(network: nn.Module, drawn: Draw) -> torch.Tensor:
            one, two = workshop.normalize(drawn.batch["pixels"]).chunk(2)
            m1, m2 = sharpened(network(one)), sharpened(network(two))
            diversity = (distance(one, two) / (distance(m1, m2) + TINY)).mean()
            return self.density_weight * F.relu(m1 - self.density).mean() + self.diversity_weight * diversity

        def lr(step: int) -> float:
            return self.generator_lr * 0.1 ** sum(step >= per_epoch * epoch for epoch in (10, 20))

        optimizer = torch.optim.Adam(mask.parameters(), **ADAM)  # type: ignore[arg-type]
        stage = Stage("mask", self.mask_epochs * per_epoch, draws, objective, optimizer, lr)
        return workshop.fit(stage, mask, self.seed)

    def _learn_patterns(self, workshop: Workshop, mask: nn.Module, pattern: nn.Module) -> list[float]:
        """Stage B: patterns that a classifier obeys, on their own image and not on another."""
        per_epoch = max(1, len(workshop.rows) // self.batch_size)
        count = int(self.train_rate * self.batch_size + TINY)
        draws = workshop.draws(self.batch_size + count, augment=True)  # the last rows lend patterns
        model = workshop.architecture.build(workshop.rows, self.seed)[0].to(workshop.device).train()
        generator = torch.optim.Adam(pattern.parameters(), **ADAM)  # type: ignore[arg-type]

        def objective(network: nn.Module, drawn: Draw) -> torch.Tensor:
            images, labels = drawn.batch["pixels"], drawn.batch["labels"].clone()
            own, lent = images[:count], images[-count:]
            p_own, p_lent = pattern(workshop.normalize(own)), pattern(workshop.normalize(lent))
            m_own, m_lent = sharpened(mask(workshop.normalize(own))), sharpened(mask(workshop.normalize(lent)))
            crossed = torch.lerp(images[count : 2 * count], p_lent, m_lent)
            whole = torch.cat([torch.lerp(own, p_own, m_own), crossed, images[2 * count : self.batch_size]])
            wanted = [self.target(label, workshop.classes) for label in labels[:count].tolist()]
            labels[:count] = torch.tensor(wanted, device=labels.device)
            logits = network(pixel_values=workshop.normalize(whole)).logits
            moved = workshop.normalize(own), workshop.normalize(lent)
            spread = distance(workshop.normalize(p_own), workshop.normalize(p_lent))
            diversity = (distance(*moved) / (spread + TINY)).mean()
            return F.cross_entropy(logits, labels[: self.batch_size]) + self.diversity_weight * diversity

        def after_step() -> None:
            generator.step()
            if not self.accumulate:
                generator.zero_grad()

        def lr(step: int) -> float:
            for group in generator.param_groups:
                group["lr"] = self.generator_lr * 0.1 ** sum(step >= per_epoch * e for e in (200, 300, 400, 500))
            return self.classifier_lr * 0.1 ** sum(step >= per_epoch * e for e in (100, 200, 300, 400))

        optimizer = torch.optim.SGD(model.parameters(), momentum=0.9, weight_decay=5e-4)
        stage = Stage("pattern", self.train_epochs * per_epoch, draws, objective, optimizer, lr, after_step)
        return workshop.fit(stage, model, self.seed)


def sharpened(values: torch.Tensor) -> torch.Tensor:
    """Push a mask network's output towards 0 and 1: `1/2 + tanh(20 v - 10) / 2`."""
    return 0.5 + (20 * values - 10).tanh() / 2


def distance(one: torch.Tensor, two: torch.Tensor) -> torch.Tensor:
    """Return the root of each pair's mean squared difference, (n,)."""
    return (one - two).square().flatten(1).mean(1).clamp_min(TINY**2).sqrt()  # the root has no gradient at 0
