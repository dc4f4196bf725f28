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
from _inside import Line, Seen, alike, look, walk
from hf_nft.cli.common import quiet_libraries
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.stats import spearmanr

from hf_nft.adapter import get_nft_model, masks
from hf_nft.defenses._statistics import Excess
from hf_nft.defenses.nft import NFT
from hf_nft.evaluation.run import evaluate
from hf_nft.reporting.figures import BLUE, VERMILLION, short_names
from hf_nft.suspect import load_suspect
from hf_nft.workflows import PurifyJob
from hf_nft.workflows.purify_job import Case

DPI = 100
GREY = "#999999"
WIDE = 8.0  # inches: 800 pixels


def fresh(case: Case, job: PurifyJob) -> Case:
    """Return the case with its suspect loaded anew, since a cure changes it."""
    return dataclasses.replace(case, suspect=load_suspect(job.model))


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


def draw_cut(line: Line, ends: int, allowed: float) -> Figure:
    """Draw what clean shots notice along the line of candidates, where that ends the cut, and ASR and ACC beside it."""
    figure = Figure(figsize=(WIDE, 4.6), dpi=DPI, layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    for curve, colour, label in ((line.acc, BLUE, "ACC"), (line.asr, VERMILLION, "ASR")):
        above.plot(curve.keys(), [100 * value for value in curve.values()], ".-", color=colour, label=label)
    bare(above, "The cut alone, no mask trained yet (used here for understanding only)", "", "percent")
    below.plot(line.harm.keys(), line.harm.values(), ".-", color=GREY, label="clean shots")
    below.axhline(allowed, color="black", linewidth=0.8, linestyle="--", label=f"most that is allowed: {allowed:g}")
    bare(below, "How far answers are from the suspect's: all that the defense sees", "units cut", "nats")
    for axes in (above, below):
        axes.axvline(ends, color="black", linewidth=1, label=f"the cut ends: {ends} units")
        axes.set_ylim(bottom=0)
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
    line = walk(case, suspect, defense)
    found = line.found
    before = look(suspect, case.eval_set, target)
    cutting = dataclasses.replace(job, defense=dataclasses.replace(defense, steps=0)).cure(fresh(case, job))
    cut = torch.cat([mask.detach().cpu() for mask in masks(cutting.model).values()]) == 0
    cured = job.cure(fresh(case, job))
    after = look(cured.model, case.eval_set, target)
    others, names = alike(found.layers, cut), short_names(list(masks(suspect)))
    measured = {"before": case.before}
    measured |= {name: evaluate(r.model, case.eval_set) for name, r in (("cut_alone", cutting), ("cured", cured))}
    values = {name: {k: m.value for k, m in metrics.items()} for name, metrics in measured.items()}
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
        **{name: cutting.details[name] for name in ("cut_by_size", "cut_as_outliers", "cut_further")},
        "by_units_cut": {"harm": line.harm, "asr": line.asr, "acc": line.acc},
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
        "cut": draw_cut(line, int(cut.sum()), defense.harm),
        "responses": draw_responses(before, after, cut, others),
        "trigger": draw_trigger(found, before.effect, cut, rank),
    }
    return figures, numbers


if __name__ == "__main__":
    main()
