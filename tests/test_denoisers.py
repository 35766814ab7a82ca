import json
import subprocess
import sys

import diffusers
import numpy as np
import pytest
import torch
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from tiny import conditioning, generate, stable_diffusion, stable_diffusion_xl, text_encoder, token_ids

from textcond.bridges import ResamplerBridge
from textcond.pipelines import TimestepAwareUNet, inspect_pipeline, make_encoder, swap_text_encoder
from textcond.pipelines.denoisers import TimestepResampler
from textcond.pipelines.families import condition, denoiser_of
from textcond.pipelines.trajectories import follow, replay


def states(batch=3, length=9, width=48):
    return torch.randn(batch, length, width, generator=torch.Generator().manual_seed(1)) * 5 + 2


def connector(trained=True, tokens=7, depth=2):
    torch.manual_seed(0)
    made = TimestepResampler(48, 64, tokens, depth)
    return train(made) if trained else made


@torch.no_grad()
def train(module):
    """Give the weights that start at zero the sizes that training gives them."""
    for name, parameter in module.named_parameters():
        if "modulation" in name or "time_queries" in name:
            torch.nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(2))
    return module.eval()


def aware(pipe=None, encoder_width=32, trained=True, bridge="identity"):
    """A stock pipeline whose UNet has a connector, and whose encoder gives it the states of a backbone."""
    pipe = pipe or stable_diffusion()
    pipe.unet = TimestepAwareUNet.from_unet(pipe.unet, encoder_width, tokens=6, depth=2)
    if trained:
        train(pipe.unet.connector)
    swap_text_encoder(pipe, conditioning(bridge=bridge, tokens=40))
    return pipe


# The connector


def test_untrained_connector_is_a_plain_resampler_at_every_timestep():
    bridge, made = ResamplerBridge(48, 64, 7, 2), connector(trained=False)
    missing, unexpected = made.load_state_dict(bridge.state_dict(), strict=False)
    assert unexpected == []
    assert all("time" in name or "modulation" in name for name in missing)
    expected = bridge(states(), torch.ones(3, 9, dtype=torch.bool))
    assert torch.equal(made(states()), expected)
    for timestep in (0, 501.5, torch.tensor([1, 500, 999])):
        assert torch.allclose(made(states(), timestep), expected, atol=1e-5)


def test_trained_connector_reads_a_text_anew_at_each_timestep():
    made = connector()
    early, late = made(states(), 981), made(states(), torch.tensor(1))
    assert (early - late).std() > 0.1
    mixed = made(states(), torch.tensor([981, 1, 981]))
    assert torch.allclose(mixed, torch.stack([early[0], late[1], early[2]]), atol=1e-5)


def test_states_of_zeros_are_padding_whatever_their_number():
    made = connector()
    padded = torch.cat([states(), torch.zeros(3, 30, 48)], dim=1)
    assert torch.allclose(made(padded, 10), made(states(), 10), atol=1e-5)
    padded.requires_grad_()
    made(padded, 10).sum().backward()
    assert padded.grad[:, 9:].abs().max() == 0
    assert padded.grad[:, :9].abs().min() > 0


def test_a_text_of_zeros_stays_one_as_sdxl_means_no_prompt_by_it():
    made = connector()
    texts = torch.cat([torch.zeros(1, 9, 48), states()])
    assert made(texts, 10)[0].abs().max() == 0
    assert torch.allclose(made(texts, 10)[1:], made(states(), 10), atol=1e-5)


def test_every_weight_of_a_trained_connector_learns_from_a_loss_at_a_timestep():
    made = connector()
    (made(states(), 300) ** 3).sum().backward()
    assert [name for name, parameter in made.named_parameters() if not parameter.grad.abs().sum() > 0] == []


# The UNet


def test_the_stock_unet_and_the_aware_one_share_their_weights_and_agree():
    stock = stable_diffusion().unet
    unet = TimestepAwareUNet.from_unet(stock, 48, tokens=6, depth=2)
    train(unet.connector)
    shared = dict(unet.named_parameters())
    assert all(shared[name] is parameter for name, parameter in stock.named_parameters())
    assert not any(parameter.is_meta for parameter in unet.parameters())
    latents = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for timestep in (torch.tensor(7), 7, 7.0, torch.tensor([7, 7, 7])):
            output = unet(latents, timestep, states()).sample
            expected = stock(latents, timestep, unet.connector(states(), 7)).sample
            assert torch.allclose(output, expected, atol=1e-5)


