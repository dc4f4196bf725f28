"""Which modules get masks, on which side and how many, in registration order.

Names are those in memory, relative to the model. A module that is registered under several names, belongs to another
adapter, is quantised, or shares its weight with the embeddings is never chosen; `skipped_modules` says why.

Source: defenses.md 1.3 (the reference leaves the stem unmasked) and 1.10.
"""

import re
from dataclasses import dataclass
from itertools import zip_longest

from torch import nn

from hf_nft.adapter.config import NFTConfig
from hf_nft.adapter.layer import NFTLayer, owns_statistics
from hf_nft.adapter.rules import Rule, Side, output_units
from hf_nft.adapter.survey import Survey, base_model, survey_model
from hf_nft.adapter.units import unit_sites
from hf_nft.errors import ConfigError, SuspectError, UnknownNameError

HINT = "List them with: hf-nft ls modules MODEL"
_HEAD_NAMES = frozenset("classifier lm_head score cls head heads fc qa_outputs logits linear_head".split())


@dataclass(frozen=True)
class Target:
    """One maskable module.

    Attributes:
        side: `gain` of a norm, `output` channels, or `input` columns.
        size: Number of coordinates on that side.
        units: Number of masks; each covers `size / units` neighbouring coordinates (a head's features), else equal.
    """

    side: Side
    size: int
    units: int


def maskable_modules(model: nn.Module) -> dict[str, Target]:
    """List every module that can be masked, chosen by default or not, with the side it is masked on by default.

    Args:
        model: Any model, also one that carries an adapter.

    Returns:
        Name -> target, in registration order.
    """
    model = base_model(model)
    found, sites = survey_model(model).rules, unit_sites(model)
    return {name: _target(module, rule, sites.get(name)) for name, (module, rule) in found.items()}


def skipped_modules(model: nn.Module) -> dict[str, str]:
    """List the layers that cannot be masked.

    Args:
        model: Any model.

    Returns:
        Name -> why not, in registration order.
    """
    return survey_model(base_model(model)).skipped


def _target(module: nn.Module, rule: Rule, units: int | None) -> Target:
    if units is not None and rule.in_axis is not None:
        return Target("input", _size(module, rule.in_axis), units)
    size = output_units(module, rule)
    return Target(rule.side, size, size)


def _size(module: nn.Module, axis: int) -> int:
    assert isinstance(module.weight, nn.Parameter)
    return module.weight.shape[axis]


def resolve_targets(model: nn.Module, config: NFTConfig) -> dict[str, Target]:
    """Decide which modules get masks.

    Args:
        model: The suspect model, also one that already carries an adapter.
        config: Placement or explicit names. Fields filled in by an earlier resolution are not looked at.

    Returns:
        Name -> target, in registration order, never empty.

    Raises:
        UnknownNameError: If a name in `target_modules` or `exclude_modules` matches no module.
        ConfigError: If a named module cannot be masked, such as an output layer tied to the embeddings.
        SuspectError: If the model has nothing to mask.
    """
    return resolve(model, config)[1]


def resolve(model: nn.Module, config: NFTConfig) -> tuple[str, dict[str, Target]]:
    """Like `resolve_targets`, and also say which placement was used.

    Args:
        model: The suspect model.
        config: Placement or explicit names.

    Returns:
        The placement, `explicit` for named modules, and the targets.

    Raises:
        UnknownNameError: If a name matches no module.
        ConfigError: If a named module cannot be masked.
        SuspectError: If the model has nothing to mask.
    """
    model = base_model(model)
    survey = survey_model(model)
    excluded = set() if config.exclude_modules is None else match_names(survey, config.exclude_modules, "exclude")
    if config.target_modules is not None:
        names = match_names(survey, config.target_modules, "target") - excluded
        chosen, used = _explicit(model, survey, names, config.placement), "explicit"
    else:
        wanted = ("bn", "units", "norm", "channels") if config.placement == "auto" else (config.placement,)
        chosen, used = {}, wanted[-1]
        for placement in wanted:
            chosen = _placed(model, survey, placement, config.mask_stem)
            chosen = {name: target for name, target in chosen.items() if name not in excluded}
            if chosen:
                used = placement
                break
    if not chosen:
        raise SuspectError(
            f"{type(model).__name__} has nothing to mask with placement={config.placement!r} "
            f"({len(survey.rules)} maskable modules, {len(survey.skipped)} skipped, {len(excluded)} excluded). "
            f"Use another placement, or name target_modules. {HINT}"
        )
    return used, chosen


