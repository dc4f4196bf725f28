"""Attacks that train something first: artefacts, and each attack against what its paper says."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hf_nft.attacks._artefacts import FACTS, WEIGHTS, TrainedAttack, normalization
from hf_nft.attacks._nets import PatternNet, stages
from hf_nft.attacks._similarity import ssim
from hf_nft.attacks.clb import Clb, ascended
from hf_nft.attacks.dyn import Dyn, distance, sharpened
from hf_nft.attacks.fba import Fba, gram, injected, random_filters, sunrise
from hf_nft.attacks.issba import Issba
from hf_nft.attacks.lira import Lira
from hf_nft.attacks.troj import Troj
from hf_nft.errors import ConfigError, DataError
from hf_nft.evaluation.run import evaluate, make_eval_set
from hf_nft.models.base import image_processor
from hf_nft.models.preact_resnet18 import PreActResNet18
from hf_nft.planting import PlantConfig, plant
from hf_nft.tasks.image_classification import ImageClassification
from hf_nft.workflows.attack_job import Scene, prepared

RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def ready(image_rows) -> Callable[[TrainedAttack], TrainedAttack]:
    """Train an attack's artefact on 40 images of 16 pixels."""

    def train(attack: TrainedAttack) -> TrainedAttack:
        defaults = {field.name: field.default for field in dataclasses.fields(attack)}
        tiny = {name: value for name, value in attack.tiny.items() if getattr(attack, name) == defaults[name]}
        rows, task = image_rows(40, 16), ImageClassification(image_processor(16))
        architecture = PreActResNet18(width=4, image_size=16)
        return prepared(Scene(dataclasses.replace(attack, **tiny), architecture, task, rows, rows, 4, "toy"), rows)

    return train


def images(count: int = 4, side: int = 16) -> torch.Tensor:
    return torch.rand((count, 3, side, side), generator=torch.Generator().manual_seed(1))


# artefacts


def test_an_artefact_is_two_files_found_again(ready) -> None:
    attack = ready(Troj())
    folder = Path(attack.artefact)
    facts = json.loads((folder / FACTS).read_text())
    assert sorted(file.name for file in folder.iterdir()) == sorted([FACTS, WEIGHTS])
    assert (facts["attack"], facts["height"], facts["width"], facts["classes"]) == ("troj", 16, 16, 4)
    assert facts["mean"] == pytest.approx([0.4914, 0.4822, 0.4465], abs=1e-5)
    assert facts["std"] == pytest.approx([0.2023, 0.1994, 0.2010], abs=1e-5)
    before = (folder / WEIGHTS).stat().st_mtime_ns
    assert ready(Troj()) == attack
    assert (folder / WEIGHTS).stat().st_mtime_ns == before  # not trained again
    assert ready(Troj(seed=1)).artefact != attack.artefact


def test_the_cache_key_of_data_holds_the_artefact(ready, image_rows) -> None:
    attack, rows = ready(Troj()), image_rows(40, 16)
    other = dataclasses.replace(attack, artefact=ready(Troj(value=-100.0)).artefact)
    assert attack.digest() != other.digest()
    plan = attack.plan(np.asarray(rows["label"]), 0.1, "all", 4)
    assert attack._fingerprint(rows, plan, 4) != other._fingerprint(rows, plan, 4)


def test_artefacts_that_do_not_fit_are_refused(ready, image_rows, tmp_path) -> None:
    attack, rows = ready(Troj()), image_rows(40, 16)
    with pytest.raises(DataError, match=r"images of 16x16.*found 32x32"):
        attack.poison(image_rows(40, 32), 0.1, classes=4)
    with pytest.raises(DataError, match=r"expected 4 classes.*found 5"):
        attack.poison(rows, 0.1, classes=5)
    with pytest.raises(ConfigError, match="hf-nft attack train troj"):
        Troj().poison(rows, 0.1, classes=4)
    with pytest.raises(DataError, match="expected one of clb, found one of troj"):
        Clb(artefact=attack.artefact).poison(rows, 0.1, classes=4)
    with pytest.raises(DataError, match="does not load"):
        Troj(artefact=str(tmp_path)).poison(rows, 0.1, classes=4)
    (tmp_path / FACTS).write_text("{")
    (tmp_path / WEIGHTS).write_text("")
    with pytest.raises(DataError, match="does not load"):
        Troj(artefact=str(tmp_path)).poison(rows, 0.1, classes=4)
    processor = image_processor(16)
    processor.image_std = [0.5, 0.5, 0.5]
    with pytest.raises(DataError, match="expected a victim that normalises"):
        attack.check_task(ImageClassification(processor))


