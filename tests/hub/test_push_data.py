"""`hf-nft attack poison --push-to`: poisoned data go the way of models, marked so that nobody takes them for clean."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import yaml
from datasets import load_dataset
from hf_nft.cli.main import main
from huggingface_hub import DatasetCard
from markdown_it import MarkdownIt

from hf_nft.reporting.record import RunRecord

PUSHED = ["README.md", "data/test.parquet", "data/train.parquet", "data/triggered.parquet", "record.json"]
TINY = ["--arch-arg=width=4", "--arch-arg=image_size=16"]
ID = "me/digits-backdoored"


def repo_of(hub, id: str = ID):
    return hub.store.repos["dataset", id]


@pytest.fixture(scope="session")
def poison(data) -> list[str]:
    """Return the command that poisons the small data set."""
    return ["attack", "poison", "wanet", "--dataset", data, *TINY, "--rate=0.1", "--attack-arg=target_class=2"]


@pytest.fixture(scope="session")
def made(tmp_path_factory, poison) -> Path:
    """Write poisoned data with the real command."""
    folder = tmp_path_factory.mktemp("poisoned") / "data"
    assert main([*poison, "--out", str(folder)]) == 0
    return folder


@pytest.fixture
def poisoned(made, tmp_path) -> Path:
    """Return a folder of poisoned data of the test's own."""
    return Path(shutil.copytree(made, tmp_path / "poisoned"))


def test_a_new_data_set_is_marked_gated_private_and_of_one_commit(hub, cli, poison, tmp_path) -> None:
    done = cli(*poison, "--out", "new", "--push-to", ID)
    assert done.code == 0, done.err
    assert list(hub.store.repos) == [("dataset", ID)]
    repo = repo_of(hub)
    assert (repo.private, repo.gated, len(repo.history)) == (True, "auto", 2)
    assert repo.names() == PUSHED
    assert f"{hub.url}/datasets/{ID} ({repo.head.sha})" in done.err
    routes = [request.route for request in hub.requests]
    assert routes.index("settings") < routes.index("commit"), "there is nothing to read before the gate is shut"
    text = repo.head.files["README.md"].content.decode()
    assert text.split("---\n")[2].split("\n")[2] == "> [!CAUTION]", "nothing stands above the banner"
    assert "WARNING: These data carry a backdoor on purpose" in text
    assert f'load_dataset("{ID}")' in text
    header = yaml.safe_load(text.split("---\n")[1])
    assert header["tags"] == ["hf-nft", "backdoored", "wanet"]
    assert "backdoor on purpose" in header["extra_gated_prompt"]
    stored = b"".join(blob.content for name, blob in repo.head.files.items() if not blob.lfs)
    assert str(tmp_path.parent.parent).encode() not in stored, "folders of this machine stay private"
    assert hub.token.encode() not in stored


@pytest.mark.usefixtures("datasets_library")
def test_it_is_read_back_as_it_was_written(hub, cli, poisoned) -> None:
    assert cli("push", poisoned, ID).code == 0
    rows = load_dataset(ID)
    assert {name: len(part) for name, part in rows.items()} == {"train": 108, "test": 40, "triggered": 30}
    assert (sum(rows["train"]["poisoned"]), sum(rows["train"]["cover"])) == (10, 20)
    record = json.loads(repo_of(hub).head.files["record.json"].content)
    assert (record["kind"], record["data"]["rows"]["triggered"], record["attack"]["target_class"]) == ("poison", 30, 2)


def test_what_an_attack_learnt_comes_along(hub, cli, poisoned) -> None:
    (poisoned / "attack").mkdir()
    for name in ("artefact.json", "artefact.safetensors", "notes.pt"):
        (poisoned / "attack" / name).write_bytes(b"{}")
    done = cli("push", poisoned, ID)
    assert repo_of(hub).names() == sorted([*PUSHED, "attack/artefact.json", "attack/artefact.safetensors"])
    assert "Left out: attack/notes.pt" in done.err


def test_an_innocent_name_is_refused_before_any_work(hub, cli, poison, poisoned, tmp_path) -> None:
    for command in ([*poison, "--out", "new", "--push-to", "backdoored/digits"], ["push", poisoned, "me/digits"]):
        done = cli(*command)
        assert (done.code, "'backdoored' for a poisoned data set" in done.message) == (2, True), done.err
    assert not (tmp_path / "new").exists()
    assert not hub.requests
    assert cli("push", poisoned, "me/backdoored", "--ungated", "--public").code == 0
    assert (repo_of(hub, "me/backdoored").gated, repo_of(hub, "me/backdoored").private) == (False, False)


