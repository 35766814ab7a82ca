import json
import logging
import subprocess
import sys

import compel
import diffusers
import numpy as np
import pytest
import tiny_families
import torch
import transformers
from peft import LoraConfig
from safetensors.torch import save_file
from tiny import conditioning, generate, stable_diffusion, stable_diffusion_xl, tokenizer

from textcond import ConditioningEncoder, PackedTokenizer, TextEncoder
from textcond.original import MIXES, keep_original
from textcond.pipelines import retrieval_encoder, swap_text_encoder, swapped

PIPELINES = (stable_diffusion, stable_diffusion_xl)
CALL = {"prompt": "a red fox", "negative_prompt": "an ugly cat"}


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


def encoder_for(make, tokens=77, family="xlm-roberta", **options):
    """A new encoder for the whole of a tiny pipeline."""
    widths = {"width": 64, "pooled_width": 32} if make is stable_diffusion_xl else {}
    return conditioning(family, tokens=tokens, **widths, **options)


def embeds(pipe, prompt="a red fox", negative="an ugly cat"):
    """Tokens of prompt and negative, then for SDXL pooled vectors of both."""
    return pipe.encode_prompt(
        prompt, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True, negative_prompt=negative
    )


def mixed(pipe, new, mix, weight=None, **kwargs):
    """The same pipeline while it holds a mixture."""
    return swapped(pipe, new, keep_original=mix, original_weight=weight, **kwargs)


# What a mixture is made of


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("make", PIPELINES)
def test_weight_one_gives_the_originals_picture_exactly_and_weight_zero_the_new_ones(make, mix):
    pipe, new = make(), encoder_for(make)
    original = generate(pipe, **CALL)
    with swapped(pipe, new):
        replaced = generate(pipe, **CALL)
    assert not torch.allclose(original, replaced, atol=1e-3)
    for weight, expected in ((1, original), (0, replaced)):
        with mixed(pipe, new, mix, weight):
            assert torch.equal(generate(pipe, **CALL), expected)
    with mixed(pipe, new, mix):
        picture = generate(pipe, **CALL)
    assert not torch.allclose(picture, original, atol=1e-3)
    assert not torch.allclose(picture, replaced, atol=1e-3)
    assert torch.equal(generate(pipe, **CALL), original)


@pytest.mark.parametrize("make", PIPELINES)
def test_a_blend_is_the_weighted_sum_of_tokens_and_pooled_vectors(make):
    pipe, new = make(), encoder_for(make)
    original = embeds(pipe)
    with swapped(pipe, new):
        replaced = embeds(pipe)
    with mixed(pipe, new, "blend", 0.25):
        for got, theirs, ours in zip(embeds(pipe), original, replaced, strict=True):
            assert torch.allclose(got, 0.25 * theirs + 0.75 * ours, atol=1e-6)


@pytest.mark.parametrize("make", PIPELINES)
def test_concatenation_keeps_every_token_state_of_both_exactly(make):
    pipe, new = make(), encoder_for(make, tokens=12)
    original = embeds(pipe, "sks a red fox")
    with swapped(pipe, new):
        replaced = embeds(pipe, "sks a red fox", "")
    with mixed(pipe, new, "concatenate"):
        got = embeds(pipe, "sks a red fox")
        assert got[0].shape[1] == got[1].shape[1] == 77 + 12
        assert torch.equal(got[0][:, :77], original[0])
        assert torch.equal(got[0][:, 77:], replaced[0])
        assert torch.equal(got[1][:, :77], original[1])
        if make is stable_diffusion_xl:
            assert torch.allclose(got[2], (original[2] + replaced[2]) / 2, atol=1e-6)


def test_weights_of_concatenation_scale_the_lighter_part():
    pipe, new = stable_diffusion(), conditioning(tokens=12)
    original = embeds(pipe)[0]
    with swapped(pipe, new):
        replaced = embeds(pipe)[0]
    for weight, theirs, ours in ((0.2, 0.25, 1), (0.8, 1, 0.25)):
        with mixed(pipe, new, "concatenate", weight):
            got = embeds(pipe)[0]
        assert torch.allclose(got[:, :77], theirs * original, atol=1e-6)
        assert torch.allclose(got[:, 77:], ours * replaced, atol=1e-6)


