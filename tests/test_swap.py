import copy
import json
import subprocess
import sys

import diffusers
import numpy as np
import pytest
import torch
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from tiny import (
    PROMPTS,
    backbone,
    clip_text_model,
    conditioning,
    generate,
    stable_diffusion,
    stable_diffusion_xl,
    text_encoder,
    tokenizer,
)

from textcond import ConditioningEncoder, TextEncoder
from textcond.bridges import BRIDGES
from textcond.pipelines import retrieval_encoder, swap_text_encoder, swapped

# Task, ControlNet, bridge: every bridge where it costs least, every pipeline class with one of them.
PIPELINES = [("", False, bridge) for bridge in BRIDGES] + [
    (task, controlnet, "resampler")
    for task in ("", "Img2Img", "Inpaint")
    for controlnet in (False, True)
    if task or controlnet
]


def for_sdxl(family="bert", bridge="resampler", **options):
    """One encoder for both slots of the tiny SDXL."""
    return conditioning(family, bridge, width=64, tokens=12, pooled_width=32, **options)


def embeds(pipe, prompt="a red fox", **kwargs):
    with torch.no_grad():
        return pipe.encode_prompt(
            prompt, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True, **kwargs
        )


def snapshot(pipe):
    return {name: id(component) for name, component in pipe.components.items()}, dict(pipe.config)


# Every task, in the unmodified stock class


@pytest.mark.parametrize(("task", "controlnet", "bridge"), PIPELINES)
def test_swapped_stable_diffusion_runs(task, controlnet, bridge):
    pipe = stable_diffusion(task, controlnet=controlnet)
    cls, before, encoder = type(pipe), generate(pipe), conditioning("xlm-roberta", bridge)
    old = swap_text_encoder(pipe, encoder)
    assert type(pipe) is cls
    assert pipe.text_encoder is encoder
    assert pipe.tokenizer is encoder.tokenizer
    after = generate(pipe, negative_prompt="a dog")
    assert after.isfinite().all()
    assert not torch.allclose(after, before, atol=1e-3)
    assert not torch.allclose(after, generate(pipe, "a green bird", negative_prompt="a dog"), atol=1e-4)
    pipe.register_modules(**old)
    assert torch.equal(generate(pipe), before)


@pytest.mark.parametrize(("task", "controlnet", "bridge"), PIPELINES)
def test_swapped_sdxl_runs_with_one_encoder_for_both_slots(task, controlnet, bridge):
    pipe = stable_diffusion_xl(task, controlnet=controlnet)
    cls, before, encoder = type(pipe), generate(pipe), for_sdxl("xlm-roberta", bridge)
    old = swap_text_encoder(pipe, encoder)
    assert type(pipe) is cls
    assert set(old) == {"text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"}
    assert pipe.text_encoder is pipe.tokenizer is None
    assert pipe.text_encoder_2 is encoder
    after = generate(pipe, negative_prompt="a dog")
    assert after.isfinite().all()
    assert not torch.allclose(after, before, atol=1e-3)
    assert not torch.allclose(after, generate(pipe, "a green bird", negative_prompt="a dog"), atol=1e-4)
    pipe.register_modules(**old)
    assert torch.equal(generate(pipe), before)


@pytest.mark.parametrize("slot", ["text_encoder", "text_encoder_2"])
def test_sdxl_slots_can_be_swapped_one_by_one(slot):
    pipe = stable_diffusion_xl()
    pooled = 32 if slot.endswith("2") else None
    encoder = conditioning(width=32, tokens=77, pooled_width=pooled)
    before = embeds(pipe)
    with swapped(pipe, encoder, slot):
        after = embeds(pipe)
    half = slice(0, 32) if slot == "text_encoder" else slice(32, 64)
    kept = slice(32, 64) if slot == "text_encoder" else slice(0, 32)
    assert torch.equal(after[0][..., kept], before[0][..., kept])
    assert not torch.allclose(after[0][..., half], before[0][..., half])
    assert torch.equal(after[2], before[2]) == (slot == "text_encoder")


