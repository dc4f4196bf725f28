"""The loop: what a step draws, what accumulation may not change, how a run stops, fails and resumes."""

import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from hf_nft.acceleration import NARROW, make_accelerator
from hf_nft.checkpoint import Checkpoint
from hf_nft.errors import ConfigError, DivergedError, OutputError, UnknownNameError
from hf_nft.loop import Loop, Stage, generator
from hf_nft.types import Draw

ROWS = {
    "x": torch.randn(12, 3, generator=torch.Generator().manual_seed(0)),
    "y": torch.randn(12, 1, generator=torch.Generator().manual_seed(1)),
}


def linear() -> nn.Linear:
    model = nn.Linear(3, 1)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[0.5, -1.0, 2.0]]))
        model.bias.zero_()
    return model


def squared(network: nn.Module, draw: Draw) -> torch.Tensor:
    return ((network(draw.batch["x"]) - draw.batch["y"]) ** 2).mean()


def some(step: int, stream: torch.Generator, size: int = 5) -> Draw:
    rows = torch.randint(12, (size,), generator=stream)
    return Draw({key: value[rows] for key, value in ROWS.items()})


def stage(model: nn.Module, steps: int = 6, **changes) -> Stage:
    fields = {
        "name": "fit",
        "steps": steps,
        "draw": some,
        "objective": squared,
        "optimizer": torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9),
        "lr": lambda step: 0.01,
    }
    return Stage(**{**fields, **changes})


def train(model: nn.Module, loop: Loop | None = None, **changes) -> list[float]:
    loop = loop or Loop(make_accelerator("no"), 0)
    return loop.run(stage(model, **changes), model, lambda: dict(model.named_parameters()))


# random streams


def test_a_stream_depends_on_seed_stage_and_step_alone() -> None:
    def first(*key) -> list[float]:
        return torch.rand(4, generator=generator(*key)).tolist()

    torch.manual_seed(1)
    before = first(0, "masks", 3)
    torch.manual_seed(2)
    assert first(0, "masks", 3) == before
    others = [
        first(*key) for key in ((1, "masks", 3), (0, "mask", 3), (0, "masks", 4), (0, "masks3", 0), (-1, "masks", 3))
    ]
    assert all(other != before for other in others)
    assert len({tuple(first(seed, "a", step)) for seed in range(20) for step in range(20)}) == 400
    # streams never change, so that runs can be repeated years later
    assert torch.randint(1000, (3,), generator=generator(0, "masks", 0)).tolist() == FIRST_DRAWS


FIRST_DRAWS = [952, 158, 561]


def test_draws_do_not_depend_on_earlier_stages_or_steps() -> None:
    drawn: list[list[int]] = []

    def recording(step: int, stream: torch.Generator) -> Draw:
        drawn.append(torch.randint(99, (3,), generator=stream).tolist())
        return some(step, stream)

    loop = Loop(make_accelerator("no"), 4)
    train(linear(), loop, name="one", draw=recording, steps=3)
    train(linear(), loop, name="two", draw=recording, steps=2)
    train(linear(), Loop(make_accelerator("no"), 4), name="two", draw=recording, steps=2)
    assert drawn[3:5] == drawn[5:7]
    assert drawn[0] != drawn[3]


def test_the_callers_random_state_is_left_alone() -> None:
    torch.manual_seed(5)
    model = nn.Sequential(nn.Dropout(0.5), linear()).train()
    before = torch.random.get_rng_state()
    train(model, steps=3)
    assert torch.equal(before, torch.random.get_rng_state())


def test_dropout_is_seeded_too() -> None:
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Dropout(0.5), linear()).train()
        found.append(train(model, steps=4))
    assert found[0] == found[1]


# steps and accumulation


def test_steps_are_plain_sgd_with_momentum() -> None:
    model, reference = linear(), linear()
    losses = train(model, steps=5, lr=lambda step: 0.02 / (step + 1))
    momentum = [torch.zeros_like(p) for p in reference.parameters()]
    for step in range(5):
        loss = squared(reference, some(step, generator(0, "fit", step)))
        assert losses[step] == pytest.approx(float(loss.detach()), rel=1e-5)
        gradients = torch.autograd.grad(loss, list(reference.parameters()))
        with torch.no_grad():
            for parameter, buffer, gradient in zip(reference.parameters(), momentum, gradients, strict=True):
                buffer.mul_(0.9).add_(gradient)
                parameter.sub_(0.02 / (step + 1) * buffer)
    for mine, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        assert torch.allclose(mine, theirs, atol=1e-6)


@pytest.mark.parametrize("parts", [2, 3, 4])
def test_uneven_micro_batches_give_the_gradient_of_the_whole(parts: int) -> None:
    whole, split = linear(), linear()
    draw = lambda step, stream: some(step, stream, 11)  # noqa: E731 - 11 rows fall into uneven parts
    losses = train(whole, draw=draw)
    pieces: list[int] = []

    def counting(network: nn.Module, part: Draw) -> torch.Tensor:
        pieces.append(len(part.batch["x"]))
        return squared(network, part)

    found = train(split, Loop(make_accelerator("no", parts), 0), draw=draw, objective=counting)
    assert pieces[:parts] == {2: [6, 5], 3: [4, 3, 4], 4: [3, 3, 2, 3]}[parts]
    assert found == pytest.approx(losses, rel=1e-5)
    for mine, theirs in zip(whole.parameters(), split.parameters(), strict=True):
        assert torch.allclose(mine, theirs, atol=1e-6)


