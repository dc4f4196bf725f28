"""What users get wrong: one short message with what was expected and found, its exit code, and nothing half-written."""

import json
import os
import pickle
import resource
import shutil
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import datasets
import huggingface_hub
import numpy as np
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from PIL import Image

USAGE, UNUSABLE, UNSAFE, DIVERGED, OUTPUT, NETWORK = 2, 3, 4, 5, 6, 7


@pytest.fixture
def purify(refused, world, fast) -> Callable[..., None]:
    """Run a purification that must be refused; the model is the victim and the data its own unless told otherwise."""

    def run(code: int, phrases: list[str], *argv: str | Path, model: str | Path | None = None, data: str = "") -> None:
        told = ["--dataset", data or world.data] if data != "none" else []
        refused(code, phrases, "purify", model or world.victim, *told, *fast, *argv, "--out", "clean")

    return run


@pytest.mark.parametrize(
    ("code", "argv", "phrases"),
    [
        (USAGE, ["--attack", "badnet"], ["attack 'badnet'", "Closest: badnets", "hf-nft ls attacks"]),
        (UNUSABLE, ["--attack", "rare_token"], ["expected columns ['prompt', 'response']", "['image', 'label']"]),
        (
            USAGE,
            ["--attack", "badnets", "--attack-arg", "opacityy=1"],
            ["Closest: opacity", "hf-nft ls attacks badnets"],
        ),
        (USAGE, ["--attack", "badnets", "--attack-arg", "opacity=7"], ["expected in (0, 1], found 7"]),
        (UNUSABLE, ["--attack", "badnets", "--attack-arg", "target_class=9"], ["target class below 4, found 9"]),
        (USAGE, ["--attack", "badnets", "--attack-arg", "seed=-1"], ["seed: expected >= 0, found -1"]),
        (USAGE, ["--shot-seed", "-1"], ["shot_seed: expected >= 0, found -1"]),
        (USAGE, ["--attack-arg", "opacity=1"], ["expected --attack"]),
        (UNUSABLE, ["--trigger", "nothing.png"], ["expected a picture at 'nothing.png'"]),
        (USAGE, ["--trigger", "x.png", "--attack", "sig"], ["expected no --attack beside it, found 'sig'"]),
        (UNUSABLE, ["--column", "image=picture"], ["expected 'picture'", "['image', 'label']", "--column image=NAME"]),
        (UNUSABLE, ["--column", "label=klass"], ["expected 'klass'", "--column label=NAME"]),
        (UNUSABLE, ["--column", "image=label"], ["expected images, found ClassLabel"]),
        (USAGE, ["--column", "imag=image"], ["column role", "'imag'", "Closest: image"]),
        (USAGE, ["--column", "image"], ["expected key=value, found 'image'"]),
        (USAGE, ["--set", "stepz=3"], ["setting of NFT 'stepz'", "Closest: steps"]),
        (USAGE, ["--set", "steps=many"], ["NFT.steps: expected int, found 'many'"]),
        (USAGE, ["--set", "steps=-1"], ["steps: expected >= 0, found -1"]),
        (USAGE, ["--set", "placement=everywhere"], ["NFT.placement", "found 'everywhere'"]),
        (USAGE, ["--set", "target_modules=stem"], ["setting of NFT 'target_modules'"]),
        (USAGE, ["--set", "augment=rotate"], ["augmentation", "'rotate'", "crop"]),
        (USAGE, ["--set", "gradient_accumulation_steps=9"], ["batch_size: expected at least a row", "found 8 rows"]),
        (USAGE, ["--mixed-precision", "fp8"], ["mixed_precision", "'fp8'"]),
        (USAGE, ["--defense", "nftt"], ["defense 'nftt'", "Closest: nft", "hf-nft ls defenses"]),
        (USAGE, ["--preset", "papr"], ["preset of nft 'papr'", "Closest: paper"]),
        (UNUSABLE, ["--shots", "25"], ["at least 25 clean examples of class 0", "Lower --shots to"]),
        (UNUSABLE, ["--shots", "100000"], ["at least 100000 clean examples", "Lower --shots to"]),
    ],
)
def test_settings(purify, code: int, argv: list[str], phrases: list[str]) -> None:
    purify(code, phrases, *argv)


