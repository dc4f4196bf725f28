"""Writing to the Hub: which answers are worth another try, and what to say in the end."""

from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

from hf_nft import hub
from hf_nft.hub import asked_for, cause_of, first_line
from hf_nft.reporting.text import public

PASSING = (*hub.PASSING, 409, 412)
"""Answers that another try may change; 409 and 412 mean that somebody else wrote at the same moment."""


def may_have_passed(error: Exception) -> bool:
    """Whether a request may have been carried out although it failed: no answer came, or not the Hub's own."""
    cause = cause_of(error)
    return cause is not None and not (isinstance(cause, HfHubHTTPError) and cause.response.status_code < 500)


def explain(caught: Exception) -> str | None:
    """Say what was expected and found; None for an error that has nothing to do with the Hub."""
    error = cause_of(caught) or caught
    if isinstance(error, LocalTokenNotFoundError):
        return "expected a token, found none. Log in with `hf auth login`."
    if isinstance(error, OfflineModeIsEnabled):
        return "expected a network, found HF_HUB_OFFLINE set. Unset it."
    if isinstance(error, HfHubHTTPError):
        return _refusal(error)
    if isinstance(error, ValueError) and "Invalid metadata" in str(error):
        return f"expected a card that the Hub accepts, found: {public(str(error), 200)}"
    if type(error) in (ConnectionError, RuntimeError):  # what compiled code raises, and nobody else here
        found = public(first_line(error), 160)
        return f"expected a transfer through xet that holds, found: {found}. HF_HUB_DISABLE_XET=1 does without xet."
    local = isinstance(error, OSError) and error.errno and not isinstance(error, ConnectionError | TimeoutError)
    if cause_of(caught) or (isinstance(error, OSError) and not local):
        return f"expected a connection that holds, found: {public(first_line(error), 160)}."
    return None


def _refusal(error: HfHubHTTPError) -> str:
    """Say what an answer of the Hub means for somebody who pushes."""
    status = error.response.status_code
    said = public(error.server_message or error.response.headers.get("X-Error-Message") or "", 160).rstrip(".")
    found = f"found {status}{f' ({said})' if said else ''}."
    if status == 401:
        return f"expected a token that the Hub knows, {found} Log in with `hf auth login`."
    if status == 403:
        return f"expected a token that may write there, {found} Make one with write access, `hf auth login`."
    if status == 404:
        return f"expected the repository, {found} It was removed or renamed meanwhile."
    if status in (409, 412):
        return f"expected nobody else to write there meanwhile, {found}"
    if status == 429:
        asked = asked_for(error)
        return f"expected to be let in, {found} Come back in {asked or 60:.0f} s."
    return f"expected the Hub to take it, {found}"
