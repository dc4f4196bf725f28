"""Architectures that victims can be trained from scratch with; see `hf_nft.models.base`."""