def match_names(survey: Survey, wanted: list[str] | str, kind: str) -> set[str]:
    """Find the modules that names, dotted suffixes or one regular expression stand for.

    Args:
        survey: The model's layers.
        wanted: Names or suffixes; a single string is a regular expression over full names.
        kind: `target` or `exclude`; excluding something that cannot be masked anyway is allowed.

    Returns:
        Full names, not empty.

    Raises:
        UnknownNameError: If one of them matches nothing.
        ConfigError: If a target is matched by unmaskable modules only, or the expression is not valid.
    """
    matched: set[str] = set()
    for item in [wanted] if isinstance(wanted, str) else wanted:
        try:
            pattern = re.compile(item) if isinstance(wanted, str) else re.compile(rf"(.*\.)?{re.escape(item)}")
        except re.error as error:
            raise ConfigError(f"{kind}_modules: {item!r} is not a regular expression ({error}).") from error
        found = {name for name in survey.rules if pattern.fullmatch(name)}
        refused = {name: why for name, why in survey.skipped.items() if pattern.fullmatch(name)}
        if not found and not refused:
            raise UnknownNameError("module", item, survey.rules, HINT)
        if not found and kind == "target":
            name, why = next(iter(refused.items()))
            raise ConfigError(f"target_modules: '{name}' cannot be masked: it {why}. {HINT}")
        matched |= found
    return matched


def _explicit(model: nn.Module, survey: Survey, names: set[str], placement: str) -> dict[str, Target]:
    """Targets for named modules; the placement picks the side of linear layers."""
    sites = {} if placement == "channels" else unit_sites(model)
    chosen = {}
    for name, (module, rule) in survey.rules.items():
        if name in names:
            units = sites.get(name)
            if placement == "units" and units is None and rule.in_axis is not None:
                units = _size(module, rule.in_axis)
            chosen[name] = _target(module, rule, units)
    return chosen


def _placed(model: nn.Module, survey: Survey, placement: str, mask_stem: bool) -> dict[str, Target]:
    """Targets of one placement, which may be none."""
    gains = {name: found for name, found in survey.rules.items() if found[1].side == "gain"}
    if placement == "units":
        sites = unit_sites(model)
        return {n: _target(m, r, sites[n]) for n, (m, r) in survey.rules.items() if n in sites}
    if placement == "bn":
        picked = [name for name, (module, _) in gains.items() if "BatchNorm" in _family(module)]
    elif placement == "norm":
        picked = list(gains)
    else:
        picked = _channels(model, survey)
    if not mask_stem:
        picked = _without_stem(picked, survey)
    return {name: _target(*survey.rules[name], None) for name in picked}


def _family(module: nn.Module) -> str:
    """Class names of a module and its bases; FrozenBatchNorm classes of detectors only share the name."""
    return " ".join(cls.__name__ for cls in type(module).__mro__)


def _channels(model: nn.Module, survey: Survey) -> list[str]:
    """Output channels; where a norm over the same channels comes next, it carries the mask instead.

    BatchNorm divides out a scale on the weights before it, so there the mask would do nothing in training mode.
    """
    heads = _heads(model, list(survey.rules))
    names = [name for name in survey.rules if name not in heads]
    picked: dict[str, None] = {}
    for name, following in zip_longest(names, names[1:], fillvalue=""):
        module, rule = survey.rules[name]
        if rule.side == "gain":
            continue
        after, after_rule = survey.rules.get(following, (None, None))
        if after is not None and after_rule is not None and after_rule.side == "gain":
            takes_over = rule.spatial > 0 or "BatchNorm" in _family(after)
            if takes_over and output_units(after, after_rule) == output_units(module, rule):
                picked[following] = None
                continue
        picked[name] = None
    return [name for name in survey.rules if name in picked]


def _heads(model: nn.Module, names: list[str]) -> set[str]:
    """Classifier and language-model heads: everything outside a transformers backbone, else the last layer."""
    prefix = getattr(model, "base_model_prefix", "")
    if prefix and isinstance(getattr(model, prefix, None), nn.Module):
        return {name for name in names if not name.startswith(prefix + ".")}
    named = {name for name in names if name.split(".")[0] in _HEAD_NAMES}
    return named or set(names[-1:])


def _without_stem(names: list[str], survey: Survey) -> list[str]:
    """Leave out layers before and outside the first numbered block, in models that have numbered blocks."""
    order = {name: i for i, name in enumerate(survey.rules)}
    blocks = tuple(container + "." for container in survey.containers)
    inside = [i for name, i in order.items() if blocks and name.startswith(blocks)]
    kept = [name for name in names if inside and order[name] >= inside[0]]
    return kept if 2 * len(kept) >= len(names) else names  # a stem is small; otherwise this is no stem


def statistics_modules(model: nn.Module, masked: dict[str, Target]) -> list[str]:
    """Unmasked BatchNorms: their statistics move in training mode too, so the adapter must own them.

    Args:
        model: The suspect model.
        masked: The targets.

    Returns:
        Names in registration order.
    """
    model = base_model(model)
    survey = survey_model(model)
    outside = {n for n, why in survey.skipped.items() if "adapter" in why}
    found = []
    for name, module in model.named_modules():
        if name.rpartition(".")[2] == "base_layer" or name in outside or name in masked:
            continue
        base = module.get_base_layer() if isinstance(module, NFTLayer) else module
        if owns_statistics(base):
            found.append(name)
    return found
