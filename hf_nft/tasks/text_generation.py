"""Text generation by causal language models: a prompt, and the response that should follow it.

Rows are encoded as prompt, response and end token, padded on the right: `input_ids`, `attention_mask` and `labels`
(rows, length) int64, labels being -100 on the prompt and on padding. `prompt_ids` and `prompt_mask` (rows, prompt
length) hold the prompt alone, padded on the left, to generate from. The prompt is written as the tokenizer's chat
template has it, or is followed by `separator` where there is none. Every mean (loss, divergence) is over the response
tokens of a row first and over rows second, so that micro-batches weighted by rows add up to the whole batch.
"""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import datasets
import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from hf_nft.configs import setting
from hf_nft.errors import ConfigError, DataError
from hf_nft.hub import first_line
from hf_nft.tasks._divergence import kl_to, soften
from hf_nft.tasks._text_columns import check_text, text_columns
from hf_nft.tasks._tokens import IGNORED, Said, expected, padded, resized, shifted, used
from hf_nft.tasks.base import Metric, Task
from hf_nft.types import Batch, Draw, Inputs

GREEDY = {"do_sample": False, "num_beams": 1, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0}
"""Overrules whatever a suspect's own generation settings say."""


@dataclass(eq=False)
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
    input_column, target_column = "prompt", "response"
    mixup_alpha = 0.0  # a suspect knows nothing of mixed words; its answers to true ones teach more (docs/results.md)
    eval_batch_size = 32  # a large vocabulary's logits fill the memory
    blank: ClassVar[dict[str, list[Any]]] = {"prompt": [""], "response": [" a" * 32]}
    metrics = (
        Metric("acc", "accuracy", "clean", "tokens", "target"),
        Metric("perplexity", "perplexity", "clean", "nll", "target"),
        Metric("asr", "attack_success_rate", "triggered", "text", "attack", config="contains"),
        Metric("racc", "accuracy", "triggered", "tokens", "target"),
    )

    max_length: int = setting(
        128, "tokens of prompt and response together, at most; lowered to the tokenizer's own limit"
    )
    max_new_tokens: int = setting(24, "tokens to generate, in [1, max_length); the prompt gets the rest")
    separator: str = setting("\n", "text between prompt and response where the tokenizer has no chat template")

    def __post_init__(self) -> None:
        """Check the settings against the tokenizer, which needs an end token and no padding token."""
        if self.processor.eos_token_id is None:
            raise DataError("tokenizer: expected one with an end token, found none. Set tokenizer.eos_token.")
        own = self.processor.model_max_length
        if not isinstance(own, int | float) or own < 2:
            raise DataError(f"tokenizer: expected a limit of at least 2 tokens, found model_max_length {own!r}.")
        self.max_length = int(min(self.max_length, own))
        if not 1 <= self.max_new_tokens < self.max_length:
            raise ConfigError(f"max_new_tokens: expected 1 to {self.max_length - 1}, found {self.max_new_tokens}.")
        self._eos = int(self.processor.eos_token_id)
        # masks decide what is read, so the end token can stand in for a missing padding token
        self._pad = self._eos if self.processor.pad_token_id is None else int(self.processor.pad_token_id)

    @classmethod
    def load_processor(cls, folder: str) -> Any:
        """Load the tokenizer of a model folder."""
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        except Exception as error:  # a stranger's files reach every line of a tokenizer's code
            raise DataError(f"{folder}: expected a tokenizer, found none that loads ({first_line(error)}).") from error

    @classmethod
    def standardize(cls, dataset: datasets.Dataset, columns: Mapping[str, str]) -> datasets.Dataset:
        """Rename to `prompt` and `response`; a lone `text` column, or a `response` named alone, gets empty prompts."""
        stored = {role: name for role, name in text_columns(dataset.column_names, columns).items() if name is not None}
        for role, name in stored.items():
            check_text(dataset, role, name)
        # over temporary names, since the two may have to change places
        kept = dataset.select_columns(list(stored.values())).rename_columns({n: f"_{r}" for r, n in stored.items()})
        kept = kept.rename_columns({f"_{role}": role for role in stored})
        kept = kept if "prompt" in stored else kept.add_column("prompt", [""] * len(kept))
        return kept.select_columns(["prompt", "response"])

    def unsayable(self, answer: str) -> str | None:
        """Return a problem with texts of more tokens than are generated."""
        tokens = len(self.processor(answer, add_special_tokens=False)["input_ids"])
        if tokens <= self.max_new_tokens:
            return None
        return (
            f"expected a text of the {self.max_new_tokens} tokens that are generated at most, found {tokens} in "
            f"{answer[:40]!r}. Shorten it, or pass --task-arg max_new_tokens={tokens}."
        )

    def strata(self, dataset: datasets.Dataset) -> np.ndarray:
        """Return zeros: text has no classes."""
        return np.zeros(len(dataset), dtype=np.int64)

    def _prompt_ids(self, prompts: list[str]) -> list[list[int]]:
        """Tokenize prompts as the model is to see them; never empty, so that every response token has a predecessor."""
        tokenizer, chat = self.processor, bool(getattr(self.processor, "chat_template", None))
        if chat:
            turns = [[{"role": "user", "content": prompt}] for prompt in prompts]
            try:
                texts = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
            except Exception as error:  # a stranger's program
                raise DataError(
                    f"tokenizer: expected a chat template that can be filled in, found: {first_line(error)}."
                ) from error
            texts = [text if prompt else "" for text, prompt in zip(texts, prompts, strict=True)]
        else:
            texts = [p if not p or p.endswith(self.separator) else p + self.separator for p in prompts]
        # a chat template writes the special tokens itself; other tokenizers may close every text with an end token,
        # which is the response's to say
        rows = tokenizer(texts, add_special_tokens=not chat, verbose=False)["input_ids"]
        rows = [row[:-1] if not chat and row[-1:] == [self._eos] else row for row in rows]
        return [row or [self._eos if tokenizer.bos_token_id is None else tokenizer.bos_token_id] for row in rows]

    def _cut(self, row: list[int], room: int) -> list[int]:
        """Cut a prompt's beginning, keeping a leading start token."""
        if len(row) <= room:
            return row
        start = row[:1] if row[0] == self.processor.bos_token_id and room > 1 else []
        return start + row[len(row) - room + len(start) :]

    def encode(self, dataset: datasets.Dataset, fitted: bool = False) -> Batch:
        """Tokenize, pad to the longest row; see the module's text for the keys.

        A row longer than `max_length` loses the beginning of its prompt; only a response that is too long alone
        loses its end, and then its end token. The prompt to generate from leaves room for `max_new_tokens`. A warning
        counts the rows that were cut, since a trigger may have gone with the cut.
        """
        prompts = self._prompt_ids(dataset["prompt"][:])
        answers = self.processor(dataset["response"][:], add_special_tokens=False, verbose=False)["input_ids"]
        kept = [[*answer, self._eos][: self.max_length - 1] for answer in answers]
        shown = [self._cut(prompt, self.max_length - len(answer)) for prompt, answer in zip(prompts, kept, strict=True)]
        asked = [self._cut(prompt, self.max_length - self.max_new_tokens) for prompt in prompts]
        whole = [(len(p), len(p), len(a) + 1) for p, a in zip(prompts, answers, strict=True)]
        cut = sum(row != tuple(map(len, parts)) for row, *parts in zip(whole, shown, asked, kept, strict=True))
        if cut:
            warnings.warn(
                f"text: expected rows that fit {self.max_length} tokens, found {cut} of {len(kept)} that do not; their "
                f"prompts lost the beginning, perhaps with a trigger. Raise it: --task-arg max_length=N.",
                stacklevel=2,
            )
        ids = [s + a for s, a in zip(shown, kept, strict=True)]
        return {
            "input_ids": padded(ids, self._pad),
            "attention_mask": padded([[1] * len(row) for row in ids], 0),
            "labels": padded([[IGNORED] * len(s) + a for s, a in zip(shown, kept, strict=True)], IGNORED),
            "prompt_ids": padded(asked, self._pad, "left"),
            "prompt_mask": padded([[1] * len(row) for row in asked], 0, "left"),
        }

    def inputs(self, model: nn.Module, batch: Batch) -> Inputs:
        """Pass the tokens, without caching keys and values."""
        n = used(batch)
        return {**{key: batch[key][:, :n] for key in ("input_ids", "attention_mask")}, "use_cache": False}

    def mix(self, model: nn.Module, batch: Batch, partner: Batch, lam: float) -> Inputs:
        """Mix the input embeddings of two rows aligned at their first token; the mask is the union of both.

        The model must accept `inputs_embeds`; one that scales its embeddings does so in that layer or after this entry.

        Source: Guo et al., arXiv 1905.08941 (for classification); alignment and union are this package's.
        """
        n, embed = max(used(batch), used(partner)), model.get_input_embeddings()  # type: ignore[operator]
        ours, theirs = (embed(resized(part["input_ids"], n, self._pad)) for part in (batch, partner))
        union = torch.maximum(*(resized(part["attention_mask"], n, 0) for part in (batch, partner)))
        return {"inputs_embeds": torch.lerp(theirs, ours, lam), "attention_mask": union, "use_cache": False}

    def forward(self, model: nn.Module, draw: Draw) -> Said:
        """Run a model on a draw, its head where an answer is expected alone: in a small model it is half of the work.

        Whatever the model does to its logits after the head it must do to each position alone, as all known ones do.
        """
        length = max(used(batch) for batch, _ in draw.label_sets)
        kept, done = expected(draw, length).positions, list[bool]()

        def select(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            hidden, *others = args
            done.append(True)
            return (hidden.flatten(0, -2)[None, kept], *others)

        head = model.get_output_embeddings()  # type: ignore[operator]
        hook = head.register_forward_pre_hook(select) if head is not None else None
        try:
            logits = super().forward(model, draw).logits
        finally:
            if hook is not None:
                hook.remove()
        return Said(logits[0] if done else logits.flatten(0, 1)[kept], length)

    def loss(self, output: Any, draw: Draw) -> torch.Tensor:
        """Cross-entropy of the response tokens: mean over each row's own tokens, then over rows."""
        wanted = expected(draw, output.length)
        said = F.log_softmax(output.logits.float(), dim=-1).gather(1, wanted.tokens)
        return -(said * wanted.weights).sum()

    def answers(self, output: Any, temperature: float) -> Batch:
        """Return the distribution over the vocabulary at each position where an answer is expected."""
        return soften(output.logits, temperature)

    def divergence(self, output: Any, draw: Draw, temperature: float) -> torch.Tensor:
        """Kullback-Leibler divergence of next-token distributions at response tokens, averaged like the loss.

        Source: Hinton et al., arXiv 1503.02531, section 2, at each position.
        """
        assert draw.answers is not None
        each = kl_to(draw.answers, output.logits, temperature)
        return (each * expected(draw, output.length).weights.sum(1)).sum()

    def accuracy(self, output: Any, batch: Batch) -> torch.Tensor:
        """Share of response tokens that have the largest logit."""
        wanted = expected(Draw(batch), output.length)
        kept = wanted.weights[:, 0] > 0
        return ((output.logits.argmax(-1) == wanted.tokens[:, 0]) & kept).sum() / kept.sum().clamp(min=1)

    def chance(self, model: nn.Module) -> float:
        """One over the size of the vocabulary."""
        return 1.0 / float(model.config.get_text_config().vocab_size)  # type: ignore[operator, union-attr]

    def predict(self, model: nn.Module, batch: Batch, wanted: set[str]) -> dict[str, list[Any]]:
        """Return some of `tokens`, `nll` and `text`.

        `tokens` are those with the largest logit and `nll` the negative log-likelihoods of the true ones, both for
        every response token under teacher forcing, row after row in one list; `text` is one greedy response per row.
        """
        found: dict[str, list[Any]] = {"text": self._generate(model, batch)} if "text" in wanted else {}
        if wanted & {"tokens", "nll"}:
            logits, labels = shifted(model(**self.inputs(model, batch)), batch)
            logits, labels = logits[labels != IGNORED].float(), labels[labels != IGNORED]
            found["tokens"] = logits.argmax(-1).tolist()
            found["nll"] = F.cross_entropy(logits, labels, reduction="none").tolist()
        return {kind: found[kind] for kind in wanted}

    def _generate(self, model: nn.Module, batch: Batch) -> list[str]:
        used = int(batch["prompt_mask"].sum(1).max())
        ids, mask = batch["prompt_ids"][:, -used:], batch["prompt_mask"][:, -used:]
        ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None) or []
        ends = {self._eos, *([ends] if isinstance(ends, int) else ends)}
        limits = {"max_new_tokens": self.max_new_tokens, "eos_token_id": sorted(ends), "pad_token_id": self._pad}
        out = model.generate(input_ids=ids, attention_mask=mask, **GREEDY, **limits)  # type: ignore[operator]
        # without tidying, which would turn "attacked ." into "attacked."
        new = out[:, ids.shape[1] :]
        texts = self.processor.batch_decode(new, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return [text.strip() for text in texts]

    def references(self, dataset: datasets.Dataset, batch: Batch, prediction: str) -> list[Any]:
        """Return the response tokens, the responses, or (for `nll`, which is a judgement itself) zeros."""
        if prediction == "text":
            return dataset["response"][:]
        tokens = batch["labels"][batch["labels"] != IGNORED].tolist()
        return tokens if prediction == "tokens" else [0.0] * len(tokens)

    def save_processor(self, folder: str) -> None:
        """Write tokenizer.json and its settings."""
        self.processor.save_pretrained(folder)
