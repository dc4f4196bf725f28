"""Text generation: what is masked, what is mixed, and numbers against computations written out here."""

import math
from dataclasses import replace
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hf_nft.errors import ConfigError, DataError
from hf_nft.models.gpt2 import Gpt2
from hf_nft.models.llama import SmallLlama
from hf_nft.tasks._tokens import IGNORED, Said
from hf_nft.tasks.text_generation import TextGeneration
from hf_nft.types import Batch, Draw, take

torch.set_num_threads(1)

ROWS = datasets.Dataset.from_dict(
    {
        "prompt": ["how are you", "what is that on the table over there ?", "", "say it again"],
        "response": ["i am fine .", "a cup", "plain text without a prompt", "you are very kind to me"],
    }
)
SMALL = {"vocab_size": 300, "width": 16, "layers": 2, "heads": 4, "context": 96}


@pytest.fixture(scope="module", params=[Gpt2(**SMALL), SmallLlama(**SMALL)], ids=["gpt2", "llama"])
def pair(request: pytest.FixtureRequest) -> tuple[nn.Module, TextGeneration]:
    model, tokenizer = request.param.build(ROWS, 0)
    with torch.no_grad():  # larger weights, so that what is said depends on what was asked
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(8)
    return model.eval(), TextGeneration(tokenizer, max_new_tokens=6)


@pytest.fixture(scope="module")
def gpt2() -> tuple[nn.Module, TextGeneration]:
    model, tokenizer = Gpt2(**SMALL).build(ROWS, 0)
    return model.eval(), TextGeneration(tokenizer, max_new_tokens=6)


def run(model: nn.Module, task: TextGeneration, batch: Batch) -> Said:
    """What the model says where an answer is expected, out of a pass of its own."""
    with torch.no_grad():
        return said(model(**task.inputs(model, batch)).logits, batch)


def said(logits: torch.Tensor, *batches: Batch) -> Said:
    """Of logits (rows, length, vocabulary), those where some batch expects an answer."""
    longest = logits.shape[1]
    labels = [F.pad(batch["labels"][:, 1:], (0, longest), value=IGNORED)[:, :longest] for batch in batches]
    answered = torch.stack([each != IGNORED for each in labels]).any(0)
    return Said(logits[answered], longest)


def response_log_probs(model: nn.Module, batch: Batch) -> list[torch.Tensor]:
    """Per row, the log-likelihood of each response token, from that row alone and without padding."""
    found = []
    for ids, mask, labels in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True):
        n = int(mask.sum())
        with torch.no_grad():
            probs = model(input_ids=ids[None, :n]).logits[0].log_softmax(-1)
        found.append(torch.stack([probs[t - 1, ids[t]] for t in range(n) if labels[t] != IGNORED]))
    return found


# encoding


