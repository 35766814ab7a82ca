"""Stage "clip": the native text encoder, trained with InfoNCE and hard negatives against an open_clip image tower."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from tokenizers import Tokenizer, trainers
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from textcond import TextEncoder, TextEncoderConfig
from textcond.files import half, read_tensors, write_tensors
from textcond.folders import atomic_folder, read_json, write_json
from textcond.index.image_text import ImageTextEncoder, OpenClipTower
from textcond.losses import info_nce
from textcond.pipelines.loop import fit, share, step_generator

from .data import (
    COLOURS,
    DEFAULT_COLOUR,
    HELD_OUT_STYLE,
    STYLES,
    Concept,
    ReferenceData,
    caption,
    composite,
    is_held_out,
)

MAX_TOKENS = 32
IMAGE_SIZE = 64


@dataclass
class ClipRecipe:
    """Options of the stage. Of each batch one third are anchors, the rest are their look-alikes and read-alikes."""

    width: int = 256
    layers: int = 4
    vocabulary: int = 4096
    steps: int = 900
    batch: int = 96
    learning_rate: float = 2e-3
    seed: int = 1


# -- the two towers --------------------------------------------------------------------------------------------------


def train_tokenizer(data: ReferenceData, vocabulary: int) -> CLIPTokenizer:
    """A CLIP tokenizer (lower-cased byte-level BPE) with its own vocabulary, learned from names, keywords, captions.

    Padding has a token of its own, so that every mask rule can tell it from the end of the text.
    """
    texts = [caption(concept) for concept in data.concepts]
    texts += [keyword for concept in data.concepts for keyword in concept.keywords]
    texts += [caption(data.concepts[0], style, colour) for style in STYLES for colour in COLOURS] * 20
    shape = CLIPTokenizer().backend_tokenizer
    special = ["<|startoftext|>", "<|endoftext|>", "<|pad|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=special,
        end_of_word_suffix="</w>",
        initial_alphabet=_byte_alphabet(),
        show_progress=False,
    )
    learner = Tokenizer(BPE(end_of_word_suffix="</w>", unk_token="<|endoftext|>"))
    learner.normalizer, learner.pre_tokenizer = shape.normalizer, shape.pre_tokenizer
    learner.train_from_iterator(texts, trainer)
    model = json.loads(learner.to_str())["model"]
    vocab = dict(model["vocab"])
    # A word may end in any byte: without these a final character outside the training text would be unknown.
    for character in _byte_alphabet():
        vocab.setdefault(character + "</w>", len(vocab))
    merges = [tuple(pair) for pair in model["merges"]]
    return CLIPTokenizer(vocab=vocab, merges=merges, pad_token="<|pad|>", model_max_length=MAX_TOKENS)


def _byte_alphabet() -> list[str]:
    return sorted(ByteLevel.alphabet())


def new_text_model(recipe: ClipRecipe, tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """An untrained CLIP text transformer; the normalised end-of-text state is the vector, with no projection."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=recipe.width,
            projection_dim=recipe.width,
            intermediate_size=4 * recipe.width,
            num_hidden_layers=recipe.layers,
            num_attention_heads=recipe.width // 64,
            max_position_embeddings=MAX_TOKENS,
            hidden_act="gelu",
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


class ImageTower(nn.Module):
    """open_clip's modified ResNet on 64x64 pictures; vectors in one space with the text encoder's."""

    def __init__(self, dim: int, layers: tuple[int, ...] = (1, 2, 2, 1), width: int = 32):
        super().__init__()
        self.config = {"dim": dim, "layers": list(layers), "width": width}
        vision = {"layers": list(layers), "width": width, "image_size": IMAGE_SIZE, "head_width": 64}
        text = {"context_length": 8, "vocab_size": 8, "width": 8, "heads": 1, "layers": 1}
        self.visual = open_clip.CLIP(embed_dim=dim, vision_cfg=vision, text_cfg=text).visual

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Pixels `(b, 3, h, w)` in -1..1 -> unit vectors `(b, dim)`."""
        if pixels.shape[-1] != IMAGE_SIZE:
            pixels = F.interpolate(pixels, size=(IMAGE_SIZE, IMAGE_SIZE), mode="area")
        return F.normalize(self.visual(pixels).float(), dim=-1)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `config.json` and `model.safetensors` (fp16)."""
        with atomic_folder(folder, owned=("*",)) as partial:
            write_json(partial / "config.json", self.config)
            write_tensors(partial / "model.safetensors", half(self.state_dict()))

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> ImageTower:
        """Read what `save_pretrained` wrote, in float32 and evaluation mode."""
        tower = cls(**read_json(Path(folder) / "config.json"))
        tower.load_state_dict(read_tensors(Path(folder) / "model.safetensors"))
        return tower.eval()

    def as_open_clip(self) -> OpenClipTower:
        """The same weights as a tower that prepares pictures of any size itself."""
        vision = {"layers": self.config["layers"], "width": self.config["width"], "image_size": IMAGE_SIZE}
        model = {"embed_dim": self.config["dim"], "vision_cfg": vision | {"head_width": 64}}
        scaled = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bilinear", "resize_mode": "squash"}
        tower = OpenClipTower(model, scaled)
        tower.visual.load_state_dict(self.visual.state_dict())
        return tower


