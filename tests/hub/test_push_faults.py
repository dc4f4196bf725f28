"""`hf-nft push` where the network or the Hub fails: done after all, or a clear error, and nothing half-written.

Every fault strikes the request it names. A push that goes through made exactly one commit; one that does not left an
empty private repository, or the one that was there as it was, and the same command goes on.
"""

import hashlib
from pathlib import Path

import pytest
from hub_store import Blob

PASSING = [
    ("whoami", 503, {}),
    ("info", 500, {}),
    ("info", "reset", {}),
    ("create", 500, {}),
    ("create", "lost", {}),
    ("commits", 502, {}),
    ("validate", 503, {}),
    ("validate", "reset", {}),
    ("preupload", 500, {}),
    ("preupload", "lost", {}),
    ("lfs-batch", 503, {}),
    ("lfs-upload", 500, {}),
    ("lfs-upload", "reset", {}),
    ("lfs-upload", "lost", {}),
    ("lfs-verify", 504, {}),
    ("commit", 409, {}),
    ("commit", 429, {"retry_after": 0}),
    ("commit", 500, {}),
    ("commit", "reset", {}),
    ("commit", "lost", {}),
    ("commit", "truncate", {}),
]
LASTING = [
    ("create", 403, "may write there"),
    ("preupload", "reset", "a connection that holds"),
    ("lfs-batch", 401, "that the Hub knows"),
    ("lfs-upload", "reset", "a connection that holds"),
    ("lfs-upload", "corrupt", "announced hash"),
    ("commit", 401, "that the Hub knows"),
    ("commit", 403, "may write there"),
    ("commit", 404, "found 404"),
    ("commit", 409, "nobody else"),
    ("commit", 429, "Come back in"),
    ("commit", 500, "found 500"),
    ("commit", "reset", "a connection that holds"),
]


def digest(folder: Path) -> dict[str, str]:
    """Return the content of all files of a folder, to see that nothing changed."""
    files = (file for file in sorted(folder.rglob("*")) if file.is_file())
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def label(value: object) -> str:
    return str(value) if isinstance(value, str | int) else ""


@pytest.mark.parametrize(("route", "what", "options"), PASSING, ids=label)
def test_what_passes_is_waited_for(hub, cli, run_dir, waits, route, what, options) -> None:
    before = digest(run_dir)
    hub.fail(route, what, times=2, **options)
    done = cli("push", run_dir, "me/model")
    assert done.code == 0, done.err
    repo = hub.store.repos["model", "me/model"]
    assert len(repo.history) == 2
    assert {"model.safetensors", "README.md"} <= set(repo.names())
    came_through = route in ("commit", "lfs-upload") and what in ("lost", "truncate")
    assert len(waits) >= (1 if came_through else 2), "what came through is not done again"
    assert digest(run_dir) == before


@pytest.mark.parametrize(("route", "what", "phrase"), LASTING, ids=label)
def test_what_lasts_is_told_and_can_be_gone_on_with(hub, cli, run_dir, waits, route, what, phrase) -> None:
    before = digest(run_dir)
    hub.fail(route, what, times=1000)
    done = cli("push", run_dir, "me/model")
    assert (done.code, phrase in done.message) == (7, True), done.err
    assert "Traceback" not in done.err
    assert len(done.message.splitlines()) == 1
    assert f"hf-nft push {run_dir} me/model" in done.message
    assert hub.token not in done.err
    assert hub.storage not in done.err, "an address of the storage is signed"
    repo = hub.store.repos.get(("model", "me/model"))
    assert repo is None or (repo.names(), repo.private) == ([], True)
    unsure = route == "commit" and what in (500, "reset")
    state = "holds all of it or nothing" if unsure else "is empty" if repo else "Nothing is half-written"
    assert state in done.message
    assert digest(run_dir) == before
    assert len(waits) < 20
    hub.faults.clear()
    kept = len(repo.uploads) if repo else 0
    hub.requests.clear()
    assert cli("push", run_dir, "me/model").code == 0
    repo = hub.store.repos["model", "me/model"]
    assert (len(repo.history), len(repo.names())) == (2, 8)
    assert hub.count("lfs-upload") == 3 - kept, "what had arrived is not sent again"


def test_the_command_to_go_on_with_carries_every_consent(hub, cli, run_dir, waits) -> None:
    """Or what was to be read freely would be gated on the second try."""
    hub.fail("create", 500, times=1000)
    done = cli("push", run_dir, "me/model", "--public", "--ungated")
    assert done.code == 7
    assert f"hf-nft push {run_dir} me/model --public --ungated" in done.message


def test_the_hubs_own_waits_are_kept(hub, cli, run_dir, waits) -> None:
    hub.fail("commit", 429, retry_after=7)
    hub.fail("commit", 503)
    assert cli("push", run_dir, "me/model").code == 0
    assert waits == [7, 2]


def test_a_wait_that_is_too_long_is_told(hub, cli, run_dir, waits) -> None:
    hub.fail("commit", 429, retry_after=3600)
    done = cli("push", run_dir, "me/model")
    assert (done.code, "Come back in 3600 s" in done.message) == (7, True)
    assert waits == []