def test_a_draw_is_prepared_once_and_used_several_times() -> None:
    """What a part carries is made on its own rows, and is there at every step on the draw."""
    drawn: list[int] = []
    prepared: list[list[float]] = []
    used: list[list[float]] = []

    def recording(step: int, stream: torch.Generator) -> Draw:
        drawn.append(step)
        return some(step, stream)

    def answer(part: Draw) -> Draw:
        assert not torch.is_grad_enabled()
        prepared.append(part.batch["y"].tolist())
        return replace(part, answers={"z": part.batch["y"] * 2})

    def told(network: nn.Module, part: Draw) -> torch.Tensor:
        used.append((part.answers["z"] / 2).tolist())
        return squared(network, part)

    loop = Loop(make_accelerator("no", 2), 0)
    train(linear(), loop, steps=5, draw=recording, prepare=answer, objective=told, reuse=2)
    assert drawn == [0, 2, 4]
    assert len(prepared) == 6
    assert used == [*prepared[:2] * 2, *prepared[2:4] * 2, *prepared[4:]]
    assert loop.sample_forwards == 5 * 5 * 3 + 3 * 5  # steps on five rows, and three answers to five rows


def test_each_part_keeps_its_partners() -> None:
    draw = Draw({"x": torch.arange(6)}, {"x": torch.arange(6) * 10}, 0.3)
    part = draw.part(slice(2, 5))
    assert part.batch["x"].tolist() == [2, 3, 4]
    assert part.partner["x"].tolist() == [20, 30, 40]
    assert part.lam == 0.3
    assert Draw({"x": torch.arange(6)}).part(slice(0, 2)).partner is None


def test_more_parts_than_rows_is_an_error_of_ours() -> None:
    with pytest.raises((ConfigError, DivergedError), match="micro-batches"):
        train(linear(), Loop(make_accelerator("no", 8), 0))


def test_without_an_optimizer_nothing_is_learnt() -> None:
    model, loop = linear(), Loop(make_accelerator("no"), 0)
    train(model, loop, optimizer=None, steps=4)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), linear().parameters(), strict=True))
    assert (loop.steps, loop.sample_forwards, loop.losses) == (4, 20, {})


@pytest.mark.parametrize("native", [False, True])
def test_the_precision_goes_with_what_is_stored(native: bool, monkeypatch) -> None:
    monkeypatch.setattr("hf_nft.acceleration.native_bf16", lambda: native)
    chosen = {dtype: make_accelerator("auto", model=linear().to(dtype)).mixed_precision for dtype in (*NARROW, None)}
    other = "bf16" if native else "no"
    assert chosen == {torch.float16: "fp16", torch.bfloat16: other, None: other}
    for dtype, wrong in ((torch.float16, "bf16"), (torch.bfloat16, "fp16")):
        with pytest.raises(ConfigError, match=f"for a model stored in {NARROW[dtype]}, found {wrong}"):
            make_accelerator(wrong, model=linear().to(dtype))


def test_an_unknown_precision_is_refused() -> None:
    with pytest.raises((UnknownNameError, ConfigError, ValueError), match="bf16"):
        make_accelerator("bf61")


# stopping and failing


def test_a_stage_stops_when_asked_and_looks_as_often_as_it_says() -> None:
    seen: list[int] = []
    model, loop = linear(), Loop(make_accelerator("no"), 0)

    def stop() -> bool:
        seen.append(loop.steps)
        return loop.steps >= 7

    losses = train(model, loop, steps=50, stop=stop, look_every=3)
    assert seen == [3, 6, 9]
    assert len(losses) == 9


def test_divergence_restores_the_last_good_state(tmp_path: Path) -> None:
    model = linear()
    states: list[torch.Tensor] = []

    def breaks(network: nn.Module, draw: Draw) -> torch.Tensor:
        loss = squared(network, draw)
        return loss * (float("nan") if len(states) == 7 else 1.0)

    loop = Loop(make_accelerator("no"), 0, Checkpoint(every=3))
    with pytest.raises(DivergedError, match="Lower the learning rate"):
        train(
            model,
            loop,
            steps=20,
            objective=breaks,
            after_step=lambda: states.append(model.weight.detach().clone()),
        )
    assert torch.equal(model.weight, states[5])  # after 6 steps, the last checkpoint before step 7 broke
    assert model.weight.isfinite().all()


def test_without_a_checkpoint_divergence_restores_the_start() -> None:
    model = linear()
    with pytest.raises(DivergedError):
        train(model, objective=lambda network, draw: squared(network, draw) * float("inf"), steps=3)
    assert torch.equal(model.weight, linear().weight)


