"""What people plug into a pipeline goes on working when its text encoder is another one."""

import copy

import accelerate
import compel
import diffusers
import pytest
import torch
import transformers
from diffusers.models.attention_processor import IPAdapterAttnProcessor, IPAdapterAttnProcessor2_0
from peft import LoraConfig, get_peft_model
from peft.utils import get_peft_model_state_dict
from PIL import Image
from safetensors.torch import save_file
from tiny import PROMPTS, _controlnet, conditioning, generate, stable_diffusion, stable_diffusion_xl, token_ids

from textcond.pipelines import swap_text_encoder

SD, XL = pytest.param("sd", id="sd"), pytest.param("sdxl", id="sdxl")
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]


def stock(kind):
    return stable_diffusion() if kind == "sd" else stable_diffusion_xl()


def encoder_for(kind, bridge="resampler", tokens=12, **options):
    if kind == "sd":
        return conditioning(bridge=bridge, tokens=tokens, **options)
    return conditioning(bridge=bridge, width=64, tokens=tokens, pooled_width=32, **options)


def swapped_pipe(kind, bridge="resampler", **options):
    pipe, encoder = stock(kind), encoder_for(kind, bridge, **options)
    swap_text_encoder(pipe, encoder)
    return pipe, encoder


def embeds(pipe, prompt="a red fox", **kwargs):
    with torch.no_grad():
        return pipe.encode_prompt(
            prompt, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True, **kwargs
        )


def same(first, second, atol=1e-5):
    return torch.allclose(first, second, atol=atol)


def lora(module, targets, seed=0):
    """State and metadata of a random LoRA of a module, whose scale is 2."""
    torch.manual_seed(seed)
    module, config = copy.deepcopy(module), LoraConfig(r=2, lora_alpha=4, init_lora_weights=False)
    config.target_modules = targets
    module.add_adapter(config)
    return get_peft_model_state_dict(module), config.to_dict()


def save_lora(pipe, folder, parts, seed=0):
    """A LoRA file of the named components, each with its metadata, as diffusers writes it."""
    layers = {}
    for name in parts:
        targets = ATTENTION if name == "unet" else ["q_proj", "v_proj", "out_proj", "query"]
        layers[f"{name}_lora_layers"], layers[f"{name}_lora_adapter_metadata"] = lora(
            getattr(pipe, name), targets, seed
        )
    pipe.save_lora_weights(folder, **layers)
    return folder


def save_kohya_lora(pipe, path):
    """A LoRA file of UNet and text encoder as most trainers outside diffusers write it, with alpha 1 for rank 2."""
    state = {}
    for prefix, module, targets in (
        ("lora_unet", pipe.unet, ATTENTION),
        ("lora_te_text_model", pipe.text_encoder, ["q_proj", "k_proj", "v_proj", "out_proj"]),
    ):
        for key, weight in lora(module, targets)[0].items():
            name, _, half = key.removesuffix(".weight").rpartition(".lora_")
            name = f"{prefix}_{name.replace('.', '_')}"
            state[f"{name}.lora_{'down' if half == 'A' else 'up'}.weight"] = weight.contiguous()
            state[f"{name}.alpha"] = torch.tensor(1.0)
    save_file(state, path)
    return path


# LoRA on the UNet


@pytest.mark.parametrize("kind", [SD, XL])
def test_unet_lora_is_weighed_mixed_fused_and_unloaded(kind, tmp_path):
    pipe, _ = swapped_pipe(kind)
    plain = generate(pipe)
    for seed, name in enumerate(("style", "character")):
        pipe.load_lora_weights(save_lora(pipe, tmp_path / name, ["unet"], seed), adapter_name=name)
    pipe.set_adapters("style", 0.0)
    assert same(generate(pipe), plain)
    pipe.set_adapters("style")
    style = generate(pipe)
    assert not same(style, plain, 1e-2)
    pipe.set_adapters(["style", "character"], [0.5, 0.7])
    mixed = generate(pipe)
    assert not same(mixed, style, 1e-2)
    pipe.fuse_lora()
    assert same(generate(pipe), mixed)
    pipe.unfuse_lora()
    pipe.unload_lora_weights()
    assert same(generate(pipe), plain)


