"""A picture as `diffusers` code: a script that makes it again, bit by bit, on the same device."""

from __future__ import annotations

from textcond.apps.metadata import MULTILINGUAL, NATIVE, REFERENCE, Parameters


def snippet(parameters: Parameters) -> str:
    """The script that makes the picture of `parameters`, which must be complete, as they come back from `draw`."""
    device, dtype = parameters.device or "cpu", parameters.dtype or "float32"
    reference, swaps = parameters.pipeline == REFERENCE, parameters.encoder != NATIVE
    retrieval = parameters.retrieval
    blended = retrieval.get("neighbours") if retrieval.get("mode") == "blend" else None

    theirs = [*([] if reference else ["DiffusionPipeline"]), *filter(None, [parameters.scheduler])]
    ours = [*(["load_reference"] if reference else []), *(["swap_text_encoder"] if swaps else [])]
    imports = [
        *(["from types import SimpleNamespace", ""] if blended else []),
        "import torch",
        *([f"from diffusers import {', '.join(sorted(theirs))}"] if theirs else []),
        # A saved pipeline may name classes of ours, which diffusers does not import by name.
        f"from textcond.pipelines import {', '.join(ours)}" if ours else "import textcond",
        *(["from textcond.pipelines.reference import MULTILINGUAL"] if parameters.encoder == MULTILINGUAL else []),
        *(["from textcond.pipelines.retrieval import blend"] if blended else []),
    ]
    lines = (
        [f"pipe = load_reference(dtype=torch.{dtype}, device={device!r})"]
        if reference
        else [f"pipe = DiffusionPipeline.from_pretrained({parameters.pipeline!r}, dtype=torch.{dtype}).to({device!r})"]
    )
    if swaps:
        name = "MULTILINGUAL" if parameters.encoder == MULTILINGUAL else repr(parameters.encoder)
        lines.append(f"swap_text_encoder(pipe, {name})")
    if parameters.scheduler:
        lines.append(f"pipe.scheduler = {parameters.scheduler}.from_config(pipe.scheduler.config)")
    prompt = f"{parameters.prompt!r}"
    if blended:
        rows = [f"    SimpleNamespace(text={text!r}, score={score!r})," for text, score in blended]
        lines += ["neighbours = [", *rows, "]"]
        prompt = f"**blend(pipe, {prompt}, neighbours, {retrieval['strength']!r})"
    arguments = {
        "negative_prompt": parameters.negative_prompt or None,
        "num_inference_steps": parameters.num_inference_steps,
        "guidance_scale": parameters.guidance_scale,
        "width": parameters.width,
        "height": parameters.height,
    }
    call = [f"    {name}={value!r}," for name, value in arguments.items() if value is not None]
    call.append(f'    generator=torch.Generator("cpu").manual_seed({parameters.seed}),')
    end = [").images[0]", f'image.save("picture-{parameters.seed}.png")', ""]
    return "\n".join([*imports, "", *lines, "image = pipe(", f"    {prompt},", *call, *end])
