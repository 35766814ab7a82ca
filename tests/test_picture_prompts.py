import json
import struct
import time
import zlib
from dataclasses import asdict

import pytest
from pictures import (
    COMFY,
    TOOLS,
    WEB_UI,
    chunk,
    picture,
    raw_png,
    unicode_comment,
    write_exif,
    write_png,
)
from PIL import Image

from textcond.apps import metadata
from textcond.index.picture_prompts import fields, made_with, picture_texts
from textcond.index.pictures import MAX_METADATA, MAX_PIXELS, open_picture, thumbnail


def read(path):
    with open_picture(path) as image:
        return made_with(picture_texts(image))


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("tool", TOOLS)
def test_the_prompt_of_every_tool_is_read(tmp_path, tool, compressed):
    texts, prompt = TOOLS[tool]
    found = read(write_png(tmp_path / "a.png", texts, compressed=compressed))
    assert found["prompt"] == prompt
    assert tool.startswith(found["tool"])


EXPECTED = {
    "web ui": ("blurry, low quality\nhands", 1234567890, 28, 6.5, "DPM++ 2M", 512, 768, "v1-5-pruned"),
    "comfyui": ("text, watermark", 156680208700286, 20, 8.0, "euler", 512, 640, "sd15.safetensors"),
    "comfyui workflow": ("fog", 42, 25, 7.5, "dpmpp_2m", 768, 512, "sdxl.safetensors"),
    "comfyui flux": (None, 99, 4, 3.5, "euler", 1024, 768, "flux1-schnell.safetensors"),
    "invokeai": ("steam", 3141, 30, 7.5, "euler_a", 512, 512, "dreamshaper-8"),
    "invokeai 2": (None, 7, 50, 7.5, "k_lms", 512, 512, "stable-diffusion-1.5"),
    "novelai": ("lowres, text", 2718, 28, 11.0, "k_euler_ancestral", 512, 768, "Stable Diffusion 1D44365E"),
    "fooocus": (None, 8675309, 30, 4.0, "dpmpp_2m_sde_gpu", 1152, 896, "juggernautXL"),
    "swarmui": ("ugly", 11, 20, 7.0, None, 1024, 1024, "sd_xl_base"),
    "script": ("crack", 5, None, 7.5, None, None, None, None),
}
NAMES = (
    "negative_prompt",
    "seed",
    "num_inference_steps",
    "guidance_scale",
    "scheduler",
    "width",
    "height",
    "pipeline",
)


@pytest.mark.parametrize("tool", EXPECTED)
def test_the_settings_of_every_tool_come_under_our_names(tmp_path, tool):
    found = read(write_png(tmp_path / "a.png", TOOLS[tool][0]))
    told = dict(zip(NAMES, EXPECTED[tool]))
    assert {name: found.get(name) or None for name in NAMES} == told


def test_our_own_pictures_are_read_and_our_reader_reads_the_other_tools(tmp_path):
    given = metadata.Parameters("a fox", "snow", seed=3, guidance_scale=4.0, width=64, height=48)
    metadata.write_png(tmp_path / "a.png", picture(), given)
    found = read(tmp_path / "a.png")
    assert found.pop("tool") == "textcond"
    assert found.items() <= asdict(given).items()
    read_again = metadata.read_parameters(write_png(tmp_path / "b.png", TOOLS["comfyui"][0]))
    assert (read_again.prompt, read_again.seed, read_again.width) == (TOOLS["comfyui"][1], 156680208700286, 512)
    with pytest.raises(ValueError, match="does not tell its num_inference_steps"):
        metadata.read_parameters(write_png(tmp_path / "c.png", TOOLS["script"][0]))


@pytest.mark.parametrize("name", ["a.jpg", "a.webp"])
@pytest.mark.parametrize("order", ["be", "le"])
@pytest.mark.parametrize("text", [WEB_UI, "雪の中の赤い狐\nSteps: 20, Seed: 1"])
def test_a_user_comment_is_read_in_either_byte_order(tmp_path, name, order, text):
    path = write_exif(tmp_path / name, unicode_comment(text, order))
    assert read(path)["prompt"] == text[: text.index("\nNegative" if "Negative" in text else "\nSteps")]
    assert metadata.read_parameters(path).num_inference_steps in (20, 28)


def test_a_user_comment_in_ascii_and_a_comfyui_webp_are_read(tmp_path):
    assert read(write_exif(tmp_path / "a.jpg", b"ASCII\0\0\0a fox\nSteps: 3, Seed: 1"))["prompt"] == "a fox"
    path = write_exif(tmp_path / "b.webp", tags={0x0110: f"prompt:{json.dumps(COMFY)}"})
    assert read(path)["prompt"] == "a glass bottle with a galaxy"


def test_text_after_the_pixels_is_read(tmp_path):
    content = raw_png()
    end = content.rindex(b"\0\0\0\0IEND")
    (tmp_path / "a.png").write_bytes(content[:end] + chunk(b"tEXt", b"parameters\0a fox\nSteps: 1") + content[end:])
    assert read(tmp_path / "a.png")["prompt"] == "a fox"


