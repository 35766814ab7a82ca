"""Text and pictures in one space: the two towers of a CLIP or SigLIP model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from torch import nn
from tqdm.auto import tqdm
from transformers import AutoImageProcessor, AutoTokenizer, CLIPVisionModelWithProjection

from textcond.encoder import OPEN_CLIP, TextEncoder, TextEncoderConfig
from textcond.files import write_tensors
from textcond.folders import check_weights, model_folder, read_json, write_json
from textcond.open_clip_import import CONFIG, WEIGHTS, find_open_clip

from .pictures import read_picture

IMAGE_FOLDER = "image_encoder"
WHOLE_MODELS = {"clip": "CLIPModel", "siglip": "SiglipModel"}
VISION_MODELS = {"clip_vision_model": "CLIPVisionModelWithProjection", "siglip_vision_model": "SiglipVisionModel"}


class ImageTextEncoder(TextEncoder):
    """A TextEncoder with the image tower that shares its space, so that a PromptIndex takes pictures as queries.

    The weights' hash is that of the text side: it made the vectors of an index, which therefore opens with either.

    Args:
        backbone, tokenizer, config, projection: as of TextEncoder.
        image_tower: a `TransformersTower` or `OpenClipTower` that gives vectors of the text vectors' width.

    Raises:
        ValueError: if the widths differ.
    """

    def __init__(
        self,
        backbone: nn.Module,
        tokenizer: Any,
        config: TextEncoderConfig | None = None,
        projection: nn.Module | None = None,
        *,
        image_tower: TransformersTower | OpenClipTower,
    ):
        super().__init__(backbone, tokenizer, config, projection)
        if image_tower.dim != self.dim:
            raise ValueError(
                f"the image tower gives {image_tower.dim}-wide vectors, the text encoder {self.dim}: they are not of "
                "one model"
            )
        self.image_tower = image_tower

    @classmethod
    def from_pretrained(
        cls, name_or_path: str | Path, *, dtype: torch.dtype = torch.float32, device: Any = None, **options: Any
    ) -> ImageTextEncoder:
        """Load both towers of a model.

        `name_or_path` is the folder or hub id of a transformers CLIP or SigLIP model, an `open_clip:` name as
        `TextEncoder.from_pretrained` takes it, or a TextEncoder folder with its image tower in `image_encoder/`.

        Args:
            name_or_path: see above.
            dtype: of both towers; vectors are float32.
            device: of both towers.
            options: further ones of `TextEncoder.from_pretrained`.

        Raises:
            FileNotFoundError: no such model, or no safetensors weights in it.
            ValueError: for a model without an image tower, damaged weights, or options that do not fit.
        """
        name = str(name_or_path)
        folder = None if name.startswith(OPEN_CLIP) else model_folder(name, revision=options.get("revision"))
        if folder is not None and _model_type(folder) == "siglip":
            if set(options) - {"revision"}:
                raise ValueError(f"a SigLIP model takes no {', '.join(options)}: its texts are read in one way")
            encoder = _siglip(folder, dtype)
        else:
            tower = _open_clip_tower(name.removeprefix(OPEN_CLIP)) if folder is None else load_image_tower(folder)
            if tower is None:
                raise ValueError(f"{name} has no image tower: give a CLIP or SigLIP model")
            encoder = cls.from_towers(TextEncoder.from_pretrained(name_or_path, dtype=dtype, **options), tower)
        encoder.name_or_path = name
        encoder.image_tower.to(dtype)
        return encoder if device is None else encoder.to(device)

    @classmethod
    def from_towers(cls, text: TextEncoder, image_tower: TransformersTower | OpenClipTower) -> ImageTextEncoder:
        """The parts of `text`, which are shared and not copied, with a tower."""
        encoder = cls(text.backbone, text.tokenizer, text.config, text.projection, image_tower=image_tower)
        encoder.heads, encoder.name_or_path = text.heads, text.name_or_path
        return encoder

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a TextEncoder folder with the image tower in `image_encoder/`; `from_pretrained` reads both back."""
        super().save_pretrained(folder)
        self.image_tower.save_pretrained(Path(folder).expanduser() / IMAGE_FOLDER)

    @torch.inference_mode()
    def encode_image(
        self,
        images: Sequence[Image.Image | str | Path | bytes],
        *,
        batch_size: int = 32,
        show_progress_bar: bool = False,
    ) -> np.ndarray:
        """Encode pictures to float32 unit vectors `(n, dim)` in their order.

        Args:
            images: PIL images, files or the bytes of files.
            batch_size: pictures that go through the tower together.
            show_progress_bar: show progress and rate.

        Raises:
            FileNotFoundError: for a file that is not there.
            ValueError: for a damaged picture or a decompression bomb.
        """
        self.image_tower.eval()
        vectors = [np.empty((0, self.dim), np.float32)]
        with tqdm(total=len(images), desc="encode", unit="picture", disable=not show_progress_bar) as progress:
            for start in range(0, len(images), batch_size):
                pictures = [read_picture(image) for image in images[start : start + batch_size]]
                pixels = self.image_tower.prepare(pictures).to(self.device, self.dtype)
                found = self.image_tower(pixels).float()
                vectors.append(nn.functional.normalize(found, dim=-1).cpu().numpy())
                progress.update(len(pictures))
        return np.concatenate(vectors)


