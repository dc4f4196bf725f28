"""What the Hub answers, in the words and exit codes of this package: names, revisions and errors."""

import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from hf_nft.errors import HFNFTError, NetworkError, OutputError

if TYPE_CHECKING:
    from huggingface_hub.errors import HfHubHTTPError

T = TypeVar("T")
WAITS = (1.0, 2.0, 4.0, 8.0)
"""Seconds between tries, unless the Hub asks for others."""
PATIENCE = 300.0
"""Most seconds to wait for a rate limit, or to try again while the Hub says nothing; the last try is not cut short."""
TIMEOUT = 120.0
"""Seconds without a word from the Hub after which a request has failed; the client would wait for ever."""
PASSING = (408, 429, 500, 502, 503, 504)
"""Answers that another try may change."""
REVISION = re.compile(r"(?!.*(\.\.|//|@\{|\.lock(/|$)))[A-Za-z0-9][\w./-]{0,254}")
"""What git allows as the name of a branch, tag or commit, without what would need quoting in an address."""


def split_reference(
    what: str, reference: str, revision: str | None, missing: type[HFNFTError]
) -> tuple[str, str | None]:
    """Take `ORG/NAME@REVISION` apart and check both parts, before any request is made.

    Args:
        what: What it names, such as `model`.
        reference: A Hub id, which a revision may follow.
        revision: A revision named elsewhere.
        missing: Error to raise.

    Returns:
        The id and the revision, None if neither place names one.

    Raises:
        HFNFTError: Of the type `missing`, if the id or the revision is malformed, or two revisions disagree.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    name, at, own = reference.partition("@")
    if at and revision is not None and revision != own:
        raise missing(f"{what} '{name}': expected one revision, found '{own}' and --revision '{revision}'. Drop one.")
    wanted = own if at else revision
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise missing(
            f"{what} '{reference}': expected a folder or a Hub id (org/name), found neither. Check the path."
        ) from error
    if wanted is not None and not REVISION.fullmatch(wanted):
        raise missing(f"{what} '{name}': expected a branch, tag or commit as revision, found '{wanted}'.")
    return name, wanted


@contextmanager
def answers(what: str, name: str, missing: type[HFNFTError]) -> Iterator[None]:
    """Translate whatever the Hub's client raises.

    Args:
        what: What is asked for, such as `model`.
        name: Its id.
        missing: Error for something that does not exist.

    Yields:
        None: Nothing.

    Raises:
        HFNFTError: `missing` for what does not exist or is private; `NetworkError` for what is gated, refused or
            cannot be reached; `OutputError` if the cache cannot be written.
    """
    try:
        yield
    except HFNFTError:
        raise
    except Exception as error:
        found = translate(f"{what} '{name}'", cause_of(error) or error, missing)
        if found is None:
            raise
        raise found from error


def cause_of(error: BaseException) -> BaseException | None:
    """Find what the Hub or the network did wrong behind another library's error.

    Args:
        error: What was caught.

    Returns:
        The first error of the Hub's client or of a connection in the chain of causes; None if there is none.
    """
    from huggingface_hub.errors import HfHubHTTPError

    found: BaseException | None = error
    while found is not None:
        transport = type(found).__module__.startswith("httpx")  # the client's own errors, which are no OSErrors
        if transport or isinstance(found, HfHubHTTPError | ConnectionError | TimeoutError):
            return found
        found = found.__cause__ or found.__context__
    return None


def translate(subject: str, error: BaseException, missing: type[HFNFTError]) -> HFNFTError | None:
    """Say in our words what an error of the Hub's client means.

    Args:
        subject: What was asked for, with its name.
        error: The error.
        missing: Error for something that does not exist.

    Returns:
        Our error; None if this is no error of the Hub, the network or the cache.
    """
    from huggingface_hub import errors as hub

    line = first_line(error)
    if isinstance(error, hub.GatedRepoError):
        return NetworkError(
            f"{subject}: expected access, found that it is gated. Ask for access on its page, then log in with "
            f"`hf auth login`."
        )
    if isinstance(error, hub.RevisionNotFoundError):
        return missing(f"{subject}: expected a revision that exists, found none of that name. Check the revision.")
    if isinstance(error, hub.RepositoryNotFoundError):
        return missing(
            f"{subject}: expected a folder or a Hub id, found no such folder here and no such repository there. Check "
            f"the name, or log in with `hf auth login` if it is private."
        )
    if isinstance(error, hub.RemoteEntryNotFoundError):
        return missing(f"{subject}: expected every listed file, found one that is gone ({line}). Try again.")
    if isinstance(error, hub.HfHubHTTPError):
        status = error.response.status_code if error.response is not None else 0
        hint = "Log in again with `hf auth login`." if status in (401, 403) else "Try again later."
        refused = "a token that may read it" if status in (401, 403) else "an answer"
        return NetworkError(f"{subject}: expected {refused}, found that the Hub refused ({status}). {hint}")
    local = isinstance(error, OSError) and error.errno and not isinstance(error, ConnectionError | TimeoutError)
    if local and isinstance(error, OSError):
        return OutputError(f"{subject}: expected a cache that can be written, found: {error.strerror}.")
    if isinstance(error, OSError) or cause_of(error) is error:
        return NetworkError(
            f"{subject}: expected a folder, or a Hub that can be reached, found neither ({line}). Check the path or "
            f"the network; a download goes on where it stopped."
        )
    return None


def first_line(error: BaseException, limit: int = 160) -> str:
    """Return the first line of an error's text that is no heading, or its type's name if it has none."""
    text = f"no {error}" if isinstance(error, KeyError) else str(error)  # of a missing key there is the name alone
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return next((line for line in lines if not line.endswith(":")), " ".join(lines))[:limit] or type(error).__name__


def patiently(
    request: Callable[[], T], passing: tuple[int, ...] = PASSING, tell: Callable[[float], None] = lambda pause: None
) -> T:
    """Ask the Hub, again where it failed for a reason that may pass; the client retries only a part of that itself.

    Args:
        request: A request that may be repeated.
        passing: Answers that another try may change.
        tell: Called with the seconds until the next try.

    Returns:
        What it returns.

    Raises:
        Exception: Whatever the request raises at last.
    """
    silence = 0.0
    for wait in WAITS:
        began = time.monotonic()
        try:
            with limited():
                return request()
        except Exception as error:
            # a long transfer may have been silent at its end alone
            silence += min(time.monotonic() - began, PATIENCE) if _timed_out(error) else 0.0
            pause = pause_after(error, wait, passing)
            if pause is None or silence > PATIENCE:
                raise
        tell(pause)
        time.sleep(pause)
    with limited():
        return request()


@contextmanager
def limited() -> Iterator[None]:
    """Let no request of the client wait longer than `TIMEOUT`, not even those that it sends without any limit.

    Transfers through xet are no requests of the client: they have limits of their own, longer ones.
    """
    from huggingface_hub.utils import get_session  # type: ignore[attr-defined]

    def limit(sent: Any) -> None:
        asked = sent.extensions.get("timeout") or {}
        parts = ("connect", "read", "write", "pool")
        sent.extensions["timeout"] = {part: min(asked.get(part) or TIMEOUT, TIMEOUT) for part in parts}

    hooks = get_session().event_hooks["request"]
    hooks.append(limit)
    try:
        yield
    finally:
        hooks.remove(limit)


def _timed_out(error: Exception) -> bool:
    """Whether the Hub said nothing; its client has a type for every part of a request that may take too long."""
    cause = cause_of(error)
    return isinstance(cause, TimeoutError) or type(cause).__name__.endswith("Timeout")


def pause_after(error: Exception, wait: float, passing: tuple[int, ...] = PASSING) -> float | None:
    """Tell how long to wait before another try.

    Args:
        error: What the last try raised.
        wait: Seconds to wait unless the Hub asks for others.
        passing: Answers that another try may change.

    Returns:
        Seconds; None if another try is of no use, or the Hub asks for more than `PATIENCE`.
    """
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    cause = None if isinstance(error, HFNFTError) else cause_of(error)
    if cause is None or isinstance(cause, OfflineModeIsEnabled):
        return None
    if not isinstance(cause, HfHubHTTPError):
        return wait
    if cause.response.status_code not in passing:
        return None
    asked = asked_for(cause)
    wait = wait if asked is None else asked
    return wait if wait <= PATIENCE else None


def asked_for(error: "HfHubHTTPError") -> float | None:
    """Read how long the Hub asks to wait.

    Args:
        error: A refusal.

    Returns:
        Seconds; None if it does not say.
    """
    from huggingface_hub.utils import parse_ratelimit_headers  # type: ignore[attr-defined]

    limit, after = parse_ratelimit_headers(error.response.headers), error.response.headers.get("Retry-After", "")
    if limit is not None and limit.remaining == 0:
        return float(limit.reset_in_seconds)
    return float(after) if after.isdigit() else None


def safe_name(name: str) -> bool:
    """Whether a file name from a repository stays below the folder that it is written to.

    Args:
        name: Path with forward slashes, relative to the repository.

    Returns:
        False for absolute names, drive letters, backslashes, control characters and parts such as `..`.
    """
    parts = name.split("/")
    odd = "\\" in name or ":" in name or any(not char.isprintable() for char in name)
    return not odd and not any(part in ("", ".", "..") for part in parts) and not Path(name).is_absolute()