def test_a_comfyui_graph_with_circles_combined_prompts_and_two_samplers_is_followed():
    graph = json.loads(json.dumps(COMFY))
    graph["6"]["inputs"]["text"] = "a moon"
    graph["13"] = {"class_type": "CLIPTextEncode", "inputs": {"text": "a sea", "clip": ["4", 1]}}
    graph["14"] = {
        "class_type": "ConditioningCombine",
        "inputs": {"conditioning_1": ["6", 0], "conditioning_2": ["13", 0]},
    }
    graph["10"]["inputs"]["positive"] = ["14", 0]
    graph["12"]["inputs"]["loop"] = ["9", 0]  # a circle
    second = {"seed": 1, "steps": 5, "denoise": 0.4, "latent_image": ["3", 0], "positive": ["6", 0]}
    graph["20"] = {"class_type": "KSampler", "inputs": graph["3"]["inputs"] | second}
    graph["8"]["inputs"]["samples"] = ["20", 0]
    found = made_with({"prompt": json.dumps(graph)})
    assert found["prompt"] == "a moon, a sea"
    assert (found["seed"], found["num_inference_steps"]) == (156680208700286, 20)  # of the pass that drew first
    graph["11"]["inputs"]["value"] = ["11", 0]
    graph["10"]["inputs"]["positive"] = ["6", 0]
    graph["6"]["inputs"]["text"] = ["11", 0]
    with pytest.raises(ValueError, match="carries no prompt"):
        made_with({"prompt": json.dumps(graph)})


def sampled(*stages, outputs):
    """A graph of samplers, each of which goes on from the one before it, and of outputs of stages by their numbers."""
    graph = {"latent": {"class_type": "EmptyLatentImage", "inputs": {"width": 64, "height": 64}}}
    for place, text in enumerate(stages):
        graph[f"text {place}"] = {"class_type": "CLIPTextEncode", "inputs": {"text": text}}
        before = f"stage {place - 1}" if place else "latent"
        inputs = {"positive": [f"text {place}", 0], "latent_image": [before, 0]}
        graph[f"stage {place}"] = {"class_type": "KSampler", "inputs": inputs}
    for place, stage in enumerate(outputs):
        source = [f"stage {stage}" if stage is not None else "latent", 0]
        graph[f"output {place}"] = {"class_type": "SaveImage", "inputs": {"images": source}}
    return {"prompt": json.dumps(graph)}


@pytest.mark.parametrize("outputs", [(0, 1), (1, 0), (1, 1), (0, 1, None), (None, 0, 1)])
def test_the_first_stage_counts_whatever_the_order_of_the_outputs(outputs):
    assert made_with(sampled("a fox", "details", outputs=outputs))["prompt"] == "a fox"


def test_of_pictures_made_apart_the_last_output_counts():
    graph = json.loads(sampled("a fox", "a dog", outputs=(0, 1))["prompt"])
    graph["stage 1"]["inputs"]["latent_image"] = ["latent", 0]
    assert made_with({"prompt": json.dumps(graph)})["prompt"] == "a dog"


def chained(count, name):
    """So many nodes, each of which takes its input from the next, and the last from the node `text`."""
    return {
        f"{name} {place}": {
            "class_type": name,
            "inputs": {name: [f"{name} {place + 1}" if place < count - 1 else "text", 0]},
        }
        for place in range(count)
    }


def many_outputs(count):
    """A graph of a long chain of conditionings, and as many pictures of it."""
    graph = {str(place): {"class_type": "SaveImage", "inputs": {"images": ["sampler", 0]}} for place in range(count)}
    inputs = {"positive": ["conditioning 0", 0], "latent_image": ["latent", 0]}
    return chained(count, "conditioning") | graph | {"sampler": {"class_type": "KSampler", "inputs": inputs}}


def many_texts(count):
    """A graph of a long chain that leads to a text, and as many encoders of it."""
    encode = {"class_type": "CLIPTextEncode", "inputs": {"text": ["value 0", 0], "text_g": ["value 0", 0]}}
    combined = {f"conditioning_{place}": [f"encode {place}", 0] for place in range(count)}
    inputs = {"positive": ["combined", 0], "latent_image": ["latent", 0]}
    return (
        chained(count, "value")
        | {f"encode {place}": encode for place in range(count)}
        | {
            "combined": {"class_type": "ConditioningCombine", "inputs": combined},
            "sampler": {"class_type": "KSampler", "inputs": inputs},
            "output": {"class_type": "SaveImage", "inputs": {"images": ["sampler", 0]}},
        }
    )


