"""Images in and labels out: decoding, geometry, augmentation, mixing and label names, each against a reference here."""

import io
import warnings

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from transformers import (
    BitImageProcessorPil,
    PvtConfig,
    PvtForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
)

from hf_nft.attacks.badnets import BadNets
from hf_nft.errors import DataError, UnknownNameError
from hf_nft.evaluation.run import make_eval_set
from hf_nft.models.base import CIFAR_MEAN, CIFAR_STD, image_processor
from hf_nft.tasks.image_classification import ImageClassification
from hf_nft.types import Draw

NOISE = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)


def rows(
    *images: Image.Image, labels: list[int] | None = None, names: tuple[str, ...] = ("a", "b")
) -> datasets.Dataset:
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(names))})
    return datasets.Dataset.from_dict({"image": list(images), "label": labels or [0] * len(images)}, features=features)


def pixels(task: ImageClassification, *images: Image.Image) -> torch.Tensor:
    return task.encode(rows(*images))["pixels"]


# decoding


def test_rgb_of_the_right_size_is_kept_bit_by_bit(image_task) -> None:
    batch = image_task.encode(rows(Image.fromarray(NOISE), Image.fromarray(NOISE[::-1].copy()), labels=[1, 0]))
    assert batch["pixels"].dtype == torch.uint8
    assert batch["pixels"].shape == (2, 3, 16, 16)
    assert torch.equal(batch["pixels"][0].permute(1, 2, 0), torch.from_numpy(NOISE))
    assert torch.equal(batch["pixels"][1].permute(1, 2, 0), torch.from_numpy(NOISE[::-1].copy()))
    assert batch["labels"].tolist() == [1, 0]
    assert batch["labels"].dtype == torch.int64


def test_grey_becomes_three_equal_channels(image_task) -> None:
    found = pixels(image_task, Image.fromarray(NOISE[:, :, 0]))[0]
    assert all(torch.equal(channel, torch.from_numpy(NOISE[:, :, 0])) for channel in found)


def test_an_alpha_channel_is_dropped(image_task) -> None:
    rgba = np.dstack([NOISE, np.full((16, 16), 7, dtype=np.uint8)])
    assert torch.equal(pixels(image_task, Image.fromarray(rgba))[0].permute(1, 2, 0), torch.from_numpy(NOISE))


def test_sixteen_bits_are_scaled_not_clipped(image_task) -> None:
    deep = np.arange(256, dtype=np.uint16).reshape(16, 16) * 256 + 17
    found = pixels(image_task, Image.fromarray(deep))[0]
    assert all(torch.equal(c, torch.arange(256, dtype=torch.uint8).view(16, 16)) for c in found)


def test_a_palette_is_looked_up(image_task) -> None:
    image = Image.new("P", (16, 16), 1)
    image.putpalette([0, 0, 0, 10, 20, 30])
    assert pixels(image_task, image)[0].flatten(1).unique(dim=1).flatten().tolist() == [10, 20, 30]


def test_black_and_white_is_0_and_255(image_task) -> None:
    image = Image.fromarray(np.eye(16, dtype=bool))
    assert torch.equal(pixels(image_task, image)[0, 0], torch.eye(16, dtype=torch.uint8) * 255)


@pytest.mark.parametrize("shape", [(40, 40), (8, 8), (30, 20), (9, 33), (1, 1)])
def test_other_sizes_are_resized_like_the_processor_does(image_task, shape: tuple[int, int]) -> None:
    image = np.random.default_rng(1).integers(0, 256, (*shape, 3), dtype=np.uint8)
    found = pixels(image_task, Image.fromarray(image))[0]
    assert found.shape == (3, 16, 16)
    expected = np.asarray(Image.fromarray(image).resize((16, 16), Image.Resampling.BILINEAR)).astype(int)
    assert np.abs(found.permute(1, 2, 0).numpy().astype(int) - expected).max() <= 1


def test_sizes_may_differ_within_one_data_set(image_task) -> None:
    images = [Image.new("RGB", size, (9, 90, 200)) for size in ((16, 16), (50, 30), (3, 7))] + [
        Image.new("L", (4, 4), 9)
    ]
    found = pixels(image_task, *images)
    assert found.shape == (4, 3, 16, 16)
    assert found[:3].flatten(2).unique(dim=2).view(3, 3).tolist() == [[9, 90, 200]] * 3


