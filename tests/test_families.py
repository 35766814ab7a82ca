import json
import subprocess
import sys
from functools import partial

import diffusers
import numpy as np
import pytest
import torch
from tiny import conditioning, stable_diffusion, stable_diffusion_xl, text_encoder
from tiny_families import PIPELINES, call_options, flux, generate, pixart, refiner, sana, stable_diffusion_3

from textcond import ConditioningEncoder, ConditioningEncoderWithProjection
from textcond.pipelines import inspect_pipeline, retrieval_encoder, swap_text_encoder
from textcond.pipelines.families import FAMILIES, condition, denoiser_of, family_of
from textcond.pipelines.swap import make_encoder
from textcond.pipelines.trajectories import follow, replay

PROMPTS = ["a red fox in winter", "the dog"]
SLOTS = [
    ("sd2", None),
    ("refiner", None),
    ("sd3", "text_encoder"),
    ("sd3", "text_encoder_2"),
    ("sd3", "text_encoder_3"),
    ("flux", "text_encoder"),
    ("flux", "text_encoder_2"),
    *((name, None) for name in PIPELINES if name not in ("sd2", "refiner")),
]


pixart_sigma = PIPELINES["pixart-sigma"]


def problems(pipe):
    return [problem for contract in inspect_pipeline(pipe) for problem in contract.problems]


def fitted(pipe, slot=None, **options):
    """An untrained encoder for a slot, in it."""
    encoder = make_encoder(pipe, text_encoder("t5"), slot=slot, bridge_depth=1, **options)
    return encoder, swap_text_encoder(pipe, encoder, slot)


def distance(output, recorded):
    """Largest difference, by what one step of float32 makes of outputs above 1."""
    return ((output - recorded).abs().max() / recorded.abs().max().clamp(min=1)).item()


ALL = PIPELINES | {
    "sd": stable_diffusion,
    "sd-controlnet": partial(stable_diffusion, controlnet=True),
    "sdxl": stable_diffusion_xl,
    "sdxl-img2img": partial(stable_diffusion_xl, "Img2Img"),
}


@pytest.mark.parametrize("name", ALL)
def test_the_conditioning_is_what_the_pipeline_itself_gives_its_denoiser(name):
    pipe = ALL[name]()
    visits = follow(pipe, PROMPTS, **call_options(pipe))
    given = condition(pipe, PROMPTS)
    assert all(len(tensor) == 2 for tensor in given.values())
    assert any(tensor.requires_grad for tensor in given.values())
    other = condition(pipe, ["a green bird", "nothing"])
    for visit in visits:
        assert distance(replay(denoiser_of(pipe), visit, given), visit.output) < 1e-5
        assert distance(replay(denoiser_of(pipe), visit, other), visit.output) > 1e-4
        one = replay(denoiser_of(pipe), visit, {key: tensor[[1]] for key, tensor in given.items()}, torch.tensor([1]))
        assert distance(one, visit.output[1:]) < 1e-5
        # Flux has guidance distilled into it, and asks nothing of the empty prompt.
        assert (visit.unconditional is None) == ("flux" in name)


@pytest.mark.parametrize(("name", "slot"), SLOTS)
def test_an_encoder_made_for_a_slot_runs_in_the_unmodified_pipeline(name, slot):
    pipe = PIPELINES[name]()
    assert problems(pipe) == []
    cls, before = type(pipe), generate(pipe)
    encoder, old = fitted(pipe, slot)
    assert type(pipe) is cls
    assert problems(pipe) == []
    one = generate(pipe)
    assert one.shape == before.shape
    assert one.isfinite().all()
    assert not torch.allclose(one, before, atol=1e-5)
    assert not torch.allclose(one, generate(pipe, "a green bird"), atol=1e-5)
    visit = follow(pipe, PROMPTS, **call_options(pipe))[-1]
    given = condition(pipe, PROMPTS)
    assert distance(replay(denoiser_of(pipe), visit, given), visit.output) < 1e-5
    (gradient,) = torch.autograd.grad(
        sum(tensor.square().sum() for tensor in given.values() if tensor.requires_grad),
        [(encoder.pooled_bridge if name == "flux" and slot == "text_encoder" else encoder.bridge).out_proj.weight],
    )
    assert gradient.abs().max() > 0
    pipe.register_modules(**old)
    assert torch.equal(generate(pipe), before)


