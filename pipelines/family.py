"""What a family of diffusers pipelines is: its text encoder slots, and how texts become the denoiser's inputs."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from diffusers import DiffusionPipeline
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from textcond import ConditioningEncoder, ConditioningEncoderWithProjection

# What the denoiser reads of the text, by the name of its argument; "a.b" is entry "b" of the dictionary "a".
Conditioning = dict[str, Tensor]
Width = Callable[[DiffusionPipeline], int | None]


@dataclass(frozen=True)
class Slot:
    """How a pipeline reads one of its text encoders.

    Attributes:
        name: attribute that holds the encoder; the tokenizer's has "tokenizer" for "text_encoder".
        reads: which output of the encoder is read, in words.
        mask: what becomes of the attention mask, in words.
        length: what says to how many tokens prompts are padded: "tokenizer", this slot's own limit; or
            "tokenizer_max_length", an attribute of the pipeline that it took from its first tokenizer when it was
            made; or "max_sequence_length", an argument of its call.
        tokens: width of the tokens that the denoiser reads here; None where it reads none.
        pooled: width of the pooled vector that it reads here; None where it reads none.
        beside: other slots whose tokens and pooled vectors are laid beside these to make up those widths.
        zero_padded: narrower tokens than `tokens` are filled up with zeros.
        pooled_first: the pooled vector is the encoder's first output, not its `pooler_output`.
        keeps_length: the denoiser gets the tokenizer's mask, so the encoder must give a token for each it was given.
        negative_follows: the negative prompt is tokenized to the length of the output.
        casts: the pipeline casts the output to the denoiser's dtype.
        required: the slot may not be empty.
        instruction: how many tokens the pipeline puts before each prompt; None for none.
        adapt_tokenizer: makes of any tokenizer one of the class that the pipeline asks for; None where any will do.
    """

    name: str
    reads: str
    mask: str
    length: str
    tokens: Width | None = None
    pooled: Width | None = None
    beside: tuple[str, ...] = ()
    zero_padded: bool = False
    pooled_first: bool = False
    keeps_length: bool = False
    negative_follows: bool = False
    casts: bool = False
    required: bool = True
    instruction: Callable[[DiffusionPipeline, PreTrainedTokenizerBase], int] | None = None
    adapt_tokenizer: Callable[[PreTrainedTokenizerBase], PreTrainedTokenizerBase] | None = None

    @property
    def tokenizer(self) -> str:
        """Attribute that holds the tokenizer."""
        return self.name.replace("text_encoder", "tokenizer")

    @property
    def encoder_class(self) -> type[ConditioningEncoder]:
        """Which ConditioningEncoder gives its outputs in the order that is read here."""
        return ConditioningEncoderWithProjection if self.pooled_first else ConditioningEncoder


@dataclass(frozen=True)
class Family:
    """Pipelines that call their text encoders and their denoiser in the same way.

    Attributes:
        name: as people call it.
        pipelines: the diffusers classes.
        slots: the text encoders, in the order in which they are called.
        denoiser: attribute that holds the denoiser.
        encode: `(pipe, texts)` -> the conditioning of each text, differentiable, by the pipeline's own `encode_prompt`
            as its call uses it.
        arguments: `(pipe, texts)` -> what its call takes in place of prompts, by argument, `(texts, ...)` each: tokens
            as `prompt_embeds`, their mask under a name that ends with "attention_mask", and pooled vectors.
        alone: slots that one encoder fills when it serves the whole pipeline, the others being emptied; () where no
            one encoder can.
        even: a text reads the same beside longer ones.
        repeats: several pictures of a prompt are had from embeddings that are given once, by an argument of the call.
        problems: `(pipe, component by name)` -> what else is wrong, each with its mend; None for nothing to ask.
    """

    name: str
    pipelines: tuple[type[DiffusionPipeline], ...]
    slots: tuple[Slot, ...]
    denoiser: str
    encode: Callable[[DiffusionPipeline, list[str]], Conditioning]
    arguments: Callable[[DiffusionPipeline, list[str]], dict[str, Tensor]]
    alone: tuple[str, ...]
    even: bool = True
    repeats: bool = True
    problems: Callable[[DiffusionPipeline, Callable[[str], Any]], list[str]] | None = None


def passed_as(
    encode: Callable[[DiffusionPipeline, list[str]], Conditioning], **names: str
) -> Callable[[DiffusionPipeline, list[str]], dict[str, Tensor]]:
    """`Family.arguments` of a pipeline whose call takes its conditioning as it is: argument -> name in it."""

    def arguments(pipe: DiffusionPipeline, texts: list[str]) -> dict[str, Tensor]:
        conditioning = encode(pipe, texts)
        return {argument: conditioning[name] for argument, name in names.items()}

    return arguments
