"""The controls: each changes what its name says, and nothing else."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hf_nft import registry
from hf_nft.defenses.base import Defense, set_modes
from hf_nft.defenses.bn_refresh_only import BNRefreshOnly
from hf_nft.defenses.finetune import FineTune
from hf_nft.defenses.identity import Identity
from hf_nft.errors import ConfigError
from hf_nft.loop import generator
from hf_nft.purification import purify


def snapshot(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def changed(before: dict[str, torch.Tensor], model: nn.Module) -> set[str]:
    return {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}


def is_statistic(name: str) -> bool:
    return name.endswith(("running_mean", "running_var", "num_batches_tracked"))


def test_identity_leaves_every_weight(image_model, image_task, image_shots) -> None:
    before = snapshot(image_model)
    result = purify(image_model, image_task, image_shots, Identity(mixed_precision="no"))
    assert result.merged() is image_model
    assert changed(before, image_model) == set()
    assert (result.steps, result.sample_forwards, result.losses) == (0, 0, {})


def test_bn_refresh_changes_statistics_only(image_model, image_task, image_shots) -> None:
    before = snapshot(image_model)
    result = purify(image_model, image_task, image_shots, BNRefreshOnly(steps=3, batch_size=8, mixed_precision="no"))
    assert changed(before, image_model) == {name for name in before if is_statistic(name)}
    assert (result.steps, result.sample_forwards) == (3, 24)
    assert not any(module.training for module in result.model.modules())
    assert all(p.grad is None for p in image_model.parameters())


def test_bn_refresh_is_the_exponential_average_of_its_batches(image_model, image_task, image_shots) -> None:
    reference = copy.deepcopy(image_model).train()
    defense = BNRefreshOnly(steps=4, batch_size=8, mixup_alpha=0.0, augment="none", mixed_precision="no", seed=2)
    purify(image_model, image_task, image_shots, defense)
    x = image_task.inputs(image_model, image_shots.batch)["pixel_values"]
    with torch.no_grad():
        for step in range(4):
            reference(x[torch.randint(20, (8,), generator=generator(2, "refresh", step))])
    expected = reference.state_dict()
    for name, value in image_model.state_dict().items():
        assert torch.allclose(value.float(), expected[name].float(), atol=1e-5), name


@pytest.mark.parametrize(
    ("control", "settings"), [(FineTune, ("mixup_alpha", "weight_decay")), (BNRefreshOnly, ("mixup_alpha", "steps"))]
)
def test_settings_of_controls_are_not_negative(control: type[Defense], settings: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as caught:
        control(**dict.fromkeys(settings, -1))
    for name in settings:
        assert f"{name}: expected >= 0, found -1" in str(caught.value)


def test_finetuning_changes_every_weight_and_fits_the_shots(image_model, image_task, image_shots) -> None:
    before = snapshot(image_model)
    defense = FineTune(epochs=15, batch_size=20, augment="none", mixed_precision="no", lr=0.05)
    result = purify(image_model, image_task, image_shots, defense)
    assert changed(before, image_model) == set(before)
    losses = result.losses["finetune"]
    assert len(losses) == result.details["steps"] == 15
    assert sum(losses[-3:]) < 0.5 * sum(losses[:3])


def test_finetuning_is_sgd_with_decay_and_a_cosine(image_model, image_task, image_shots) -> None:
    reference = copy.deepcopy(image_model).train()
    defense = FineTune(epochs=3, batch_size=20, augment="none", mixed_precision="no", lr=0.02, weight_decay=0.1)
    purify(image_model, image_task, image_shots, defense)
    x, y = image_task.inputs(image_model, image_shots.batch)["pixel_values"], image_shots.batch["labels"]
    buffers = [torch.zeros_like(p) for p in reference.parameters()]
    for step, rate in enumerate((0.02, 0.015, 0.005)):  # 0.01 (1 + cos(pi step / 3))
        rows = torch.randint(20, (20,), generator=generator(0, "finetune", step))
        loss = F.cross_entropy(reference(x[rows]).logits, y[rows])
        gradients = torch.autograd.grad(loss, list(reference.parameters()))
        with torch.no_grad():
            for p, buffer, gradient in zip(reference.parameters(), buffers, gradients, strict=True):
                buffer.mul_(0.9).add_(gradient + 0.1 * p)
                p.sub_(rate * buffer)
    for (name, mine), theirs in zip(image_model.named_parameters(), reference.parameters(), strict=True):
        assert torch.allclose(mine, theirs, atol=1e-4), name


@pytest.mark.parametrize("name", registry.names("defenses"))
def test_every_defense_ends_in_evaluation_mode_and_repeats_itself(name, image_model, image_task, image_shots) -> None:
    quick = {
        "nft": {"exposures": 1, "unlearn_steps": 2, "relearn_passes": 1, "steps": 2},
        "bn_refresh_only": {"steps": 2},
        "finetune": {"epochs": 2},
    }.get(name, {})
    defense = registry.get("defenses", name).from_preset(batch_size=8, mixed_precision="no", **quick)
    found = []
    for _ in range(2):
        result = purify(copy.deepcopy(image_model), image_task, image_shots, defense)
        assert not any(module.training for module in result.model.modules())
        assert result.seconds >= 0
        assert result.mixed_precision == "no"
        assert result.settings["defense"] == name
        found.append(snapshot(result.merged()))
        assert found[-1].keys() == image_model.state_dict().keys()
    assert all(torch.equal(found[0][key], found[1][key]) for key in found[0])


def test_statistics_and_dropout_are_switched_apart(image_model) -> None:
    model = nn.Sequential(image_model, nn.Dropout(0.5), nn.BatchNorm1d(4), nn.GroupNorm(2, 4))
    for statistics in (False, True):
        for dropout in (False, True):
            set_modes(model, statistics, dropout)
            assert model[1].training == dropout
            assert model[2].training == statistics
            norms = [m for m in image_model.modules() if isinstance(m, nn.BatchNorm2d)]
            assert {norm.training for norm in norms} == {statistics}
