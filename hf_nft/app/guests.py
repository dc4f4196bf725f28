"""What strangers may ask for: small things of the Hub that anybody may read, and nothing of this machine.

All of it is decided from listings and headers, before a weight or a row is downloaded.
"""

from pathlib import Path

import huggingface_hub.constants
from huggingface_hub import HfApi

from hf_nft.errors import ConfigError, DataError, SuspectError, UnsafeModelError
from hf_nft.hub import answers, patiently, split_reference
from hf_nft.reporting.render import is_repo_id
from hf_nft.reporting.text import plain
from hf_nft.workflows import InspectJob

LARGEST_MODEL = 200 * 2**20
"""Bytes of a model's weights that are taken at most."""
LARGEST_DATA = 500 * 2**20
"""Bytes of a data set's files that are taken at most."""
LONGEST = 1800.0
"""Seconds on one core that a purification may be expected to take, with the default preset."""


def forget_token() -> None:
    """Ask the Hub as nobody from now on: what the owner of this machine may read is not for guests."""
    huggingface_hub.constants.HF_HUB_DISABLE_IMPLICIT_TOKEN = True


def admit(model: str, dataset: str, shots: int) -> tuple[str, str, str]:
    """Refuse what is not small, safe and on the Hub.

    Args:
        model: Hub id, which `@REVISION` may follow.
        dataset: Hub id, which `@REVISION` and `:CONFIG` may follow; empty for the one that the model's card names.
        shots: Clean examples per class, for the estimate.

    Returns:
        The model's id and commit, and the data set at a commit.

    Raises:
        ConfigError: If one is no Hub id.
        DataError: If there is no such data set, or it is too large.
        UnsafeModelError: If a purification would refuse the model.
        SuspectError: If there is no such model, it is too large, or its size cannot be told.
        NetworkError: If the Hub refuses or cannot be reached.
    """
    _refuse_folder("model", model)
    found = InspectJob(model=model, shots=shots).run()
    if found.refused:
        raise UnsafeModelError(found.refused[0])
    elsewhere = f"Purify it on your own machine with: hf-nft purify {found.name}"
    size = sum(size for file, size in found.files.items() if file.endswith(".safetensors"))
    if found.base is not None or size > LARGEST_MODEL:
        what = "an adapter, whose base may be of any size" if found.base is not None else f"{size >> 20} MiB"
        raise SuspectError(
            f"{found.name}: expected a whole model of {LARGEST_MODEL >> 20} MiB at most here, found {what}. {elsewhere}"
        )
    seconds = found.estimate.cpu_seconds if found.estimate is not None else None
    if seconds is None or seconds > LONGEST:
        what = "no way to tell" if seconds is None else f"{seconds:.0f} s"
        raise SuspectError(f"{found.name}: expected to take {LONGEST:.0f} s at most here, found {what}. {elsewhere}")
    if not (dataset or found.dataset):
        raise DataError(f"{found.name}: expected a data set in the form or in the model's card, found none. Name one.")
    assert found.revision is not None  # what is on the Hub was resolved
    return found.name, found.revision, _admit_data(dataset or str(found.dataset))


def _admit_data(reference: str) -> str:
    """The data set at a resolved commit, with its configuration."""
    path, _, config = reference.partition(":")
    _refuse_folder("data set", path)
    name, revision = split_reference("data set", path, None, DataError)
    with answers("data set", name, DataError):
        api = HfApi(library_name="hf-nft")
        info = patiently(lambda: api.dataset_info(name, revision=revision, files_metadata=True, timeout=30))
    size = sum(file.size or 0 for file in info.siblings or [])
    if size > LARGEST_DATA:
        raise DataError(f"{name}: expected {LARGEST_DATA >> 20} MiB of data at most here, found {size >> 20} MiB.")
    return f"{name}@{info.sha}" + (f":{config}" if config else "")


def _refuse_folder(kind: str, reference: str) -> None:
    """A stranger must not look into this machine."""
    name = reference.partition("@")[0]
    if not is_repo_id(name) or Path(name).exists():
        raise ConfigError(f"{kind}: expected a Hub id (org/name), found '{plain(name, 100)}'. Folders are not read.")