@pytest.mark.parametrize("steps", [3, 4])
def test_an_update_that_overflows_is_not_kept_as_good(steps: int) -> None:
    """The loss of the step that overflows is finite itself; only the weights, or the next loss, tell."""
    model = linear()
    loop = Loop(make_accelerator("no"), 0, Checkpoint(every=1))
    with pytest.raises(DivergedError):
        train(model, loop, steps=steps, lr=lambda step: 0.01 if step < 2 else 1e38)
    assert all(parameter.isfinite().all() for parameter in model.parameters())


# interruption


@pytest.mark.parametrize("reuse", [1, 4])
def test_an_interrupted_run_goes_on_as_if_it_had_not_been(tmp_path: Path, reuse: int) -> None:
    """Also when it stops between two steps on one draw."""
    whole, part = linear(), linear()
    losses = train(whole, steps=10, reuse=reuse)
    done: list[int] = []

    def interrupt(network: nn.Module, draw: Draw) -> torch.Tensor:
        done.append(1)
        if len(done) == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        return squared(network, draw)

    file = tmp_path / "state.pt"
    first = Loop(make_accelerator("no"), 0, Checkpoint(file, every=4, facts={"seed": 0}))
    with pytest.raises(KeyboardInterrupt):
        train(part, first, steps=10, objective=interrupt, reuse=reuse)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert len(done) == 6
    again = linear()
    loop = Loop(make_accelerator("no"), 0, Checkpoint(file, resume=True, facts={"seed": 0}))
    assert train(again, loop, steps=10, reuse=reuse) == losses
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))
    assert (loop.steps, loop.sample_forwards) == (10, 150)
    assert [p.name for p in tmp_path.iterdir()] == ["state.pt"]


def test_what_was_learnt_is_not_learnt_again_if_a_run_stops_after_it(tmp_path: Path) -> None:
    """Whatever is computed between, and asked of the model after."""
    file = tmp_path / "state.pt"
    loop = Loop(make_accelerator("no"), 0, Checkpoint(file, every=4))
    first = linear()
    losses = list(train(first, loop, steps=6))
    loop.once("asked", lambda: torch.tensor(train(linear(), loop, name="asking", steps=4, optimizer=None)))
    later, again = Loop(make_accelerator("no"), 0, Checkpoint(file, resume=True)), linear()
    assert train(again, later, steps=6) == losses
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert (later.steps, later.sample_forwards) == (loop.steps, loop.sample_forwards) == (10, 6 * 15 + 4 * 5)


def test_resuming_with_other_settings_or_a_broken_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "state.pt"
    Checkpoint(file, facts={"lr": 0.1, "seed": 0}).write({"stage": None})
    with pytest.raises(OutputError, match="found other lr"):
        Checkpoint(file, resume=True, facts={"lr": 0.2, "seed": 0}).read()
    assert Checkpoint(file, resume=False, facts={"lr": 0.2}).read() is None
    assert Checkpoint(tmp_path / "none.pt", resume=True).read() is None
    file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(OutputError, match="--resume"):
        Checkpoint(file, resume=True).read()


def test_a_finished_product_is_not_computed_twice(tmp_path: Path) -> None:
    calls: list[str] = []

    def compute() -> torch.Tensor:
        calls.append("x")
        train(linear(), loop, name="inner", steps=3)
        return torch.arange(3.0)

    file = tmp_path / "state.pt"
    loop = Loop(make_accelerator("no"), 0, Checkpoint(file, every=1))
    assert loop.once("product", compute).tolist() == [0, 1, 2]
    assert loop.once("product", compute).tolist() == [0, 1, 2]
    later = Loop(make_accelerator("no"), 0, Checkpoint(file, resume=True))
    assert later.once("product", compute).tolist() == [0, 1, 2]
    assert calls == ["x"]
    assert later.losses == loop.losses
    assert later.steps == 3


def scaling(scale: float) -> Accelerator:
    """Return the setup of a GPU in fp16, on the CPU."""
    accelerator = make_accelerator("fp16")
    accelerator.native_amp = True
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    return accelerator


def test_earlier_stages_do_not_scale_gradients_down() -> None:
    """Where the loss is scaled, clipping unscales for every optimizer that the setup still knows."""
    ends = []
    for scale in (1.0, 1024.0):
        accelerator, model = scaling(scale), linear()
        for seed in range(3):
            train(model, Loop(accelerator, seed), clip=1e6)
        ends.append(model.weight.detach())
    assert not torch.allclose(ends[0], linear().weight, atol=0.1)
    assert torch.allclose(*ends, atol=5e-3)


def test_weights_in_fp16_are_not_trained_where_the_loss_is_scaled() -> None:
    model = linear().half()
    with pytest.raises(ConfigError, match="Pass --mixed-precision no"):
        train(model, Loop(scaling(1024.0), 0))
    half = {"draw": lambda step, stream: Draw({key: value.half() for key, value in some(step, stream).batch.items()})}
    assert len(train(model, Loop(make_accelerator("no"), 0), **half)) == 6
