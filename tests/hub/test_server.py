"""The local Hub itself: what the real client makes of it, and that its faults are the ones they claim to be."""

from pathlib import Path

import httpx2
import pytest
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    ModelCard,
    hf_hub_download,
    snapshot_download,
)
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

WEIGHTS = bytes(range(256)) * 64
FILES = {"README.md": b"---\nlibrary_name: transformers\ntags:\n- x\n---\n# Mine\n", "model.safetensors": WEIGHTS}


@pytest.fixture
def api(hub) -> HfApi:
    return HfApi()


def add(files: dict[str, bytes]) -> list[CommitOperationAdd]:
    return [CommitOperationAdd(path_in_repo=name, path_or_fileobj=content) for name, content in files.items()]


def test_create_commit_and_download(hub, api) -> None:
    url = api.create_repo("me/model", private=True)
    assert (url.repo_id, hub.store.repos["model", "me/model"].private) == ("me/model", True)
    done = api.create_commit("me/model", add(FILES), commit_message="one", parent_commit=api.model_info("me/model").sha)
    repo = hub.store.repos["model", "me/model"]
    assert [commit.title for commit in repo.history] == ["initial commit", "one"]
    assert repo.names() == sorted(FILES)
    assert (repo.head.files["model.safetensors"].lfs, repo.head.files["README.md"].lfs) == (True, False)
    info = api.model_info("me/model")
    assert (info.sha, info.library_name, info.tags[0]) == (done.oid, "transformers", "x")
    listed = api.model_info("me/model", files_metadata=True).siblings
    assert [file.size for file in listed if file.lfs] == [len(WEIGHTS)]
    folder = Path(snapshot_download("me/model"))
    assert folder.name == done.oid
    assert {name: (folder / name).read_bytes() for name in FILES} == FILES
    assert api.verify_repo_checksums("me/model").mismatches == []
    assert ModelCard.load("me/model").data.tags == ["x"]
    assert {request.token for request in hub.requests if request.storage} == {None}
    api.delete_repo("me/model")
    assert not api.repo_exists("me/model")


def test_unchanged_files_and_stored_objects_are_not_sent_again(hub, api) -> None:
    hub.store.add("me/model", FILES)
    done = api.create_commit("me/model", add(FILES), commit_message="again")
    assert done.oid == hub.store.repos["model", "me/model"].head.sha
    assert (hub.count("commit"), hub.count("lfs-upload")) == (0, 0)
    api.create_commit("me/model", add({"copy.safetensors": WEIGHTS}), commit_message="copy")
    assert (hub.count("commit"), hub.count("lfs-upload")) == (1, 0)


def test_deletion_refs_tree_and_history(hub, api) -> None:
    hub.store.add("me/model", {**FILES, "a/b/c.txt": b"c", "a/d.txt": b"d"})
    assert [entry.path for entry in api.list_repo_tree("me/model", "a")] == ["a/b", "a/d.txt"]
    assert [entry.path for entry in api.get_paths_info("me/model", ["a", "a/d.txt"])] == ["a", "a/d.txt"]
    api.create_commit("me/model", [CommitOperationDelete("a/", is_folder=True)], commit_message="less")
    assert api.list_repo_files("me/model") == [".gitattributes", *sorted(FILES)]
    assert [commit.title for commit in api.list_repo_commits("me/model")] == ["less", "files", "initial commit"]
    assert [branch.name for branch in api.list_repo_refs("me/model").branches] == ["main"]


def test_a_pull_request_leaves_the_branch_alone(hub, api, monkeypatch) -> None:
    repo = hub.store.add("org/model", FILES)
    before = repo.head.sha
    done = api.create_commit("org/model", add({"new.txt": b"new"}), commit_message="Add it", create_pr=True)
    assert (done.pr_num, done.pr_revision) == (1, "refs/pr/1")
    assert repo.head.sha == before
    assert "new.txt" in repo.names("refs/pr/1")
    assert [pull.title for pull in api.get_repo_discussions("org/model")] == ["Add it"]
    assert hf_hub_download("org/model", "new.txt", revision="refs/pr/1").endswith("new.txt")


def test_data_sets_have_places_of_their_own(hub, api) -> None:
    api.create_repo("me/data", repo_type="dataset")
    api.create_commit("me/data", add({"a.parquet": b"p" * 10}), commit_message="rows", repo_type="dataset")
    assert Path(hf_hub_download("me/data", "a.parquet", repo_type="dataset")).read_bytes() == b"p" * 10
    assert not api.repo_exists("me/data")


