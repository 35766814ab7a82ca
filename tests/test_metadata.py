import json
from dataclasses import asdict, replace

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from textcond.apps.metadata import Parameters, read_parameters, write_png

FULL = Parameters(
    prompt="a red fox, noto style",
    negative_prompt="snow: deep, white",
    seed=2**40,
    num_inference_steps=12,
    guidance_scale=4.5,
    width=128,
    height=96,
    pipeline="some/folder, with comma",
    encoder="native",
    scheduler="DDIMScheduler",
    device="cpu",
    dtype="float32",
    versions={"textcond": "0.1.0", "torch": "2.14"},
)
TEXTS = ["", "🍎🦊", "ثعلب أحمر", "first\nsecond", 'quotes "and", commas: {}', "word " * 10_000, "吾輩は猫である"]


@pytest.mark.parametrize("text", TEXTS, ids=["empty", "emoji", "arabic", "lines", "signs", "long", "japanese"])
def test_a_png_gives_back_every_parameter(tmp_path, text):
    given = replace(FULL, prompt=text, negative_prompt=text)
    write_png(tmp_path / "a.png", Image.new("RGB", (8, 8)), given)
    assert read_parameters(tmp_path / "a.png") == given


def test_the_parameters_text_is_what_web_uis_write():
    assert FULL.text() == (
        "a red fox, noto style\n"
        "Negative prompt: snow: deep, white\n"
        "Steps: 12, Sampler: DDIM, CFG scale: 4.5, Seed: 1099511627776, Size: 128x96, "
        'Model: "some/folder, with comma", Text encoder: native, Version: textcond 0.1.0'
    )


@pytest.mark.parametrize("negative", ["", "snow", "two\nlines"])
@pytest.mark.parametrize("prompt", ["", "a red fox", "two\nlines"])
def test_the_parameters_text_alone_gives_the_picture_back(prompt, negative):
    given = replace(FULL, prompt=prompt, negative_prompt=negative)
    read = Parameters.from_text(given.text())
    kept = ("prompt", "negative_prompt", "seed", "num_inference_steps", "guidance_scale", "width", "height", "pipeline")
    assert {name: getattr(read, name) for name in kept} == {name: getattr(given, name) for name in kept}


def test_a_picture_of_a_web_ui_is_read(tmp_path):
    info = PngInfo()
    info.add_text(
        "parameters", "a fox\nNegative prompt: snow\nSteps: 30, Sampler: Euler a, CFG scale: 7, Seed: 5, Hash: 1a"
    )
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png", pnginfo=info)
    read = read_parameters(tmp_path / "a.png")
    assert (read.prompt, read.negative_prompt, read.seed, read.num_inference_steps) == ("a fox", "snow", 5, 30)


def _png(path, key, text):
    info = PngInfo()
    info.add_text(key, text)
    Image.new("RGB", (8, 8)).save(path, pnginfo=info)
    return path


def test_an_unknown_key_is_named(tmp_path):
    path = _png(tmp_path / "a.png", "textcond", json.dumps(asdict(FULL) | {"sharpness": 3}))
    with pytest.raises(ValueError, match="unknown key 'sharpness'"):
        read_parameters(path)


@pytest.mark.parametrize(
    ("key", "text", "message"),
    [
        ("textcond", "{", "not valid JSON"),
        ("textcond", "[]", "holds no parameters"),
        ("textcond", '{"prompt": 3}', "wrong type"),
        ("textcond", '{"prompt": "a", "seed": "b"}', "wrong type"),
        ("parameters", "a fox", "names no steps"),
        ("parameters", "a fox\nSteps: many, Seed: 1", "malformed"),
        ("parameters", "a fox\nSteps: 3, Seed: 1, Size: 12", "malformed"),
        ("comment", "hello", "carries no prompt"),
    ],
)
def test_a_picture_without_usable_parameters_is_refused(tmp_path, key, text, message):
    with pytest.raises(ValueError, match=message):
        read_parameters(_png(tmp_path / "a.png", key, text))


def test_what_is_no_png_is_refused(tmp_path):
    (tmp_path / "a.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match="not a readable"):
        read_parameters(tmp_path / "a.png")
    Image.new("RGB", (64, 64)).save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:60])
    with pytest.raises(ValueError, match="damaged or cut short"):
        read_parameters(tmp_path / "cut.png")
    with pytest.raises(FileNotFoundError):
        read_parameters(tmp_path / "none.png")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": -1}, "seed -1 is out of range"),
        ({"seed": 2**63}, "out of range"),
        ({"num_inference_steps": 0}, "0 steps make no picture"),
        ({"guidance_scale": float("nan")}, "guidance nan"),
        ({"guidance_scale": -2.0}, r"guidance -2\.0"),
        ({"width": 0}, "width 0"),
        ({"prompt": "\udcff"}, "not valid Unicode"),
    ],
)
def test_a_parameter_out_of_range_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        replace(FULL, **change)
