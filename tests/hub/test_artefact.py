"""An attack's artefact that lies on the Hub."""

from pathlib import Path

import pytest
import torch
from hub_server import HubServer

from hf_nft.attacks._artefacts import normalization
from hf_nft.attacks._workshop import Workshop
from hf_nft.attacks.troj import Troj
from hf_nft.errors import DataError
from hf_nft.models.preact_resnet18 import PreActResNet18


@pytest.fixture
def patch(image_rows, image_task, tmp_path: Path) -> Path:
    """Return a folder with the artefact of TrojanNN."""
    rows, folder = image_rows(40, 16), tmp_path / "attack"
    folder.mkdir()
    told = (4, PreActResNet18(width=4, image_size=16), normalization(image_task), "none")
    return Troj(**Troj.tiny).trained(Workshop(image_task, rows, image_task.encode(rows), *told), folder)


def test_an_artefact_is_asked_for_once(hub: HubServer, patch: Path) -> None:
    hub.store.add("org/patch", patch)
    images = torch.rand(2, 3, 16, 16)
    local, remote = Troj(artefact=str(patch)), Troj(artefact="org/patch")
    assert torch.equal(local.trigger_batch(images), remote.trigger_batch(images))
    assert remote.digest() == local.digest()
    asked = len(hub.requests)
    remote.trigger_batch(images)
    assert len(hub.requests) == asked > 0


def test_an_artefact_beside_a_model(hub: HubServer, patch: Path) -> None:
    hub.store.add("org/victim-backdoored", patch.parent)
    digests = {Troj(artefact=str(place)).digest() for place in (patch, patch.parent, "org/victim-backdoored")}
    assert len(digests) == 1


def test_an_artefact_that_is_not_there_is_named(hub: HubServer) -> None:
    with pytest.raises(DataError, match="org/nothing"):
        Troj(artefact="org/nothing").made()
