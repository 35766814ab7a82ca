import subprocess
import sys

import numpy as np
import pytest
import torch

from textcond import ConditioningEncoder, PromptIndex, TextEncoder
from textcond.index.image_text import IMAGE_FOLDER
from textcond.pipelines import load_reference, retrieval_encoder, swapped
from textcond.pipelines.families import condition
from textcond.pipelines.reference import MULTILINGUAL, REFERENCE, open_reference_index

OPTIONS = {"num_inference_steps": 6, "guidance_scale": 4.0}


@pytest.fixture(scope="module")
def pipe():
    pipe = load_reference()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def picture(pipe, prompt, seed=0):
    image = pipe(prompt, generator=torch.Generator().manual_seed(seed), **OPTIONS).images[0]
    return np.asarray(image).astype(np.float32)


def test_stock_diffusers_loads_the_folder_in_a_process_that_never_imports_us():
    code = (
        "import sys, torch\n"
        "from diffusers import StableDiffusionPipeline\n"
        f"pipe = StableDiffusionPipeline.from_pretrained({str(REFERENCE)!r})\n"
        "image = pipe('fox', num_inference_steps=2, generator=torch.Generator().manual_seed(0)).images[0]\n"
        "assert 'textcond' not in sys.modules\n"
        "print(image.size, pipe.text_encoder.dtype, pipe.unet.dtype)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "(128, 128) torch.float32 torch.float32", done.stderr[-1000:]


def test_the_shipped_files_stay_within_their_size():
    sizes = {file: file.stat().st_size for file in REFERENCE.rglob("*") if file.is_file()}
    tower = sum(size for file, size in sizes.items() if IMAGE_FOLDER in file.parts)  # no part of the pipeline
    assert 10e6 < tower < 13e6
    assert sum(sizes.values()) - tower < 60e6
    assert not [file for file in REFERENCE.rglob("*") if file.suffix in {".bin", ".pt", ".ckpt", ".pkl"}]


def test_a_seed_gives_the_same_picture_and_another_seed_another(pipe):
    first = picture(pipe, "red apple, noto style")
    assert np.array_equal(first, picture(pipe, "red apple, noto style"))
    assert not np.array_equal(first, picture(pipe, "red apple, noto style", seed=1))


def test_the_prompt_decides_colour_and_background(pipe):
    tomato, leaf = picture(pipe, "tomato, flat style"), picture(pipe, "four leaf clover, flat style")
    middle = (slice(40, 88), slice(40, 88))
    assert tomato[middle][..., 0].mean() > tomato[middle][..., 1].mean() + 40
    assert leaf[middle][..., 1].mean() > leaf[middle][..., 0].mean() + 20
    blue = picture(pipe, "tomato, flat style, on a blue background")[:6, :6].mean((0, 1))
    assert blue[2] > blue[0] + 60
    assert picture(pipe, "tomato, flat style")[:6, :6].min() > 200


@pytest.mark.parametrize("prompt", ["", "🦊🦊🦊", "תפוח אדום", "word " * 10_000])
def test_any_prompt_gives_a_picture(pipe, prompt):
    assert picture(pipe, prompt).shape == (128, 128, 3)


def test_the_conditioning_weights_search_the_index_in_any_language(pipe):
    with swapped(pipe, MULTILINGUAL):
        index = open_reference_index(retrieval_encoder(pipe))
    for query, concept in {"octopus": "octopus", "赤リンゴ": "red apple", "Sonnenblume": "sunflower"}.items():
        hits = index.search(query, k=5, mode="dense")
        assert concept in {hit.metadata["concept"] for hit in hits}
        assert hits[0].image.size == (96, 96)
    assert {hit.metadata["style"] for hit in index.search("rose, blob style", k=1)} == {"blob"}
    assert {row.metadata["language"] for row in index.rows({"concept": "octopus"})} >= {"en", "ja", "ar", "ko"}


def test_the_index_refuses_another_encoder(pipe):
    with pytest.raises(ValueError, match="the encoder gives 256"):
        open_reference_index(retrieval_encoder(pipe))


def test_sentence_transformers_reads_the_text_encoder_folder():
    sentence_transformers = pytest.importorskip("sentence_transformers")
    texts = ["fox", "a very sleepy cat, blob style", "", "キツネ"]
    theirs = sentence_transformers.SentenceTransformer(str(REFERENCE / "text_encoder"), device="cpu").encode(texts)
    ours = TextEncoder.from_pretrained(REFERENCE / "text_encoder").encode(texts)
    np.testing.assert_allclose(theirs, ours, atol=1e-5)


def test_another_encoder_swaps_in_and_out_and_indexes_the_same_captions(pipe, tmp_path):
    encoder = TextEncoder.from_pretrained(REFERENCE / "text_encoder")
    conditioning = ConditioningEncoder.from_text_encoder(encoder, bridge="resampler", width=256, tokens=16)
    before = picture(pipe, "rose")
    with swapped(pipe, conditioning):
        assert not np.array_equal(picture(pipe, "rose"), before)
        index = PromptIndex(retrieval_encoder(pipe))
        index.add(["rose", "tent"])
        assert index.search("rose", k=1)[0].text == "rose"
    assert np.array_equal(picture(pipe, "rose"), before)


def test_the_shipped_multilingual_encoder_says_in_other_languages_what_the_native_one_says_in_english():
    pipe = load_reference()
    english = ["red apple, noto style, on a blue background", "octopus, twemoji style, on a yellow background"]
    others = ["赤リンゴ、notoスタイル、青い背景", "Oktopus, twemoji-Stil, auf gelbem Hintergrund"]
    with torch.no_grad():
        wanted = condition(pipe, english)["encoder_hidden_states"]
        with swapped(pipe, MULTILINGUAL):
            said = condition(pipe, others)["encoder_hidden_states"]
    mean = wanted.mean(0)
    distances = torch.cdist((said - mean).flatten(1), (wanted - mean).flatten(1))
    assert distances.argmin(1).tolist() == [0, 1]
    assert (distances.diagonal() < 0.6 * (wanted - mean).flatten(1).norm(dim=1)).all()