def test_constants_are_read_from_the_task(image_task) -> None:
    found = normalization(image_task)
    assert found["mean"] == pytest.approx([0.4914, 0.4822, 0.4465], abs=1e-5)
    assert found["std"] == pytest.approx([0.2023, 0.1994, 0.2010], abs=1e-5)


def test_networks_do_not_depend_on_the_batch(ready) -> None:
    for attack in (Dyn(), Lira(), Issba(), Fba()):
        found = ready(attack)
        many, one = found.trigger_batch(images()), found.trigger_batch(images()[:1])
        assert torch.allclose(many[:1], one, atol=1e-5), attack.name


# TrojanNN


def test_the_patch_drives_the_heaviest_units(ready) -> None:
    attack = ready(Troj(steps=60, value=3.0))
    report = attack.made().facts["report"]
    assert len(report["units"]) == 2
    assert report["last_loss"] < 0.9 * report["first_loss"]
    out = attack.trigger(images()[0], RNG)
    assert torch.equal(out, attack.trigger(out, RNG))  # opaque
    assert Troj().area(32, 32) == (slice(21, 29), slice(21, 29))
    assert Troj().area(224, 224) == (slice(147, 203), slice(147, 203))


# CLB


def test_corners_as_published(ready) -> None:
    out = Clb().trigger_batch(torch.full((1, 3, 32, 32), 0.5))[0]
    right, left = [[0, 0, 1], [0, 1, 0], [1, 0, 1]], [[1, 0, 0], [0, 1, 0], [1, 0, 1]]
    for channel in out:
        for rows in (slice(3), slice(-3, None)):
            assert channel[rows, -3:].tolist() == right
            assert channel[rows, :3].tolist() == left
    faint = Clb(amplitude=32 / 255).trigger_batch(torch.full((1, 3, 32, 32), 0.5))
    assert sorted({round(v * 255, 1) for v in faint.unique().tolist()}) == [95.5, 127.5, 159.5]


def test_noise_climbs_within_its_bound(ready, image_rows) -> None:
    def loss(x: torch.Tensor) -> torch.Tensor:
        return (x * torch.linspace(-1, 1, 16)).sum()

    start = images()
    moved = ascended(loss, start, torch.zeros_like(start), 8 / 255, 1.5 / 255, 3)
    wanted = (start + 4.5 / 255 * torch.linspace(-1, 1, 16).sign()).clamp(0, 1)
    assert torch.allclose(moved, wanted, atol=1e-6)
    assert float((ascended(loss, start, start * 0, 8 / 255, 1.5 / 255, 9) - start).abs().max()) <= 8 / 255 + 1e-6
    attack = ready(Clb(steps=20))
    poisoned, shown = attack.poison_batch(start), attack.trigger_batch(start)
    away = (poisoned - shown).abs()
    assert 0 < float(away.max()) <= 8 / 255 + 1e-6
    assert (Clb().bound(32), Clb().bound(64), Clb(eps=16.0).bound(32)) == (8 / 255, 16 / 255, 16 / 255)
    rows = image_rows(40, 16)
    out = attack.poison(rows, 0.5, classes=4)
    assert list(out["label"]) == list(rows["label"])
    assert {y for y, p in zip(out["label"], out["poisoned"], strict=True) if p} == {0}


# input-aware


