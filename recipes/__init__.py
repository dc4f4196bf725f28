"""Recipes: readable YAML files, `<modality>/<dataset>-<attack>-<model>/recipe.yaml`."""

if __name__ != "hf_nft.recipes":
    raise ImportError("import hf_nft.recipes; the folder `recipes` is mapped into the package and has no name of its own")
