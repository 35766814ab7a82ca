"""What pictures say about how they were made: prompts and settings that image generators leave in their metadata.

| tool | where | form |
|---|---|---|
| textcond | PNG text `textcond` | JSON of `textcond.apps.metadata.Parameters` |
| web UIs | PNG text `parameters`, EXIF UserComment of JPEG and WebP | the prompt, a `Negative prompt:` line, settings |
| Fooocus, SwarmUI | the same places | JSON |
| ComfyUI | PNG texts `prompt` and `workflow`, EXIF Model and Make of WebP | a graph of nodes |
| InvokeAI | PNG text `invokeai_metadata`, before it `sd-metadata` | JSON |
| NovelAI | PNG text `Comment` beside `Software` | JSON |
| scripts | PNG texts `prompt`, `negative_prompt`, `seed` ... | plain |

Everything that a picture says is untrusted: lengths are checked before anything is parsed, and what is wrong is a
ValueError.
"""

from __future__ import annotations

import json
import math
import re
import struct
import warnings
from collections.abc import Mapping
from typing import Any

from PIL import Image, PngImagePlugin

from .pictures import MAX_METADATA

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")  # of files that generators write
MAX_SETTINGS = 20_000  # characters of the last line of a `parameters` text
MAX_NODES = 10_000

# Our names, and what the tools call the same, without case and signs; the first that is there counts.
FIELDS: dict[str, tuple[str, ...]] = {
    "prompt": ("prompt", "positiveprompt", "fullprompt"),
    "negative_prompt": ("negativeprompt", "uc"),
    "seed": ("seed", "noiseseed"),
    "num_inference_steps": ("numinferencesteps", "steps", "step"),
    "guidance_scale": ("guidancescale", "cfgscale", "cfg", "scale"),
    "scheduler": ("samplername", "sampler", "scheduler"),
    "width": ("width",),
    "height": ("height",),
    "pipeline": ("pipeline", "modelname", "model", "modelweights", "basemodel", "ckptname", "unetname"),
    "encoder": ("encoder", "textencoder"),
}
_NUMBERS = {"seed": int, "num_inference_steps": int, "guidance_scale": float, "width": int, "height": int}
# names are short and begin at a letter, so that a hostile line is read in linear time
_SETTING = re.compile(r'(\w[\w \-/]{1,60}):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')
_NEGATIVE = "Negative prompt:"
_USER_COMMENT, _EXIF, _COMFY_TAGS = 0x9286, 0x8769, (0x0110, 0x010F, 0x010E)


def picture_texts(image: Image.Image) -> dict[str, str]:
    """Return the texts of an opened picture by name; an EXIF UserComment is named `parameters`, as web UIs mean it.

    Raises:
        ValueError: damaged metadata, or a text of more than `MAX_METADATA` characters.
        OSError: a picture that is cut short.
    """
    texts = {name: str(value) for name, value in image.info.items() if isinstance(value, str)}
    if isinstance(image, PngImagePlugin.PngImageFile) and not made_with_names(texts):
        texts |= {name: str(value) for name, value in image.text.items()}  # texts may follow the pixels
    if "exif" in image.info:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of damaged tags, which are left out
                exif = image.getexif()
                comment = exif.get_ifd(_EXIF).get(_USER_COMMENT)
            graphs = [exif.get(tag) for tag in _COMFY_TAGS]
            little = exif.endian == "<"
        except (LookupError, TypeError, AttributeError, ValueError, SyntaxError, OverflowError, struct.error) as error:
            raise ValueError(f"its EXIF metadata are damaged ({type(error).__name__})") from error
        if comment and (text := _user_comment(comment, little)):
            texts.setdefault("parameters", text)
        for text in graphs:
            name, _, graph = text.partition(":") if isinstance(text, str) else ("", "", "")
            if name in ("prompt", "workflow"):
                texts.setdefault(name, graph)
    for name, text in texts.items():
        if len(text) > MAX_METADATA:
            raise ValueError(f"its `{name:.80}` text has {len(text):,} characters: up to {MAX_METADATA:,} are read")
    return texts


def made_with_names(texts: Mapping[str, str]) -> bool:
    """Whether one of the texts is one in which a tool leaves its prompt."""
    return any(name in texts for names, _ in _TOOLS for name in names)


def made_with(texts: Mapping[str, str]) -> dict[str, Any]:
    """Return what the texts of a picture say: always `prompt` and `tool`, and those of `FIELDS` that are sound.

    Raises:
        ValueError: they name no prompt, or what should is malformed.
    """
    problem: ValueError | None = None
    for names, read in _TOOLS:
        if not any(name in texts for name in names):
            continue
        try:
            found = read(texts)
        except ValueError as error:
            problem = problem or error  # another tool's text may be sound
            continue
        if found.get("prompt", "").strip():
            return found
    raise problem or ValueError("carries no prompt: pass pictures that an image generator wrote, metadata kept")


