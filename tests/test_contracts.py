import diffusers
import pytest
import torch
from tiny import conditioning, stable_diffusion, stable_diffusion_xl, text_encoder

from textcond import ConditioningEncoder
from textcond.pipelines import inspect_pipeline
from textcond.pipelines.contracts import check_components

TASKS = ["", "Img2Img", "Inpaint"]


@pytest.mark.parametrize("controlnet", [False, True])
@pytest.mark.parametrize("task", TASKS)
def test_stock_stable_diffusion_meets_its_own_contract(task, controlnet):
    (contract,) = inspect_pipeline(stable_diffusion(task, controlnet=controlnet))
    assert (contract.slot, contract.encoder) == ("text_encoder", "CLIPTextModel")
    assert (contract.token_width, contract.pooled_width) == (32, None)
    assert contract.problems == []


@pytest.mark.parametrize("controlnet", [False, True])
@pytest.mark.parametrize("task", TASKS)
def test_stock_sdxl_meets_its_own_contract(task, controlnet):
    first, second = inspect_pipeline(stable_diffusion_xl(task, controlnet=controlnet))
    assert (first.slot, first.encoder) == ("text_encoder", "CLIPTextModel")
    assert (first.token_width, first.pooled_width) == (32, None)
    assert (second.slot, second.encoder) == ("text_encoder_2", "CLIPTextModelWithProjection")
    assert (second.token_width, second.pooled_width) == (32, 32)
    assert first.problems == second.problems == []


def test_refiner_has_one_encoder_and_one_time_id_fewer():
    base = stable_diffusion_xl("Img2Img", pooled=40)
    refiner = diffusers.StableDiffusionXLImg2ImgPipeline(
        **{**base.components, "text_encoder": None, "tokenizer": None},
        requires_aesthetics_score=True,
        add_watermarker=False,
    )
    first, second = inspect_pipeline(refiner)
    assert (first.encoder, first.token_width, first.problems) == ("", None, [])
    assert second.token_width == 64
    assert second.pooled_width == 40 + 8


def test_printed_contract_tells_widths_output_length_mask_and_problems():
    pipe = stable_diffusion_xl()
    pipe.text_encoder_2.to(torch.float16)
    text = "\n".join(map(str, inspect_pipeline(pipe)))
    for part in (
        "text_encoder: CLIPTextModel",
        "text_encoder_2: CLIPTextModelWithProjection",
        "32-wide tokens",
        "32-wide pooled vector",
        "hidden_states[-2]",
        "length: any",
        "mask: never",
        "problem: text_encoder_2 is torch.float16",
    ):
        assert part in text


def test_other_families_say_that_they_are_not_supported():
    pipe = diffusers.DDPMPipeline(unet=stable_diffusion().unet, scheduler=diffusers.DDPMScheduler())
    (contract,) = inspect_pipeline(pipe)
    assert "DDPMPipeline is not supported yet" in contract.problems[0]
    assert "not supported yet" in str(contract)
    sd = stable_diffusion()
    panorama = diffusers.StableDiffusionPanoramaPipeline(
        **sd.components | {"image_encoder": None}, requires_safety_checker=False
    )
    (contract,) = inspect_pipeline(panorama)
    assert (contract.slot, contract.encoder) == ("text_encoder", "CLIPTextModel")
    assert "StableDiffusionPanoramaPipeline is not supported yet" in contract.problems[0]


def test_projected_text_width_is_read_from_the_projection():
    pipe = stable_diffusion()
    pipe.unet = diffusers.UNet2DConditionModel(
        **{**pipe.unet.config, "encoder_hid_dim": 48, "encoder_hid_dim_type": "text_proj"}
    )
    (contract,) = inspect_pipeline(pipe)
    assert contract.token_width == 48
    assert "32-wide tokens, the UNet expects 48" in contract.problems[0]


def problems(pipe, encoder, tokenizer=None, slot="text_encoder"):
    replaced = {slot: encoder, slot.replace("text_encoder", "tokenizer"): tokenizer or encoder.tokenizer}
    return " | ".join(problem for contract in check_components(pipe, replaced) for problem in contract.problems)


@pytest.mark.parametrize("bridge", ["linear", "mlp", "resampler"])
def test_an_encoder_made_to_measure_has_no_problems(bridge):
    assert problems(stable_diffusion(), conditioning(bridge=bridge)) == ""


