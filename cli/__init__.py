"""The `hf-nft` command: one verb per file, assembled in `main`."""

if __name__ != "hf_nft.cli":
    raise ImportError("this folder is hf_nft.cli; it has no name of its own")