@pytest.mark.parametrize(
    "name", ["sd2", "refiner", "sd3", "sd3-img2img", "flux", "flux-img2img", "pixart-alpha", "sana"]
)
def test_batches_negative_prompts_and_several_pictures_a_prompt(name):
    pipe = PIPELINES[name]()
    fitted(pipe)
    true_guidance = {"true_cfg_scale": 3.0} if "flux" in name else {}
    pictures = generate(pipe, PROMPTS, num_images_per_prompt=2, negative_prompt=["", "a dog"], **true_guidance)
    assert pictures.shape[0] == 4
    assert pictures.isfinite().all()
    plain, negative = generate(pipe, **true_guidance), generate(pipe, negative_prompt="a cat", **true_guidance)
    assert not torch.allclose(plain, negative, atol=1e-5)


LOAD = """
import sys, numpy, diffusers, textcond
sys.path.insert(0, sys.argv[1])
from tiny_families import generate
for folder in sys.argv[2:]:
    empty = {"text_encoder_3": None, "tokenizer_3": None} if folder.endswith("sd3") else {}
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder, **empty)
    pipe.set_progress_bar_config(disable=True)
    numpy.savez(folder + ".npz", image=generate(pipe).numpy(), name=type(pipe).__name__)
"""


def test_saved_pipelines_load_in_a_fresh_process_and_give_equal_pictures(request, tmp_path):
    cases = {
        "sd2": ("sd2", None),
        "sd3": ("sd3-img2img", None),
        "sd3-slot": ("sd3", "text_encoder_3"),
        "flux": ("flux", None),
        "flux-slot": ("flux-inpaint", "text_encoder_2"),
        "pixart": ("pixart-alpha", None),
        "sana": ("sana", None),
    }
    pipes = {folder: PIPELINES[name]() for folder, (name, _) in cases.items()}
    pipes["refiner"], cases["refiner"] = refiner(), ("refiner", None)
    for folder, pipe in pipes.items():
        fitted(pipe, cases[folder][1])
        pipe.save_pretrained(tmp_path / folder)
    index = json.loads((tmp_path / "sd3" / "model_index.json").read_text())
    assert index["text_encoder"] == index["text_encoder_2"] == ["textcond", "ConditioningEncoderWithProjection"]
    assert index["text_encoder_3"] == [None, None]
    folders = [str(tmp_path / folder) for folder in pipes]
    subprocess.run([sys.executable, "-c", LOAD, str(request.path.parent), *folders], check=True, cwd=tmp_path)
    for folder, pipe in pipes.items():
        loaded = np.load(tmp_path / f"{folder}.npz")
        assert str(loaded["name"]) == type(pipe).__name__
        assert np.abs(loaded["image"] - generate(pipe).numpy()).max() < 1e-5


# What each slot expects


def expects(pipe):
    return {c.slot: (c.needs, c.token_width, c.pooled_width, c.tokens, c.keeps_length) for c in inspect_pipeline(pipe)}


def test_contracts_of_the_families():
    plain, projecting = "ConditioningEncoder", "ConditioningEncoderWithProjection"
    assert expects(stable_diffusion()) == {"text_encoder": (plain, 32, None, 77, False)}
    assert expects(stable_diffusion_xl()) == {
        "text_encoder": (plain, 32, None, 77, False),
        "text_encoder_2": (projecting, 32, 32, 77, False),
    }
    assert expects(refiner())["text_encoder_2"] == (projecting, 64, 48, 77, False)
    assert expects(stable_diffusion_3()) == {
        "text_encoder": (projecting, 12, 24, 77, False),
        "text_encoder_2": (projecting, 16, 24, 77, False),
        "text_encoder_3": (plain, 32, None, 256, False),
    }
    assert expects(flux()) == {
        "text_encoder": (plain, None, 24, 77, False),
        "text_encoder_2": (plain, 32, None, 512, False),
    }
    assert expects(pixart()) == {"text_encoder": (plain, 32, None, 120, True)}
    assert expects(pixart("Sigma")) == {"text_encoder": (plain, 32, None, 300, True)}
    assert expects(sana()) == {"text_encoder": (plain, 32, None, 300, True)}


