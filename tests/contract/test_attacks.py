"""What every attack must do, for every attack there is: the table is the registry, so a new file is tested as it lands.

Numbers and patterns are written here from the papers and their releases, without the package's code.
"""

import dataclasses
import functools
import hashlib
import io
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from hf_nft import registry
from hf_nft.attacks._artefacts import TrainedAttack
from hf_nft.attacks._image import ImageAttack
from hf_nft.attacks.badnets import BadNets
from hf_nft.attacks.base import PATHS, Attack
from hf_nft.attacks.blend import Blend
from hf_nft.attacks.patch import Patch
from hf_nft.attacks.sig import SIG
from hf_nft.errors import ConfigError, DataError
from hf_nft.evaluation.run import evaluate, make_eval_set
from hf_nft.models.base import image_processor
from hf_nft.models.preact_resnet18 import PreActResNet18
from hf_nft.planting import PlantConfig, plant
from hf_nft.poisoning import POISONED
from hf_nft.tasks.image_classification import ImageClassification
from hf_nft.workflows.attack_job import Scene, prepared

NAMES = registry.names("attacks")
IMAGE = [name for name in NAMES if registry.get("attacks", name).modality == "image_classification"]
DIRTY = [name for name in IMAGE if not registry.get("attacks", name).clean_label]
ALL_TO_ALL = [name for name in IMAGE if "all_to_all" in registry.get("attacks", name).label_maps]
CLEAN = [name for name in IMAGE if registry.get("attacks", name).clean_label]
TRAINED = [name for name in IMAGE if issubclass(registry.get("attacks", name), TrainedAttack)]
PAIRS = [name for name in IMAGE if registry.get("attacks", name).pairs]
"""Attacks whose trigger is made of two images; they choose rows by class, and have unit tests of their own for it."""
EVERY = pytest.mark.parametrize("name", NAMES)
EVERY_IMAGE = pytest.mark.parametrize("name", IMAGE)
ROWS, CLASSES = 40, 4


def make(name: str, side: int = 32, **changes: Any) -> Attack:
    """An attack at toy size; what it has to train first is trained once per side, whatever else changes."""
    cls = registry.get("attacks", name)
    attack = cls(**{**cls.tiny, **changes})
    return dataclasses.replace(attack, artefact=artefact(name, side)) if isinstance(attack, TrainedAttack) else attack


@functools.cache
def artefact(name: str, side: int) -> str:
    """What an attack has to train first, trained on 40 noise images."""
    cls = registry.get("attacks", name)
    rows, task = tinted(ROWS, side, CLASSES), ImageClassification(image_processor(side))
    architecture = PreActResNet18(width=4, image_size=side)
    made = prepared(Scene(cls(**cls.tiny), architecture, task, rows, rows, CLASSES, "toy"), rows)
    return str(made.settings()["artefact"])


def tinted(rows: int, side: int, classes: int) -> datasets.Dataset:
    """Noise whose class tints it."""
    rng = np.random.default_rng(side)
    labels = np.arange(rows) % classes
    noise = rng.integers(0, 128, (rows, side, side, 3))
    noise[np.arange(rows), :, :, labels % 3] += 60
    return datasets.Dataset.from_dict(
        {"image": [Image.fromarray(p.astype(np.uint8)) for p in noise], "label": labels.tolist()},
        features=datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(num_classes=classes)}),
    )


@pytest.fixture(scope="module")
def rows_for(image_rows: Callable[..., datasets.Dataset]) -> Callable[[Attack], datasets.Dataset]:
    """Clean rows of an attack's modality, 40 of them; the classes of images are 0, 1, 2, 3, 0, 1 ..."""
    words = "how are you today my friend from home".split()
    text = datasets.Dataset.from_dict(
        {
            "prompt": [" ".join(words[(i + j) % 8] for j in range(i % 7)) for i in range(ROWS)],
            "response": [f"i like {words[i % 8]} ." for i in range(ROWS)],
        }
    )
    made = {"image_classification": image_rows(ROWS, 32, CLASSES), "text_generation": text}
    return lambda attack: made[attack.modality]


def values(attack: Attack, rows: datasets.Dataset) -> list[bytes]:
    """Inputs as they are stored."""
    column = rows[attack.input_column]
    return [v.encode() if isinstance(v, str) else bytes(str(v.size), "utf8") + v.tobytes() for v in column]