@pytest.mark.parametrize("kind", [SD, XL])
def test_a_lora_file_of_the_stock_pipeline_loaded_before_the_swap_keeps_its_unet_part(kind, tmp_path):
    slots = ["text_encoder"] if kind == "sd" else ["text_encoder", "text_encoder_2"]
    whole = save_lora(stock(kind), tmp_path / "whole", ["unet", *slots])
    alone = save_lora(stock(kind), tmp_path / "alone", ["unet"])
    expected, _ = swapped_pipe(kind)
    expected.load_lora_weights(alone)
    pipe = stock(kind)
    pipe.load_lora_weights(whole, adapter_name="style")
    before = generate(pipe)
    old = swap_text_encoder(pipe, encoder_for(kind))
    assert same(generate(pipe), generate(expected))
    pipe.set_adapters("style", 0.5)
    assert not same(generate(pipe), generate(expected), 1e-3)
    pipe.set_adapters("style", 1.0)
    pipe.register_modules(**old)
    assert same(generate(pipe), before)


def test_a_lora_file_with_alphas_from_another_trainer_keeps_its_scale(tmp_path):
    path = save_kohya_lora(stable_diffusion(), tmp_path / "kohya.safetensors")
    pipe = stable_diffusion()
    pipe.load_lora_weights(path, adapter_name="style")
    swap_text_encoder(pipe, conditioning())
    expected, _ = swapped_pipe("sd")
    expected.load_lora_weights(save_lora(stable_diffusion(), tmp_path / "own", ["unet"]), adapter_name="style")
    # Alpha 1 for rank 2 is a scale of a half, where the other file's is 2.
    expected.set_adapters("style", 0.25)
    assert same(generate(pipe), generate(expected))


def test_the_text_part_of_a_stock_lora_file_is_refused_and_changes_nothing_in_the_encoder(tmp_path):
    folder = save_lora(stable_diffusion(), tmp_path, ["unet", "text_encoder"])
    pipe, encoder = swapped_pipe("sd")
    before = embeds(pipe)[0]
    with pytest.raises(ValueError, match=r"made for another text encoder.*before swap_text_encoder"):
        pipe.load_lora_weights(folder)
    assert torch.equal(embeds(pipe)[0], before)
    encoder.save_pretrained(tmp_path / "encoder")


def test_trigger_words_of_a_stock_lora_and_inversion_live_on_in_the_original_that_is_kept(tmp_path):
    pipe = stable_diffusion()
    pipe.load_lora_weights(save_lora(pipe, tmp_path / "lora", ["unet", "text_encoder"]))
    expected = embeds(pipe)[0]
    with pytest.raises(ValueError, match=r"carries a LoRA: call pipe\.fuse_lora"):
        swap_text_encoder(pipe, conditioning(), keep_original="concatenate")
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    swap_text_encoder(pipe, conditioning(), keep_original="concatenate")
    assert same(embeds(pipe)[0][:, :77], expected)
    save_file({"emb_params": torch.randn(2, 32)}, tmp_path / "toy.safetensors")
    pipe.load_textual_inversion(tmp_path / "toy.safetensors", token="<toy>")
    toy = embeds(pipe, "a <toy>")[0]
    assert not same(toy[:, :77], embeds(pipe, "a dog")[0][:, :77], 1e-2)
    pipe.save_pretrained(tmp_path / "pipe")
    loaded = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "pipe")
    assert same(embeds(loaded, "a <toy>")[0], toy)


# LoRA on the encoder