class TwoTowers(nn.Module):
    """Text and image tower with a learned temperature."""

    def __init__(self, text_model: CLIPTextModel, image_tower: ImageTower):
        super().__init__()
        self.text_model, self.image_tower = text_model, image_tower
        self.log_scale = nn.Parameter(torch.tensor(float(np.log(1 / 0.07))))

    def forward(self, input_ids: torch.Tensor, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Ids `(t, tokens)`, pixels `(b, 3, 64, 64)` -> unit text and picture vectors, temperature."""
        texts = F.normalize(self.text_model(input_ids).pooler_output.float(), dim=-1)
        return texts, self.image_tower(pixels), (-self.log_scale.clamp(max=np.log(100.0))).exp()


# -- batches ---------------------------------------------------------------------------------------------------------


@dataclass
class Claim:
    """What a caption says: its words are true of some concepts, in one style or any, on one colour or any."""

    text: str
    concepts: frozenset[int]
    style: str | None
    colour: str | None

    def is_true_of(self, concept: int, style: str, colour: str) -> bool:
        """Whether the caption describes a picture."""
        return concept in self.concepts and self.style in (None, style) and self.colour in (None, colour)


class HardNegatives:
    """Neighbours of each concept that look alike (small pictures) or read alike (names and keywords)."""

    def __init__(self, data: ReferenceData, count: int = 8):
        self.look = _nearest(self._pictures(data), count)
        self.read = _nearest(self._words(data.concepts), count)
        self.names = [frozenset({concept.name, *concept.keywords}) for concept in data.concepts]

    @staticmethod
    def _pictures(data: ReferenceData) -> np.ndarray:
        sums = np.zeros((len(data.concepts), 16 * 16 * 4), dtype=np.float32)
        for row in data.rows():
            small = data.pixels[row].reshape(16, 8, 16, 8, 4).astype(np.float32).mean((1, 3))
            sums[data.icons[row][0]] += small.reshape(-1)
        return sums - sums.mean(0)

    @staticmethod
    def _words(concepts: list[Concept]) -> np.ndarray:
        bags = [{*concept.name.split(), *concept.keywords} for concept in concepts]
        words = {word: index for index, word in enumerate(sorted(set().union(*bags)))}
        matrix = np.zeros((len(bags), len(words)), dtype=np.float32)
        for row, bag in enumerate(bags):
            matrix[row, [words[word] for word in bag]] = 1
        return matrix * np.log(len(bags) / matrix.sum(0))

    def true_concepts(self, words: list[str]) -> frozenset[int]:
        """Concepts of which every one of `words` is a name or keyword."""
        return frozenset(index for index, names in enumerate(self.names) if names.issuperset(words))


def _nearest(features: np.ndarray, count: int) -> np.ndarray:
    features = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-6)
    scores = features @ features.T
    np.fill_diagonal(scores, -np.inf)
    return np.argsort(-scores, axis=1, kind="stable")[:, : min(count, len(scores) - 1)]


class ClipBatches:
    """Pictures, true captions and one false caption each, drawn from a step's generator."""

    def __init__(self, data: ReferenceData):
        self.data, self.negatives = data, HardNegatives(data)
        self.by_concept: dict[int, list[tuple[int, str]]] = {}
        for row in data.rows():
            concept, style = data.icons[row]
            self.by_concept.setdefault(concept, []).append((row, style))
        small = data.pixels.reshape(len(data.pixels), IMAGE_SIZE, 2, IMAGE_SIZE, 2, 4)
        self.small = np.stack([picture.mean((1, 3)).astype(np.uint8) for picture in small])

    def draw(self, batch: int, rng: np.random.Generator) -> Iterator[tuple[int, str, Claim, Claim]]:
        """Yield (row, colour, true caption, false caption), look- and read-alikes following their anchor."""
        for _ in range(batch // 3):
            anchor = int(rng.integers(len(self.data.concepts)))
            for concept in (
                anchor,
                int(rng.choice(self.negatives.look[anchor])),
                int(rng.choice(self.negatives.read[anchor])),
            ):
                row, style = self.by_concept[concept][int(rng.integers(len(self.by_concept[concept])))]
                colours = [c for c in COLOURS if not is_held_out(self.data.concepts[concept].name, style, c)]
                colour = DEFAULT_COLOUR if rng.random() < 0.4 else str(rng.choice(colours))
                yield row, colour, *self._captions(concept, style, colour, rng)

    def _captions(self, concept: int, style: str, colour: str, rng: np.random.Generator) -> tuple[Claim, Claim]:
        subject = self.data.concepts[concept]
        words, true_of = subject.name, frozenset({concept})
        if rng.random() < 0.3 and subject.keywords:
            chosen = list(rng.permutation(subject.keywords)[: int(rng.integers(1, 4))])
            words, true_of = ", ".join(chosen), self.negatives.true_concepts(chosen)
        said_style = style if rng.random() < 0.6 else None
        said_colour = colour if rng.random() < 0.6 else None
        true = Claim(caption(subject, said_style, said_colour, words=words), true_of, said_style, said_colour)
        # The false caption differs in one thing: the style, the colour, or the subject.
        wrong_style, wrong_colour, wrong = said_style, said_colour, concept
        kind = rng.random()
        if said_style and kind < 0.35:
            wrong_style = str(rng.choice([name for name in STYLES if name != style]))
        elif said_colour and kind < 0.7:
            wrong_colour = str(rng.choice([name for name in COLOURS if name != colour]))
        else:
            table = self.negatives.look if rng.random() < 0.5 else self.negatives.read
            wrong = int(rng.choice(table[concept]))
            words, true_of = self.data.concepts[wrong].name, frozenset({wrong})
        text = caption(self.data.concepts[wrong], wrong_style, wrong_colour, words=words)
        return true, Claim(text, true_of, wrong_style, wrong_colour)

    def pixels(self, rows: list[int], colours: list[str]) -> torch.Tensor:
        """Pictures at 64x64, float in -1..1, `(b, 3, 64, 64)`."""
        rgba = torch.from_numpy(self.small[rows]).float().permute(0, 3, 1, 2)
        return composite(rgba, torch.tensor([COLOURS[colour] for colour in colours]).float()[:, :, None, None])


def augment(pixels: torch.Tensor, generator: torch.Generator, strength: float = 1.0) -> torch.Tensor:
    """Random scale, shift, slight rotation, brightness and contrast: what tells vendors apart must not matter."""
    count = pixels.shape[0]
    random = torch.rand((count, 6), generator=generator) * 2 - 1
    angle, zoom = random[:, 0] * 0.2 * strength, 1 + random[:, 1] * 0.2 * strength
    theta = torch.zeros(count, 2, 3)
    theta[:, 0, 0], theta[:, 0, 1] = zoom * angle.cos(), -zoom * angle.sin()
    theta[:, 1, 0], theta[:, 1, 1] = zoom * angle.sin(), zoom * angle.cos()
    theta[:, :, 2] = random[:, 2:4] * 0.15 * strength
    grid = F.affine_grid(theta, list(pixels.shape), align_corners=False)
    moved = F.grid_sample(pixels, grid, padding_mode="border", align_corners=False)
    contrast = 1 + random[:, 4, None, None, None] * 0.15 * strength
    return (moved * contrast + random[:, 5, None, None, None] * 0.08 * strength).clamp(-1, 1)


# -- training --------------------------------------------------------------------------------------------------------


def train_clip(data: ReferenceData, out: Path, recipe: ClipRecipe, accelerator: Accelerator) -> Path:
    """Train both towers; save `out/tokenizer`, `out/text_encoder` (also a sentence-transformers folder) and
    `out/image_encoder`."""
    torch.manual_seed(recipe.seed)
    tokenizer = train_tokenizer(data, recipe.vocabulary)
    model = TwoTowers(new_text_model(recipe, tokenizer), ImageTower(recipe.width))
    batches = ClipBatches(data)
    mine = share(accelerator, recipe.batch)

    def loss(prepared: nn.Module, step: int) -> tuple[torch.Tensor, dict[str, float]]:
        generator = step_generator(recipe.seed, step)
        drawn = list(batches.draw(recipe.batch, np.random.default_rng([recipe.seed, step])))[mine]
        rows, colours, true, false = zip(*drawn)
        pixels = augment(batches.pixels(list(rows), list(colours)), generator)
        ids = tokenizer([claim.text for claim in (*true, *false)], padding=True, truncation=True, return_tensors="pt")
        texts, pictures, temperature = prepared(ids.input_ids, pixels)
        facts = [(data.icons[row][0], data.icons[row][1], colour) for row, colour in zip(rows, colours)]
        fits = torch.tensor([[claim.is_true_of(*fact) for claim in (*true, *false)] for fact in facts])
        count = len(facts)
        own = torch.arange(count)
        to_text = info_nce(pictures @ texts.T / temperature, own, excluded=fits)
        to_picture = info_nce(texts[:count] @ pictures.T / temperature, own, excluded=fits[:, :count].T)
        with torch.no_grad():
            best = (pictures @ texts.T).masked_fill(fits & ~torch.eye(count, 2 * count, dtype=torch.bool), -1).argmax(1)
            accuracy = (best == torch.arange(count)).float().mean().item()
        return (to_text + to_picture) / 2, {"accuracy": accuracy, "temperature": temperature.item()}

    fit(
        "clip", model, loss, out=out, steps=recipe.steps, batch=recipe.batch, decay=0.5, weight_decay=0.05,
        learning_rate=recipe.learning_rate, bf16=True, accelerator=accelerator,
    )  # fmt: skip
    if accelerator.is_main_process:
        save_clip(out, model, tokenizer)
    accelerator.wait_for_everyone()
    return out


def save_clip(out: Path, model: TwoTowers, tokenizer: CLIPTokenizer) -> None:
    """Write the three component folders of the stage."""
    config = TextEncoderConfig(pooling="eos", normalize=True, max_length=MAX_TOKENS)
    TextEncoder(model.text_model.eval(), tokenizer, config).save_pretrained(out / "text_encoder")
    with atomic_folder(out / "tokenizer", owned=("*",)) as folder:
        tokenizer.save_pretrained(folder)
    model.image_tower.save_pretrained(out / "image_encoder")


def ship_encoder(clip: Path, folder: Path) -> None:
    """Write what the stage left at `clip` as one text encoder folder with its image tower, in float16.

    It is also a sentence-transformers folder: the same weights condition pictures, find prompts, and find them by
    pictures.
    """
    text = TextEncoder.from_pretrained(clip / "text_encoder")
    tower = ImageTower.from_pretrained(clip / "image_encoder").as_open_clip()
    both = ImageTextEncoder.from_towers(text, tower)
    both.save_pretrained(folder)
    for weights in folder.rglob("*.safetensors"):
        write_tensors(weights, half(read_tensors(weights)))


@torch.inference_mode()
def held_out_recall(
    data: ReferenceData, text_model: CLIPTextModel, tokenizer: CLIPTokenizer, tower: ImageTower, k: int = 10
) -> float:
    """Share of concept names whose picture by the held-out vendor is among the `k` nearest of all that vendor's."""
    rows = data.rows(styles=[HELD_OUT_STYLE])
    pictures = torch.cat([tower(data.composite(rows[i : i + 64], [DEFAULT_COLOUR] * len(rows[i : i + 64])))
                          for i in range(0, len(rows), 64)])  # fmt: skip
    names = [data.concepts[data.icons[row][0]].name for row in rows]
    ids = tokenizer(names, padding=True, truncation=True, return_tensors="pt").input_ids
    texts = F.normalize(text_model(ids).pooler_output, dim=-1)
    nearest = (texts @ pictures.T).topk(k, dim=1).indices
    return float((nearest == torch.arange(len(rows))[:, None]).any(1).float().mean())