def test_wrong_token_width_names_both_widths_and_the_bridge():
    assert "gives 24-wide tokens, the UNet expects 32" in problems(stable_diffusion(), conditioning(width=24))
    assert "width=32" in problems(stable_diffusion(), conditioning(width=24))


def test_a_pooled_output_in_a_slot_that_reads_tokens_first():
    found = problems(stable_diffusion(), conditioning(pooled_width=16))
    assert "use ConditioningEncoder in this slot" in found
    found = problems(stable_diffusion_xl(), conditioning(pooled_width=32))
    assert "use ConditioningEncoder in this slot" in found


def test_missing_or_wrong_pooled_vector_in_sdxl():
    pipe = stable_diffusion_xl()
    found = problems(pipe, conditioning(tokens=77), slot="text_encoder_2")
    assert "no pooled vector, the UNet expects 32" in found
    found = problems(pipe, conditioning(tokens=77, pooled_width=20), slot="text_encoder_2")
    assert "20-wide pooled vector, the UNet expects 32" in found
    assert "pooled_width=32" in found


def test_sdxl_slots_of_unequal_length():
    found = problems(stable_diffusion_xl(), conditioning(tokens=12))
    assert "text_encoder gives 12 tokens and text_encoder_2 77" in found
    assert "tokens=77" in found


def test_dtype_and_device_of_encoder_and_unet():
    assert "call encoder.to(torch.float32)" in problems(stable_diffusion(), conditioning().to(torch.bfloat16))
    assert 'call encoder.to("cpu")' in problems(stable_diffusion(), conditioning().to("meta"))


def test_pad_token_missing_ambiguous_or_another():
    pipe, encoder = stable_diffusion(), conditioning()
    for token, message in ((None, "has no pad token"), ("[SEP]", "also begins or ends a text"), ("[UNK]", "token 1")):
        encoder.tokenizer.pad_token = token
        assert message in problems(pipe, encoder)


def test_padding_side_and_vocabulary():
    pipe, encoder = stable_diffusion(), conditioning()
    encoder.tokenizer.padding_side = "left"
    assert 'padding_side = "right"' in problems(pipe, encoder)
    encoder = conditioning()
    encoder.tokenizer.add_tokens(["<cat-toy>"])
    assert "resize_token_embeddings" in problems(pipe, encoder)


def test_length_without_limit_or_beyond_the_positions():
    pipe, encoder = stable_diffusion(), conditioning(bridge="linear")
    encoder.tokenizer.model_max_length = int(1e30)
    assert "model_max_length = 130" in problems(pipe, encoder)
    encoder.tokenizer.model_max_length = 131
    assert "positions for 130" in problems(pipe, encoder)
    encoder.tokenizer.model_max_length = 130
    assert problems(pipe, encoder) == ""


def test_more_output_tokens_than_positions_break_negative_prompts():
    found = problems(stable_diffusion(), conditioning("roberta", tokens=129))
    assert "negative prompts are padded to 129" in found
    assert "tokens=128" in found
    assert problems(stable_diffusion(), conditioning("roberta", tokens=128)) == ""
    assert problems(stable_diffusion(), conditioning("t5", tokens=300)) == ""


def test_controlnet_of_another_width():
    pipe = stable_diffusion(controlnet=True)
    pipe.controlnet = stable_diffusion(width=48, controlnet=True).controlnet
    assert "the ControlNet reads 48-wide tokens, the UNet 32" in problems(pipe, conditioning())
    both = diffusers.MultiControlNetModel([stable_diffusion(controlnet=True).controlnet, pipe.controlnet])
    pipe.controlnet = both
    assert "the ControlNet reads 48-wide tokens" in problems(pipe, conditioning())


def test_a_pipeline_without_unet_cannot_be_checked():
    pipe = stable_diffusion()
    pipe.register_modules(unet=None)
    assert "no UNet" in problems(pipe, conditioning())


def test_layers_of_unequal_width_are_reported():
    pipe = stable_diffusion()
    pipe.unet = diffusers.UNet2DConditionModel(**{**pipe.unet.config, "cross_attention_dim": (32, 48)})
    assert "different widths" in problems(pipe, conditioning())


def test_every_problem_is_reported_at_once():
    encoder = ConditioningEncoder.from_text_encoder(text_encoder(), width=24, tokens=12).to(torch.bfloat16)
    encoder.tokenizer.pad_token = None
    found = problems(stable_diffusion(), encoder)
    assert all(part in found for part in ("24-wide", "bfloat16", "pad token"))