# What a pipeline offers goes on working


@pytest.mark.parametrize("bridge", BRIDGES)
def test_batches_negative_prompts_clip_skip_slicing_and_callbacks(bridge):
    pipe = stable_diffusion()
    encoder = conditioning(bridge=bridge)
    swap_text_encoder(pipe, encoder)
    positive, negative = embeds(pipe, ["a fox", PROMPTS[-1]], negative_prompt=["", "a dog"])
    assert positive.shape == negative.shape == (2, 12, 32)
    assert torch.equal(embeds(pipe, clip_skip=2)[0], embeds(pipe)[0])
    images = generate(pipe, ["a fox", "a dog"], num_images_per_prompt=2, clip_skip=1)
    assert images.shape == (4, 3, 16, 16)
    plain = generate(pipe)
    pipe.enable_attention_slicing()
    assert torch.allclose(generate(pipe), plain, atol=1e-4)
    seen = []

    def callback(pipe, step, timestep, tensors):
        seen.append(tensors["prompt_embeds"].shape)
        return tensors

    generate(pipe, callback_on_step_end=callback, callback_on_step_end_tensor_inputs=["prompt_embeds"])
    assert seen == [(2, 12, 32)] * 2


def test_sdxl_batches_negative_prompts_and_clip_skip():
    pipe = stable_diffusion_xl()
    swap_text_encoder(pipe, for_sdxl())
    positive, negative, pooled, negative_pooled = embeds(pipe, ["a fox", PROMPTS[-1]], negative_prompt=["", "a dog"])
    assert positive.shape == negative.shape == (2, 12, 64)
    assert pooled.shape == negative_pooled.shape == (2, 32)
    assert torch.equal(embeds(pipe, clip_skip=2)[0], embeds(pipe)[0])
    assert generate(pipe, ["a fox", "a dog"], num_images_per_prompt=2).shape == (4, 3, 16, 16)


def test_empty_prompt_is_the_same_as_the_null_of_guidance():
    pipe = stable_diffusion()
    swap_text_encoder(pipe, conditioning())
    positive, negative = embeds(pipe, "")
    assert positive.isfinite().all()
    assert torch.allclose(positive, negative, atol=1e-5)


def test_pipe_to_moves_the_encoder_with_the_rest():
    pipe = stable_diffusion_xl()
    encoder = for_sdxl()
    swap_text_encoder(pipe, encoder)
    pipe.to(torch.bfloat16)
    assert encoder.dtype == torch.bfloat16
    assert embeds(pipe)[0].dtype == torch.bfloat16
    assert generate(pipe).isfinite().all()


def test_a_swap_into_an_offloaded_pipeline_is_refused_because_hooks_would_be_lost():
    pipe = stable_diffusion()
    pipe.enable_sequential_cpu_offload(device="cpu")
    before = snapshot(pipe)
    with pytest.raises(ValueError, match=r"the UNet is offloaded.*remove_all_hooks"):
        swap_text_encoder(pipe, conditioning())
    assert snapshot(pipe) == before
    pipe.remove_all_hooks()
    swap_text_encoder(pipe, conditioning())
    assert generate(pipe).isfinite().all()


@pytest.mark.parametrize("make", [stable_diffusion, stable_diffusion_xl])
def test_from_pipe_keeps_the_encoder(make):
    pipe = make()
    swap_text_encoder(pipe, conditioning() if make is stable_diffusion else for_sdxl())
    slot = "text_encoder" if make is stable_diffusion else "text_encoder_2"
    other = getattr(diffusers, type(pipe).__name__.replace("Pipeline", "Img2ImgPipeline")).from_pipe(pipe)
    assert getattr(other, slot) is getattr(pipe, slot)
    assert torch.equal(embeds(other)[0], embeds(pipe)[0])
    other.set_progress_bar_config(disable=True)
    assert generate(other).isfinite().all()


