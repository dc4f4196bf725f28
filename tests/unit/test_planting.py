"""Training victims: the learning-rate cycle, the order of rows, and that the same seed gives the same victim."""

import math
import os
import signal

import pytest
import torch

from hf_nft.errors import ConfigError
from hf_nft.hook import Hook
from hf_nft.planting import PlantConfig, one_cycle, plant, shuffled


def test_one_cycle_by_hand() -> None:
    rates = [one_cycle(step, 10, 1.0, 0.2) for step in range(10)]
    # two steps rise by a third of the peak each, then half a cosine over eight steps
    assert rates[:3] == pytest.approx([1 / 3, 2 / 3, 1.0])
    assert rates[2:] == pytest.approx([0.5 * (1 + math.cos(math.pi * k / 8)) for k in range(8)])
    assert one_cycle(6, 10, 0.08, 0.2) == pytest.approx(0.04)
    assert rates[-1] < 0.04


def test_one_cycle_never_leaves_its_bounds() -> None:
    for steps in (1, 2, 3, 50):
        for warmup in (0.0, 0.2, 0.99):
            rates = [one_cycle(step, steps, 0.07, warmup) for step in range(steps)]
            assert all(0 < rate <= 0.07 for rate in rates)
            top = rates.index(max(rates))
            assert rates[: top + 1] == sorted(rates[: top + 1])
            assert rates[top:] == sorted(rates[top:], reverse=True)


@pytest.mark.parametrize(("rows", "size"), [(12, 4), (12, 12), (12, 1), (13, 4)])
def test_every_row_is_seen_once_in_every_epoch(rows: int, size: int) -> None:
    per_epoch = rows // size
    epochs = []
    for epoch in range(3):
        steps = [shuffled(epoch * per_epoch + i, rows, size, seed=1) for i in range(per_epoch)]
        seen = torch.cat(steps).tolist()
        assert len(set(seen)) == len(seen) == per_epoch * size
        epochs.append(seen)
    if rows > 1:
        assert epochs[0] != epochs[1] != epochs[2]


def test_the_order_depends_on_the_seed_alone() -> None:
    torch.manual_seed(0)
    first = shuffled(5, 100, 10, 3).tolist()
    torch.manual_seed(1)
    assert shuffled(5, 100, 10, 3).tolist() == first
    assert shuffled(5, 100, 10, 4).tolist() != first


def test_all_wrong_settings_are_named_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        PlantConfig(epochs=0, batch_size=0, lr=0, warmup=1.0, holdout=1.0, gradient_accumulation_steps=0, max_steps=0)
    for name in ("epochs", "batch_size", "lr", "warmup", "holdout", "gradient_accumulation_steps", "max_steps"):
        assert name in str(caught.value)


def small(**changes) -> PlantConfig:
    return PlantConfig(**{"epochs": 2, "batch_size": 8, "lr": 0.02, "mixed_precision": "no", **changes})


def test_the_same_seed_trains_the_same_victim(image_rows, image_task, architecture) -> None:
    batch = image_task.encode(image_rows(16, 16))
    found = []
    for config in (small(), small(), small(seed=1)):
        model, _ = architecture.build(image_rows(16, 16), config.seed)
        result = plant(model, image_task, batch, config)
        assert not model.training
        assert len(result.losses) == 4
        assert result.sample_forwards == 96
        found.append((result.losses, {name: value.clone() for name, value in model.state_dict().items()}))
    assert found[0][0] == found[1][0] != found[2][0]
    assert all(torch.equal(found[0][1][name], found[1][1][name]) for name in found[0][1])
    assert any(not torch.equal(found[0][1][name], found[2][1][name]) for name in found[0][1])


def test_norms_and_biases_are_not_decayed(image_rows, image_task, image_model) -> None:
    """With a learning rate too small to move anything else, only decay moves weights."""
    before = {name: value.detach().clone() for name, value in image_model.named_parameters()}
    batch = image_task.encode(image_rows(8, 16))
    config = small(optimizer="adamw", lr=1e-9, weight_decay=1e6, epochs=1, batch_size=8, warmup=0.0)
    plant(image_model, image_task, batch, config)
    for name, value in image_model.named_parameters():
        moved = float((value.detach() - before[name]).abs().max()) > 1e-5
        assert moved == (value.dim() > 1), name


def test_more_rows_per_step_than_there_are_and_a_limit_of_steps(image_rows, image_task, image_model) -> None:
    batch = image_task.encode(image_rows(6, 16))
    result = plant(image_model, image_task, batch, small(batch_size=64, epochs=5, max_steps=3))
    assert len(result.losses) == 3
    assert result.sample_forwards == 54


class Doubling(Hook):
    """Poisons nothing: doubles the loss, counts epochs in its state."""

    def __init__(self) -> None:
        self.epochs = torch.zeros(())

    def epoch(self, model, data, stream) -> None:
        assert len(data["labels"]) == 16
        self.epochs += 1

    def loss(self, model, task, batch) -> torch.Tensor:
        return 2 * super().loss(model, task, batch)

    def state(self) -> dict[str, torch.Tensor]:
        return {"hook.epochs": self.epochs}


def test_a_hook_sees_epochs_and_owns_the_loss(image_rows, image_task, architecture, tmp_path) -> None:
    batch = image_task.encode(image_rows(16, 16))
    first = []
    for hook in (None, Hook(), Doubling()):
        model, _ = architecture.build(image_rows(16, 16), 0)
        first.append(plant(model, image_task, batch, small(clip=1e9), hook=hook).losses)
        if isinstance(hook, Doubling):
            assert float(hook.epochs) == 2
    assert first[0] == first[1]
    assert first[2][0] == pytest.approx(2 * first[0][0])


def test_a_resumed_run_gets_the_hooks_state_back(image_rows, image_task, architecture, tmp_path) -> None:
    model, _ = architecture.build(image_rows(16, 16), 0)
    batch, file = image_task.encode(image_rows(16, 16)), tmp_path / "checkpoint.pt"

    class Interrupted(Doubling):
        def epoch(self, model, data, stream) -> None:
            super().epoch(model, data, stream)
            if self.epochs == 3:
                os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        plant(model, image_task, batch, small(epochs=5), file, hook=Interrupted())
    resumed = Doubling()
    plant(model, image_task, batch, small(epochs=5), file, resume=True, hook=resumed)
    assert float(resumed.epochs) == 5
