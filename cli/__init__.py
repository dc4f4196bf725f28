"""The `hf-nft` command: one verb per file, assembled in `main`."""

if __name__ != "hf_nft.cli":
    raise ImportError("import hf_nft.cli; the folder `cli` is mapped into the package and has no name of its own")