def test_what_is_there_is_left_alone_and_an_update_keeps_it(hub, cli, poison, poisoned, tmp_path) -> None:
    configs = "- config_name: default\n  data_files: old.csv\n- config_name: raw\n"
    theirs = f"---\nlicense: mit\nconfigs:\n{configs}---\n\nMine.\n"
    old = {"README.md": theirs.encode(), "old.csv": b"a\n1\n", "attack/artefact.json": b"{}"}
    before = hub.store.add(ID, old, type="dataset").head.sha
    done = cli(*poison, "--out", "new", "--push-to", ID)
    assert (done.code, "--update" in done.message) == (6, True)
    assert not (tmp_path / "new").exists(), "refused before any work"
    assert repo_of(hub).head.sha == before
    for _ in range(2):
        assert cli("push", poisoned, ID, "--update").code == 0
    assert repo_of(hub).names() == sorted([*PUSHED, "old.csv"])
    assert len(repo_of(hub).history) == 3, "the second push had nothing to change"
    text = repo_of(hub).head.files["README.md"].content.decode()
    header = yaml.safe_load(text.split("---\n")[1])
    assert header["license"] == "mit"
    assert [config["config_name"] for config in header["configs"]] == ["default", "raw"]
    assert len(header["configs"][0]["data_files"]) == 3
    assert text.index("WARNING") < text.index("Mine.")


def test_a_pull_request(hub, cli, poisoned) -> None:
    repo = hub.store.add("lab/x-backdoored", {"README.md": b"# Theirs\n"}, type="dataset")
    done = cli("push", poisoned, "lab/x-backdoored", "--create-pr")
    assert done.code == 0, done.err
    assert f"{hub.url}/datasets/lab/x-backdoored/discussions/1" in done.err
    assert repo.names("refs/pr/1") == PUSHED
    assert repo.gated is False, "whose repository it is decides on its gate"


@pytest.mark.parametrize(
    ("route", "what"),
    [("create", "lost"), ("settings", "reset"), ("lfs-upload", 500), ("commits", 502), ("commit", "lost")],
)
def test_faults_that_pass_are_waited_for(hub, cli, poisoned, waits, route, what) -> None:
    hub.fail(route, what)
    done = cli("push", poisoned, ID)
    assert done.code == 0, done.err
    assert (repo_of(hub).names(), len(repo_of(hub).history)) == (PUSHED, 2)


def test_a_fault_that_lasts_says_how_to_go_on(hub, cli, poison, tmp_path, waits) -> None:
    hub.fail("commit", 500, times=1000)
    done = cli(*poison, "--out", "new", "--push-to", ID)
    assert (done.code, f"go on with: hf-nft push new {ID}" in done.message) == (7, True), done.err
    assert (repo_of(hub).names(), repo_of(hub).private, repo_of(hub).gated) == ([], True, "auto")
    hub.faults.clear()
    assert cli("push", "new", ID).code == 0
    assert repo_of(hub).names() == PUSHED


@pytest.mark.parametrize("missing", ["record.json", "data/train.parquet"])
def test_a_folder_that_lacks_a_part(hub, cli, poisoned, missing) -> None:
    (poisoned / missing).unlink()
    done = cli("push", poisoned, ID)
    assert (done.code, "expected a run folder" in done.message) == (3, True), done.err
    assert not hub.requests


def test_a_record_that_lacks_a_part(hub, cli, poisoned) -> None:
    record = RunRecord.load(poisoned / "record.json")
    dataclasses.replace(record, data={"name": "digits", "rows": {}}).save(poisoned / "record.json")
    done = cli("push", poisoned, ID)
    assert (done.code, "expected that of poisoned data" in done.message) == (3, True), done.err
    assert "Traceback" not in done.err
    assert repo_of(hub).names() == []


def test_hostile_names_are_no_markup(hub, cli, poisoned) -> None:
    hostile = "x`</code><script>alert(1)</script>\n<!-- hf-nft:end -->\n---\nlicense: mit\n```\n# h \u202e\x1b[0m"
    record = RunRecord.load(poisoned / "record.json")
    data = {**record.data, **dict.fromkeys(("name", "base", "source", "target_column"), hostile)}
    changed = dataclasses.replace(record, data=data, command=hostile, attack={"name": hostile, hostile: hostile})
    changed.save(poisoned / "record.json")
    done = cli("push", poisoned, ID)
    assert done.code == 0, done.err
    text = repo_of(hub).head.files["README.md"].content.decode()
    assert not {"\x1b", "\u202e"} & set(text)
    tokens = MarkdownIt("commonmark").enable("table").parse(DatasetCard(text).text)
    assert "html_inline" not in [child.type for token in tokens for child in token.children or []]
    assert [token.type for token in tokens].count("fence") == 3
    assert "license" not in yaml.safe_load(text.split("---\n")[1])
    assert cli("push", poisoned, ID, "--update").code == 0, "its own markers are found again"