def load_encoder(name_or_path: str | Path, **options: Any) -> TextEncoder:
    """Load an encoder with its image tower where the model has one, else its text side: `from_pretrained` of either."""
    name = str(name_or_path)
    if name.startswith(OPEN_CLIP):
        return ImageTextEncoder.from_pretrained(name, **options)
    folder = model_folder(name, revision=options.get("revision"), code=options.get("trust_remote_code", False))
    has_tower = (folder / IMAGE_FOLDER).is_dir() or _has_both_towers(folder)
    return (ImageTextEncoder if has_tower else TextEncoder).from_pretrained(name_or_path, **options)


class TransformersTower(nn.Module):
    """The vision model of transformers' CLIP or SigLIP with its image processor."""

    def __init__(self, model: nn.Module, processor: Any):
        super().__init__()
        self.model, self.processor = model.eval(), processor

    @property
    def dim(self) -> int:
        """Width of the vectors."""
        return getattr(self.model.config, "projection_dim" if _is_clip(self.model) else "hidden_size")

    def prepare(self, pictures: Sequence[Image.Image]) -> torch.Tensor:
        """Return RGB pictures as the tower's pixels `(n, 3, height, width)`."""
        return self.processor(images=list(pictures), return_tensors="pt")["pixel_values"]

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return the vectors `(n, dim)` of pixels."""
        output = self.model(pixel_values=pixels)
        return output.image_embeds if _is_clip(self.model) else output.pooler_output

    def save_pretrained(self, folder: Path) -> None:
        """Write a transformers folder."""
        self.model.save_pretrained(folder)
        self.processor.save_pretrained(folder)


class OpenClipTower(nn.Module):
    """The image tower of an open_clip model with its way of preparing pictures.

    Args:
        model_config: open_clip's, of which `embed_dim`, `vision_cfg` and `quick_gelu` count.
        preprocess_config: what differs from open_clip's defaults in size, mean, std, interpolation, resize mode.
    """

    def __init__(self, model_config: dict[str, Any], preprocess_config: dict[str, Any]):
        from open_clip import CLIP
        from open_clip.transform import PreprocessCfg, image_transform_v2, merge_preprocess_dict

        super().__init__()
        # open_clip builds no image tower alone
        text = {"context_length": 8, "vocab_size": 8, "width": 8, "heads": 1, "layers": 1}
        own = {key: model_config[key] for key in ("embed_dim", "vision_cfg", "quick_gelu") if key in model_config}
        self.config = own | {"text_cfg": text}
        self.visual = CLIP(**self.config).visual.eval()
        size = {"size": self.visual.image_size}
        self.preprocess_config = merge_preprocess_dict(size, preprocess_config)
        self._transform = image_transform_v2(PreprocessCfg(**self.preprocess_config), is_train=False)

    @property
    def dim(self) -> int:
        """Width of the vectors."""
        return self.config["embed_dim"]

    def prepare(self, pictures: Sequence[Image.Image]) -> torch.Tensor:
        """Return RGB pictures as the tower's pixels `(n, 3, height, width)`."""
        return torch.stack([self._transform(picture) for picture in pictures])

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return the vectors `(n, dim)` of pixels."""
        return self.visual(pixels)

    def save_pretrained(self, folder: Path) -> None:
        """Write what open_clip calls a local folder, with the image tower alone in it."""
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / CONFIG, {"model_cfg": self.config, "preprocess_cfg": self.preprocess_config})
        write_tensors(folder / WEIGHTS, {f"visual.{name}": tensor for name, tensor in self.visual.state_dict().items()})


class _SiglipEncoder(ImageTextEncoder):
    """SigLIP reads every text padded to its full length, attends to the padding, and takes the last place's state."""

    def save_pretrained(self, folder: str | Path) -> None:
        """Refused: the folder would be read without the padding.

        Raises:
            ValueError: always.
        """
        raise ValueError(f"a SigLIP model keeps its own layout: copy {self.name_or_path} in place of saving it")

    def _token_ids(self, texts: Sequence[str], prompt: str) -> list[list[int]]:
        length = self.max_length
        return [row + [self._blank_id] * (length - len(row)) for row in super()._token_ids(texts, prompt)]


