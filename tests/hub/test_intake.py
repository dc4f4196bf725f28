"""Models from a Hub that fails and lies: the revision is pinned first, and what arrives is what was listed."""

import json
import struct
from pathlib import Path

import huggingface_hub.constants
import numpy as np
import pytest
import torch
from huggingface_hub.utils import close_session
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from hf_nft.errors import HFNFTError, NetworkError, SuspectError, UnsafeModelError
from hf_nft.intake import locate
from hf_nft.suspect import load_suspect
from hf_nft.workflows import InspectJob

OTHER, READER = "hf_other_0123456789abcdef", "hf_read_0123456789abcdef"


def content(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def add(hub, folder: Path, id: str = "org/model", **settings: object):
    """Publish a folder, and start from a client that has asked for nothing yet."""
    repo = hub.store.add(id, content(folder), **settings)
    hub.requests.clear()
    return repo


def overwrite(repo, **files: bytes) -> str:
    """Commit other content; returns the new commit."""
    blob = type(next(iter(repo.head.files.values())))
    named = {name.replace("__", "."): data for name, data in files.items()}
    return repo.write({n: blob(c, n.endswith(".safetensors")) for n, c in named.items()}, "other").sha


def cached(hub) -> list[str]:
    return sorted(file.name for file in Path(hub.environment["HF_HOME"]).rglob("*") if file.is_file())


def zeros(folder: Path) -> bytes:
    weights = load_file(folder / "model.safetensors")
    file = folder.parent / "zeros.safetensors"
    save_file({name: torch.zeros_like(tensor) for name, tensor in weights.items()}, file, metadata={"format": "pt"})
    return file.read_bytes()


def same(model: torch.nn.Module, folder: Path) -> bool:
    weights, found = load_file(folder / "model.safetensors"), model.state_dict()
    return all(torch.equal(found[name], weights[name]) for name in weights)


# revisions


def test_the_commit_is_resolved_first_and_recorded(hub, suspect_folder: Path) -> None:
    repo = add(hub, suspect_folder)
    suspect = load_suspect("org/model")
    assert suspect.is_hub_id
    assert suspect.provenance()["name"] == "org/model"
    assert suspect.revision == suspect.provenance()["revision"] == repo.head.sha
    assert same(suspect.model, suspect_folder)
    paths = [request.path for request in hub.requests if request.route not in ("agent", "storage")]
    assert paths[0].split("?")[0] == "/api/models/org/model"
    assert len(paths) > 4
    assert all(repo.head.sha in path for path in paths[1:])


@pytest.mark.parametrize("how", ["@v1", "--revision", "@commit", "@refs/pr/1"])
def test_a_named_revision(hub, suspect_folder: Path, how: str) -> None:
    repo = add(hub, suspect_folder)
    first = repo.head.sha
    repo.refs |= {"refs/tags/v1": first, "refs/pr/1": first}
    overwrite(repo, model__safetensors=zeros(suspect_folder))
    names = {"@commit": f"org/model@{first}", "--revision": "org/model"}
    suspect = load_suspect(names.get(how, f"org/model{how}"), revision="v1" if how == "--revision" else None)
    assert suspect.revision == first
    assert suspect.name == "org/model"
    assert same(suspect.model, suspect_folder)


@pytest.mark.parametrize("route", ["tree", "resolve", "storage"])
def test_a_branch_that_moves_meanwhile(hub, suspect_folder: Path, route: str) -> None:
    repo = add(hub, suspect_folder)
    first, bad = repo.head.sha, zeros(suspect_folder)
    hub.fail(route, lambda server: overwrite(repo, model__safetensors=bad))
    suspect = load_suspect("org/model")
    assert repo.head.sha != first
    assert suspect.revision == first
    assert same(suspect.model, suspect_folder)


def test_a_commit_that_vanishes_meanwhile(hub, suspect_folder: Path) -> None:
    repo = add(hub, suspect_folder)

    def force_push(server: object) -> None:
        repo.commits.pop(repo.refs["refs/heads/main"])
        repo.refs["refs/heads/main"] = next(iter(repo.commits))

    hub.fail("tree", force_push)
    with pytest.raises(SuspectError, match=r"model 'org/model': expected a revision that exists"):
        load_suspect("org/model")


def test_what_was_downloaded_serves_without_a_network(hub, suspect_folder: Path, monkeypatch) -> None:
    repo = add(hub, suspect_folder)
    repo.refs["refs/pr/1"] = repo.head.sha
    load_suspect("org/model")
    load_suspect("org/model@refs/pr/1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    close_session()
    hub.requests.clear()
    for name in ("org/model", "org/model@refs/pr/1", f"org/model@{repo.head.sha}"):
        suspect = load_suspect(name)
        assert suspect.revision == repo.head.sha
        assert same(suspect.model, suspect_folder)
    assert hub.requests == []
    with pytest.raises(NetworkError):
        load_suspect("org/model@v2")
    with pytest.raises(NetworkError):
        load_suspect("org/another")


# who may read


@pytest.mark.parametrize(
    ("settings", "token", "error", "text"),
    [
        ({"private": True}, OTHER, SuspectError, "no such repository there.*hf auth login"),
        ({"private": True}, None, SuspectError, "no such repository there.*hf auth login"),
        ({"gated": "manual"}, OTHER, NetworkError, "gated. Ask for access on its page.*hf auth login"),
        ({"gated": "manual"}, None, NetworkError, "gated"),
        ({}, "hf_no_such_token", HFNFTError, "hf auth login"),
    ],
    ids=["private, other user", "private, no user", "gated, other user", "gated, no user", "unknown token"],
)
def test_no_access(hub, suspect_folder: Path, monkeypatch, settings, token, error, text: str) -> None:
    add(hub, suspect_folder, **settings)
    monkeypatch.setenv("HF_TOKEN", token) if token else monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(error, match=text) as found:
        load_suspect("org/model")
    assert str(token) not in str(found.value)


@pytest.mark.parametrize("settings", [{"private": True}, {"gated": "manual", "granted": {"me"}}], ids=str)
def test_the_users_token_opens(hub, suspect_folder: Path, monkeypatch, settings) -> None:
    add(hub, suspect_folder, "lab/model", **settings)
    monkeypatch.setenv("HF_TOKEN", READER)
    assert same(load_suspect("lab/model").model, suspect_folder)
    assert {request.token for request in hub.requests if request.storage} == {None}


@pytest.mark.parametrize(
    ("route", "status", "code", "error", "text"),
    [
        ("info", 401, None, HFNFTError, "hf auth login"),
        ("info", 403, None, NetworkError, r"a token that may read it.*refused \(403\)"),
        ("info", 404, "RevisionNotFound", SuspectError, "expected a revision that exists"),
        ("info", 404, "RepoNotFound", SuspectError, "no such repository"),
        ("info", 429, None, NetworkError, r"refused \(429\).*later"),
        ("info", 500, None, NetworkError, r"refused \(500\).*later"),
        ("resolve", 403, None, NetworkError, "model 'org/model'"),
        ("resolve", 404, "EntryNotFound", HFNFTError, "model 'org/model'"),
    ],
)
def test_answers_that_refuse(hub, suspect_folder: Path, waits, route, status, code, error, text: str) -> None:
    add(hub, suspect_folder)
    hub.fail(route, status, times=99, **({"code": code} if code else {}))
    with pytest.raises(error, match=text):
        load_suspect("org/model")


@pytest.mark.parametrize("name", ["org/model@no-such-branch", "org/nothing"])
def test_names_that_do_not_exist(hub, suspect_folder: Path, name: str) -> None:
    add(hub, suspect_folder)
    with pytest.raises(SuspectError):
        load_suspect(name)


# downloads


@pytest.mark.parametrize("what", ["reset", "truncate", 503, 429])
@pytest.mark.parametrize("route", ["resolve", "storage"])
def test_a_download_that_stumbles_goes_on(hub, suspect_folder: Path, waits, what, route: str) -> None:
    add(hub, suspect_folder)
    hub.fail(route, what, times=2, after=1 if route == "resolve" else 0)
    assert same(load_suspect("org/model").model, suspect_folder)


@pytest.mark.parametrize("what", ["truncate", 500])
def test_a_download_that_never_ends_well(hub, suspect_folder: Path, waits, what) -> None:
    add(hub, suspect_folder)
    hub.fail("storage", what, times=99)
    with pytest.raises(NetworkError, match="model 'org/model'"):
        load_suspect("org/model")
    assert "model.safetensors" not in cached(hub)
    hub.faults.clear()
    assert same(load_suspect("org/model").model, suspect_folder)  # what is left of the first try does no harm


def test_other_bytes_than_listed(hub, suspect_folder: Path) -> None:
    add(hub, suspect_folder)
    hub.fail("storage", "corrupt", times=99)
    with pytest.raises(NetworkError, match=r"model\.safetensors: expected what the Hub lists.*Delete .* and try again"):
        load_suspect("org/model")


# what a listing alone gives away


@pytest.mark.parametrize("name", ["../evil.json", "a/../../evil.txt", "/tmp/evil.json", "sub\\evil.json"])
def test_a_file_name_that_leads_elsewhere(hub, suspect_folder: Path, name: str) -> None:
    hub.store.add("org/model", {**content(suspect_folder), name: b"{}"})
    with pytest.raises(UnsafeModelError, match="expected file names inside the repository"):
        load_suspect("org/model")
    assert hub.count("resolve") == hub.count("storage") == 0


def test_an_empty_repository(hub) -> None:
    hub.store.add("org/model")
    with pytest.raises(SuspectError, match="empty repository"):
        load_suspect("org/model")


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"config.json": None}, SuspectError),
        ({"config.json": b'{"model_type": "bert", "architectures": ["BertForMaskedLM"]}'}, SuspectError),
        ({"config.json": b"{"}, SuspectError),
        ({"config.json": b'{"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil"}}'}, UnsafeModelError),
        ({"model.safetensors": None, "pytorch_model.bin": b"pickle"}, UnsafeModelError),
        ({"model.safetensors": None}, SuspectError),
    ],
    ids=["no config", "other task", "broken config", "remote code", "pickle", "no weights"],
)
def test_refused_before_weights_are_fetched(hub, suspect_folder: Path, change, error: type[Exception]) -> None:
    files = {name: data for name, data in (content(suspect_folder) | change).items() if data is not None}
    hub.store.add("org/model", files)
    with pytest.raises(error):
        load_suspect("org/model")
    assert not {"model.safetensors", "pytorch_model.bin"} & set(cached(hub))
    assert hub.count("storage") == 0