def test_a_slow_hub_is_waited_for_and_a_silent_one_is_not(hub, cli, run_dir, waits, monkeypatch) -> None:
    hub.fail("commit", "slow")
    assert cli("push", run_dir, "me/model").code == 0
    assert waits == []
    monkeypatch.setattr("hf_nft.hub.TIMEOUT", 0.3)
    hub.fail("commit", "slow", delay=60)
    (run_dir / "figures/masks.png").unlink()
    assert cli("push", run_dir, "me/model", "--update").code == 0
    assert waits == [1]
    assert "figures/masks.png" not in hub.store.repos["model", "me/model"].names()


def test_a_branch_that_moves_during_an_update_keeps_both_changes(hub, cli, run_dir, waits) -> None:
    repo = hub.store.add("me/model", {"README.md": b"# First\n"})
    hub.fail("commit", lambda _: repo.write({"README.md": Blob(b"# Second\n"), "new.txt": Blob(b"x")}, "theirs"))
    assert cli("push", run_dir, "me/model", "--update").code == 0
    assert [commit.title.partition(":")[0] for commit in repo.history[2:]] == ["theirs", "hf-nft purify"]
    assert "new.txt" in repo.names()
    text = repo.head.files["README.md"].content.decode()
    assert "# Second" in text
    assert "# First" not in text


def test_somebody_who_writes_first_into_the_new_repository_is_left_alone(hub, cli, run_dir, waits) -> None:
    hub.fail("commit", lambda hub: hub.store.repos["model", "me/model"].write({"a.txt": Blob(b"a")}, "theirs"))
    done = cli("push", run_dir, "me/model")
    assert (done.code, "found one that holds files" in done.message) == (6, True), done.err
    assert hub.store.repos["model", "me/model"].names() == ["a.txt"]


def test_a_repository_made_meanwhile_by_somebody_else_is_left_alone(hub, cli, run_dir) -> None:
    hub.fail("create", lambda hub: hub.store.add("me/model", {"a.txt": b"a"}))
    assert cli("push", run_dir, "me/model").code == 6
    assert hub.store.repos["model", "me/model"].names() == ["a.txt"]


@pytest.mark.parametrize("what", ["lost", 500, "reset", 429])
def test_a_pull_request_is_opened_once(hub, cli, run_dir, waits, what) -> None:
    repo = hub.store.add("org/suspect", {"README.md": b"# Theirs\n"})
    hub.fail("commit", what)
    done = cli("push", run_dir, "org/suspect", "--create-pr")
    assert done.code == 0, done.err
    assert [pull["num"] for pull in repo.pulls] == [1]
    assert "discussions/1" in done.err
    assert cli("push", run_dir, "org/suspect", "--create-pr").code == 0
    assert len(repo.pulls) == 2, "asked for again, it is opened again"


@pytest.mark.parametrize(("route", "what"), [("resolve", 500), ("resolve", "truncate"), ("resolve", "reset")])
def test_the_card_that_is_there_is_read_whole_or_not_at_all(hub, cli, run_dir, waits, route, what) -> None:
    repo = hub.store.add("me/model", {"README.md": b"# Theirs\n" + b"words\n" * 1000})
    before = repo.head.sha
    hub.fail(route, what)
    assert cli("push", run_dir, "me/model", "--update").code == 0
    assert repo.head.files["README.md"].content.count(b"words\n") == 1000
    hub.fail(route, 500, times=1000)
    done = cli("push", run_dir, "me/model", "--update")
    assert done.code == 7, done.err
    assert (repo.history[-2].sha, len(repo.history)) == (before, 3)


def test_a_hub_that_keeps_no_lists(hub, cli, run_dir, waits) -> None:
    theirs = hub.store.add("org/suspect", {"README.md": b"# Theirs\n"})
    for route in ("commits", "discussions"):
        hub.fail(route, 404, times=1000)
    hub.fail("commit", 503)
    assert cli("push", run_dir, "me/model").code == 0
    assert cli("push", run_dir, "org/suspect", "--create-pr").code == 0
    assert (len(hub.store.repos["model", "me/model"].history), len(theirs.pulls)) == (2, 1)


def test_a_gate_that_cannot_be_shut_keeps_a_planted_model_back(hub, cli, planted_dir) -> None:
    hub.fail("settings", 403)
    done = cli("push", planted_dir, "me/backdoored")
    assert (done.code, "may write there" in done.message) == (7, True)
    assert hub.store.repos["model", "me/backdoored"].names() == []


def test_an_interruption_leaves_nothing_half_written(hub, cli, run_dir) -> None:
    def interrupt(_: object) -> None:
        hub.fail("lfs-verify", "reset", times=1000)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.HfApi.create_commit", lambda *_, **__: interrupt(None))
        assert cli("push", run_dir, "me/model").code == 130
    hub.faults.clear()
    repo = hub.store.repos["model", "me/model"]
    assert (repo.names(), len(repo.uploads)) == ([], 3)
    hub.requests.clear()
    assert cli("push", run_dir, "me/model").code == 0
    assert (len(repo.names()), hub.count("lfs-upload")) == (8, 0)
