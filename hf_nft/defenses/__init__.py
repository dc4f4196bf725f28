"""Defenses: one file each, same call for all; see `hf_nft.defenses.base`."""
