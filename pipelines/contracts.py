"""Contracts: what each text encoder slot of a diffusers pipeline expects, and whether its components meet it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from diffusers import DiffusionPipeline
from torch import nn
from transformers import ClapModel, CLIPTextModel, CLIPTextModelWithProjection, PreTrainedModel, PreTrainedTokenizerBase

from textcond import ConditioningEncoder, ConditioningEncoderWithProjection
from textcond.conditioning import NO_LENGTH_LIMIT
from textcond.encoder import position_capacity
from textcond.original import PackedTokenizer

from .denoisers import TimestepAwareUNet, controlnet_problems
from .families import call_default, denoiser_of, family_of, text_width
from .family import Family, Slot

Component = Callable[[str], object]
_PROJECTING = (ConditioningEncoderWithProjection, CLIPTextModelWithProjection)


@dataclass
class Contract:
    """What one slot of one pipeline expects.

    Attributes:
        slot: attribute of the pipeline that holds the encoder.
        encoder: class of what is there now; "" for an empty slot.
        token_width: width of the tokens that the slot must give while the other slots stay as they are; None where the
            pipeline reads no tokens.
        pooled_width: width of the pooled vector that is read, or None where none is.
        needs: which class of ours gives its outputs in the order that is read.
        output: which output of the encoder is read.
        tokens: how many tokens the denoiser gets from the slot now.
        keeps_length: the bridge must give a token for each that it is given: "linear" or "mlp".
        length: how many tokens are allowed.
        mask: what becomes of the attention mask.
        problems: what is wrong with the components that are there, each with its mend; empty when they fit.
    """

    slot: str
    encoder: str
    token_width: int | None = None
    pooled_width: int | None = None
    needs: str = ""
    output: str = ""
    tokens: int | None = None
    keeps_length: bool = False
    length: str = ""
    mask: str = ""
    problems: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        wanted = []
        if self.token_width is not None or self.pooled_width is None:
            wanted.append(f"{self.token_width}-wide tokens" if self.token_width else "tokens of an unknown width")
        if self.pooled_width is not None:
            wanted.append(f"a {self.pooled_width}-wide pooled vector")
        lines = [f"{self.slot}: {self.encoder or 'empty'}"]
        if self.output:
            lines += [f"  expects {' and '.join(wanted)}: a {self.needs}", f"  reads {self.output}"]
            lines += [f"  length: {self.length}", f"  mask: {self.mask}"]
        lines += [f"  problem: {problem}" for problem in self.problems]
        return "\n".join(lines)


def slots_of(pipe: DiffusionPipeline) -> dict[str, Slot]:
    """Text encoder slots of a supported pipeline by name, in the order in which it calls them.

    Raises:
        ValueError: for a pipeline class that is not supported.
    """
    return {slot.name: slot for slot in family_of(pipe).slots}


def inspect_pipeline(pipe: DiffusionPipeline) -> list[Contract]:
    """What each text encoder slot expects, and what is wrong with what it holds; reads configurations only.

    A pipeline of another family gives contracts whose `problems` say why it cannot take another encoder.
    """
    try:
        family_of(pipe)
    except ValueError as error:
        slots = [name for name in pipe.components if name.startswith("text_encoder")] or ["text_encoder"]
        return [Contract(slot, _class_name(getattr(pipe, slot, None)), problems=[str(error)]) for slot in slots]
    return check_components(pipe, {})


def check_components(pipe: DiffusionPipeline, replaced: Mapping[str, object]) -> list[Contract]:
    """Contracts of a supported pipeline as if the components in `replaced` were already in their slots."""

    def component(name: str):
        return replaced[name] if name in replaced else getattr(pipe, name, None)

    family, slots = family_of(pipe), slots_of(pipe)
    denoiser = denoiser_of(pipe)
    contracts = []
    for slot in slots.values():
        encoder, tokenizer = component(slot.name), component(slot.tokenizer)
        contract = Contract(slot.name, _class_name(encoder), output=slot.reads, mask=slot.mask)
        contract.needs, contract.keeps_length = slot.encoder_class.__name__, slot.keeps_length
        padded = padded_length(pipe, slot, tokenizer)
        contract.tokens = output_length(encoder, padded)
        contract.length = _length(slot, padded, component)
        contracts.append(contract)
        if denoiser is not None and (encoder is not None or slot.required):
            also = [name for name in slot.beside if encoder is not None and component(name) is encoder]
            contract.token_width, contract.pooled_width = expected_widths(pipe, slot, [slot.name, *also], component)
        if encoder is None:
            if slot.required:
                contract.problems.append(f"{slot.name} is empty: swap in an encoder")
            continue
        if denoiser is None:
            contract.problems.append(f"the pipeline has no {_named(family)} to check the encoder against: load one")
            continue
        # Beside an empty slot that must be filled, any width may be right.
        if all(component(name) is not None for name in slot.beside if slots[name].required):
            contract.problems += _width_problems(family, slot, encoder, contract)
        contract.problems += _connector_problems(family, slot, encoder, denoiser)
        contract.problems += _length_problems(slot, encoder, contract)
        contract.problems += _placement_problems(family, slot, encoder, denoiser)
        tower = encoder.text_model if isinstance(encoder, ClapModel) else encoder
        if isinstance(tokenizer, PackedTokenizer) or (
            isinstance(encoder, ConditioningEncoder) and encoder.config.original is not None
        ):
            contract.problems += _packing_problems(slot, encoder, tokenizer)
            continue
        contract.problems += _tokenizer_problems(slot, tower, tokenizer)
        contract.problems += _position_problems(pipe, slot, tower, tokenizer, padded)
    contracts[-1].problems += _joining_problems(slots, contracts, component, replaced)
    contracts[-1].problems += family.problems(pipe, component) if family.problems else []
    if denoiser is not None and getattr(pipe, "controlnet", None) is not None:
        contracts[-1].problems += _controlnet_problems(pipe, family, text_width(denoiser))
    return contracts


def expected_widths(
    pipe: DiffusionPipeline, slot: Slot, serving: list[str], component: Component
) -> tuple[int | None, int | None]:
    """Widths of the tokens and of the pooled vector that a slot must give; None for what is not read there.

    Args:
        serving: slots that the same encoder fills, this one among them; the others keep what `component` says.
    """
    slots = slots_of(pipe)
    beside = [slots[name] for name in slot.beside]
    kept = [other for other in beside if other.name not in serving and component(other.name) is not None]

    def share(read, given) -> int | None:
        whole = read(slot)(pipe) if read(slot) else None
        if whole is None:
            return None
        others = sum(given(component(other.name), other) or 0 for other in kept if read(other))
        sharing = sum(other.name in serving for other in beside if read(other))
        return (whole - others) // (1 + sharing)

    width = share(lambda one: one.tokens, lambda encoder, _: token_width(encoder))
    before = getattr(pipe, slot.name)
    if slot.zero_padded and kept and before is not None and width is not None:
        # What comes after it in the denoiser's width must stay where it is.
        width = min(width, token_width(before) or width)
    return width, share(lambda one: one.pooled, pooled_width)


def token_width(encoder: PreTrainedModel) -> int | None:
    """Width of the tokens that an encoder gives."""
    if isinstance(encoder, ClapModel):
        # AudioLDM2 takes its vector for one token.
        return encoder.config.projection_dim
    return getattr(encoder.config, "hidden_size", None)


def pooled_width(encoder: PreTrainedModel, slot: Slot) -> int | None:
    """Width of the 2-D vector that a slot reads of an encoder, or None if it gives none there."""
    if slot.pooled_first:
        return encoder.config.projection_dim if isinstance(encoder, (*_PROJECTING, ClapModel)) else None
    if isinstance(encoder, CLIPTextModel):
        return encoder.config.hidden_size
    ours = isinstance(encoder, ConditioningEncoder) and not isinstance(encoder, _PROJECTING)
    return encoder.config.projection_dim if ours else None


def padded_length(pipe: DiffusionPipeline, slot: Slot, tokenizer: PreTrainedTokenizerBase | None) -> int | None:
    """To how many tokens a pipeline pads the prompts of a slot."""
    if slot.length == "tokenizer":
        return tokenizer.model_max_length if tokenizer is not None else None
    return call_default(pipe, slot.length) if slot.length == "max_sequence_length" else getattr(pipe, slot.length)


def output_length(encoder: PreTrainedModel | None, padded: int | None) -> int | None:
    """How many tokens the denoiser gets for a prompt."""
    if isinstance(encoder, ConditioningEncoder):
        kept = encoder.config.original or {}
        return kept.get("tokens") or encoder.config.tokens or padded
    return padded


def _length(slot: Slot, padded: int | None, component: Component) -> str:
    if slot.keeps_length:
        return f"as many tokens as it is given, {padded} by default"
    length = "any"
    if slot.negative_follows:
        length += ", the same for the negative prompt, which is tokenized to the length of the output"
    if slot.beside and all(component(name) is not None for name in (slot.name, *slot.beside)):
        length += f", and the same in {' and '.join(slot.beside)}"
    return length


def _width_problems(family: Family, slot: Slot, encoder: PreTrainedModel, contract: Contract) -> list[str]:
    problems, denoiser, name, ours = [], _named(family), slot.name, contract.needs
    width, pooled, expected = token_width(encoder), pooled_width(encoder, slot), contract.token_width
    if slot.tokens is not None and expected is None:
        problems.append(f"the {denoiser}'s blocks read tokens of different widths, which no single encoder gives")
    elif expected is not None and expected <= 0:
        problems.append(
            f"{name} gives {width}-wide tokens, and the other slot fills the {denoiser}'s whole width: "
            "leave slot out, so that one encoder serves both"
        )
    elif expected is not None and width != expected:
        problems.append(
            f"{name} gives {width}-wide tokens, the {denoiser} expects {expected}: "
            f"make a bridge with {ours}.from_text_encoder(..., width={expected})"
        )
    if contract.pooled_width is not None and pooled != contract.pooled_width:
        gives = f"a {pooled}-wide pooled vector" if pooled else "no pooled vector"
        problems.append(
            f"{name} gives {gives}, the {denoiser} expects {contract.pooled_width}: make it with "
            f"{ours}.from_text_encoder(..., pooled_width={contract.pooled_width})"
        )
    if not slot.pooled_first and isinstance(encoder, _PROJECTING):
        problems.append(
            f"{name} returns its pooled vector first, where the pipeline reads {slot.reads}: "
            f"use {type(encoder).__name__.removesuffix('WithProjection')} in this slot"
        )
    return problems


def _connector_problems(family: Family, slot: Slot, encoder: PreTrainedModel, denoiser: nn.Module) -> list[str]:
    """Bare states of a backbone, before a denoiser that would take them for tokens."""
    bare = isinstance(encoder, ConditioningEncoder) and encoder.config.bridge == "identity"
    if not bare or slot.tokens is None or isinstance(denoiser, TimestepAwareUNet):
        return []
    return [
        f"{slot.name} gives its backbone's own states, and the {_named(family)} has no connector to read them: swap in "
        "the folder of the encoder that holds its connector.safetensors, or an encoder with another bridge"
    ]


def _length_problems(slot: Slot, encoder: PreTrainedModel, contract: Contract) -> list[str]:
    if not isinstance(encoder, ConditioningEncoder):
        return []
    if encoder.config.chunk and not slot.negative_follows:
        return [
            f"the tokens of {slot.name} grow with the prompt, and this pipeline does not ask as many of its negative "
            "prompt: make the encoder without chunk"
        ]
    if not (slot.keeps_length and encoder.config.tokens):
        return []
    return [
        f"{slot.name} gives {encoder.config.tokens} tokens whatever the length of the text, and the denoiser gets the "
        'mask of the text: make it with a bridge that keeps the length, bridge="mlp"'
    ]


def _placement_problems(family: Family, slot: Slot, encoder: PreTrainedModel, denoiser: nn.Module) -> list[str]:
    problems, name, other = [], slot.name, f"the {_named(family)}"
    hooked = [label for label, module in ((name, encoder), (other, denoiser)) if hasattr(module, "_hf_hook")]
    plain = (torch.float32, torch.float16, torch.bfloat16)
    dtype, device = denoiser.dtype, denoiser.device  # each looks through thousands of modules
    if encoder.dtype != dtype and dtype in plain and not slot.casts:
        problems.append(f"{name} is {encoder.dtype}, {other} {dtype}: call encoder.to({dtype})")
    if len(hooked) == 1:
        problems.append(
            f"{hooked[0]} is offloaded and the other is not: call pipe.remove_all_hooks(), swap, then offload again"
        )
    elif not hooked and encoder.device != device:
        problems.append(f'{name} is on {encoder.device}, {other} on {device}: call encoder.to("{device}")')
    return problems


def _tokenizer_problems(slot: Slot, encoder: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> list[str]:
    name = slot.tokenizer
    if tokenizer is None:
        return [f"{slot.name} has no tokenizer: pass tokenizer=..."]
    problems = []
    ours = isinstance(encoder, ConditioningEncoder)
    pad = tokenizer.pad_token_id
    if pad is None:
        problems.append(
            f"{name} has no pad token: use the tokenizer of ConditioningEncoder.from_text_encoder, which adds one"
        )
    elif ours and pad in (tokenizer.eos_token_id, tokenizer.bos_token_id):
        problems.append(
            f"{name} pads with {tokenizer.pad_token!r}, which also begins or ends a text: "
            "use the tokenizer of ConditioningEncoder.from_text_encoder, which adds another"
        )
    elif ours and pad != encoder.config.pad_token_id:
        problems.append(
            f"{name} pads with token {pad}, the encoder leaves out token {encoder.config.pad_token_id}: "
            "use the encoder's own tokenizer"
        )
    if ours and tokenizer.padding_side != "right":
        problems.append(f'{name} pads on the left: set tokenizer.padding_side = "right"')
    rows = encoder.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        problems.append(
            f"{name} has {len(tokenizer)} tokens, {slot.name} embeds {rows}: "
            "use the encoder's own tokenizer, or call encoder.resize_token_embeddings(len(tokenizer))"
        )
    return problems


def _packing_problems(slot: Slot, encoder: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> list[str]:
    """Rows that are not packed as an encoder that keeps an original splits them."""
    kept = (encoder.config.original or {}) if isinstance(encoder, ConditioningEncoder) else {}
    packed = tokenizer.lengths[:-1] if isinstance(tokenizer, PackedTokenizer) else None
    if packed == kept.get("lengths"):
        return []
    return [f"{slot.tokenizer} does not pack its rows as {slot.name} reads them: use the encoder's own tokenizer"]


def _position_problems(pipe, slot: Slot, encoder, tokenizer, length: int | None) -> list[str]:
    """Prompts longer than the encoder has positions for."""
    if tokenizer is None:
        return []
    name, problems = slot.tokenizer, []
    capacity = position_capacity(encoder.backbone if isinstance(encoder, ConditioningEncoder) else encoder)
    limit = tokenizer.model_max_length
    if slot.length == "tokenizer_max_length" and name == "tokenizer" and limit != length:
        # The pipeline read it once, and would read it again when it is loaded.
        problems.append(
            f"{name} has room for {limit} tokens, the pipeline pads to {length}: "
            f"set tokenizer.model_max_length = {length}"
        )
    if slot.length == "tokenizer" and length > NO_LENGTH_LIMIT:
        problems.append(f"{name} has no length limit: set tokenizer.model_max_length = {min(capacity or 512, 512)}")
        return problems
    if isinstance(encoder, ConditioningEncoder) and encoder.config.chunk and encoder.bridge.blocks_in(limit):
        problems.append(
            f"{name} pads prompts to {limit} tokens, as long as an output of {slot.name}, which then takes them for "
            f"negative ones: set tokenizer.model_max_length = {limit - 1}"
        )
    if slot.instruction:
        length += slot.instruction(pipe, tokenizer)
    if capacity is not None and length > capacity:
        pads = f"{name} pads prompts to {length} tokens, {slot.name} has positions for {capacity}: "
        mend = f"set tokenizer.model_max_length = {capacity}"
        problems.append(pads + (mend if slot.length == "tokenizer" else "use a backbone with more"))
    output = output_length(encoder, length)
    if slot.negative_follows and capacity is not None and output != length and output > capacity:
        problems.append(
            f"{slot.name} gives {output} tokens, so negative prompts are padded to {output}, but it has positions for "
            f"{capacity}: make the bridge with tokens={capacity} or fewer"
        )
    return problems


def _joining_problems(
    slots: dict[str, Slot], contracts: list[Contract], component: Component, replaced: Mapping[str, object]
) -> list[str]:
    """Slots whose tokens are laid side by side, but are not as many."""
    by_name = {contract.slot: contract for contract in contracts}
    for slot in slots.values():
        for other in slot.beside:
            if list(slots).index(slot.name) > list(slots).index(other):
                continue
            if component(slot.name) is None or component(other) is None:
                continue
            growing = [one for one in (slot.name, other) if getattr(component(one).config, "chunk", None)]
            if growing:
                return [
                    f"the tokens of {growing[0]} grow with the prompt, and are joined with those of another slot: "
                    "make the encoder without chunk, or leave slot out, so that one encoder serves both"
                ]
            first, second = by_name[slot.name].tokens, by_name[other].tokens
            if first and second and first != second:
                kept, wanted = (other, first) if other in replaced else (slot.name, second)
                mend = f"make the new encoder with tokens={wanted}"
                if (getattr(component(kept).config, "original", None) or {}).get("mix") == "concatenate":
                    mend = 'leave slot out, so that one encoder serves both, or pass keep_original="blend"'
                return [
                    f"{slot.name} gives {first} tokens and {other} {second}, and they are joined token by token: {mend}"
                ]
    return []


def _controlnet_problems(pipe, family: Family, width: int | None) -> list[str]:
    controlnet = getattr(pipe, "controlnet", None)
    if controlnet is None or width is None:
        return []
    if problems := controlnet_problems(pipe):
        return problems
    read = [text_width(net) for net in getattr(controlnet, "nets", [controlnet])]
    name = _named(family)
    return [
        f"the ControlNet reads {other}-wide tokens, the {name} {width}: use a ControlNet made for this {name}"
        for other in read
        if other is not None and other != width
    ]


def _named(family: Family) -> str:
    return "UNet" if family.denoiser == "unet" else family.denoiser


def _class_name(component) -> str:
    return "" if component is None else type(component).__name__
