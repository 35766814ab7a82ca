import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import tiny_audio
import torch
import transformers

from textcond import T5SlotTokenizer
from textcond.pipelines.alignment import AlignmentOptions, align
from textcond.pipelines.audio import mend_clap
from textcond.pipelines.contracts import inspect_pipeline
from textcond.pipelines.families import condition, denoiser_of
from textcond.pipelines.swap import make_encoder, swap_text_encoder
from textcond.pipelines.trajectories import follow, replay

PROMPTS = ["rain on a tin roof", "drums"]
SHORT = {"audio_length_in_s": 0.1}
# Every slot of every family: the pipeline, the slot, and a family of backbones to fill it with.
SLOTS = {
    "musicldm": ("musicldm", None, "bert"),
    "audioldm2-clap": ("audioldm2", "text_encoder", "bert"),
    "audioldm2-t5": ("audioldm2", "text_encoder_2", "xlm-roberta"),
    "stable-audio": ("stable_audio", None, "mistral"),
}


def swapped(case: str):
    name, slot, backbone = SLOTS[case]
    pipe = getattr(tiny_audio, name)()
    if name == "musicldm":
        mend_clap(pipe)
    encoder = make_encoder(pipe, tiny.text_encoder(backbone), slot=slot)
    swap_text_encoder(pipe, encoder, slot)
    return pipe, encoder


def differ(one: torch.Tensor, other: torch.Tensor) -> float:
    return ((one - other).abs().mean() / other.abs().mean()).item()


@pytest.fixture(params=SLOTS)
def case(request):
    return request.param


def test_a_swapped_encoder_drives_the_unmodified_pipeline(case):
    pipe, _ = swapped(case)
    assert type(pipe).__module__.startswith("diffusers.")
    assert [contract.problems for contract in inspect_pipeline(pipe)] == [[]] * len(inspect_pipeline(pipe))
    batch = tiny_audio.waveforms(pipe, PROMPTS)
    assert len(batch) == 2
    assert torch.isfinite(batch).all()
    assert differ(tiny_audio.waveforms(pipe, ["a dog", "a violin"]), batch) > 1e-3
    assert differ(tiny_audio.waveforms(pipe, PROMPTS, negative_prompt=["noise", "low quality"]), batch) > 1e-3
    several = tiny_audio.waveforms(pipe, PROMPTS, negative_prompt=["noise", ""], num_waveforms_per_prompt=2)
    assert len(several) == 4
    assert torch.isfinite(several).all()


def test_the_pipeline_with_its_own_encoders_has_no_problems_and_runs(case):
    pipe = getattr(tiny_audio, SLOTS[case][0])()
    if case == "musicldm":
        mend_clap(pipe)
    assert [contract.problems for contract in inspect_pipeline(pipe)] == [[]] * len(inspect_pipeline(pipe))
    assert torch.isfinite(tiny_audio.waveforms(pipe, PROMPTS)).all()


LOAD = """
import sys, torch
import textcond, tiny_audio
from diffusers import DiffusionPipeline
for folder in sys.argv[1:]:
    pipe = DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    torch.save(tiny_audio.waveforms(pipe, ["rain on a tin roof", "drums"]), folder + "/waveforms.pt")
"""


def test_saved_pipelines_give_the_same_waveforms_in_a_fresh_process(tmp_path):
    expected = {}
    for case in SLOTS:
        pipe, _ = swapped(case)
        pipe.save_pretrained(tmp_path / case)
        expected[tmp_path / case] = tiny_audio.waveforms(pipe, PROMPTS)
    subprocess.run([sys.executable, "-c", LOAD, *expected], check=True, cwd=Path(__file__).parent)
    for folder, waveforms in expected.items():
        torch.testing.assert_close(torch.load(folder / "waveforms.pt"), waveforms)