def test_a_printed_contract_of_a_slot_that_gives_only_a_pooled_vector():
    first, second = map(str, inspect_pipeline(flux()))
    assert "expects a 24-wide pooled vector: a ConditioningEncoder\n  reads pooler_output" in first
    assert "expects 32-wide tokens: a ConditioningEncoder" in second


def test_one_encoder_serves_all_slots_of_sd3_and_flux():
    pipe = stable_diffusion_3()
    encoder, old = fitted(pipe)
    assert type(encoder) is ConditioningEncoderWithProjection
    assert pipe.text_encoder is pipe.text_encoder_2 is encoder
    assert pipe.text_encoder_3 is None
    assert set(old) == {f"{part}{end}" for part in ("text_encoder", "tokenizer") for end in ("", "_2", "_3")}
    given = condition(pipe, PROMPTS)
    assert torch.equal(given["encoder_hidden_states"][:, :77, :16], given["encoder_hidden_states"][:, :77, 16:])
    assert given["encoder_hidden_states"][:, 77:].abs().max() == 0
    assert given["pooled_projections"].shape == (2, 48)
    assert retrieval_encoder(pipe).backbone is encoder.backbone
    pipe = flux()
    encoder, _ = fitted(pipe)
    assert type(encoder) is ConditioningEncoder
    assert pipe.text_encoder is pipe.text_encoder_2 is encoder
    assert (encoder.config.hidden_size, encoder.config.projection_dim, encoder.config.tokens) == (32, 24, 512)


def test_a_swapped_slot_of_sd3_leaves_what_the_others_give():
    pipe = stable_diffusion_3()
    before = condition(pipe, PROMPTS)
    _, old = fitted(pipe, "text_encoder")
    after = condition(pipe, PROMPTS)
    tokens, pooled = "encoder_hidden_states", "pooled_projections"
    assert torch.equal(after[tokens][:, :77, 12:], before[tokens][:, :77, 12:])
    assert torch.equal(after[tokens][:, 77:], before[tokens][:, 77:])
    assert not torch.allclose(after[tokens][:, :77, :12], before[tokens][:, :77, :12])
    assert torch.equal(after[pooled][:, 24:], before[pooled][:, 24:])
    assert not torch.allclose(after[pooled][:, :24], before[pooled][:, :24])
    pipe.register_modules(**old)
    fitted(pipe, "text_encoder_3")
    after = condition(pipe, PROMPTS)
    assert torch.equal(after[tokens][:, :77], before[tokens][:, :77])
    assert torch.equal(after[pooled], before[pooled])


def test_flux_takes_another_number_of_tokens():
    pipe = flux()
    visit = follow(pipe, PROMPTS, **call_options(pipe))[0]
    fitted(pipe, tokens=20)
    assert condition(pipe, PROMPTS)["encoder_hidden_states"].shape == (2, 20, 32)
    assert replay(denoiser_of(pipe), visit, condition(pipe, PROMPTS)).shape == visit.output.shape
    assert generate(pipe).isfinite().all()


def test_a_bridge_that_keeps_the_length_where_the_mask_goes_to_the_denoiser():
    pipe = pixart()
    assert make_encoder(pipe, text_encoder("t5")).config.bridge == "mlp"
    assert make_encoder(pipe, text_encoder("t5"), bridge="linear").config.bridge == "linear"
    with pytest.raises(ValueError, match="tokens=10: a PixArtAlphaPipeline says itself"):
        make_encoder(pipe, text_encoder("t5"), tokens=10)
    with pytest.raises(ValueError, match=r'gives 12 tokens whatever the length of the text.*bridge="mlp"'):
        swap_text_encoder(pipe, conditioning())


