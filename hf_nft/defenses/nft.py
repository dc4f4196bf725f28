"""NFT: train one mask per neuron on a few clean examples, keep it in [mu(layer), 1], fold it into the weights.

Two presets. `paper` is the published method, setting by setting (its release's values). `default` keeps the masks and
their upper bound but chooses which to lower to 0 and pin there: by what the suspect's BatchNorm statistics remember of
the trigger (see `_statistics`); where it keeps none, by the answer that is easiest to reach (see `_easiest`); in tasks
without classes, by exposing the backdoor (see `_exposure`). It wins the accuracy back by distilling from the suspect,
under MixUp where the task has it so, with its BatchNorm statistics left alone. Where nothing stands out, shots are
composed to find a trigger of two classes, and to train it away (see `_composites`); if there is none, what the suspect
answers is learnt while inputs are pushed as its running means remember (see `_shift`). Where pushes found the
attacker's answer and cutting left it easy to reach, an adversary pushes inputs there meanwhile (see `_adversary`).
Every difference is one setting.
"""

import dataclasses
import math
from typing import Any, ClassVar, Literal

from hf_nft.adapter import NFTConfig, get_nft_model, masks, skipped_modules
from hf_nft.configs import check, setting
from hf_nft.defenses._finding import look
from hf_nft.defenses._harm import ceilings
from hf_nft.defenses._norms import recalibrate
from hf_nft.defenses._training import train
from hf_nft.defenses.base import Context, Defense, Outcome
from hf_nft.masks.penalties import penalty_coefficient
from hf_nft.masks.schedules import floors, project_
from hf_nft.tasks.base import Task
from hf_nft.types import take

ECHOES = 4
"""Steps taken on one mixed or augmented draw: few enough that masks do not learn it by heart."""

PAPER: dict[str, Any] = {
    "objective": "labels",
    "mixup_alpha": 1.0,
    "steps": 1000,
    "reuse": 1,
    "optimizer": "sgd",
    "lr": 0.05,
    "lr_end": 0.02,
    "lr_passes": 5,
    "momentum": 0.95,
    "schedule": "exponential",
    "eta": 1e-3,
    "bn_mode": "train_stats",
    "excess": 0.0,
    "outliers": 0.0,
    "pushes": "never",
    "exposures": 0,
    "cut": 0.0,
    "composed": 0.0,
    "shifted": 0.0,
    "adversarial": 0.0,
    "adversarial_beside": 0.0,
}