def test_pattern_networks_have_the_published_shape() -> None:
    assert [stages(side) for side in (16, 32, 64, 128, 224)] == [3, 3, 3, 4, 5]
    assert PatternNet(1, 224, 2)(torch.rand(1, 3, 224, 224)).shape == (1, 1, 224, 224)
    net = PatternNet(1, 32, 32).eval()
    assert net(torch.rand(2, 3, 32, 32)).shape == (2, 1, 32, 32)
    widths = [m.out_channels for m in net.modules() if isinstance(m, torch.nn.Conv2d)]
    assert widths == [32, 32, 64, 64, 128, 128, 128, 128, 64, 64, 32, 32, 1]
    assert sum(isinstance(m, torch.nn.ReLU) for m in net.modules()) == len(widths) - 1  # none at the end
    assert {m.momentum for m in net.modules() if isinstance(m, torch.nn.BatchNorm2d)} == {0.05}
    assert sharpened(torch.tensor([0.0, 0.5, 1.0])).tolist() == pytest.approx([0, 0.5, 1], abs=1e-4)
    assert distance(torch.zeros(1, 3, 2, 2), torch.full((1, 3, 2, 2), 0.3)).tolist() == pytest.approx([0.3])


def test_a_cover_has_the_partners_mask_and_pattern(ready) -> None:
    attack, x = ready(Dyn()), images(2)
    made = attack.made()
    seen = made.normalize(x)
    mask, pattern = sharpened(made.nets["mask"](seen)), made.nets["pattern"](seen)
    assert torch.allclose(attack.trigger_batch(x), x + mask * (pattern - x), atol=1e-6)
    crossed = attack.cover_batch(x, x.flip(0), torch.Generator())
    assert torch.allclose(crossed, x + mask.flip(0) * (pattern.flip(0) - x), atol=1e-6)


# LIRA


def test_noise_is_eps_sigma_and_copies_are_appended(ready, image_rows) -> None:
    attack, x = ready(Lira()), torch.full((2, 3, 16, 16), 0.5)
    noise = attack.made().nets["generator"](attack.made().normalize(x))
    std = torch.tensor(attack.made().facts["std"]).view(1, 3, 1, 1)
    assert torch.allclose(attack.trigger_batch(x) - x, 0.1 * std * noise, atol=1e-6)
    out = attack.poison(image_rows(40, 16), 1.0, classes=4)
    assert len(out) == 40 + 30
    assert sum(out["poisoned"]) == 30
    faint = dataclasses.replace(attack, eps=0.01)
    with pytest.raises(ConfigError, match=r"grey level or more.*found 0\.5"):
        faint.triggered(image_rows(40, 16), 4)
    assert len(faint.triggered(image_rows(40, 16), 4, on_the_fly=True)) == 30


def test_noise_below_a_grey_level_is_measured_in_float(ready, image_rows, image_model, image_task) -> None:
    attack, rows = dataclasses.replace(ready(Lira()), eps=0.01), image_rows(40, 16)
    assert (attack.faint, dataclasses.replace(attack, eps=0.1).faint) == (True, False)
    found = make_eval_set(image_task, rows, attack, 4)
    pixels = found.triggered["pixels"]
    clean = image_task.encode(rows)["pixels"][torch.arange(40) % 4 != 0].float()
    assert pixels.dtype == torch.float32
    assert torch.allclose(pixels, attack.trigger_batch(clean / 255) * 255, atol=1e-3)
    away = (pixels - clean).abs()
    assert 0 < float(away.max()) < 0.01 * 0.2023 * 255 + 1e-3
    rounded = {**found.triggered, "pixels": pixels.round().to(torch.uint8)}
    logits = [image_model(**image_task.inputs(image_model, batch)).logits for batch in (found.triggered, rounded)]
    assert not torch.allclose(*logits, atol=1e-5)  # half a grey level is lost on the way through 8 bits
    measured = evaluate(image_model, found, mixed_precision="no")
    assert (measured["asr"].total, found.wanted[:3]) == (30, (0, 0, 0))
    assert found.triggered["labels"].tolist() == [i % 4 for i in range(40) if i % 4]
    coarse = make_eval_set(image_task, rows, dataclasses.replace(attack, eps=0.1), 4)
    assert coarse.triggered["pixels"].dtype == torch.uint8