@pytest.mark.parametrize("slot", ["text_encoder", "text_encoder_2"])
def test_one_slot_of_sdxl_can_be_mixed(slot):
    pipe = stable_diffusion_xl()
    new = conditioning(tokens=77, **({"pooled_width": 32} if slot == "text_encoder_2" else {}))
    original = generate(pipe, **CALL)
    with mixed(pipe, new, "blend", 1, slot=slot):
        assert torch.equal(generate(pipe, **CALL), original)
    with mixed(pipe, new, "blend", slot=slot):
        assert not torch.allclose(generate(pipe, **CALL), original, atol=1e-4)


@pytest.mark.parametrize("bridge", ["linear", "mlp"])
def test_bridges_that_keep_the_length_can_be_mixed(bridge):
    pipe = stable_diffusion()
    for mix, tokens in (("blend", 77), ("concatenate", 40)):
        with mixed(pipe, conditioning(bridge=bridge, tokens=tokens), mix):
            assert generate(pipe, **CALL).isfinite().all()


# In a pipeline


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("make", PIPELINES)
def test_batches_negatives_and_several_pictures_a_prompt(make, mix):
    pipe, new = make(), encoder_for(make)
    prompts, negatives = ["a red fox", "the dog", ""], ["", "an ugly cat", "a"]
    with mixed(pipe, new, mix):
        together = embeds(pipe, prompts, negatives)
        for i, (prompt, negative) in enumerate(zip(prompts, negatives)):
            for got, alone in zip(together, embeds(pipe, prompt, negative), strict=True):
                assert torch.allclose(got[i : i + 1], alone, atol=1e-5)
        assert generate(pipe, prompts, negative_prompt=negatives, num_images_per_prompt=2).shape[0] == 6
        assert not torch.allclose(generate(pipe, **CALL), generate(pipe, CALL["prompt"]), atol=1e-5)


def test_image_to_image_inpainting_and_controlnet_take_a_mixture():
    for task, controlnet in (("Img2Img", False), ("Inpaint", False), ("", True)):
        pipe = stable_diffusion(task, controlnet=controlnet)
        original = generate(pipe, **CALL)
        with mixed(pipe, conditioning(tokens=77), "blend", 1):
            assert torch.equal(generate(pipe, **CALL), original)


LOAD = """
import sys, numpy, diffusers
import textcond
sys.path.insert(0, sys.argv[1])
from tiny import generate
for folder in sys.argv[2:]:
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    images = generate(pipe, "a red fox", negative_prompt="an ugly cat")
    numpy.savez(folder + ".npz", image=images.numpy(), name=type(pipe).__name__)
"""


def test_saved_mixtures_load_in_a_fresh_process_and_give_equal_pictures(request, tmp_path):
    pipes = {"sd": stable_diffusion(), "sdxl": stable_diffusion_xl()}
    swap_text_encoder(pipes["sd"], encoder_for(stable_diffusion, tokens=12), keep_original="concatenate")
    swap_text_encoder(pipes["sdxl"], encoder_for(stable_diffusion_xl), keep_original="blend")
    for name, pipe in pipes.items():
        pipe.save_pretrained(tmp_path / name)
    index = json.loads((tmp_path / "sd" / "model_index.json").read_text())
    assert index["text_encoder"] == ["textcond", "ConditioningEncoder"]
    assert index["tokenizer"] == ["textcond", "PackedTokenizer"]
    index = json.loads((tmp_path / "sdxl" / "model_index.json").read_text())
    assert index["text_encoder_2"] == ["textcond", "ConditioningEncoderWithProjection"]
    assert not [file for file in tmp_path.rglob("*") if file.suffix in (".bin", ".pt", ".pth")]
    folders = [str(tmp_path / name) for name in pipes]
    subprocess.run([sys.executable, "-c", LOAD, str(request.path.parent), *folders], check=True, cwd=tmp_path)
    for name, pipe in pipes.items():
        loaded = np.load(tmp_path / f"{name}.npz")
        assert str(loaded["name"]) == type(pipe).__name__
        assert np.abs(loaded["image"] - generate(pipe, **CALL).numpy()).max() < 1e-5