@pytest.mark.parametrize(
    ("make", "slot", "encoder", "message"),
    [
        (pixart, None, {"bridge": "mlp", "width": 24}, "24-wide tokens, the transformer expects 32"),
        (
            pixart_sigma,
            None,
            {"family": "bert", "bridge": "mlp"},
            "pads prompts to 300 tokens, text_encoder has positions",
        ),
        (sana, None, {"family": "bert", "bridge": "mlp"}, "pads prompts to 1191 tokens, text_encoder has positions"),
        (stable_diffusion_3, "text_encoder", {"width": 12}, "no pooled vector, the transformer expects 24"),
        (stable_diffusion_3, "text_encoder", {"width": 20, "pooled_width": 24}, "20-wide tokens, the transformer exp"),
        (stable_diffusion_3, "text_encoder_3", {"pooled_width": 24}, "returns its pooled vector first"),
        (stable_diffusion_3, "text_encoder_2", {"width": 16, "pooled_width": 24}, "joined token by token"),
        (flux, "text_encoder", {}, "no pooled vector, the transformer expects 24"),
        (
            flux,
            "text_encoder_2",
            {"family": "bert"},
            "pads prompts to 512 tokens, text_encoder_2 has positions for 130",
        ),
    ],
)
def test_a_misfit_is_reported_and_changes_nothing(make, slot, encoder, message):
    pipe = make()
    before = {name: id(part) for name, part in pipe.components.items()}
    with pytest.raises(ValueError, match=message):
        swap_text_encoder(pipe, conditioning(**{"family": "t5", **encoder}), slot)
    assert {name: id(part) for name, part in pipe.components.items()} == before


def test_a_first_tokenizer_that_would_change_the_length_when_loaded():
    pipe = flux()
    encoder = make_encoder(pipe, text_encoder("t5"))
    encoder.tokenizer.model_max_length = 60
    with pytest.raises(ValueError, match=r"set tokenizer.model_max_length = 77"):
        swap_text_encoder(pipe, encoder)


def test_no_room_beside_the_other_slots():
    with pytest.raises(ValueError, match="leave slot='text_encoder' out"):
        make_encoder(refiner(), text_encoder(), slot="text_encoder")
    with pytest.raises(ValueError, match="no slot 'text_encoder_2'"):
        make_encoder(stable_diffusion(), text_encoder(), slot="text_encoder_2")


def test_slots_that_may_be_empty_and_slots_that_may_not():
    assert problems(stable_diffusion_3(t5=False)) == []
    pipe = stable_diffusion_3()
    pipe.register_modules(text_encoder_2=None)
    assert problems(pipe) == ["text_encoder_2 is empty: swap in an encoder"]
    fitted(pipe, "text_encoder_2", tokens=77)
    assert problems(pipe) == []


def test_a_controlnet_of_another_width():
    pipe = PIPELINES["sd3-controlnet"]()
    pipe.controlnet = diffusers.SD3ControlNetModel(**pipe.controlnet.config | {"joint_attention_dim": 40})
    assert "the ControlNet reads 40-wide tokens, the transformer 32" in problems(pipe)[0]


@pytest.mark.parametrize(
    ("cls", "reason"),
    [
        (diffusers.Flux2Pipeline, r"chat template.*hidden_states\[10\], \[20\] and \[30\]"),
        (diffusers.HunyuanDiTPipeline, "padding for exactly the lengths"),
        (
            diffusers.AuraFlowPipeline,
            "not supported yet: supported are Stable Diffusion 1.x and 2.x, .*Flux, PixArt, Sana",
        ),
    ],
)
def test_a_pipeline_that_cannot_take_another_encoder_says_why(cls, reason):
    parts = dict.fromkeys(cls._get_signature_keys(cls)[0])
    if cls is diffusers.HunyuanDiTPipeline:
        parts["requires_safety_checker"] = False
    pipe = cls(**parts)
    contracts = inspect_pipeline(pipe)
    assert contracts[0].slot == "text_encoder"
    with pytest.raises(ValueError, match=reason):
        swap_text_encoder(pipe, conditioning())
    with pytest.raises(ValueError, match=reason):
        raise ValueError(contracts[0].problems[0])


def test_every_class_belongs_to_one_family():
    classes = [cls for family in FAMILIES for cls in family.pipelines]
    assert len(set(classes)) == len(classes)
    assert family_of(PIPELINES["flux-kontext"]()).name == "Flux"
