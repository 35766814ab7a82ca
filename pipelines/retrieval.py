"""Retrieval-augmented generation: what an index holds near a prompt is shown, added to its text, or mixed into it.

    retrieved = retrieve(pipe, index, "fox", mode="blend", strength=0.3)
    picture = pipe(**retrieved.arguments, negative_prompt="blurry").images[0]

The pipeline stays of its stock class: it is called with another text, or with `prompt_embeds` in place of one.
"""

from __future__ import annotations

import inspect
import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from textcond import Hit, PromptIndex
from textcond.index.prompt_index import LONGEST_QUERY
from textcond.original import PackedTokenizer
from textcond.words import words

from .contracts import padded_length, slots_of
from .families import family_of

MODES = ("off", "suggest", "expand", "blend")
# As measured by tests/benchmarks/bench_retrieval.py.
STRENGTH = {"expand": 0.5, "blend": 0.3}
NEIGHBOURS = 5
# Cosines of neighbours lie close together. Of the weight for a caption's five neighbours 97% is the right subject's,
# against 86% at 0.05 and 74% at 0.1 (the benchmark's full prompts).
TEMPERATURE = 0.02

_SEPARATORS = re.compile(r"[,;|\n、，；]+")
# What other programs read in a prompt and an encoder does not: `<lora:name:1>`, `--ar 16:9`.
_COMMANDS = re.compile(r"<\w+:|--\w")
_ABSENT = re.compile(r"\b(?:no|not|without|ohne|sans)\s+(?:an?\s+|any\s+)?(\w+)", re.IGNORECASE)
# Sides of one question: a picture can have only one of them.
_OPPOSED = [
    tuple(frozenset(side.split()) for side in sides)
    for sides in (
        ("day daylight daytime noon sunny", "night nighttime midnight moonlit"),
        ("spring", "summer", "autumn fall", "winter snowy"),
        ("indoor indoors interior", "outdoor outdoors exterior"),
        ("bright", "dark dim gloomy"),
        (
            "photo photograph photography photorealistic",
            "painting drawing cartoon anime illustration sketch watercolor",
        ),
        ("monochrome grayscale greyscale", "colorful colourful vibrant"),
        ("simple minimal minimalist plain", "detailed intricate complex ornate"),
        ("old elderly aged", "young child baby"),
        ("man male boy", "woman female girl"),
        ("ancient medieval vintage retro", "modern futuristic"),
        ("closeup macro", "panorama panoramic aerial"),
    )
]


@dataclass
class Retrieved:
    """What a retrieval made of a prompt, or of several.

    Attributes:
        prompt: the text that conditions the picture, or the texts: the prompt itself unless details were added.
        arguments: of the pipeline's call, for `pipe(**arguments)`; whatever else it takes goes beside them, but how
            many pictures of a prompt, which is in them. Beside the embeddings of a blend, AudioLDM2, MusicLDM and
            StableAudio take no text as `negative_prompt`, and SD3, Flux and Sana a list of one for each picture.
        hits: the neighbours that were used, best first; a list for each prompt where several were given.
    """

    prompt: str | list[str]
    arguments: dict[str, Any]
    hits: list[Hit] | list[list[Hit]]


def retrieve(
    pipe: DiffusionPipeline,
    index: PromptIndex,
    prompt: str | Sequence[str],
    mode: str = "off",
    *,
    strength: float | None = None,
    k: int = NEIGHBOURS,
    pictures: int = 1,
) -> Retrieved:
    """Look a prompt up, or several, and make the arguments of the pipeline's call of it.

    Args:
        mode: "off" looks nothing up; "suggest" finds the neighbours and leaves the prompt as it is; "expand" adds
            their details to its text (`expand`); "blend" mixes their conditioning into its own (`blend`).
        strength: from 0, which gives exactly the picture of "off", to 1; None is `STRENGTH[mode]`.
        k: how many neighbours.
        pictures: how many pictures of each prompt, or waveforms.

    Raises:
        TypeError: for a prompt that is neither a text nor a list of texts.
        ValueError: for an unknown mode, a strength outside 0..1, k below 1, or a pipeline of no supported family.
    """
    if mode not in MODES:
        raise ValueError(f"there is no mode {mode!r}: choose from {', '.join(MODES)}")
    if k < 1:
        raise ValueError(f"k={k}: ask for at least 1 neighbour")
    strength = _checked(STRENGTH.get(mode, 0.0) if strength is None else strength)
    single = isinstance(prompt, str)
    prompts = [prompt] if single else list(prompt)
    for text in prompts:
        if not isinstance(text, str):
            raise TypeError(f"a prompt is {text!r:.80}: pass a text or a list of texts")

    hits = [suggest(index, text, k) if mode != "off" else [] for text in prompts]
    if mode == "expand":
        prompts = [expand(pipe, text, near, strength) for text, near in zip(prompts, hits)]
    arguments = blend(pipe, prompts, hits, strength) if mode == "blend" else {"prompt": prompts}
    if single and "prompt" in arguments:
        arguments = {"prompt": prompts[0]}
    if pictures > 1:
        arguments = _for_several(pipe, arguments, pictures)
    return Retrieved(prompts[0] if single else prompts, arguments, hits[0] if single else hits)