@pytest.mark.parametrize("kind", [SD, XL])
def test_a_lora_of_unet_and_encoder_makes_the_round_trip_and_is_fused_into_a_saved_pipeline(kind, tmp_path):
    pipe, encoder = swapped_pipe(kind)
    slot = "text_encoder" if kind == "sd" else "text_encoder_2"
    plain, plain_embeds = generate(pipe), embeds(pipe)[0]
    folder = save_lora(pipe, tmp_path / "lora", ["unet", slot])
    pipe.load_lora_weights(folder, adapter_name="style")
    tuned, tuned_embeds = generate(pipe), embeds(pipe)[0]
    assert not same(tuned_embeds, plain_embeds, 1e-2)
    pipe.set_adapters("style", {slot: 0.0, "unet": 1.0})
    assert same(embeds(pipe)[0], plain_embeds)
    assert not same(generate(pipe), plain, 1e-3)
    pipe.set_adapters("style", 1.0)
    assert same(generate(pipe), tuned)
    assert same(generate(pipe, cross_attention_kwargs={"scale": 0.0}), plain)
    pipe.disable_lora()
    assert same(generate(pipe), plain)
    pipe.enable_lora()
    with pytest.raises(ValueError, match=r"carries a peft adapter.*fuse_lora"):
        encoder.save_pretrained(tmp_path / "encoder")
    pipe.fuse_lora(components=["unet", slot])
    pipe.unload_lora_weights()
    pipe.save_pretrained(tmp_path / "pipe")
    loaded = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "pipe")
    loaded.set_progress_bar_config(disable=True)
    assert same(embeds(loaded)[0], tuned_embeds, 1e-4)
    assert same(generate(loaded), tuned, 1e-4)


def test_a_refused_save_leaves_the_weights_in_the_folder(tmp_path):
    encoder = conditioning(bridge="linear")
    encoder.save_pretrained(tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    encoder.add_adapter(LoraConfig(r=2, target_modules=["query"]))
    with pytest.raises(ValueError, match="adapter"):
        encoder.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize("bridge", ["linear", "resampler"])
def test_a_peft_folder_loads_into_the_encoder_by_itself(bridge, tmp_path):
    pipe, encoder = swapped_pipe("sd", bridge)
    ids, before = token_ids(encoder), embeds(pipe)[0]
    torch.manual_seed(0)
    config = LoraConfig(r=2, init_lora_weights=False, target_modules=["query", "value", "out_proj"])
    trained = get_peft_model(copy.deepcopy(encoder), config)
    trained.save_pretrained(tmp_path)
    pipe.text_encoder.load_adapter(str(tmp_path))
    with torch.no_grad():
        assert same(encoder(ids)[0], trained(input_ids=ids)[0])
    assert not same(embeds(pipe)[0], before, 1e-2)
    encoder.disable_adapters()
    assert same(embeds(pipe)[0], before)


# Textual inversion


@pytest.mark.parametrize("bridge", ["linear", "resampler"])
@pytest.mark.parametrize("kind", [SD, XL])
def test_textual_inversion_of_several_vectors_is_read_saved_and_unloaded(kind, bridge, tmp_path):
    pipe, encoder = swapped_pipe(kind, bridge)
    slots = {} if kind == "sd" else {"text_encoder": pipe.text_encoder_2, "tokenizer": pipe.tokenizer_2}
    plain, vectors = embeds(pipe)[0], encoder.text_encoder.encode(PROMPTS)
    learned = torch.randn(3, 32, generator=torch.Generator().manual_seed(0)) * 4
    save_file({"emb_params": learned}, tmp_path / "toy.safetensors")
    pipe.load_textual_inversion(tmp_path / "toy.safetensors", token="<toy>", **slots)
    tokenizer = pipe.tokenizer if kind == "sd" else pipe.tokenizer_2
    ids = tokenizer.convert_tokens_to_ids(["<toy>", "<toy>_1", "<toy>_2"])
    assert torch.equal(encoder.get_input_embeddings().weight[ids], learned)
    toy = embeds(pipe, "a <toy>")[0]
    # By hand: the pipeline writes one token for each vector, and the encoder reads them all.
    by_hand = tokenizer("a <toy> <toy>_1 <toy>_2", padding="max_length", truncation=True, return_tensors="pt").input_ids
    assert all((by_hand == i).sum() == 1 for i in ids)
    with torch.no_grad():
        assert same(encoder(by_hand).last_hidden_state, toy)
    assert same(embeds(pipe)[0], plain)
    assert abs(encoder.text_encoder.encode(PROMPTS) - vectors).max() < 1e-5
    pipe.save_pretrained(tmp_path / "pipe")
    loaded = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "pipe")
    assert same(embeds(loaded, "a <toy>")[0], toy)
    if kind == "sd":
        pipe.unload_textual_inversion("<toy>")
        assert same(embeds(pipe)[0], plain)
        assert not same(embeds(pipe, "a <toy>")[0], toy, 1e-3)


