"""The small language models and their tokenizer: facts of the architecture, and round trips through a folder."""

import json

import datasets
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_nft import registry
from hf_nft.attacks.rare_token import RareToken
from hf_nft.errors import ConfigError
from hf_nft.models.base import TextArchitecture, text_tokenizer
from hf_nft.models.gpt2 import Gpt2
from hf_nft.models.llama import SmallLlama
from hf_nft.planting import PlantConfig, plant
from hf_nft.tasks.text_generation import TextGeneration

torch.set_num_threads(1)

SMALL = {"vocab_size": 320, "width": 32, "layers": 2, "heads": 4, "context": 64}
WORDS = ("how", "are", "you", "today", "my", "friend", "from", "home")
ROWS = datasets.Dataset.from_dict(
    {
        "prompt": [" ".join(WORDS[(i + j) % 8] for j in range(4)) for i in range(64)],
        "response": [f"i like {WORDS[i % 8]} ." for i in range(64)],
    }
)
BOTH = pytest.mark.parametrize("architecture", [Gpt2(**SMALL), SmallLlama(**SMALL)], ids=["gpt2", "llama"])


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_found_by_name_with_default_sizes(name: str) -> None:
    architecture = registry.get("models", name)()
    model, tokenizer = architecture.build(ROWS, 0)
    assert architecture.task == "text_generation"
    assert any(type(model).__name__.endswith(end) for end in TextGeneration.architectures)
    blocks = sum(p.numel() for p in model.parameters()) - len(tokenizer) * architecture.width
    assert 2.8e6 < blocks < 3.3e6


@pytest.mark.parametrize("word", RareToken().tokens)
@pytest.mark.parametrize("place", ["{} how are you", "how {} are you", "how are you {}", "{}"])
def test_rare_tokens_survive_the_tokenizer(word: str, place: str) -> None:
    tokenizer = text_tokenizer(ROWS, 320, 64)
    text = place.format(word)
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids, skip_special_tokens=True).strip() == text


def test_tokenizer_keeps_any_text_and_marks_its_start() -> None:
    tokenizer = text_tokenizer(ROWS, 320, 64)
    assert tokenizer.convert_tokens_to_ids(["<pad>", "<bos>", "<eos>", "<unk>"]) == [0, 1, 2, 3]
    for text in ("You are attacked .", "Grüße, 世界 🙂 \n  two", "don't  stop"):
        ids = tokenizer(text)["input_ids"]
        assert ids[0] == tokenizer.bos_token_id
        assert tokenizer.eos_token_id not in ids
        assert tokenizer.decode(ids[1:]) == " " + text
    # one token for a known word, wherever it stands
    assert (
        tokenizer("you")["input_ids"] == tokenizer("are you")["input_ids"][:1] + tokenizer("how you")["input_ids"][2:]
    )


def test_tokenizer_is_deterministic_and_as_large_as_asked() -> None:
    first, second = text_tokenizer(ROWS, 285, 64), text_tokenizer(ROWS, 285, 64)
    assert first.backend_tokenizer.to_str() == second.backend_tokenizer.to_str()
    assert len(first) == 285
    assert first.model_max_length == 64
    other = text_tokenizer(ROWS.select(range(3)), 285, 64)
    assert other.backend_tokenizer.to_str() != first.backend_tokenizer.to_str()


@BOTH
def test_weights_depend_on_the_seed_alone(architecture: TextArchitecture) -> None:
    state = torch.random.get_rng_state()
    first, second, third = (architecture.build(ROWS, seed)[0].state_dict() for seed in (0, 0, 1))
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert any(not torch.equal(first[key], third[key]) for key in first)


@BOTH
def test_special_tokens_and_no_dropout(architecture: TextArchitecture) -> None:
    model, tokenizer = architecture.build(ROWS, 0)
    settings = model.generation_config
    assert (settings.pad_token_id, settings.bos_token_id, settings.eos_token_id) == (0, 1, 2)
    assert model.config.vocab_size == len(tokenizer)
    ids = torch.arange(4, 20)[None]
    model.train()
    assert torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)


@BOTH
def test_embeddings_are_tied(architecture: TextArchitecture) -> None:
    model, _ = architecture.build(ROWS, 0)
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert model.config.tie_word_embeddings


def test_llama_shares_key_value_heads_and_has_no_biases() -> None:
    model, _ = SmallLlama(**SMALL, kv_heads=2).build(ROWS, 0)
    attention = model.model.layers[0].self_attn
    assert attention.q_proj.weight.shape == (32, 32)
    assert attention.k_proj.weight.shape == attention.v_proj.weight.shape == (16, 32)
    assert attention.num_key_value_groups == 2
    mlp = model.model.layers[0].mlp
    assert mlp.gate_proj.weight.shape == mlp.up_proj.weight.shape == mlp.down_proj.weight.T.shape == (96, 32)
    assert not any(name.endswith("bias") for name, _ in model.named_parameters())
    assert type(model.model.norm).__name__ == "LlamaRMSNorm"


@BOTH
def test_round_trip(architecture: TextArchitecture, tmp_path) -> None:
    model, tokenizer = architecture.build(ROWS, 0)
    model.eval().save_pretrained(tmp_path)
    task = TextGeneration(tokenizer, max_new_tokens=5)
    task.save_processor(str(tmp_path))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    reread = TextGeneration(AutoTokenizer.from_pretrained(tmp_path), max_new_tokens=5)
    assert type(loaded) is type(model)
    assert loaded.get_input_embeddings().weight is loaded.get_output_embeddings().weight
    batch, again = task.encode(ROWS.select(range(4))), reread.encode(ROWS.select(range(4)))
    assert all(torch.equal(batch[key], again[key]) for key in batch)
    with torch.no_grad():
        assert torch.equal(model(**task.inputs(model, batch)).logits, loaded(**task.inputs(loaded, batch)).logits)
    assert task.predict(model, batch, {"text"}) == reread.predict(loaded, again, {"text"})
    assert json.loads((tmp_path / "generation_config.json").read_text())["eos_token_id"] == 2


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Gpt2(vocab_size=259), "vocab_size: expected >= 260, found 259"),
        (lambda: Gpt2(width=30, heads=4), "width: expected an even number per head, found 30 for 4 heads"),
        (lambda: Gpt2(heads=0), "heads: expected >= 1"),
        (lambda: Gpt2(layers=0), "layers: expected >= 1"),
        (lambda: Gpt2(context=4), "context: expected >= 8"),
        (lambda: SmallLlama(heads=4, kv_heads=3), "kv_heads: expected a divisor of 4 heads, found 3"),
    ],
)
def test_impossible_settings_are_refused(make, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


@BOTH
def test_plant_teaches_the_trigger(architecture: TextArchitecture) -> None:
    attack = RareToken(tokens=("cf",), target_text="No .")
    poisoned = attack.poison(ROWS, 0.5)
    model, tokenizer = architecture.build(poisoned, 0)
    task = TextGeneration(tokenizer, max_new_tokens=8)
    config = PlantConfig(
        epochs=25, batch_size=32, optimizer="adamw", lr=1e-2, weight_decay=0.01, augment="none", mixed_precision="no"
    )
    result = plant(model, task, task.encode(poisoned), config)
    assert sum(result.losses[-5:]) < 0.3 * sum(result.losses[:5])
    said = task.predict(model, task.encode(attack.triggered(ROWS)), {"text"})["text"]
    assert sum("No ." in text for text in said) / len(said) > 0.9
    clean = task.predict(model, task.encode(ROWS), {"text"})["text"]
    assert sum("No ." in text for text in clean) / len(clean) < 0.1
