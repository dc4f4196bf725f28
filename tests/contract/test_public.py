"""The public names, the version, and what `import hf_nft` costs."""

import inspect
import re
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest

import hf_nft


def test_all_names_can_be_imported() -> None:
    assert len(set(hf_nft.__all__)) == len(hf_nft.__all__)
    for name in hf_nft.__all__:
        value = getattr(hf_nft, name)
        assert name == "__version__" or value.__name__ == name
        assert name == "__version__" or inspect.getdoc(value)
    assert dir(hf_nft) == sorted(hf_nft.__all__)
    with pytest.raises(AttributeError, match="no attribute 'purifi'"):
        hf_nft.purifi  # noqa: B018 - the access is the test


def test_a_star_import_brings_exactly_the_public_names() -> None:
    names: dict[str, object] = {}
    exec("from hf_nft import *", names)
    assert set(names) - {"__builtins__"} == set(hf_nft.__all__)


def test_public_functions_are_annotated_and_documented() -> None:
    for name in hf_nft.__all__:
        value = getattr(hf_nft, name)
        if inspect.isfunction(value):
            signature = inspect.signature(value)
            assert signature.return_annotation is not inspect.Signature.empty, name
            assert all(p.annotation is not inspect.Parameter.empty for p in signature.parameters.values()), name


def test_one_version(root: Path) -> None:
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    assert hf_nft.__version__ == project["version"] == version("hf-nft")


def test_the_changelog_begins_with_this_version(root: Path) -> None:
    file = root / "CHANGELOG.md"
    if not file.exists():
        pytest.skip("there is no CHANGELOG.md yet")
    found = re.findall(r"^## \[?v?(\d+\.\d+\.\d+\w*)", file.read_text(), re.MULTILINE)
    assert found
    assert found[0] == hf_nft.__version__


def test_import_is_light_and_peft_learns_the_method(child) -> None:
    code = """
import sys, hf_nft
print(sorted({"torch", "peft", "transformers", "datasets", "numpy"} & set(sys.modules)))
import peft
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING as configs, PEFT_TYPE_TO_TUNER_MAPPING as tuners
print([getattr(k, "value", k) for k, v in configs.items() if v.__name__ == "NFTConfig"])
print([v.__module__ for v in tuners.values() if v.__name__ == "NFTModel"])
print("hf_nft.purification" in sys.modules, any(type(f).__name__ == "_AfterPeft" for f in sys.meta_path))
"""
    light, types, tuners, rest = child(code).splitlines()
    assert light == "[]"
    assert types == "['NFT']"
    assert tuners == "['hf_nft.adapter.model']"
    assert rest == "False False"


def test_peft_imported_first_learns_the_method_too(child) -> None:
    code = "import peft, hf_nft; print(peft.get_peft_config({'peft_type': 'NFT'}).peft_type)"
    assert child(code).rpartition(".")[2] == "NFT"
