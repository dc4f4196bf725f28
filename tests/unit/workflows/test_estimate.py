"""Counted work and memory against hand-made numbers, and how the estimate grows."""

import dataclasses
import math

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from hf_nft.defenses import _adversary, _shift
from hf_nft.defenses._composites import MEETINGS, TRIED
from hf_nft.defenses._easiest import usual_work
from hf_nft.defenses._harm import TRIES
from hf_nft.defenses.nft import ECHOES, NFT
from hf_nft.models.base import image_processor
from hf_nft.models.preact_resnet18 import PreActResNetConfig, PreActResNetForImageClassification
from hf_nft.models.vit import SmallViT
from hf_nft.purification import purify
from hf_nft.tasks.image_classification import ImageClassification
from hf_nft.workflows.estimate import COPIES, EVALUATED_ROWS, count, estimate, forwards, keeps_statistics


def resnet(width: int) -> PreActResNetForImageClassification:
    with torch.device("meta"):
        return PreActResNetForImageClassification(PreActResNetConfig(width=width, num_labels=10))


def convolutions(width: int, side: int = 32) -> int:
    """Multiplications and additions of a PreAct-ResNet-18, layer by layer."""
    total, channels = 2 * side**2 * 27 * width, width
    for stage in range(4):
        out, side = width * 2**stage, side // 2 if stage else side
        total += 2 * side**2 * 9 * (channels * out + 3 * out * out)
        total += 2 * side**2 * channels * out if stage else 0  # the shortcut
        channels = out
    return total + 2 * channels * 10


@pytest.mark.parametrize("width", [8, 32])
def test_a_forward_pass_is_counted_exactly(width: int) -> None:
    flop, kept = count(resnet(width), ImageClassification(image_processor(32)))
    assert flop == convolutions(width)
    if width == 32:
        assert kept / 2**20 == pytest.approx(2.17, abs=0.02)  # as measured on saved tensors of the real module


def test_tokens_cost_two_operations_per_weight() -> None:
    import datasets

    from hf_nft.models.base import text_tokenizer
    from hf_nft.tasks.text_generation import TextGeneration

    rows = datasets.Dataset.from_dict({"prompt": ["a b"], "response": ["c a a a"]})
    task = TextGeneration(text_tokenizer(rows, 300, 128))
    with torch.device("meta"):
        model = GPT2LMHeadModel(
            GPT2Config(vocab_size=300, n_embd=64, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=2, pad_token_id=0)
        )
    batch = task.encode(datasets.Dataset.from_dict(task.blank))
    tokens = batch["input_ids"].shape[1]
    flop, _ = count(model, task)
    linear = 2 * tokens * (2 * 12 * 64**2 + 300 * 64)
    attention = 2 * 2 * 2 * tokens**2 * 64
    assert flop == linear + attention


@pytest.fixture
def vit(image_rows) -> torch.nn.Module:
    return SmallViT(**SmallViT.tiny).build(image_rows(20, 16), 0)[0].eval()


@pytest.mark.parametrize(("exposed", "composed"), [(False, 0.0), (False, 1.0), (True, 0.0)])
def test_the_work_is_what_a_run_records(image_model, image_task, image_shots, exposed: bool, composed: float) -> None:
    """The suspect may unlearn in fewer steps, and fewer sizes of the cut be tried; so the count is an upper bound."""
    nft = NFT(
        batch_size=8, steps=6, mixed_precision="no", exposures=1, unlearn_steps=2, relearn_passes=2, pushes="never"
    )
    nft = dataclasses.replace(nft, composed=composed)
    if exposed:
        nft = dataclasses.replace(nft, excess=0.0, outliers=0.0)
    assert keeps_statistics(image_model, nft.statistics_momentum)
    assert not keeps_statistics(image_model, 0.09), "its momentum is 0.1"
    expected = forwards(nft, image_task, not exposed, len(image_shots), 4)
    done = purify(image_model, image_task, image_shots, nft).sample_forwards
    spared = 2 * 8 * 3
    if not exposed:  # nor does anything say how these shots may vary, so that no pattern is looked for
        spared = (TRIES + 1) * len(image_shots) + _shift.usual_work(len(image_shots), 8, math.ceil(6 / ECHOES))
    spared += 2 * len(image_shots) + TRIED + 2 * MEETINGS + 8 * math.ceil(6 / ECHOES) if composed else 0
    assert expected - spared <= done <= expected


def test_pushes_take_about_what_they_usually_take(vit, image_task, image_shots) -> None:
    nft = NFT(batch_size=8, steps=0, mixed_precision="no", composed=0.0, adversarial=0.0)
    expected = forwards(nft, image_task, False, len(image_shots), 4)
    assert expected == usual_work(4, len(image_shots))
    led = forwards(dataclasses.replace(nft, steps=5, adversarial=0.5), image_task, False, len(image_shots), 4)
    assert led - expected == _adversary.usual_work(len(image_shots), 8, 2, 2) + 8 * (2 * 5 + 2)
    done = purify(vit, image_task, image_shots, nft).sample_forwards
    assert 0.1 * expected < done < 3 * expected


def test_the_estimate_grows_as_it_should() -> None:
    model, task = resnet(8), ImageClassification(image_processor(32))
    ten, fifty = estimate(model, task, 10), estimate(model, task, 50)
    assert (ten.shots, fifty.shots) == (100, 500)
    assert fifty.purify_flop > ten.purify_flop > 0
    assert fifty.evaluate_flop == ten.evaluate_flop == 2 * EVALUATED_ROWS * ten.forward_flop
    weights = sum(parameter.numel() for parameter in model.parameters())
    assert ten.memory_bytes == COPIES * 4 * weights + 128 * ten.activation_bytes
    assert ten.cpu_seconds > 100 * ten.gpu_seconds
    assert "10 shots per class" in ten.assumes