def test_initial_weights_follow_the_seed_and_leave_the_global_one_alone():
    stock = stable_diffusion().unet
    before = torch.random.get_rng_state()
    first, same, other = (TimestepAwareUNet.from_unet(stock, 48, depth=1, seed=seed).connector for seed in (1, 1, 2))
    assert torch.equal(first.out_proj.weight, same.out_proj.weight)
    assert not torch.equal(first.out_proj.weight, other.out_proj.weight)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_connector_travels_alone_to_another_copy_of_the_unet(tmp_path):
    pipe, file = aware(), tmp_path / "connector.safetensors"
    pipe.unet.save_connector(file)
    assert file.stat().st_size < 4.1 * sum(parameter.numel() for parameter in pipe.unet.connector.parameters())
    other = stable_diffusion()
    other.unet = TimestepAwareUNet.with_connector(other.unet, file)
    swap_text_encoder(other, pipe.text_encoder)
    assert (generate(other) - generate(pipe)).abs().max() < 1e-5
    with pytest.raises(ValueError, match="gives 32-wide tokens, the UNet reads 64"):
        TimestepAwareUNet.with_connector(stable_diffusion_xl().unet, file)
    with pytest.raises(FileNotFoundError, match=r"no file .*save_connector"):
        TimestepAwareUNet.with_connector(other.unet, tmp_path / "none.safetensors")
    pipe.text_encoder.save_pretrained(tmp_path / "encoder")
    with pytest.raises(ValueError, match="holds no connector"):
        TimestepAwareUNet.with_connector(stable_diffusion().unet, tmp_path / "encoder" / "model.safetensors")
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"connector.safetensors is damaged"):
        TimestepAwareUNet.with_connector(stable_diffusion().unet, file)


def test_what_cannot_have_a_connector_is_named_with_the_mend(tmp_path):
    pipe = stable_diffusion()
    unet = TimestepAwareUNet.from_unet(pipe.unet, 32, tokens=6, depth=1)
    with pytest.raises(ValueError, match=r"'timestep_resampler_6x1'.*pass a UNet without"):
        TimestepAwareUNet.from_unet(unet, 32)
    pipe.unet.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"load the UNet as UNet2DConditionModel.*from_unet"):
        TimestepAwareUNet.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"own 32-wide states: pass width=32"):
        conditioning(bridge="identity", width=48)


# The text encoder before it


def test_the_stock_encoder_may_feed_a_connector_too():
    pipe = stable_diffusion()
    pipe.unet = TimestepAwareUNet.from_unet(pipe.unet, 32, tokens=6, depth=1)
    assert [problem for contract in inspect_pipeline(pipe) for problem in contract.problems] == []
    assert generate(pipe).isfinite().all()


def test_padding_is_zero_behind_an_identity_bridge_and_the_states_are_the_backbones():
    encoder = conditioning(bridge="identity", tokens=40)
    ids = encoder.tokenizer(["a red fox", ""], padding="max_length", return_tensors="pt")
    with torch.no_grad():
        tokens = encoder(ids.input_ids)[0]
        expected = text_encoder().backbone(ids.input_ids, attention_mask=ids.attention_mask).last_hidden_state
    keep = ids.attention_mask.bool()
    assert torch.allclose(tokens[keep], expected[keep], atol=1e-6)
    assert tokens[~keep].abs().max() == 0
    assert tokens[keep].abs().sum(dim=-1).min() > 0


# In stock pipelines


@pytest.mark.parametrize("task", ["", "Img2Img", "Inpaint"])
def test_stable_diffusion_draws_through_the_connector(task):
    pipe = aware(stable_diffusion(task))
    assert type(pipe) is getattr(diffusers, f"StableDiffusion{task}Pipeline")
    together = generate(pipe, ["a red fox", ""], negative_prompt=["blue", "a"], num_images_per_prompt=2)
    assert together.shape == (4, 3, 16, 16)
    assert together.isfinite().all()
    assert (generate(pipe, "a red fox") - generate(pipe, "the dog")).abs().max() > 1e-3
    trained = generate(pipe)
    assert (generate(aware(stable_diffusion(task), trained=False)) - trained).abs().max() > 1e-3
    assert (generate(pipe, clip_skip=1) - trained).abs().max() < 1e-5


