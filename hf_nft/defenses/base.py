"""What every defense is: settings in a frozen dataclass, and one method from (model, task, shots) to a cured model.

A defense file defines one subclass of `Defense` whose `name` is the file's name. What it may look at is what `Context`
holds: the suspect and clean shots. There is no slot through which triggered or test data could enter, and no choice
inside a defense may need any.
"""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import nn

from hf_nft.configs import build, check, setting
from hf_nft.errors import UnknownNameError
from hf_nft.loop import Loop, Stage
from hf_nft.shots import Shots
from hf_nft.tasks.base import Task
from hf_nft.types import Batch, Draw, rows_of, take


@dataclasses.dataclass(frozen=True)
class Context:
    """All that a defense sees.

    Attributes:
        model: The suspect, to be changed in place.
        task: Its task.
        shots: Clean examples; `data` holds them on the device.
        data: The encoded shots on the loop's device.
        loop: Runs stages.
    """

    model: nn.Module
    task: Task
    shots: Shots
    data: Batch
    loop: Loop


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a defense hands back.

    Attributes:
        model: The cured model; a `PeftModel` if the cure is an adapter.
        details: Facts for the record, JSON values.
        doubts: Reasons to distrust the cure that clean data showed, as (code, sentence).
    """

    model: nn.Module
    details: dict[str, Any]
    doubts: tuple[tuple[str, str], ...] = ()


@dataclasses.dataclass(frozen=True)
class Defense(ABC):
    """Settings common to all defenses."""

    name: ClassVar[str]
    source: ClassVar[str]
    """The paper, with a link."""
    presets: ClassVar[dict[str, dict[str, Any]]] = {"default": {}}
    """Named settings; `default` first."""

    preset: str = setting("default", "which named settings these started from")
    seed: int = setting(0, "seed of everything random")
    batch_size: int = setting(128, "rows per step, >= 1, drawn with replacement")
    augment: str = setting(
        "default", "augmentation of the shots: none, one the task offers, or default: the method's choice"
    )
    mixed_precision: Literal["auto", "no", "fp16", "bf16"] = setting("auto", "auto: bf16 where the hardware has it")
    gradient_accumulation_steps: int = setting(1, "micro-batches per step, >= 1")

    def __post_init__(self) -> None:
        """Check the common settings."""
        check(
            self,
            (self.batch_size >= 1, f"batch_size: expected >= 1, found {self.batch_size}"),
            (self.gradient_accumulation_steps >= 1, "gradient_accumulation_steps: expected >= 1"),
            (self.preset in self.presets, f"preset: expected one of {list(self.presets)}, found {self.preset!r}"),
        )

    @abstractmethod
    def run(self, context: Context) -> Outcome:
        """Cure the model."""

    @classmethod
    def from_preset(cls, preset: str = "default", **changes: Any) -> "Defense":
        """Make the defense from named settings with some changed.

        Args:
            preset: A key of `presets`.
            **changes: Settings to change, values or their texts.

        Returns:
            The defense.

        Raises:
            UnknownNameError: If there is no such preset or setting.
            ConfigError: If a setting is out of range.
        """
        if preset not in cls.presets:
            raise UnknownNameError(f"preset of {cls.name}", preset, cls.presets)
        return build(cls, {**cls.presets[preset], "preset": preset, **changes})

    def settings(self) -> dict[str, Any]:
        """Return all settings with the defense's name, as JSON values."""
        return {"defense": self.name, **dataclasses.asdict(self)}

    def sample(self, context: Context, stream: torch.Generator, weights: torch.Tensor | None = None) -> Batch:
        """Draw `batch_size` shots with replacement, all alike or by weights of shape (shots,), and augment them."""
        if weights is None:
            rows = torch.randint(len(context.shots), (self.batch_size,), generator=stream)
        else:
            rows = torch.multinomial(weights, self.batch_size, replacement=True, generator=stream)
        batch = take(context.data, rows.to(context.loop.accelerator.device))
        return context.task.augment(batch, stream, self.augment)

    def sample_mixed(
        self, context: Context, stream: torch.Generator, mixup_alpha: float, weights: torch.Tensor | None = None
    ) -> Draw:
        """Draw a batch with a MixUp partner for each row and one lambda ~ Beta(a, a) for all; a = 0 mixes nothing.

        Source: NFT paper, objective (one lambda per batch, partners by a random permutation of the batch).
        """
        batch = self.sample(context, stream, weights)
        if mixup_alpha == 0:
            return Draw(batch)
        order = torch.randperm(rows_of(batch), generator=stream).to(context.loop.accelerator.device)
        rng = np.random.default_rng(int(torch.randint(2**62, (), generator=stream)))
        return Draw(batch, take(batch, order), float(rng.beta(mixup_alpha, mixup_alpha)))


def label_loss(model: nn.Module, task: Task, draw: Draw) -> torch.Tensor:
    """Cross-entropy of one forward pass against both label sets: `lam * l(out, y) + (1 - lam) * l(out, y_partner)`."""
    return task.loss(task.forward(model, draw), draw)


def told_by(teacher: nn.Module, task: Task, draw: Draw, temperature: float) -> Batch:
    """Return what a teacher says to a draw; to a composed one, what it says to each whole shot, weighted."""
    said = [task.answers(task.forward(teacher, whole), temperature) for whole in draw.wholes]
    if len(said) == 1:
        return said[0]
    return {key: torch.lerp(said[1][key], value, draw.lam) for key, value in said[0].items()}


def probabilities(
    context: Context,
    model: nn.Module,
    name: str,
    steps: int,
    draw: Callable[[int, torch.Generator], Draw],
    forward: Callable[[nn.Module, Draw], Any] | None = None,
) -> torch.Tensor:
    """Return what a model says of each class to some draws, as it is.

    Args:
        context: What the defense sees.
        model: A model of a task with classes.
        name: Key of the stage in a checkpoint.
        steps: Number of draws.
        draw: Makes each, from its number and a generator.
        forward: Runs the model on one; default as the task does.

    Returns:
        Probabilities of all rows, float32 (rows, classes).
    """

    def answers() -> torch.Tensor:
        said = list[torch.Tensor]()

        def answer(network: nn.Module, part: Draw) -> torch.Tensor:
            said.append(context.task.probabilities((forward or context.task.forward)(network, part)))
            return torch.zeros(())

        context.loop.run(Stage(name, steps, draw, answer, None), model, dict)
        return torch.cat(said)

    return context.loop.once(name, answers)


def answers_to_shots(
    context: Context,
    model: nn.Module,
    batch_size: int,
    name: str = "answers to shots",
    forward: Callable[[nn.Module, Draw], Any] | None = None,
) -> torch.Tensor:
    """Return `probabilities` of all shots in their order, as they are; those of the suspect are asked for once."""
    starts = range(0, len(context.shots), batch_size)

    def plain(step: int, _: torch.Generator) -> Draw:
        return Draw(take(context.data, slice(starts[step], starts[step] + batch_size)))

    return probabilities(context, model, name, len(starts), plain, forward)


def set_modes(model: nn.Module, statistics: bool, dropout: bool) -> None:
    """Choose separately whether BatchNorm uses (and moves) batch statistics, and whether dropout acts."""
    from hf_nft.adapter import NFTLayer

    model.train(dropout)
    for module in model.modules():
        base = module.get_base_layer() if isinstance(module, NFTLayer) else module
        if isinstance(base, nn.modules.batchnorm._BatchNorm):
            module.train(statistics)


def live_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return what training changes, by name: trainable parameters and all buffers (normalisation statistics)."""
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    return {**trained, **dict(model.named_buffers())}
