"""A tokenizer of any kind for the pipelines that read only tokenizers of T5's class."""

import copy

from transformers import PreTrainedTokenizerFast, T5TokenizerFast


class T5SlotTokenizer(T5TokenizerFast):
    """Tokenises as the tokenizer it was made of, and is an instance of T5's class.

    AudioLDM2 hands the prompt only to tokenizers of T5 or RoBERTa, and a transcription to all others.
    """

    # T5's own would build T5's segmentation around the vocabulary of another tokenizer.
    __init__ = PreTrainedTokenizerFast.__init__

    @classmethod
    def convert_to_native_format(cls, **kwargs):
        """Read the tokenizer file whole, as PreTrainedTokenizerFast does."""
        return PreTrainedTokenizerFast.convert_to_native_format(**kwargs)

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerFast) -> T5TokenizerFast:
        """A copy of a tokenizer in this class; one of T5's own class as it is.

        Raises:
            ValueError: for a tokenizer without a fast implementation.
        """
        if isinstance(tokenizer, T5TokenizerFast):
            return tokenizer
        if not isinstance(tokenizer, PreTrainedTokenizerFast):
            raise ValueError(
                f"{type(tokenizer).__name__} has no fast implementation: use one that has a tokenizer.json"
            )
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.__class__ = cls
        return tokenizer


# What diffusers writes into a saved pipeline, so that it survives a move within this package.
T5SlotTokenizer.__module__ = "textcond"
