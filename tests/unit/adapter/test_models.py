"""Real transformers architectures, built tiny from their configurations, with their default placement."""

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import transformers as tf
from peft import PeftModel
from torch import Tensor, nn
from transformers.modeling_outputs import ModelOutput

from hf_nft.adapter import NFTConfig, get_nft_model, mask_layers, masks, resolve_targets

pytestmark = [
    # PEFT 0.21 probes this property of transformers 5.23 models and of nothing of ours
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
]


def resnet() -> nn.Module:
    return tf.ResNetForImageClassification(
        tf.ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 2], layer_type="basic", num_labels=3)
    )


VISION = {
    "hidden_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 20,
    "image_size": 16,
    "patch_size": 8,
    "num_labels": 3,
}


def vit() -> nn.Module:
    return tf.ViTForImageClassification(tf.ViTConfig(**VISION))


def deit() -> nn.Module:
    return tf.DeiTForImageClassification(tf.DeiTConfig(**VISION))


def convnext() -> nn.Module:
    return tf.ConvNextForImageClassification(
        tf.ConvNextConfig(num_stages=2, hidden_sizes=[4, 8], depths=[1, 2], layer_scale_init_value=1.0, num_labels=3)
    )


def pvt_v2() -> nn.Module:
    return tf.PvtV2ForImageClassification(
        tf.PvtV2Config(
            image_size=16,
            num_encoder_blocks=2,
            depths=[1, 1],
            hidden_sizes=[4, 8],
            num_attention_heads=[1, 2],
            mlp_ratios=[3, 2],
            sr_ratios=[2, 1],
            patch_sizes=[3, 3],
            strides=[2, 2],
            num_labels=3,
        )
    )


def swin() -> nn.Module:
    return tf.SwinForImageClassification(
        tf.SwinConfig(
            image_size=16, patch_size=2, embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=4, num_labels=3
        )
    )


def segformer() -> nn.Module:
    return tf.SegformerForImageClassification(
        tf.SegformerConfig(
            hidden_sizes=[8, 8, 16, 16],
            depths=[1, 1, 1, 1],
            num_attention_heads=[1, 1, 2, 2],
            sr_ratios=[1, 1, 1, 1],
            num_labels=3,
        )
    )


def focalnet() -> nn.Module:
    return tf.FocalNetForImageClassification(
        tf.FocalNetConfig(image_size=16, embed_dim=8, depths=[1, 1], hidden_sizes=[8, 16], num_labels=3)
    )


def bert() -> nn.Module:
    return tf.BertForSequenceClassification(
        tf.BertConfig(
            vocab_size=20,
            hidden_size=12,
            num_hidden_layers=1,
            num_attention_heads=3,
            intermediate_size=20,
            num_labels=3,
        )
    )


def gpt2() -> nn.Module:
    return tf.GPT2LMHeadModel(
        tf.GPT2Config(vocab_size=20, n_embd=12, n_layer=2, n_head=3, n_positions=16, bos_token_id=0, eos_token_id=0)
    )


def llama() -> nn.Module:
    return tf.LlamaForCausalLM(
        tf.LlamaConfig(
            vocab_size=20,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=6,
            tie_word_embeddings=True,
        )
    )


def t5() -> nn.Module:
    return tf.T5ForConditionalGeneration(
        tf.T5Config(vocab_size=20, d_model=12, d_kv=5, d_ff=20, num_layers=1, num_heads=3, decoder_start_token_id=0)
    )


def marian() -> nn.Module:
    return tf.MarianMTModel(
        tf.MarianConfig(
            vocab_size=20,
            d_model=12,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=3,
            decoder_attention_heads=2,
            encoder_ffn_dim=20,
            decoder_ffn_dim=16,
            pad_token_id=0,
            decoder_start_token_id=0,
            eos_token_id=1,
            forced_eos_token_id=None,
            max_position_embeddings=16,
        )
    )


def videomae() -> nn.Module:
    return tf.VideoMAEForVideoClassification(tf.VideoMAEConfig(**VISION, num_frames=2, tubelet_size=2))


def yolos() -> nn.Module:
    return tf.YolosForObjectDetection(tf.YolosConfig(**(VISION | {"image_size": [16, 16]}), num_detection_tokens=3))


def detr() -> nn.Module:
    backbone = tf.ResNetConfig(
        embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic", out_features=["stage2"]
    )
    return tf.DetrForObjectDetection(
        tf.DetrConfig(
            backbone_config=backbone,
            d_model=12,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=3,
            decoder_attention_heads=2,
            encoder_ffn_dim=20,
            decoder_ffn_dim=16,
            num_queries=3,
            num_labels=3,
        )
    )


IMAGE = {"pixel_values": torch.linspace(-1, 1, 2 * 3 * 16 * 16).sin().view(2, 3, 16, 16)}
TEXT = {"input_ids": torch.tensor([[3, 5, 7, 2], [4, 9, 1, 1]])}
SEQ2SEQ = TEXT | {"decoder_input_ids": torch.tensor([[0, 6, 8], [0, 2, 4]])}
CLIP = {"pixel_values": torch.randn(1, 2, 3, 16, 16, generator=torch.Generator().manual_seed(0))}