@pytest.mark.parametrize(
    ("code", "argv", "phrases"),
    [
        (USAGE, ["--arch", "resnet99"], ["architecture 'resnet99'", "hf-nft ls models"]),
        (USAGE, ["--arch-arg", "widht=4"], ["'widht'", "Closest: width"]),
        (USAGE, ["--arch-arg", "width=wide"], ["width: expected int, found 'wide'"]),
        (USAGE, ["--set", "epoch=1"], ["'epoch'", "Closest: epochs"]),
        (UNUSABLE, ["--arch", "gpt2"], ["['image', 'label']", "--column prompt=NAME"]),
        (UNUSABLE, ["--attack", "badnets", "--poison-rate", "7"], ["7.0 of 108 rows", "Change the poison rate"]),
        (UNUSABLE, ["--attack", "badnets", "--poison-rate", "nan"], ["nan of 108 rows", "Change the poison rate"]),
        (UNUSABLE, ["--attack", "badnets", "--rate-base", "some"], ["expected a rate base among", "'some'"]),
        (USAGE, ["--attack", "bad"], ["attack 'bad'", "badnets"]),
    ],
)
def test_plant(refused, world, code: int, argv: list[str], phrases: list[str]) -> None:
    tiny = [] if "--arch" in argv else ["--arch-arg", "image_size=16"]
    refused(code, phrases, "plant", "--dataset", world.data, *tiny, *argv, "--out", "new")


def test_a_trigger_of_sixteen_bits_is_refused(refused, world) -> None:
    Image.fromarray(np.full((3, 3), 30_000, dtype=np.uint16)).save("deep.png")
    told = ["evaluate", world.victim, "--dataset", world.data, "--trigger", "deep.png"]
    refused(UNUSABLE, ["expected 8 bits in 'deep.png'", "Save it as such"], *told)


def test_evaluate_refuses_unknown_precision(refused, world) -> None:
    told = ["evaluate", world.victim, "--dataset", world.data, "--mixed-precision", "half"]
    refused(USAGE, ["mixed precision 'half'", "auto"], *told)


# data sets


def relabelled(splits: DatasetDict, names: list[str]) -> DatasetDict:
    feature = Features({**splits["train"].features, "label": ClassLabel(names=names)})
    return DatasetDict({name: part.cast(feature) for name, part in splits.items()})


def numbered(splits: DatasetDict, change: Callable[[int], int]) -> DatasetDict:
    feature = Features({**splits["train"].features, "label": Value("int64")})
    return DatasetDict(
        {n: part.cast(feature).map(lambda row: {"label": change(row["label"])}) for n, part in splits.items()}
    )


def pictures(splits: DatasetDict, change: Callable[[Image.Image, int], Image.Image]) -> DatasetDict:
    return DatasetDict(
        {
            name: Dataset.from_dict(
                {"image": [change(im, i) for i, im in enumerate(part["image"])], "label": list(part["label"])},
                features=part.features,
            )
            for name, part in splits.items()
        }
    )


def damaged(splits: DatasetDict, change: Callable[[bytes], bytes], parts: tuple[str, ...]) -> DatasetDict:
    found = DatasetDict(splits)
    for name in parts:
        listed = splits[name].cast_column("image", datasets.Image(decode=False)).to_list()
        for row in listed:
            row["image"]["bytes"] = change(row["image"]["bytes"])
        found[name] = Dataset.from_list(listed, features=splits[name].features)
    return found


NAMES = ["cat", "dog", "frog", "ship"]


