"""`hf-nft app`: the form in the browser, on this machine."""

from typing import Annotated

import typer
from hf_nft.cli import common


def register(root: typer.Typer) -> None:
    """Add the verb."""
    root.command()(app)


def app(
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 lets guests in.")] = "127.0.0.1",
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="Port; default a free one from 7860.")] = None,
    open_browser: Annotated[bool, typer.Option("--open", help="Open a browser.")] = False,
) -> None:
    """Purify a small model from a form in the browser, with before and after, figure, card and a download.

    Folders are read only if nobody but this machine can reach it; guests get public things of the Hub alone. Needs
    Gradio: pip install 'hf-nft[app]'. Stop it with Ctrl-C.
    """
    with common.quiet_libraries():
        from hf_nft.app.form import serve

        serve(host, port, open_browser)