# code


CODE = """
from pathlib import Path
import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutput
Path({!r}).touch()

class OddConfig(PretrainedConfig):
    model_type = "odd_one"
    width: int = 3

class OddForImageClassification(PreTrainedModel):
    config_class, main_input_name = OddConfig, "pixel_values"
    def __init__(self, config):
        super().__init__(config)
        self.conv, self.norm = torch.nn.Conv2d(3, config.width, 3), torch.nn.BatchNorm2d(config.width)
        self.classifier = torch.nn.Linear(config.width, config.num_labels)
        self.post_init()
    def forward(self, pixel_values, labels=None, **kwargs):
        hidden = self.norm(self.conv(pixel_values)).relu().mean((2, 3))
        return ImageClassifierOutput(logits=self.classifier(hidden))
"""


def with_code(folder: Path, ran: Path, code: str = "odd") -> dict[str, bytes]:
    weights = {"conv.weight": torch.ones(3, 3, 3, 3), "conv.bias": torch.zeros(3)}
    weights |= {f"norm.{name}": torch.ones(3) for name in ("weight", "bias", "running_mean", "running_var")}
    weights |= {"norm.num_batches_tracked": torch.tensor(1)}
    weights |= {"classifier.weight": torch.ones(2, 3), "classifier.bias": torch.zeros(2)}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = {
        "model_type": "odd_one",
        "architectures": ["OddForImageClassification"],
        "auto_map": {
            "AutoConfig": f"{code}.OddConfig",
            "AutoModelForImageClassification": f"{code}.OddForImageClassification",
        },
    }
    return {
        **content(folder),
        "config.json": json.dumps(config).encode(),
        "odd.py": CODE.format(str(ran)).encode(),
    }


