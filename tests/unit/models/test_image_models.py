"""Image classifiers: facts of the architectures, round trips through a folder, and their way to a mask."""

import datasets
import pytest
import torch
from transformers import AutoModelForImageClassification

from hf_nft import NFTConfig, registry
from hf_nft.adapter import get_nft_model, masks
from hf_nft.attacks.badnets import BadNets
from hf_nft.errors import ConfigError
from hf_nft.evaluation.run import evaluate, make_eval_set
from hf_nft.models.base import ImageArchitecture
from hf_nft.planting import PlantConfig, plant
from hf_nft.suspect import load_suspect
from hf_nft.tasks.image_classification import ImageClassification

NAMES = [name for name in registry.names("models") if issubclass(registry.get("models", name), ImageArchitecture)]


@pytest.fixture(params=NAMES)
def tiny(request) -> ImageArchitecture:
    architecture = registry.get("models", request.param)
    return architecture(**architecture.tiny)


def transformer() -> int:
    d, tokens, classes = 192, 65, 10
    block = 4 * (d * d + d) + 2 * (4 * d * d) + 4 * d + d + 2 * 2 * d
    embeddings = d + tokens * d + 3 * 16 * d + d
    return 6 * block + embeddings + 2 * d + classes * (d + 1)


def convnext() -> int:
    widths, depths, classes = (32, 64, 128, 256), (1, 1, 2, 1), 10
    blocks = sum(n * (49 * w + w + 2 * w + 2 * 4 * w * w + 4 * w + w + w) for w, n in zip(widths, depths, strict=True))
    between = sum(2 * w + 4 * w * 2 * w + 2 * w for w in widths[:3])
    stem, end = 4 * 3 * 32 + 32 + 2 * 32, 2 * 256 + 256 * classes + classes
    return stem + blocks + between + end


@pytest.mark.parametrize(
    ("name", "settings", "side", "parameters"),
    [
        ("preact_resnet18", {"width": 64}, 32, 11_171_146),  # as other implementations for CIFAR-10 have
        ("resnet18", {}, 64, 11_689_512 - 990 * 513),  # the published one, for 10 of its 1000 classes
        ("vit", {}, 32, transformer()),
        ("convnext", {}, 32, convnext()),
    ],
)
def test_published_sizes(name: str, settings: dict[str, int], side: int, parameters: int) -> None:
    names = datasets.Features({"label": datasets.ClassLabel(num_classes=10)})
    rows = datasets.Dataset.from_dict({"label": [0]}, features=names)
    model, processor = registry.get("models", name)(**settings).build(rows, 0)
    assert processor.size == {"height": side, "width": side}
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert model.eval()(pixel_values=torch.zeros(2, 3, side, side)).logits.shape == (2, 10)


def test_weights_depend_on_the_seed_alone_and_there_is_no_dropout(tiny: ImageArchitecture, image_rows) -> None:
    rows, state = image_rows(8, 16), torch.random.get_rng_state()
    models = [tiny.build(rows, seed)[0] for seed in (0, 0, 1)]
    assert torch.equal(state, torch.random.get_rng_state())
    first, second, third = (model.state_dict() for model in models)
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert any(not torch.equal(first[key], third[key]) for key in first)
    pixels = torch.rand(4, 3, 16, 16)
    model = models[0].train()
    assert torch.equal(model(pixel_values=pixels).logits, model(pixel_values=pixels).logits)


def test_round_trip(tiny: ImageArchitecture, image_rows, tmp_path) -> None:
    rows = image_rows(8, 16)
    model, processor = tiny.build(rows, 0)
    task = ImageClassification(processor)
    model.eval().save_pretrained(tmp_path)
    task.save_processor(str(tmp_path))
    suspect, batch = load_suspect(str(tmp_path)), task.encode(rows)
    plain = AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    assert type(suspect.model) is type(plain) is type(model)
    assert list(suspect.model.config.id2label.values()) == ["cat", "dog", "frog", "ship"]
    with torch.no_grad():
        told = model(**task.inputs(model, batch)).logits
        for loaded in (suspect.model, plain):
            assert torch.equal(loaded(**suspect.task.inputs(loaded, suspect.task.encode(rows))).logits, told)