@dataclass(frozen=True)
class Case:
    make: Callable[[], nn.Module]
    inputs: dict[str, Tensor]
    auto: type
    placement: str
    entries: int  # masks, counted by hand


CASES = [
    # blocks: stage 1 two norms of 4; stage 2 a shortcut and four of 8; the stem of 4 is left out
    Case(resnet, IMAGE, tf.AutoModelForImageClassification, "bn", 4 + 4 + 5 * 8),
    Case(vit, IMAGE, tf.AutoModelForImageClassification, "units", 2 * (3 + 20)),
    Case(deit, IMAGE, tf.AutoModelForImageClassification, "units", 2 * (3 + 20)),
    Case(bert, TEXT, tf.AutoModelForSequenceClassification, "units", 3 + 20),
    Case(gpt2, TEXT, tf.AutoModelForCausalLM, "units", 2 * (3 + 48)),
    Case(llama, TEXT, tf.AutoModelForCausalLM, "units", 2 * (4 + 24)),
    Case(t5, SEQ2SEQ, tf.AutoModelForSeq2SeqLM, "units", (3 + 20) + (3 + 3 + 20)),
    Case(marian, SEQ2SEQ, tf.AutoModelForSeq2SeqLM, "units", (3 + 20) + (2 + 2 + 16)),
    Case(videomae, CLIP, tf.AutoModelForVideoClassification, "units", 2 * (3 + 20)),
    Case(yolos, IMAGE, tf.AutoModelForObjectDetection, "units", 2 * (3 + 20)),
    # DETR turns the backbone's BatchNorm into FrozenBatchNorm buffers: 4 + 4, shortcut 8, 8 + 8, stem left out
    Case(detr, IMAGE, tf.AutoModelForObjectDetection, "bn", 4 + 4 + 3 * 8),
    Case(convnext, IMAGE, tf.AutoModelForImageClassification, "units", 16 + 2 * 32),
    Case(pvt_v2, IMAGE, tf.AutoModelForImageClassification, "units", (1 + 12) + (2 + 16)),
    Case(swin, IMAGE, tf.AutoModelForImageClassification, "units", (1 + 32) + (2 + 64)),
    Case(segformer, IMAGE, tf.AutoModelForImageClassification, "units", 2 * (1 + 32) + 2 * (2 + 64)),
    Case(focalnet, IMAGE, tf.AutoModelForImageClassification, "units", 32 + 64),
]
every_model = pytest.mark.parametrize("case", CASES, ids=lambda case: case.make.__name__)


def output(model: nn.Module, case: Case) -> Tensor:
    with torch.no_grad():
        result = model(**case.inputs)
    assert isinstance(result, ModelOutput)
    return result.logits


def build(case: Case) -> nn.Module:
    torch.manual_seed(0)
    model = case.make().eval()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if "norm" in name.lower() and tensor.is_floating_point():
            tensor.data.uniform_(0.5, 1.5)
        elif tensor.dim() > 1 and isinstance(tensor, nn.Parameter) and "embed_positions" not in name:
            tensor.data.uniform_(-0.5, 0.5)  # the default initialisation hides differences
    return model.requires_grad_(False)  # torch picks another attention kernel for frozen weights


@every_model
def test_default_placement_from_training_to_a_reloaded_merged_model(case: Case, tmp_path) -> None:  # type: ignore[no-untyped-def]
    model = build(case)
    pristine, before = copy.deepcopy(model), output(model, case)
    model = get_nft_model(model)
    assert model.peft_config["default"].resolved_placement == case.placement
    assert sum(mask.numel() for mask in masks(model).values()) == case.entries
    assert torch.equal(output(model, case), before)

    model.train()
    torch.manual_seed(1)
    model(**case.inputs).logits.square().sum().backward()
    assert all(mask.grad is not None and mask.grad.isfinite().all() for mask in masks(model).values())
    assert not any(p.requires_grad or p.grad is not None for n, p in model.named_parameters() if "nft_mask" not in n)
    model.eval()
    for mask in masks(model).values():
        mask.data.uniform_(0.1, 0.9)
    after = output(model, case)
    assert not torch.allclose(after, before, atol=1e-4)
    with model.disable_adapter():
        assert torch.equal(output(model, case), before)

    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(pristine, tmp_path / "adapter").eval()
    assert list(mask_layers(loaded)) == list(mask_layers(model))
    assert torch.equal(output(loaded, case), after)
    merged = loaded.merge_and_unload(safe_merge=True)
    torch.testing.assert_close(output(merged, case), after, atol=1e-5, rtol=1e-5)
    merged.save_pretrained(tmp_path / "merged")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        reloaded = case.auto.from_pretrained(tmp_path / "merged").eval().requires_grad_(False)
    assert torch.equal(output(reloaded, case), output(merged, case))


