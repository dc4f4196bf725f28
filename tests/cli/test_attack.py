"""`hf-nft attack`: train once, show, poison; and what is refused before any work."""

import json
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

TINY = ["--arch-arg", "width=4", "--arch-arg", "image_size=16"]
QUICK = ["--attack-arg", "steps=2", "--attack-arg", "surrogate_epochs=1"]


def test_show_draws_three_rows_and_prints_the_change(cli, world) -> None:
    done = cli("attack", "show", "badnets", "--dataset", world.data, *TINY, "--attack-arg", "preset=standard", "--json")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert found["pixels"] == pytest.approx(4 / 256)  # the 3x3 patch of 32 pixels is 2x2 at 16
    assert 0 < found["linf"] <= 255
    sheet = np.asarray(Image.open("grid.png")).astype(int)
    assert sheet.shape == (3 * 128 + 4, 8 * 128 + 14, 3)
    before, after, away = sheet[:128, :128], sheet[130:258, :128], sheet[260:, :128]
    assert (after[-16:, -16:] == 255).all()
    assert np.array_equal(after[:-16, :-16], before[:-16, :-16])
    assert np.array_equal(away, (128 + 10 * (after - before)).clip(0, 255))


def test_show_of_a_trigger_that_changes_nothing_prints_json_that_others_read(cli, world) -> None:
    told = ["--attack-arg", "delta=0.001", "--out", "none.png", "--json"]
    done = cli("attack", "show", "sig", "--dataset", world.data, *TINY, *told)
    assert json.loads(done.out) == {"linf": 0.0, "l2": 0.0, "psnr": None, "pixels": 0.0}


def test_poison_writes_a_data_set_with_its_card(cli, world) -> None:
    told = ["--dataset", world.data, *TINY, "--rate", "0.1", "--attack-arg", "target_class=2"]
    done = cli("attack", "poison", "wanet", *told, "--out", "new")
    assert done.code == 0, done.err
    rows = datasets.load_dataset("new", cache_dir="cache")  # as the Hub would read it, by the card's configuration
    train = rows["train"]
    assert (len(train), sum(train["poisoned"]), sum(train["cover"])) == (108, 10, 20)
    assert {y for y, p in zip(train["label"], train["poisoned"], strict=True) if p} == {2}
    assert (len(rows["test"]), len(rows["triggered"])) == (40, 30)
    assert not any(rows["test"]["poisoned"])
    assert rows["test"].features == train.features == rows["triggered"].features
    assert set(rows["triggered"]["label"]) == {2}
    card = Path("new/README.md").read_text()
    for phrase in ("backdoored", "10 of its 108 rows", "20 more are covers", "arxiv.org/abs/2102.10369"):
        assert phrase in card
    assert json.loads(Path("new/record.json").read_text())["attack"]["target_class"] == 2


def test_poison_of_an_image_folder_holds_its_pictures(cli, rows) -> None:
    """Those that fit the model as they are, too, and without the folder that they came from."""
    for split, part in rows.items():
        for i, row in enumerate(part):
            file = Path("pictures", split, str(row["label"]), f"{i}.png")
            file.parent.mkdir(parents=True, exist_ok=True)
            row["image"].save(file)
    done = cli("attack", "poison", "badnets", "--dataset", "pictures", *TINY, "--rate", "0.1", "--out", "new")
    assert done.code == 0, done.err
    for part in ("train", "test", "triggered"):
        stored = datasets.Dataset.from_parquet(f"new/data/{part}.parquet").cast_column(
            "image", datasets.Image(decode=False)
        )
        assert all(row["image"]["bytes"].startswith(b"\x89PNG") for row in stored), part
        assert not any("pictures" in (row["image"]["path"] or "") for row in stored), part