def suggest(index: PromptIndex, prompt: str, k: int = NEIGHBOURS) -> list[Hit]:
    """The `k` neighbours of a prompt in an index, best first, without the prompt itself; none for an empty prompt.

    Their scores are cosines to the prompt in the index's space, however the index ranks.
    """
    if not prompt.strip():
        return []
    prompt = prompt[:LONGEST_QUERY]
    for depth in (k + 1, 8 * (k + 1)):
        found = index.search(prompt, k=depth)
        # A picture without a prompt says nothing here.
        hits = [hit for hit in found if hit.text.strip() and words(hit.text) != words(prompt)][:k]
        if len(hits) == k or len(found) < depth:
            break
    if hits:
        near = _unit(index.encoder.encode([hit.text for hit in hits], kind="document"))
        query = _unit(index.encoder.encode([prompt], kind="query"))[0]
        for hit, score in zip(hits, near @ query):
            hit.score = float(score)
    return hits


def expand(pipe: DiffusionPipeline, prompt: str, hits: Sequence[Hit], strength: float = STRENGTH["expand"]) -> str:
    """The prompt with details of its neighbours added behind it, as long as all its text encoders read it whole.

    Details are what follows the first comma of a neighbour: its subject is its own. Left out is what the prompt
    says already, what it says otherwise ("flat style" beside "noto style"), what it rules out ("no background"), and
    what is opposed to it by a short list of English words ("night" beside "sunny").

    Args:
        strength: a detail is added if neighbours with at least `1 - strength` of the softmaxed similarity have it; 0
            adds none.

    Raises:
        ValueError: for a strength outside 0..1, or a pipeline of no supported family.
    """
    if _checked(strength) == 0 or not hits:
        return prompt
    votes: dict[str, float] = {}
    spelled: dict[str, str] = {}
    for hit, weight in zip(hits, softmaxed(hits)):
        details = {" ".join(words(part)): part for part in _parts(hit.text)[1:] if not _COMMANDS.search(part)}
        for detail, part in details.items():
            votes[detail] = votes.get(detail, 0.0) + weight
            spelled.setdefault(detail, part)
    fits = _length_check(pipe)
    separator = "、" if "、" in prompt else ", "
    for detail in sorted(votes, key=votes.get, reverse=True):  # a stable sort: the nearer neighbour's first
        # Rounding must not lose what all neighbours have.
        if votes[detail] < 1 - strength - 1e-6 or not _is_new(spelled[detail], prompt):
            continue
        longer = f"{prompt.rstrip(' ,.;、。')}{separator}{spelled[detail]}"
        if fits(longer):
            prompt = longer
    return prompt


def softmaxed(hits: Sequence[Hit]) -> list[float]:
    """The weight of each neighbour, from its score; together they are 1."""
    scores = np.array([hit.score for hit in hits])
    shares = np.exp((scores - scores.max(initial=-np.inf)) / TEMPERATURE)
    return (shares / shares.sum()).tolist()


@torch.no_grad()
def blend(
    pipe: DiffusionPipeline,
    prompt: str | Sequence[str],
    hits: Sequence[Hit] | Sequence[Sequence[Hit]],
    strength: float = STRENGTH["blend"],
) -> dict[str, Tensor | str | list[str]]:
    """What the pipeline's call takes in place of a prompt: its conditioning mixed with that of its neighbours.

    `(1 - strength)` times the prompt's plus `strength` times the mean of the neighbours', weighted by their softmaxed
    similarity; pooled vectors are mixed alike. Where the denoiser gets the mask of the text, a position is mixed of
    the texts that reach it, and is there if more than half of the weight does, or half: the prompt's own length below
    0.5. The negative prompt is not touched.

    Args:
        prompt: a text, or a list of texts with a list of hits for each.
        strength: 0 gives the prompt back as it is; 1 leaves nothing of it.

    Returns:
        `prompt_embeds` and, as the family has them, pooled vectors and mask, `(prompts, ...)`, in the encoder's dtype;
        `prompt` itself where there is nothing to mix.

    Raises:
        ValueError: for a strength outside 0..1, or a pipeline of no supported family.
    """
    arguments = family_of(pipe).arguments
    prompts, hits = ([prompt], [hits]) if isinstance(prompt, str) else (list(prompt), hits)
    if len(prompts) != len(hits):
        raise ValueError(f"{len(prompts)} prompts with {len(hits)} lists of hits: give one for each prompt")
    if _checked(strength) == 0 or not any(hits):
        return {"prompt": prompt if isinstance(prompt, str) else prompts}
    texts = list(dict.fromkeys([*prompts, *(hit.text for near in hits for hit in near)]))
    weights = torch.zeros(len(prompts), len(texts))
    for row, text, near in zip(weights, prompts, hits):
        row[texts.index(text)] = 1 - strength if near else 1
        for hit, weight in zip(near, softmaxed(near)):
            row[texts.index(hit.text)] += strength * weight
    # All in one batch, so that encoders that pad to the longest text give equally many tokens.
    given = arguments(pipe, texts)
    mask = next((name for name in given if name.endswith("attention_mask")), None)
    mixed = {name: _mixed(tensor, weights) for name, tensor in given.items() if name != mask}
    if mask is not None:
        mixed["prompt_embeds"], mixed[mask] = _mixed_where_read(given["prompt_embeds"], given[mask], weights)
    return mixed


