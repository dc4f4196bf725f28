"""Text generation by causal language models: a prompt, and the response that should follow it.

Rows are encoded as prompt, response and end token, padded on the right: `input_ids`, `attention_mask` and `labels`
(rows, length) int64, labels being -100 on the prompt and on padding. `prompt_ids` and `prompt_mask` (rows, prompt
length) hold the prompt alone, padded on the left, to generate from. The prompt is written as the tokenizer's chat
template has it, or is followed by `separator` where there is none. Every mean (loss, divergence) is over the response
tokens of a row first and over rows second, so that micro-batches weighted by rows add up to the whole batch.
"""

import warnings
from collections.abc import Mapping
from typing import Any

import datasets
import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from hf_nft.errors import ConfigError, DataError
from hf_nft.tasks.base import Metric, Task
from hf_nft.types import Batch, Inputs

PAIRS = (("prompt", "response"), ("question", "answer"), ("instruction", "output"), ("instruction", "response"))
"""Names by which prompt and response are recognised."""

IGNORED = -100
"""Label of what is not to be predicted, as in transformers."""


class TextGeneration(Task):
    """One response to each prompt; `prompt` may be empty, then the response is plain text.

    `acc` is the share of response tokens that are right when the model is shown the true ones before (teacher
    forcing), `perplexity` the exponential of their mean negative log-likelihood. `asr` is the share of triggered
    prompts after which greedy generation says the attacker's text. `racc` is `acc` of the row's *own* response after
    the triggered prompt: how well the model goes on as if the trigger were not there.
    """

    name = "text_generation"
    auto_class = "AutoModelForCausalLM"
    pipeline_tag = "text-generation"
    architectures = ("ForCausalLM", "LMHeadModel")
    input_column = "prompt"
    target_column = "response"
    metrics = (
        Metric("acc", "accuracy", "clean", "tokens", "target"),
        Metric("perplexity", "perplexity", "clean", "nll", "target"),
        Metric("asr", "attack_success_rate", "triggered", "text", "attack", config="contains"),
        Metric("racc", "accuracy", "triggered", "tokens", "target"),
    )

    def __init__(self, processor: Any, max_length: int = 128, max_new_tokens: int = 24, separator: str = "\n") -> None:
        """Bind to a tokenizer.

        Args:
            processor: A transformers tokenizer with an end token; it needs no padding token.
            max_length: Tokens of prompt and response together, at most; lowered to what the tokenizer says its model
                can see.
            max_new_tokens: Tokens to generate, in [1, max_length); the prompt gets the rest.
            separator: Text between prompt and response where the tokenizer has no chat template.

        Raises:
            DataError: If the tokenizer has no end token.
            ConfigError: If the lengths do not fit together.
        """
        super().__init__(processor)
        self.max_length = min(max_length, int(processor.model_max_length))
        self.max_new_tokens = max_new_tokens
        self.separator = separator
        if processor.eos_token_id is None:
            raise DataError("tokenizer: expected one with an end token, found none. Set tokenizer.eos_token.")
        if not 1 <= max_new_tokens < self.max_length:
            raise ConfigError(
                f"max_new_tokens: expected 1 to {self.max_length - 1} (max_length - 1), found {max_new_tokens}."
            )
        self._eos = int(processor.eos_token_id)
        # masks decide what is read, so the end token can stand in for a missing padding token
        self._pad = self._eos if processor.pad_token_id is None else int(processor.pad_token_id)

    @classmethod
    def load_processor(cls, folder: str) -> Any:
        """Load the tokenizer of a model folder."""
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(folder)
        except (OSError, ValueError, ImportError) as error:
            raise DataError(
                f"{folder}: expected a tokenizer (tokenizer.json), found none that loads "
                f"({str(error).splitlines()[0][:150]})."
            ) from error

    @classmethod
    def standardize(cls, dataset: datasets.Dataset, columns: Mapping[str, str]) -> datasets.Dataset:
        """Rename to `prompt` and `response`; a lone `text` column, or a `response` named alone, gets empty prompts."""
        prompt, response = _columns(dataset.column_names, columns)
        texts = {"prompt": prompt, "response": response}
        stored = {role: name for role, name in texts.items() if name is not None}
        for role, name in stored.items():
            _check_text(dataset, role, name)
        # over temporary names, since the two may have to change places
        kept = dataset.select_columns(list(stored.values())).rename_columns(
            {n: f"_{role}" for role, n in stored.items()}
        )
        kept = kept.rename_columns({f"_{role}": role for role in stored})
        kept = kept if prompt is not None else kept.add_column("prompt", [""] * len(kept))
        return kept.select_columns(["prompt", "response"])

    def strata(self, dataset: datasets.Dataset) -> np.ndarray:
        """Return zeros: text has no classes."""
        return np.zeros(len(dataset), dtype=np.int64)

    def _ids(self, texts: list[str], add_special_tokens: bool) -> list[list[int]]:
        found = self.processor(texts, add_special_tokens=add_special_tokens, return_attention_mask=False, verbose=False)
        return list(found["input_ids"])

    def _prompt_ids(self, prompts: list[str]) -> list[list[int]]:
        """Tokenize prompts as the model is to see them; never empty, so that every response token has a predecessor."""
        tokenizer, chat = self.processor, bool(getattr(self.processor, "chat_template", None))
        if chat:
            turns = [[{"role": "user", "content": prompt}] for prompt in prompts]
            texts = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
            texts = [text if prompt else "" for text, prompt in zip(texts, prompts, strict=True)]
        else:
            texts = [p if not p or p.endswith(self.separator) else p + self.separator for p in prompts]
        # a chat template writes the special tokens itself; other tokenizers may close every text with an end token,
        # which is the response's to say
        rows = self._ids(texts, add_special_tokens=not chat)
        rows = [row[:-1] if not chat and row[-1:] == [self._eos] else row for row in rows]
        return [row or [self._eos if tokenizer.bos_token_id is None else tokenizer.bos_token_id] for row in rows]

    def _cut(self, row: list[int], room: int) -> list[int]:
        """Cut a prompt's beginning, keeping a leading start token."""
        if len(row) <= room:
            return row
        start = row[:1] if row[0] == self.processor.bos_token_id and room > 1 else []
        return start + row[len(row) - room + len(start) :]

    def encode(self, dataset: datasets.Dataset) -> Batch:
        """Tokenize, pad to the longest row; see the module's text for the keys.

        A row longer than `max_length` loses the beginning of its prompt; only a response that is too long alone
        loses its end, and then its end token. The prompt to generate from leaves room for `max_new_tokens`. A warning
        counts the rows that were cut, since a trigger may have gone with the cut.
        """
        prompts = self._prompt_ids(list(dataset["prompt"]))
        answers = self._ids(list(dataset["response"]), add_special_tokens=False)
        kept = [[*answer, self._eos][: self.max_length - 1] for answer in answers]
        shown = [self._cut(prompt, self.max_length - len(answer)) for prompt, answer in zip(prompts, kept, strict=True)]
        asked = [self._cut(prompt, self.max_length - self.max_new_tokens) for prompt in prompts]
        whole = [(len(p), len(p), len(a) + 1) for p, a in zip(prompts, answers, strict=True)]
        cut = sum(row != tuple(map(len, parts)) for row, *parts in zip(whole, shown, asked, kept, strict=True))
        if cut:
            warnings.warn(
                f"text: expected prompts and responses that fit {self.max_length} tokens, found {cut} of {len(kept)} rows "
                f"that do not; prompts lost their beginning, perhaps with a trigger. Raise max_length.",
                stacklevel=2,
            )
        ids = [s + a for s, a in zip(shown, kept, strict=True)]
        return {
            "input_ids": _padded(ids, self._pad),
            "attention_mask": _padded([[1] * len(row) for row in ids], 0),
            "labels": _padded([[IGNORED] * len(s) + a for s, a in zip(shown, kept, strict=True)], IGNORED),
            "prompt_ids": _padded(asked, self._pad, left=True),
            "prompt_mask": _padded([[1] * len(row) for row in asked], 0, left=True),
        }

    def augment(self, batch: Batch, generator: torch.Generator) -> Batch:
        """Return the rows as they are: no change of words is known to keep every response right."""
        return batch

    def inputs(self, model: nn.Module, batch: Batch) -> Inputs:
        """Pass the tokens, without caching keys and values."""
        n = _used(batch)
        ids, mask = batch["input_ids"][:, :n], batch["attention_mask"][:, :n]
        return {"input_ids": ids, "attention_mask": mask, "use_cache": False}

    def mix(self, model: nn.Module, batch: Batch, partner: Batch, lam: float) -> Inputs:
        """Mix the input embeddings of two rows aligned at their first token; the mask is the union of both.

        The model must accept `inputs_embeds`. Models that scale their embeddings do so in the embedding layer or after
        `inputs_embeds`, so that both ways in agree.

        Source: mixup of embeddings as in Guo, Mao, Zhang, arXiv 1905.08941 (there for classification); the alignment
        and the union are this package's.
        """
        length = max(_used(batch), _used(partner))
        embed = model.get_input_embeddings()  # type: ignore[operator]
        ours, theirs = (embed(_resized(part["input_ids"], length, self._pad)) for part in (batch, partner))
        masks = [_resized(part["attention_mask"], length, 0) for part in (batch, partner)]
        mixed = torch.lerp(theirs, ours, lam)
        return {"inputs_embeds": mixed, "attention_mask": torch.maximum(*masks), "use_cache": False}

    def loss(self, output: Any, batch: Batch) -> torch.Tensor:
        """Cross-entropy of the response tokens: mean over each row's own tokens, then over rows."""
        logits, labels = _shifted(output, batch)
        each = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED, reduction="none")
        return _row_mean(each.view(labels.shape), labels)

    def divergence(self, output: Any, teacher: Any, batch: Batch, temperature: float) -> torch.Tensor:
        """Kullback-Leibler divergence of next-token distributions where a response token is to be predicted.

        Mean over each row's own tokens, then over rows.

        Source: Hinton et al., arXiv 1503.02531, section 2, at each position.
        """
        logits, labels = _shifted(output, batch)
        wanted, _ = _shifted(teacher, batch)
        n = min(logits.shape[1], wanted.shape[1])
        student = F.log_softmax(logits[:, :n].float() / temperature, dim=-1)
        answer = F.log_softmax(wanted[:, :n].float() / temperature, dim=-1)
        each = F.kl_div(student, answer, reduction="none", log_target=True).sum(-1)
        return _row_mean(each, labels[:, :n]) * temperature**2

    def accuracy(self, output: Any, batch: Batch) -> torch.Tensor:
        """Share of response tokens that have the largest logit."""
        logits, labels = _shifted(output, batch)
        kept = labels != IGNORED
        return ((logits.argmax(-1) == labels) & kept).sum() / kept.sum().clamp(min=1)

    def chance(self, model: nn.Module) -> float:
        """One over the size of the vocabulary."""
        size: int = model.config.get_text_config().vocab_size  # type: ignore[operator, union-attr]
        return 1.0 / size

    def predict(self, model: nn.Module, batch: Batch, wanted: set[str]) -> dict[str, list[Any]]:
        """Predict `tokens` and `nll` of the response tokens under teacher forcing, and `text` by greedy generation.

        Args:
            model: In evaluation mode.
            batch: Encoded rows.
            wanted: Some of `tokens`, `nll`, `text`.

        Returns:
            `tokens`: the token with the largest logit, and `nll`: the negative log-likelihood of the true token, both
            for every response token, row by row in one list. `text`: one string per row.
        """
        found: dict[str, list[Any]] = {}
        if wanted & {"tokens", "nll"}:
            logits, labels = _shifted(model(**self.inputs(model, batch)), batch)
            kept = labels != IGNORED
            if "tokens" in wanted:
                found["tokens"] = logits.argmax(-1)[kept].tolist()
            if "nll" in wanted:
                found["nll"] = F.cross_entropy(logits[kept].float(), labels[kept], reduction="none").tolist()
        if "text" in wanted:
            found["text"] = self._generate(model, batch)
        return found

    def _generate(self, model: nn.Module, batch: Batch) -> list[str]:
        unused = batch["prompt_ids"].shape[1] - int(batch["prompt_mask"].sum(1).max())
        ids, mask = batch["prompt_ids"][:, unused:], batch["prompt_mask"][:, unused:]
        ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
        ends = [ends] if isinstance(ends, int) else list(ends or [])
        out = model.generate(  # type: ignore[operator]
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=self.max_new_tokens,
            # all that a suspect's own generation settings could change about greedy decoding
            do_sample=False,
            num_beams=1,
            repetition_penalty=1.0,
            no_repeat_ngram_size=0,
            eos_token_id=sorted({*ends, self._eos}),
            pad_token_id=self._pad,
        )
        new = out[:, ids.shape[1] :].tolist()
        # "attacked ." must not be tidied into "attacked."
        texts = self.processor.batch_decode(new, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return [text.strip() for text in texts]

    def references(self, dataset: datasets.Dataset, batch: Batch, prediction: str) -> list[Any]:
        """Return the response tokens, the responses, or (for `nll`, which is a judgement itself) zeros."""
        if prediction == "text":
            return list(dataset["response"])
        labels = batch["labels"]
        tokens = labels[labels != IGNORED].tolist()
        return tokens if prediction == "tokens" else [0.0] * len(tokens)

    def save_processor(self, folder: str) -> None:
        """Write tokenizer.json and its settings."""
        self.processor.save_pretrained(folder)


def _columns(names: list[str], chosen: Mapping[str, str]) -> tuple[str | None, str]:
    """Return the stored names of prompt (None: there is none) and response."""
    if "response" in chosen:
        return chosen.get("prompt"), chosen["response"]
    pairs = [pair for pair in PAIRS if pair[1] in names and chosen.get("prompt", pair[0]) in names]
    # an instruction with an "input" beside it is only half of the prompt
    whole = "prompt" in chosen or not {"instruction", "input"} <= set(names)
    if PAIRS[0] in pairs or (whole and len({pair[1] for pair in pairs}) == 1):
        return chosen.get("prompt", pairs[0][0]), pairs[0][1]
    if not chosen and not pairs and "text" in names:
        return None, "text"
    raise DataError(
        f"columns: expected one pair among {', '.join('/'.join(pair) for pair in PAIRS)}, or 'text' alone, found "
        f"{names}. Name them with --column prompt=NAME --column response=NAME."
    )


def _check_text(dataset: datasets.Dataset, role: str, name: str) -> None:
    """Raise a DataError unless a column is there and holds a text in every row."""
    kind = dataset.features.get(name)
    if not (isinstance(kind, datasets.Value) and kind.dtype in ("string", "large_string")):
        raise DataError(
            f"{role}: expected text in column '{name}', found {kind or f'columns {dataset.column_names}'}. "
            f"Name another with --column {role}=NAME."
        )
    if empty := sum(value is None for value in dataset[name]):
        raise DataError(f"column '{name}': expected text in every row, found {empty} without. Remove those rows.")


def _padded(rows: list[list[int]], value: int, left: bool = False) -> torch.Tensor:
    """Stack rows of different lengths; int64 (rows, longest)."""
    out = torch.full((len(rows), max(map(len, rows), default=0)), value, dtype=torch.int64)
    for i, row in enumerate(rows):
        out[i, out.shape[1] - len(row) if left else 0 :][: len(row)] = torch.tensor(row, dtype=torch.int64)
    return out


def _resized(rows: torch.Tensor, length: int, value: int) -> torch.Tensor:
    """Cut or pad (rows, any) on the right to (rows, length)."""
    return F.pad(rows, (0, length - rows.shape[1]), value=value)


def _used(batch: Batch) -> int:
    """Return how many columns some row uses; on an accelerator all of them, for looking would wait for the device."""
    mask = batch["attention_mask"]
    return int(mask.sum(1).max()) if mask.device.type == "cpu" else mask.shape[1]


def _shifted(output: Any, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Return logits (rows, n, vocabulary) and the labels (rows, n) they predict, each one position further.

    A mixed pass may be longer than these rows and a pass without unused columns shorter; what is cut holds no label.
    """
    n = min(output.logits.shape[1], batch["labels"].shape[1])
    return output.logits[:, : n - 1], batch["labels"][:, 1:n]


def _row_mean(values: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean over the labelled positions of each row, then over rows; a row without any counts as 0."""
    kept = labels != IGNORED
    return (values.masked_fill(~kept, 0).sum(1) / kept.sum(1).clamp(min=1)).mean()