@pytest.mark.parametrize("bridge", BRIDGES)
def test_lora_files_load_and_unload(bridge, tmp_path):
    pipe, encoder = stable_diffusion(), conditioning(bridge=bridge)
    swap_text_encoder(pipe, encoder)
    before = embeds(pipe)[0]
    trained = copy.deepcopy(encoder)
    config = LoraConfig(r=2, init_lora_weights=False, target_modules=["q_proj", "out_proj", "query", "value"])
    trained.add_adapter(config)
    state = get_peft_model_state_dict(trained)
    assert any("backbone" in name for name in state)
    type(pipe).save_lora_weights(
        tmp_path, text_encoder_lora_layers=state, text_encoder_lora_adapter_metadata=config.to_dict()
    )
    pipe.load_lora_weights(tmp_path, adapter_name="style")
    with torch.no_grad():
        expected = trained(torch.tensor(encoder.tokenizer(["a red fox"], padding="max_length").input_ids))[0]
    assert not torch.allclose(embeds(pipe)[0], before, atol=1e-3)
    assert torch.allclose(embeds(pipe)[0], expected, atol=1e-5)
    assert torch.allclose(embeds(pipe, lora_scale=0.0)[0], before, atol=1e-5)
    pipe.unload_lora_weights()
    assert torch.equal(embeds(pipe)[0], before)


def test_textual_inversion_is_learned_and_saved(tmp_path):
    pipe, encoder = stable_diffusion(), conditioning(bridge="linear")
    swap_text_encoder(pipe, encoder)
    save_file({"<cat-toy>": torch.randn(2, 32)}, tmp_path / "learned.safetensors")
    pipe.load_textual_inversion(tmp_path / "learned.safetensors", token="<cat-toy>")
    rows = len(encoder.get_input_embeddings().weight)
    assert rows == len(pipe.tokenizer) == encoder.config.text_config.vocab_size
    assert torch.equal(
        encoder.get_input_embeddings().weight[-2:], load_file(tmp_path / "learned.safetensors")["<cat-toy>"]
    )
    learned = embeds(pipe, "a <cat-toy>")[0]
    assert not torch.allclose(learned, embeds(pipe, "a cat")[0], atol=1e-3)
    pipe.save_pretrained(tmp_path / "pipe")
    loaded = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "pipe")
    assert torch.equal(embeds(loaded, "a <cat-toy>")[0], learned)


def test_compel_weighs_prompts():
    compel = pytest.importorskip("compel")
    pipe = stable_diffusion()
    swap_text_encoder(pipe, conditioning(bridge="linear", tokens=32))
    weigh = compel.CompelForSD(pipe)
    plain, weighted = weigh("a red fox", "a dog"), weigh("a (red)1.6 fox", "a dog")
    assert torch.allclose(plain.embeds, embeds(pipe)[0], atol=1e-5)
    assert not torch.allclose(plain.embeds, weighted.embeds, atol=1e-3)
    images = generate(pipe, None, prompt_embeds=weighted.embeds, negative_prompt_embeds=weighted.negative_embeds)
    assert images.isfinite().all()


def test_compel_weighs_prompts_for_sdxl_with_two_encoders_and_with_one():
    compel = pytest.importorskip("compel")
    pipe = stable_diffusion_xl()
    swap_text_encoder(pipe, conditioning(bridge="linear", tokens=77), "text_encoder")
    swap_text_encoder(pipe, conditioning(bridge="linear", tokens=77, pooled_width=32), "text_encoder_2")
    weigh = compel.CompelForSDXL(pipe)
    plain, weighted = weigh("a fox"), weigh("a (fox)1.6")
    assert torch.allclose(plain.embeds, embeds(pipe, "a fox")[0], atol=1e-5)
    assert torch.allclose(plain.pooled_embeds, embeds(pipe, "a fox")[2], atol=1e-5)
    assert not torch.allclose(plain.embeds, weighted.embeds, atol=1e-3)
    swap_text_encoder(pipe, for_sdxl(bridge="linear"))
    weigh = compel.Compel(
        tokenizer=pipe.tokenizer_2,
        text_encoder=pipe.text_encoder_2,
        returned_embeddings_type=compel.ReturnedEmbeddingsType.PENULTIMATE_HIDDEN_STATES_NON_NORMALIZED,
        requires_pooled=True,
    )
    tokens, pooled = weigh("a fox")
    assert torch.allclose(tokens, embeds(pipe, "a fox")[0], atol=1e-5)
    assert torch.allclose(pooled, embeds(pipe, "a fox")[2], atol=1e-5)