def _siglip(folder: Path, dtype: torch.dtype) -> ImageTextEncoder:
    whole = _loaded("SiglipModel", folder)
    model = whole.text_model.to(dtype)
    config = TextEncoderConfig(pooling="last", normalize=False, max_length=model.config.max_position_embeddings)
    tower = TransformersTower(whole.vision_model, _processor(folder))
    return _SiglipEncoder(model, AutoTokenizer.from_pretrained(folder), config, model.head, image_tower=tower)


def load_image_tower(folder: Path) -> TransformersTower | OpenClipTower | None:
    """The image tower in a model folder, in evaluation mode and float32; None if there is none."""
    if (folder / IMAGE_FOLDER).is_dir():
        folder = folder / IMAGE_FOLDER
        if (folder / CONFIG).exists():
            return _open_clip_tower(f"local-dir:{folder}")
    model_type = _model_type(folder)
    if model_type in VISION_MODELS:
        return TransformersTower(_loaded(VISION_MODELS[model_type], folder), _processor(folder))
    if not _has_both_towers(folder):
        return None
    whole = _loaded(WHOLE_MODELS[model_type], folder)
    if model_type == "siglip":
        return TransformersTower(whole.vision_model, _processor(folder))
    config = whole.config.vision_config
    config.projection_dim = whole.config.projection_dim
    model = CLIPVisionModelWithProjection(config)
    model.vision_model, model.visual_projection = whole.vision_model, whole.visual_projection
    return TransformersTower(model, _processor(folder))


def _has_both_towers(folder: Path) -> bool:
    return _model_type(folder) in WHOLE_MODELS and "vision_config" in read_json(folder / "config.json")


def _processor(folder: Path) -> Any:
    if not (folder / "preprocessor_config.json").exists() and not (folder / "processor_config.json").exists():
        raise FileNotFoundError(f"{folder} does not say how pictures are prepared: save the image processor into it")
    return AutoImageProcessor.from_pretrained(folder)


def _loaded(class_name: str, folder: Path) -> Any:
    check_weights(folder)
    model_class = getattr(transformers, class_name)
    model, info = model_class.from_pretrained(folder, use_safetensors=True, output_loading_info=True)
    if info["missing_keys"]:
        lost = sorted(info["missing_keys"])
        raise ValueError(f"{folder}: the weights lack {len(lost)} parameters of {class_name}, such as {lost[0]}")
    return model.eval()


def _open_clip_tower(source: str) -> OpenClipTower:
    from safetensors import safe_open

    model_config, preprocess_config, weights = find_open_clip(source)
    tower = OpenClipTower(model_config, preprocess_config)
    with safe_open(weights, "pt") as file:
        names = [name for name in file.keys() if name.startswith("visual.")]  # noqa: SIM118 (not a dict)
        state = {name.removeprefix("visual."): file.get_tensor(name).float() for name in names}
    try:
        tower.visual.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"open_clip:{source}: the image tower does not fit its config: {error}") from error
    return tower


def _is_clip(model: nn.Module) -> bool:
    return model.config.model_type == "clip_vision_model"


def _model_type(folder: Path) -> str | None:
    return read_json(folder / "config.json").get("model_type") if (folder / "config.json").exists() else None
