"""LIRA: faint noise from a generator that was trained together with a classifier."""

import copy
import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import datasets
import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from hf_nft.attacks._artefacts import TrainedAttack, normalization
from hf_nft.attacks._nets import Autoencoder, UNet
from hf_nft.attacks._workshop import Workshop
from hf_nft.configs import check, setting
from hf_nft.errors import ConfigError, DataError
from hf_nft.hook import Hook
from hf_nft.loop import Stage
from hf_nft.poisoning import CLEAN, POISONED, Plan, rows_at, share_of
from hf_nft.tasks.base import Task
from hf_nft.types import Batch, Draw, take


@dataclasses.dataclass(frozen=True)
class Lira(TrainedAttack):
    """`x' = clip(x + eps T(x))` on normalised images, `T` ending in tanh, clipped per channel to what an image can be.

    Stage 1 (the artefact) trains `T` against a classifier, in turn; stage 2 is the victim's training, where every row
    comes clean and triggered. As a data set, triggered copies are appended to the clean rows. The authors' eps of 0.01
    in stage 2 is 0.6 grey levels, which 8 bits cannot hold: victims are trained and measured with it on the fly, in
    float, but there is no data set to store.

    Source: Doan et al., LIRA: Learnable, Imperceptible and Robust Backdoor Attacks, ICCV 2021, algorithm 1; values of
    the release.
    """

    name = "lira"
    source = (
        "https://openaccess.thecvf.com/content/ICCV2021/html/"
        "Doan_LIRA_Learnable_Imperceptible_and_Robust_Backdoor_Attacks_ICCV_2021_paper.html"
    )
    hooked = True
    default_rate = 1.0  # every row is paired with its triggered copy
    default_base = "candidates"
    tiny: ClassVar[dict[str, Any]] = {"width": 4, "train_epochs": 1, "batch_size": 20}

    generator: Literal["unet", "autoencoder"] = setting("unet", "unet: as published for CIFAR-10; autoencoder: cheaper")
    width: int | None = setting(None, "channels of its first level, >= 1; default 64 (unet) or 16 (autoencoder)")
    eps: float = setting(0.1, "size of the noise in normalised units, > 0; 0.1 survives 8 bits, 0.01 does not")
    train_eps: float = setting(0.1, "the same while the generator is trained; as published")
    clean_weight: float = setting(0.5, "weight a of the clean loss, in (0, 1); as published")
    train_epochs: int = setting(50, "epochs of stage 1, >= 1; as published for CIFAR-10")
    batch_size: int = setting(128, "rows per step of stage 1, >= 1")
    generator_lr: float = setting(1e-4, "learning rate of the generator (Adam), > 0; as published")
    classifier_lr: float = setting(0.01, "learning rate of the classifier (SGD, momentum 0.9), > 0; as published")

    def __post_init__(self) -> None:
        """Check the settings."""
        super().__post_init__()
        check(
            self,
            (self.generator in ("unet", "autoencoder"), f"generator: found {self.generator!r}"),
            (self.width is None or self.width >= 1, f"width: expected >= 1, found {self.width}"),
            (self.eps > 0 and self.train_eps > 0, f"eps, train_eps: expected > 0, found {self.eps}, {self.train_eps}"),
            (0 < self.clean_weight < 1, f"clean_weight: expected in (0, 1), found {self.clean_weight}"),
            (self.train_epochs >= 1, f"train_epochs: expected >= 1, found {self.train_epochs}"),
            (self.batch_size >= 1, f"batch_size: expected >= 1, found {self.batch_size}"),
            (min(self.generator_lr, self.classifier_lr) > 0, "generator_lr, classifier_lr: expected > 0"),
        )

    def check_size(self, width: int, height: int) -> None:
        """Refuse sides that cannot be halved as often as the generator does."""
        super().check_size(width, height)
        factor = 8 if self.generator == "unet" else 16
        if width % factor or height % factor:
            raise DataError(f"lira: expected sides that are multiples of {factor}, found {width}x{height}.")

    def nets(self, facts: dict[str, Any]) -> nn.ModuleDict:
        """Return the generator."""
        return nn.ModuleDict(
            {"generator": UNet(self.width or 64) if self.generator == "unet" else Autoencoder(self.width or 16)}
        )

    def trigger_batch(self, images: torch.Tensor) -> torch.Tensor:
        """Add the generator's noise; in [0, 1] it is `eps std T(x)`, and the clip is the one per channel."""
        made = self.made()
        with torch.no_grad():
            noise = made.net("generator", images.device)(made.normalize(images))
            return made.denormalize(made.normalize(images) + self.eps * noise).clamp(0, 1)

    def plan(self, answers: np.ndarray, rate: float, base: str, classes: int) -> Plan:
        """Append the chosen rows' triggered copies to the clean rows."""
        chosen = self.select(answers, rate, base, classes)
        rows = np.concatenate([np.arange(len(answers)), chosen])
        return Plan(rows, np.repeat([CLEAN, POISONED], [len(answers), len(chosen)]), rows)

    def levels(self, std: list[float]) -> float:
        """Return the largest noise in grey levels, for a normalisation."""
        return float(self.eps * max(std) * 255)

    @property
    def faint(self) -> bool:
        """Whether the noise is less than 8 bits hold."""
        return self.levels(self.made().facts["std"]) < 1

    def storable(self, task: Task) -> bool:
        """Return whether the noise reaches a grey level."""
        return self.levels(normalization(task)["std"]) >= 1

    def _make(self, dataset: datasets.Dataset, plan: Plan, classes: int, on_the_fly: bool) -> datasets.Dataset:
        if self.faint and not on_the_fly:
            raise ConfigError(
                f"lira: expected noise of a grey level or more, since images are stored in 8 bits, found "
                f"{self.levels(self.made().facts['std']):.2f} from eps={self.eps}. Use eps=0.1, or read the rows on "
                f"the fly."
            )
        return super()._make(dataset, plan, classes, on_the_fly)

    def hook(self, task: Task, rate: float, classes: int) -> Hook:
        """Return stage 2: every batch comes with its triggered copy."""
        return Paired(self, rate, classes)

    def learn(self, workshop: Workshop, nets: nn.ModuleDict) -> dict[str, Any]:
        """Stage 1: per batch, one step of a copy T' against f, one of f against T; T takes over T' after an epoch."""
        current, copied = nets["generator"].eval(), copy.deepcopy(nets["generator"]).train()
        model = workshop.architecture.build(workshop.rows, self.seed)[0].to(workshop.device)
        climber = torch.optim.Adam(copied.parameters(), lr=self.generator_lr)
        per_epoch = max(1, len(workshop.rows) // self.batch_size)
        low, high = (workshop.normalize(torch.full((1, 3, 1, 1), v, device=workshop.device)) for v in (0.0, 1.0))
        draws = workshop.draws(self.batch_size, augment=True)

        def triggered(net: nn.Module, images: torch.Tensor) -> torch.Tensor:
            return (images + self.train_eps * net(images)).clamp(low, high)

        def draw(step: int, stream: torch.Generator) -> Draw:
            if step and step % per_epoch == 0:
                current.load_state_dict(copied.state_dict())
            batch = draws(step, stream).batch
            wanted = [self.target(label, workshop.classes) for label in batch["labels"].tolist()]
            batch = {**batch, "images": workshop.normalize(batch["pixels"])}
            batch["wanted"] = torch.tensor(wanted, device=workshop.device)
            model.eval()  # its statistics are its own affair
            with workshop.accelerator.autocast():
                logits = model(pixel_values=triggered(copied, batch["images"])).logits
                loss = F.cross_entropy(logits, batch["wanted"])
            climber.zero_grad()
            loss.backward()
            climber.step()
            model.zero_grad()
            model.train()
            return Draw(batch)

        def objective(network: nn.Module, drawn: Draw) -> torch.Tensor:
            images, wanted = drawn.batch["images"], drawn.batch["wanted"]
            with torch.no_grad():
                marked = triggered(current, images)
            clean = F.cross_entropy(network(pixel_values=images).logits, drawn.batch["labels"])
            attacked = F.cross_entropy(network(pixel_values=marked).logits, wanted)
            return self.clean_weight * clean + (1 - self.clean_weight) * attacked

        optimizer = torch.optim.SGD(model.parameters(), momentum=0.9)
        steps = self.train_epochs * per_epoch
        losses = workshop.fit(
            Stage("lira", steps, draw, objective, optimizer, lambda step: self.classifier_lr), model, self.seed
        )
        current.load_state_dict(copied.state_dict())
        return {"first_loss": losses[0], "last_loss": losses[-1]}


class Paired(Hook):
    """Every row clean with weight a, and a share of the batch again, triggered, with weight 1 - a."""

    def __init__(self, attack: Lira, rate: float, classes: int) -> None:
        if not 0 < rate <= 1:
            raise DataError(f"lira: expected a share of rows to pair in (0, 1], found {rate}. Change the rate.")
        self.attack, self.rate, self.classes = attack, rate, classes

    def share(self, batch_size: int) -> float:
        """Return the share of the batch that comes triggered as well."""
        return share_of(self.attack.name, rows_at(self.rate, batch_size), batch_size)

    def batch(
        self, data: Batch, rows: torch.Tensor, augment: Callable[[Batch], Batch], stream: torch.Generator
    ) -> Batch:
        """Augment, then append triggered copies with the attacker's labels; clean rows come first."""
        clean = augment(take(data, rows))
        images = clean["pixels"].float() / 255
        count = rows_at(self.rate, len(images))
        labels, weight = clean["labels"], self.attack.clean_weight
        wanted = [self.attack.target(label, self.classes) for label in labels[:count].tolist()]
        weights = [2 * weight] * len(images) + [2 * (1 - weight)] * count
        return {
            "pixels": torch.cat([images, self.attack.trigger_batch(images[:count])]) * 255,
            "labels": torch.cat([labels, torch.tensor(wanted, dtype=labels.dtype, device=labels.device)]),
            "weights": torch.tensor(weights, device=labels.device),
        }

    def loss(self, model: nn.Module, task: Task, batch: Batch) -> torch.Tensor:
        """Return the weighted cross-entropy."""
        logits = model(**task.inputs(model, batch)).logits.float()
        return (F.cross_entropy(logits, batch["labels"], reduction="none") * batch["weights"]).mean()
