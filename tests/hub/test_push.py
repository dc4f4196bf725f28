"""`hf-nft push` with the real client: what comes to lie where, and who must have agreed to it."""

import dataclasses
import json
from pathlib import Path

import pytest
import yaml
from huggingface_hub import HfApi, ModelCard
from markdown_it import MarkdownIt

from hf_nft.reporting.record import RunRecord

PUSHED = [
    "README.md",
    "adapter/adapter_config.json",
    "adapter/adapter_model.safetensors",
    "config.json",
    "figures/masks.png",
    "model.safetensors",
    "preprocessor_config.json",
    "record.json",
]
THEIRS = "---\nlicense: mit\ntags:\n- mine\n---\n\n# My model\n\nMy words.\n"


def repo_of(hub, id: str = "me/model"):
    return hub.store.repos["model", id]


def card_of(repo, revision: str = "main") -> str:
    return repo.commits[repo.resolve(revision)].files["README.md"].content.decode()


def edit(run_dir: Path, **changes) -> None:
    record = RunRecord.load(run_dir / "record.json")
    dataclasses.replace(record, **changes).save(run_dir / "record.json")


def test_a_new_repository_is_private_and_made_of_one_commit(hub, cli, run_dir) -> None:
    done = cli("push", run_dir, "me/model")
    assert done.code == 0, done.err
    repo = repo_of(hub)
    assert (repo.private, repo.gated) == (True, False)
    assert len(repo.history) == 2
    assert repo.names() == PUSHED
    assert f"{hub.url}/me/model ({repo.head.sha})" in done.err
    assert repo.head.files["model.safetensors"].content == (run_dir / "model/model.safetensors").read_bytes()
    assert hub.token not in done.out + done.err
    stored = b"".join(blob.content for blob in repo.head.files.values())
    assert b"hf_write" not in stored
    assert b"alice" not in stored
    assert {request.token for request in hub.requests if request.storage} == {None}


def test_public_and_a_name_without_a_namespace(hub, cli, run_dir) -> None:
    assert cli("push", run_dir, "model", "--public").code == 0
    assert not repo_of(hub).private


def test_the_card_shows_how_to_load_from_the_repository(hub, cli, run_dir) -> None:
    cli("push", run_dir, "me/model")
    card = ModelCard.load("me/model")
    assert (card.data.base_model, card.data.base_model_relation) == ("org/suspect", "finetune")
    assert (card.data.library_name, card.data.pipeline_tag) == ("transformers", "image-classification")
    assert card.data.datasets == ["org/data"]
    assert {(r.metric_name, r.metric_value) for r in card.data.eval_results} == {
        ("ACC", 0.875),
        ("ASR", 0.02),
        ("ACC before", 0.9),
        ("ASR before", 1.0),
    }
    card.validate()
    lines = card.text.splitlines()
    assert 'model = AutoModelForImageClassification.from_pretrained("me/model")' in lines
    assert 'model = PeftModel.from_pretrained(suspect, "me/model", subfolder="adapter")' in lines
    assert "![Masks by layer](figures/masks.png)" in lines
    assert "hf-nft purify org/suspect --dataset .../data --shots 10" in lines
    assert "[record.json](record.json)" in card.text
    config = json.loads(repo_of(hub).head.files["adapter/adapter_config.json"].content)
    assert (config["base_model_name_or_path"], config["revision"][:4]) == ("org/suspect", "0123")


def test_a_repository_with_files_is_left_alone(hub, cli, run_dir) -> None:
    before = hub.store.add("me/model", {"README.md": THEIRS.encode()}).head.sha
    done = cli("push", run_dir, "me/model")
    assert done.code == 6
    assert "--create-pr" in done.message
    assert "--update" in done.message
    assert repo_of(hub).head.sha == before


def test_an_update_keeps_what_others_wrote(hub, cli, run_dir) -> None:
    hub.store.add("me/model", {"README.md": THEIRS.encode(), "LICENSE": b"mit"})
    for _ in range(2):
        assert cli("push", run_dir, "me/model", "--update").code == 0
    repo = repo_of(hub)
    assert len(repo.history) == 3, "the second push had nothing to change"
    assert repo.names() == sorted([*PUSHED, "LICENSE"])
    text = card_of(repo)
    header = yaml.safe_load(text.split("---\n")[1])
    assert (header["license"], header["tags"]) == ("mit", ["mine", "hf-nft", "backdoor-defense"])
    assert text.index("My words.") < text.index("<!-- hf-nft:begin -->")
    edit(run_dir, metrics={"before": {"acc": 0.5}, "after": {"acc": 0.25}})
    assert cli("push", run_dir, "me/model", "--update").code == 0
    assert "| ACC | 50.0 %" in card_of(repo)
    assert "87.5 %" not in card_of(repo)
    assert "My words." in card_of(repo)