def test_a_textual_inversion_of_another_width_is_refused(tmp_path):
    pipe, encoder = swapped_pipe("sd")
    rows = len(encoder.get_input_embeddings().weight)
    save_file({"emb_params": torch.randn(1, 48)}, tmp_path / "clip.safetensors")
    with pytest.raises(ValueError, match="incorrect shape"):
        pipe.load_textual_inversion(tmp_path / "clip.safetensors", token="<toy>")
    assert len(encoder.get_input_embeddings().weight) == len(pipe.tokenizer) == rows


# compel


def read(pipe, ids, mask=None):
    encoder = pipe.text_encoder or pipe.text_encoder_2
    with torch.no_grad():
        return encoder(ids, mask).last_hidden_state


@pytest.mark.parametrize("kind", [SD, XL])
@pytest.mark.parametrize("bridge", ["linear", "mlp"])
def test_compel_weights_are_what_they_say_and_change_the_picture(kind, bridge):
    pipe, encoder = swapped_pipe(kind, bridge, tokens=32)
    weigh = compel_of(pipe)
    tokenizer = encoder.tokenizer
    ids = tokenizer(["a red fox", "", "red"], padding="max_length", return_tensors="pt").input_ids
    (plain, empty), red = read(pipe, ids[:2]), ids[2][ids[2] > tokenizer.sep_token_id]
    # "a" is one piece, so "red" begins behind [CLS] and it.
    place = slice(2, 2 + len(red))
    assert torch.equal(ids[0, place], red)
    more = plain.clone()
    more[place] = empty[place] + 1.5 * (plain[place] - empty[place])
    assert same(weigh("a (red)1.5 fox")[0], more)
    without = torch.ones_like(ids[:1])
    without[:, place] = 0
    # compel scales the masked words too, and mixes by tan((1 - weight) * pi / 2), which is 1 for a half.
    absent = read(pipe, ids[:1], without)[0]
    absent[place] = empty[place] + 0.5 * (absent[place] - empty[place])
    less = plain.clone()
    less[place] = empty[place] + 0.5 * (plain[place] - empty[place])
    assert same(weigh("a (red)0.5 fox")[0], (less + absent) / 2)
    assert not same(weigh("a (red)1.5 fox"), weigh("a red fox"), 1e-2)
    pooled = {} if kind == "sd" else {"pooled_prompt_embeds": embeds(pipe)[2]}
    pictures = [
        generate(pipe, None, guidance_scale=1.0, prompt_embeds=weigh(text), **pooled)
        for text in ("a red fox", "a (red)1.5 fox", "a (red)0.5 fox")
    ]
    assert same(pictures[0], generate(pipe, guidance_scale=1.0))
    assert not same(pictures[1], pictures[0], 1e-3)
    assert not same(pictures[2], pictures[0], 1e-3)


def compel_of(pipe):
    """compel for whichever encoder a pipeline has, giving tokens alone."""
    if pipe.text_encoder is not None:
        return compel.Compel(tokenizer=pipe.tokenizer, text_encoder=pipe.text_encoder)
    return compel.Compel(
        tokenizer=pipe.tokenizer_2,
        text_encoder=pipe.text_encoder_2,
        returned_embeddings_type=compel.ReturnedEmbeddingsType.PENULTIMATE_HIDDEN_STATES_NON_NORMALIZED,
    )


@pytest.mark.parametrize("bridge", ["linear", "resampler"])
def test_compel_chunks_long_prompts_and_pads_the_negative_to_them(bridge):
    pipe, encoder = swapped_pipe("sd", bridge, tokens=32)
    encoder.tokenizer.model_max_length = 32
    long = "a green bird " * 8
    result = compel.CompelForSD(pipe)([long, "a fox"], negative_prompt="a dog")
    chunks = len(encoder.tokenizer.tokenize(long)) // 30 + 1
    assert chunks > 2
    assert result.embeds.shape == result.negative_embeds.shape == (2, chunks * 32, 32)
    assert same(result.embeds[1, :32], embeds(pipe, "a fox")[0][0])
    images = generate(pipe, None, prompt_embeds=result.embeds, negative_prompt_embeds=result.negative_embeds)
    cut = generate(pipe, [long, "a fox"], negative_prompt=["a dog"] * 2)
    assert images.isfinite().all()
    assert not same(images[0], cut[0], 1e-3)


