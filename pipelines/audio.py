"""Families of text-to-audio pipelines: AudioLDM2, MusicLDM, StableAudio."""

from collections.abc import Callable
from types import MethodType
from typing import Any

import diffusers
import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline
from torch import Tensor
from transformers import (
    ClapModel,
    ClapTextModelWithProjection,
    GPT2Model,
    RobertaTokenizerFast,
    T5TokenizerFast,
)

from textcond import ConditioningEncoder
from textcond.encoder import position_capacity
from textcond.slot_tokenizer import T5SlotTokenizer

from .family import Conditioning, Family, Slot, passed_as

# CLAP also ranks several waveforms a prompt by the audio that it hears, which no text encoder can.
_SCORING = "with librosa installed and num_waveforms_per_prompt > 1 also the audio tower of CLAP, which only CLAP has"
Component = Callable[[str], Any]


# AudioLDM2


def _audioldm2(pipe: DiffusionPipeline, texts: list[str]) -> Conditioning:
    # Its language model counts padding as places, so that a text would read otherwise beside a longer one: each goes
    # with those of its own length, and all are padded to the same at the end.
    longest = pipe.tokenizer_2.model_max_length
    tokenizers = [one for one in (pipe.tokenizer, pipe.tokenizer_2) if not isinstance(one, RobertaTokenizerFast)]
    ids = [one(texts, truncation=True, max_length=one.model_max_length).input_ids for one in tokenizers]
    lengths = [tuple(map(len, each)) for each in zip(*ids)]
    rows: list[Conditioning | None] = [None] * len(texts)
    for length in set(lengths):
        places = [place for place, own in enumerate(lengths) if own == length]
        embeds, mask, generated = pipe.encode_prompt([texts[i] for i in places], pipe._execution_device, 1, False)
        padding = longest - embeds.shape[1]
        embeds, mask = F.pad(embeds, (0, 0, 0, padding)), F.pad(mask, (0, padding))
        for row, place in enumerate(places):
            rows[place] = {
                "encoder_hidden_states": generated[row],
                "encoder_hidden_states_1": embeds[row],
                "encoder_attention_mask_1": mask[row],
            }
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def _audioldm2_arguments(pipe: DiffusionPipeline, texts: list[str]) -> dict[str, Tensor]:
    states = _audioldm2(pipe, texts)
    embeds, mask = states["encoder_hidden_states_1"], states["encoder_attention_mask_1"]
    # Its call pads the negative prompt to as many tokens, and reads it otherwise then.
    longest = int(mask.sum(1).max())
    generated = states["encoder_hidden_states"]
    return {
        "prompt_embeds": embeds[:, :longest],
        "attention_mask": mask[:, :longest],
        "generated_prompt_embeds": generated,
    }


def _audioldm2_problems(pipe: DiffusionPipeline, component: Component) -> list[str]:
    problems = []
    for name in ("tokenizer", "tokenizer_2"):
        tokenizer = component(name)
        if tokenizer is not None and not isinstance(tokenizer, (RobertaTokenizerFast, T5TokenizerFast)):
            problems.append(
                f"{name} is a {type(tokenizer).__name__}, which AudioLDM2 gives no prompt to read: "
                "pass T5SlotTokenizer.of(tokenizer), as swap_text_encoder does"
            )
    if isinstance(pipe.language_model, GPT2Model):
        problems.append(
            "language_model is a GPT2Model, which cannot generate in transformers 5: pass "
            "language_model=GPT2LMHeadModel.from_pretrained(folder, subfolder='language_model') when loading"
        )
    if pipe.projection_model.config.use_learned_position_embedding is not None:
        problems.append(
            f"projection_model adds {pipe.projection_model.config.max_seq_length} learned positions to phonemes: "
            "this checkpoint speaks a transcription, so use one that makes audio from text"
        )
    return problems


AUDIOLDM2 = Family(
    "AudioLDM2",
    (diffusers.AudioLDM2Pipeline,),
    (
        Slot(
            "text_encoder",
            reads=f"the pooled vector of CLAP, or the first output of any other; {_SCORING}",
            mask="goes to the encoder and to the language model",
            length="tokenizer",
            tokens=lambda pipe: pipe.projection_model.config.text_encoder_dim,
            keeps_length=True,
            adapt_tokenizer=T5SlotTokenizer.of,
        ),
        Slot(
            "text_encoder_2",
            reads="the first output",
            mask="goes to the encoder, to the language model and to the denoiser",
            length="tokenizer",
            tokens=lambda pipe: pipe.projection_model.config.text_encoder_1_dim,
            keeps_length=True,
            adapt_tokenizer=T5SlotTokenizer.of,
        ),
    ),
    "unet",
    _audioldm2,
    _audioldm2_arguments,
    alone=(),
    even=False,
    problems=_audioldm2_problems,
)


