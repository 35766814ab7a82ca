"""The parts of the reference recipe around the training loop, on invented artwork."""

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers import AutoencoderTiny
from PIL import Image

from textcond import TextEncoder
from textcond.index.image_text import load_encoder, load_image_tower
from textcond.pipelines.reference import MULTILINGUAL, REFERENCE
from textcond.pipelines.reference.autoencoder import AutoencoderRecipe, held_out_psnr, psnr, train_autoencoder
from textcond.pipelines.reference.clip import (
    Claim,
    ClipBatches,
    ClipRecipe,
    HardNegatives,
    ImageTower,
    held_out_recall,
    ship_encoder,
    train_clip,
    train_tokenizer,
)
from textcond.pipelines.reference.data import HELD_OUT_STYLE, STYLES, Concept, ReferenceData, is_held_out
from textcond.pipelines.reference.denoiser import DenoiserRecipe, train_denoiser
from textcond.pipelines.reference.evaluate import combination_cases, interval, judge_pictures, style_cases, to_pixels
from textcond.pipelines.reference.image_tower import TowerRecipe, picture_recall, train_image_tower
from textcond.pipelines.reference.judge import Judge, JudgeRecipe, judge_accuracy, train_judge

NAMES = ["red circle", "green circle", "red square", "green square", "blue circle", "blue square"]


@pytest.fixture(scope="module")
def data():
    """Six concepts, circles and squares in three colours, drawn by every vendor a little differently."""
    concepts, icons, pixels = [], [], []
    grid = np.mgrid[:128, :128] - 64
    for number, name in enumerate(NAMES):
        colour, shape = name.split()
        concepts.append(Concept(name, "", "Shapes", [colour, shape, "shape"]))
        for size, style in enumerate([*STYLES, HELD_OUT_STYLE]):
            radius = 30 + 4 * size
            inside = np.hypot(*grid) < radius if shape == "circle" else np.abs(grid).max(0) < radius
            picture = np.zeros((128, 128, 4), dtype=np.uint8)
            picture[inside] = {"red": (220, 0, 0, 255), "green": (0, 180, 0, 255), "blue": (0, 0, 220, 255)}[colour]
            icons.append((number, style))
            pixels.append(picture)
    return ReferenceData(concepts, icons, np.stack(pixels))


def test_every_stage_runs_and_its_files_load(data, tmp_path):
    accelerator = Accelerator(cpu=True)
    vae = train_autoencoder(data, tmp_path / "vae", AutoencoderRecipe(channels=8, steps=2, batch=2), accelerator)
    clip = train_clip(data, tmp_path / "clip", ClipRecipe(width=64, layers=1, steps=2, batch=6), accelerator)
    recipe = DenoiserRecipe(concepts=4, channels=(32, 32, 32), steps=2, batch=4)
    pipeline = train_denoiser(data, vae, clip, tmp_path / "denoiser", recipe, accelerator)
    judge = train_judge(
        data, vae, tmp_path / "judge", JudgeRecipe(channels=(8, 8, 8, 8), steps=2, batch=4), accelerator
    )

    autoencoder = AutoencoderTiny.from_pretrained(vae).eval()
    assert autoencoder.config.scaling_factor != 1
    assert 0 < held_out_psnr(data, autoencoder) < 40
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(pipeline)
    tower = ImageTower.from_pretrained(clip / "image_encoder")
    assert 0 <= held_out_recall(data, pipe.text_encoder, pipe.tokenizer, tower, k=2) <= 1
    ship_encoder(clip, tmp_path / "shipped")
    shipped, drawn = load_encoder(tmp_path / "shipped"), Image.new("RGB", (96, 80), "teal")
    pixels = to_pixels([drawn.resize((64, 64))])
    assert abs(shipped.encode_image([drawn])[0] - tower(pixels)[0].detach().numpy()).max() < 1e-3
    text = TextEncoder.from_pretrained(clip / "text_encoder").encode("a red circle")
    assert abs(shipped.encode("a red circle") - text).max() < 1e-2
    cases = style_cases(data, 4)
    pictures = pipe([case.prompt for case in cases], num_inference_steps=2, output_type="pil").images
    hits = judge_pictures(Judge.from_pretrained(judge), pictures, cases, among=4)
    assert {key: len(values) for key, values in hits.items()} == dict.fromkeys(hits, 4)
    assert set(judge_accuracy(data, Judge.from_pretrained(judge), autoencoder, count=3)) == {
        "concept",
        "style",
        "colour",
    }


