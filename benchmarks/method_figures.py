"""What happens inside a victim: scores, the cut, what the units do under the trigger, and what the cure changes.

    python benchmarks/method_figures.py runs/victims/wanet --dataset ../shared/data/cifar10 --attack wanet \
        --out docs/figures

Writes four PNGs and `numbers.json`. The defense sees the model and the shots; the trigger enters afterwards, to show
what the units that were chosen without it do.
"""

import argparse
import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from _common import circumstances
from hf_nft.cli.common import quiet_libraries
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.stats import spearmanr
from torch import nn

from hf_nft.acceleration import make_accelerator
from hf_nft.adapter import get_nft_model, mask_layers, masks
from hf_nft.defenses._statistics import Excess, excess_variance
from hf_nft.defenses.base import Context
from hf_nft.defenses.nft import NFT
from hf_nft.evaluation.run import EvalSet, evaluate
from hf_nft.loop import Loop
from hf_nft.reporting.figures import BLUE, VERMILLION, short_names
from hf_nft.suspect import load_suspect
from hf_nft.types import Batch, rows_of, take, to_device
from hf_nft.workflows import PurifyJob
from hf_nft.workflows.purify_job import Case

DPI = 100
GREY = "#999999"
WIDE = 8.0  # inches: 800 pixels


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


def fresh(case: Case, job: PurifyJob) -> Case:
    """Return the case with its suspect loaded anew, since a cure changes it."""
    return dataclasses.replace(case, suspect=load_suspect(job.model))


def score(case: Case, model: nn.Module, defense: NFT) -> Excess:
    """Score the units of a model that carries masks, all at 1, as the defense does."""
    accelerator = make_accelerator(defense.mixed_precision)
    model.to(accelerator.device)
    data = to_device(case.shots.batch, accelerator.device)
    context = Context(model, case.suspect.task, case.shots, data, Loop(accelerator, defense.seed))
    found = excess_variance(context, model, defense.batch_size, defense.statistics_passes)
    if found is None:
        raise SystemExit("expected a victim whose norms keep running statistics, found none.")
    return found


def alike(layers: torch.Tensor, cut: torch.Tensor) -> torch.Tensor:
    """Choose as many units that are not cut, from the same layers as far as these have enough; bool (units,)."""
    stream, chosen = torch.Generator().manual_seed(0), torch.zeros_like(cut)
    for layer in layers.unique():
        free = ((layers == layer) & ~cut).nonzero()[:, 0]
        wanted = int((cut & (layers == layer)).sum())
        chosen[free[torch.randperm(len(free), generator=stream)[:wanted]]] = True
    return chosen


