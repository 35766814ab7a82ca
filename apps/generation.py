"""Making a picture from its parameters, and telling how much of a prompt the encoder reads."""

from __future__ import annotations

import importlib.metadata
import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from .metadata import REFERENCE, Parameters
from .preview import Preview
from .schedulers import scheduled

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from PIL.Image import Image
    from transformers import PreTrainedTokenizerBase

REFERENCE_GUIDANCE = 4.0


def draw(
    pipe: DiffusionPipeline,
    parameters: Parameters,
    on_step: Callable[[int, int, Callable[[], Image | None]], None] | None = None,
) -> tuple[Image, Parameters]:
    """Make one picture, the same one for the same parameters on the same device.

    Args:
        pipe: a text-to-image pipeline.
        parameters: what to make.
        on_step: called after each denoising step with (steps done, steps in all, a `Preview` to call for a look at the
            picture). An exception that it raises stops the run and reaches the caller.

    Returns:
        The picture, and its parameters with everything filled in that the pipeline decided.

    Raises:
        ValueError: the pipeline takes no prompt or makes no pictures, takes no negative prompt though one is given, or
            refuses a size or a scheduler.
    """
    import torch

    accepted = inspect.signature(pipe.__call__).parameters
    if "prompt" not in accepted:
        raise ValueError(f"{type(pipe).__name__} takes no prompt: pass a text-to-image pipeline")
    guidance = parameters.guidance_scale
    if guidance is None:
        guidance = default_guidance(pipe, parameters.pipeline)
    width, height = parameters.width, parameters.height
    if (width is None) != (height is None):  # a pipeline ignores the one if the other is missing
        width, height = width or default_size(pipe), height or default_size(pipe)
    arguments: dict[str, Any] = {
        "num_inference_steps": parameters.num_inference_steps,
        "guidance_scale": guidance,
        "width": width,
        "height": height,
        # Drawn on the CPU, so that a seed means the same latents on every device.
        "generator": torch.Generator("cpu").manual_seed(parameters.seed),
    }
    arguments = {name: value for name, value in arguments.items() if name in accepted and value is not None}
    if "negative_prompt" in accepted:
        arguments["negative_prompt"] = parameters.negative_prompt
    elif parameters.negative_prompt:
        raise ValueError(f"{type(pipe).__name__} takes no negative prompt: leave it out")
    with scheduled(pipe, parameters.scheduler):
        if on_step is not None and "callback_on_step_end" in accepted:
            preview = Preview(pipe)

            def step_end(pipe: DiffusionPipeline, step: int, timestep: int, tensors: dict) -> dict:
                preview.follow(step, tensors["latents"])
                on_step(step + 1, getattr(pipe, "num_timesteps", parameters.num_inference_steps), preview)
                return {}

            arguments["callback_on_step_end"] = step_end

        output = pipe(**_conditioning(pipe, parameters), **arguments)
        scheduler = type(pipe.scheduler).__name__
    if not getattr(output, "images", None):
        raise ValueError(f"{type(pipe).__name__} makes no pictures: pass a text-to-image pipeline")
    if (flags := getattr(output, "nsfw_content_detected", None)) and flags[0]:
        raise ValueError("the pipeline's safety checker withheld this picture: change the prompt or the seed")
    image = output.images[0]
    return image, replace(
        parameters,
        guidance_scale=float(guidance),
        width=image.width,
        height=image.height,
        scheduler=scheduler,
        device=str(pipe.device),
        dtype=str(pipe.dtype).removeprefix("torch."),
        versions={name: importlib.metadata.version(name) for name in ("textcond", "diffusers", "torch")},
    )


def _conditioning(pipe: DiffusionPipeline, parameters: Parameters) -> dict[str, Any]:
    """The prompt as the call takes it, or what stands for it once neighbours are blended in."""
    retrieval = parameters.retrieval
    if retrieval.get("mode") != "blend" or not retrieval.get("neighbours"):
        return {"prompt": parameters.prompt}
    from textcond.pipelines.retrieval import blend

    neighbours = [SimpleNamespace(text=text, score=score) for text, score in retrieval["neighbours"]]
    return blend(pipe, parameters.prompt, neighbours, retrieval["strength"])


def default_size(pipe: DiffusionPipeline) -> int:
    """Pixels of a side of the square pictures that a pipeline makes when no size is asked for.

    Raises:
        ValueError: the pipeline does not tell.
    """
    try:
        return int(pipe.unet.config.sample_size) * pipe.vae_scale_factor
    except (AttributeError, TypeError) as error:
        raise ValueError(f"{type(pipe).__name__} has no size of its own: pass both width and height") from error


def default_guidance(pipe: DiffusionPipeline, name: str) -> float:
    """The guidance that a pipeline is best used with: measured for the reference, else the pipeline's own default."""
    if name == REFERENCE:
        return REFERENCE_GUIDANCE
    parameter = inspect.signature(pipe.__call__).parameters.get("guidance_scale")
    return float(parameter.default) if parameter and isinstance(parameter.default, (int, float)) else 1.0


def longest_reader(pipe: DiffusionPipeline) -> tuple[PreTrainedTokenizerBase, int]:
    """The tokenizer of the encoder that is given most of a prompt, and how many tokens that is.

    Raises:
        ValueError: the pipeline has no tokenizer, or is of no supported family.
    """
    from textcond.original import PackedTokenizer
    from textcond.pipelines.contracts import padded_length, slots_of

    readers = []
    for slot in slots_of(pipe).values():
        tokenizer = getattr(pipe, slot.tokenizer)
        if isinstance(tokenizer, PackedTokenizer):  # of which the new encoder's part is the last
            readers.append((tokenizer.others[-1], tokenizer.others[-1].model_max_length))
        elif tokenizer is not None and getattr(pipe, slot.name) is not None:
            readers.append((tokenizer, padded_length(pipe, slot, tokenizer)))
    if not readers:
        raise ValueError(f"{type(pipe).__name__} has no tokenizer: load one")
    return max(readers, key=lambda reader: reader[1])


@dataclass(frozen=True)
class PromptLength:
    """How much of a prompt an encoder reads: the first `limit` of its `tokens` (specials left out), the text `kept`."""

    tokens: int
    limit: int
    kept: str

    @property
    def truncated(self) -> bool:
        """Whether some of the prompt is left out."""
        return self.tokens > self.limit

    def notice(self) -> str:
        """Say what is left out."""
        return (
            f"{self.tokens:,} tokens, of which the encoder reads the first {self.limit:,}: "
            f"all after “…{self.kept[-40:]}” is left out"
        )


def prompt_length(tokenizer: PreTrainedTokenizerBase, prompt: str, padded: int | None = None) -> PromptLength:
    """Count the tokens of `prompt`, and find where an encoder stops reading that is given `padded`; None: its limit."""
    ids = tokenizer(prompt, add_special_tokens=False, truncation=False, verbose=False).input_ids
    limit = (padded or tokenizer.model_max_length) - tokenizer.num_special_tokens_to_add()
    return PromptLength(len(ids), limit, tokenizer.decode(ids[:limit], skip_special_tokens=True).strip())