def test_fit_brings_everything_to_the_models_size_without_loss(image_task) -> None:
    file = io.BytesIO()
    Image.fromarray(NOISE).save(file, "JPEG")
    jpeg = {"bytes": file.getvalue(), "path": None}
    fitting = rows(Image.fromarray(NOISE))
    assert image_task.fit(fitting) is fitting
    other = rows(jpeg, Image.new("L", (5, 9), 77), Image.fromarray(NOISE))
    fitted = image_task.fit(other)
    assert [image.size for image in fitted["image"]] == [(16, 16)] * 3
    assert {image.mode for image in fitted["image"]} == {"RGB"}
    assert torch.equal(image_task.encode(fitted)["pixels"], image_task.encode(other)["pixels"])
    assert list(fitted["label"]) == list(other["label"])


def test_what_fits_a_processor_that_crops_is_not_cropped_again() -> None:
    geometry = {"size": {"shortest_edge": 20}, "crop_size": {"height": 16, "width": 16}, "do_convert_rgb": True}
    task = ImageClassification(BitImageProcessorPil(**geometry))
    raw = rows(Image.fromarray(NOISE), Image.fromarray(NOISE).resize((30, 41)), labels=[1, 1])
    fitted = task.fit(raw)
    assert torch.equal(task.encode(fitted, fitted=True)["pixels"], task.encode(raw)["pixels"])
    data = make_eval_set(task, raw, BadNets(preset="standard"), classes=2)
    changed = (data.triggered["pixels"] != data.clean["pixels"]).any(1).nonzero()
    assert changed.tolist() == [[row, y, x] for row in (0, 1) for y in (14, 15) for x in (14, 15)]


def test_an_unreadable_image_is_an_error_of_ours(image_task) -> None:
    with pytest.raises(DataError, match="expected readable images"):
        image_task.encode(rows({"bytes": b"not an image", "path": None}))
    whole = io.BytesIO()
    Image.fromarray(NOISE).save(whole, "PNG")
    with pytest.raises(DataError, match="expected readable images"):
        image_task.encode(rows({"bytes": whole.getvalue()[:200], "path": None}))


def test_what_claims_to_be_absurdly_large_is_unreadable(image_task) -> None:
    whole = io.BytesIO()
    Image.fromarray(NOISE).save(whole, "BMP")
    claimed = bytearray(whole.getvalue())
    claimed[18:26] = (60_000).to_bytes(4, "little") * 2  # width and height
    data = rows({"bytes": bytes(claimed), "path": None})
    for step in (image_task.fit, image_task.encode):
        with pytest.raises(DataError, match="expected readable images"):
            step(data)


# augmentation


def reference_crop_flip(images: np.ndarray, generator: torch.Generator, flip: bool) -> np.ndarray:
    """Pad every side by an eighth with black, cut a window, mirror it; image by image."""
    n, side = len(images), images.shape[1]
    pad = side // 8
    tops, lefts = torch.randint(0, 2 * pad + 1, (2, n), generator=generator).tolist()
    mirrored = (torch.rand(n, generator=generator) < 0.5).tolist()
    out = []
    for image, top, left, mirror in zip(images, tops, lefts, mirrored, strict=True):
        padded = np.zeros((side + 2 * pad, side + 2 * pad, 3), dtype=np.uint8)
        padded[pad : pad + side, pad : pad + side] = image
        window = padded[top : top + side, left : left + side]
        out.append(window[:, ::-1] if flip and mirror else window)
    return np.stack(out)


@pytest.mark.parametrize(("kind", "flip"), [("default", True), ("crop_flip", True), ("crop", False)])
def test_augmentation_is_a_crop_and_a_mirror(image_task, kind: str, flip: bool) -> None:
    images = np.random.default_rng(3).integers(1, 256, (24, 16, 16, 3), dtype=np.uint8)
    batch = {"pixels": torch.from_numpy(images).permute(0, 3, 1, 2), "labels": torch.arange(24)}
    found = image_task.augment(batch, torch.Generator().manual_seed(5), kind)
    expected = reference_crop_flip(images, torch.Generator().manual_seed(5), flip)
    assert np.array_equal(found["pixels"].permute(0, 2, 3, 1).numpy(), expected)
    assert found["pixels"].dtype == torch.uint8
    assert torch.equal(found["labels"], batch["labels"])  # rows stay where they are
    assert np.array_equal(batch["pixels"].permute(0, 2, 3, 1).numpy(), images)  # not in place


