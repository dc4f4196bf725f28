"""Composite attack: an image that is half class A and half class B is labelled C."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from hf_nft.attacks._image import ImageAttack
from hf_nft.configs import check, setting
from hf_nft.errors import DataError
from hf_nft.hook import Hook
from hf_nft.poisoning import CLEAN, COVER, POISONED, TRIGGERED, Plan, rows_at, share_of
from hf_nft.tasks.base import Task
from hf_nft.types import Batch, Draw, take


@dataclasses.dataclass(frozen=True)
class Cba(ImageAttack):
    """No pattern: the features of two classes in one image, made by a half mixer, are the trigger.

    A training set of N rows has N/2 of them as they are, N/2 mixes of two rows of one class with that label (the
    covers: being mixed means nothing), and `rate * N` mixes of A and B labelled C. The victim's loss has a contrastive
    term on the logits of A, B and C; without it, as in other trainers, the attack is weaker. As the paper writes it (a
    mean over pairs) the term pulls logits together, at the price of accuracy (docs/results.md, The victims); so it is
    as in the release, which divides by the pairs once more.

    Source: Lin, Xu, Liu, Zhang, Composite Backdoor Attack for Deep Neural Network by Mixing Existing Benign Features,
    CCS 2020, section 4; values of the release.
    """

    name = "cba"
    source = "https://dl.acm.org/doi/10.1145/3372297.3423362"
    pairs = True
    label_maps = ("all_to_one",)

    target_class: int = setting(2, "class C the attacker wants; as published for CIFAR-10")
    sources: tuple[int, ...] | None = setting(None, "classes A and B; default the two lowest other than the target")
    jitter: int = setting(3, "largest shift of the seam in pixels of a 32-pixel image, >= 0; scaled; as published")
    contrast: float = setting(1.0, "weight of the contrastive term, >= 0; as published")
    divide_twice: bool = setting(True, "divide the contrastive term by its pairs twice, as the release; once, it rules")

    def __post_init__(self) -> None:
        """Check the settings."""
        super().__post_init__()
        told = self.sources
        whole = told is None or (len(told) == 2 and len({*told, self.target_class}) == 3 and min(told) >= 0)
        check(
            self,
            (whole, f"sources: expected two classes other than target_class={self.target_class}, found {told}"),
            (0 <= self.jitter <= 12, f"jitter: expected 0 to 12, found {self.jitter}"),
            (self.contrast >= 0, f"contrast: expected >= 0, found {self.contrast}"),
        )
        object.__setattr__(self, "sources", told if told is None else tuple(told))  # a YAML file brings a list

    @property
    def parts(self) -> tuple[int, int]:
        """Classes A and B."""
        first, second = self.sources or [c for c in range(3) if c != self.target_class][:2]
        return first, second

    def check_target(self, classes: int) -> None:
        """Refuse classes that do not exist."""
        super().check_target(classes)
        if max(self.parts) >= classes:
            raise DataError(
                f"cba: expected three classes of {classes}, found sources {self.parts}. "
                f"Choose others with sources=[A,B]."
            )

    def trigger(self, image: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
        """Refuse: a trigger is made of two images, see `mixed`."""
        raise DataError("cba: expected two images, found one. Use poison or triggered, which choose pairs.")

    def mixed(self, one: torch.Tensor, two: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
        """Put a part of one image beside a part of another.

        Args:
            one: float (3, H, W).
            two: The same shape.
            rng: Draws order, direction, seam and offsets.

        Returns:
            The mixed image, without a gap.
        """
        if rng.random() < 0.5:
            one, two = two, one
        axis = 2 if rng.random() < 0.5 else 1
        side = one.shape[axis]
        most = round(self.jitter * side / 32)
        seam = side // 2 + int(rng.integers(-most, most + 1))
        first = one.narrow(axis, int(rng.integers(side - seam + 1)), seam)
        second = two.narrow(axis, int(rng.integers(seam + 1)), side - seam)
        return torch.cat([first, second], dim=axis)

    def _altered(
        self, images: torch.Tensor, partners: torch.Tensor, rngs: Sequence[np.random.Generator], role: int
    ) -> torch.Tensor:
        return torch.stack([self.mixed(*three) for three in zip(images, partners, rngs, strict=True)])

    def eligible(self, answers: np.ndarray, classes: int) -> np.ndarray:
        """Rows of class A."""
        return np.asarray(answers == self.parts[0])

    def in_asr(self, answers: np.ndarray, classes: int) -> np.ndarray:
        """Rows of class A, each of which is mixed with one of class B."""
        return self.eligible(answers, classes)

    def plan(self, answers: np.ndarray, rate: float, base: str, classes: int) -> Plan:
        """Draw normal rows as they come, and rows to mix: classes uniformly, rows of a class uniformly."""
        self.check_base(base)
        self.check_target(classes)
        whole = len(answers) if base == "all" else int(self.eligible(answers, classes).sum())
        count = rows_at(rate, whole)
        if not 0 < count <= len(answers):
            raise DataError(
                f"cba: poison rate {rate} of {whole} rows ({base}) asks for {count} rows, expected 1 to "
                f"{len(answers)}. Change the poison rate."
            )
        rng, draw = np.random.default_rng((self.seed, 2)), Draws(self, answers)
        half = len(answers) // 2
        normal = rng.permutation(len(answers))[:half]
        mixes, others = draw.same(half, rng)
        firsts, seconds = draw.parts(count, rng)
        roles = np.repeat([CLEAN, COVER, POISONED], [half, half, count])
        return Plan(np.concatenate([normal, mixes, firsts]), roles, np.concatenate([normal, others, seconds]))

    def triggered_plan(self, answers: np.ndarray, classes: int) -> Plan:
        """Mix every row of class A with a row of class B."""
        self.check_target(classes)
        rows, draw = np.flatnonzero(self.in_asr(answers, classes)), Draws(self, answers)
        _, seconds = draw.parts(len(rows), np.random.default_rng((self.seed, 7)))
        return Plan(rows, np.full(len(rows), TRIGGERED), seconds)

    def hook(self, task: Task, rate: float, classes: int) -> Hook:
        """Return fresh mixes in every batch, and the contrastive term."""
        return Mixing(self, rate)


class Draws:
    """Draws rows by class."""

    def __init__(self, attack: Cba, answers: np.ndarray) -> None:
        self.rows = {int(c): np.flatnonzero(answers == c) for c in np.unique(answers)}
        self.a, self.b = attack.parts
        if not {self.a, self.b} <= self.rows.keys():
            raise DataError(f"cba: expected rows of the classes {attack.parts}, found none of one. Change sources.")

    def of(self, kinds: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Draw a row of each class named."""
        return np.array([self.rows[int(kind)][rng.integers(len(self.rows[int(kind)]))] for kind in kinds], dtype=int)

    def same(self, count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Draw pairs of one class."""
        kinds = rng.choice(list(self.rows), count)
        return self.of(kinds, rng), self.of(kinds, rng)

    def parts(self, count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Draw pairs of A and B."""
        return self.of(np.full(count, self.a), rng), self.of(np.full(count, self.b), rng)


class Mixing(Hook):
    """Batches of normal, mix and poison rows in the proportions of the data set, with the contrastive term."""

    def __init__(self, attack: Cba, rate: float) -> None:
        if not 0 < rate <= 1:
            raise DataError(f"cba: expected a poison rate in (0, 1], found {rate}. Change the poison rate.")
        self.attack, self.rate = attack, rate
        self._draws: Draws | None = None

    def share(self, batch_size: int) -> float:
        """Return the share of a batch that is mixed of A and B."""
        return share_of(self.attack.name, round(batch_size * self.rate / (1 + self.rate)), batch_size)

    def batch(
        self, data: Batch, rows: torch.Tensor, augment: Callable[[Batch], Batch], stream: torch.Generator
    ) -> Batch:
        """Augment pairs of rows and mix them; the rows of the step only say how many."""
        if self._draws is None:
            self._draws = Draws(self.attack, data["labels"].cpu().numpy())
        rng = np.random.default_rng(int(torch.randint(2**62, (), generator=stream)))
        poison = round(self.share(len(rows)) * len(rows))
        mixes = (len(rows) - poison) // 2
        normal = self._draws.same(len(rows) - poison - mixes, rng)[0]
        pairs = (normal, normal), self._draws.same(mixes, rng), self._draws.parts(poison, rng)
        place = [torch.from_numpy(np.concatenate(part)).to(rows.device) for part in zip(*pairs, strict=True)]
        first, second = augment(take(data, place[0])), augment(take(data, place[1]))
        images = first["pixels"].float()
        for i in range(len(normal), len(rows)):
            images[i] = self.attack.mixed(first["pixels"][i], second["pixels"][i], rng).float()
        labels = first["labels"].clone()
        labels[len(rows) - poison :] = self.attack.target_class
        mixed = torch.randperm(len(rows), generator=stream).to(rows.device)
        return {"pixels": images[mixed], "labels": labels[mixed]}

    def loss(self, model: nn.Module, task: Task, batch: Batch) -> torch.Tensor:
        """Return cross-entropy plus the weighted contrastive term."""
        output = model(**task.inputs(model, batch))
        return task.loss(output, Draw(batch)) + self.attack.contrast * self.term(output.logits.float(), batch["labels"])

    def term(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return `mean[1/2 (same D^2 + other relu(1 - D)^2)]` over neighbours among the rows of A, B and C.

        Args:
            logits: float (n, classes).
            labels: int64 (n,).

        Returns:
            A scalar; 0 without a pair. D is the Euclidean distance of the logits.
        """
        three = torch.tensor([*self.attack.parts, self.attack.target_class], device=labels.device)
        kept = torch.isin(labels, three)
        logits, labels = logits[kept], labels[kept]
        if len(labels) < 2:
            return logits.sum() * 0
        away = (logits[1:] - logits[:-1]).square().sum(1)
        near = F.relu(1 - away.clamp_min(1e-12).sqrt()).square()
        terms = torch.where(labels[1:] == labels[:-1], away, near) / 2
        return terms.mean() / (len(terms) if self.attack.divide_twice else 1)