def _for_several(pipe: DiffusionPipeline, arguments: dict[str, Any], pictures: int) -> dict[str, Any]:
    """Arguments that ask for several pictures of each prompt."""
    family = family_of(pipe)
    if "prompt" not in arguments and not family.repeats:
        return {name: values.repeat_interleave(pictures, dim=0) for name, values in arguments.items()}
    taken = inspect.signature(type(pipe).__call__).parameters
    count = next(name for name in ("num_images_per_prompt", "num_waveforms_per_prompt") if name in taken)
    return arguments | {count: pictures}


def _mixed(values: Tensor, weights: Tensor) -> Tensor:
    """`(texts, ...)`, weighted by `(prompts, texts)` -> `(prompts, ...)`."""
    weights = weights.to(values.device)
    return torch.einsum("pt,t...->p...", weights, values.float()).to(values.dtype)


def _mixed_where_read(tokens: Tensor, mask: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens `(texts, tokens, width)`, mask `(texts, tokens)` -> the same of each prompt."""
    weights = weights.to(tokens.device)
    reaching = weights[:, :, None] * mask.to(weights)  # (prompts, texts, tokens)
    share = reaching.sum(1)
    read = torch.einsum("ptl,tlw->plw", reaching / share.clamp(min=1e-6)[:, None], tokens.float()).to(tokens.dtype)
    return torch.where((share > 0)[..., None], read, _mixed(tokens, weights)), (share > 0.5 - 1e-6).to(mask.dtype)


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


def _checked(strength: float) -> float:
    if not 0 <= strength <= 1:
        raise ValueError(f"strength is {strength}: choose from 0, which is off, to 1")
    return strength


def _parts(text: str) -> list[str]:
    return [part for part in map(str.strip, _SEPARATORS.split(text)) if words(part)]


def _is_new(detail: str, prompt: str) -> bool:
    """Whether a prompt neither says nor contradicts a detail, and is written in its script."""
    said, given = words(prompt), words(detail)
    if set(given) <= set(said) or not _scripts(detail) <= _scripts(prompt) | {"LATIN"}:
        return False
    if any(word in given for absent in _ABSENT.findall(prompt) for word in words(absent)):
        return False
    for sides in _OPPOSED:
        for side in sides:
            if side & set(given) and any(other & set(said) for other in sides if other is not side):
                return False
    return not any(_same_place(given, words(part)) for part in _parts(prompt))


def _same_place(one: list[str], other: list[str]) -> bool:
    """Whether two phrases say different things of one head: "noto style", "in flat style"; "on red", "on blue"."""
    if min(len(one), len(other)) < 2:
        return False
    differing = sum(first != second for first, second in zip(one, other))
    return one[-1] == other[-1] or (len(one) == len(other) and differing == 1)


def _scripts(text: str) -> set[str]:
    """The scripts of a text's letters, as their names begin: "LATIN", "HIRAGANA", "CJK"."""
    return {unicodedata.name(letter, "?").split()[0].split("-")[0] for letter in text if letter.isalpha()}


def _length_check(pipe: DiffusionPipeline) -> Callable[[str], bool]:
    """Whether each text encoder of a pipeline reads a text to its end."""
    limits = []
    for slot in slots_of(pipe).values():
        tokenizer = getattr(pipe, slot.tokenizer)
        if getattr(pipe, slot.name) is None:
            continue
        if isinstance(tokenizer, PackedTokenizer):
            limits += zip([tokenizer, *tokenizer.others], tokenizer.lengths)
        else:
            limits.append((tokenizer, padded_length(pipe, slot, tokenizer)))

    def fits(text: str) -> bool:
        return all(
            len(tokenizer.tokenize(text)) + tokenizer.num_special_tokens_to_add() <= limit
            for tokenizer, limit in limits
        )

    return fits