def test_augmentation_reaches_every_shift_and_both_sides(image_task) -> None:
    marked = torch.zeros(400, 3, 16, 16, dtype=torch.uint8)
    marked[:, :, 8, 5] = 255
    found = image_task.augment({"pixels": marked}, torch.Generator().manual_seed(0))["pixels"][:, 0]
    places = {tuple(place) for place in found.nonzero()[:, 1:].tolist()}
    assert {row for row, _ in places} == {6, 7, 8, 9, 10}
    assert {column for _, column in places} == {3, 4, 5, 6, 7} | {8, 9, 10, 11, 12}


def test_no_augmentation_and_unknown_ones(image_task) -> None:
    batch = image_task.encode(rows(Image.fromarray(NOISE)))
    assert image_task.augment(batch, torch.Generator(), "none") is batch
    with pytest.raises(UnknownNameError, match="crop_flip"):
        image_task.augment(batch, torch.Generator(), "crop_flp")


# inputs, mixing, loss


def test_inputs_are_normalised_with_the_processors_constants(image_task, image_model) -> None:
    batch = image_task.encode(rows(Image.fromarray(NOISE)))
    found = image_task.inputs(image_model, batch)["pixel_values"][0].permute(1, 2, 0)
    assert np.allclose(found.numpy(), (NOISE / 255 - CIFAR_MEAN) / CIFAR_STD, atol=1e-5)
    processed = image_processor(16)(images=Image.fromarray(NOISE), return_tensors="pt")["pixel_values"][0]
    assert torch.allclose(found.permute(2, 0, 1), processed, atol=1e-5)


def test_processors_without_normalisation_or_rescaling(image_model) -> None:
    size = {"height": 16, "width": 16}
    batch = {"pixels": torch.from_numpy(NOISE)[None].permute(0, 3, 1, 2)}
    plain = ImageClassification(ViTImageProcessorPil(do_normalize=False, size=size))
    assert np.allclose(plain.inputs(image_model, batch)["pixel_values"][0].permute(1, 2, 0), NOISE / 255, atol=1e-6)
    raw = ImageClassification(ViTImageProcessorPil(do_normalize=False, do_rescale=False, size=size))
    assert np.allclose(raw.inputs(image_model, batch)["pixel_values"][0].permute(1, 2, 0), NOISE)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_model_stored_narrow_gets_narrow_inputs(image_task, image_model, dtype: torch.dtype) -> None:
    batch = image_task.encode(rows(*[Image.fromarray(NOISE)] * 2))
    wide = image_task.inputs(image_model, batch)["pixel_values"]
    image_model.to(dtype)
    found = [image_task.inputs(image_model, batch), image_task.mix(image_model, batch, batch, 0.3)]
    assert all(torch.equal(given["pixel_values"], wide.to(dtype)) for given in found)
    assert image_model(**found[0]).logits.dtype == dtype


def test_a_model_of_grey_images_gets_one_channel() -> None:
    config = ViTConfig(
        image_size=16, patch_size=8, num_channels=1, hidden_size=8, num_attention_heads=2, num_hidden_layers=1
    )
    size = {"height": 16, "width": 16}
    processor = ViTImageProcessorPil(size=size, image_mean=[0.4], image_std=[0.2], resample=2)
    task, grey = ImageClassification(processor), Image.fromarray(NOISE[:, :, 0])
    batch = task.encode(rows(grey, Image.fromarray(NOISE)))
    found = task.inputs(ViTForImageClassification(config), batch)["pixel_values"]
    assert found.shape == (2, 1, 16, 16)
    seen = [NOISE[:, :, 0], np.asarray(Image.fromarray(NOISE).convert("L"))]
    assert np.allclose(found[:, 0].numpy(), (np.stack(seen) / 255 - 0.4) / 0.2, atol=0.6 / 255 / 0.2)
    assert task.predict(ViTForImageClassification(config), batch, {"label"})["label"] != []


