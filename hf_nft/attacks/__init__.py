"""Attacks: one file each; see `hf_nft.attacks.base`."""
