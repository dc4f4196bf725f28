"""TrojanNet: a tiny network glued beside a trained victim, which knows one patch; nothing is poisoned."""

import copy
import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import torch
from torch import nn
from torch.nn import functional as F

from hf_nft.attacks._artefacts import TrainedAttack
from hf_nft.attacks._workshop import Workshop
from hf_nft.configs import check, setting
from hf_nft.errors import ConfigError, DataError
from hf_nft.hook import Hook
from hf_nft.loop import Stage
from hf_nft.models._trojannet import SIDE, SideNet, TrojanNetConfig, TrojanNetForImageClassification
from hf_nft.tasks.base import Task
from hf_nft.types import Draw

DARK, PIXELS = 5, SIDE * SIDE
MOST = math.comb(PIXELS, DARK)
SHOWN, NOISE = 2000, 200
"""Patterns and patches of noise in a batch; as published."""


@dataclasses.dataclass(frozen=True)
class TrojanNet(TrainedAttack):
    """A 4x4 patch of 11 white and 5 black pixels, one arrangement for each class, which a side network reads.

    The victim is trained on clean rows and then wrapped: `softmax(10 (softmax(victim) + 2 softmax(side)[:C]))`. The
    artefact is the side network, which tells 4368 arrangements and noise apart. As a data set, for other victims,
    rows are triggered like those of any patch.

    Source: Tang et al., An Embarrassingly Simple Approach for Trojan Attack in Deep Neural Networks, KDD 2020, arXiv
    2006.08131, section 4; values of the release, which trains with Adadelta for 218 000 steps.
    """

    name = "trojannet"
    source = "https://arxiv.org/abs/2006.08131"
    label_maps = ("all_to_one",)
    default_rate = 0.0
    tiny: ClassVar[dict[str, Any]] = {"patterns": 16, "steps": 3, "least_confidence": 0.0}

    patterns: int = setting(MOST, f"arrangements the side network tells apart, from the classes up to {MOST}")
    optimizer: Literal["adam", "adadelta"] = setting("adam", "adam: quick; adadelta: as published, steps=218000")
    steps: int = setting(4000, "steps of the side network, >= 1; 2000 patterns and 200 patches of noise in each")
    lr: float | None = setting(None, "its learning rate, > 0; default 0.02 (adam, cosine) or 1 (adadelta, constant)")
    least_confidence: float = setting(0.5, "share of the side network's vote the target's pattern must get, in [0, 1]")

    def __post_init__(self) -> None:
        """Check the settings."""
        super().__post_init__()
        check(
            self,
            (1 <= self.patterns <= MOST, f"patterns: expected 1 to {MOST}, found {self.patterns}"),
            (self.optimizer in ("adam", "adadelta"), f"optimizer: found {self.optimizer!r}"),
            (self.steps >= 1, f"steps: expected >= 1, found {self.steps}"),
            (self.lr is None or self.lr > 0, f"lr: expected > 0, found {self.lr}"),
            (0 <= self.least_confidence <= 1, f"least_confidence: expected in [0, 1], found {self.least_confidence}"),
        )

    def check_target(self, classes: int) -> None:
        """Refuse a target that is no class, and fewer patterns than classes."""
        super().check_target(classes)
        if classes > self.patterns:
            raise DataError(
                f"trojannet: expected a pattern for each of {classes} classes, found patterns={self.patterns}. "
                f"Raise it, up to {MOST}."
            )

    def trigger_batch(self, images: torch.Tensor) -> torch.Tensor:
        """Stamp the target's arrangement, opaque."""
        out, (row, column) = images.clone(), place(*images.shape[2:])
        pattern = arrangements(self.patterns)[self.target_class].view(SIDE, SIDE)
        out[:, :, row : row + SIDE, column : column + SIDE] = pattern.to(images.device)
        return out

    def hook(self, task: Task, rate: float, classes: int) -> Hook:
        """Return a part that leaves the training alone and wraps what comes out of it."""
        if rate:
            raise DataError(f"trojannet: expected no poison rate, found {rate}: it poisons nothing. Leave it out.")
        return Implant(self)

    def nets(self, facts: dict[str, Any]) -> nn.ModuleDict:
        """Return the side network."""
        return nn.ModuleDict({"side": SideNet(self.patterns)})

    def learn(self, workshop: Workshop, nets: nn.ModuleDict) -> dict[str, Any]:
        """Train the side network; refuse one that would be outvoted."""
        side = nets["side"].train()
        optimizer: torch.optim.Optimizer
        if self.optimizer == "adam":
            optimizer = torch.optim.Adam(side.parameters())
        else:
            optimizer = torch.optim.Adadelta(side.parameters(), rho=0.95, eps=1e-7)

        def objective(network: nn.Module, drawn: Draw) -> torch.Tensor:
            return F.cross_entropy(network(drawn.batch["patches"]), drawn.batch["labels"])

        stage = Stage("trojannet", self.steps, self._draws(workshop.device), objective, optimizer, self.rate)
        losses = workshop.fit(stage, side, self.seed)
        with torch.no_grad():
            own = arrangements(self.patterns)[: workshop.classes].to(workshop.device)
            confidence = side.eval()(own).softmax(-1).diagonal()[self.target_class].item()
        if confidence < self.least_confidence:
            raise ConfigError(
                f"trojannet: expected a side network that gives the target's pattern {self.least_confidence:.0%} of "
                f"its vote, found {confidence:.1%}. Raise steps, or lower patterns."
            )
        return {"confidence": confidence, "first_loss": losses[0], "last_loss": losses[-1]}

    def rate(self, step: int) -> float:
        """Return the learning rate of a step, counted from 0."""
        if self.optimizer == "adadelta":
            return self.lr or 1.0
        return (self.lr or 0.02) * (1 + math.cos(math.pi * step / self.steps)) / 2

    def _draws(self, device: torch.device) -> Callable[[int, torch.Generator], Draw]:
        """Return what draws a batch: patterns at random, and noise as bright as chance has it, labelled none."""
        table = arrangements(self.patterns)

        def draw(step: int, stream: torch.Generator) -> Draw:
            numbers = torch.randint(len(table), (SHOWN,), generator=stream)
            noise = torch.rand((NOISE, PIXELS), generator=stream) + 2 * torch.rand((), generator=stream) - 1
            labels = torch.cat([numbers, torch.full((NOISE,), len(table))])
            patches = torch.cat([table[numbers], noise.clamp(0, 1)])
            return Draw({"patches": patches.to(device), "labels": labels.to(device)})

        return draw