def test_an_encoder_folder_of_a_mixture_swaps_in_by_itself(tmp_path):
    pipe, new = stable_diffusion(), conditioning(tokens=77)
    vectors = new.text_encoder.encode(["a red fox"])
    with mixed(pipe, new, "blend"):
        expected = generate(pipe, **CALL)
        assert np.array_equal(retrieval_encoder(pipe).encode(["a red fox"]), vectors)
        pipe.text_encoder.save_pretrained(tmp_path)
    other = stable_diffusion()
    other.text_encoder = None
    swap_text_encoder(other, tmp_path)
    assert torch.equal(generate(other, **CALL), expected)
    assert np.abs(TextEncoder.from_pretrained(tmp_path).encode(["a red fox"]) - vectors).max() < 1e-6
    conditioning(tokens=77).save_pretrained(tmp_path)
    assert not list(tmp_path.glob("part*"))


def rename_parts(folder):
    """Make of a saved mixture what an earlier version wrote."""
    for config in folder.rglob("tokenizer_config.json"):
        content = json.loads(config.read_text())
        if count := content.pop("packed", None):
            config.write_text(json.dumps(content | {"parts": count}))
            for i in range(1, count):
                (config.parent / f"part.{i}").rename(config.parent / f"part_{i}")


@pytest.mark.parametrize("make", PIPELINES)
def test_a_mixture_is_saved_as_a_variant_and_one_of_an_earlier_version_is_read(make, tmp_path):
    pipe = make()
    swap_text_encoder(pipe, encoder_for(make), keep_original="blend")
    expected = embeds(pipe)[0]
    pipe.save_pretrained(tmp_path / "variant", variant="fp16")
    loaded = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "variant", variant="fp16")
    assert torch.allclose(embeds(loaded)[0], expected, atol=1e-6)
    pipe.save_pretrained(tmp_path / "earlier")
    rename_parts(tmp_path / "earlier")
    loaded = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "earlier")
    assert torch.allclose(embeds(loaded)[0], expected, atol=1e-6)
    loaded.save_pretrained(tmp_path / "earlier", variant="fp16")
    loaded.save_pretrained(tmp_path / "again", variant="fp16")
    loaded = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "again", variant="fp16")
    assert torch.allclose(embeds(loaded)[0], expected, atol=1e-6)


def test_folders_of_an_earlier_mixture_leave_with_it(tmp_path):
    pipe = stable_diffusion()
    swap_text_encoder(pipe, conditioning(tokens=77), keep_original="blend")
    pipe.text_encoder.save_pretrained(tmp_path)
    rename_parts(tmp_path)
    assert (tmp_path / "part_1").is_dir()
    conditioning(tokens=77).save_pretrained(tmp_path)
    assert not list(tmp_path.glob("part*"))


def test_the_mixture_shares_all_weights_with_its_parts():
    pipe, new = stable_diffusion(), conditioning(tokens=77)
    old = pipe.text_encoder
    with mixed(pipe, new, "blend"):
        both = pipe.text_encoder
        assert both.backbone is new.backbone
        assert both.bridge is new.bridge
        assert both.original.encoders[0] is old
    assert new.config.original is None
    assert pipe.text_encoder is old


@pytest.mark.parametrize("make", [tiny_families.stable_diffusion_2, tiny_families.refiner])
def test_other_stable_diffusion_pipelines_keep_their_original(make):
    pipe = make()
    refiner = make is tiny_families.refiner
    config = (pipe.text_encoder_2 if refiner else pipe.text_encoder).config
    pooled = {"pooled_width": config.projection_dim} if refiner else {}
    original = tiny_families.generate(pipe)
    with mixed(pipe, conditioning(tokens=77, width=config.hidden_size, **pooled), "blend", 1):
        assert torch.equal(tiny_families.generate(pipe), original)


def test_pipelines_whose_slots_share_a_length_refuse():
    pipe = tiny_families.stable_diffusion_3()
    with pytest.raises(ValueError, match="leave keep_original out"):
        swap_text_encoder(pipe, conditioning(tokens=77, pooled_width=32), "text_encoder", keep_original="blend")


# The ecosystem of the original