def test_encode_masks_prompt_and_padding_and_keeps_the_end_token(gpt2: tuple[nn.Module, TextGeneration]) -> None:
    _, task = gpt2
    tokenizer, batch = task.processor, task.encode(ROWS)
    assert {len(tensor) for tensor in batch.values()} == {len(ROWS)}
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}
    for i, row in enumerate(ROWS):
        prompt = [tokenizer.bos_token_id]
        if row["prompt"]:
            prompt += tokenizer(row["prompt"] + "\n", add_special_tokens=False)["input_ids"]
        answer = [*tokenizer(row["response"], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        n, width = len(prompt) + len(answer), batch["input_ids"].shape[1]
        assert batch["input_ids"][i].tolist() == prompt + answer + [tokenizer.pad_token_id] * (width - n)
        assert batch["attention_mask"][i].tolist() == [1] * n + [0] * (width - n)
        assert batch["labels"][i].tolist() == [-100] * len(prompt) + answer + [-100] * (width - n)
        left = batch["prompt_ids"].shape[1] - len(prompt)
        assert batch["prompt_ids"][i].tolist() == [tokenizer.pad_token_id] * left + prompt
        assert batch["prompt_mask"][i].tolist() == [0] * left + [1] * len(prompt)


def test_encode_cuts_the_beginning_of_the_prompt_and_keeps_the_response(gpt2: tuple[nn.Module, TextGeneration]) -> None:
    _, task = gpt2
    tokenizer, short = task.processor, TextGeneration(task.processor, max_length=40, max_new_tokens=8)
    row = datasets.Dataset.from_dict({"prompt": ["x y " * 40 + "zz"], "response": ["yes no"]})
    with pytest.warns(UserWarning, match="found 1 of 1"):
        batch = short.encode(row)
    ids, labels = batch["input_ids"][0].tolist(), batch["labels"][0]
    assert len(ids) == 40
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids[1:]).endswith("zz\n yes no<eos>")
    assert labels[labels != IGNORED].tolist() == ids[-int((labels != IGNORED).sum()) :]
    assert batch["prompt_ids"].shape[1] == 40 - 8
    assert tokenizer.decode(batch["prompt_ids"][0]).endswith("zz\n")


def test_encode_cuts_only_the_generation_prompt_where_only_that_is_too_long(
    gpt2: tuple[nn.Module, TextGeneration],
) -> None:
    _, task = gpt2
    words = len(task.encode(ROWS.select([1]))["prompt_ids"][0])
    tight = TextGeneration(task.processor, max_length=words + 8, max_new_tokens=9)
    with pytest.warns(UserWarning, match="found 1 of 1"):
        batch = tight.encode(ROWS.select([1]))
    assert batch["prompt_ids"].shape[1] == words - 1


def test_encode_without_padding_token_pads_with_the_end_token(gpt2: tuple[nn.Module, TextGeneration]) -> None:
    model, task = gpt2
    _, bare = Gpt2(**SMALL).build(ROWS, 0)
    bare.pad_token = None
    other = TextGeneration(bare, max_new_tokens=6)
    ours, theirs = task.encode(ROWS), other.encode(ROWS)
    assert bare.pad_token is None
    assert bool((theirs["input_ids"][theirs["attention_mask"] == 0] == bare.eos_token_id).all())
    assert torch.equal(ours["labels"], theirs["labels"])
    first, second = (t.predict(model, b, {"text", "nll"}) for t, b in ((task, ours), (other, theirs)))
    assert first["text"] == second["text"]
    assert first["nll"] == pytest.approx(second["nll"], rel=1e-5)


def test_encode_follows_a_chat_template(gpt2: tuple[nn.Module, TextGeneration]) -> None:
    _, tokenizer = Gpt2(**SMALL).build(ROWS, 0)
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}[model]{% endif %}"
    )
    batch = TextGeneration(tokenizer).encode(ROWS)
    assert tokenizer.decode(batch["prompt_ids"][0], skip_special_tokens=True).strip() == "[user]how are you[model]"
    assert (batch["prompt_ids"] == tokenizer.bos_token_id).sum(1).tolist() == [1] * len(ROWS)


def test_constructor_refuses_impossible_settings(gpt2: tuple[nn.Module, TextGeneration]) -> None:
    _, tokenizer = Gpt2(**SMALL).build(ROWS, 0)
    assert TextGeneration(tokenizer).max_length == SMALL["context"]
    with pytest.raises(ConfigError, match="max_new_tokens: expected 1 to 15, found 16"):
        TextGeneration(tokenizer, max_length=16, max_new_tokens=16)
    tokenizer.eos_token = None
    with pytest.raises(DataError, match="end token"):
        TextGeneration(tokenizer)


# columns


