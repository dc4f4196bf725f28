"""How NFT trains its masks, between their bounds, on clean shots: by labels, or by what the suspect says to them."""

import dataclasses
from typing import Any

import torch
from torch import nn

from hf_nft.adapter import masks
from hf_nft.defenses._composites import compose
from hf_nft.defenses._finding import Finding
from hf_nft.defenses._norms import average_statistics
from hf_nft.defenses.base import Context, live_state, set_modes, told_by
from hf_nft.loop import Stage, generator
from hf_nft.masks.penalties import l1_to_one, penalty_coefficient
from hf_nft.masks.schedules import active_bounds, project_
from hf_nft.types import Draw, take


def train(
    nft: Any,
    context: Context,
    model: nn.Module,
    bounds: dict[str, float],
    tops: dict[str, torch.Tensor],
    found: Finding,
) -> None:
    """Train the masks.

    Args:
        nft: The settings of NFT.
        context: What the defense sees.
        model: The suspect with an NFT adapter, its masks within their bounds.
        bounds: Lower bound of each mask's entries, by name.
        tops: Upper bounds, by name, as many as entries.
        found: What draws are composed of, for a share `composed` of them, or by what inputs of norms are displaced,
            for a share `shifted` of the rows, or inputs of the model, for a share `adversarial`.
    """
    task, loop, learnt = context.task, context.loop, masks(model)
    leading = found.shifts or (found.adversary if found.open else None)
    optimizer: torch.optim.Optimizer
    if nft.optimizer == "sgd":
        optimizer = torch.optim.SGD(list(learnt.values()), lr=nft.lr, momentum=nft.momentum)
    else:
        optimizer = torch.optim.Adam(list(learnt.values()), lr=nft.lr, betas=(nft.momentum, 0.999), fused=True)
    pull = penalty_coefficient(nft.eta, context.shots.per_class)
    set_modes(model, statistics=nft.bn_mode != "frozen_stats", dropout=nft.dropout)
    shots, echoes = len(context.shots), nft.echoes(task, len(context.shots))
    parts = torch.randperm(shots, generator=generator(nft.seed, "shots", 0)).tensor_split(nft.parts(shots))
    forward = task.forward if leading is None else lambda network, draw: leading.forward(task, network, draw)

    def sample(step: int, stream: torch.Generator) -> Draw:
        if nft.steady(task):
            return Draw(take(context.data, parts[step // echoes % len(parts)].to(loop.accelerator.device)))
        if found.composites and float(torch.rand((), generator=stream)) < nft.composed:
            return compose(context, *found.composites.draw(nft.batch_size, stream), stream, nft.augment)
        return nft.sample_mixed(context, stream, nft.mixing(task), leading.weights if leading else None)

    def displaced(step: int, stream: torch.Generator) -> Draw:
        draw = sample(step, stream)
        return leading.displace(draw, nft.shifted or nft.adversarial, stream) if leading else draw

    def ask(part: Draw) -> Draw:
        """Let the suspect answer: the same module with its masks switched off, as it was delivered."""
        model.eval()
        with model.disable_adapter():  # type: ignore[operator]
            said = told_by(model, task, part, nft.temperature)
        set_modes(model, statistics=nft.bn_mode != "frozen_stats", dropout=nft.dropout)
        return dataclasses.replace(part, answers=said)

    def objective(network: nn.Module, draw: Draw) -> torch.Tensor:
        if nft.objective == "labels":
            loss = task.loss(forward(network, draw), draw)
        else:
            loss = task.divergence(forward(network, draw), draw, nft.temperature)
        return loss + pull * l1_to_one(learnt) if pull else loss

    def after_step() -> None:
        project_(learnt, bounds, tops)
        if nft.project_momentum:
            key = "momentum_buffer" if nft.optimizer == "sgd" else "exp_avg"
            for name, held in active_bounds(learnt, bounds, tops).items():
                if key in (kept := optimizer.state[learnt[name]]):  # no step yet, or no momentum
                    kept[key].masked_fill_(held, 0.0)

    stage = Stage(
        "masks",
        nft.steps,
        displaced,
        objective,
        optimizer,
        nft.rate,
        after_step,
        passes=2,
        reuse=echoes,
        prepare=ask if nft.objective == "distill" else None,
    )
    loop.report = lambda: {"mask": float(torch.cat([m.detach() for m in learnt.values()]).mean())}
    loop.run(stage, model, lambda: live_state(model))
    average_statistics(context, model)