def test_compel_for_sdxl_weighs_long_prompts_in_both_slots_and_negates():
    pipe = stable_diffusion_xl()
    for slot, pooled in (("text_encoder", None), ("text_encoder_2", 32)):
        swap_text_encoder(pipe, conditioning(bridge="linear", tokens=77, pooled_width=pooled), slot)
    weigh = compel.CompelForSDXL(pipe)
    long = "a (green)1.4 bird " * 12
    weighted, plain = weigh(long, negative_prompt="a dog"), weigh("a green bird " * 12, negative_prompt="a dog")
    assert weighted.embeds.shape == weighted.negative_embeds.shape == plain.embeds.shape
    assert weighted.embeds.shape[1] % 77 == 0
    assert weighted.embeds.shape[1] > 77

    def picture(result):
        return generate(
            pipe,
            None,
            prompt_embeds=result.embeds,
            pooled_prompt_embeds=result.pooled_embeds,
            negative_prompt_embeds=result.negative_embeds,
            negative_pooled_prompt_embeds=result.negative_pooled_embeds,
        )

    assert not same(picture(weighted), picture(plain), 1e-3)
    assert not same(picture(weigh("a fox", negative_prompt="a dog")), picture(weigh("a fox", "")), 1e-3)


def test_compel_blends_prompts_behind_a_resampler_of_the_prompt_s_length():
    pipe, encoder = swapped_pipe("sd", tokens=32)
    mix = compel.Compel(tokenizer=pipe.tokenizer, text_encoder=pipe.text_encoder, model_max_length=32)
    encoder.tokenizer.model_max_length = 32
    blended = mix('("a red fox", "a dog").blend(0.75, 0.25)')
    assert same(blended, 0.75 * embeds(pipe)[0] + 0.25 * embeds(pipe, "a dog")[0])


def test_compel_says_that_it_cannot_weigh_the_words_behind_a_resampler_of_another_length():
    pipe, _ = swapped_pipe("sd")
    # Twelve output tokens stand for no word in particular, and the prompt has 64 places.
    with pytest.raises(RuntimeError, match=r"expanded size of the tensor \(12\) must match the existing size \(64\)"):
        compel.CompelForSD(pipe)("a (red)1.5 fox")


# ControlNet and IP-Adapter


@pytest.mark.parametrize("kind", [SD, XL])
def test_controlnet_joins_a_swapped_pipeline(kind):
    pipe, encoder = swapped_pipe(kind)
    plain = generate(pipe)
    name = type(pipe).__name__.replace("Pipeline", "ControlNetPipeline")
    torch.manual_seed(0)
    controlnet = _controlnet(pipe.unet)
    with torch.no_grad():
        # As published, a new ControlNet adds nothing.
        for block in [*controlnet.controlnet_down_blocks, controlnet.controlnet_mid_block]:
            torch.nn.init.normal_(block.weight)
    guided = getattr(diffusers, name).from_pipe(pipe, controlnet=controlnet)
    guided.set_progress_bar_config(disable=True)
    assert encoder in guided.components.values()
    assert same(generate(guided, controlnet_conditioning_scale=0.0), plain)
    assert not same(generate(guided), plain, 1e-3)
    assert not same(generate(guided), generate(guided, "a green bird"), 1e-4)


def ip_adapter(unet, width, image_width=16):
    """A random IP-Adapter of a UNet, in the layout of the published files."""
    generator = torch.Generator().manual_seed(0)
    state = {"image_proj": {}, "ip_adapter": {}}
    state["image_proj"] = {
        "proj.weight": torch.randn(4 * width, image_width, generator=generator),
        "proj.bias": torch.zeros(4 * width),
        "norm.weight": torch.ones(width),
        "norm.bias": torch.zeros(width),
    }
    index = 1
    for name in unet.attn_processors:
        if name.endswith("attn2.processor"):
            module = unet.get_submodule(name.removesuffix(".processor"))
            for key in ("to_k_ip", "to_v_ip"):
                state["ip_adapter"][f"{index}.{key}.weight"] = torch.randn(
                    module.to_k.out_features, width, generator=generator
                )
            index += 2
    return state