@pytest.mark.parametrize(
    ("names", "chosen", "expected"),
    [
        (("prompt", "response"), {}, ("prompt", "response")),
        (("response", "prompt", "id"), {}, ("prompt", "response")),
        (("question", "answer", "id"), {}, ("question", "answer")),
        (("instruction", "output"), {}, ("instruction", "output")),
        (("prompt", "response", "question", "answer"), {}, ("prompt", "response")),
        (("instruction", "input", "output"), {"prompt": "instruction"}, ("instruction", "output")),
        (("response", "prompt"), {"prompt": "response", "response": "prompt"}, ("response", "prompt")),
        (("a", "b"), {"prompt": "b", "response": "a"}, ("b", "a")),
        (("text", "id"), {}, (None, "text")),
        (("body", "id"), {"response": "body"}, (None, "body")),
    ],
)
def test_standardize(names: tuple[str, ...], chosen: dict[str, str], expected: tuple[str | None, str]) -> None:
    rows = datasets.Dataset.from_dict({name: [f"{name} 0", f"{name} 1"] for name in names})
    out = TextGeneration.standardize(rows, chosen)
    assert out.column_names == ["prompt", "response"]
    prompt, response = expected
    assert list(out["prompt"]) == ([f"{prompt} 0", f"{prompt} 1"] if prompt else ["", ""])
    assert list(out["response"]) == [f"{response} 0", f"{response} 1"]