def test_trusted_code_is_that_of_the_commit(hub, suspect_folder: Path, tmp_path: Path) -> None:
    repo = hub.store.add("org/model", with_code(suspect_folder, tmp_path / "first"))
    first = repo.head.sha
    with pytest.raises(UnsafeModelError, match="--trust-remote-code"):
        load_suspect("org/model")
    assert "odd.py" not in cached(hub)
    overwrite(repo, odd__py=CODE.format(str(tmp_path / "second")).encode())
    suspect = load_suspect(f"org/model@{first}", trust_remote_code=True)
    assert type(suspect.model).__name__ == "OddForImageClassification"
    assert (tmp_path / "first").exists()
    assert not (tmp_path / "second").exists()


def test_code_of_another_repository_is_never_run(hub, suspect_folder: Path, tmp_path: Path) -> None:
    files = with_code(suspect_folder, tmp_path / "ran")
    hub.store.add("org/code", files)
    hub.store.add("org/model", with_code(suspect_folder, tmp_path / "ran", "org/code--odd"))
    with pytest.raises(UnsafeModelError, match=r"pinned to this commit, found 'org/code--odd"):
        load_suspect("org/model", trust_remote_code=True)
    assert not (tmp_path / "ran").exists()


# adapters


@pytest.fixture
def lora(suspect_folder: Path, image_model, tmp_path: Path) -> Path:
    torch.manual_seed(3)
    model = get_peft_model(image_model, LoraConfig(r=2, target_modules=["classifier"]))
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter)
    model.save_pretrained(tmp_path / "lora")
    file = tmp_path / "lora" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": "org/base"}))
    return tmp_path / "lora"


