"""Tasks: one file per modality; see `hf_nft.tasks.base`."""