def test_stable_diffusion_xl_draws_through_the_connector_and_no_prompt_stays_none():
    pipe = stable_diffusion_xl()
    pipe.unet = TimestepAwareUNet.from_unet(pipe.unet, 32, tokens=6, depth=1)
    seen = []
    pipe.unet.connector.register_forward_hook(lambda module, args, output: seen.append(output))
    swap_text_encoder(pipe, conditioning(bridge="identity", pooled_width=32, tokens=40))
    assert generate(pipe).isfinite().all()
    assert seen[0].shape == (2, 6, 64)
    assert seen[0][0].abs().max() == 0
    assert seen[0][1].std() > 0.5


def test_padding_and_the_length_of_the_tokenizer_do_not_reach_the_picture():
    pipe = aware()
    short = generate(pipe)
    pipe.tokenizer.model_max_length = 60
    assert (generate(pipe) - short).abs().max() < 1e-5


LOAD = """
import sys, numpy, diffusers
import textcond.pipelines
sys.path.insert(0, sys.argv[1])
from tiny import generate
pipe = diffusers.DiffusionPipeline.from_pretrained(sys.argv[2])
pipe.set_progress_bar_config(disable=True)
numpy.savez(sys.argv[2] + ".npz", image=generate(pipe).numpy(), name=type(pipe).__name__)
"""


