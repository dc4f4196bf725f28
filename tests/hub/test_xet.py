"""Large files go through xet wherever its client is installed; this Hub knows LFS only, as a Hub that refuses xet."""

import huggingface_hub.constants
import pytest


@pytest.fixture
def xet(monkeypatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", False)
    pytest.importorskip("hf_xet", reason="needs hf_xet, which huggingface_hub brings on the usual machines")


@pytest.mark.parametrize("status", [403, 404])
def test_a_push_that_xet_refuses_says_how_to_do_without(hub, cli, run_dir, waits, xet, monkeypatch, status) -> None:
    hub.fail("xet-token", status)
    done = cli("push", run_dir, "me/model")
    assert done.code == 7
    assert "expected a transfer through xet that holds, found: Network error" in done.message
    assert f"({status}" in done.message
    assert "HF_HUB_DISABLE_XET=1" in done.message
    assert "me/model was made and is empty; go on with: hf-nft push" in done.message
    assert (hub.count("lfs-batch"), hub.count("commit"), waits) == (0, 0, [])
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    assert cli("push", run_dir, "me/model").code == 0
    assert hub.count("lfs-batch") > 0
