"""Text from strangers on its way to a terminal or a card.

Names, labels and sentences in a record may come from strangers. `plain`, `markdown` and `code` are the only ways they
reach a terminal or a card: no control characters, no markup, no lines of their own. `public` also hides what a
published card must not tell about this machine. Percent appears here and nowhere before.
"""

import re
import unicodedata
from urllib.parse import quote

NOTHING = "-"
_INVISIBLE = ("Cf", "Cs", "Co", "Cn")
TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{16,}")
LOCAL_PATH = re.compile(r"(^|(?<=[\s=,'\"\[(]))(?:file://)?(?:~[^\s/,'\"\])]*|[A-Za-z]:)?[/\\][^\s,'\"\])]*")


def plain(value: object, limit: int = 300) -> str:
    """Return one line of text without control, format and other invisible characters.

    Args:
        value: Anything.
        limit: Most characters, >= 4.

    Returns:
        The line; a longer one is cut and ends in three dots.
    """
    kinds = ((char, unicodedata.category(char)) for char in str(value))
    # format characters (bidi overrides, zero-width) vanish, line breaks and the like become the space they look like
    kept = "".join(" " if kind == "Cc" or kind[0] == "Z" else char for char, kind in kinds if kind not in _INVISIBLE)
    text = " ".join(kept.split())
    return text if len(text) <= limit else text[: limit - 3] + "..."


def markdown(value: object) -> str:
    """Return text that Markdown renders as itself: one line, nothing in it is markup or a link."""
    text = plain(value).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    text = re.sub(r"([\\`*{}\[\]()#|~$@])", r"\\\1", text)
    text = re.sub(r"(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", r"\\_", text)  # inside a word it marks nothing
    return text.replace("://", "&#58;//").replace("www.", "www&#46;")


def code(value: object) -> str:
    """Return text as an inline code span that is safe in a table too: nothing in it is markup or a link."""
    text = plain(value).replace("`", "'").replace("<!--", "<! --").replace("\\", "/").replace("|", "\\|")
    return f"`{text or '(unnamed)'}`"


def link(shown: str, address: str) -> str:
    """Return a Markdown link to an address of the web; `shown` is escaped already."""
    return f"[{shown}](<{quote(address, safe=':/#?&=%')}>)"


def public(value: object, limit: int = 300) -> str:
    """Return one line of text in which folders of this machine are shortened to their last part, tokens hidden."""

    def shorten(found: re.Match[str]) -> str:
        return ".../" + re.split(r"[/\\]", found.group().rstrip("/\\"))[-1]

    return TOKEN.sub("hf_...", LOCAL_PATH.sub(shorten, plain(value, limit)))


def percent(share: float | None) -> str:
    """Return a share in percent with one decimal, without the sign; `-` for None."""
    return NOTHING if share is None else f"{100 * share:.1f}"