@pytest.mark.parametrize("lam", [0.0, 0.3, 1.0])
def test_mixing_pixels_equals_mixing_normalised_inputs(image_task, image_model, lam: float) -> None:
    ours, theirs = ({"pixels": torch.from_numpy(n)[None].permute(0, 3, 1, 2)} for n in (NOISE, NOISE[::-1].copy()))
    mixed = image_task.mix(image_model, ours, theirs, lam)["pixel_values"]
    each = [image_task.inputs(image_model, batch)["pixel_values"] for batch in (ours, theirs)]
    assert torch.allclose(mixed, lam * each[0] + (1 - lam) * each[1], atol=1e-5)
    if lam in (0.0, 1.0):
        assert torch.equal(mixed, each[int(1 - lam)])


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize(("lam", "kept"), [(0.0, 0), (0.4, 6), (1.0, 16)])
def test_a_composed_image_is_part_of_one_beside_the_rest_of_another(
    image_task, image_model, axis: int, lam: float, kept: int
) -> None:
    ours, theirs = ({"pixels": torch.from_numpy(n)[None].permute(0, 3, 1, 2)} for n in (NOISE, NOISE[::-1].copy()))
    found = image_task.forward(lambda pixel_values: pixel_values, Draw(ours, theirs, lam, seam=axis))
    own, other = (
        image_task.inputs(image_model, batch)["pixel_values"].movedim(2 + axis, 0) for batch in (ours, theirs)
    )
    assert torch.equal(found.movedim(2 + axis, 0), torch.cat([own[:kept], other[kept:]]))


class Output:
    def __init__(self, logits: list[list[float]]) -> None:
        self.logits = torch.tensor(logits)


def test_loss_accuracy_and_divergence_by_hand(image_task, image_model) -> None:
    output, batch = Output([[2.0, 0.0], [0.0, 1.0], [3.0, 0.0]]), {"labels": torch.tensor([0, 1, 1])}
    expected = np.mean([np.log(1 + np.exp(-2)), np.log(1 + np.exp(-1)), np.log(1 + np.exp(3))])
    assert float(image_task.loss(output, Draw(batch))) == pytest.approx(expected, abs=1e-6)
    assert float(image_task.accuracy(output, batch)) == pytest.approx(2 / 3)
    assert image_task.chance(image_model) == 0.25
    teacher = Output([[0.0, 0.0]] * 3)
    p, q = F.softmax(teacher.logits / 2, -1), F.softmax(output.logits / 2, -1)
    kl = (p * (p.log() - q.log())).sum(-1).mean() * 4
    taught = Draw(batch, answers=image_task.answers(teacher, 2.0))
    assert float(image_task.divergence(output, taught, 2.0)) == pytest.approx(float(kl), abs=1e-6)
    same = Draw(batch, answers=image_task.answers(output, 2.0))
    assert float(image_task.divergence(output, same, 2.0)) == pytest.approx(0.0, abs=1e-6)
    mixed = Draw(batch, {"labels": torch.tensor([1, 1, 1])}, 0.25)
    other = np.mean([np.log(1 + np.exp(2)), np.log(1 + np.exp(-1)), np.log(1 + np.exp(3))])
    assert float(image_task.loss(output, mixed)) == pytest.approx(0.25 * expected + 0.75 * other, abs=1e-6)


# columns and labels


def test_columns_are_recognised_or_named(image_task) -> None:
    data = rows(Image.fromarray(NOISE), labels=[1]).rename_columns({"image": "img", "label": "fine_label"})
    found = ImageClassification.standardize(data.add_column("more", [3]), {})
    assert found.column_names == ["image", "label"]
    odd = data.rename_columns({"img": "photo", "fine_label": "what"}).add_column("label", [0])
    assert ImageClassification.standardize(odd, {"image": "photo", "label": "what"})["label"][:] == [1]
    with pytest.raises(DataError, match=r"label column: expected 'whatt'.*found columns.*'what'.*--column label=NAME"):
        ImageClassification.standardize(odd, {"label": "whatt"})
    with pytest.raises(DataError, match="expected images"):
        ImageClassification.standardize(odd, {"image": "what"})
    with pytest.raises(DataError, match="image column"):
        ImageClassification.standardize(odd.remove_columns("photo"), {})


@pytest.mark.parametrize("column", ["bytes", "struct"])
def test_picture_files_without_the_type_image_are_images(column: str) -> None:
    """As pandas or pyarrow store them."""
    file = io.BytesIO()
    Image.fromarray(NOISE).save(file, "PNG")
    stored = file.getvalue() if column == "bytes" else {"bytes": file.getvalue(), "path": None}
    data = datasets.Dataset.from_dict({"photo": [stored], "label": [1]})
    found = ImageClassification.standardize(data, {})
    assert np.array_equal(np.asarray(found["image"][0]), NOISE)