def test_read_alikes_share_words_and_look_alikes_share_pixels(data):
    negatives = HardNegatives(data, count=2)
    assert {NAMES[index].split()[0] for index in negatives.look[0]} == {"red", "green"} or 2 in negatives.look[0]
    assert all(set(NAMES[index].split()) & {"red", "circle"} for index in negatives.read[0])
    assert negatives.true_concepts(["circle"]) == {0, 1, 4}
    assert negatives.true_concepts(["circle", "red"]) == {0}


def test_a_false_caption_never_describes_its_picture_and_the_true_one_always_does(data):
    batches = ClipBatches(data)
    drawn = list(batches.draw(150, np.random.default_rng(0)))
    assert len(drawn) == 150
    for row, colour, true, false in drawn:
        concept, style = data.icons[row]
        assert true.is_true_of(concept, style, colour)
        assert not false.is_true_of(concept, style, colour)
        assert style != HELD_OUT_STYLE
        assert not is_held_out(data.concepts[concept].name, style, colour)


def test_a_claim_without_style_and_colour_is_true_of_any():
    claim = Claim("red circle", frozenset({0}), None, None)
    assert claim.is_true_of(0, "noto", "blue")
    assert not claim.is_true_of(1, "noto", "blue")


def test_the_tokenizer_covers_every_script_and_pads_with_a_token_of_its_own(data):
    tokenizer = train_tokenizer(data, 400)
    ids = tokenizer("🦊 キツネ red", padding="max_length", truncation=True).input_ids
    assert len(ids) == 32
    assert ids[0] == tokenizer.bos_token_id
    assert ids.count(tokenizer.eos_token_id) == 1
    assert ids[-1] == tokenizer.pad_token_id not in (tokenizer.bos_token_id, tokenizer.eos_token_id)


def test_cases_keep_to_their_side_of_the_held_out_combinations(data):
    for held_out in (False, True):
        for case in combination_cases(data, 6, held_out=held_out):
            assert is_held_out(data.concepts[case.concept].name, case.style, case.colour) == held_out
            assert case.prompt.endswith(f"{case.style} style, on a{'n' if case.colour == 'orange' else ''} "
                                        f"{case.colour} background")  # fmt: skip
    assert style_cases(data, 6)[0].style != style_cases(data, 6, turn=1)[0].style


def test_the_bootstrap_interval_holds_the_mean_and_narrows_with_pictures():
    few, many = np.array([True, False] * 10), np.array([True, False] * 1000)
    for hits in (few, many):
        mean, low, high = interval(hits)
        assert low < mean == 0.5 < high
    assert interval(many)[2] - interval(many)[1] < (interval(few)[2] - interval(few)[1]) / 5


def test_psnr_of_a_known_error():
    target = torch.zeros(1, 3, 8, 8)
    assert psnr(target + 0.02, target).item() == pytest.approx(40.0, abs=1e-3)


def test_pixels_of_a_picture_are_in_minus_one_to_one(data):
    from PIL import Image

    pixels = to_pixels([Image.new("RGB", (4, 4), (255, 0, 0))])
    assert pixels.shape == (1, 3, 4, 4)
    assert pixels[0, :, 0, 0].tolist() == [1.0, -1.0, -1.0]


def test_an_image_tower_is_fitted_to_another_encoder_and_the_given_one_stays(data, tmp_path):
    tower = load_image_tower(REFERENCE / "text_encoder")
    before = tower.visual.attnpool.c_proj.weight.clone()
    encoder = TextEncoder.from_pretrained(MULTILINGUAL)
    recipe = TowerRecipe(steps=24, batch=6)
    fitted = train_image_tower(encoder, tower, data, tmp_path, ["en"], recipe, Accelerator())
    assert (tower.dim, fitted.dim) == (256, 384)
    assert torch.equal(tower.visual.attnpool.c_proj.weight, before)
    # Of six things each drawing of the vendor that was kept out finds its name before the other five.
    by_name, by_picture = picture_recall(encoder, fitted, data, k=1)
    assert min(by_name, by_picture) > 0.8