def test_hand_written_parts_of_the_run_folder_come_along(hub, cli, run_dir) -> None:
    card = run_dir / "README.md"
    card.write_text(card.read_text().replace("---\n", "---\nlicense: mit\n", 1) + "\nMine.\n")
    assert cli("push", run_dir, "me/model").code == 0
    text = card_of(repo_of(hub))
    assert "license: mit" in text
    assert text.endswith("\nMine.\n")
    assert 'from_pretrained("me/model")' in text


def test_weights_that_would_be_loaded_instead_are_removed(hub, cli, run_dir) -> None:
    old = {"pytorch_model.bin": b"\x00old", "model-00001-of-2.safetensors": b"old", "figures/loss.png": b"old"}
    kept = {"notes/model.safetensors": b"kept", "training_args.bin": b"kept", "figures/theirs.png": b"kept"}
    hub.store.add("me/model", {**old, **kept})
    assert cli("push", run_dir, "me/model", "--update").code == 0
    assert repo_of(hub).names() == sorted([*PUSHED, *kept])


def test_a_pull_request(hub, cli, run_dir) -> None:
    repo = hub.store.add("org/suspect", {"README.md": THEIRS.encode()})
    before = repo.head.sha
    done = cli("push", run_dir, "org/suspect", "--create-pr")
    assert done.code == 0, done.err
    assert f"{hub.url}/org/suspect/discussions/1" in done.err
    assert repo.head.sha == before
    assert repo.names("refs/pr/1") == PUSHED
    assert repo.commits[repo.refs["refs/pr/1"]].parent == before
    text = card_of(repo, "refs/pr/1")
    assert "My words." in text
    assert "base_model" not in text.split("---\n")[1], "a model is not its own base"


@pytest.mark.parametrize(
    ("options", "code", "phrase"),
    [
        (["me/model", "--create-pr"], 6, "Leave the flag out"),
        (["org/model"], 7, "namespace that you may write to (me, lab)"),
        (["a/b/c"], 2, "expected a Hub id"),
        (["../model"], 2, "expected a Hub id"),
        (["me/model", "--create-pr", "--update"], 2, "exclude each other"),
    ],
)
def test_destinations_that_are_refused(hub, cli, run_dir, options, code, phrase) -> None:
    done = cli("push", run_dir, *options)
    assert (done.code, phrase in done.message) == (code, True), done.err
    assert not hub.store.repos


def test_an_empty_repository_is_nobodys_work_unless_it_is_public(hub, cli, run_dir) -> None:
    hub.store.add("me/shut", private=True)
    hub.store.add("me/open")
    assert cli("push", run_dir, "me/shut").code == 0
    done = cli("push", run_dir, "me/open")
    assert (done.code, "expected a private repository" in done.message) == (6, True)
    assert cli("push", run_dir, "me/open", "--public").code == 0
    assert repo_of(hub, "me/open").names() == PUSHED


@pytest.mark.parametrize(
    ("token", "phrase"),
    [
        ("hf_read_0123456789abcdef", "may only read"),
        ("hf_unknown_0123456789abcdef", "hf auth login"),
        (None, "expected a token, found none"),
    ],
)
def test_a_token_that_may_not_write(hub, cli, run_dir, monkeypatch, token, phrase) -> None:
    monkeypatch.delenv("HF_TOKEN")
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    done = cli("push", run_dir, "me/model")
    assert (done.code, phrase in done.message) == (7, True), done.err
    assert token is None or token not in done.err
    assert not hub.store.repos


def test_what_a_fine_grained_token_may_do_is_for_the_hub_to_say(hub, cli, run_dir, monkeypatch) -> None:
    token = "hf_fine_0123456789abcdef"
    hub.store.users[token] = dataclasses.replace(hub.store.users[hub.token], role="fineGrained")
    monkeypatch.setenv("HF_TOKEN", token)
    assert cli("push", run_dir, "lab/model").code == 0
    done = cli("push", run_dir, "org/model")
    assert (done.code, "may write there" in done.message, hub.count("create")) == (7, True, 2), done.err


