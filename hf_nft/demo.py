"""The demonstration: a backdoor in a digit classifier, there before and gone after, in about a minute."""

import tempfile
from pathlib import Path

import datasets
import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from hf_nft.planting import PlantConfig
from hf_nft.reporting.output import check_output, partial_of
from hf_nft.reporting.record import RunRecord
from hf_nft.workflows import PlantJob, PurifyJob

SIDE = 32


def digits(seed: int = 0) -> datasets.DatasetDict:
    """Return scikit-learn's 1 797 handwritten digits as RGB images of 32x32, split 3 : 1.

    Args:
        seed: Seed of the split.

    Returns:
        `train` and `test`, with columns `image` and `label`.

    Source: Alpaydin and Kaynak, UCI Optical Recognition of Handwritten Digits, as shipped with scikit-learn.
    """
    raw = load_digits()
    grey = np.kron(raw.images, np.ones((SIDE // 8, SIDE // 8))) * (255 / 16)
    images = [Image.fromarray(image.astype(np.uint8)).convert("RGB") for image in grey]
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=[str(i) for i in range(10)])}
    )
    rows = datasets.Dataset.from_dict({"image": images, "label": raw.target.tolist()}, features=features)
    return rows.train_test_split(test_size=0.25, seed=seed, stratify_by_column="label")


def plant_digits(data: str, out: str, seed: int = 0, progress: bool = False) -> None:
    """Write the digits, and plant BadNets in a small network on them.

    Args:
        data: Folder to write the data set to.
        out: Folder to write the victim to; must not exist.
        seed: Seed of the split and of the victim.
        progress: Whether to show bars.

    Raises:
        OutputError: If the victim's folder exists or cannot be written.
    """
    digits(seed).save_to_disk(data)
    PlantJob(
        dataset=data,
        attack="badnets",
        attack_args={"opacity": 1.0},
        arch_args={"width": 16},
        config=PlantConfig(epochs=12, batch_size=32, lr=0.05, holdout=0.2, augment="none", seed=seed),
        out=out,
        progress=progress,
    ).run()


def run_demo(out: str, seed: int = 0, progress: bool = False) -> RunRecord:
    """Plant, purify, write both folders.

    Args:
        out: Folder to write: `victim` and `clean` in it.
        seed: Seed of the victim, the shots and the defense.
        progress: Whether to show bars.

    Returns:
        The record of the purification.

    Raises:
        OutputError: If the folder exists or cannot be written.
    """
    from hf_nft.defenses.nft import NFT

    check_output(Path(out))
    partial_of(Path(out)).rmdir()
    with tempfile.TemporaryDirectory() as folder:
        data = f"{folder}/digits"
        plant_digits(data, f"{out}/victim", seed, progress)
        return PurifyJob(
            model=f"{out}/victim",
            dataset=data,
            attack="badnets",
            shots=10,
            shot_seed=seed,
            defense=NFT.from_preset("default", seed=seed),
            out=f"{out}/clean",
            progress=progress,
        ).run()
