"""What made a picture, and how a PNG carries it: our own JSON, and the `parameters` text that web UIs read.

Other tools' pictures are read by `textcond.index.picture_prompts`.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from textcond.files import atomic_file

if TYPE_CHECKING:
    from PIL.Image import Image

NATIVE = "native"
MULTILINGUAL = "multilingual"
REFERENCE = "reference"
MAX_SEED = 2**63 - 1

_JSON_KEY, _TEXT_KEY = "textcond", "parameters"
_TEXT_NAMES = {
    "Steps": "num_inference_steps",
    "Sampler": "scheduler",
    "CFG scale": "guidance_scale",
    "Seed": "seed",
    "Size": "size",
    "Model": "pipeline",
    "Text encoder": "encoder",
}


def usual_encoder(pipeline: str) -> str:
    """What conditions a pipeline when nothing is chosen: its own, or for the reference model the shipped one."""
    return MULTILINGUAL if pipeline == REFERENCE else NATIVE


@dataclass(frozen=True)
class Parameters:
    """All that decides a picture. What is None is the pipeline's choice, and is filled in once the picture is made.

    Attributes:
        prompt, negative_prompt: any text, the empty string included.
        seed: of the generator that draws the first latents, 0 to 2**63 - 1.
        num_inference_steps: denoising steps.
        guidance_scale: classifier-free guidance (Ho & Salimans, 2022); 1 is none.
        width, height: of the picture, in pixels.
        pipeline: a diffusers folder or hub id, or "reference".
        encoder: what conditions the pipeline: "native", or the folder or hub id that was swapped in.
        scheduler: class of the sampler.
        retrieval: what an index gave to the picture, empty for nothing: `mode` ("suggest", "expand" or "blend"),
            `strength`, `neighbours` as (text, cosine) each, and under `prompt` what was asked before it was expanded.
        device, dtype, versions: where and with what it was made; another device gives a slightly different picture.

    Raises:
        ValueError: a number is out of range, or a text is not valid Unicode.
    """

    prompt: str
    negative_prompt: str = ""
    seed: int = 0
    num_inference_steps: int = 20
    guidance_scale: float | None = None
    width: int | None = None
    height: int | None = None
    pipeline: str = REFERENCE
    encoder: str = NATIVE
    scheduler: str | None = None
    retrieval: dict[str, Any] = field(default_factory=dict)
    device: str | None = None
    dtype: str | None = None
    versions: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("prompt", "negative_prompt"):
            try:
                getattr(self, name).encode("utf-8")
            except UnicodeEncodeError as error:
                raise ValueError(f"the {name.replace('_', ' ')} is not valid Unicode text: pass it as UTF-8") from error
        if not isinstance(self.retrieval, dict):
            raise TypeError(f"retrieval is {self.retrieval!r:.80}, not a dict")
        if not 0 <= self.seed <= MAX_SEED:
            raise ValueError(f"seed {self.seed} is out of range: pass 0 to {MAX_SEED}")
        if self.num_inference_steps < 1:
            raise ValueError(f"{self.num_inference_steps} steps make no picture: pass 1 or more")
        if self.guidance_scale is not None and not (math.isfinite(self.guidance_scale) and self.guidance_scale >= 0):
            raise ValueError(f"guidance {self.guidance_scale} is not a number from 0 up: 1 is none, 4 to 8 are usual")
        for name in ("width", "height"):
            size = getattr(self, name)
            if size is not None and size < 1:
                raise ValueError(f"{name} {size} is not a number of pixels")

    def text(self) -> str:
        """The `parameters` text of web UIs: the prompt, a `Negative prompt:` line, a line of comma-separated fields."""
        values = {
            "Steps": self.num_inference_steps,
            "Sampler": (self.scheduler or "").removesuffix("Scheduler"),
            "CFG scale": self.guidance_scale,
            "Seed": self.seed,
            "Size": f"{self.width}x{self.height}" if self.width and self.height else None,
            "Model": self.pipeline,
            "Text encoder": self.encoder,
            "Version": f"textcond {self.versions['textcond']}" if "textcond" in self.versions else None,
        }
        told = {name: _quoted(str(value)) for name, value in values.items() if value not in (None, "")}
        settings = ", ".join(f"{name}: {value}" for name, value in told.items())
        negative = [f"Negative prompt: {self.negative_prompt}"] if self.negative_prompt else []
        return "\n".join([self.prompt, *negative, settings])

    @classmethod
    def from_text(cls, text: str) -> Parameters:
        """Read the `parameters` text of a web UI; fields that have no meaning here are left out.

        Raises:
            ValueError: the text has no line of settings, or one of them is malformed.
        """
        from textcond.index.picture_prompts import parameters_text

        prompt, negative, found = parameters_text(text)
        if "Steps" not in found or "Seed" not in found:
            raise ValueError(
                "the picture's `parameters` text names no steps and seed, so it cannot be made again from it"
            )
        known = {_TEXT_NAMES[name]: value for name, value in found.items() if name in _TEXT_NAMES}
        try:
            size = [int(number) for number in known["size"].split("x")] if "size" in known else [None, None]
            return cls(
                prompt=prompt,
                negative_prompt=negative,
                seed=int(known["seed"]),
                num_inference_steps=int(known["num_inference_steps"]),
                guidance_scale=float(known["guidance_scale"]) if "guidance_scale" in known else None,
                width=size[0],
                height=size[1],
                **{name: known[name] for name in ("pipeline", "encoder", "scheduler") if name in known},
            )
        except (ValueError, IndexError) as error:
            raise ValueError(f"the picture's `parameters` text is malformed: {text[-200:]!r} ({error})") from error

    @classmethod
    def from_json(cls, text: str) -> Parameters:
        """Read what `write_png` stored.

        Raises:
            ValueError: malformed JSON, or a key that this version does not know (it is named).
        """
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"the picture's `{_JSON_KEY}` chunk is not valid JSON: {error}") from error
        if not isinstance(values, dict) or "prompt" not in values:
            raise ValueError(f"the picture's `{_JSON_KEY}` chunk holds no parameters")
        if unknown := values.keys() - {item.name for item in fields(cls)}:
            raise ValueError(f"the picture's `{_JSON_KEY}` chunk has the unknown key {sorted(unknown)[0]!r}")
        try:
            return cls(**values)
        except (TypeError, AttributeError) as error:
            raise ValueError(f"the picture's `{_JSON_KEY}` chunk has a value of the wrong type: {error}") from error


def write_png(path: str | Path, image: Image, parameters: Parameters) -> None:
    """Write `image` with `parameters` in its text chunks, as JSON (`textcond`) and for web UIs (`parameters`)."""
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_text(_TEXT_KEY, parameters.text())
    info.add_text(_JSON_KEY, json.dumps(asdict(parameters), ensure_ascii=False))
    with atomic_file(path) as file:
        image.save(file, format="PNG", pnginfo=info)


def read_parameters(path: str | Path) -> Parameters:
    """Read what made the picture at `path`: our JSON when it is there, else what a web UI or another tool wrote.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: not a picture that can be read, or one that does not tell prompt, seed and steps.
    """
    from textcond.index.picture_prompts import made_with, picture_texts
    from textcond.index.pictures import open_picture

    with open_picture(path) as image:
        texts = picture_texts(image)
    if _JSON_KEY in texts:
        return Parameters.from_json(texts[_JSON_KEY])
    if _TEXT_KEY in texts and not texts[_TEXT_KEY].lstrip().startswith("{"):
        return Parameters.from_text(texts[_TEXT_KEY])
    try:
        found = made_with(texts)
    except ValueError as error:
        raise ValueError(f"{path} {error}") from error
    if missing := [name for name in ("seed", "num_inference_steps") if name not in found]:
        raise ValueError(f"{path} does not tell its {missing[0]}, so it cannot be made again from it")
    found.pop("tool")
    return Parameters(**found)


def _quoted(value: str) -> str:
    return json.dumps(value, ensure_ascii=False) if re.search(r'[,:\n"]', value) else value
