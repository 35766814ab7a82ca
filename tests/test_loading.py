import shutil
from pathlib import Path

import pytest
import tiny_audio
import torch
from PIL import Image

from textcond.apps.loading import find_encoder, find_pipeline, load_pipeline, load_text_encoder
from textcond.pipelines import inspect_pipeline


@pytest.fixture
def copy(demo, tmp_path):
    shutil.copytree(demo.pipeline, tmp_path / "pipeline")
    return tmp_path / "pipeline"


def test_a_pipeline_is_loaded_with_the_encoder_asked_for(demo):
    pipe = load_pipeline(demo.pipeline, encoder=demo.encoder)
    assert type(pipe).__name__ == "StableDiffusionPipeline"
    assert type(pipe.text_encoder).__name__ == "ConditioningEncoder"
    assert load_pipeline(demo.pipeline, dtype="bfloat16").unet.dtype == torch.bfloat16


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_a_truncated_weight_file_is_named(copy, part):
    file = next((copy / part).glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=f"{part}/{file.name} is damaged or cut short"):
        load_pipeline(str(copy))


def test_pickled_weights_are_not_read(copy):
    file = next((copy / "unet").glob("*.safetensors"))
    torch.save({}, file.with_suffix(".bin"))
    file.unlink()
    with pytest.raises((OSError, ValueError), match="safetensors"):
        load_pipeline(str(copy))


def test_an_encoder_of_the_wrong_width_is_refused_with_both_widths(demo):
    with pytest.raises(ValueError, match=r"48-wide tokens, the UNet expects 32"):
        load_pipeline(demo.pipeline, encoder=demo.wide)


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("{demo}/none/at/all", FileNotFoundError, "no pipeline folder"),
        ("nothing", FileNotFoundError, "a hub id reads OWNER/NAME"),
        ("{demo}", ValueError, "holds no model_index.json"),
        ("{demo}/pipeline/model_index.json", ValueError, "is a file"),
    ],
)
def test_what_is_no_pipeline_is_refused_with_the_mend(demo, name, kind, message):
    with pytest.raises(kind, match=message):
        find_pipeline(name.format(demo=demo.root))


def test_what_is_no_encoder_is_refused_with_the_mend(demo):
    with pytest.raises(FileNotFoundError, match="no encoder folder"):
        find_encoder("nothing")
    with pytest.raises(FileNotFoundError, match="no encoder folder"):
        find_encoder(f"{demo.pipeline}/model_index.json")


@pytest.mark.parametrize(("device", "message"), [("nowhere", "cannot be used here"), ("cuda:99", "pass cpu")])
def test_an_unusable_device_is_named(demo, device, message):
    with pytest.raises(ValueError, match=f"device '{device}'.*{message}"):
        load_pipeline(demo.pipeline, device=device)


def test_an_unknown_dtype_is_named(demo):
    with pytest.raises(ValueError, match="dtype 'int8' is unknown: pass one of float32"):
        load_pipeline(demo.pipeline, dtype="int8")


def test_a_text_encoder_is_loaded_from_either_kind_of_folder(demo):
    assert load_text_encoder(f"{demo.pipeline}/text_encoder").dim == 32
    assert load_text_encoder(demo.encoder).dim == 32


@pytest.mark.parametrize(("name", "width"), [("native", 256), ("multilingual", 384)])
def test_the_shipped_encoders_read_pictures_too(name, width):
    assert load_text_encoder(name).encode_image([Image.new("RGB", (5, 4))]).shape == (1, width)


def test_multilingual_is_the_shipped_encoder():
    assert (Path(find_encoder("multilingual")) / "model.safetensors").is_file()


def test_a_musicldm_folder_makes_audio_with_its_own_clap(tmp_path):
    tiny_audio.musicldm().save_pretrained(tmp_path)
    pipe = load_pipeline(str(tmp_path))
    assert inspect_pipeline(pipe)[0].problems == []
    assert tiny_audio.waveforms(pipe).isfinite().all()


def test_a_pipeline_saved_as_a_variant_alone_is_loaded(demo, tmp_path):
    load_pipeline(demo.pipeline).save_pretrained(tmp_path, variant="fp16")
    assert not list(tmp_path.glob("*/model.safetensors"))
    assert list(tmp_path.glob("*/*.fp16.safetensors"))
    loaded, expected = load_pipeline(str(tmp_path)), load_pipeline(demo.pipeline)
    ours, theirs = (pipe.unet.state_dict() for pipe in (loaded, expected))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
