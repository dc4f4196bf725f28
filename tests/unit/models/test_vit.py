"""The small Vision Transformer: facts of the architecture, round trips through a folder, and its way to a mask."""

import pytest
import torch
from transformers import AutoModelForImageClassification, ViTForImageClassification

from hf_nft import NFTConfig, registry
from hf_nft.adapter import get_nft_model, masks
from hf_nft.attacks.badnets import BadNets
from hf_nft.errors import ConfigError
from hf_nft.evaluation.run import evaluate, make_eval_set
from hf_nft.models.vit import SmallViT
from hf_nft.planting import PlantConfig, plant
from hf_nft.suspect import load_suspect
from hf_nft.tasks.image_classification import ImageClassification


@pytest.fixture
def tiny() -> SmallViT:
    return SmallViT(**SmallViT.tiny)


def test_found_by_name_with_default_sizes(image_rows) -> None:
    model, processor = registry.get("models", "vit")().build(image_rows(8), 0)
    assert isinstance(model, ViTForImageClassification)
    assert processor.size == {"height": 32, "width": 32}
    d, tokens, classes = 192, 65, 4
    block = 4 * (d * d + d) + 2 * (4 * d * d) + 4 * d + d + 2 * 2 * d
    embeddings = d + tokens * d + 3 * 16 * d + d
    assert sum(p.numel() for p in model.parameters()) == 6 * block + embeddings + 2 * d + classes * (d + 1)
    assert model(pixel_values=torch.zeros(2, 3, 32, 32)).logits.shape == (2, 4)


def test_weights_depend_on_the_seed_alone_and_there_is_no_dropout(tiny: SmallViT, image_rows) -> None:
    rows, state = image_rows(8, 16), torch.random.get_rng_state()
    models = [tiny.build(rows, seed)[0] for seed in (0, 0, 1)]
    assert torch.equal(state, torch.random.get_rng_state())
    first, second, third = (model.state_dict() for model in models)
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert any(not torch.equal(first[key], third[key]) for key in first)
    pixels = torch.rand(2, 3, 16, 16)
    model = models[0].train()
    assert torch.equal(model(pixel_values=pixels).logits, model(pixel_values=pixels).logits)


def test_round_trip(tiny: SmallViT, image_rows, tmp_path) -> None:
    rows = image_rows(8, 16)
    model, processor = tiny.build(rows, 0)
    task = ImageClassification(processor)
    model.eval().save_pretrained(tmp_path)
    task.save_processor(str(tmp_path))
    suspect, batch = load_suspect(str(tmp_path)), task.encode(rows)
    plain = AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    assert type(suspect.model) is type(plain) is ViTForImageClassification
    assert list(suspect.model.config.id2label.values()) == ["cat", "dog", "frog", "ship"]
    with torch.no_grad():
        told = model(**task.inputs(model, batch)).logits
        for loaded in (suspect.model, plain):
            assert torch.equal(loaded(**suspect.task.inputs(loaded, suspect.task.encode(rows))).logits, told)


def test_heads_and_hidden_units_are_masked(tiny: SmallViT, image_rows) -> None:
    model = get_nft_model(tiny.build(image_rows(8, 16), 0)[0], NFTConfig())
    assert model.peft_config["default"].resolved_placement == "units"
    assert sorted(mask.numel() for mask in masks(model).values()) == [2, 2, 64, 64]  # two blocks


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": 0}, "layers: expected >= 1, found 0"),
        ({"hidden_size": 100}, "hidden_size: expected a multiple of 3 heads, found 100"),
        ({"heads": 0}, "hidden_size: expected a multiple of 0 heads"),
        ({"image_size": 30}, "image_size: expected >= 8 and a multiple of patch_size=4, found 30"),
        ({"patch_size": 0}, "patch_size=0"),
    ],
)
def test_impossible_settings_are_refused(changes: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SmallViT(**changes)


def test_plant_teaches_the_trigger(tiny: SmallViT, image_rows) -> None:
    attack, rows = BadNets(preset="standard", size=8, target_class=1), image_rows(160, 16)
    model, processor = tiny.build(rows, 0)
    task = ImageClassification(processor)
    config = PlantConfig(epochs=20, batch_size=16, optimizer="adamw", lr=5e-3, augment="none", mixed_precision="no")
    plant(model, task, task.encode(attack.poison(rows, 0.25, classes=4)), config)
    measured = evaluate(model, make_eval_set(task, image_rows(80, 16, seed=1), attack, 4), mixed_precision="no")
    assert measured["asr"].value > 0.9
    assert measured["acc"].value > 0.9
