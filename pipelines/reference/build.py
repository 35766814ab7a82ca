"""The whole recipe of the reference model as one resumable command with stages that can be run alone."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import AutoencoderTiny, StableDiffusionPipeline
from PIL import Image
from transformers import CLIPTextModel, CLIPTokenizer

from textcond import PromptIndex, TextEncoder
from textcond.files import half, read_tensors, write_tensors
from textcond.folders import atomic_folder, write_json

from .autoencoder import AutoencoderRecipe, held_out_psnr, train_autoencoder
from .card import model_card
from .clip import ClipRecipe, ImageTower, held_out_recall, ship_encoder, train_clip
from .data import DEFAULT_COLOUR, ReferenceData, caption, fetch_artwork, prepare
from .denoiser import DenoiserRecipe, train_denoiser
from .evaluate import evaluate, save_samples
from .judge import Judge, JudgeRecipe, judge_accuracy, train_judge

STAGES = ("data", "autoencoder", "clip", "denoiser", "judge", "evaluate", "ship")
THUMBNAIL = 96


@dataclass
class Recipe:
    """The options of every stage."""

    autoencoder: AutoencoderRecipe = field(default_factory=AutoencoderRecipe)
    clip: ClipRecipe = field(default_factory=ClipRecipe)
    denoiser: DenoiserRecipe = field(default_factory=DenoiserRecipe)
    judge: JudgeRecipe = field(default_factory=JudgeRecipe)


def build(
    out: str | Path, stages: Sequence[str] = STAGES, *, recipe: Recipe | None = None, artwork: str | Path | None = None
) -> Path:
    """Run `stages` in order under `out`; what a stage has finished is kept, what it has begun is resumed.

    Started by `torchrun --nproc_per_node N`, the training stages share each batch among N processes, with the same
    result within float tolerance.

    Args:
        out: the working folder; `out/emoji` is the finished model after stage "ship".
        artwork: a `node_modules` with the packages of the data recipe; npm installs them under `out` when None.

    Raises:
        ValueError: an unknown stage.
        FileNotFoundError: a stage whose input no earlier stage has made.
    """
    out = Path(out)
    for stage in stages:
        if stage not in STAGES:
            raise ValueError(f"there is no stage {stage!r}: choose from {', '.join(STAGES)}")
    recipe = recipe or Recipe()
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    if "data" in stages and not (out / "data" / "concepts.json").is_file() and accelerator.is_main_process:
        prepare(artwork or fetch_artwork(out / "artwork"), out / "data")
    accelerator.wait_for_everyone()
    if set(stages) <= {"data"}:
        return out
    if not (out / "data" / "concepts.json").is_file():
        raise FileNotFoundError(f"{out / 'data'} is not there: run stage data first")
    data = ReferenceData.load(out / "data")
    if "autoencoder" in stages:
        train_autoencoder(data, out / "autoencoder", recipe.autoencoder, accelerator)
    if "clip" in stages:
        train_clip(data, out / "clip", recipe.clip, accelerator)
    if "denoiser" in stages:
        train_denoiser(data, out / "autoencoder" / "vae", out / "clip", out / "denoiser", recipe.denoiser, accelerator)
    if "judge" in stages:
        train_judge(data, out / "autoencoder" / "vae", out / "judge", recipe.judge, accelerator)
    if "evaluate" in stages:
        measure(data, out, recipe.denoiser.concepts, accelerator)
    if "ship" in stages and accelerator.is_main_process:
        ship(out)
    accelerator.wait_for_everyone()
    return out


def measure(data: ReferenceData, out: Path, concepts: int, accelerator: Accelerator) -> None:
    """Score every component; write `out/scores.json`, and for the model card `out/samples.png` and `out/README.md`."""
    vae = AutoencoderTiny.from_pretrained(out / "autoencoder" / "vae").eval()
    judge = Judge.from_pretrained(out / "judge" / "judge")
    pipe = StableDiffusionPipeline.from_pretrained(out / "denoiser" / "pipeline")
    generated = evaluate(pipe, judge, data, concepts, accelerator)
    if not accelerator.is_main_process:
        return
    text_model = CLIPTextModel.from_pretrained(out / "clip" / "text_encoder", dtype=torch.float32).eval()
    tokenizer = CLIPTokenizer.from_pretrained(out / "clip" / "tokenizer")
    tower = ImageTower.from_pretrained(out / "clip" / "image_encoder")
    scores = {
        "concepts": concepts,
        "autoencoder PSNR on the held-out vendor, dB": held_out_psnr(data, vae),
        "text-to-picture recall@10 on the held-out vendor": held_out_recall(data, text_model, tokenizer, tower),
        "judge on real artwork through the autoencoder": judge_accuracy(data, judge, vae),
        "generated": generated,
    }
    prompts = save_samples(pipe, data, concepts, out / "samples.png")
    (out / "README.md").write_text(model_card(scores, prompts), encoding="utf-8")
    write_json(out / "scores.json", scores)
    print(json.dumps(scores, indent=1))


def ship(out: Path) -> Path:
    """Assemble `out/emoji`: the pipeline in float16, its text encoder with the image tower that shares its space."""
    source = out / "denoiser" / "pipeline"
    with atomic_folder(out / "emoji", owned=("*",)) as folder:
        for file in sorted(source.rglob("*")):
            target = folder / file.relative_to(source)
            if file.is_dir():
                target.mkdir()
            elif file.suffix == ".safetensors":
                write_tensors(target, half(read_tensors(file)))
            else:
                shutil.copy(file, target)
        for name in ("README.md", "samples.png"):
            if not (out / name).is_file():
                raise FileNotFoundError(f"{out / name} is not there: run stage evaluate first")
            shutil.copy(out / name, folder / name)
        ship_encoder(out / "clip", folder / "text_encoder")
    return out / "emoji"


def build_index(
    data: ReferenceData,
    encoder: TextEncoder,
    out: str | Path,
    concepts: int | None = None,
    languages: Sequence[str] = ("en",),
) -> PromptIndex:
    """Index the reference captions at `out`, each row with a picture on white.

    There is an English row "{name}, {style} style" for each drawing. In another language a concept has one row, its
    CLDR name, with the first of its drawings.

    Raises:
        ValueError: a language that CLDR does not have; "all" means every one.
    """
    known = sorted({language for concept in data.concepts for language in concept.names})
    languages = ["en", *known] if list(languages) == ["all"] else list(languages)
    if unknown := sorted(set(languages) - {"en", *known}):
        raise ValueError(f"CLDR has no names in {', '.join(unknown)}: choose from en, {', '.join(known)}")
    index = PromptIndex(encoder)
    texts, metadata, images, named = [], [], [], set()
    for row in data.rows(concepts):
        number, style = data.icons[row]
        concept = data.concepts[number]
        picture = _thumbnail(data, row)
        for language in languages:
            text = caption(concept, style) if language == "en" else concept.names.get(language)
            if text is None or (number, language) in named:
                continue
            if language != "en":
                named.add((number, language))
            texts.append(text)
            metadata.append({"concept": concept.name, "emoji": concept.emoji, "style": style, "language": language})
            images.append(picture)
    index.add(texts, metadata, images, show_progress_bar=True)
    index.save(out)
    return index


def _thumbnail(data: ReferenceData, row: int) -> bytes:
    pixels = ((data.composite([row], [DEFAULT_COLOUR])[0] + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
    picture = Image.fromarray(pixels).resize((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    content = io.BytesIO()
    picture.save(content, "WEBP", quality=80)
    return content.getvalue()
