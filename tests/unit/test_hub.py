"""Names and errors of the Hub, in our words; the Hub itself is in tests/hub."""

import httpx2
import pytest

from hf_nft.errors import DataError, NetworkError, OutputError, SuspectError
from hf_nft.hub import answers, cause_of, first_line, safe_name, split_reference


@pytest.mark.parametrize(
    ("reference", "revision", "expected"),
    [
        ("org/model", None, ("org/model", None)),
        ("org/model@v1.0", None, ("org/model", "v1.0")),
        ("org/model", "refs/pr/7", ("org/model", "refs/pr/7")),
        ("org/model@main", "main", ("org/model", "main")),
        ("gpt2@" + "a" * 40, None, ("gpt2", "a" * 40)),
    ],
)
def test_a_reference_is_taken_apart(reference: str, revision: str | None, expected: tuple[str, str | None]) -> None:
    assert split_reference("model", reference, revision, SuspectError) == expected


@pytest.mark.parametrize(
    "name", ["a/b/c", "", "-x/y", "org/", "/x", "org/..", "a--b", "org/x.git", "https://x.y/z", "a b"]
)
def test_a_malformed_id(name: str) -> None:
    with pytest.raises(SuspectError, match=r"model '.*expected a folder or a Hub id"):
        split_reference("model", name, None, SuspectError)


@pytest.mark.parametrize(
    "revision", ["", "-x", "a..b", "../main", "a b", "x\ny", "a//b", "a@{1}", "x.lock", "a?b", "é\u202e", "x" * 300]
)
def test_a_malformed_revision(revision: str) -> None:
    with pytest.raises(DataError, match="expected a branch, tag or commit"):
        split_reference("data set", f"org/x@{revision}", None, DataError)


def test_two_revisions() -> None:
    with pytest.raises(SuspectError, match="expected one revision, found 'a' and --revision 'b'"):
        split_reference("model", "org/x@a", "b", SuspectError)


@pytest.mark.parametrize("name", ["config.json", "a/b.txt", "...", "a b", "ümlaut.json", "[x].json", ".gitattributes"])
def test_names_that_stay_where_they_are_written(name: str) -> None:
    assert safe_name(name)


@pytest.mark.parametrize(
    "name", ["../x", "a/../b", "/etc/passwd", "a//b", "", ".", "a/.", "C:/x", "a\\b", "x\ny", "x\u202ey", "a/"]
)
def test_names_that_do_not(name: str) -> None:
    assert not safe_name(name)


@pytest.mark.parametrize(
    ("error", "kind", "text"),
    [
        (httpx2.ConnectError("no route"), NetworkError, "found neither .no route"),
        (TimeoutError("slow"), NetworkError, "found neither .slow"),
        (OSError("Consistency check failed: 3 of 5 bytes"), NetworkError, "3 of 5 bytes"),
        (OSError(28, "No space left on device"), OutputError, "No space left"),
        (SuspectError("ours"), SuspectError, "ours"),
        (ZeroDivisionError("a bug"), ZeroDivisionError, "a bug"),
    ],
)
def test_errors_without_an_answer(error: Exception, kind: type[Exception], text: str) -> None:
    with pytest.raises(kind, match=text), answers("model", "org/x", SuspectError):
        raise error


def test_the_network_behind_another_librarys_error() -> None:
    try:
        try:
            raise httpx2.ReadTimeout("slow")
        except httpx2.ReadTimeout:
            raise FileNotFoundError("no data files") from None
    except FileNotFoundError as error:
        found = cause_of(error)
    assert isinstance(found, httpx2.ReadTimeout)
    assert cause_of(FileNotFoundError("x")) is None


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (KeyError("metadata"), "no 'metadata'"),
        (ValueError("Heading:\n  what went wrong  \nmore"), "what went wrong"),
        (ValueError(""), "ValueError"),
    ],
)
def test_one_line_of_an_error(error: Exception, line: str) -> None:
    assert first_line(error) == line