def parameters_text(text: str) -> tuple[str, str, dict[str, str]]:
    """Split the `parameters` text of web UIs into prompt, negative prompt and settings as they are written."""
    *lines, last = text.strip().split("\n")
    settings = dict(_SETTING.findall(last)) if len(last) <= MAX_SETTINGS else {}
    if "Steps" not in settings:
        lines, settings = [*lines, last], {}
    start = next((row for row, line in enumerate(lines) if line.startswith(_NEGATIVE)), len(lines))
    negative = "\n".join(lines[start:]).removeprefix(_NEGATIVE).strip()
    return "\n".join(lines[:start]), negative, {name: _unquoted(value.strip()) for name, value in settings.items()}


def fields(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of `FIELDS` that values hold under any tool's name, in the right type; what is unsound is left out.

    Seeds are whole numbers up to 2**63 - 1, the largest that stores and `Parameters` take.
    """
    plain = {re.sub(r"[^a-z0-9]", "", str(name).lower()): value for name, value in values.items()}
    found: dict[str, Any] = {}
    for name, names in FIELDS.items():
        given = next((plain[other] for other in names if plain.get(other) not in (None, "")), None)
        if isinstance(given, dict):
            given = given.get("model_name") or given.get("name")
        value = _number(given, _NUMBERS[name]) if name in _NUMBERS else given
        if value is not None and (name in _NUMBERS or isinstance(value, str)):
            found[name] = value
    return found


def _number(value: Any, kind: type) -> int | float | None:
    try:
        number = float(value) if kind is float else int(value)
    except (TypeError, ValueError, OverflowError):
        return None
    # below zero means "at random", which is not what the picture was made with
    return number if not isinstance(value, bool) and math.isfinite(number) and 0 <= number < 2**63 else None


def _unquoted(value: str) -> str:
    if not value.startswith('"'):
        return value
    try:
        return str(json.loads(value))
    except ValueError:
        return value


def _json(texts: Mapping[str, str], name: str) -> Any:
    try:
        return json.loads(texts[name])
    except RecursionError:
        raise ValueError(f"its `{name}` text is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"its `{name}` text is not valid JSON ({error})") from None


def _object(texts: Mapping[str, str], name: str) -> dict[str, Any]:
    value = _json(texts, name)
    if not isinstance(value, dict):
        raise ValueError(f"its `{name}` text is a JSON {type(value).__name__}, not an object")
    return value


def _user_comment(raw: bytes | str, little: bool) -> str:
    """Decode an EXIF UserComment: eight bytes name the code, and writers disagree on the byte order of UNICODE."""
    if isinstance(raw, str):
        return raw
    code, body = raw[:8], raw[8:]
    if code.startswith(b"UNICODE"):
        texts = [body.decode(order, "replace") for order in ("utf-16-le", "utf-16-be")]
        readable = [sum(character.isascii() for character in text) for text in texts]
        chosen = little if readable[0] == readable[1] else readable[0] > readable[1]
        text = texts[0] if chosen else texts[1]
    else:
        text = (body if code[:5] in (b"ASCII", b"\0" * 5) else raw).decode("utf-8", "replace")
    return text.strip("\0\ufeff \n")


# -- tools -----------------------------------------------------------------------------------------------------------


def _textcond(texts: Mapping[str, str]) -> dict[str, Any]:
    return fields(_object(texts, "textcond")) | {"tool": "textcond"}


def _web_ui(texts: Mapping[str, str]) -> dict[str, Any]:
    if texts["parameters"].lstrip().startswith("{"):
        values = _object(texts, "parameters")
        if isinstance(swarm := values.get("sui_image_params"), dict):
            return fields(swarm) | {"tool": "swarmui"}
        size = re.findall(r"\d{1,6}", str(values.get("resolution", "")))
        shape = dict(zip(("width", "height"), size)) if len(size) == 2 else {}
        return fields(shape | values) | {"tool": "fooocus"}
    prompt, negative, settings = parameters_text(texts["parameters"])
    size = re.fullmatch(r"(\d{1,6})x(\d{1,6})", settings.get("Size", ""))
    shape = {"width": size[1], "height": size[2]} if size else {}
    return fields(settings | shape | {"prompt": prompt, "negative_prompt": negative}) | {"tool": "web ui"}


def _invoke(texts: Mapping[str, str]) -> dict[str, Any]:
    if "invokeai_metadata" in texts:
        return fields(_object(texts, "invokeai_metadata")) | {"tool": "invokeai"}
    values = _object(texts, "sd-metadata")
    image = values["image"] if isinstance(values.get("image"), dict) else {}
    image = image | {"model": values.get("model_weights")}
    if isinstance(parts := image.get("prompt"), list):
        image["prompt"] = ", ".join(
            str(part["prompt"]) for part in parts if isinstance(part, dict) and "prompt" in part
        )
    return fields(image) | {"tool": "invokeai"}


def _novel_ai(texts: Mapping[str, str]) -> dict[str, Any]:
    if "NovelAI" not in texts.get("Software", ""):
        return {}
    described = {"prompt": texts.get("Description"), "model": texts.get("Source")}
    return fields(described | _object(texts, "Comment")) | {"tool": "novelai"}


def _named(texts: Mapping[str, str]) -> dict[str, Any]:
    """Read texts that scripts write one a setting."""
    return {} if texts["prompt"].lstrip().startswith("{") else fields(texts) | {"tool": "script"}


# -- ComfyUI ---------------------------------------------------------------------------------------------------------

# Values of widgets as a saved workflow lists them, without names, of the nodes that matter here.
_WIDGETS = {
    "KSampler": ("seed", "", "steps", "cfg", "sampler_name"),
    "KSamplerAdvanced": ("", "noise_seed", "", "steps", "cfg", "sampler_name"),
    "CLIPTextEncode": ("text",),
    "CLIPTextEncodeFlux": ("clip_l", "t5xxl", "guidance"),
    "EmptyLatentImage": ("width", "height"),
    "EmptySD3LatentImage": ("width", "height"),
    "CheckpointLoaderSimple": ("ckpt_name",),
    "UNETLoader": ("unet_name",),
    "RandomNoise": ("noise_seed",),
    "CFGGuider": ("cfg",),
    "KSamplerSelect": ("sampler_name",),
    "BasicScheduler": ("", "steps"),
    "FluxGuidance": ("guidance",),
    "PrimitiveString": ("value",),
    "PrimitiveStringMultiline": ("value",),
}
_TEXTS = ("text", "text_g", "text_l", "t5xxl", "clip_l", "prompt", "string", "value")
_SETTINGS = {
    "noise_seed": "seed",
    "seed": "seed",
    "steps": "steps",
    "cfg": "cfg",
    "guidance": "guidance_scale",
    "sampler_name": "sampler",
    "ckpt_name": "model",
    "unet_name": "model",
    "width": "width",
    "height": "height",
}
_OUTPUTS = ("SaveImage", "PreviewImage", "SaveAnimated", "Image Save", "Save Image")

Graph = dict[str, tuple[str, dict[str, Any]]]  # node -> (class, inputs); an input is a value or [node, output]


def _comfy(texts: Mapping[str, str]) -> dict[str, Any]:
    graph: Graph = {}
    if "prompt" in texts and texts["prompt"].lstrip().startswith("{"):
        graph = _api_graph(_object(texts, "prompt"))
    if not graph and "workflow" in texts:
        graph = _workflow_graph(_object(texts, "workflow"))
    if len(graph) > MAX_NODES:
        raise ValueError(f"its workflow has {len(graph):,} nodes: up to {MAX_NODES:,} are followed")
    if not graph:
        return {}
    sampler = _first_sampler(graph)
    if sampler is None:
        raise ValueError("its workflow has no sampler that leads to a prompt")
    inputs = graph[sampler][1]
    guider = graph.get(_link(inputs.get("guider")) or "", ("", {}))[1]
    links = {"positive": inputs.get("positive", guider.get("positive", guider.get("conditioning")))}
    links["negative"] = inputs.get("negative", guider.get("negative"))
    # the sampler's own values, then those of the nodes behind it, the nearest first
    values: dict[str, Any] = {}
    known: dict[str, Any] = {}
    for node in _behind(graph, sampler, set()):
        kind, given = graph[node]
        for name, field in _SETTINGS.items():
            # text encoders have sizes too, which are not the picture's
            ours = field not in ("width", "height") or "Latent" in kind
            if ours and name in given and field not in values:
                values[field] = _value(graph, given[name], known)
    texts_found = {name: _conditioning(graph, link, name, known) for name, link in links.items()}
    prompts = {"prompt": texts_found["positive"], "negative_prompt": texts_found["negative"]}
    return fields(values | prompts) | {"tool": "comfyui"}


def _api_graph(values: dict[str, Any]) -> Graph:
    return {
        str(name): (str(node["class_type"]), node["inputs"])
        for name, node in values.items()
        if isinstance(node, dict) and "class_type" in node and isinstance(node.get("inputs"), dict)
    }


def _workflow_graph(workflow: dict[str, Any]) -> Graph:
    """Return the graph of a saved workflow, whose links are numbered and whose values have no names."""
    nodes, links = workflow.get("nodes"), workflow.get("links")
    if not isinstance(nodes, list) or not isinstance(links, list):
        return {}
    sources = {link[0]: [str(link[1]), link[2]] for link in links if isinstance(link, list) and len(link) >= 3}
    graph: Graph = {}
    for node in nodes:
        if not isinstance(node, dict) or node.get("mode") in (2, 4):  # muted, bypassed
            continue
        kind, given = str(node.get("type")), node.get("widgets_values")
        inputs = dict(given) if isinstance(given, dict) else {}
        if isinstance(given, list):
            inputs = {name: value for name, value in zip(_WIDGETS.get(kind, ()), given) if name}
        for slot in node.get("inputs") or []:
            if isinstance(slot, dict) and isinstance(slot.get("link"), int) and slot["link"] in sources:
                inputs[str(slot.get("name"))] = sources[slot["link"]]
        graph[str(node.get("id"))] = (kind, inputs)
    return graph


def _link(value: Any) -> str | None:
    """Return the node that an input comes from, or None for a value."""
    return str(value[0]) if isinstance(value, list) and len(value) == 2 and isinstance(value[1], int) else None


def _behind(graph: Graph, start: str, seen: set[str]) -> list[str]:
    """Return a node and all that lead to it, the nearest first, but for those that were `seen`, which it adds to."""
    order = [] if start in seen else [start]
    seen.add(start)
    for node in order:
        for value in graph[node][1].values():
            source = _link(value)
            if source in graph and source not in seen:
                seen.add(source)
                order.append(source)
    return order


def _first_sampler(graph: Graph) -> str | None:
    """Return the sampler that decides the picture: of those that lead to an output, the first one to draw."""
    outputs = [node for node, (kind, _) in graph.items() if kind.startswith(_OUTPUTS)]
    seen: set[str] = set()
    # the last output decides, and what led it to no sampler leads no other one to any
    walks = [_behind(graph, output, seen) for output in reversed(outputs)] or [list(reversed(graph))]
    samplers = (
        node
        for walk in walks
        for node in reversed(walk)
        if _link(graph[node][1].get("latent_image", graph[node][1].get("latent")))
        and (_link(graph[node][1].get("positive")) or _link(graph[node][1].get("guider")))
    )
    return next(samplers, None)


def _value(graph: Graph, link: Any, known: dict[str, Any]) -> Any:
    """Return the value that a link leads to through primitive nodes, or None; `known` are those of nodes, kept here."""
    path: list[str] = []
    while (node := _link(link)) is not None:
        if node in known or node not in graph:
            link = known.get(node)
            break
        known[node] = None  # a circle has no value
        path.append(node)
        inputs = graph[node][1]
        link = next((inputs[name] for name in (*_TEXTS, "seed", "int", "float") if name in inputs), None)
    value = link.strip() if isinstance(link, str) else link
    known.update(dict.fromkeys(path, value))
    return value


def _conditioning(graph: Graph, link: Any, side: str, known: dict[str, Any]) -> str:
    """Return the texts that a `positive` or `negative` link leads to, in order, each once."""
    found: list[str] = []
    waiting, seen = [link], set()
    while waiting:
        node = _link(waiting.pop())
        if node is None or node in seen or node not in graph:
            continue
        seen.add(node)
        kind, inputs = graph[node]
        if kind == "ConditioningZeroOut":
            continue
        texts = [_value(graph, inputs[name], known) for name in _TEXTS if name in inputs]
        texts = [text for text in texts if isinstance(text, str) and text]
        if texts:
            found += texts
        elif side in inputs:  # such as of a ControlNet, which passes both on
            waiting.append(inputs[side])
        else:
            waiting += [value for name, value in reversed(inputs.items()) if name.startswith("conditioning")]
            if not any(name.startswith("conditioning") for name in inputs):
                waiting += list(inputs.values())[:1]  # such as a reroute
    return ", ".join(dict.fromkeys(found))


_TOOLS = (
    (("textcond",), _textcond),
    (("parameters",), _web_ui),
    (("invokeai_metadata", "sd-metadata"), _invoke),
    (("Comment",), _novel_ai),
    (("prompt", "workflow"), _comfy),
    (("prompt",), _named),
)