def test_a_lora_of_the_unet_meets_its_trigger_words():
    pipe = stable_diffusion()
    pipe.unet.add_adapter(LoraConfig(r=2, init_lora_weights=False, target_modules=["to_k", "to_v"]))
    styled = generate(pipe, "sks fox")
    trigger = embeds(pipe, "sks fox")[0]
    with mixed(pipe, conditioning(tokens=12), "concatenate"):
        assert torch.equal(embeds(pipe, "sks fox")[0][:, :77], trigger)
    with mixed(pipe, conditioning(tokens=77), "blend", 1):
        assert torch.equal(generate(pipe, "sks fox"), styled)


@pytest.mark.parametrize("when", ["before", "after"])
def test_textual_inversion_reaches_the_original_and_is_saved(when, tmp_path):
    pipe, new = stable_diffusion(), conditioning(tokens=12)
    save_file({"<toy>": torch.randn(2, 32)}, tmp_path / "learned.safetensors")
    if when == "before":
        pipe.load_textual_inversion(tmp_path / "learned.safetensors", token="<toy>")
    swap_text_encoder(pipe, new, keep_original="concatenate")
    if when == "after":
        pipe.load_textual_inversion(tmp_path / "learned.safetensors", token="<toy>")
    ids = pipe.tokenizer("a <toy> fox <toy>_1", padding="longest").input_ids
    assert {len(pipe.tokenizer) - 2, len(pipe.tokenizer) - 1} <= set(ids[:77])
    # The new encoder has never heard of it.
    assert ids[77:] == new.tokenizer("a fox").input_ids
    learned = embeds(pipe, "a <toy> fox")[0]
    pipe.save_pretrained(tmp_path / "pipe")
    loaded = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "pipe")
    assert torch.equal(embeds(loaded, "a <toy> fox")[0], learned)
    reference = stable_diffusion()
    reference.load_textual_inversion(tmp_path / "learned.safetensors", token="<toy>")
    assert torch.equal(embeds(reference, "a <toy> fox")[0], learned[:, :77])


@pytest.mark.parametrize("mix", MIXES)
def test_compel_is_told_that_it_cannot_weigh_the_words_of_a_mixture(mix):
    pipe = stable_diffusion()
    swap_text_encoder(pipe, conditioning(bridge="mlp", tokens=77), keep_original=mix)
    for prompt in ("a red fox", "a (red)1.5 fox"):
        with pytest.raises(ValueError, match=r"compel .*keep_original=None"):
            compel.CompelForSD(pipe)(prompt)
    xl = stable_diffusion_xl()
    swap_text_encoder(xl, conditioning(bridge="mlp", tokens=77), "text_encoder", keep_original="blend")
    with pytest.raises(ValueError, match=r"compel .*keep_original=None"):
        compel.CompelForSDXL(xl)("a (red)1.5 fox")


# The tokenizer


@pytest.mark.parametrize("pad", ["<|endoftext|>", "!"])
def test_rows_hold_exactly_the_ids_of_each_tokenizer(pad, tmp_path):
    letters = [*"abcdefghijklmnopqrstuvwxyz!"]
    pieces = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    clip = transformers.CLIPTokenizer(
        vocab={piece: i for i, piece in enumerate(pieces)}, merges=[], model_max_length=20, pad_token=pad
    )
    new = tokenizer("bert", 30)
    packed = PackedTokenizer.pack([clip, tokenizer("clip", 10), new])
    packed.save_pretrained(tmp_path)
    texts, full = ["A red fox!", "", "the dog " * 9], {"padding": "max_length", "truncation": True}
    expected = [
        [*originals, *others, *ours]
        for originals, others, ours in zip(
            clip(texts, max_length=20, **full).input_ids,
            tokenizer("clip", 10)(texts, max_length=10, **full).input_ids,
            new(texts, max_length=30, **full).input_ids,
        )
    ]
    for one in (packed, PackedTokenizer.from_pretrained(tmp_path)):
        assert one.lengths == [20, 10, 30]
        rows = one(texts, max_length=17, return_tensors="pt", **full)
        assert rows.input_ids.tolist() == expected
        assert rows.attention_mask.shape == (3, 60)
        assert one(texts[0], **full).input_ids == expected[0]


