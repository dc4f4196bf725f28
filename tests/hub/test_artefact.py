"""An attack's artefact that lies on the Hub."""

import pytest
import torch
from hub_server import HubServer

from hf_nft.attacks._artefacts import normalization
from hf_nft.attacks._workshop import Workshop
from hf_nft.attacks.troj import Troj
from hf_nft.errors import DataError
from hf_nft.models.preact_resnet18 import PreActResNet18


def test_an_artefact_is_asked_for_once(hub: HubServer, image_rows, image_task, tmp_path) -> None:
    rows = image_rows(40, 16)
    told = (4, PreActResNet18(width=4, image_size=16), normalization(image_task), "none")
    Troj(**Troj.tiny).trained(Workshop(image_task, rows, image_task.encode(rows), *told), tmp_path)
    hub.store.add("org/patch", tmp_path)
    images = torch.rand(2, 3, 16, 16)
    local, remote = Troj(artefact=str(tmp_path)), Troj(artefact="org/patch")
    assert torch.equal(local.trigger_batch(images), remote.trigger_batch(images))
    assert remote.digest() == local.digest()
    asked = len(hub.requests)
    remote.trigger_batch(images)
    assert len(hub.requests) == asked > 0


def test_an_artefact_that_is_not_there_is_named(hub: HubServer) -> None:
    with pytest.raises(DataError, match="org/nothing"):
        Troj(artefact="org/nothing").made()