def zero_slice(case: Case, site: str, columns: slice, transposed: bool = False) -> Tensor:
    """Logits after zeroing the weights that read some columns: an independent way to switch a unit off."""
    model = build(case)
    weight = model.get_submodule(site).weight.data
    weight[(columns, slice(None)) if transposed else (slice(None), columns)] = 0.0
    return output(model, case)


HEADS = [
    ("vit", "vit.layers.1.attention.o_proj", 2, 4),
    ("deit", "deit.layers.0.attention.o_proj", 1, 4),
    ("bert", "bert.encoder.layer.0.attention.output.dense", 0, 4),
    ("gpt2", "transformer.h.1.attn.c_proj", 1, 4),
    ("llama", "model.layers.0.self_attn.o_proj", 3, 6),
    ("t5", "decoder.block.0.layer.1.EncDecAttention.o", 2, 5),
    ("marian", "model.decoder.layers.0.encoder_attn.out_proj", 1, 6),
    ("videomae", "videomae.encoder.layer.0.attention.output.dense", 2, 4),
    ("yolos", "vit.encoder.layer.1.attention.output.dense", 1, 4),
]


@pytest.mark.parametrize(("model_name", "site", "head", "width"), HEADS, ids=[h[0] for h in HEADS])
def test_a_head_mask_of_zero_removes_exactly_that_head(model_name: str, site: str, head: int, width: int) -> None:
    case = next(case for case in CASES if case.make.__name__ == model_name)
    expected = zero_slice(case, site, slice(head * width, (head + 1) * width), transposed=model_name == "gpt2")
    model = get_nft_model(build(case))
    masks(model)[site].data[head] = 0.0
    torch.testing.assert_close(output(model, case), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("model_name", ["vit", "gpt2", "llama", "t5", "bert", "marian"])
def test_a_hidden_unit_mask_of_zero_removes_exactly_that_unit(model_name: str) -> None:
    case = next(case for case in CASES if case.make.__name__ == model_name)
    model = get_nft_model(build(case))
    site = list(masks(model))[-1]
    assert masks(model)[site].numel() >= 16
    expected = zero_slice(case, site, slice(5, 6), transposed=model_name == "gpt2")
    masks(model)[site].data[5] = 0.0
    torch.testing.assert_close(output(model, case), expected, atol=1e-6, rtol=1e-5)


def test_detr_units_use_each_side_s_own_head_count() -> None:
    targets = resolve_targets(detr(), NFTConfig(placement="units"))
    heads = {name: target.units for name, target in targets.items() if "attn" in name}
    assert sorted(set(heads.values())) == [2, 3]
    assert all(units == (3 if "encoder.layers" in name else 2) for name, units in heads.items()), heads


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", [CASES[0], CASES[1], CASES[5]], ids=lambda case: case.make.__name__)
def test_half_precision_models(case: Case, dtype: torch.dtype) -> None:
    inputs = {name: t.to(dtype) if t.is_floating_point() else t for name, t in case.inputs.items()}
    case = Case(case.make, inputs, case.auto, case.placement, case.entries)
    model = build(case).to(dtype)
    before = output(model, case)
    wrapped = get_nft_model(model)
    torch.testing.assert_close(output(wrapped, case), before, atol=2e-2, rtol=2e-2)
    wrapped.train()
    wrapped(**case.inputs).logits.float().sum().backward()
    assert all(mask.grad.dtype == torch.float32 for mask in masks(wrapped).values())
    for mask in masks(wrapped).values():
        mask.data.uniform_(0.5, 1.0)
    after = output(wrapped.eval(), case)
    merged = wrapped.merge_and_unload()
    assert {p.dtype for p in merged.parameters()} == {dtype}
    torch.testing.assert_close(output(merged, case), after, atol=3e-2, rtol=3e-2)


def test_transformers_own_adapter_loading(tmp_path) -> None:  # type: ignore[no-untyped-def]
    case = CASES[1]
    model = get_nft_model(build(case))
    for mask in masks(model).values():
        mask.data.uniform_(0.1, 0.9)
    model.save_pretrained(tmp_path)
    plain = build(case)
    plain.load_adapter(str(tmp_path))
    torch.testing.assert_close(output(plain, case), output(model, case))


def test_tied_embeddings_stay_tied_after_a_merge() -> None:
    merged = get_nft_model(build(CASES[5])).merge_and_unload()
    assert merged.config.tie_word_embeddings
    assert merged.lm_head.weight is merged.model.embed_tokens.weight


@pytest.mark.parametrize("model_name", ["gpt2", "llama", "t5", "marian"])
def test_generation_is_the_same_masked_and_merged(model_name: str) -> None:
    case = next(case for case in CASES if case.make.__name__ == model_name)
    model = get_nft_model(build(case))
    torch.manual_seed(2)
    for mask in masks(model).values():
        mask.data.uniform_(0.0, 1.0)
    settings = {"input_ids": TEXT["input_ids"], "attention_mask": torch.ones_like(TEXT["input_ids"])}
    settings |= {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "num_beams": 1}
    masked = model.generate(**settings)
    assert masked.shape[1] > 1
    assert torch.equal(model.merge_and_unload().generate(**settings), masked)
