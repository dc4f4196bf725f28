"""The local Hub as a fixture: the real client talks to it, in this process and in children."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import huggingface_hub.hf_api
import huggingface_hub.utils._detect_agent
import pytest
import transformers.utils.hub
from hub_server import HubServer
from huggingface_hub.utils import close_session


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubServer]:
    """Start a Hub of its own for a test, with an empty cache; the client's user is `me`, who may write.

    `hub.environment` holds the variables that point a child process at it.
    """
    home = tmp_path_factory.mktemp("hf-home")
    with HubServer() as server:
        server.environment = {
            "HF_ENDPOINT": server.url,
            "HF_HOME": str(home),
            "HF_TOKEN": server.token,
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
        }
        point_client_at(server.url, home, monkeypatch)
        monkeypatch.setenv("HF_TOKEN", server.token)
        yield server
    close_session()


def point_client_at(url: str, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Set in this process what the client read from the environment when it was imported."""
    settings: dict[str, Any] = {
        "ENDPOINT": url,
        "HUGGINGFACE_CO_URL_TEMPLATE": url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HOME": str(home),
        "HF_HUB_CACHE": str(home / "hub"),
        "HF_TOKEN_PATH": str(home / "token"),
        "AGENT_HARNESSES_PATH": str(home / "harnesses.json"),
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
    }
    for name, value in settings.items():
        monkeypatch.setattr(huggingface_hub.constants, name, value)
    monkeypatch.setattr(huggingface_hub.utils._detect_agent, "_registry", None)
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", url)
    monkeypatch.setattr(transformers.utils.hub, "_hf_api", None)
    close_session()


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Note the waits between retries, in seconds, instead of waiting."""
    found: list[float] = []
    monkeypatch.setattr(time, "sleep", found.append)
    return found
