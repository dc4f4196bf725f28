"""The form in the browser, and the server behind it.

Runs go one after the other. A run lives in a temporary folder that is gone when its answer has been sent. No token is
asked for: the app reads from the Hub what its user may read, or, for guests, what anybody may.
"""

import ipaddress
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hf_nft import registry
from hf_nft.app.guests import forget_token
from hf_nft.app.orders import MOST_SHOTS, Demonstration, Order, carry_out
from hf_nft.errors import ConfigError, HFNFTError
from hf_nft.reporting.text import plain, public

WAITING = 10
"""People who may wait for their turn."""
KEPT = 3600
"""Seconds after which what was sent to a browser is removed."""
DEMO, NAMED = "Demonstration: handwritten digits with BadNets", "A model of your choice"
INTRO = """# hf-nft
Remove a backdoor from a model with a few clean examples. Take the demonstration (its victim is trained at first use,
which takes a minute), or name a small image classifier or language model. Weights in safetensors only; code that comes
with a model is not run.
"""


def serve(host: str = "127.0.0.1", port: int | None = None, open_browser: bool = False) -> None:
    """Start the app and wait until it is stopped.

    Whoever can reach it may use it. Where that is this machine alone, folders are read; elsewhere its users are guests.

    Args:
        host: Address to listen on.
        port: Port to listen on; default the first free one from 7860.
        open_browser: Whether to open a browser.

    Raises:
        ConfigError: If Gradio is not installed, or it cannot listen there.
    """
    guest = not _is_loopback(host)
    app = build_app(guest)
    if guest:
        forget_token()
    try:
        # nothing is uploaded, but Gradio would take files of any size
        app.launch(
            server_name=host,
            server_port=port,
            inbrowser=open_browser,
            share=False,
            ssr_mode=False,
            max_file_size=1,
            footer_links=[],
        )
    except OSError as error:
        where = f"{host}:{port or '7860-7959'}"
        raise ConfigError(f"app: expected a free port at {where}, found: {public(error, 200)}") from error


def build_app(guest: bool) -> Any:
    """Build the form.

    Args:
        guest: Whether strangers fill it in.

    Returns:
        A `gradio.Blocks`, not yet started.

    Raises:
        ConfigError: If Gradio is not installed.
    """
    try:
        import gradio as gr
    except ImportError as error:
        raise ConfigError("app: expected Gradio, found none. Install it with: pip install 'hf-nft[app]'") from error
    demonstration = Demonstration()
    bars = gr.Progress(track_tqdm=True)

    def submit(
        kind: str, model: str, dataset: str, shots: float, preset: str, progress: Any = bars
    ) -> Iterator[tuple[Any, ...]]:
        try:
            order = _order(kind, model, dataset, shots, preset)
            progress(0, desc="Looking at model and data")
            with tempfile.TemporaryDirectory(prefix="hf-nft-app-") as scratch:
                found = carry_out(order, demonstration, Path(scratch), guest)
                # Gradio copies the files before it goes on
                yield gr.update(visible=False), found.table, found.masks, found.archive, found.card
        except Exception as error:
            if os.environ.get("HF_NFT_DEBUG"):
                raise
            yield gr.update(value=_explain(error, guest), visible=True), "", None, None, ""

    where = "Hub id" if guest else "Hub id or folder"
    presets = list(registry.get("defenses", "nft").presets)
    with gr.Blocks(title="hf-nft", analytics_enabled=False, delete_cache=(KEPT, KEPT)) as app:
        gr.Markdown(INTRO)
        form = [
            gr.Radio([DEMO, NAMED], value=DEMO, label="Model", elem_id="kind"),
            gr.Textbox(label=where, placeholder="org/model@revision", elem_id="model"),
            gr.Textbox(label=f"Data set ({where})", placeholder="Default: named by the card", elem_id="dataset"),
            gr.Slider(1, MOST_SHOTS, value=10, step=1, label="Clean examples per class", elem_id="shots"),
            gr.Dropdown(presets, value="default", label="Preset", elem_id="preset"),
        ]
        button = gr.Button("Purify", variant="primary", elem_id="run")
        shown = [
            gr.Textbox(label="What went wrong", visible=False, interactive=False, elem_id="error"),
            gr.Markdown(elem_id="table"),
            gr.Image(label="Masks", interactive=False, elem_id="masks"),
            gr.File(label="Run folder", interactive=False, elem_id="folder"),
            gr.Markdown(elem_id="card"),
        ]
        button.click(submit, form, shown, api_visibility="private")
    return app.queue(max_size=WAITING, default_concurrency_limit=1)


def _order(kind: str, model: str, dataset: str, shots: float, preset: str) -> Order:
    """What the form says; empty fields mean nothing for the demonstration."""
    if kind == DEMO:
        return Order("", "", int(shots), preset)
    if not model.strip():
        raise ConfigError("model: expected a name, found none. Type one, or choose the demonstration.")
    return Order(model.strip(), dataset.strip(), int(shots), preset)


def _explain(error: Exception, guest: bool) -> str:
    """What went wrong in one line of text; a guest is not told where things lie on this machine."""
    text = public(error, 1000) if guest else plain(error, 1000)
    return text if isinstance(error, HFNFTError) else f"Unexpected error: {type(error).__name__}: {text}"


def _is_loopback(host: str) -> bool:
    """Whether nobody but this machine can reach an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
