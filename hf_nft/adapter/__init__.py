"""The NFT adapter: a PEFT method that puts one mask on every neuron of a frozen model.

Importing this package registers the method, so that `PeftModel.from_pretrained` can load its adapters.
"""

from hf_nft.adapter.config import NFTConfig
from hf_nft.adapter.layer import NFTLayer
from hf_nft.adapter.model import NFTModel, get_nft_model, mask_layers, masks
from hf_nft.adapter.targets import Target, maskable_modules, resolve_targets, skipped_modules

__all__ = [
    "NFTConfig",
    "NFTLayer",
    "NFTModel",
    "Target",
    "get_nft_model",
    "mask_layers",
    "maskable_modules",
    "masks",
    "resolve_targets",
    "skipped_modules",
]