# MusicLDM


def _musicldm(pipe: DiffusionPipeline, texts: list[str]) -> Conditioning:
    return {"class_labels": pipe._encode_prompt(texts, pipe._execution_device, 1, False)}


def _musicldm_problems(pipe: DiffusionPipeline, component: Component) -> list[str]:
    encoder, problems = component("text_encoder"), []
    if isinstance(encoder, ClapModel) and "get_text_features" not in vars(encoder):
        problems.append(
            "text_encoder is a ClapModel, which since transformers 5 gives an object where MusicLDM reads a vector: "
            "call textcond.pipelines.audio.mend_clap(pipe), or swap in a ConditioningEncoderWithProjection"
        )
    if isinstance(encoder, ClapTextModelWithProjection):
        problems.append(
            "text_encoder is a ClapTextModelWithProjection, which has no get_text_features: load a ClapModel"
        )
    if isinstance(encoder, ConditioningEncoder):
        width, capacity = pipe.unet.config.projection_class_embeddings_input_dim, position_capacity(encoder.backbone)
        if capacity is not None and capacity < width:
            problems.append(
                f"MusicLDM pads negative prompts to as many tokens as its vector is wide, {width}, and text_encoder "
                f"has positions for {capacity}: use a backbone with {width} or more"
            )
    return problems


def mend_clap(pipe: diffusers.MusicLDMPipeline) -> None:
    """Let a stock MusicLDM run with transformers 5, where CLAP wraps the vector that the pipeline reads."""
    pipe.text_encoder.get_text_features = MethodType(_bare_features, pipe.text_encoder)


def _bare_features(clap: ClapModel, *args: Any, **kwargs: Any) -> Tensor:
    return ClapModel.get_text_features(clap, *args, **kwargs).pooler_output


MUSICLDM = Family(
    "MusicLDM",
    (diffusers.MusicLDMPipeline,),
    (
        Slot(
            "text_encoder",
            reads=f"get_text_features; {_SCORING}",
            mask="goes to the encoder",
            length="tokenizer",
            pooled=lambda pipe: pipe.unet.config.projection_class_embeddings_input_dim,
            pooled_first=True,
        ),
    ),
    "unet",
    _musicldm,
    passed_as(_musicldm, prompt_embeds="class_labels"),
    alone=("text_encoder",),
    problems=_musicldm_problems,
)


# StableAudio


def _stable_audio(pipe: DiffusionPipeline, texts: list[str]) -> Conditioning:
    device, vae = pipe._execution_device, pipe.vae
    # As the call does when it is not told how long to make the audio.
    seconds = pipe.transformer.config.sample_size * vae.hop_length / vae.config.sampling_rate
    embeds = pipe.encode_prompt(texts, device, False)
    start, end = pipe.encode_duration(0.0, seconds, device, False, len(texts))
    return {"encoder_hidden_states": torch.cat([embeds, start, end], dim=1)}


def _stable_audio_arguments(pipe: DiffusionPipeline, texts: list[str]) -> dict[str, Tensor]:
    # Its call takes them as they come out of the encoder, and projects them itself.
    inputs = pipe.tokenizer(
        texts,
        padding="max_length",
        max_length=pipe.tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    ).to(pipe._execution_device)
    states = pipe.text_encoder(inputs.input_ids, attention_mask=inputs.attention_mask)[0]
    return {"prompt_embeds": states, "attention_mask": inputs.attention_mask}


STABLE_AUDIO = Family(
    "StableAudio",
    (diffusers.StableAudioPipeline,),
    (
        Slot(
            "text_encoder",
            reads="the first output; without a negative prompt the unconditional one is zeros and is not encoded",
            mask="goes to the encoder; projected tokens are zero where it is",
            length="tokenizer",
            tokens=lambda pipe: pipe.projection_model.config.text_encoder_dim,
            keeps_length=True,
        ),
    ),
    "transformer",
    _stable_audio,
    _stable_audio_arguments,
    alone=("text_encoder",),
)
