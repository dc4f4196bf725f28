"""What can be seen inside a victim by whoever planted it: units under the trigger, and the cut as it goes on."""

import dataclasses

import torch
from torch import nn

from hf_nft.acceleration import make_accelerator
from hf_nft.adapter import mask_layers, masks
from hf_nft.defenses._harm import ceilings, choose
from hf_nft.defenses._statistics import Excess, excess_variance
from hf_nft.defenses.base import Context
from hf_nft.defenses.nft import NFT
from hf_nft.evaluation.run import EvalSet, evaluate
from hf_nft.loop import Loop
from hf_nft.types import Batch, rows_of, take, to_device
from hf_nft.workflows.purify_job import Case


@dataclasses.dataclass(frozen=True)
class Seen:
    """What a model does on clean and on triggered rows, the same images of classes other than the target.

    Attributes:
        response: Mean over positions of what enters each masked norm, float32 (rows, units), for both kinds.
        margin: Logit of the target class minus the largest other one, float32 (rows,), for both kinds.
    """

    response: dict[str, torch.Tensor]
    margin: dict[str, torch.Tensor]

    @property
    def standard(self) -> dict[str, torch.Tensor]:
        """Responses as distances from the unit's clean mean, in its clean standard deviations; (rows, units)."""
        mean, spread = self.response["clean"].mean(0), self.response["clean"].std(0).clamp(min=1e-12)
        return {kind: (response - mean) / spread for kind, response in self.response.items()}

    @property
    def effect(self) -> torch.Tensor:
        """What the trigger does to each unit: shift of its mean response, in clean standard deviations; (units,)."""
        return self.standard["triggered"].mean(0)


@torch.no_grad()
def look(model: nn.Module, data: EvalSet, target: int) -> Seen:
    """Run a model that carries masks on clean and triggered rows."""
    assert data.triggered is not None
    own = torch.tensor(data.task.references(data.clean_rows, data.clean, "label"))
    kinds = {"clean": take(data.clean, (own != target).nonzero()[:, 0]), "triggered": data.triggered}
    found = {kind: _pass(model, data, batch, target) for kind, batch in kinds.items()}
    return Seen({kind: f[0] for kind, f in found.items()}, {kind: f[1] for kind, f in found.items()})


def _pass(model: nn.Module, data: EvalSet, batch: Batch, target: int) -> tuple[torch.Tensor, torch.Tensor]:
    gathered: list[torch.Tensor] = []
    hooks = [
        layer.register_forward_pre_hook(lambda _, inputs: gathered.append(inputs[0].flatten(2).mean(2).float().cpu()))
        for layer in mask_layers(model).values()
    ]
    responses, margins = [], []
    model.eval()
    try:
        for start in range(0, rows_of(batch), data.task.eval_batch_size):
            rows = to_device(
                take(batch, slice(start, start + data.task.eval_batch_size)), next(model.parameters()).device
            )
            logits = model(**data.task.inputs(model, rows)).logits.float().cpu()
            others = logits.clone()
            others[:, target] = -torch.inf
            margins.append(logits[:, target] - others.max(1).values)
            responses.append(torch.cat(gathered, 1))
            gathered.clear()
    finally:
        for hook in hooks:
            hook.remove()
    return torch.cat(responses), torch.cat(margins)


@dataclasses.dataclass(frozen=True)
class Line:
    """What happens along the line of candidates, the first cut first, before any mask is trained.

    Attributes:
        found: Scores of all units.
        harm: Divergence of the answers to clean shots by the number of units cut, in nats.
        asr: ASR by the number of units cut, in [0, 1]; the defense does not see it.
        acc: ACC by the number of units cut, in [0, 1]; nor this.
    """

    found: Excess
    harm: dict[int, float]
    asr: dict[int, float]
    acc: dict[int, float]


def walk(case: Case, model: nn.Module, defense: NFT) -> Line:
    """Score the units of a model that carries masks, all at 1, and cut along the whole line, whatever the harm."""
    accelerator = make_accelerator(defense.mixed_precision)
    model.to(accelerator.device)
    data = to_device(case.shots.batch, accelerator.device)
    context = Context(model, case.suspect.task, case.shots, data, Loop(accelerator, defense.seed))
    found = excess_variance(context, model, defense.batch_size, defense.statistics_passes, defense.statistics_momentum)
    if found is None:
        raise SystemExit("expected a victim whose norms keep running statistics, found none.")
    sure = (defense.excess, defense.outliers)
    most, rows = defense.outliers_most, defense.batch_size
    cut, why, _ = choose(context, model, found, sure, defense.needed, most, float("inf"), rows)
    first = len(cut) - why["cut_further"]
    harm = {first + further: value for further, value in why["harm"].items()}
    asr, acc = dict[int, float](), dict[int, float]()
    for size in (0, *harm):
        tops = ceilings(model, cut[:size])
        with torch.no_grad():
            for name, mask in masks(model).items():
                mask.copy_(tops[name])
        metrics = evaluate(model, case.eval_set)
        asr[size], acc[size] = metrics["asr"].value, metrics["acc"].value
    with torch.no_grad():
        for mask in masks(model).values():
            mask.fill_(1.0)
    return Line(found, harm, asr, acc)


def alike(layers: torch.Tensor, cut: torch.Tensor) -> torch.Tensor:
    """Choose as many units that are not cut, from the same layers as far as these have enough; bool (units,)."""
    stream, chosen = torch.Generator().manual_seed(0), torch.zeros_like(cut)
    for layer in layers.unique():
        free = ((layers == layer) & ~cut).nonzero()[:, 0]
        wanted = int((cut & (layers == layer)).sum())
        chosen[free[torch.randperm(len(free), generator=stream)[:wanted]]] = True
    return chosen