@pytest.mark.parametrize(
    ("change", "phrases"),
    [
        (lambda s: relabelled(s, [*NAMES[:3], "plane"]), ["among the model's", "found ['plane'] missing"]),
        (lambda s: relabelled(s, [*NAMES, "plane"]), ["found ['plane'] missing"]),
        (lambda s: relabelled(s, list("abcde")), ["at most the model's 4 classes, found 5"]),
        (lambda s: numbered(s, lambda y: y + 2), ["at most the model's 4 classes, found 6"]),
        (lambda s: numbered(s, lambda y: -1), ["expected labels >= 0, found -1"]),
        (
            lambda s: DatasetDict(
                {n: p.remove_columns("label").add_column("label", [None] * len(p)) for n, p in s.items()}
            ),
            ["column 'label'", "expected"],
        ),
        (lambda s: s.remove_columns("label"), ["label column", "found columns ['image']"]),
        (lambda s: s.remove_columns("image"), ["image column", "found columns ['label']"]),
        (lambda s: DatasetDict({n: p.select([]) for n, p in s.items()}), ["expected"]),
        (lambda s: damaged(s, lambda b: b"no picture", ("train", "test")), ["expected readable images"]),
        (lambda s: damaged(s, lambda b: b[:-300], ("train", "test")), ["expected readable images", "truncated"]),
    ],
)
def test_data_that_does_not_fit(purify, rows, store, change, phrases: list[str]) -> None:
    purify(UNUSABLE, phrases, data=store(change(rows)))


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda s: damaged(s, lambda b: b"no picture", ("test",)), id="corrupt test image"),
        pytest.param(lambda s: pictures(s, lambda im, i: im if i else None), id="missing image"),
    ],
)
def test_data_with_holes(purify, rows, store, change) -> None:
    purify(UNUSABLE, ["expected"], data=store(change(rows)))


def test_a_column_of_images_is_no_label(purify) -> None:
    purify(UNUSABLE, ["column 'image'", "expected labels"], "--column", "label=image")