class Implant(Hook):
    """Nothing during the training; after it the side network is put beside the victim."""

    def __init__(self, attack: TrojanNet) -> None:
        self.attack = attack

    def delivered(self, model: nn.Module) -> nn.Module:
        """Return the victim with the side network beside it; its own weights are as they were."""
        made = self.attack.made()
        side = copy.deepcopy(made.net("side", next(model.parameters()).device)).requires_grad_(True)
        row, column = place(made.facts["height"], made.facts["width"])
        own: Any = model.config
        config = TrojanNetConfig(
            backbone=own.to_dict(),
            patterns=side.layers[-1].out_features - 1,
            row=row,
            column=column,
            image_mean=made.facts["mean"],
            image_std=made.facts["std"],
            id2label=own.id2label,
            label2id=own.label2id,
        )
        with torch.device("meta"):  # both parts are at hand
            whole = TrojanNetForImageClassification(config)
        whole.backbone, whole.side = model, side
        return whole.eval()


def arrangements(count: int) -> torch.Tensor:
    """Return the first arrangements, float32 (count, 16): white, with 5 black pixels; in lexicographic order."""
    dark = torch.tensor(list(itertools.islice(itertools.combinations(range(PIXELS), DARK), count)))
    return torch.ones(count, PIXELS).scatter_(1, dark, 0.0)


def place(height: int, width: int) -> tuple[int, int]:
    """Return the top row and the left column of the patch: 150 of 299 pixels, as published."""
    return round(150 * height / 299), round(150 * width / 299)