@dataclasses.dataclass(frozen=True)
class NFT(Defense):
    """Neural Mask Fine-Tuning.

    Source: Karim et al., Augmented Neural Fine-Tuning for Efficient Backdoor Purification, ECCV 2024, arXiv
    2407.10052: objective and bound; values of `paper` from its release. What to cut: see `_statistics`, `_easiest`,
    `_exposure`. Distillation: arXiv 1503.02531.
    """

    name = "nft"
    source = "https://arxiv.org/abs/2407.10052"
    presets: ClassVar[dict[str, dict[str, Any]]] = {"default": {}, "paper": PAPER}

    placement: Literal["auto", "bn", "norm", "units", "channels"] = setting("auto", "which modules carry masks")
    mask_stem: bool = setting(False, "whether the stem's norm carries masks too")
    mask_bias: bool = setting(False, "whether a mask silences the bias as well")
    schedule: Literal["exponential", "linear", "cosine", "constant", "none"] = setting(
        "none", "lower bound mu by depth"
    )
    alpha: float = setting(0.8, "scale of the lower bound, in [0, 1]")
    beta: float = setting(0.5, "decay of the exponential bound per layer, >= 0")
    depth_index: Literal["ordinal", "execution", "block", "relative"] = setting("ordinal", "what counts as depth")
    objective: Literal["distill", "labels"] = setting("distill", "learn from the suspect's answers, or from the labels")
    temperature: float = setting(2.0, "temperature of distillation, > 0")
    mixup_alpha: float | None = setting(None, "MixUp parameter a of Beta(a, a); 0: none; default the task's")
    composed: float = setting(0.5, "share of draws composed of two shots where an answer to such stands out, in [0, 1]")
    composed_temperature: float = setting(0.25, "temperature of distillation there, > 0")
    shifted: float = setting(
        0.6, "share of rows pushed as the suspect's means remember where nothing else stands out, in [0, 1]"
    )
    shifted_within: tuple[float, ...] = setting(
        (0.145, 3.0), "how far means may lie apart, squared, over what chance explains, least and most, >= 0"
    )
    shifted_guide: float = setting(
        20.0, "weight of how nearly these pushes move means as remembered, beside the answer's log-likelihood, >= 0"
    )
    shifted_most: float = setting(
        24.0, "how many times what means remember norms are displaced to see the answer, >= 0"
    )
    shifted_late: float = setting(
        0.125, "share of the masked layers, nearest the output, whose means do not count, in [0, 1)"
    )
    adversarial: float = setting(
        0.6, "share of rows whose inputs are pushed to the answer found, where cutting left it easy to reach, in [0, 1]"
    )
    adversarial_beside: float = setting(
        0.3, "the same where the suspect's statistics told what to cut, in [0, 1]; that cut does most"
    )
    adversarial_lr: float = setting(0.05, "learning rate there, and where rows are pushed as means remember, > 0")
    adversarial_always: bool = setting(
        False, "whether masks learn against it even where the cut has closed the window that leads to the answer"
    )
    windowed: bool = setting(True, "whether some of these keep to the window from which a push gets there most easily")
    eta: float = setting(0.0, "weight of the pull towards 1, divided by the shots per class, >= 0")
    steps: int = setting(150, "optimizer steps of the masks, >= 0")
    reuse: int | None = setting(
        None, "steps taken on one batch, which the suspect answers once, >= 1; default 4, more where shots never change"
    )
    optimizer: Literal["adam", "sgd"] = setting("adam", "optimizer of the masks")
    lr: float = setting(0.02, "learning rate at the start, > 0")
    lr_end: float = setting(0.0, "learning rate that the cosine runs to, >= 0")
    lr_passes: int | None = setting(None, "step the cosine only so many times (published: 5); default every step")
    momentum: float = setting(0.9, "SGD momentum, or Adam's first beta, in [0, 1)")
    project_momentum: bool = setting(False, "zero the momentum of masks that sit at a bound")
    bn_mode: Literal["frozen_stats", "train_stats", "recalibrate_unmixed"] = setting(
        "frozen_stats", "BatchNorm statistics: the suspect's, moved by training, or measured afresh on the shots"
    )
    dropout: bool = setting(False, "whether dropout acts while masks train")
    excess: float = setting(0.05, "share of units cut at most for the variance that clean shots leave unexplained")
    needed: float = setting(1.0, "harm of those for clean shots beyond which they are spared, in nats, >= 0")
    outliers: float = setting(0.01, "share of units cut at most as outliers of their layer in that variance")
    outliers_most: float = setting(0.05, "largest such share, where clean shots do not notice")
    harm: float = setting(0.15, "how far cuts that are not sure may take the answers to clean shots, in nats, >= 0")
    pushes: Literal["auto", "always", "never"] = setting(
        "auto", "look for an answer that a push reaches easily; auto: without statistics, or with 50 shots or more"
    )
    pushed_most: float = setting(0.02, "share of units cut at most because that push goes through them, in [0, 1)")
    taken_back: bool = setting(True, "whether that cut is taken back where it hardly hinders pushes on inputs")
    class_prior: bool = setting(True, "whether shots count as often as their class does in the data set")
    statistics_passes: int = setting(
        10, "passes over the shots under each augmentation to measure their statistics, >= 1"
    )
    statistics_momentum: float = setting(
        0.5, "largest BatchNorm momentum of statistics that tell of more than the last batches, in [0, 1]"
    )
    exposures: int = setting(4, "exposures to rank units by, without statistics and pushes; 0: none")
    expose_always: bool = setting(False, "expose also where something else was asked")
    unlearn_lrs: tuple[float, ...] = setting((0.01, 0.02), "learning rates of unlearning, > 0, taken in turn")
    unlearn_clip: float = setting(1.0, "largest gradient norm of unlearning, > 0")
    unlearn_steps: int = setting(60, "most steps of one unlearning, >= 1")
    relearn_lr: float = setting(0.2, "learning rate of the masks in an exposure, > 0")
    relearn_passes: int = setting(20, "passes over the shots of one relearning, >= 1")
    cut: float = setting(0.02, "share of units cut by exposure, lowest ranked first, in [0, 1)")

    def __post_init__(self) -> None:
        """Check the settings."""
        super().__post_init__()
        rates = ("lr", "adversarial_lr", "temperature", "composed_temperature", "unlearn_clip", "relearn_lr")
        counts = ("statistics_passes", "unlearn_steps", "relearn_passes")
        sizes = ("steps", "lr_end", "beta", "eta", "needed", "harm", "shifted_most", "shifted_guide", "exposures")
        shares = ("excess", "outliers", "outliers_most", "pushed_most", "shifted_late", "cut")
        fractions = ("alpha", "composed", "shifted", "adversarial", "adversarial_beside", "statistics_momentum")
        check(
            self,
            *((0 <= getattr(self, n) < 1, f"{n}: expected in [0, 1), found {getattr(self, n)}") for n in shares),
            *((0 <= getattr(self, n) <= 1, f"{n}: expected in [0, 1], found {getattr(self, n)}") for n in fractions),
            *((getattr(self, n) >= 0, f"{n}: expected >= 0, found {getattr(self, n)}") for n in sizes),
            (
                len(self.shifted_within) == 2 and 0 <= self.shifted_within[0] <= self.shifted_within[1],
                f"shifted_within: expected 0 <= least <= most, such as [0.145, 3.0], found {list(self.shifted_within)}",
            ),
            ((self.mixup_alpha or 0) >= 0, f"mixup_alpha: expected >= 0, found {self.mixup_alpha}"),
            *((getattr(self, n) > 0, f"{n}: expected > 0, found {getattr(self, n)}") for n in rates),
            *((getattr(self, n) >= 1, f"{n}: expected >= 1, found {getattr(self, n)}") for n in counts),
            (self.reuse is None or self.reuse >= 1, f"reuse: expected >= 1, found {self.reuse}"),
            (self.lr_passes is None or self.lr_passes >= 1, f"lr_passes: expected >= 1, found {self.lr_passes}"),
            (0 <= self.momentum < 1, f"momentum: expected in [0, 1), found {self.momentum}"),
            (
                self.cut == 0 or self.exposures > 0,
                f"cut: expected 0 without exposures, found {self.cut}: it needs exposures >= 1 to rank units by",
            ),
            (
                bool(self.unlearn_lrs) and min(self.unlearn_lrs) > 0,
                f"unlearn_lrs: expected learning rates > 0, found {list(self.unlearn_lrs)}",
            ),
        )

    def run(self, context: Context) -> Outcome:
        """Attach masks, rank and cut, train the rest; the outcome's model carries the adapter."""
        config = NFTConfig(placement=self.placement, mask_stem=self.mask_stem, mask_bias=self.mask_bias)
        model = get_nft_model(context.model, config).to(context.loop.accelerator.device)
        learnt, two = masks(model), context.task.inputs(model, take(context.data, slice(0, 2)))
        bounds = floors(model, self.schedule, self.depth_index, self.alpha, self.beta, run=lambda: model(**two))
        found = look(self, context, model)
        tops = ceilings(model, found.cut)
        project_(learnt, bounds, tops)
        shares: dict[str, Any] = {
            "composed": self.composed if found.composites else 0.0,
            "shifted": self.shifted if found.shifts else 0.0,
            "adversarial": self.pushed_rows(found.seen) if found.open else 0.0,
        }
        lr = self.adversarial_lr if found.open or found.shifts else self.lr
        temperature = self.composed_temperature if found.composites else self.temperature
        how = dataclasses.replace(self, augment=found.augment, lr=lr, temperature=temperature, **shares)
        train(how, context, model, bounds, tops, found)
        if found.composites:
            met = found.composites.met(context, model, self.seed, " past what masks have learnt")
            kept = found.composites.kept(context, model, self.batch_size)
            found.evidence |= {"composite_after": round(met, 4), "composite_kept": round(kept, 4)}
            found.doubts += found.composites.doubts(met, kept)
        if found.adversary:
            left = found.adversary.left("what masks have learnt", self.batch_size)
            found.evidence["adversary_after"] = left
            found.doubts += () if found.seen else found.adversary.doubts(left)
        if self.bn_mode == "recalibrate_unmixed":
            recalibrate(context, model, self.batch_size)
        units = sum(mask.numel() for mask in learnt.values())
        details = {
            "placement": model.peft_config["default"].to_dict()["resolved_placement"],
            "masks": units,
            "masked_layers": len(learnt),
            "skipped_modules": len(skipped_modules(model.get_base_model())),
            "mixup_alpha": self.mixing(context.task),
            **shares,
            "effective_eta": penalty_coefficient(self.eta, context.shots.per_class),
            "floors": bounds,
            "units_cut": len(found.cut),
            "cut_by_layer": {name: n for name, c in tops.items() if (n := int((c == 0).sum()))},
            **found.evidence,
        }
        return Outcome(model, details, found.doubts)

    def pushing(self, few: bool, classes: int) -> bool:
        """Return whether pushes are tried, by whether there are too few shots beside statistics, and the classes."""
        looked = self.excess > 0 or self.outliers > 0
        return classes > 2 and (self.pushes == "always" or (self.pushes == "auto" and looked and not few))

    def pushed_rows(self, seen: bool) -> float:
        """Return the share of rows that an adversary pushes, by whether statistics told what to cut."""
        return self.adversarial_beside if seen else self.adversarial

    def shifting(self, statistics: bool, classes: int) -> bool:
        """Return whether rows may be displaced, of a suspect that keeps statistics; those that move would follow."""
        return self.shifted > 0 and statistics and classes > 0 and self.bn_mode == "frozen_stats"

    def mixing(self, task: Task) -> float:
        """Return the MixUp parameter for a task; 0 mixes nothing."""
        return task.mixup_alpha if self.mixup_alpha is None else self.mixup_alpha

    def steady(self, task: Task) -> bool:
        """Whether shots are shown as they are, neither changed nor put together, and `reuse` does not say how often."""
        kind = task.augmentation(self.augment)
        shares = (self.composed, self.shifted, self.adversarial, self.adversarial_beside)
        changed = self.mixing(task) > 0 or (task.axes > 0 and max(shares) > 0)
        return self.reuse is None and kind == "none" and not changed

    def parts(self, shots: int) -> int:
        """Return the fewest draws that show every shot."""
        return math.ceil(shots / self.batch_size)

    def batch_rows(self, task: Task, shots: int) -> int:
        """Return the most rows of a step: `batch_size`, or an even part of shots that are shown as they are."""
        return math.ceil(shots / self.parts(shots)) if self.steady(task) else self.batch_size

    def echoes(self, task: Task, shots: int) -> int:
        """Return how many steps are taken on one draw.

        What the suspect says to shots that are neither mixed nor augmented never changes, so each is asked about once.

        Args:
            task: The suspect's task.
            shots: Number of clean rows.

        Returns:
            `reuse` where it is set.

        Source: data echoing, arXiv 1907.05550.
        """
        if not self.steady(task):
            return self.reuse or ECHOES
        return max(ECHOES, math.ceil(self.steps / self.parts(shots)))

    def rate(self, step: int) -> float:
        """Return the learning rate of a step: a cosine from `lr` to `lr_end`, stepped `lr_passes` times if set.

        Args:
            step: Step, counted from 0.

        Returns:
            The learning rate.

        Source: the NFT release: 5 passes, .0500 .0471 .0396 .0304 .0229.
        """
        passes = self.lr_passes or self.steps
        done = step * passes // self.steps
        return self.lr_end + (self.lr - self.lr_end) * 0.5 * (1 + math.cos(math.pi * done / passes))