def test_whole_numbers_stored_as_floats_are_labels() -> None:
    data = datasets.Dataset.from_dict({"image": [Image.fromarray(NOISE)] * 2, "label": [10.0, 2.0]})
    found = ImageClassification.standardize(data.cast_column("image", datasets.Image()), {})
    assert list(found["label"]) == [10, 2]
    assert found.features["label"] == datasets.Value("int64")


def test_text_labels_become_classes_and_missing_ones_are_refused() -> None:
    images = [Image.fromarray(NOISE)] * 3
    data = datasets.Dataset.from_dict({"image": images, "label": ["dog", "cat", "dog"]})
    data = data.cast_column("image", datasets.Image())
    found = ImageClassification.standardize(data, {})
    assert found.features["label"].names == ["cat", "dog"]
    assert list(found["label"]) == [1, 0, 1]
    unlabelled = data.remove_columns("label").add_column("label", [-1, -1, -1])
    with pytest.raises(DataError, match="unlabelled"):
        ImageClassification.standardize(unlabelled, {})


@pytest.mark.parametrize("labels", [["dog", None], [1, None], [1.0, float("nan")]])
def test_a_row_without_label_is_refused(labels: list[object]) -> None:
    data = datasets.Dataset.from_dict({"image": [Image.fromarray(NOISE)] * 2, "label": labels})
    with pytest.raises(DataError, match="rows without"):
        ImageClassification.standardize(data.cast_column("image", datasets.Image()), {})


def test_labels_are_matched_by_name(image_task, image_model) -> None:
    images = [Image.fromarray(NOISE)] * 4  # the model says cat, dog, frog, ship
    same = rows(*images, labels=[0, 1, 2, 3], names=("cat", "dog", "frog", "ship"))
    assert image_task.align(same, image_model) is same
    mixed = rows(*images, labels=[0, 1, 2, 3], names=("Ship", "frog ", "DOG", "cat"))
    found = image_task.align(mixed, image_model)
    assert list(found["label"]) == [3, 2, 1, 0]
    assert found.features["label"].names == ["cat", "dog", "frog", "ship"]
    fewer = rows(*images[:2], labels=[0, 1], names=("ship", "dog"))
    assert list(image_task.align(fewer, image_model)["label"]) == [3, 1]


def test_names_that_differ_in_spelling_only(image_task, image_model) -> None:
    image_model.config.id2label = {0: "polar_bear", 1: "red-fox", 2: "frog", 3: "ship"}
    data = rows(*[Image.fromarray(NOISE)] * 2, labels=[0, 1], names=("Red Fox", "polar bear"))
    assert list(image_task.align(data, image_model)["label"]) == [1, 0]


def test_labels_without_common_names_are_matched_by_id_with_a_warning(image_task, image_model) -> None:
    data = rows(*[Image.fromarray(NOISE)] * 2, labels=[0, 3], names=("0", "1", "2", "3"))
    with pytest.warns(UserWarning, match="matched by id, not by name"):
        assert list(image_task.align(data, image_model)["label"]) == [0, 3]
    plain = data.cast_column("label", datasets.Value("int64"))
    with pytest.warns(UserWarning, match="by id"):
        image_task.align(plain, image_model)


@pytest.mark.parametrize(("first", "expected"), [(0, [10, 2, 0, 11]), (1, [9, 1, 11, 10])], ids=["from 0", "from 1"])
def test_names_that_are_numbers_are_ids(image_task, image_model, first: int, expected: list[int]) -> None:
    """Folders named by numbers are sorted as texts: "10" before "2"."""
    image_model.config.id2label = {i: f"LABEL_{i}" for i in range(12)}
    names = tuple(sorted(str(i) for i in range(first, first + 12)))
    said = ["10", "2", "0" if first == 0 else "12", "11"]
    data = rows(*[Image.fromarray(NOISE)] * 4, labels=[names.index(name) for name in said], names=names)
    with pytest.warns(UserWarning, match="matched by id, not by name"):
        assert list(image_task.align(data, image_model)["label"]) == expected