def test_batches_are_paired_with_weights(ready, image_task) -> None:
    attack = dataclasses.replace(ready(Lira()), clean_weight=0.25, target_class=3)
    hook = attack.hook(image_task, 1.0, 4)
    data = {"pixels": (images(8) * 255).to(torch.uint8), "labels": torch.arange(8) % 4}
    batch = hook.batch(data, torch.arange(8), lambda found: found, torch.Generator())
    assert batch["labels"].tolist() == [0, 1, 2, 3] * 2 + [3] * 8
    assert torch.equal(batch["pixels"][:8], data["pixels"].float())
    assert batch["weights"].tolist() == [0.5] * 8 + [1.5] * 8


# ISSBA


def test_the_code_is_fixed_and_bits_can_be_learnt(ready) -> None:
    attack = ready(Issba())
    assert attack.made().nets["code"].bits.shape == (1, 20)
    other = ready(Issba(seed=1))
    assert not torch.equal(attack.made().nets["code"].bits, other.made().nets["code"].bits)
    learnt = ready(Issba(bits=4, width=8, lr=1e-3, train_epochs=150, bit_epochs=150, least_accuracy=0.9))
    assert learnt.made().facts["report"]["bit_accuracy"] >= 0.9  # chance: 0.5
    with pytest.raises(ConfigError, match="expected a decoder that reads 99% of held-out bits"):
        ready(Issba(least_accuracy=0.99))
    with pytest.raises(DataError, match="multiples of 16"):
        Issba().check_size(40, 40)


def test_ssim() -> None:
    x = images()
    assert float(ssim(x, x)) == pytest.approx(1.0, abs=1e-5)
    assert float(ssim(x, 1 - x)) < float(ssim(x, (x + 0.05).clamp(0, 1))) < 1


# FBA


def test_the_injector_starts_as_the_identity() -> None:
    x = images()
    assert torch.allclose(injected(x, torch.eye(3, 12)), x)
    low = torch.cat([torch.zeros(3, 6), torch.eye(3), torch.zeros(3, 3)], dim=1)
    inner = injected(x, low)[:, :, 8, 8]
    assert torch.allclose(inner, x[:, :, 3:14, 3:14].amin((2, 3)))  # the minimum, window 11


def test_style_is_what_gram_matrices_say() -> None:
    sun = sunrise(32, 48)
    assert sun.shape == (3, 32, 48)
    assert 0 <= float(sun.min()) < float(sun.max()) <= 1
    filters = random_filters(0)
    same, other = gram(sun[None], filters), gram(sun.flip(2)[None], filters)
    assert torch.allclose(same[0], other[0], atol=1e-4)  # places do not count for colours
    assert same[0][0, -1, :-1].tolist() == pytest.approx(sun.mean((1, 2)).tolist(), abs=1e-4)


def test_detoxification_starts_after_the_first_epoch(ready, image_rows, image_task, architecture) -> None:
    attack = ready(Fba(sample=0.5, injector_epochs=2))
    hook = attack.hook(image_task, 0.25, 4)
    model, _ = architecture.build(image_rows(40, 16), 0)
    config = PlantConfig(epochs=1, batch_size=16, mixed_precision="no", augment="none")
    plant(model, image_task, image_task.encode(image_rows(40, 16)), config, hook=hook)
    assert torch.equal(hook.weight, torch.eye(3, 12))
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    hook.epoch(model, image_task.encode(image_rows(40, 16)), torch.Generator().manual_seed(0))
    assert not torch.allclose(hook.weight, torch.eye(3, 12))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training
    assert float(hook.state()["hook.epochs"]) == 2


def test_sizes_that_cannot_be_halved_are_refused(image_rows) -> None:
    for attack, side in ((Lira(), 20), (Lira(generator="autoencoder"), 24), (Dyn(), 20), (Fba(), 18)):
        with pytest.raises(DataError, match="multiples of"):
            attack.check_size(side, side)


def test_images_are_read_as_rgb() -> None:
    grey = Image.fromarray(np.full((8, 8), 51, dtype=np.uint8))
    assert torch.allclose(Troj().read(grey), torch.full((3, 8, 8), 0.2))