def test_condition_is_what_the_denoiser_was_given(case):
    pipe, _ = swapped(case)
    # AudioLDM2 reads a text otherwise beside a longer one.
    for texts in [[text] for text in PROMPTS] if "audioldm2" in case else [PROMPTS]:
        for guidance in (1.0, 3.0):
            visits = follow(pipe, texts, num_inference_steps=2, guidance_scale=guidance)
            assert len(visits) >= 2
            for visit in visits:
                again = replay(denoiser_of(pipe), visit, condition(pipe, texts))
                torch.testing.assert_close(again, visit.output, atol=1e-5, rtol=1e-5)
                other = replay(denoiser_of(pipe), visit, condition(pipe, [text[::-1] for text in texts]))
                assert differ(other, visit.output) > 1e-3


def test_a_text_conditions_alike_beside_a_longer_one(case):
    pipe, _ = swapped(case)
    texts = [PROMPTS[0], "a drum", "drums", "d rum"]  # of which some are as long in letters and not in words
    beside = condition(pipe, texts)
    for place, text in enumerate(texts):
        for name, states in condition(pipe, [text]).items():
            torch.testing.assert_close(states[0], beside[name][place])


def test_a_bfloat16_projection_is_told_to_be_float32(tmp_path):
    pipe = tiny_audio.stable_audio().to(torch.bfloat16)
    with pytest.raises(ValueError, match="load the pipeline in float32"):
        align(pipe, tiny.text_encoder("bert"), ["rain", "drums", "wind"], tmp_path)


def test_every_audio_slot_is_aligned_and_the_folder_swaps_in(case, tmp_path):
    name, slot, backbone = SLOTS[case]
    pipe = getattr(tiny_audio, name)()
    if name == "musicldm":
        mend_clap(pipe)
    words = ["rain", "drums", "piano", "a dog", "wind", "a slow violin", "jazz", "thunder"]
    texts = [f"{one} and {other}" for one in words for other in words if one != other]
    options = AlignmentOptions(
        slot=slot, token_steps=6, denoiser_steps=4, batch_size=8, denoiser_batch_size=4, held_out=4, validate_every=3,
        num_inference_steps=2, closed_form_prompts=32, call={} if name == "stable_audio" else SHORT,
    )  # fmt: skip
    aligned = align(pipe, tiny.text_encoder(backbone), texts, tmp_path / "aligned", options)
    swap_text_encoder(pipe, tmp_path / "aligned", slot)
    waveforms = tiny_audio.waveforms(pipe, PROMPTS)
    swap_text_encoder(pipe, aligned, slot)
    torch.testing.assert_close(tiny_audio.waveforms(pipe, PROMPTS), waveforms)
    states = condition(pipe, PROMPTS)
    assert all(torch.isfinite(tensor.float()).all() for tensor in states.values())


def test_gradients_reach_the_bridge_through_the_frozen_denoiser(case):
    pipe, encoder = swapped(case)
    denoiser = denoiser_of(pipe).requires_grad_(False)
    visit = follow(pipe, PROMPTS, num_inference_steps=1)[0]
    replay(denoiser, visit, condition(pipe, PROMPTS)).square().mean().backward()
    bridge = encoder.pooled_bridge or encoder.bridge
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in bridge.parameters())


def test_stable_audio_starts_from_audio():
    pipe, _ = swapped("stable-audio")
    start = {"initial_audio_waveforms": torch.linspace(-1, 1, 8).expand(2, 2, 8)}
    start["initial_audio_sampling_rate"] = pipe.vae.sampling_rate
    assert differ(tiny_audio.waveforms(pipe, PROMPTS, **start), tiny_audio.waveforms(pipe, PROMPTS)) > 1e-3


def test_the_swapped_pipeline_runs_in_bfloat16(case):
    pipe, _ = swapped(case)
    pipe.to(torch.bfloat16)
    assert torch.isfinite(tiny_audio.waveforms(pipe, PROMPTS, negative_prompt=["noise", ""])).all()


def test_audioldm2_takes_encoders_in_both_slots():
    pipe, _ = swapped("audioldm2-t5")
    before = tiny_audio.waveforms(pipe, PROMPTS)
    swap_text_encoder(pipe, make_encoder(pipe, tiny.text_encoder("bert"), slot="text_encoder"), "text_encoder")
    assert differ(tiny_audio.waveforms(pipe, PROMPTS), before) > 1e-3
    with pytest.raises(ValueError, match="no one encoder can serve all slots"):
        swap_text_encoder(pipe, pipe.text_encoder)