def test_an_adapter_and_its_base_are_both_pinned(hub, suspect_folder: Path, lora: Path) -> None:
    base = add(hub, suspect_folder, "org/base")
    first = base.head.sha
    overwrite(base, model__safetensors=zeros(suspect_folder))
    config = json.loads((lora / "adapter_config.json").read_text())
    (lora / "adapter_config.json").write_text(json.dumps({**config, "revision": first}))
    adapter = add(hub, lora, "org/lora")
    suspect = load_suspect("org/lora")
    known = suspect.provenance()
    assert (known["name"], known["revision"]) == ("org/lora", adapter.head.sha)
    assert known["base"] == {"name": "org/base", "revision": first}
    later = [request.path for request in hub.requests if request.route in ("tree", "resolve", "paths-info")]
    assert all(first in path or adapter.head.sha in path for path in later)
    weights, found = load_file(lora / "adapter_model.safetensors"), suspect.model.state_dict()
    a, b = (next(value for name, value in weights.items() if part in name) for part in ("lora_A", "lora_B"))
    scale = config["lora_alpha"] / config["r"]
    plain = load_file(suspect_folder / "model.safetensors")["classifier.weight"]
    np.testing.assert_allclose(found["classifier.weight"], plain + scale * b @ a, rtol=1e-6)
    shown = InspectJob(model="org/lora").run()
    assert (shown.base, shown.refused) == (known["base"], [])


def test_an_adapter_of_a_stranger_chooses_no_folder_here(hub, suspect_folder: Path, lora: Path) -> None:
    config = json.loads((lora / "adapter_config.json").read_text())
    named = {**config, "base_model_name_or_path": str(suspect_folder)}
    (lora / "adapter_config.json").write_text(json.dumps(named))
    add(hub, lora, "org/lora")
    with pytest.raises(SuspectError, match="expected a folder or a Hub id"):
        load_suspect("org/lora")


# inspect


def test_inspect_downloads_no_weights(hub, suspect_folder: Path, image_model) -> None:
    repo = add(hub, suspect_folder)
    overwrite(repo, README__md=b"---\ndatasets:\n- org/data\n---\n")
    found = InspectJob(model="org/model").run()
    assert (found.revision, found.dataset, found.refused, found.notes) == (repo.head.sha, "org/data", [], [])
    assert found.parameters == sum(parameter.numel() for parameter in image_model.parameters())
    assert sum(found.stored.values()) == sum(tensor.numel() for tensor in image_model.state_dict().values())
    assert found.size == sum(len(blob.content) for blob in repo.head.files.values())
    assert found.task == "image_classification"
    assert "model.safetensors" not in cached(hub)


def test_a_header_that_lies_on_the_hub(hub, suspect_folder: Path) -> None:
    whole = (suspect_folder / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", whole[:8])
    header = json.loads(whole[8 : 8 + length])
    name = next(name for name in header if name.endswith("classifier.weight"))
    for lie in (
        {"shape": [10**6, 10**6]},
        {"dtype": "F16"},
        {"data_offsets": [0, 10**12]},
        {"shape": [-1]},
        {"shape": "many"},
    ):
        text = json.dumps({**header, name: {**header[name], **lie}}).encode()
        (suspect_folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + whole[8 + length :])
        add(hub, suspect_folder)
        (told,) = InspectJob(model="org/model").run().refused
        assert told.startswith("org/model/model.safetensors: expected a safetensors file with a true header"), lie
        with pytest.raises(SuspectError, match=r"model\.safetensors: expected a safetensors file"):
            load_suspect("org/model")
    for content in (struct.pack("<Q", 2**62) + b"{}", b"", b"abc", struct.pack("<Q", 2) + b"[]"):
        (suspect_folder / "model.safetensors").write_bytes(content)
        add(hub, suspect_folder)
        assert len(InspectJob(model="org/model").run().refused) == 1


def test_a_mirror_that_lists_names_alone(hub, suspect_folder: Path, monkeypatch) -> None:
    repo = add(hub, suspect_folder)
    monkeypatch.setattr("hub_routes.sibling", lambda name, blob, details: {"rfilename": name})
    source = locate("org/model")
    assert source.files == {name: len(blob.content) for name, blob in repo.head.files.items()}
    assert same(load_suspect("org/model").model, suspect_folder)
    hub.fail("storage", "corrupt", times=99)
    overwrite(repo, model__safetensors=zeros(suspect_folder))
    with pytest.raises(NetworkError, match="expected what the Hub lists"):
        load_suspect("org/model")


def test_nothing_is_loaded_by_looking(hub, suspect_folder: Path) -> None:
    add(hub, suspect_folder)
    source = locate("org/model")
    assert (source.folder, hub.count("resolve")) == (None, 0)
    assert set(source.files) - {".gitattributes"} == {file.name for file in suspect_folder.iterdir()}