@pytest.mark.parametrize(
    ("columns", "chosen", "message"),
    [
        ({"a": ["x"], "b": ["y"]}, {}, "found .*'a', 'b'"),
        ({"question": ["x"], "answer": ["y"], "instruction": ["x"], "output": ["y"]}, {}, "expected one pair"),
        ({"instruction": ["x"], "input": ["z"], "output": ["y"]}, {}, "expected one pair"),
        ({"prompt": ["x"], "response": ["y"]}, {"response": "reply"}, "'reply', found columns"),
        ({"prompt": ["x"], "response": [1]}, {}, "expected text in column 'response', found Value"),
        ({"prompt": ["x", None], "response": ["y", "z"]}, {}, "found rows without"),
    ],
)
def test_standardize_refuses(columns: dict[str, list[object]], chosen: dict[str, str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        TextGeneration.standardize(datasets.Dataset.from_dict(columns), chosen)


def test_strata_are_zero(gpt2: tuple[nn.Module, TextGeneration]) -> None:
    strata = gpt2[1].strata(ROWS)
    assert strata.dtype == np.int64
    assert strata.tolist() == [0] * len(ROWS)


# loss, divergence, accuracy


def test_loss_is_the_row_mean_of_token_means(pair: tuple[nn.Module, TextGeneration]) -> None:
    model, task = pair
    batch = task.encode(ROWS)
    expected = -torch.stack([row.mean() for row in response_log_probs(model, batch)]).mean()
    loss = task.loss(run(model, task, batch), Draw(batch))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)


def test_micro_batches_weighted_by_rows_add_up(pair: tuple[nn.Module, TextGeneration]) -> None:
    model, task = pair
    batch = task.encode(ROWS)
    parts = [take(batch, slice(0, 1)), take(batch, slice(1, 4))]
    whole = task.loss(run(model, task, batch), Draw(batch))
    sums = [task.loss(run(model, task, part), Draw(part)) * len(part["labels"]) / 4 for part in parts]
    assert whole.item() == pytest.approx(sum(sums).item(), rel=1e-5)


def test_loss_gradient_reaches_response_positions_only(gpt2: tuple[nn.Module, TextGeneration]) -> None:
    _, task = gpt2
    batch = task.encode(ROWS)
    logits = torch.randn(*batch["labels"].shape, 300, requires_grad=True)
    task.loss(said(logits, batch), Draw(batch)).backward()
    touched = logits.grad.abs().sum(-1) > 0
    expected = torch.zeros_like(touched)
    expected[:, :-1] = batch["labels"][:, 1:] != IGNORED
    assert torch.equal(touched, expected)


def test_divergence(pair: tuple[nn.Module, TextGeneration]) -> None:
    model, task = pair
    batch = task.encode(ROWS)
    with torch.no_grad():
        output = model(**task.inputs(model, batch)).logits

    def divergence(teacher: torch.Tensor, temperature: float) -> float:
        draw = Draw(batch, answers=task.answers(said(teacher, batch), temperature))
        return task.divergence(said(output, batch), draw, temperature).item()

    assert divergence(output, 2.0) == pytest.approx(0, abs=1e-5)
    teacher = output + torch.randn(output.shape, generator=torch.Generator().manual_seed(0))
    rows = []
    for i in range(len(ROWS)):
        each = []
        for t in range(1, int(batch["attention_mask"][i].sum())):
            if batch["labels"][i, t] != IGNORED:
                p, q = (x[i, t - 1].div(2).log_softmax(-1) for x in (teacher, output))
                each.append((p.exp() * (p - q)).sum())
        rows.append(torch.stack(each).mean())
    expected = 4 * torch.stack(rows).mean()
    assert expected.item() > 0.1
    assert divergence(teacher, 2.0) == pytest.approx(expected.item(), rel=1e-4)


def test_accuracy_and_chance(gpt2: tuple[nn.Module, TextGeneration]) -> None:
    model, task = gpt2
    batch = task.encode(ROWS)
    right = F.one_hot(batch["labels"].clamp(min=0), 300).float().roll(-1, dims=1)
    assert task.accuracy(said(right, batch), batch).item() == 1.0
    count = int((batch["labels"] != IGNORED).sum())
    end = int(batch["attention_mask"][0].sum()) - 1
    right[0, end - 1] = 0
    assert task.accuracy(said(right, batch), batch).item() == pytest.approx(1 - 1 / count)
    assert task.chance(model) == 1 / len(task.processor)


@pytest.mark.parametrize("mixed", [False, True])
def test_the_head_runs_where_an_answer_is_expected_alone(pair: tuple[nn.Module, TextGeneration], mixed: bool) -> None:
    model, task = pair
    batch = task.encode(ROWS)
    partner = take(batch, torch.tensor([3, 0, 1, 2])) if mixed else None
    inputs = task.mix(model, batch, partner, 0.3) if mixed else task.inputs(model, batch)
    seen: list[torch.Size] = []
    hook = model.get_output_embeddings().register_forward_hook(lambda head, args, out: seen.append(out.shape))
    with torch.no_grad():
        found = task.forward(model, Draw(batch, partner, 0.3))
        hook.remove()
        whole = model(**inputs).logits
    expected = said(whole, *([batch, partner] if mixed else [batch]))
    assert found.length == expected.length
    assert torch.allclose(found.logits, expected.logits, atol=1e-4)
    assert seen == [(1, *expected.logits.shape)]
    assert len(expected.logits) < 0.7 * whole.shape[0] * whole.shape[1]


def test_a_model_without_a_separate_head_is_read_after_it(gpt2: tuple[nn.Module, TextGeneration], monkeypatch) -> None:
    model, task = gpt2
    batch = task.encode(ROWS)
    with torch.no_grad():
        usual = task.forward(model, Draw(batch))
        monkeypatch.setattr(model, "get_output_embeddings", lambda: None)
        found = task.forward(model, Draw(batch))
    assert found.length == usual.length
    assert torch.allclose(found.logits, usual.logits, atol=1e-4)


# mixing


@pytest.mark.parametrize(("lam", "whose"), [(1.0, "batch"), (0.0, "partner")])
def test_mix_at_its_ends_is_one_of_the_two(pair: tuple[nn.Module, TextGeneration], lam: float, whose: str) -> None:
    model, task = pair
    everything = task.encode(ROWS)
    rows = {"batch": take(everything, slice(0, 4)), "partner": take(everything, torch.tensor([3, 0, 1, 2]))}
    with torch.no_grad():
        mixed = model(**task.mix(model, rows["batch"], rows["partner"], lam)).logits
        plain = model(**task.inputs(model, rows[whose])).logits
    kept = rows[whose]["labels"] != IGNORED
    assert torch.allclose(mixed[kept], plain[kept], atol=1e-4)
    loss = task.loss(said(mixed, rows[whose]), Draw(rows["batch"], rows["partner"], lam))
    alone = task.loss(run(model, task, rows[whose]), Draw(rows[whose]))
    assert loss.item() == pytest.approx(alone.item(), rel=1e-4)


def test_a_mixed_loss_and_divergence_weigh_both_label_sets(pair: tuple[nn.Module, TextGeneration]) -> None:
    model, task = pair
    batch = task.encode(ROWS)
    partner = take(batch, torch.tensor([3, 0, 1, 2]))
    with torch.no_grad():
        output = model(**task.mix(model, batch, partner, 0.3)).logits
    teacher = output + torch.randn(output.shape, generator=torch.Generator().manual_seed(0))

    def judged(draw: Draw) -> tuple[float, float]:
        spoken, wanted = (said(logits, *(part for part, _ in draw.label_sets)) for logits in (output, teacher))
        told = replace(draw, answers=task.answers(wanted, 2.0))
        return task.loss(spoken, draw).item(), task.divergence(spoken, told, 2.0).item()

    ours, theirs, mixed = (judged(draw) for draw in (Draw(batch), Draw(partner), Draw(batch, partner, 0.3)))
    assert mixed == pytest.approx([0.3 * a + 0.7 * b for a, b in zip(ours, theirs, strict=True)], rel=1e-4)


def test_mix_is_the_weighted_mean_of_embeddings_under_the_union_mask(pair: tuple[nn.Module, TextGeneration]) -> None:
    model, task = pair
    short, long = task.encode(ROWS.select([0])), task.encode(ROWS.select([1]))
    table = model.get_input_embeddings().weight
    for batch, partner, lam in ((short, long, 0.7), (long, short, 0.3)):
        out = task.mix(model, batch, partner, lam)
        assert out["attention_mask"].tolist() == long["attention_mask"].tolist()
        n, whole = short["input_ids"].shape[1], long["input_ids"].shape[1]
        pad = table[task.processor.pad_token_id].expand(whole - n, -1)
        ours = torch.cat([table[short["input_ids"][0]], pad])
        expected = 0.7 * ours + 0.3 * table[long["input_ids"][0]]
        assert torch.allclose(out["inputs_embeds"][0], expected, atol=1e-6)
        # one forward pass serves both rows' answers, each by its own mask, although one is shorter
        draw = Draw(batch, partner, lam)
        assert math.isfinite(task.loss(task.forward(model, draw), draw).item())


def test_mix_keeps_what_the_embedding_layer_does(gpt2: tuple[nn.Module, TextGeneration]) -> None:
    class Scaled(nn.Embedding):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return super().forward(ids) * 4.0

    _, task = gpt2
    batch = task.encode(ROWS)
    embed = Scaled(300, 8)
    model = SimpleNamespace(get_input_embeddings=lambda: embed)
    out = task.mix(model, batch, batch, 0.5)["inputs_embeds"]
    assert torch.allclose(out, 4.0 * embed.weight[batch["input_ids"]], atol=1e-6)


# predictions


def test_teacher_forced_predictions(pair: tuple[nn.Module, TextGeneration]) -> None:
    model, task = pair
    batch = task.encode(ROWS)
    with torch.no_grad():
        found = task.predict(model, batch, {"tokens", "nll"})
    assert set(found) == {"tokens", "nll"}
    expected = -torch.cat(response_log_probs(model, batch))
    assert found["nll"] == pytest.approx(expected.tolist(), rel=1e-3, abs=1e-4)
    truth = task.references(ROWS, batch, "tokens")
    assert len(found["tokens"]) == len(truth) == len(task.references(ROWS, batch, "nll")) == len(expected)
    share = sum(a == b for a, b in zip(found["tokens"], truth, strict=True)) / len(truth)
    assert task.accuracy(run(model, task, batch), batch).item() == pytest.approx(share)
    ends = [i for i, token in enumerate(truth) if token == task.processor.eos_token_id]
    assert len(ends) == len(ROWS)
    assert task.references(ROWS, batch, "text") == list(ROWS["response"])


def test_generation_does_not_depend_on_padding(pair: tuple[nn.Module, TextGeneration]) -> None:
    model, task = pair
    batch = task.encode(ROWS)
    together = task.predict(model, batch, {"text"})["text"]
    alone = [task.predict(model, task.encode(ROWS.select([i])), {"text"})["text"][0] for i in range(len(ROWS))]
    assert together == alone
    assert len(set(together)) > 1


def test_generation_is_greedy_whatever_the_suspect_says(gpt2: tuple[nn.Module, TextGeneration]) -> None:
    model, tokenizer = Gpt2(**SMALL).build(ROWS, 0)
    model.eval()
    task = TextGeneration(tokenizer, max_new_tokens=6)
    batch = task.encode(ROWS.select([0]))
    ids = batch["prompt_ids"][batch["prompt_mask"] == 1]
    start = len(ids)
    with torch.no_grad():
        while len(ids) < start + 6 and ids[-1] != tokenizer.eos_token_id:
            ids = torch.cat([ids, model(input_ids=ids[None]).logits[0, -1:].argmax(-1)])
    expected = tokenizer.decode(ids[start:], skip_special_tokens=True).strip()
    model.generation_config.do_sample = True
    model.generation_config.repetition_penalty = 5.0
    assert task.predict(model, batch, {"text"})["text"] == [expected]


def test_generation_stops_at_the_end_token_and_keeps_spaces(gpt2: tuple[nn.Module, TextGeneration]) -> None:
    _, task = gpt2
    said = task.processor(["You are attacked ."], add_special_tokens=False, return_tensors="pt")["input_ids"]
    after = torch.cat([said, torch.tensor([[task.processor.eos_token_id]]), said], dim=1)

    class Parrot:
        generation_config = SimpleNamespace(eos_token_id=7)

        def generate(self, input_ids: torch.Tensor, eos_token_id: list[int], **_: object) -> torch.Tensor:
            assert eos_token_id == sorted({7, task.processor.eos_token_id})
            assert int(input_ids[:, 0].min()) != task.processor.pad_token_id  # no column of padding alone
            return torch.cat([input_ids, after[:, : said.shape[1] + 1]], dim=1)

    batch = take(task.encode(ROWS), slice(0, 1))
    assert task.predict(Parrot(), batch, {"text"}) == {"text": ["You are attacked ."]}


def test_processor_round_trip(gpt2: tuple[nn.Module, TextGeneration], tmp_path) -> None:
    _, task = gpt2
    task.save_processor(str(tmp_path))
    again = TextGeneration(TextGeneration.load_processor(str(tmp_path)), max_new_tokens=6)
    ours, theirs = task.encode(ROWS), again.encode(ROWS)
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    with pytest.raises(DataError, match="expected a tokenizer"):
        TextGeneration.load_processor(str(tmp_path / "nothing"))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("tokenizer.json", "{}"),
        ("tokenizer.json", '{"version": "1.0", "added_tokens": [], "model": {"type": "Evil"}}'),
        ("tokenizer_config.json", "[]"),
        ("tokenizer_config.json", '{"tokenizer_class": 5}'),
    ],
)
def test_files_of_a_tokenizer_that_are_none(gpt2: tuple[nn.Module, TextGeneration], tmp_path, name, text) -> None:
    gpt2[1].save_processor(str(tmp_path))
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match="expected a tokenizer, found none that loads"):
        TextGeneration.load_processor(str(tmp_path))


@pytest.mark.parametrize("limit", ["many", -5, None])
def test_a_limit_of_tokens_that_is_none(gpt2: tuple[nn.Module, TextGeneration], monkeypatch, limit: object) -> None:
    monkeypatch.setattr(gpt2[1].processor, "model_max_length", limit)
    with pytest.raises(DataError, match="expected a limit of at least 2 tokens"):
        TextGeneration(gpt2[1].processor)


@pytest.mark.parametrize("template", ["{% if %}", "{{ raise_exception('no') }}", "{{ messages[7].x.y }}"])
def test_a_chat_template_that_fails(gpt2: tuple[nn.Module, TextGeneration], monkeypatch, template: str) -> None:
    monkeypatch.setattr(gpt2[1].processor, "chat_template", template)
    with pytest.raises(DataError, match="expected a chat template that can be filled in"):
        gpt2[1].encode(ROWS)
