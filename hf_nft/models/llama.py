"""A small Llama, trained from scratch: RMSNorm, gated MLP, grouped-query attention, tied embeddings."""

import dataclasses

from transformers import LlamaConfig, PreTrainedConfig, PreTrainedTokenizerFast

from hf_nft.configs import check, setting
from hf_nft.models.base import TextArchitecture


@dataclasses.dataclass(frozen=True)
class SmallLlama(TextArchitecture):
    """Llama with 3.9 M parameters at the default settings, 4 blocks of width 256.

    It has what makes modern models different for masking: norms without bias, a product of two projections in the MLP,
    and query heads that share a key and value head.

    Source: Touvron et al., LLaMA, arXiv 2302.13971; Ainslie et al., GQA, arXiv 2305.13245; layers by transformers.
    """

    name = "llama"

    kv_heads: int = setting(2, "key and value heads, >= 1, a divisor of the heads")

    def __post_init__(self) -> None:
        """Check the settings."""
        super().__post_init__()
        shared = self.kv_heads >= 1 and self.heads % self.kv_heads == 0
        check(self, (shared, f"kv_heads: expected a divisor of {self.heads} heads, found {self.kv_heads}"))

    def config(self, tokenizer: PreTrainedTokenizerFast) -> PreTrainedConfig:
        """Return the configuration; the MLP is 8/3 as wide as the model, rounded to a multiple of 32."""
        return LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=self.width,
            intermediate_size=max(32, round(self.width * 8 / 3 / 32) * 32),
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            max_position_embeddings=self.context,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
