"""Remove backdoors from models you did not train, with a few clean examples: Neural Mask Fine-Tuning."""

__version__ = "0.1.0"