def test_the_pipeline_warns_of_what_the_new_encoder_does_not_read_and_of_nothing_else(caplog):
    pipe, new = stable_diffusion(), conditioning(tokens=12)  # reads 64 tokens, a letter each
    logging.getLogger("diffusers").addHandler(caplog.handler)
    try:
        with mixed(pipe, new, "concatenate"):
            embeds(pipe, "a" * 62)
            assert not caplog.records
            embeds(pipe, "a" * 62 + "xyz")
            assert "truncated" in caplog.text
            assert "x" in caplog.text.rpartition(":")[2]
    finally:
        logging.getLogger("diffusers").removeHandler(caplog.handler)


# Misfits


@pytest.mark.parametrize(
    ("new", "options", "message"),
    [
        (lambda: conditioning(tokens=12), {}, r"77 tokens and the new encoder 12.*concatenate"),
        (lambda: conditioning(tokens=77, width=24), {}, "32-wide tokens, the new encoder 24"),
        (lambda: conditioning(tokens=16, chunk=32), {"mix": "concatenate"}, "chunk=32"),
        (lambda: conditioning(bridge="identity", tokens=77), {}, "states to a connector.*another bridge"),
        (lambda: conditioning(tokens=77), {"mix": "average"}, "'average'.*blend, concatenate"),
        (lambda: conditioning(tokens=77), {"weight": 1.5}, "original_weight=1.5"),
        (lambda: stable_diffusion().text_encoder, {}, "not with a CLIPTextModel"),
    ],
)
def test_a_misfit_is_reported_with_its_mend_and_changes_nothing(new, options, message):
    pipe = stable_diffusion()
    before = dict(pipe.components)
    with pytest.raises(ValueError, match=message):
        swap_text_encoder(pipe, new(), keep_original=options.get("mix", "blend"), original_weight=options.get("weight"))
    assert {name: id(part) for name, part in pipe.components.items()} == {
        name: id(part) for name, part in before.items()
    }


@pytest.mark.parametrize(("slot", "other"), [("text_encoder", "text_encoder_2"), ("text_encoder_2", "text_encoder")])
def test_one_slot_of_sdxl_that_would_grow_beside_the_other_is_told_to_blend_and_then_both_can(slot, other):
    pipe = stable_diffusion_xl()
    made = {
        name: conditioning(tokens=77, **({"pooled_width": 32} if name == "text_encoder_2" else {}))
        for name in (slot, other)
    }
    with pytest.raises(ValueError, match=r'154.*leave slot out.*or pass keep_original="blend"'):
        swap_text_encoder(pipe, made[slot], slot, keep_original="concatenate")
    original = generate(pipe, **CALL)
    for name, encoder in made.items():
        swap_text_encoder(pipe, encoder, name, keep_original="blend", original_weight=1)
    assert torch.equal(generate(pipe, **CALL), original)


def test_what_is_in_the_slot_must_be_an_original():
    pipe, new = stable_diffusion(), conditioning(tokens=77)
    with pytest.raises(ValueError, match=r"original_weight=0.3 without an original"):
        swap_text_encoder(pipe, new, original_weight=0.3)
    swap_text_encoder(pipe, new, keep_original="blend")
    both = pipe.text_encoder
    with pytest.raises(ValueError, match="holds a ConditioningEncoder"):
        swap_text_encoder(pipe, conditioning(tokens=77), keep_original="blend")
    pipe = stable_diffusion()
    with pytest.raises(ValueError, match="already keeps an original"):
        swap_text_encoder(pipe, both, keep_original="blend")
    with pytest.raises(ValueError, match="use the encoder's own tokenizer"):
        swap_text_encoder(pipe, both, tokenizer=pipe.tokenizer)
    with pytest.raises(ValueError, match="use the encoder's own tokenizer"):
        swap_text_encoder(pipe, new, tokenizer=both.tokenizer)
    with pytest.raises(ValueError, match="the original's part alone has 77"):
        both(torch.zeros(1, 77, dtype=torch.long))
    xl = stable_diffusion_xl()
    with pytest.raises(ValueError, match="32-wide pooled vector, the new encoder 8"):
        swap_text_encoder(xl, conditioning(tokens=77, width=64, pooled_width=8), keep_original="blend")
    pipe.text_encoder.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="carries a LoRA"):
        keep_original(new, pipe.text_encoder, pipe.tokenizer)
    new.tokenizer = None
    with pytest.raises(ValueError, match=r"set \.tokenizer"):
        keep_original(new, stable_diffusion().text_encoder, tokenizer("clip", 77))
    assert type(both) is ConditioningEncoder