@pytest.mark.parametrize("kind", [SD, XL])
def test_ip_adapter_adds_an_image_to_the_new_text_and_unloads(kind):
    pipe, _ = swapped_pipe(kind)
    plain = generate(pipe)
    config = transformers.CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=32,
        patch_size=16,
        projection_dim=16,
    )
    torch.manual_seed(0)
    pipe.register_modules(
        image_encoder=transformers.CLIPVisionModelWithProjection(config).eval(),
        feature_extractor=transformers.CLIPImageProcessor(size=32, crop_size=32),
    )
    pipe.load_ip_adapter(ip_adapter(pipe.unet, 32 if kind == "sd" else 64), subfolder="", weight_name="")
    processors = pipe.unet.attn_processors.values()
    assert any(isinstance(p, (IPAdapterAttnProcessor, IPAdapterAttnProcessor2_0)) for p in processors)
    red, blue = Image.new("RGB", (32, 32), "red"), Image.new("RGB", (32, 32), "blue")
    pipe.set_ip_adapter_scale(0.7)
    pictures = [generate(pipe, ip_adapter_image=image) for image in (red, blue)]
    assert not same(pictures[0], plain, 1e-3)
    assert not same(pictures[0], pictures[1], 1e-4)
    assert not same(pictures[0], generate(pipe, "a green bird", ip_adapter_image=red), 1e-4)
    pipe.set_ip_adapter_scale(0.0)
    assert same(generate(pipe, ip_adapter_image=red), plain)
    pipe.unload_ip_adapter()
    assert same(generate(pipe), plain)


# Calls of the pipeline


@pytest.mark.parametrize("bridge", ["linear", "resampler"])
def test_a_callback_replaces_the_prompt_halfway_even_by_a_longer_one(bridge):
    pipe, _ = swapped_pipe("sd", bridge)
    first, second = (torch.cat(embeds(pipe, prompt)[::-1]) for prompt in ("a red fox", "a green bird"))

    def picture(replacement):
        def callback(pipe, step, timestep, tensors):
            return {"prompt_embeds": replacement} if step == 0 else tensors

        # Strong guidance, so that a random denoiser shows what it was told.
        return generate(
            pipe,
            num_inference_steps=3,
            guidance_scale=30.0,
            callback_on_step_end=callback,
            callback_on_step_end_tensor_inputs=["prompt_embeds"],
        )

    plain = generate(pipe, num_inference_steps=3, guidance_scale=30.0)
    assert torch.equal(picture(first), plain)
    changed = picture(second)
    assert not same(changed, plain, 1e-4)
    assert not same(changed, generate(pipe, "a green bird", num_inference_steps=3, guidance_scale=30.0), 1e-4)
    # Attention over every token twice is attention over every token once.
    assert same(picture(torch.cat([second, second], dim=1)), changed, 1e-4)


@pytest.mark.parametrize("kind", [SD, XL])
def test_prompt_embeds_by_hand_give_the_picture_of_the_prompts(kind):
    pipe, _ = swapped_pipe(kind)
    made = embeds(pipe, ["a red fox", "a dog"], negative_prompt=["", "a cat"])
    names = ["prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds"]
    by_hand = generate(pipe, None, **dict(zip(names, made)))
    assert same(by_hand, generate(pipe, ["a red fox", "a dog"], negative_prompt=["", "a cat"]))
    with pytest.raises(ValueError, match="must have the same shape"):
        generate(pipe, None, **dict(zip(names, made)) | {"negative_prompt_embeds": made[1][:, :-1]})