@pytest.mark.parametrize("made", [many_outputs, many_texts])
def test_a_hostile_comfyui_graph_is_followed_in_a_moment(made):
    graph = made(4900) | {"text": {"class_type": "CLIPTextEncode", "inputs": {"text": "a fox"}}}
    start = time.perf_counter()
    assert made_with({"prompt": json.dumps(graph)})["prompt"] == "a fox"
    assert time.perf_counter() - start < 2


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ({}, "carries no prompt"),
        ({"comment": "hello"}, "carries no prompt"),
        ({"parameters": ""}, "carries no prompt"),
        ({"parameters": "Steps: 20, Seed: 1"}, "carries no prompt"),
        ({"prompt": "{"}, "not valid JSON"),
        ({"workflow": "[" * 100_000}, "nested too deeply|not valid JSON"),
        ({"prompt": "{" + '"a":{' * 100_000}, "nested too deeply|not valid JSON"),
        ({"workflow": '{"nodes": 3, "links": {}}'}, "carries no prompt"),
        ({"workflow": "[]"}, "a JSON list, not an object"),
        ({"prompt": '{"1": {"class_type": "KSampler", "inputs": {"positive": ["1", 0]}}}'}, "no sampler"),
        ({"invokeai_metadata": "3"}, "a JSON int"),
        ({"textcond": '{"prompt": 3}'}, "carries no prompt"),
    ],
)
def test_texts_without_a_usable_prompt_are_refused(texts, message):
    with pytest.raises(ValueError, match=message):
        made_with(texts)


def test_a_broken_text_does_not_hide_another_tools():
    assert made_with({"invokeai_metadata": "{", "parameters": "a fox\nSteps: 1"})["prompt"] == "a fox"


def test_settings_of_the_wrong_kind_are_left_out():
    found = fields(
        {"seed": -1, "steps": "many", "cfg": "nan", "width": 1e400, "height": [3], "sampler": 5, "model": {}}
    )
    assert found == {}
    assert fields({"seed": True, "steps": "20", "CFG scale": "7"}) == {"num_inference_steps": 20, "guidance_scale": 7}


@pytest.mark.parametrize("text", ["a" * 1_000_000, " " * 1_000_000, 'aa:"\\"' * 200_000, "a b," * 250_000])
def test_a_hostile_parameters_text_is_read_in_a_moment(text):
    start = time.perf_counter()
    for case in (text, "a fox\n" + text, "a fox\nSteps: 1, " + text[:19_000]):
        try:
            made_with({"parameters": case})
        except ValueError as error:
            assert "no prompt" in str(error)  # noqa: PT017
    assert time.perf_counter() - start < 3


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a readable"),
        (b"no picture", "not a readable"),
        (raw_png()[:45], "damaged or cut short"),
        (raw_png(width=60_000, height=60_000), "pixels"),
        (raw_png(width=12_000, height=12_000), f"up to {MAX_PIXELS:,}"),
        (raw_png(chunk(b"tEXt", b"parameters\0a fox", length=2**31 - 1)), "readable"),
        (raw_png(chunk(b"tEXt", b"parameters\0a fox", length=3)), "readable|no prompt"),
        (raw_png(chunk(b"zTXt", b"parameters\0\0" + zlib.compress(b"a" * (4 << 20)))), "readable|no prompt"),
        (raw_png(chunk(b"iTXt", b"parameters\0\1\0\0\0" + zlib.compress(b"a" * (4 << 20)))), "readable|no prompt"),
        (raw_png(chunk(b"eXIf", b"MM\0*" + struct.pack(">I", 2**31 - 1))), "EXIF|no prompt|readable"),
        (raw_png(chunk(b"eXIf", b"II*\0\x08\0\0\0\xff\xff" + b"\xff" * 50)), "EXIF|no prompt|readable"),
    ],
    ids=["empty", "text", "cut", "bomb", "large", "long", "short", "ztxt", "itxt", "exif", "exif2"],
)
def test_a_picture_that_lies_is_refused(tmp_path, content, message):
    (tmp_path / "a.png").write_bytes(content)
    for source in (tmp_path / "a.png", content):
        with pytest.raises(ValueError, match=message):
            read(source)


@pytest.mark.parametrize("name", ["workflow", "parameters"])
def test_a_huge_text_is_refused_before_it_is_parsed(tmp_path, name):
    write_png(tmp_path / "a.png", {name: "a" * (MAX_METADATA + 1)})
    with pytest.raises(ValueError, match=f"its `{name}` text has {MAX_METADATA + 1:,} characters"):
        read(tmp_path / "a.png")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError), open_picture(tmp_path / "none.png"):
        pass


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P", "1", "I;16", "CMYK", "LA"])
def test_thumbnails_are_small_upright_and_without_metadata(tmp_path, mode):
    name = "a.jpg" if mode == "CMYK" else "a.png"
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    picture(
        (600, 300), 0 if mode in ("1", "I;16", "P", "L") else "teal" if mode != "CMYK" else (0, 9, 9, 0), mode
    ).save(tmp_path / name, exif=exif)
    with open_picture(tmp_path / name) as image:
        made = thumbnail(image, 128)
    with open_picture(made) as small:
        assert (small.format, small.size) == ("WEBP", (64, 128))
        assert "exif" not in small.info
