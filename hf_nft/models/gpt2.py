"""A small GPT-2, trained from scratch: learnt positions, LayerNorm, fused attention projection, tied embeddings."""

import dataclasses

from transformers import GPT2Config, PreTrainedConfig, PreTrainedTokenizerFast

from hf_nft.models.base import TextArchitecture


@dataclasses.dataclass(frozen=True)
class Gpt2(TextArchitecture):
    """GPT-2 with 4.2 M parameters at the default settings, 4 blocks of width 256.

    Source: Radford et al., Language Models are Unsupervised Multitask Learners (2019); the layers are transformers'.
    """

    name = "gpt2"

    def config(self, tokenizer: PreTrainedTokenizerFast) -> PreTrainedConfig:
        """Return the configuration; no dropout, whose noise would not come from the loop's seeded streams."""
        return GPT2Config(
            vocab_size=len(tokenizer),
            n_positions=self.context,
            n_embd=self.width,
            n_layer=self.layers,
            n_head=self.heads,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            activation_function="gelu_pytorch_tanh",  # GPT-2's own in one operation instead of eight
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