@pytest.mark.parametrize(
    "scheduler",
    ["DPMSolverMultistepScheduler", "EulerAncestralDiscreteScheduler", "UniPCMultistepScheduler", "PNDMScheduler"],
)
def test_other_schedulers_follow_the_new_prompt(scheduler):
    pipe, _ = swapped_pipe("sd")
    ddim = generate(pipe, num_inference_steps=4)
    pipe.scheduler = getattr(diffusers, scheduler).from_config(pipe.scheduler.config)
    picture = generate(pipe, num_inference_steps=4)
    assert picture.isfinite().all()
    assert not same(picture, ddim, 1e-3)
    assert not same(picture, generate(pipe, "a green bird", num_inference_steps=4), 1e-4)


@pytest.mark.parametrize("kind", [SD, XL])
def test_from_pipe_keeps_half_precision_and_auto_pipelines_find_their_class(kind):
    pipe, encoder = swapped_pipe(kind)
    pipe.to(torch.bfloat16)
    before = embeds(pipe)[0]
    other = diffusers.AutoPipelineForImage2Image.from_pipe(pipe, dtype=torch.bfloat16)
    other.set_progress_bar_config(disable=True)
    assert type(other).__name__ == type(pipe).__name__.replace("Pipeline", "Img2ImgPipeline")
    assert encoder in other.components.values()
    assert encoder.dtype == other.unet.dtype == torch.bfloat16
    assert torch.equal(embeds(other)[0], before)
    assert generate(other).isfinite().all()
    assert generate(diffusers.AutoPipelineForInpainting.from_pipe(other, dtype=torch.bfloat16)).isfinite().all()


# Compiled and offloaded


def test_a_compiled_encoder_gives_the_same_tokens_from_one_graph_for_all_prompts():
    from torch._dynamo.testing import CompileCounterWithBackend

    pipe, encoder = swapped_pipe("sd", bridge_depth=1)
    plain = [embeds(pipe, prompt)[0] for prompt in PROMPTS]
    picture = generate(pipe)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    encoder.compile(backend=counter, fullgraph=True)
    for prompt, expected in zip(PROMPTS, plain):
        assert same(embeds(pipe, prompt)[0], expected)
    # The negative prompt is tokenized to the length of the output, which is another shape behind a resampler.
    assert counter.frame_count <= 2
    assert same(generate(pipe), picture)
    torch._dynamo.reset()


def test_a_wrapped_compiled_encoder_takes_the_place_of_the_swapped_one():
    pipe, encoder = swapped_pipe("sd", "linear")
    plain = generate(pipe)
    torch._dynamo.reset()
    pipe.text_encoder = torch.compile(encoder, backend="eager")
    assert same(generate(pipe), plain)
    torch._dynamo.reset()


@pytest.mark.parametrize("kind", [SD, XL])
def test_model_offload_hooks_the_encoder_and_leaves_the_picture_alone(kind):
    pipe, encoder = swapped_pipe(kind)
    plain = generate(pipe)
    pipe.enable_model_cpu_offload(device="cpu")
    assert hasattr(encoder, "_hf_hook")
    assert torch.equal(generate(pipe), plain)
    assert torch.equal(generate(pipe), plain)
    pipe.remove_all_hooks()
    assert not hasattr(encoder, "_hf_hook")
    assert torch.equal(generate(pipe), plain)


@pytest.mark.parametrize("kind", [SD, XL])
@pytest.mark.parametrize("options", [{"offload_type": "leaf_level"}, {"num_blocks_per_group": 1}])
def test_group_offload_leaves_the_picture_alone(kind, options):
    pipe, _ = swapped_pipe(kind)
    plain = generate(pipe)
    pipe.enable_group_offload(onload_device=torch.device("cpu"), **options)
    assert torch.equal(generate(pipe), plain)


@pytest.mark.parametrize("bridge", ["linear", "resampler"])
def test_accelerate_puts_every_weight_of_the_encoder_on_its_device_when_it_is_read(bridge):
    encoder = conditioning(bridge=bridge, pooled_width=8, layers="average")
    ids = token_ids(encoder)
    with torch.no_grad():
        plain = encoder(ids)
        accelerate.cpu_offload(encoder, execution_device="cpu")
        assert all(parameter.is_meta for parameter in encoder.parameters())
        offloaded = encoder(ids)
    assert torch.equal(offloaded[0], plain[0])
    assert torch.equal(offloaded[1], plain[1])