# Saved pipelines


LOAD = """
import sys, numpy, torch, diffusers
import textcond
sys.path.insert(0, sys.argv[1])
from tiny import generate
for folder in sys.argv[2:]:
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    with torch.no_grad():
        embeds = pipe.encode_prompt(
            "a red fox", device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True
        )
    numpy.savez(folder + ".npz", image=generate(pipe).numpy(), embeds=embeds[0].numpy(), name=type(pipe).__name__)
"""


def test_saved_pipelines_load_in_a_fresh_process_and_give_equal_pictures(request, tmp_path):
    pipes = {
        "sd": (stable_diffusion(), conditioning("xlm-roberta"), None),
        "sd-linear": (stable_diffusion(), conditioning("mistral", "linear"), None),
        "sd-controlnet": (stable_diffusion(controlnet=True), conditioning("t5"), None),
        "sdxl": (stable_diffusion_xl(), for_sdxl("bert"), None),
        "sdxl-slot": (stable_diffusion_xl(), conditioning("clip", tokens=77, pooled_width=32), "text_encoder_2"),
    }
    for name, (pipe, encoder, slot) in pipes.items():
        swap_text_encoder(pipe, encoder, slot)
        pipe.save_pretrained(tmp_path / name)
    index = json.loads((tmp_path / "sd" / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionPipeline"
    assert index["text_encoder"] == ["textcond", "ConditioningEncoder"]
    index = json.loads((tmp_path / "sdxl" / "model_index.json").read_text())
    assert index["text_encoder"] == [None, None]
    assert index["text_encoder_2"] == ["textcond", "ConditioningEncoderWithProjection"]
    folders = [str(tmp_path / name) for name in pipes]
    subprocess.run([sys.executable, "-c", LOAD, str(request.path.parent), *folders], check=True, cwd=tmp_path)
    for name, (pipe, _, _) in pipes.items():
        loaded = np.load(tmp_path / f"{name}.npz")
        assert str(loaded["name"]) == type(pipe).__name__
        # Equal weights in memory of another alignment may sum in another order.
        assert np.abs(loaded["embeds"] - embeds(pipe)[0].numpy()).max() < 1e-6
        assert np.abs(loaded["image"] - generate(pipe).numpy()).max() < 1e-5


def test_a_loaded_pipeline_can_be_searched_and_keeps_one_dtype(tmp_path):
    pipe, encoder = stable_diffusion(), conditioning("xlm-roberta")
    vectors = encoder.text_encoder.encode(PROMPTS)
    swap_text_encoder(pipe, encoder)
    pipe.to(torch.bfloat16).save_pretrained(tmp_path)
    loaded = diffusers.DiffusionPipeline.from_pretrained(tmp_path)
    assert loaded.text_encoder.dtype == loaded.unet.dtype == torch.float32
    loaded.set_progress_bar_config(disable=True)
    assert generate(loaded).isfinite().all()
    assert np.abs(retrieval_encoder(loaded).encode(PROMPTS) - vectors).max() < 0.05
    halved = diffusers.DiffusionPipeline.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert halved.text_encoder.dtype == halved.unet.dtype == torch.bfloat16


# Swapping itself


@pytest.mark.parametrize("make", [stable_diffusion, stable_diffusion_xl])
def test_swapped_restores_even_after_an_exception(make):
    pipe = make()
    before, picture = snapshot(pipe), generate(pipe)
    encoder = conditioning() if make is stable_diffusion else for_sdxl()

    def stop_halfway():
        with swapped(pipe, encoder) as inside:
            assert inside is pipe
            assert snapshot(pipe) != before
            raise RuntimeError("halfway")

    with pytest.raises(RuntimeError, match="halfway"):
        stop_halfway()
    assert snapshot(pipe) == before
    assert torch.equal(generate(pipe), picture)


def spoil(attribute, value):
    def change(encoder):
        setattr(encoder.tokenizer, attribute, value)
        return encoder

    return change


@pytest.mark.parametrize(
    ("encoder", "message"),
    [
        (lambda: conditioning(width=24), "24-wide tokens, the UNet expects 32"),
        (lambda: conditioning(pooled_width=8), "use ConditioningEncoder"),
        (lambda: conditioning("roberta", tokens=129), "negative prompts"),
        (lambda: conditioning().to(torch.float16), r"encoder.to\(torch.float32\)"),
        (lambda: conditioning().to("meta"), r'encoder.to\("cpu"\)'),
        (lambda: spoil("pad_token", None)(conditioning()), "no pad token"),
        (lambda: text_encoder(), "wrap it with ConditioningEncoder.from_text_encoder"),
        (lambda: backbone("bert")[0], "BertModel lacks the call surface"),
        (lambda: clip_text_model(tokenizer("clip"), 48), "48-wide tokens"),
    ],
)
def test_a_misfit_is_reported_with_its_mend_and_changes_nothing(encoder, message):
    pipe, misfit = stable_diffusion(), encoder()
    before = snapshot(pipe)
    with pytest.raises(ValueError, match=message):
        swap_text_encoder(pipe, misfit)
    assert snapshot(pipe) == before


def test_sdxl_misfits_change_nothing():
    pipe = stable_diffusion_xl()
    before = snapshot(pipe)
    for encoder, slot, message in (
        (conditioning(width=64), None, "no pooled vector"),
        (conditioning(width=64, pooled_width=8), None, "8-wide pooled vector, the UNet expects 32"),
        (conditioning(width=64, tokens=77), "text_encoder", "64-wide tokens, the UNet expects 32"),
        (conditioning(tokens=12), "text_encoder", "12 tokens and text_encoder_2 77"),
    ):
        with pytest.raises(ValueError, match=message):
            swap_text_encoder(pipe, encoder, slot)
        assert snapshot(pipe) == before


def test_unknown_slots_and_unsupported_pipelines():
    with pytest.raises(ValueError, match=r"no slot 'text_encoder_2': choose one of text_encoder"):
        swap_text_encoder(stable_diffusion(), conditioning(), "text_encoder_2")
    pipe = diffusers.DDPMPipeline(unet=stable_diffusion().unet, scheduler=diffusers.DDPMScheduler())
    with pytest.raises(ValueError, match="DDPMPipeline is not supported yet"):
        swap_text_encoder(pipe, conditioning())


def test_a_folder_is_loaded_with_the_dtype_of_the_unet(tmp_path):
    encoder = conditioning()
    encoder.save_pretrained(tmp_path / "encoder")
    pipe = stable_diffusion()
    swap_text_encoder(pipe, tmp_path / "encoder")
    assert type(pipe.text_encoder) is ConditioningEncoder
    assert pipe.tokenizer is pipe.text_encoder.tokenizer
    pipe = stable_diffusion().to(torch.bfloat16)
    swap_text_encoder(pipe, str(tmp_path / "encoder"))
    assert pipe.text_encoder.dtype == torch.bfloat16
    for_sdxl().save_pretrained(tmp_path / "xl")
    pipe = stable_diffusion_xl()
    swap_text_encoder(pipe, tmp_path / "xl")
    assert generate(pipe).isfinite().all()


def test_a_folder_of_another_model_is_refused(tmp_path):
    backbone("bert")[0].save_pretrained(tmp_path / "bert")
    with pytest.raises(ValueError, match=r"holds a BertModel: wrap it"):
        swap_text_encoder(stable_diffusion(), tmp_path / "bert")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        swap_text_encoder(stable_diffusion(), tmp_path / "nowhere")
    stable_diffusion().save_pretrained(tmp_path / "pipe")
    with pytest.raises(ValueError, match="whole pipeline: pass its text_encoder folder"):
        swap_text_encoder(stable_diffusion(), tmp_path / "pipe")
    conditioning().save_pretrained(tmp_path / "cut")
    weights = (tmp_path / "cut" / "model.safetensors").read_bytes()
    (tmp_path / "cut" / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    pipe = stable_diffusion()
    before = snapshot(pipe)
    with pytest.raises(ValueError, match="damaged or cut short"):
        swap_text_encoder(pipe, tmp_path / "cut")
    assert snapshot(pipe) == before


def test_a_stock_clip_encoder_takes_the_tokenizer_of_the_slot_or_the_one_passed():
    pipe = stable_diffusion()
    old_tokenizer = pipe.tokenizer
    torch.manual_seed(1)
    other = clip_text_model(old_tokenizer)
    before = generate(pipe)
    old = swap_text_encoder(pipe, other)
    assert pipe.tokenizer is old_tokenizer
    assert not torch.allclose(generate(pipe), before, atol=1e-4)
    pipe.register_modules(**old)
    tok = tokenizer("clip", 40)
    with swapped(pipe, other, tokenizer=tok):
        assert pipe.tokenizer is tok
        assert embeds(pipe)[0].shape[1] == 40


# Retrieval with what conditions the pipeline


def test_retrieval_encoder_shares_the_weights_of_the_swapped_encoder():
    for pipe, encoder in ((stable_diffusion(), conditioning()), (stable_diffusion_xl(), for_sdxl())):
        swap_text_encoder(pipe, encoder)
        face = retrieval_encoder(pipe)
        assert face.backbone is encoder.backbone
        assert np.array_equal(face.encode(PROMPTS), encoder.text_encoder.encode(PROMPTS))
        assert face.weights_hash() == encoder.text_encoder.weights_hash()


def test_retrieval_encoder_pools_a_stock_clip_encoder_at_its_end_token():
    pipe = stable_diffusion()
    face = retrieval_encoder(pipe)
    assert face.backbone is pipe.text_encoder
    inputs = pipe.tokenizer(["a red fox", ""], padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = pipe.text_encoder(**inputs).pooler_output
    expected = torch.nn.functional.normalize(expected, dim=-1)
    assert np.abs(face.encode(["a red fox", ""]) - expected.numpy()).max() < 1e-5


def test_retrieval_encoder_of_stock_sdxl_gives_the_projected_vector():
    pipe = stable_diffusion_xl()
    inputs = pipe.tokenizer_2(["a red fox", ""], padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = torch.nn.functional.normalize(pipe.text_encoder_2(**inputs).text_embeds, dim=-1)
    assert np.abs(retrieval_encoder(pipe).encode(["a red fox", ""]) - expected.numpy()).max() < 1e-5


def test_retrieval_encoder_of_an_empty_slot_says_so():
    pipe = stable_diffusion()
    pipe.register_modules(text_encoder=None)
    with pytest.raises(ValueError, match="swap in a ConditioningEncoder"):
        retrieval_encoder(pipe)


def test_an_encoder_without_tokenizer_borrows_the_one_of_its_pipeline(tmp_path):
    pipe, encoder = stable_diffusion(), conditioning()
    vectors = encoder.text_encoder.encode(PROMPTS)
    swap_text_encoder(pipe, encoder)
    encoder.tokenizer = None
    pipe.save_pretrained(tmp_path)
    loaded = diffusers.DiffusionPipeline.from_pretrained(tmp_path)
    assert loaded.text_encoder.tokenizer is None
    face = retrieval_encoder(loaded)
    assert isinstance(face, TextEncoder)
    assert np.array_equal(face.encode(PROMPTS), vectors)