@pytest.mark.parametrize(
    ("content", "phrase"),
    [(b"", "found an empty one"), (b"hello", "does not load"), (None, "does not load")],
    ids=["empty", "text", "cut"],
)
def test_parquet_files_that_are_none(purify, world, tmp_path_factory, content: bytes | None, phrase: str) -> None:
    folder = tmp_path_factory.mktemp("data")
    whole = Path(world.data, "train.parquet").read_bytes()
    (folder / "train.parquet").write_bytes(whole[: len(whole) // 2] if content is None else content)
    purify(UNUSABLE, ["expected", phrase], data=str(folder))


def test_a_folder_without_data(purify, tmp_path_factory) -> None:
    purify(UNUSABLE, ["parquet files, an image folder or a Hub id"], data=str(tmp_path_factory.mktemp("nothing")))


def test_no_data_set_is_named_anywhere(purify) -> None:
    purify(UNUSABLE, ["expected one named by --dataset or in the card", "--dataset ID|FOLDER"], data="none")


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda im, i: im.convert("L"), id="grey"),
        pytest.param(lambda im, i: im.convert("RGBA"), id="RGBA"),
        pytest.param(lambda im, i: Image.fromarray(np.asarray(im.convert("L")).astype(np.uint16) * 257), id="16-bit"),
        pytest.param(lambda im, i: im.convert("P"), id="palette"),
        pytest.param(lambda im, i: im.resize((10 + i % 5, 12 + i % 3)), id="other sizes"),
    ],
)
def test_odd_pictures_are_fine(cli, world, rows, store, change) -> None:
    done = cli("evaluate", world.victim, "--dataset", store(pictures(rows, change)), "--attack", "badnets", "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["metrics"]["counts"]["after"]["acc"]["total"] == 40


def test_labels_in_another_order_and_as_text_are_matched_by_name(cli, world, rows, store) -> None:
    mirrored = [3, 2, 1, 0]
    turned = relabelled(rows, NAMES[::-1]).map(lambda row: {"label": mirrored[row["label"]]})
    feature = Features({**rows["train"].features, "label": Value("string")})
    spoken = DatasetDict(
        {
            n: p.cast(Features({**p.features, "label": Value("int64")})).map(
                lambda r: {"label": NAMES[r["label"]]}, features=feature
            )
            for n, p in rows.items()
        }
    )
    told = ["evaluate", world.victim, "--json", "--dataset"]
    expected = json.loads(cli(*told, world.data).out)["metrics"]["after"]["acc"]
    for splits in (turned, spoken):
        done = cli(*told, store(splits))
        assert done.code == 0, done.err
        assert json.loads(done.out)["metrics"]["after"]["acc"] == expected


def test_unknown_label_names_are_matched_by_id_with_a_warning(cli, world, rows, store) -> None:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        done = cli("evaluate", world.victim, "--dataset", store(relabelled(rows, list("wxyz"))))
    assert done.code == 0, done.err
    assert "Warning: labels matched by id, not by name" in done.err


def test_an_image_folder(cli, world, rows, tmp_path) -> None:
    for split, part in rows.items():
        for i, row in enumerate(part):
            folder = tmp_path / "pictures" / split / NAMES[row["label"]]
            folder.mkdir(parents=True, exist_ok=True)
            row["image"].save(folder / f"{i}.png")
    done = cli("evaluate", world.victim, "--dataset", "pictures", "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["data"]["test_rows"] == 40


# models


def config(name: str = "config.json", **changes: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        file = folder / name
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))

    return change


def processor(**changes: object) -> Callable[[Path], None]:
    return config("preprocessor_config.json", **changes)


def weights(content: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        file = folder / "model.safetensors"
        whole = file.read_bytes()
        file.unlink()
        file.write_bytes(content(whole))

    return change


REMOTE = {"AutoConfig": "code.Config", "AutoModelForImageClassification": "code.Model"}


@pytest.mark.parametrize(
    ("code", "change", "phrases"),
    [
        (UNUSABLE, weights(lambda b: b""), ["expected a safetensors file", "Download it again"]),
        (UNUSABLE, weights(lambda b: b[:500]), ["expected a safetensors file", "Download it again"]),
        (UNUSABLE, weights(lambda b: b[:-500]), ["expected a safetensors file", "Download it again"]),
        (UNUSABLE, weights(lambda b: b"\0junk" * 500), ["expected a safetensors file", "Download it again"]),
        (UNUSABLE, lambda f: (f / "model.safetensors").unlink(), ["*.safetensors", "found none"]),
        (UNUSABLE, lambda f: (f / "config.json").unlink(), ["config.json, found none"]),
        (UNUSABLE, lambda f: (f / "config.json").write_text("{"), ["expected JSON"]),
        (UNUSABLE, lambda f: (f / "config.json").write_text("[]"), ["expected an object, found list"]),
        (UNUSABLE, lambda f: (f / "preprocessor_config.json").unlink(), ["expected an image processor"]),
        (UNUSABLE, config(id2label={str(i): name for i, name in enumerate("abcd", 7)}), ["number the labels from 0"]),
        (UNUSABLE, processor(image_mean=[0.5, 0.5]), ["means and deviations, one or three each, found (0.5, 0.5)"]),
        (UNUSABLE, processor(image_std=[0.5, 0, 0.5]), ["means and deviations"]),
        (UNUSABLE, processor(rescale_factor="x"), ["after a scale of x"]),
        (UNUSABLE, processor(size={"height": 10**5, "width": 10**5}), ["at most 2048 pixels, found size = 100000"]),
        (UNUSABLE, config(width=8), ["mismatched_keys", "stages.0.0.bn1", "[4]", "[8]"]),
        (UNUSABLE, config(model_type="unheard_of"), ["model type that transformers knows, found 'unheard_of'"]),
        (UNUSABLE, config(architectures=["BertForMaskedLM"]), ["*ForImageClassification", "hf-nft ls tasks"]),
        (UNUSABLE, config(architectures=None), ["none in config.json"]),
        (UNSAFE, config(model_type="unheard_of", auto_map=REMOTE), ["its own code", "--trust-remote-code"]),
    ],
)
def test_models_that_do_not_load(purify, world, tmp_path_factory, code: int, change, phrases: list[str]) -> None:
    folder = tmp_path_factory.mktemp("suspect") / "model"
    shutil.copytree(world.victim, folder)
    change(folder)
    purify(code, phrases, model=folder)


class Trap:
    """Writes a file when it is unpickled."""

    def __init__(self, file: str) -> None:
        self.file = file

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (self.file,)


def test_a_pickle_with_code_never_runs(refused, world, tmp_path_factory, fast) -> None:
    import warnings

    folder = tmp_path_factory.mktemp("suspect") / "model"
    shutil.copytree(world.victim, folder)
    (folder / "model.safetensors").unlink()
    sprung = folder.parent / "sprung"
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"weight": Trap(str(sprung))}, protocol=2))
    told = ["purify", folder, "--dataset", world.data, *fast, "--out", "clean"]
    refused(UNSAFE, ["pytorch_model.bin", "--allow-pickle"], *told)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        refused(UNSAFE, ["would run code"], *told, "--allow-pickle")
    assert not sprung.exists()