def bare(axes: Axes, title: str, x: str, y: str) -> None:
    """Give axes their texts and take the frame's upper and right side away."""
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(x, fontsize=9)
    axes.set_ylabel(y, fontsize=9)
    axes.tick_params(labelsize=8)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def draw_scores(names: Sequence[str], found: Excess, cut: torch.Tensor) -> Figure:
    """Draw the scores of all units, layer by layer, those that are cut in another colour."""
    figure = Figure(figsize=(WIDE, 4.2), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    for units, colour, size, label in ((~cut, BLUE, 5, "kept"), (cut, VERMILLION, 9, "cut")):
        at = found.layers[units] + torch.rand(int(units.sum()), generator=torch.Generator().manual_seed(0)) * 0.6 - 0.3
        axes.scatter(at, found.scores[units], s=size, c=colour, alpha=0.6, linewidths=0, label=f"{label} ({len(at)})")
    axes.axhline(0, color="black", linewidth=0.6)
    bare(axes, "Variance that clean images leave unexplained, unit by unit", "masked layer, in order", "score")
    axes.set_xticks(range(len(names)), names, rotation=60, ha="right", fontsize=7)
    axes.legend(fontsize=8, frameon=False, loc="upper left")
    return figure


def draw_cut(found: Excess, cut: int) -> Figure:
    """Draw the largest scores over their ranks, the mirrored smallest ones, and how many of the largest are cut."""
    figure = Figure(figsize=(WIDE, 3.8), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    high, low = found.scores.sort(descending=True).values, -found.scores.sort().values
    ranks = range(1, len(high) // 4 + 1)
    axes.plot(ranks, high[: len(ranks)], color=VERMILLION, label="largest scores")
    axes.plot(ranks, low[: len(ranks)], color=BLUE, linestyle="--", label="smallest scores, mirrored: chance")
    axes.fill_between(ranks[:cut], high[:cut], color=VERMILLION, alpha=0.15, linewidth=0)
    if cut:
        lowest = float(high[cut - 1])
        axes.axhline(lowest, color=GREY, linewidth=0.8, label=f"lowest score cut: {lowest:.2f}")
    share = 100 * cut / len(high)
    axes.axvline(cut, color="black", linewidth=1, label=f"the largest {cut} are cut, {share:.1f} % of all")
    axes.set_ylim(bottom=0)
    bare(axes, "The largest scores against chance; clean shots say how many of them are cut", "rank", "score")
    axes.legend(fontsize=8, frameon=False)
    return figure


def histograms(panels: Mapping[str, tuple[Axes, dict[str, torch.Tensor]]], x: str) -> None:
    """Draw clean and triggered values, all panels over the same cells, the outermost of which take what lies beyond."""
    values = torch.cat([value.flatten() for _, kinds in panels.values() for value in kinds.values()])
    few = values[:: max(1, len(values) // 100_000)]
    low, high = torch.quantile(few, torch.tensor([0.002, 0.998])).tolist()
    edges = torch.linspace(low, high, 60)
    for title, (axes, kinds) in panels.items():
        for (kind, found), colour in zip(kinds.items(), (BLUE, VERMILLION), strict=True):
            inside = found.flatten().clamp(low, high).numpy()
            axes.hist(inside, edges.tolist(), density=True, color=colour, alpha=0.55, label=kind)
        bare(axes, title, x, "density")


def draw_responses(before: Seen, after: Seen, cut: torch.Tensor, others: torch.Tensor) -> Figure:
    """Draw what the trigger does to cut units and to others, and to the target's margin before and after the cure."""
    figure = Figure(figsize=(WIDE, 5.4), dpi=DPI, layout="constrained")
    (left, right), (early, late) = figure.subplots(2, 2, sharey="row")
    responses = {
        f"{name} ({int(units.sum())}), before the cure": (axes, {k: z[:, units] for k, z in before.standard.items()})
        for axes, units, name in ((left, cut, "cut units"), (right, others, "as many others"))
    }
    histograms(responses, "response, in clean standard deviations")
    margins = {"target class, before the cure": (early, before.margin), "after the cure": (late, after.margin)}
    histograms(margins, "its logit minus the largest other (above 0: it wins)")
    for axes in (early, late):
        axes.axvline(0, color="black", linewidth=0.8)
    left.legend(fontsize=8, frameon=False)
    return figure


def draw_trigger(found: Excess, effect: torch.Tensor, cut: torch.Tensor, rank: float) -> Figure:
    """Draw each unit's score against what the trigger does to it."""
    figure = Figure(figsize=(WIDE, 4.2), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    for units, colour, size, label in ((~cut, BLUE, 5, "kept"), (cut, VERMILLION, 9, "cut")):
        axes.scatter(found.scores[units], effect[units].abs(), s=size, c=colour, alpha=0.6, linewidths=0, label=label)
    axes.axvline(0, color="black", linewidth=0.6)
    title = f"Score and what the trigger does (used here for understanding only); rank correlation {rank:.2f}"
    bare(axes, title, "score", "shift of the mean response, clean st. dev.")
    axes.legend(fontsize=8, frameon=False, loc="upper left")
    return figure


def main() -> None:
    """Look into one victim and draw what is seen."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("victim")
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--attack", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--shots", type=int, default=10)
    parser.add_argument("--shot-seed", type=int, default=0)
    parser.add_argument("--limit", type=int, help="test rows to look at; for trials")
    options = parser.parse_args()
    job = PurifyJob(
        model=options.victim,
        dataset=options.dataset,
        attack=options.attack,
        shots=options.shots,
        shot_seed=options.shot_seed,
        limit=options.limit,
    )
    with quiet_libraries():
        figures, numbers = study(job)
    options.out.mkdir(parents=True, exist_ok=True)
    for name, figure in figures.items():
        figure.savefig(options.out / f"{name}.png", metadata={"Software": None})
    (options.out / "numbers.json").write_text(json.dumps(numbers, indent=1) + "\n")


def study(job: PurifyJob) -> tuple[dict[str, Figure], dict[str, Any]]:
    """Score, cut, cure and measure one victim; returns the figures by name, and the numbers a text would cite."""
    facts, case, defense = circumstances(), job.open(), NFT()
    targets = set(case.eval_set.wanted)
    if len(targets) != 1:
        raise SystemExit(f"attack: expected one target class, found {len(targets)}.")
    target = targets.pop()
    suspect = get_nft_model(load_suspect(job.model).model)
    found = score(case, suspect, defense)
    before = look(suspect, case.eval_set, target)
    cutting = dataclasses.replace(job, defense=dataclasses.replace(defense, steps=0)).cure(fresh(case, job))
    cut = torch.cat([mask.detach().cpu() for mask in masks(cutting.model).values()]) == 0
    cured = job.cure(fresh(case, job))
    after = look(cured.model, case.eval_set, target)
    others, names = alike(found.layers, cut), short_names(list(masks(suspect)))
    measured = {"before": case.before}
    measured |= {name: evaluate(r.model, case.eval_set) for name, r in (("cut_alone", cutting), ("cured", cured))}
    values = {name: {k: m.value for k, m in metrics.items()} for name, metrics in measured.items()}
    first_kept = int(cut[found.scores.argsort(descending=True)].int().argmin())
    rank = float(spearmanr(found.scores, before.effect.abs()).statistic)
    asr = [values[name]["asr"] or 0.0 for name in ("before", "cut_alone")]
    numbers = {
        **facts,
        "shots": len(case.shots),
        "test_rows": len(case.eval_set.clean_rows),
        "metrics": values,
        "asr_share_that_the_cut_alone_removes": (asr[0] - asr[1]) / asr[0] if asr[0] else None,
        "units": len(cut),
        "units_cut": int(cut.sum()),
        "units_cut_by_size": cutting.details["cut_by_size"],
        "units_cut_as_outliers": cutting.details["cut_as_outliers"],
        "units_cut_by_layer": {name: int(cut[found.layers == i].sum()) for i, name in enumerate(names)},
        "statistics_augment": found.augment,
        "rank_correlation_of_score_and_trigger_effect": rank,
        "median_trigger_effect": {
            "cut": float(before.effect[cut].abs().median()),
            "others": float(before.effect[others].abs().median()),
            "all_kept": float(before.effect[~cut].abs().median()),
        },
    }
    figures = {
        "scores": draw_scores(names, found, cut),
        "cut": draw_cut(found, first_kept),
        "responses": draw_responses(before, after, cut, others),
        "trigger": draw_trigger(found, before.effect, cut, rank),
    }
    return figures, numbers


if __name__ == "__main__":
    main()