def test_a_saved_pipeline_loads_in_a_fresh_process_and_gives_equal_pictures(request, tmp_path):
    pipe, folder = aware(), tmp_path / "pipe"
    pipe.save_pretrained(folder)
    index = json.loads((folder / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionPipeline"
    assert index["unet"] == ["textcond.pipelines", "TimestepAwareUNet"]
    subprocess.run([sys.executable, "-c", LOAD, str(request.path.parent), str(folder)], check=True, cwd=tmp_path)
    loaded = np.load(tmp_path / "pipe.npz")
    assert str(loaded["name"]) == "StableDiffusionPipeline"
    assert np.abs(loaded["image"] - generate(pipe).numpy()).max() < 1e-5


def test_a_lora_made_for_the_stock_unet_loads_and_unloads(tmp_path):
    stock = stable_diffusion()
    stock.unet.add_adapter(LoraConfig(r=2, init_lora_weights=False, target_modules=["to_q", "to_v", "proj_in"]))
    type(stock).save_lora_weights(tmp_path, unet_lora_layers=get_peft_model_state_dict(stock.unet))
    pipe = aware()
    before = generate(pipe)
    pipe.load_lora_weights(tmp_path, adapter_name="style")
    assert pipe.get_active_adapters() == ["style"]
    assert not any("lora" in name for name, _ in pipe.unet.connector.named_parameters())
    assert (generate(pipe) - before).abs().max() > 1e-3
    assert (generate(pipe, cross_attention_kwargs={"scale": 0.0}) - before).abs().max() < 1e-5
    pipe.unload_lora_weights()
    assert torch.equal(generate(pipe), before)


def test_a_lora_that_is_already_loaded_keeps_its_name():
    pipe = stable_diffusion()
    pipe.unet.add_adapter(LoraConfig(r=2, init_lora_weights=False, target_modules=["to_q"]), adapter_name="style")
    pipe = aware(pipe)
    with_style = generate(pipe)
    assert pipe.unet.active_adapters() == ["style"]
    pipe.unet.disable_adapters()
    assert (generate(pipe) - with_style).abs().max() > 1e-3


# Contracts


def test_contracts_ask_for_the_width_that_the_connector_reads():
    pipe = stable_diffusion()
    pipe.unet = TimestepAwareUNet.from_unet(pipe.unet, 48, depth=1)
    contract = inspect_pipeline(pipe)[0]
    assert contract.token_width == 48
    assert any("gives 32-wide tokens, the UNet expects 48" in problem for problem in contract.problems)
    with pytest.raises(ValueError, match="the UNet expects 48"):
        swap_text_encoder(pipe, conditioning(bridge="identity"))


def test_a_controlnet_is_refused_with_the_mend():
    pipe = stable_diffusion(controlnet=True)
    pipe.unet = TimestepAwareUNet.from_unet(pipe.unet, 32, depth=1)
    (problem,) = [text for contract in inspect_pipeline(pipe) for text in contract.problems]
    assert "ControlNet" in problem
    assert '"resampler" bridge' in problem
    with pytest.raises(ValueError, match="put the stock UNet"):
        swap_text_encoder(pipe, conditioning(bridge="identity"))


# Alignment


def test_a_replayed_trajectory_trains_the_connector_alone():
    teacher, prompts = stable_diffusion(), ["a red fox", "the dog"]
    visits = follow(teacher, prompts, num_inference_steps=2, guidance_scale=3.0, height=16, width=16)
    pipe = stable_diffusion()
    pipe.unet = TimestepAwareUNet.from_unet(teacher.unet.requires_grad_(False), 32, tokens=6, depth=1)
    swap_text_encoder(pipe, conditioning(bridge="identity", tokens=40).requires_grad_(False))
    weights = [parameter for parameter in pipe.unet.parameters() if parameter.requires_grad]
    assert len(weights) == len(list(pipe.unet.connector.parameters()))
    optimizer, losses = torch.optim.Adam(weights, 3e-3), []
    for _ in range(25):
        text = condition(pipe, prompts)
        assert text["encoder_hidden_states"].shape == (2, 40, 32)
        loss = sum((replay(denoiser_of(pipe), visit, text) - visit.output).square().mean() for visit in visits)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]
    assert all(block.modulation.weight.abs().sum() > 0 for block in pipe.unet.connector.blocks)


def test_a_connector_leaves_with_the_encoder_that_it_came_with(tmp_path):
    pipe, plain = aware(), stable_diffusion()
    pipe.unet.save_connector(tmp_path / "connector.safetensors")
    stock, bridged = plain.unet, conditioning()
    pipe.text_encoder.save_pretrained(tmp_path)  # and a connector that lay there before is gone
    assert not (tmp_path / "connector.safetensors").exists()
    pipe.unet.save_connector(tmp_path / "connector.safetensors")
    swap_text_encoder(plain, tmp_path)
    first = generate(plain)
    swap_text_encoder(plain, tmp_path)
    assert torch.equal(generate(plain), first)
    swap_text_encoder(plain, bridged)
    assert type(plain.unet) is type(stock)
    assert all(ours is theirs for ours, theirs in zip(plain.unet.parameters(), stock.parameters(), strict=True))
    expected = stable_diffusion()
    swap_text_encoder(expected, bridged)
    assert torch.equal(generate(plain), generate(expected))


@pytest.mark.parametrize("compiled", [False, True])
def test_a_connector_leaves_when_the_stock_encoder_comes_back_at_the_same_width_and_returns_with_its_own(compiled):
    pipe = stable_diffusion()
    clip, tokenizer, expected = pipe.text_encoder, pipe.tokenizer, generate(pipe)
    aware(pipe)
    through = generate(pipe)
    if compiled:
        pipe.unet = torch.compile(pipe.unet, backend="eager")
    before = swap_text_encoder(pipe, clip, tokenizer=tokenizer)
    assert type(pipe.unet) is diffusers.UNet2DConditionModel
    assert torch.equal(generate(pipe), expected)
    pipe.register_modules(**before)
    assert torch.allclose(generate(pipe), through, atol=1e-5)


def test_the_encoder_made_for_a_pipeline_with_a_connector_fits_the_unet_without_it():
    pipe = stable_diffusion(width=48)
    pipe.unet = TimestepAwareUNet.from_unet(pipe.unet, 32, tokens=6, depth=1)
    assert make_encoder(pipe, text_encoder(), bridge="identity", tokens=40).config.hidden_size == 32
    encoder = make_encoder(pipe, text_encoder())
    swap_text_encoder(pipe, encoder)
    assert encoder.config.hidden_size == 48
    assert type(pipe.unet) is diffusers.UNet2DConditionModel
    assert generate(pipe).isfinite().all()


def test_bare_states_are_refused_where_no_connector_reads_them(tmp_path):
    pipe, encoder = stable_diffusion(), aware().text_encoder
    components = dict(pipe.components)
    with pytest.raises(ValueError, match=r"the UNet has no connector.*connector\.safetensors, or an encoder with"):
        swap_text_encoder(pipe, encoder)
    assert pipe.components == components
    pipe.text_encoder, pipe.tokenizer = encoder, encoder.tokenizer
    assert "no connector" in inspect_pipeline(pipe)[0].problems[0]
    with pytest.raises(ValueError, match=r"states to a connector.*another bridge"):
        swap_text_encoder(aware(), encoder, keep_original="blend")


def test_a_slot_of_sdxl_keeps_the_connector_that_the_other_is_read_through():
    pipe = stable_diffusion_xl()
    pipe.unet = TimestepAwareUNet.from_unet(pipe.unet, 64, tokens=6, depth=1)
    swap_text_encoder(pipe, conditioning(bridge="identity", tokens=77), "text_encoder")
    assert generate(pipe).isfinite().all()
    with pytest.raises(ValueError, match="text_encoder gives its backbone's own states"):
        swap_text_encoder(pipe, conditioning(pooled_width=32, tokens=77), "text_encoder_2")


# Under torch.compile


def test_a_compiled_unet_takes_an_encoder_and_stays_compiled():
    pipe, plain, encoder = stable_diffusion(), stable_diffusion(), conditioning()
    pipe.unet = compiled = torch.compile(pipe.unet, backend="eager")
    assert inspect_pipeline(pipe) == inspect_pipeline(plain)
    assert denoiser_of(pipe) is compiled._orig_mod
    for one in (pipe, plain):
        swap_text_encoder(one, encoder)
    assert pipe.unet is compiled
    assert torch.allclose(generate(pipe), generate(plain), atol=1e-5)
    visits, expected = (
        follow(one, ["a red fox"], num_inference_steps=2, guidance_scale=3.0, height=16, width=16,
               generator=torch.Generator().manual_seed(0))
        for one in (pipe, plain)
    )  # fmt: skip
    assert len(visits) == len(expected) == 2
    for ours, theirs in zip(visits, expected):
        assert torch.allclose(ours.output, theirs.output, atol=1e-5)
        assert torch.allclose(replay(denoiser_of(pipe), ours, condition(pipe, ["a red fox"])), ours.output, atol=1e-5)


def test_a_connector_goes_before_the_modules_of_a_compiled_unet_and_may_be_compiled_itself(tmp_path):
    plain = aware()
    plain.text_encoder.save_pretrained(tmp_path)
    plain.unet.save_connector(tmp_path / "connector.safetensors")
    expected, pipe = generate(plain), stable_diffusion()
    pipe.unet = compiled = torch.compile(pipe.unet, backend="eager")
    before = swap_text_encoder(pipe, tmp_path)
    assert before["unet"] is compiled
    assert torch.allclose(generate(pipe), expected, atol=1e-5)
    pipe.unet = torch.compile(pipe.unet, backend="eager")
    assert [contract.problems for contract in inspect_pipeline(pipe)] == [[]]
    assert torch.allclose(generate(pipe), expected, atol=1e-5)
    swap_text_encoder(pipe, tmp_path)
    assert torch.allclose(generate(pipe), expected, atol=1e-5)


def test_a_controlnet_beside_a_compiled_connector_is_refused_too():
    pipe = stable_diffusion(controlnet=True)
    pipe.unet = torch.compile(TimestepAwareUNet.from_unet(pipe.unet, 32, depth=1), backend="eager")
    assert "ControlNet" in inspect_pipeline(pipe)[0].problems[0]


def test_an_encoder_for_a_connector_reads_no_padding_and_gives_as_many_states():
    encoder = conditioning(bridge="identity", tokens=40)
    ids = token_ids(encoder, ["a red fox", "a dog in winter"], length=40)
    read = []
    hook = encoder.backbone.register_forward_pre_hook(lambda _, __, given: read.append(given["input_ids"].shape[1]),
                                                      with_kwargs=True)  # fmt: skip
    states = encoder(ids).last_hidden_state
    hook.remove()
    assert states.shape[1] == 40
    assert read[0] < 40
    assert not states[:, read[0] :].any()
    assert states[:, : read[0]].any(-1).any(0).all()