def test_who_may_do_what(hub, api) -> None:
    hub.store.add("me/private", FILES, private=True)
    hub.store.add("org/gated", FILES, gated="auto")
    tokens = {user.name + "/" + user.role: HfApi(token=token) for token, user in hub.store.users.items()}
    assert api.whoami()["auth"]["accessToken"]["role"] == "write"
    with pytest.raises(HfHubHTTPError, match="rights to create"):
        tokens["me/read"].create_repo("me/new")
    with pytest.raises(HfHubHTTPError, match="rights to create"):
        api.create_repo("org/new")
    tokens["me/read"].model_info("me/private")
    with pytest.raises(HfHubHTTPError, match="permissions"):
        tokens["me/read"].create_commit("me/private", add({"x.txt": b"x"}), commit_message="x")
    for token in (False, "hf_other_0123456789abcdef"):
        with pytest.raises(RepositoryNotFoundError):
            HfApi(token=token).model_info("me/private")
        assert HfApi(token=token).model_info("org/gated").gated == "auto"
        with pytest.raises(GatedRepoError):
            hf_hub_download("org/gated", "README.md", token=token)
    hub.store.repos["model", "org/gated"].granted.add("me")
    assert hf_hub_download("org/gated", "README.md")
    with pytest.raises(HfHubHTTPError, match="Invalid"):
        HfApi(token="hf_unknown").whoami()
    api.update_repo_settings("me/private", gated="manual", private=False)
    repo = hub.store.repos["model", "me/private"]
    assert (repo.gated, repo.private) == ("manual", False)


def test_what_is_not_there(hub, api) -> None:
    hub.store.add("me/model", FILES)
    with pytest.raises(RevisionNotFoundError):
        api.model_info("me/model", revision="nowhere")
    with pytest.raises(RemoteEntryNotFoundError):
        hf_hub_download("me/model", "nothing.txt")
    with pytest.raises(RepositoryNotFoundError):
        snapshot_download("me/nothing")
    with pytest.raises(HfHubHTTPError, match="already created"):
        api.create_repo("me/model")


def test_a_moved_repository_is_found(hub, api) -> None:
    hub.store.add("me/old", FILES)
    api.move_repo("me/old", "lab/new")
    assert api.model_info("me/old").id == "lab/new"
    assert Path(hf_hub_download("me/old", "model.safetensors")).read_bytes() == WEIGHTS
    api.create_commit("me/old", add({"x.txt": b"x"}), commit_message="x")
    assert "x.txt" in hub.store.repos["model", "lab/new"].names()


@pytest.mark.parametrize("header", ["tags: [", "- a", "base_model_relation: child", "model-index:\n- name: x"])
def test_a_bad_header_is_refused_before_anything_is_sent(hub, api, header: str) -> None:
    repo = hub.store.add("me/model")
    before = repo.head.sha
    with pytest.raises(ValueError, match="Invalid metadata"):
        api.create_commit("me/model", add({"README.md": f"---\n{header}\n---\n".encode()}), commit_message="x")
    assert (repo.head.sha, hub.count("preupload")) == (before, 0)


def test_faults_of_answers(hub, api, waits) -> None:
    hub.store.add("me/model", FILES)
    hub.fail("info", 500, times=2, after=1)
    assert api.model_info("me/model").id == "me/model"
    for _ in range(2):
        with pytest.raises(HfHubHTTPError, match="500"):
            api.model_info("me/model")
    assert api.model_info("me/model").id == "me/model"
    hub.fail("preupload", 429, retry_after=7)
    api.create_commit("me/model", add({"x.txt": b"x"}), commit_message="x")
    assert waits == [8]
    hub.fail("info", "reset", times=2)
    for _ in range(2):
        with pytest.raises(httpx2.TransportError):
            api.model_info("me/model")
    hub.fail("info", "slow")
    assert api.model_info("me/model").id == "me/model"


def test_faults_of_uploads(hub, api, waits) -> None:
    repo = hub.store.add("me/model")
    hub.fail("lfs-upload", "reset")
    api.create_commit("me/model", add({"a.safetensors": WEIGHTS}), commit_message="a")
    assert (hub.count("lfs-upload"), repo.head.files["a.safetensors"].content) == (2, WEIGHTS)
    hub.fail("lfs-upload", "corrupt")
    with pytest.raises(RuntimeError, match="Error while uploading 'b"):
        api.create_commit("me/model", add({"b.safetensors": WEIGHTS[::-1]}), commit_message="b")
    assert "b.safetensors" not in repo.names()
    hub.fail("commit", "lost")
    with pytest.raises(httpx2.TransportError):
        api.create_commit("me/model", add({"c.txt": b"c"}), commit_message="c")
    assert "c.txt" in repo.names()
    hub.fail("commit", lambda hub: repo.write({}, "somebody else's"))
    with pytest.raises(HfHubHTTPError, match="412"):
        api.create_commit("me/model", add({"d.txt": b"d"}), commit_message="d", parent_commit=repo.head.sha)


def test_faults_of_downloads(hub, api, waits) -> None:
    hub.store.add("me/model", FILES)
    hub.fail("storage", "truncate", times=2)
    path = Path(hf_hub_download("me/model", "model.safetensors"))
    assert path.read_bytes() == WEIGHTS
    hub.fail("storage", "corrupt")
    path = Path(hf_hub_download("me/model", "model.safetensors", force_download=True))
    assert len(path.read_bytes()) == len(WEIGHTS)
    assert api.verify_repo_checksums("me/model").mismatches[0]["path"] == "model.safetensors"


def test_a_child_process_finds_it(hub, child) -> None:
    hub.store.add("me/private", FILES, private=True)
    code = "import huggingface_hub as h; print(h.snapshot_download('me/private'))"
    assert child(code, **hub.environment).startswith(hub.environment["HF_HOME"])
