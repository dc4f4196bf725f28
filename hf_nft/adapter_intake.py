"""An adapter as a suspect: found with the model it belongs to, held against it, and folded in."""

import warnings
from pathlib import Path

from torch import nn

from hf_nft.errors import SuspectError
from hf_nft.hub import first_line
from hf_nft.intake import ADAPTER_WEIGHTS, Source, base_of, locate
from hf_nft.weights import stored_tensors


def base_source(adapter: Source, revision: str | None = None) -> Source:
    """Find the model that an adapter belongs to; safetensors only for both.

    Args:
        adapter: An adapter, its small files fetched.
        revision: Revision of the base; default the one that the adapter names, else the main branch.

    Returns:
        Its base model at a resolved revision, its small files fetched.

    Raises:
        SuspectError: If there is no such model, or it is an adapter itself.
        UnsafeModelError: If the adapter is a pickle or would import something.
        NetworkError: If the Hub refuses or cannot be reached.
    """
    base, named = base_of(adapter)
    # an adapter from the Hub must not choose a folder on this machine
    found = locate(base, revision or named, on_hub=adapter.revision is not None)
    found = found.fetch(found.plain_files(remote_code=False))
    if found.is_adapter:
        raise SuspectError(f"{adapter.name}: expected a whole model as its base, found the adapter {base}. Merge it.")
    return found


def check_fit(adapter: Source, base: Source, model: nn.Module) -> None:
    """Refuse an adapter that replaces a layer of its base by one of another size, as for other labels.

    Args:
        adapter: An adapter; of its weights nothing is read but the header.
        base: The model it belongs to.
        model: That model; nothing of it is read but shapes.

    Raises:
        SuspectError: If a shape differs, or the header is not true.
        NetworkError: If the Hub refuses or cannot be reached.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for name, stored in stored_tensors(adapter, [ADAPTER_WEIGHTS]).items():
        own = name.removeprefix("base_model.model.")
        if shapes.get(own, stored.shape) != stored.shape:
            raise SuspectError(
                f"{adapter.name}: expected an adapter for {base.name}, whose {own} is {shapes[own]}, found one that "
                f"replaces it by {stored.shape}, as for other labels. Merge it into its base model elsewhere."
            )


def fold(model: nn.Module, adapter: Path, name: str) -> nn.Module:
    """Put an adapter onto its base and fold it in.

    Args:
        model: The base.
        adapter: Folder of the adapter, its weights in safetensors.
        name: What the user knows it by.

    Returns:
        The base's architecture with other weights.

    Raises:
        SuspectError: If it does not fit.
    """
    from peft import PeftModel

    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*missing adapter keys")
            # on the meta device until its weights come, so that an absurd rank takes no memory
            wrapped = PeftModel.from_pretrained(model, str(adapter), low_cpu_mem_usage=True)
            merged: nn.Module = wrapped.merge_and_unload(safe_merge=True)
    except Exception as error:  # a stranger's settings reach every line of PEFT
        raise SuspectError(
            f"{name}: expected an adapter that fits {type(model).__name__}, found: {first_line(error)}"
        ) from error
    return merged
