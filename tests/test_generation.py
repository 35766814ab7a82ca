from dataclasses import replace

import numpy as np
import pytest
import tiny
import tiny_families
import torch
from diffusers import DDIMScheduler
from tiny_reference import TOKENS, clip_tokenizer

from textcond.apps.generation import default_guidance, draw, longest_reader, prompt_length
from textcond.apps.loading import load_pipeline
from textcond.apps.metadata import Parameters
from textcond.apps.preview import expected_latents
from textcond.pipelines import swap_text_encoder

TWO_STEPS = Parameters("a red fox", seed=3, num_inference_steps=2, guidance_scale=3.0)


@pytest.fixture(scope="module")
def pipe(demo):
    return load_pipeline(demo.pipeline)


def _pixels(image):
    return np.asarray(image).astype(int)


def test_the_same_parameters_give_the_same_picture_and_another_seed_another(pipe):
    first, made = draw(pipe, TWO_STEPS)
    again, _ = draw(pipe, made)
    other, _ = draw(pipe, replace(TWO_STEPS, seed=4))
    np.testing.assert_array_equal(_pixels(first), _pixels(again))
    assert (_pixels(first) != _pixels(other)).any()


def test_the_parameters_come_back_complete(pipe):
    image, made = draw(pipe, replace(TWO_STEPS, guidance_scale=None, pipeline="some/folder"))
    assert (made.width, made.height) == image.size == (128, 128)
    assert (made.scheduler, made.device, made.dtype) == ("DDIMScheduler", "cpu", "float32")
    assert made.guidance_scale == 7.5
    assert set(made.versions) == {"textcond", "diffusers", "torch"}


def test_each_step_is_told_and_can_be_looked_at(pipe):
    steps = []
    image, _ = draw(pipe, replace(TWO_STEPS, num_inference_steps=4), lambda *step: steps.append((*step[:2], step[2]())))
    assert [(done, total) for done, total, _ in steps] == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert steps[0][2] is None
    # After the last step nothing is left to expect: the preview is the picture.
    np.testing.assert_array_equal(_pixels(steps[3][2]), _pixels(image))


def test_an_exception_in_a_step_stops_the_drawing(pipe):
    def stop(done, total, preview):
        raise InterruptedError(f"at {done}")

    with pytest.raises(InterruptedError, match="at 1"):
        draw(pipe, TWO_STEPS, stop)
    draw(pipe, TWO_STEPS)


PROMPTS = {"empty": "", "emoji": "🍎🦊", "arabic": "ثعلب أحمر في الثلج", "long": "fox " * 10_000}


@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS.keys())
def test_any_text_makes_a_picture(pipe, prompt):
    image, _ = draw(pipe, replace(TWO_STEPS, prompt=prompt, negative_prompt=prompt))
    assert np.isfinite(_pixels(image)).all()


def test_the_size_can_be_chosen_and_a_wrong_one_is_refused(pipe):
    image, made = draw(pipe, replace(TWO_STEPS, width=64, height=96))
    assert image.size == (made.width, made.height) == (64, 96)
    assert draw(pipe, replace(TWO_STEPS, width=64))[0].size == (64, 128)
    with pytest.raises(ValueError, match="divisible by 8"):
        draw(pipe, replace(TWO_STEPS, width=65))


@pytest.mark.parametrize("name", ["EulerDiscreteScheduler", "UniPCMultistep", "DPM++ 2M Karras", "Euler a"])
def test_another_sampler_drives_one_run_and_is_named_by_its_class(pipe, name):
    own = pipe.scheduler
    image, made = draw(pipe, replace(TWO_STEPS, scheduler=name))
    assert pipe.scheduler is own
    again, _ = draw(pipe, made)
    np.testing.assert_array_equal(_pixels(image), _pixels(again))
    assert (_pixels(image) != _pixels(draw(pipe, TWO_STEPS)[0])).any()


def test_an_unknown_sampler_is_named_with_the_choices(pipe):
    with pytest.raises(ValueError, match=r"scheduler 'os' .* pass one of DDIMScheduler, DPMSolver"):
        draw(pipe, replace(TWO_STEPS, scheduler="os"))


def test_a_picture_withheld_by_the_safety_checker_is_an_error_and_not_a_black_picture(pipe, monkeypatch):
    monkeypatch.setattr(type(pipe), "run_safety_checker", lambda self, image, device, dtype: (image, [True]))
    with pytest.raises(ValueError, match="safety checker withheld"):
        draw(pipe, TWO_STEPS)


def test_a_slow_decoder_is_not_asked_for_previews():
    seen = []
    draw(tiny.stable_diffusion(), TWO_STEPS, lambda done, total, preview: seen.append(preview()))
    assert seen == [None, None]


def test_sdxl_draws_too():
    image, made = draw(tiny.stable_diffusion_xl(), TWO_STEPS)
    assert image.size == (made.width, made.height)


def test_guidance_is_the_reference_models_or_the_pipelines_own(pipe):
    assert default_guidance(pipe, "reference") == 4.0
    assert default_guidance(pipe, "some/folder") == 7.5


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_the_expected_latents_are_those_that_the_noise_was_added_to(spacing):
    scheduler = DDIMScheduler(prediction_type="v_prediction", timestep_spacing=spacing, clip_sample=False)
    scheduler.set_timesteps(10)
    torch.manual_seed(0)
    finished, noise = torch.randn(2, 1, 4, 8, 8).double()
    for step, t in enumerate(scheduler.timesteps[:-1]):
        alpha = scheduler.alphas_cumprod[t].double()
        before = alpha.sqrt() * finished + (1 - alpha).sqrt() * noise
        velocity = alpha.sqrt() * noise - (1 - alpha).sqrt() * finished
        after = scheduler.step(velocity, t, before).prev_sample
        torch.testing.assert_close(expected_latents(scheduler, step, before, after), finished, rtol=1e-3, atol=1e-3)


def test_tokens_are_counted_without_the_special_ones_and_the_cut_is_shown():
    length = prompt_length(clip_tokenizer(), "abc")
    assert (length.tokens, length.limit, length.truncated) == (3, TOKENS - 2, False)
    length = prompt_length(clip_tokenizer(), "abcdefghij" * 4)
    assert (length.tokens, length.truncated, length.kept) == (40, True, "abcdefghij" * 3)
    assert "40 tokens" in length.notice()
    assert length.kept in length.notice()


def test_the_encoder_that_reads_most_says_where_a_prompt_is_cut():
    pipe = tiny_families.flux()
    tokenizer, padded = longest_reader(pipe)
    assert (tokenizer, padded) == (pipe.tokenizer_2, 512)
    xl = tiny.stable_diffusion_xl()
    swap_text_encoder(xl, tiny.conditioning(width=64, pooled_width=32))
    assert longest_reader(xl)[0] is xl.tokenizer_2
    mixed = tiny.stable_diffusion()
    own, new = mixed.tokenizer, tiny.conditioning()
    swap_text_encoder(mixed, new, keep_original="concatenate")
    tokenizer, padded = longest_reader(mixed)
    assert padded == new.tokenizer.model_max_length
    assert tokenizer.get_vocab() == new.tokenizer.get_vocab() != own.get_vocab()
    assert prompt_length(tokenizer, "a red fox", padded).tokens == prompt_length(new.tokenizer, "a red fox").tokens