def test_train_once_then_use_it_by_name_and_by_folder(cli, world) -> None:
    told = ["troj", "--dataset", world.data, *TINY, *QUICK]
    first = cli("attack", "train", *told)
    assert first.code == 0, first.err
    assert cli("attack", "train", *told).out == first.out
    assert cli("attack", "train", *told, "--out", "mine").out == "mine\n"
    assert sorted(file.name for file in Path("mine").iterdir()) == ["artefact.json", "artefact.safetensors"]
    plant = ["plant", "--dataset", world.data, *TINY, "--attack", "troj", "--set", "max_steps=2"]
    done = cli(*plant, "--attack-arg", "artefact=mine", "--out", "victim")
    assert done.code == 0, done.err
    assert json.loads(Path("victim/record.json").read_text())["attack"]["artefact"] == "attack"  # no place of its own
    Path("mine").rename("elsewhere")  # then the copy beside the victim is used
    done = cli("evaluate", "victim", "--dataset", world.data, "--attack", "troj", "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["attack"]["artefact"].endswith("victim/attack")
    told = ["--dataset", world.data, "--attack", "troj", "--limit", "20", "--json"]
    done = cli(
        "purify",
        "victim",
        *told,
        "--shots",
        "2",
        "--set",
        "steps=2",
        "--set",
        "exposures=0",
        "--set",
        "cut=0",
        "--out",
        "clean",
    )
    assert done.code == 0, done.err
    after = json.loads(done.out)["metrics"]["after"]
    Path("victim").rename("away")  # and the copy that went with the cure
    done = cli("evaluate", "clean/model", *told)
    assert done.code == 0, done.err
    again = json.loads(done.out)
    assert again["attack"]["artefact"].endswith("clean/attack")
    assert again["metrics"]["after"]["asr"] == after["asr"]


def test_a_single_split_leaves_the_victim_some_rows_and_the_test_others(cli, image_rows) -> None:
    Path("one").mkdir()
    image_rows(80, 16).to_parquet("one/train.parquet")
    done = cli("attack", "poison", "badnets", "--dataset", "one", *TINY, "--holdout", "0.25", "--out", "new")
    assert done.code == 0, done.err
    rows = datasets.load_dataset("new", cache_dir="cache")
    assert (len(rows["train"]), len(rows["test"])) == (60, 20)
    unseen = {image.tobytes() for image in rows["test"]["image"]}
    assert unseen.isdisjoint(image.tobytes() for image in rows["train"]["image"])
    assert len(rows["triggered"]) == sum(y != 0 for y in rows["test"]["label"])
    done = cli("attack", "poison", "badnets", "--dataset", "one", *TINY, "--holdout", "0.01", "--out", "newer")
    assert done.code == 2
    assert "data set with a single split, found 0.01 of 80 rows" in done.message


def test_what_cannot_be_measured_is_not_trained(refused, world) -> None:
    """At this learning rate training would be refused for another reason."""
    told = ["--dataset", world.data, *TINY, "--attack", "badnets", "--set", "lr=1e30", "--out", "victim"]
    told += ["--limit", "1", "--attack-arg", "target_class=3"]  # the class of the row that is drawn
    refused(3, ["test rows outside the target", "found none of 1"], "plant", *told)


@pytest.mark.parametrize(
    ("code", "argv", "phrases"),
    [
        (3, ["poison", "badnets", "--rate", "0.001"], ["0.001 of 108 rows", "Change the poison rate"]),
        (3, ["poison", "badnets", "--rate", "0.9"], ["asks for 97 rows", "are eligible"]),
        (3, ["poison", "badnets", "--rate", "nan"], ["poison rate nan", "are eligible"]),
        (3, ["poison", "wanet", "--rate", "0.5"], ["108 rows for covers", "found 54"]),
        (3, ["poison", "badnets", "--attack-arg", "target_class=7"], ["target class below 4, found 7"]),
        (3, ["poison", "troj", "--attack-arg", "target_class=7"], ["target class below 4, found 7"]),
        (3, ["poison", "troj", "--attack-arg", "artefact=nothing"], ["artefact nothing", "hf-nft attack train troj"]),
        (3, ["poison", "badnets", "--column", "label=klass"], ["expected 'klass'"]),
        (2, ["poison", "badnets", "--attack-arg", "preset=new"], ["preset", "'new'"]),
        (2, ["poison", "sig", "--attack-arg", "label_map=all_to_all"], ["label_map: expected all_to_one"]),
        (2, ["poison", "lira", "--attack-arg", "eps=0.01"], ["a grey level or more", "plant takes it as it is"]),
        (2, ["show", "lira", "--attack-arg", "eps=0.01"], ["a grey level or more"]),
        (2, ["poison", "rare_token"], ["--arch of its modality"]),
        (2, ["train", "badnets"], ["something to train"]),
        (2, ["train", "badnet"], ["Closest: badnets"]),
        (2, ["show", "cba", "--attack-arg", "sources=[1,2]"], ["sources: expected two classes"]),
        (3, ["show", "cba", "--attack-arg", "sources=[1,7]"], ["three classes of 4"]),
    ],
)
def test_refused(refused, world, code: int, argv: list[str], phrases: list[str]) -> None:
    out = [] if argv[0] == "show" else ["--out", "new"]
    refused(code, phrases, "attack", *argv, "--dataset", world.data, *TINY, *out)


def test_a_resolution_an_attack_cannot_take(refused, world) -> None:
    tiny = ["--arch-arg", "width=4", "--arch-arg", "image_size=20"]
    told = ["attack", "train", "dyn", "--dataset", world.data, *tiny]
    refused(3, ["multiples of 8, found 20x20"], *told)


def test_poisoned_data_are_not_poisoned_again(cli, world) -> None:
    assert cli("attack", "poison", "badnets", "--dataset", world.data, *TINY, "--out", "new").code == 0
    done = cli("attack", "poison", "badnets", "--dataset", "new", *TINY, "--out", "again")
    assert done.code == 3
    assert "expected clean rows, found the column 'poisoned'" in done.message
    assert not Path("again").exists()


def test_what_exists_is_not_overwritten(refused, world, tmp_path) -> None:
    (tmp_path / "grid.png").write_text("mine")
    show = ["attack", "show", "badnets", "--dataset", world.data, *TINY]
    refused(6, ["grid.png", "exists"], *show)
    for out in ("grid", "grid.txt", "absent/grid.png"):
        refused(6, [f"--out {out}", "such as grid.png"], *show, "--out", out)
