"""pandallm: takes a LLaMA-family language model to Chinese and ships it. Importing it does nothing."""

__version__ = "0.1.0"