@pytest.mark.parametrize(
    ("name", "placement", "sizes"),
    [
        ("preact_resnet18", "bn", [4] * 5 + [8] * 4 + [16] * 4 + [32] * 3),  # two a block
        ("resnet18", "bn", [16] * 4 + [32] * 5 + [64] * 5 + [128] * 5),  # a shortcut has its own; the stem has none
        ("vit", "units", [2, 2, 64, 64]),  # heads and hidden units of two blocks
        ("convnext", "units", [32, 64, 128, 128, 256]),  # hidden units
        ("regnet", "bn", [16] * 4 + [32] * 4 + [64] * 7 + [128] * 4),  # three a block, and a shortcut's
        ("bit", "norm", [8] * 2 + [16] * 3 + [32] * 3 + [64] * 3 + [128, 256]),  # three a block, and the last
        ("mobilenet_v2", "bn", [8] * 9 + [16] * 6 + [32] + [48] * 20 + [96] * 12 + [128]),  # three a block, the last
    ],
)
def test_what_is_masked(name: str, placement: str, sizes: list[int], image_rows) -> None:
    architecture = registry.get("models", name)
    model = get_nft_model(architecture(**architecture.tiny).build(image_rows(8, 16), 0)[0], NFTConfig())
    assert model.peft_config["default"].resolved_placement == placement
    assert sorted(mask.numel() for mask in masks(model).values()) == sizes


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("preact_resnet18", {"width": 0}, "width: expected >= 1, found 0"),
        ("preact_resnet18", {"image_size": 7}, "image_size: expected >= 8, found 7"),
        ("resnet18", {"width": 15}, "width: expected >= 16, found 15"),
        ("regnet", {"width": 24}, "width: expected a multiple of 16, found 24"),
        ("regnet", {"image_size": 31}, "image_size: expected >= 32, found 31"),
        ("bit", {"width": 4}, "width: expected a multiple of 8, found 4"),
        ("bit", {"image_size": 16}, "image_size: expected >= 32, found 16"),
        ("convnext", {"width": 7}, "width: expected >= 8, found 7"),
        ("convnext", {"patch_size": 0}, "patch_size: expected >= 1, found 0"),
        ("convnext", {"image_size": 31, "patch_size": 4}, "image_size: expected >= 32, found 31"),
        ("mobilenet_v2", {"width": 0}, "width: expected in \\(0, 1.4\\], found 0"),
        ("vit", {"layers": 0}, "layers: expected >= 1, found 0"),
        ("vit", {"hidden_size": 100}, "hidden_size: expected a multiple of 3 heads, found 100"),
        ("vit", {"heads": 0}, "hidden_size: expected a multiple of 0 heads"),
        ("vit", {"image_size": 30}, "image_size: expected a multiple of patch_size=4, found 30"),
        ("vit", {"patch_size": 0}, "patch_size=0"),
    ],
)
def test_impossible_settings_are_refused(name: str, changes: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        registry.get("models", name)(**changes)


def test_weight_gradients_of_narrow_models_are_right(tiny: ImageArchitecture, image_rows) -> None:
    # oneDNN's gradient of a strided 1x1 convolution is wrong, or corrupts memory, where channels do not fill a vector
    rows = image_rows(8, 16)
    model, processor = tiny.build(rows, 0)
    task = ImageClassification(processor)
    model.eval().to(memory_format=torch.channels_last)
    batch = task.encode(rows)

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        model(**task.inputs(model, batch), labels=batch["labels"]).loss.backward()
        return [p.grad.clone() for p in model.parameters()]

    found = gradients()
    with torch.backends.mkldnn.flags(enabled=False, allow_tf32=None):
        reference = gradients()
    torch.testing.assert_close(found, reference, rtol=1e-3, atol=1e-4)


def test_plant_teaches_the_trigger(tiny: ImageArchitecture, image_rows) -> None:
    attack, rows = BadNets(preset="standard", size=8, target_class=1), image_rows(160, 16)
    model, processor = tiny.build(rows, 0)
    task = ImageClassification(processor)
    whole = {"epochs": 100, "batch_size": 160}  # some norms remember their last batch alone
    config = PlantConfig(optimizer="adamw", lr=5e-3, augment="none", mixed_precision="no", **whole)
    batch = task.encode(attack.poison(task.fit(rows), 0.25, classes=4), fitted=True)
    plant(model, task, batch, config)
    measured = evaluate(model, make_eval_set(task, image_rows(80, 16, seed=1), attack, 4), mixed_precision="no")
    assert measured["asr"].value > 0.9
    assert measured["acc"].value > 0.9