def test_the_stock_encoder_comes_back():
    pipe = tiny_audio.audioldm2()
    before = tiny_audio.waveforms(pipe, PROMPTS)
    old = swap_text_encoder(pipe, make_encoder(pipe, tiny.text_encoder(), slot="text_encoder_2"), "text_encoder_2")
    pipe.register_modules(**old)
    torch.testing.assert_close(tiny_audio.waveforms(pipe, PROMPTS), before)


@pytest.mark.parametrize("family", ["bert", "xlm-roberta", "t5", "mistral", "clip"])
def test_a_t5_slot_tokenizer_tokenizes_as_its_origin_also_when_loaded_again(family, tmp_path):
    origin = tiny.conditioning(family).tokenizer
    made = T5SlotTokenizer.of(origin)
    made.save_pretrained(tmp_path)
    loaded = T5SlotTokenizer.from_pretrained(tmp_path)
    for tokenizer in (made, loaded):
        assert isinstance(tokenizer, transformers.T5Tokenizer)
        assert tokenizer.model_max_length == origin.model_max_length
        assert tokenizer.pad_token_id == origin.pad_token_id
        assert tokenizer(tiny.PROMPTS)["input_ids"] == origin(tiny.PROMPTS)["input_ids"]


def test_a_bridge_of_a_fixed_length_is_refused_where_the_mask_is_read():
    for name, slot in (("stable_audio", None), ("audioldm2", "text_encoder"), ("audioldm2", "text_encoder_2")):
        pipe = getattr(tiny_audio, name)()
        encoder = tiny.conditioning(width=tiny_audio.POOLED if slot == "text_encoder" else 16)
        with pytest.raises(ValueError, match="keeps the length"):
            swap_text_encoder(pipe, encoder, slot)


def test_musicldm_with_stock_clap_says_how_to_mend_it():
    pipe = tiny_audio.musicldm()
    with pytest.raises(AttributeError):
        tiny_audio.waveforms(pipe)
    assert "mend_clap(pipe)" in inspect_pipeline(pipe)[0].problems[0]


def test_musicldm_refuses_an_encoder_with_fewer_positions_than_its_vector_is_wide():
    pipe = tiny_audio.musicldm()
    pipe.unet.register_to_config(projection_class_embeddings_input_dim=200)
    with pytest.raises(ValueError, match="200, and text_encoder has positions for 130"):
        swap_text_encoder(pipe, make_encoder(pipe, tiny.text_encoder()))


def test_audioldm2_with_the_published_language_model_class_says_how_to_load_it():
    pipe = tiny_audio.audioldm2()
    pipe.language_model = transformers.GPT2Model(pipe.language_model.config)
    with pytest.raises(AttributeError):
        tiny_audio.waveforms(pipe)
    assert "GPT2LMHeadModel" in inspect_pipeline(pipe)[-1].problems[0]


def test_audioldm2_with_a_plain_tokenizer_says_which_to_use():
    pipe, encoder = swapped("audioldm2-t5")
    pipe.tokenizer_2 = encoder.tokenizer
    with pytest.raises(ValueError, match="specify either `text`"):
        tiny_audio.waveforms(pipe)
    assert "T5SlotTokenizer" in inspect_pipeline(pipe)[-1].problems[0]
    pipe.tokenizer_2 = T5SlotTokenizer.of(encoder.tokenizer)
    assert torch.isfinite(tiny_audio.waveforms(pipe)).all()


def test_a_text_to_speech_checkpoint_of_audioldm2_is_named():
    pipe = tiny_audio.audioldm2()
    pipe.projection_model.register_to_config(use_learned_position_embedding=True, max_seq_length=256)
    assert "speaks a transcription" in inspect_pipeline(pipe)[-1].problems[0]


def test_get_text_features_is_the_pooled_vector_in_the_encoders_dtype():
    encoder = tiny.conditioning(pooled_width=8).to(torch.bfloat16)
    ids = tiny.token_ids(encoder)
    features = encoder.get_text_features(ids)
    assert features.shape == (len(ids), 8)
    assert features.dtype == encoder.text_model.dtype == torch.bfloat16
    torch.testing.assert_close(features, encoder(ids).text_embeds)