def sources(attack: Attack, rows: datasets.Dataset, rate: float = 0.2) -> np.ndarray:
    """The clean row that each row of a poisoned data set comes from; an attack may append rows."""
    answers = np.asarray(rows[attack.target_column])
    return attack.plan(answers, rate, attack.default_base, classes_of(attack)).rows


def classes_of(attack: Attack) -> int:
    return CLASSES if attack.modality == "image_classification" else 0


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


def grey(level: int, side: int = 32) -> torch.Tensor:
    return torch.full((3, side, side), level / 255)


def stamped(attack: ImageAttack, level: int, side: int = 32) -> np.ndarray:
    """An even image of one grey level, triggered and rounded as it is stored: (H, W, 3)."""
    image = Image.fromarray(np.full((side, side, 3), level, dtype=np.uint8))
    return pixels(attack.apply({"image": image, "label": 1}, np.random.default_rng(0))["image"])


# 1. deterministic

CHILD = """
import hashlib, json, datasets
from hf_nft import registry
datasets.disable_progress_bars()
found = {}
for key, settings in json.loads(SETTINGS).items():
        attack = registry.get("attacks", settings.pop("name"))(**settings)
        rows = datasets.load_from_disk(FOLDER + "/" + attack.modality)
        rows = attack.poison(rows, 0.2, classes=CLASSES if attack.modality == "image_classification" else 0)
        inputs = [v.encode() if isinstance(v, str) else v.tobytes() for v in rows[attack.input_column]]
        found[key] = [hashlib.sha256(b"|".join(inputs)).hexdigest(), list(rows["poisoned"])]
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def elsewhere(rows_for, child, tmp_path_factory) -> dict[str, Any]:
    """What another process with another hash seed makes of the same rows."""
    folder = tmp_path_factory.mktemp("rows")
    for name in NAMES:
        attack = make(name)
        if not (folder / attack.modality).exists():
            rows_for(attack).save_to_disk(str(folder / attack.modality))
    other = "1" if os.environ.get("PYTHONHASHSEED") != "1" else "2"
    told = json.dumps({f"{name} {seed}": make(name, seed=seed).settings() for name in NAMES for seed in (0, 5)})
    code = f"FOLDER, CLASSES, SETTINGS = {str(folder)!r}, {CLASSES}, {told!r}\n{CHILD}"
    found = child(code, PYTHONHASHSEED=other)
    return json.loads(found.splitlines()[-1])


@EVERY
@pytest.mark.parametrize("seed", [0, 5])
def test_another_process_makes_the_same_bytes(name: str, seed: int, rows_for, elsewhere) -> None:
    attack = make(name, seed=seed)
    rows = attack.poison(rows_for(attack), 0.2, classes=classes_of(attack))
    inputs = [v.encode() if isinstance(v, str) else v.tobytes() for v in rows[attack.input_column]]
    digest = hashlib.sha256(b"|".join(inputs)).hexdigest()
    assert [digest, list(rows["poisoned"])] == elsewhere[f"{name} {seed}"]


@EVERY
def test_the_seed_chooses_the_rows(name: str, rows_for) -> None:
    chosen = []
    for attack in (make(name), make(name), make(name, seed=1)):
        out = attack.poison(rows_for(attack), 0.2, classes=CLASSES)
        chosen.append(sources(attack, rows_for(attack))[np.asarray(out["poisoned"])].tolist())
    assert chosen[0] == chosen[1] != chosen[2]
    assert len(chosen[0]) == len(chosen[2])


@EVERY
def test_no_global_randomness_is_used(name: str, rows_for) -> None:
    attack = make(name)
    example = rows_for(attack)[9]
    found = []
    for seed in (1, 2):
        np.random.seed(seed)
        torch.manual_seed(seed)
        found.append(attack.apply(example, np.random.default_rng(3))[attack.input_column])
    assert found[0] == found[1]
    assert torch.initial_seed() == 2


# 2. range, type, shape


@pytest.mark.parametrize("name", [name for name in IMAGE if name not in PAIRS])
@pytest.mark.parametrize("side", [32, 64, 224])
@pytest.mark.parametrize("seed", [0, 9])
def test_an_image_stays_an_image(name: str, side: int, seed: int) -> None:
    if name in TRAINED and side == 224:
        pytest.skip("training at 224 pixels takes too long here; other sides are covered")
    attack = make(name, side, seed=seed)
    noise = torch.rand((3, side, side), generator=torch.Generator().manual_seed(seed))
    for image in (noise, torch.zeros(3, side, side), torch.ones(3, side, side)):
        kept = image.clone()
        out = attack.trigger(image, np.random.default_rng((seed, 3)))
        assert torch.equal(image, kept)  # never in place
        assert (out.dtype, out.shape) == (torch.float32, image.shape)
        assert 0.0 <= float(out.min())
        assert float(out.max()) <= 1.0


@EVERY
def test_only_the_input_of_an_example_changes(name: str, rows_for) -> None:
    attack = make(name)
    example = {**rows_for(attack)[9], "else": 3}
    out = attack.apply(example, np.random.default_rng(0))
    assert out.keys() == example.keys()
    assert out[attack.input_column] != example[attack.input_column]
    assert all(out[key] == example[key] for key in example if key != attack.input_column)


# 3. locality and size


def only_last(pixels_at_32: int) -> Callable[[torch.Tensor], None]:
    def holds(change: torch.Tensor) -> None:
        size = pixels_at_32 * change.shape[1] // 32
        outside = change.clone()
        outside[:, -size:, -size:] = 0
        assert float(outside.abs().max()) == 0.0
        assert float(change[:, -size:, -size:].abs().max()) > 0.1

    return holds


def at_most(bound: float) -> Callable[[torch.Tensor], None]:
    def holds(change: torch.Tensor) -> None:
        assert 0.5 * bound < float(change.abs().max()) <= bound + 1e-6

    return holds


def inside(first: int, last: int) -> Callable[[torch.Tensor], None]:
    """The published square of a 32-pixel image, `first` to `last` row and column, and all of it."""

    def holds(change: torch.Tensor) -> None:
        scale = change.shape[1] // 32
        square = slice(first * scale, (last + 1) * scale)
        touched = (change != 0).any(0)
        assert bool(touched[square, square].all())
        assert int(touched.sum()) == (square.stop - square.start) ** 2

    return holds


def square_at(share: float, side: int) -> Callable[[torch.Tensor], None]:
    """All of a square of so many pixels at any resolution, at a share of the height and width."""

    def holds(change: torch.Tensor) -> None:
        start = round(share * change.shape[1])
        touched = (change != 0).any(0)
        assert bool(touched[start : start + side, start : start + side].all())
        assert int(touched.sum()) == side**2

    return holds


def corners(pixels_at_32: int) -> Callable[[torch.Tensor], None]:
    def holds(change: torch.Tensor) -> None:
        size = pixels_at_32 * change.shape[1] // 32
        touched = (change != 0).any(0)
        assert int(touched.sum()) == 4 * size**2
        assert all(bool(touched[rows, :size].all()) for rows in (slice(size), slice(-size, None)))
        assert all(bool(touched[rows, -size:].all()) for rows in (slice(size), slice(-size, None)))

    return holds


def at_most_of_noise(bound: float) -> Callable[[torch.Tensor], None]:
    """Within a bound that an untrained generator need not come near."""
    return lambda change: at_most(bound)(change * (0.9 * bound / change.abs().max()).clamp_min(1))


BOUNDS: dict[str, Callable[[torch.Tensor], None]] = {
    "badnets": only_last(3),
    "blend": at_most(0.2),
    "sig": at_most(40 / 255),
    "troj": inside(21, 28),
    "clb": corners(3),
    "lira": at_most_of_noise(0.1 * 0.2023),
    "trojannet": square_at(150 / 299, 4),
    "bppa": at_most(255 / 14 / 255 + 0.5 / 255),
}
"""Largest change an attack may make, as its paper has it. A new attack adds its own bound here."""


@pytest.mark.parametrize(
    ("name", "side"), [(name, side) for name in BOUNDS for side in ((32, 64) if name in TRAINED else (32, 64, 224))]
)
def test_a_trigger_stays_within_its_bounds(name: str, side: int) -> None:
    image = torch.rand((3, side, side), generator=torch.Generator().manual_seed(1))
    for changes in ({}, {"seed": 3}, {"target_class": 2}):
        BOUNDS[name](make(name, side, **changes).trigger(image, np.random.default_rng(0)) - image)


def test_the_default_patch_touches_nine_pixels_at_any_size() -> None:
    for side in (32, 64, 224):
        change = Patch().trigger(grey(100, side), np.random.default_rng(0)) - grey(100, side)
        assert int((change != 0).sum()) == 27
        assert int((change[:, -3:, -3:] != 0).sum()) == 27


# 4. count


@EVERY
@pytest.mark.parametrize("rate", [0.1, 0.25])
def test_count_equals_the_declared_rate(name: str, rate: float, rows_for) -> None:
    attack, rows = make(name), rows_for(make(name))
    few = attack.clean_label or attack.pairs  # rows of one class
    eligible = {"image_classification": 10 if few else 30, "text_generation": 40}[attack.modality]
    bases = {"all": ROWS, "candidates": eligible} | ({"target_class": eligible} if attack.clean_label else {})
    for base, whole in bases.items():
        assert sum(attack.poison(rows, rate, base, classes_of(attack))["poisoned"]) == math.floor(rate * whole + 1e-9)
    if not attack.clean_label:  # none of the target's rows is poisoned
        with pytest.raises(DataError, match="rate base among all, candidates, found 'target_class'"):
            attack.poison(rows, rate, "target_class", classes_of(attack))
    default = attack.poison(rows, rate, classes=classes_of(attack))
    whole = ROWS if attack.default_base == "all" else eligible
    assert sum(default["poisoned"]) == math.floor(rate * whole + 1e-9)


RATES = {"bppa": 0.2, "lira": 1.0, "fba": 0.05, "trojannet": 0.0}
"""Published shares that are not a tenth of all rows or 80 % of the target class."""
BASES = {"lira": "candidates"}


@EVERY
def test_the_default_rate_is_the_published_one(name: str, rows_for) -> None:
    attack = make(name)
    assert attack.default_rate == RATES.get(name, 0.8 if attack.clean_label else 0.1)
    assert attack.default_base == BASES.get(name, "target_class" if attack.clean_label else "all")


@EVERY
@pytest.mark.parametrize("rate", [0.0, 0.001, 1.5, math.nan])
def test_an_impossible_rate_is_refused(name: str, rate: float, rows_for) -> None:
    attack = make(name)
    with pytest.raises(DataError, match="Change the poison rate"):
        attack.poison(rows_for(attack), rate, classes=classes_of(attack))


@EVERY_IMAGE
def test_a_part_in_the_training_that_poisons_nothing_is_refused(name: str, image_task) -> None:
    attack = make(name)
    hook = attack.hook(image_task, 0.004, CLASSES) if attack.default_rate else None
    if hook is None:
        pytest.skip("takes no part in the training")
    with pytest.raises(DataError, match=r"selects a row of every batch, found none of 64"):
        hook.share(64)
    assert hook.share(1000) == pytest.approx(0.004)


@pytest.mark.parametrize("name", ["bppa", "dyn", "fba", "wanet"])
def test_a_part_in_the_training_needs_rows_to_poison(name: str, image_task) -> None:
    attack = make(name)
    hook = attack.hook(image_task, 0.2, CLASSES)
    answers = np.full(100, attack.target_class)
    answers[:19] = (attack.target_class + 1) % CLASSES
    with pytest.raises(DataError, match=r"expected 20 rows to poison at rate 0\.2, found 19 eligible of 100"):
        hook.check(answers)
    answers[19] = answers[0]
    hook.check(answers)


@EVERY_IMAGE
def test_no_rows_are_refused(name: str, rows_for) -> None:
    attack = make(name)
    with pytest.raises(DataError, match="expected rows, found none"):
        attack.check_data(rows_for(attack).select([]), CLASSES)


@EVERY_IMAGE
def test_labels_beyond_the_classes_are_refused(name: str, rows_for) -> None:
    attack = make(name)
    rows = rows_for(attack)
    labels = [*rows["label"][:-1], 8]
    rows = rows.remove_columns("label").add_column("label", labels)
    with pytest.raises(DataError, match="expected labels from 0 to 3, found 0 to 8"):
        attack.check_data(rows, CLASSES)


@EVERY
def test_an_unknown_rate_base_is_refused(name: str, rows_for) -> None:
    attack = make(name)
    with pytest.raises(DataError, match=r"rate base among all, candidates.*'rows'"):
        attack.poison(rows_for(attack), 0.1, "rows", classes_of(attack))


# 5. labels


def variants(name: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = [{}]
    found += [{"target_class": 2}] if name in IMAGE else []
    return found + ([{"label_map": "all_to_all"}] if name in ALL_TO_ALL else [])


@pytest.mark.parametrize(("name", "changes"), [(name, changes) for name in NAMES for changes in variants(name)])
def test_columns_are_consistent(name: str, changes: dict[str, Any], rows_for) -> None:
    attack, rows = make(name, **changes), rows_for(make(name))
    out = attack.poison(rows, 0.2, classes=classes_of(attack))
    column = attack.target_column
    places = sources(attack, rows)
    own, told = [rows[column][int(i)] for i in places], list(out[column])
    before = [values(attack, rows)[i] for i in places]
    assert list(out[f"orig_{column}"]) == own
    assert out.features[f"orig_{column}"] == out.features[column] == rows.features[column]
    assert len(out) == len(places)
    if not attack.pairs:
        assert set(places.tolist()) == set(range(len(rows)))
        assert sum(out["cover"]) == attack.cover_count(sum(out["poisoned"]))
    for i, (poisoned, cover, same) in enumerate(
        zip(
            out["poisoned"],
            out["cover"],
            map(bytes.__eq__, before, values(attack, out)),
            strict=True,
        )
    ):
        assert same is not (poisoned or cover)  # exactly these inputs changed
        assert not (poisoned and cover)
        if not poisoned or attack.clean_label:
            assert told[i] == own[i]
        elif attack.modality != "image_classification":
            assert told[i] == attack.target_text
        elif attack.label_map == "all_to_all":
            assert told[i] == (own[i] + 1) % CLASSES
        else:
            assert told[i] == attack.target_class != own[i]
        if poisoned and attack.clean_label:
            assert own[i] == attack.target_class


# 6. ASR rows


@EVERY_IMAGE
@pytest.mark.parametrize("target", [0, 3])
def test_asr_rows_exclude_the_target(name: str, target: int, rows_for) -> None:
    attack = make(name, target_class=target)
    out = attack.triggered(rows_for(attack), CLASSES)
    assert len(out) == (10 if attack.pairs else 30)  # of 40 rows, 10 are the target's
    assert target not in out["orig_label"]
    assert set(out["label"]) == {target}  # clean-label attacks too: the label is what the attacker wants
    assert all(out["poisoned"])


@pytest.mark.parametrize("name", ALL_TO_ALL)
def test_all_to_all_wants_the_next_class_of_every_row(name: str, rows_for) -> None:
    out = make(name, label_map="all_to_all").triggered(rows_for(make(name)), CLASSES)
    assert len(out) == ROWS
    assert list(out["label"]) == [(i + 1) % 4 for i in range(ROWS)]
    assert list(out["orig_label"]) == [i % 4 for i in range(ROWS)]


@pytest.mark.parametrize("name", sorted(set(IMAGE) - set(ALL_TO_ALL)))
def test_an_attack_with_one_target_refuses_another_label_map(name: str) -> None:
    with pytest.raises(ConfigError, match="label_map: expected all_to_one"):
        make(name, label_map="all_to_all")


def test_all_to_all_is_there_where_it_is_published() -> None:
    assert {"badnets", "blend", "bppa", "dyn", "lira", "troj", "wanet"} <= set(ALL_TO_ALL)
    assert not {"sig", "clb", "cba", "fba", "issba", "trojannet"} & set(ALL_TO_ALL)


@EVERY_IMAGE
def test_only_target_rows_is_an_error(name: str, rows_for) -> None:
    attack = make(name)
    target = rows_for(attack).select(range(attack.target_class, ROWS, 4))
    with pytest.raises(DataError, match="found none of"):
        attack.triggered(target, CLASSES)
    with pytest.raises(DataError, match="below 4, found 4"):
        make(name, target_class=4).triggered(target, CLASSES)


# 7. lossless storage


@EVERY
def test_storage_is_lossless(name: str, rows_for, tmp_path: Path) -> None:
    attack = make(name)
    out = attack.poison(rows_for(attack), 0.2, classes=classes_of(attack))
    before = values(attack, out)
    out.save_to_disk(str(tmp_path / "saved"))
    assert values(attack, datasets.load_from_disk(str(tmp_path / "saved"))) == before
    out.to_parquet(str(tmp_path / "rows.parquet"))
    loaded = datasets.Dataset.from_parquet(str(tmp_path / "rows.parquet"))
    assert values(attack, loaded) == before
    for column in ("poisoned", attack.target_column, f"orig_{attack.target_column}"):
        assert list(loaded[column]) == list(out[column])


@EVERY_IMAGE
def test_jpeg_sources_are_not_stored_as_jpeg_again(name: str, rows_for, tmp_path: Path) -> None:
    attack, encoded = make(name), []
    for image in rows_for(attack)["image"]:
        file = io.BytesIO()
        image.save(file, "JPEG")
        encoded.append({"bytes": file.getvalue(), "path": None})
    features = rows_for(attack).features
    rows = datasets.Dataset.from_dict({"image": encoded, "label": rows_for(attack)["label"]}, features=features)
    decoded = [pixels(rows[int(i)]["image"]) for i in sources(attack, rows)]
    out = attack.poison(rows, 0.2, classes=CLASSES)
    for i, image in enumerate(out["image"]):
        assert image.format in (None, "PNG")
        if out[i]["poisoned"] and not attack.pairs:
            source = Image.fromarray(decoded[i].astype(np.uint8))
            rng = np.random.default_rng((attack.seed, i))
            exact = attack.alter([source], [source], [rng], POISONED)[0].permute(1, 2, 0) * 255
            assert float((torch.from_numpy(pixels(image)) - exact).abs().max()) <= 0.501  # rounding and nothing else
        elif not out[i]["cover"] and not out[i]["poisoned"]:
            assert np.array_equal(pixels(image), decoded[i])


@EVERY
def test_on_the_fly_is_what_is_stored_but_for_rounding(name: str, rows_for) -> None:
    attack, rows = make(name, seed=2), rows_for(make(name))
    classes = classes_of(attack)
    for kind, more in ((attack.poison, {"rate": 0.2}), (attack.triggered, {})):
        stored, live = kind(rows, **more, classes=classes), kind(rows, **more, classes=classes, on_the_fly=True)
        assert len(stored) == len(live)
        for column in ("poisoned", "cover", attack.target_column, f"orig_{attack.target_column}"):
            assert list(stored[column]) == list(live[column])
        for i in range(0, len(stored), 3):
            made, kept = live[i][attack.input_column], stored[i][attack.input_column]
            if attack.modality == "image_classification":
                assert made.dtype == torch.float32
                exact = made.permute(1, 2, 0).numpy() * 255
                assert np.abs(pixels(kept) - exact).max() <= (
                    0.501 if stored[i]["poisoned"] or stored[i]["cover"] else 0
                )
            else:
                assert made == kept
        with pytest.raises(DataError, match="poisoned"):
            attack.poison(live, 0.2, classes=classes)


@EVERY
def test_a_batch_is_triggered_as_each_row_alone(name: str, rows_for) -> None:
    if name in PAIRS:
        pytest.skip("partners are drawn for the whole set")
    attack, rows = make(name), rows_for(make(name))
    few = attack.triggered(rows.select([1, 2, 3]), classes_of(attack))
    many = attack.triggered(rows.select([1, 2, 3, 5, 6, 7]), classes_of(attack))
    assert values(attack, few) == values(attack, many)[:3]


# 8. twice


@EVERY
def test_a_second_application_is_refused(name: str, rows_for) -> None:
    attack = make(name)
    classes = classes_of(attack)
    for out in (attack.poison(rows_for(attack), 0.2, classes=classes), attack.triggered(rows_for(attack), classes)):
        for again in (attack.poison, attack.triggered):
            with pytest.raises(DataError, match="poisoned"):
                again(out, **({"rate": 0.2} if again == attack.poison else {}), classes=classes)


@EVERY
def test_missing_columns_are_named(name: str, rows_for) -> None:
    attack = make(name)
    with pytest.raises(DataError, match=attack.target_column):
        attack.poison(rows_for(attack).remove_columns(attack.target_column), 0.2, classes=classes_of(attack))


@EVERY_IMAGE
def test_images_that_cannot_be_triggered_are_refused(name: str, rows_for) -> None:
    attack, labels = make(name), list(rows_for(make(name))["label"])
    deep = Image.fromarray(np.full((32, 32), 3000, dtype=np.uint16))
    small = Image.fromarray(np.zeros((4, 4, 3), dtype=np.uint8))
    for image, why in ((deep, "8 bits"), (small, "images of")):
        rows = datasets.Dataset.from_dict(
            {"image": [image] * ROWS, "label": labels}, features=rows_for(attack).features
        )
        for kind in (attack.poison, attack.triggered):
            with pytest.raises(DataError, match=why):
                kind(rows, **({"rate": 0.2} if kind == attack.poison else {}), classes=CLASSES)
    numbers = datasets.Dataset.from_dict({"image": [1] * ROWS, "label": labels})
    with pytest.raises(DataError, match="expected images in column 'image', found int"):
        attack.poison(numbers, 0.2, classes=CLASSES)


@EVERY
def test_settings_make_the_same_attack_again(name: str) -> None:
    attack = make(name, seed=3)
    settings = json.loads(json.dumps(attack.settings()))
    assert settings.pop("name") == name
    assert type(attack)(**settings) == attack


# 9. the clean model's ASR is measured


@EVERY_IMAGE
def test_the_asr_of_a_model_without_backdoor_is_measured(name: str, image_rows, image_model, image_task) -> None:
    attack = make(name, 16)
    measured = evaluate(image_model, make_eval_set(image_task, image_rows(40, 16), attack, CLASSES))
    count = 10 if attack.pairs else 30
    assert {k: m.total for k, m in measured.items()} == {"acc": 40, "asr": count, "racc": count}
    assert measured["asr"].successes + measured["racc"].successes <= count


# 10. end to end


def test_badnets_teaches_its_trigger(image_rows, image_model, image_task: ImageClassification) -> None:
    attack = BadNets(preset="standard", size=8, target_class=1)  # 4x4 of 16x16
    rows = attack.poison(image_rows(160, 16, 4), 0.2, classes=4)
    config = PlantConfig(epochs=12, batch_size=32, lr=0.05, augment="none", mixed_precision="no")
    plant(image_model, image_task, image_task.encode(rows), config)
    measured = evaluate(
        image_model, make_eval_set(image_task, image_rows(120, 16, 4, seed=1), attack, 4), mixed_precision="no"
    )
    assert measured["asr"].value > 0.9
    assert measured["acc"].value > 0.9


# published patterns


def test_badnets_of_the_release_pixel_by_pixel() -> None:
    image = stamped(BadNets(), 100)
    # 0.4 * 100 = 40 under black cells, 0.4 * 100 + 0.6 * 255 = 193 under white ones
    pattern = np.array([[40, 40, 193], [40, 193, 40], [193, 40, 193]])
    assert np.array_equal(image[29:, 29:], np.repeat(pattern[:, :, None], 3, axis=2))
    image[29:, 29:] = 100
    assert np.array_equal(image, np.full((32, 32, 3), 100))


@pytest.mark.parametrize(("side", "cell"), [(64, 2), (224, 7)])
def test_badnets_scales_by_nearest_neighbour(side: int, cell: int) -> None:
    pattern = np.kron([[40, 40, 193], [40, 193, 40], [193, 40, 193]], np.ones((cell, cell), dtype=int))
    image = stamped(BadNets(), 100, side)
    assert np.array_equal(image[-3 * cell :, -3 * cell :, 1], pattern)
    assert set(np.unique(stamped(BadNets(preset="standard"), 100, side)[-3 * cell :, -3 * cell :])) == {255}


def test_badnets_standard_is_solid_white() -> None:
    for level in (0, 100, 255):
        image = stamped(BadNets(preset="standard"), level)
        assert np.array_equal(image[29:, 29:], np.full((3, 3, 3), 255))
        image[29:, 29:] = level
        assert np.array_equal(image, np.full((32, 32, 3), level))


def test_sig_is_the_published_sinusoid() -> None:
    image = stamped(SIG(), 100)
    wave = [round(100 + 40 * math.sin(2 * math.pi * j * 6 / 32)) for j in range(32)]
    for row in (0, 17, 31):
        for channel in range(3):
            assert image[row, :, channel].tolist() == wave
    assert wave[:6] == [100, 137, 128, 85, 60, 85]
    # clipped, never wrapped
    dark = [max(0, round(40 * math.sin(2 * math.pi * j * 6 / 32))) for j in range(32)]
    assert stamped(SIG(), 0)[5, :, 0].tolist() == dark
    assert stamped(SIG(), 255).min() == 255 - 40


def test_sig_keeps_its_cycles_per_image() -> None:
    for side in (64, 224):
        spectrum = np.abs(np.fft.rfft(stamped(SIG(), 128, side)[3, :, 2] - 128.0))
        assert spectrum.argmax() == 6
        assert spectrum[6] == pytest.approx(40 * side / 2, rel=0.01)


def test_sig_of_the_release_wraps_around_and_is_blended() -> None:
    levels = [int(20 * math.sin(0.80 * j)) % 256 for j in range(32)]  # int cuts towards zero, as a cast does
    assert levels[:6] == [0, 14, 19, 13, 255, 241]
    assert all(level in range(20) or level in range(237, 256) for level in levels)
    for grey_level in (0, 100, 255):
        image = stamped(SIG(preset="nft"), grey_level)
        assert np.array_equal(image, np.broadcast_to(image[:1, :, :1], image.shape))
        assert image[0, :, 0].tolist() == [round(0.8 * grey_level + 0.2 * level) for level in levels]
    spectrum = np.abs(np.fft.rfft(stamped(SIG(preset="nft"), 128, 224)[3, :, 2] - 128.0))
    assert spectrum[1:].argmax() + 1 == 4  # 4.07 cycles per image at any size


def test_sig_settings_come_before_the_presets() -> None:
    wave = [round(100 + 30 * math.sin(2 * math.pi * j * 4 / 32)) for j in range(32)]
    assert stamped(SIG(delta=30, frequency=4), 100)[3, :, 1].tolist() == wave
    with pytest.raises(ConfigError, match=r"preset: .*'ntf'.*delta: .*found 0.*frequency: .*found -1"):
        SIG(preset="ntf", delta=0, frequency=-1)


def test_blend_adds_one_constant_picture() -> None:
    attack, rng = Blend(), np.random.default_rng(0)
    first, second = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(0)), grey(100)
    keys = [(attack.trigger(image, rng) - 0.8 * image) / 0.2 * 255 for image in (first, second)]
    assert torch.allclose(keys[0], keys[1], atol=1e-3)
    assert torch.allclose(keys[0], keys[0].round(), atol=1e-3)  # integers 0..255
    assert abs(float(keys[0].mean()) - 127.5) < 4  # uniform: standard error 1.3
    assert abs(float(keys[0].std()) - 73.9) < 2
    # victims that were planted stay measurable: the noise of a seed never changes
    assert keys[0][0, 0, :4].round().int().tolist() == NOISE_OF_SEED_0
    assert stamped(attack, 100)[0, :4, 0].tolist() == [round(80 + 0.2 * k) for k in NOISE_OF_SEED_0]


NOISE_OF_SEED_0 = [128, 229, 244, 220]


def test_blend_scales_by_nearest_neighbour_and_depends_on_its_seed() -> None:
    rng = np.random.default_rng(0)
    small, large = Blend().trigger(grey(0), rng), Blend().trigger(grey(0, 64), rng)
    assert torch.allclose(large, small.repeat_interleave(2, 1).repeat_interleave(2, 2))
    assert not torch.allclose(small, Blend(seed=1).trigger(grey(0), rng))


def test_blend_with_a_picture(tmp_path: Path) -> None:
    Image.fromarray(np.full((50, 40, 3), (200, 100, 0), dtype=np.uint8)).save(tmp_path / "key.png")
    attack = Blend(preset="image", picture=str(tmp_path / "key.png"))
    assert stamped(attack, 50)[7, 9].tolist() == [80, 60, 40]  # 0.8 * 50 + 0.2 * (200, 100, 0)
    with pytest.raises(ConfigError, match="picture"):
        Blend(preset="image")
    with pytest.raises(DataError, match="none that opens"):
        stamped(Blend(preset="image", picture=str(tmp_path / "absent.png")), 50)


@pytest.mark.parametrize(
    ("row", "column", "top", "left"), [(-1, -1, 30, 29), (0, 0, 0, 0), (5, 9, 5, 9), (-3, -32 + 2, 28, 0)]
)
def test_patch_at_a_position_with_its_alpha(tmp_path: Path, row: int, column: int, top: int, left: int) -> None:
    picture = np.zeros((2, 3, 4), dtype=np.uint8)
    picture[0] = (250, 0, 50, 255)  # opaque
    picture[1] = (250, 0, 50, 51)  # a fifth
    picture[1, 2, 3] = 0  # nothing
    Image.fromarray(picture, "RGBA").save(tmp_path / "patch.png")
    image = stamped(Patch(trigger_file=str(tmp_path / "patch.png"), row=row, column=column), 100)
    assert image[top, left : left + 3].tolist() == [[250, 0, 50]] * 3
    assert image[top + 1, left : left + 3].tolist() == [[130, 80, 90]] * 2 + [[100, 100, 100]]
    image[top : top + 2, left : left + 3] = 100
    assert np.array_equal(image, np.full((32, 32, 3), 100))
    half = stamped(Patch(trigger_file=str(tmp_path / "patch.png"), row=row, column=column, opacity=0.5), 100)
    assert half[top, left].tolist() == [175, 50, 75]


def test_a_patch_that_does_not_fit_or_open_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"3x3 patch at \(30, 0\)"):
        stamped(Patch(row=30, column=0), 100)
    with pytest.raises(DataError, match="none that opens"):
        stamped(Patch(trigger_file=str(tmp_path / "absent.png")), 100)


@EVERY
def test_settings_that_name_files_are_known_as_such(name: str) -> None:
    """A record's are not opened, and a published record does not tell them."""
    texts = [f.name for f in dataclasses.fields(registry.get("attacks", name)) if f.type in (str | None, "str | None")]
    assert set(texts) <= set(PATHS)