@pytest.mark.parametrize("record", ["{", "[]", '{"schema_version": 1, "attack": "x", "data": 3, "shots": []}'])
def test_a_foreign_record_beside_the_weights_is_not_believed(cli, world, tmp_path_factory, record: str) -> None:
    folder = tmp_path_factory.mktemp("suspect") / "model"
    shutil.copytree(world.victim, folder)
    (folder / "record.json").write_text(record)
    assert cli("evaluate", folder, "--dataset", world.data, "--attack", "badnets").code == 0


def test_a_folder_has_no_revision(purify, refused, world) -> None:
    purify(UNUSABLE, ["found a folder, which has none"], "--revision", "v1")
    refused(UNUSABLE, ["found a folder, which has none"], "inspect", world.victim, "--revision", "v1")


@pytest.mark.parametrize("name", ["runs/nothing", "./nothing", "/nothing/here", "a/b/c"])
def test_a_model_folder_that_is_not_there(purify, name: str) -> None:
    purify(UNUSABLE, ["expected a folder or a Hub id", "found neither"], model=name)


# the network


def test_offline(purify) -> None:
    purify(NETWORK, ["model 'org/suspect'", "Check the path or the network"], model="org/suspect")
    purify(NETWORK, ["data set 'org/data'", "Check the path or the network"], data="org/data")


@pytest.fixture
def hub(monkeypatch) -> Iterator[Callable[[str], None]]:
    """Point the Hub's client at an address of this machine."""

    def point(address: str) -> None:
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)

    huggingface_hub.close_session()
    yield point
    huggingface_hub.close_session()


class NothingHere(BaseHTTPRequestHandler):
    """Answers as the Hub does for a repository that does not exist."""

    def do_GET(self) -> None:
        self.send_response(404)
        self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None:
        pass


def test_an_unknown_model_on_a_hub_that_answers(purify, hub) -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), NothingHere)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        hub(f"http://127.0.0.1:{server.server_port}")
        purify(UNUSABLE, ["no such repository", "Check the name"], model="org/suspect")
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_a_hub_that_cannot_be_reached(purify, hub) -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), NothingHere)  # a port that was free a moment ago, and is closed
    server.server_close()
    hub(f"http://127.0.0.1:{server.server_port}")
    purify(NETWORK, ["model 'org/suspect'", "network"], model="org/suspect")


# the output


def test_an_output_folder_that_exists(refused, world, fast) -> None:
    Path("clean").mkdir()
    for verb in (["purify", world.victim, *fast], ["plant"]):
        refused(
            OUTPUT,
            ["--out clean", "expected a new folder", "Choose another"],
            *verb,
            "--dataset",
            world.data,
            "--out",
            "clean",
        )


def test_an_output_folder_that_cannot_be_made(refused, world, fast) -> None:
    Path("file").write_text("")
    told = ["purify", world.victim, "--dataset", world.data, *fast, "--out"]
    refused(OUTPUT, ["expected a place that can be written"], *told, "file/clean")


@pytest.mark.parametrize("room", [1_000, 8_000, 30_000, 70_000, 120_000])
def test_no_room_for_a_file(purify, room: int) -> None:
    """A limit on file size makes real writes fail at different places: checkpoint, adapter, figures, model."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        purify(OUTPUT, ["expected to write", "Make room"], "--set", "steps=50")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_loss_that_is_not_finite(refused, world, fast) -> None:
    told = ["--dataset", world.data, "--set", "lr=1e30", "--set", "batch_size=8", "--set", "epochs=2", "--out", "clean"]
    phrases = ["expected finite losses", "Lower the learning rate"]
    refused(DIVERGED, phrases, "purify", world.victim, "--defense", "finetune", "--shots", "2", *told)
    refused(DIVERGED, phrases, "plant", "--arch-arg", "width=4", "--arch-arg", "image_size=16", *told)