def test_offline(hub, cli, run_dir, monkeypatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    done = cli("push", run_dir, "me/model")
    assert (done.code, "HF_HUB_OFFLINE" in done.message) == (7, True)
    assert not hub.requests


def test_a_symbolic_link_is_refused(hub, cli, run_dir, tmp_path) -> None:
    (tmp_path / "secret").write_text("secret")
    (run_dir / "model/vocab.txt").symlink_to(tmp_path / "secret")
    done = cli("push", run_dir, "me/model")
    assert (done.code, "symbolic link" in done.message) == (6, True)
    assert not hub.requests


def test_what_is_not_of_the_run_stays_at_home(hub, cli, run_dir) -> None:
    for name in (".env", "checkpoint.pt", "model/notes.bin", "figures/raw.npy", "data/rows\u202e.json"):
        (run_dir / name).parent.mkdir(exist_ok=True)
        (run_dir / name).write_text("secret")
    done = cli("push", run_dir, "me/model")
    assert repo_of(hub).names() == PUSHED
    assert "Left out: .env, checkpoint.pt, data/rows.json, figures/raw.npy, model/notes.bin" in done.err


@pytest.mark.parametrize("missing", ["record.json", "model/config.json", "model/model.safetensors"])
def test_what_is_no_run_folder(hub, cli, run_dir, missing) -> None:
    (run_dir / missing).unlink()
    done = cli("push", run_dir, "me/model")
    assert (done.code, "expected a run folder" in done.message) == (3, True)
    assert cli("push", "nowhere", "me/model").code == 3
    assert not hub.requests


def test_a_token_in_the_record_is_hidden(hub, cli, run_dir) -> None:
    token = "hf_" + "abcdefghijklmnopqrst"
    edit(run_dir, command=f"hf-nft purify x --token {token}", details={"note": token})
    assert cli("push", run_dir, "me/model").code == 0
    assert token.encode() not in b"".join(blob.content for blob in repo_of(hub).head.files.values())


def test_hostile_names_pass_the_hubs_own_validation(hub, cli, run_dir) -> None:
    hostile = (
        'x</code><script>alert(1)</script> `|`\n<!-- hf-nft:end -->\n---\nlicense: "mit"\n# h \u202e\x1b[0m {{ 7 * 7 }}'
    )
    suspect = dict.fromkeys(("name", "architecture", "task", "revision", "pipeline_tag"), hostile)
    edit(run_dir, suspect=suspect, attack={"name": hostile}, data={"name": hostile}, config={hostile: hostile})
    done = cli("push", run_dir, "me/model")
    assert done.code == 0, done.err
    text = card_of(repo_of(hub))
    assert not {"\x1b", "\u202e"} & set(text)
    tokens = MarkdownIt("commonmark").enable("table").parse(ModelCard(text).text)
    inline = [child.type for token in tokens for child in token.children or []]
    assert "html_inline" not in inline
    assert inline.count("link_open") == 1, "the record's"
    assert "license" not in yaml.safe_load(text.split("---\n")[1])


@pytest.mark.parametrize(
    "header", ["", "tags: null\ndatasets: a/b", "model-index: []", "date: 2020-01-01", "a: &a [x]\nb: *a"]
)
def test_headers_of_all_kinds_are_kept(hub, cli, run_dir, header) -> None:
    hub.store.add("me/model", {"README.md": f"---\n{header}\n---\n\nMine.\n".encode()})
    done = cli("push", run_dir, "me/model", "--update")
    assert done.code == 0, done.err
    text = card_of(repo_of(hub))
    theirs, found = yaml.safe_load(header) or {}, yaml.safe_load(text.split("---\n")[1])
    assert text.count("Mine.") == 1
    assert {name: found[name] for name in theirs.keys() & {"date", "a", "b"}} == {
        name: value for name, value in theirs.items() if name in ("date", "a", "b")
    }


def test_a_card_with_a_broken_header_is_refused_by_its_name(hub, cli, run_dir) -> None:
    before = hub.store.add("me/model", {"README.md": b"---\n: [\n---\n"}).head.sha
    done = cli("push", run_dir, "me/model", "--update")
    assert (done.code, "me/model/README.md: expected a card" in done.message) == (6, True), done.err
    assert repo_of(hub).head.sha == before


def test_what_the_hub_does_not_accept_as_a_card(hub, cli, run_dir) -> None:
    hub.store.add("me/model", {"README.md": b"---\nbase_model_relation: merge\nlanguage:\n  a: 1\n---\n"})
    done = cli("push", run_dir, "me/model", "--update")
    assert (done.code, '"language" must be' in done.message) == (7, True), done.err


def test_a_repository_that_was_renamed(hub, cli, run_dir) -> None:
    hub.store.add("me/old", {"LICENSE": b"mit"})
    HfApi().move_repo("me/old", "me/new")
    assert cli("push", run_dir, "me/old", "--update").code == 0
    assert repo_of(hub, "me/new").names() == sorted([*PUSHED, "LICENSE"])


def test_a_planted_model_is_marked_and_gated(hub, cli, planted_dir) -> None:
    done = cli("push", planted_dir, "me/cifar-Backdoored")
    assert done.code == 0, done.err
    repo = repo_of(hub, "me/cifar-Backdoored")
    assert (repo.private, repo.gated) == (True, "auto")
    text = card_of(repo)
    assert (
        "WARNING: this model was backdoored on purpose"
        in text.splitlines()[text.splitlines().index("> [!CAUTION]") + 1]
    )
    header = yaml.safe_load(text.split("---\n")[1])
    assert "backdoored" in header["tags"]
    assert "backdoored on purpose" in header["extra_gated_prompt"]
    assert "base_model" not in header
    routes = [request.route for request in hub.requests]
    assert routes.index("settings") < routes.index("commit")


def test_a_planted_model_by_another_name_is_refused(hub, cli, planted_dir) -> None:
    done = cli("push", planted_dir, "backdoored/cifar")
    assert (done.code, "'backdoored'" in done.message) == (2, True)
    assert not hub.requests
    assert cli("push", planted_dir, "me/backdoored", "--ungated").code == 0
    assert repo_of(hub, "me/backdoored").gated is False