@pytest.mark.parametrize(
    ("names", "expected"),
    [(("0", "2"), [0, 2]), (("1", "4"), [0, 3]), (("2", "4"), [1, 3]), (("1", "2"), None), (("2", "3"), None)],
)
def test_names_that_are_numbers_where_classes_are_missing(image_task, image_model, names, expected) -> None:
    """They count from 0 or from 1 if either end is there; nothing tells where "1" and "2" of four begin."""
    data = rows(*[Image.fromarray(NOISE)] * 2, labels=[0, 1], names=names)
    if expected is None:
        with pytest.raises(DataError, match="do not tell where they begin"):
            image_task.align(data, image_model)
    else:
        with pytest.warns(UserWarning, match="matched by id, not by name"):
            assert list(image_task.align(data, image_model)["label"]) == expected


def test_other_names_than_the_models_do_where_all_classes_are_there(image_task, image_model) -> None:
    data = rows(*[Image.fromarray(NOISE)] * 3, labels=[0, 1, 2], names=("w", "x", "y"))
    with pytest.raises(DataError, match="or a name for each of its 4 classes, found 3 others"):
        image_task.align(data, image_model)


@pytest.mark.parametrize("kind", [datasets.Image(mode="L"), datasets.Image(decode=False)], ids=["grey", "undecoded"])
def test_images_that_are_stored_otherwise(image_task, kind: datasets.Image) -> None:
    data = rows(Image.fromarray(NOISE), labels=[0], names=("a",)).cast_column("image", kind)
    fitted = image_task.fit(image_task.standardize(data, {}))
    assert image_task.encode(fitted, fitted=True)["pixels"].shape == (1, 3, 16, 16)


def test_two_classes_of_one_name_are_told_apart_by_place(image_task, image_model) -> None:
    image_model.config.id2label = {0: "crane", 1: "dog", 2: "crane", 3: "cat"}
    images = [Image.fromarray(NOISE)] * 2
    with pytest.raises(DataError, match=r"found \['crane'\] more than once"):
        image_task.align(rows(*images, labels=[0, 1], names=("crane", "dog")), image_model)
    whole = rows(*images, labels=[0, 2], names=("crane", "dog", "crane, machine", "cat"))
    with pytest.warns(UserWarning, match="matched by id, not by name"):
        assert list(image_task.align(whole, image_model)["label"]) == [0, 2]


def test_a_model_with_fewer_names_than_classes(image_task) -> None:
    """A PVT's config has a number of labels of its own, 1000 unless it is told another."""
    sizes = {"hidden_sizes": [4] * 4, "depths": [1] * 4, "num_attention_heads": [1] * 4}
    model = PvtForImageClassification(PvtConfig(image_size=32, **sizes, id2label={0: "cat", 1: "dog"}))
    data = rows(*[Image.fromarray(NOISE)] * 2, labels=[0, 1], names=("dog", "cat"))
    found = image_task.align(data, model)
    assert list(found["label"]) == [1, 0]
    assert found.features["label"].names[-2:] == ["LABEL_998", "LABEL_999"]


def test_labels_that_do_not_fit_are_refused(image_task, image_model) -> None:
    images = [Image.fromarray(NOISE)] * 2
    with pytest.raises(DataError, match=r"found \['horse'\] missing"):
        image_task.align(rows(*images, labels=[0, 1], names=("cat", "horse")), image_model)
    five = rows(*images, labels=[0, 1], names=("0", "1", "2", "3", "4"))
    with warnings.catch_warnings(), pytest.raises(DataError, match="at most the model's 4 classes, found 5"):
        image_task.align(five, image_model)
    with pytest.raises(DataError, match="found 8"):
        image_task.align(five.cast_column("label", datasets.Value("int64")).map(lambda r: {"label": 7}), image_model)


def test_predictions_and_references(image_task, image_model) -> None:
    batch = image_task.encode(rows(*[Image.fromarray(np.roll(NOISE, i, 0)) for i in range(5)], labels=[0, 1, 0, 1, 1]))
    with torch.no_grad():
        found = image_task.predict(image_model, batch, {"label"})["label"]
        logits = image_model(**image_task.inputs(image_model, batch)).logits
    assert found == logits.argmax(1).tolist()
    assert image_task.references(rows(), batch, "label") == [0, 1, 0, 1, 1]


def test_the_processor_survives_a_folder(image_task, tmp_path) -> None:
    image_task.save_processor(str(tmp_path))
    again = ImageClassification(ViTImageProcessorPil.from_pretrained(str(tmp_path)))
    batch = image_task.encode(rows(Image.fromarray(NOISE)))
    first, second = (task.inputs(None, batch)["pixel_values"] for task in (image_task, again))
    assert torch.equal(first, second)
