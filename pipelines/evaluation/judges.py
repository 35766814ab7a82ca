"""Judges: what is seen in a picture, said by a model that shares no weights with what made it.

A judge is a callable `(pictures, cases) -> scores`: by name, one number a picture, NaN where the case asks for nothing.
One that has a `fingerprint` lets its scores be kept on disk; one that has a `model` is checked for shared weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from textcond.folders import check_weights, model_folder
from textcond.pipelines.reference.data import COLOURS, STYLES
from textcond.pipelines.reference.evaluate import to_pixels
from textcond.pipelines.reference.judge import Judge

from .cache import fingerprint
from .cases import Case

Scores = dict[str, np.ndarray]

JUDGE_WEIGHTS = Path(__file__).parent.parent / "reference" / "judge_weights"
# The concepts that the shipped denoiser was taught: the judge knows more, and must not be asked to choose among them.
TAUGHT_CONCEPTS = 300
# Smaller tensors (biases, norms) can be equal by chance: both all zeros, say.
_TELLING_SIZE = 1024


class EmojiJudge:
    """The reference model's judge: hits of `concept` (top 1), `top5`, `style` and `colour`.

    Args:
        folder: of the judge; the one that ships if left out.
        among: how many concepts, in the order of the reference data, it chooses from.

    Raises:
        ValueError: for a judge without the names of its concepts, or with fewer than `among`.
    """

    def __init__(self, folder: str | Path = JUDGE_WEIGHTS, among: int = TAUGHT_CONCEPTS):
        self.model = Judge.from_pretrained(folder)
        names = self.model.names
        if not names:
            raise ValueError(f"{folder} does not name its concepts: train the judge again, or use the one that ships")
        if not 1 <= among <= len(names):
            raise ValueError(f"among is {among}, the judge knows {len(names)} concepts: choose from 1 to {len(names)}")
        self.among = among
        self.labels = {"concept": list(names), "style": list(STYLES), "colour": list(COLOURS)}

    @cached_property
    def fingerprint(self) -> str:
        """Of weights, names and options."""
        return f"{fingerprint(self.model)}-{self.among}"

    def check(self, cases: Sequence[Case]) -> None:
        """Refuse cases that this judge cannot score.

        Raises:
            ValueError: naming what it does not know, or if no case expects anything.
        """
        for case in cases:
            for key, value in case.expected.items():
                if key not in self.labels:
                    raise ValueError(
                        f"the emoji judge does not score {key!r} ({case.prompt!r}): "
                        f"expected may hold {', '.join(self.labels)}"
                    )
                if value not in self.labels[key]:
                    raise ValueError(f"the emoji judge knows no {key} {value!r} ({case.prompt!r}): correct the case")
                if key == "concept" and self.labels[key].index(value) >= self.among:
                    raise ValueError(
                        f"{value!r} is concept {self.labels[key].index(value) + 1} of the judge, "
                        f"which chooses among the first {self.among}: raise among, or leave out the case"
                    )
        if not any(case.expected for case in cases):
            raise ValueError(
                'no case says what to expect, as {"expected": {"concept": "fox"}}: add it, or use no judge'
            )

    @torch.inference_mode()
    def __call__(self, pictures: Sequence[Image.Image], cases: Sequence[Case]) -> Scores:
        """Score pictures: 1 for a hit, 0 for a miss."""
        self.check(cases)
        verdict = self.model(to_pixels(list(pictures)))
        scores = {}
        for name, key, logits, best in (
            ("concept", "concept", verdict.concept[:, : self.among], 1),
            ("top5", "concept", verdict.concept[:, : self.among], 5),
            ("style", "style", verdict.style, 1),
            ("colour", "colour", verdict.colour, 1),
        ):
            ranked = logits.topk(min(best, logits.shape[1]), dim=1).indices.tolist()
            scores[name] = np.array([
                float(self.labels[key].index(case.expected[key]) in row) if key in case.expected else np.nan
                for row, case in zip(ranked, cases)
            ])  # fmt: skip
        return scores


class ClipJudge:
    """Cosine of picture and English text in an image-text model's space.

    Pick one that neither the pipeline nor any encoder under test was made from: it would praise its own relatives.

    Args:
        source: folder or hub id of a CLIP-like model in transformers, or `open_clip:MODEL/TAG`,
            `open_clip:MODEL/FILE.safetensors`, `open_clip:hf-hub:ID`, `open_clip:local-dir:FOLDER`.

    Raises:
        FileNotFoundError: if no weights are within reach.
        ValueError: for an `open_clip:` name without weights, or a model that gives no vectors of both.
    """

    def __init__(self, source: str):
        load = _open_clip if source.startswith("open_clip:") else _transformers
        self.model, self._embed = load(source.removeprefix("open_clip:"))

    @cached_property
    def fingerprint(self) -> str:
        """Of the weights."""
        return fingerprint(self.model)

    @torch.inference_mode()
    def __call__(self, pictures: Sequence[Image.Image], cases: Sequence[Case]) -> Scores:
        """Score pictures from -1 to 1."""
        images, texts = self._embed(list(pictures), [case.english for case in cases])
        return {"cosine": nn.functional.cosine_similarity(images.float(), texts.float()).numpy()}


def shares_weights(judge: nn.Module, judged: nn.Module) -> bool:
    """Whether a weight matrix of a judge is also one of what it judges, to half precision."""

    def telling(module: nn.Module) -> list[torch.Tensor]:
        return [tensor for tensor in module.parameters() if tensor.ndim > 1 and tensor.numel() >= _TELLING_SIZE]

    by_shape: dict[torch.Size, list[torch.Tensor]] = {}
    for tensor in telling(judge):
        by_shape.setdefault(tensor.shape, []).append(tensor.detach().cpu().half())
    return any(
        torch.equal(tensor.detach().cpu().half(), other)
        for tensor in telling(judged)
        if tensor.shape in by_shape
        for other in by_shape[tensor.shape]
    )


Embed = Callable[[list[Image.Image], list[str]], tuple[torch.Tensor, torch.Tensor]]


def _transformers(source: str) -> tuple[nn.Module, Embed]:
    from transformers import AutoModel, AutoProcessor

    folder = model_folder(source)
    check_weights(folder)
    model = AutoModel.from_pretrained(folder, use_safetensors=True, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(folder)

    def embed(pictures: list[Image.Image], texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        inputs = processor(text=texts, images=pictures, padding="max_length", truncation=True, return_tensors="pt")
        output: Any = model(**inputs)
        if getattr(output, "image_embeds", None) is None:
            raise ValueError(f"{type(model).__name__} gives no vectors of pictures and texts: pass a CLIP-like model")
        return output.image_embeds, output.text_embeds

    return model, embed


def _open_clip(source: str) -> tuple[nn.Module, Embed]:
    import open_clip

    whole = source.startswith(("hf-hub:", "local-dir:"))
    name, _, weights = (source, "", "") if whole else source.partition("/")
    # Without a tag open_clip makes random weights, which would score without complaint.
    if not whole and not weights:
        raise ValueError(f"open_clip:{source} names no weights: add /TAG or /FILE.safetensors")
    try:
        model, _, transform = open_clip.create_model_and_transforms(name, pretrained=weights or None)
    except Exception as error:  # the hub client raises a dozen kinds, from OSError to its own
        raise FileNotFoundError(
            f"open_clip:{source} gives no judge ({type(error).__name__}: {error}): check the name, file and network"
        ) from error
    tokenizer = open_clip.get_tokenizer(name)
    model.eval()

    def embed(pictures: list[Image.Image], texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        pixels = torch.stack([transform(picture.convert("RGB")) for picture in pictures])
        return model.encode_image(pixels), model.encode_text(tokenizer(texts))

    return model, embed
