"""Parameters in an address, after the `#`: the browser keeps that part to itself, so no server logs a prompt."""

from __future__ import annotations

from dataclasses import asdict
from urllib.parse import parse_qsl, urlencode

from textcond.apps.metadata import NATIVE, Parameters

FIELDS = {
    "prompt": str,
    "negative_prompt": str,
    "seed": int,
    "num_inference_steps": int,
    "guidance_scale": float,
    "width": int,
    "height": int,
    "encoder": str,
    "scheduler": str,
}
RETRIEVAL = "neighbours"  # mode:strength
LONGEST = 8000


def link(parameters: Parameters) -> str:
    """What stands after the `#`; without the prompts where these are longer than an address may be."""
    values = asdict(parameters)
    retrieval = parameters.retrieval
    values["prompt"] = retrieval.get("prompt", parameters.prompt)
    told = {name: values[name] for name in FIELDS if values[name] not in (None, "")}
    if retrieval:
        told[RETRIEVAL] = f"{retrieval['mode']}:{retrieval['strength']:g}"
    if len(text := urlencode(told)) > LONGEST:
        text = urlencode({name: value for name, value in told.items() if "prompt" not in name})
    return text


def read_link(text: str, encoder: str = NATIVE) -> Parameters | None:
    """The parameters of a link, or None where it holds none; `encoder` is meant where it names none.

    Raises:
        ValueError: a value is malformed or out of range.
    """
    found = dict(parse_qsl(text, keep_blank_values=True))
    values = {}
    for name, kind in FIELDS.items():
        if name in found:
            try:
                values[name] = kind(found[name])
            except ValueError as error:
                raise ValueError(f"the link says {name}={found[name]:.40}, which is no {kind.__name__}") from error
    if RETRIEVAL in found:
        mode, _, strength = found[RETRIEVAL].partition(":")
        try:
            values["retrieval"] = {"mode": mode, "strength": float(strength)}
        except ValueError as error:
            raise ValueError(f"the link says {RETRIEVAL}={found[RETRIEVAL]:.40}, which is no MODE:STRENGTH") from error
    return Parameters(**({"prompt": "", "encoder": encoder} | values)) if values else None
