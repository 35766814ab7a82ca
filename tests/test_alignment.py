import importlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from functools import partial

import diffusers
import numpy as np
import pytest
import tiny
import tiny_audio
import tiny_families
import torch
from accelerate import Accelerator
from PIL import Image

from textcond import ConditioningEncoder
from textcond.pipelines import loop, retrieval_encoder, swap_text_encoder
from textcond.pipelines.alignment import AlignmentOptions, align, read_prompts
from textcond.pipelines.alignment.attention import AttentionProbe
from textcond.pipelines.alignment.closed_form import RidgeRegression
from textcond.pipelines.alignment.losses import Statistics, contrast, regression
from textcond.pipelines.alignment.pictures import CaptionedPictures
from textcond.pipelines.alignment.rounds import effects, mixed, visited
from textcond.pipelines.alignment.teacher import TeacherStates
from textcond.pipelines.families import condition, denoiser_of
from textcond.pipelines.trajectories import Visit, replay

WORDS = ["red", "green", "blue", "big", "fox", "dog", "bird", "house", "tree", "apple", "in", "winter", "night"]
SIZE = {"height": 16, "width": 16}
SHORT = {
    "token_steps": 6, "denoiser_steps": 4, "validate_every": 3, "held_out": 8, "closed_form_prompts": 32,
    "num_inference_steps": 2, "batch_size": 8, "denoiser_batch_size": 4, "call": SIZE,
}  # fmt: skip


def prompts(count=60):
    rng = random.Random(0)
    return [" ".join(rng.sample(WORDS, 4)) for _ in range(count)]


# -- prompts ---------------------------------------------------------------------------------------------------------


def test_the_teacher_reads_english_and_the_student_both(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("a fox\n\na dog\t犬\na fox\tキツネ\na fox\n   \n", encoding="utf-8")
    found = read_prompts(file)
    assert found.teacher == ["a fox", "a dog"]
    assert found.rows == [(0, "a fox"), (1, "a dog"), (1, "犬"), (0, "キツネ")]


def test_a_held_out_prompt_leaves_with_its_translations():
    found = read_prompts([f"prompt {number}\tText {number}" for number in range(50)])
    training, held_out = found.split(10)
    assert len(held_out.teacher) == 10
    assert len(held_out.rows) == 20
    assert not set(training.teacher) & set(held_out.teacher)
    said = {text for _, text in training.rows}
    assert not said & {text for _, text in held_out.rows}
    longer = read_prompts([*(f"prompt {number}" for number in range(50)), "one more"])
    assert len(set(longer.split(10)[1].teacher) & set(held_out.teacher)) >= 9


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"fine\n\xff\xfe broken\n", "line 2 is not UTF-8"),
        (b"fine\n" + b"a" * 30_000 + b"\n", "line 2 has 30,000 characters"),
        (b"one\ttwo\tthree\n", "line 1 has 3 columns"),
        (b"\tzwei\n", "line 1 has a translation and no English"),
        (b"\n  \n", "holds no prompt"),
    ],
)
def test_a_bad_prompts_file_is_named_with_its_line(tmp_path, content, message):
    file = tmp_path / "prompts.txt"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_prompts(file)


def test_a_missing_prompts_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"gone\.txt"):
        read_prompts(tmp_path / "gone.txt")


# -- the teacher's states --------------------------------------------------------------------------------------------


def test_states_are_computed_once_and_read_back(tmp_path):
    pipe, texts = tiny.stable_diffusion_xl(), prompts(20)
    states = TeacherStates(pipe, texts, tmp_path, limit=1e9)
    first = states([3, 1, 3])
    fresh = condition(pipe, [texts[3], texts[1], texts[3]])
    for name, tensor in fresh.items():
        assert torch.allclose(first[name], tensor, atol=2e-3)
    assert np.flatnonzero(states.done).tolist() == [1, 3]
    with torch.no_grad():
        pipe.text_encoder.text_model.final_layer_norm.bias.add_(1.0) if hasattr(
            pipe.text_encoder, "text_model"
        ) else pipe.text_encoder.final_layer_norm.bias.add_(1.0)
    again = TeacherStates(pipe, texts, tmp_path, limit=1e9)([3, 1, 3])
    for name in fresh:
        assert torch.equal(first[name], again[name])


def test_beyond_its_limit_nothing_is_written(tmp_path):
    pipe, texts = tiny.stable_diffusion(), prompts(20)
    states = TeacherStates(pipe, texts, tmp_path, limit=2 * 77 * 32 * 2)
    assert states.kept == 2
    found = states([0, 10])["encoder_hidden_states"]
    assert torch.allclose(found, condition(pipe, [texts[0], texts[10]])["encoder_hidden_states"], atol=2e-3)
    assert np.flatnonzero(states.done).tolist() == [0]


def test_another_limit_makes_another_cache(tmp_path):
    pipe, texts = tiny.stable_diffusion(), prompts(20)
    TeacherStates(pipe, texts, tmp_path, limit=2 * 77 * 32 * 2)([0])
    states = TeacherStates(pipe, texts, tmp_path, limit=1e9)
    assert states.kept == 20
    found = states([0, 10])["encoder_hidden_states"]
    assert torch.allclose(found, condition(pipe, [texts[0], texts[10]])["encoder_hidden_states"], atol=2e-3)


def test_a_disk_without_room_is_told_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    with pytest.raises(ValueError, match="lower cache_limit, or give fewer prompts"):
        TeacherStates(tiny.stable_diffusion(), prompts(20), tmp_path, limit=1e9)


# -- losses ----------------------------------------------------------------------------------------------------------


def test_the_mean_answer_scores_one_and_the_teacher_itself_zero():
    states = {"tokens": torch.randn(500, 7, 16) * 3 + 5, "pooled": torch.randn(500, 8) * 0.1}
    known = {name: Statistics.of(tensor) for name, tensor in states.items()}
    constant = {name: facts.mean.expand(500, *facts.mean.shape) for name, facts in known.items()}
    assert regression(constant, states, known).mean().item() == pytest.approx(1, abs=1e-4)
    assert regression(states, states, known).abs().max() == 0
    fewer = {"tokens": states["tokens"].mean(1, keepdim=True), "pooled": states["pooled"]}
    assert regression(fewer, states, known).abs().max() < 1e-8


def test_contrast_is_small_for_the_right_pairs_and_forgives_translations():
    states = {"tokens": torch.randn(12, 7, 16)}
    known = {"tokens": Statistics.of(states["tokens"])}
    accelerator = Accelerator(cpu=True)
    rows = torch.arange(12)
    right = contrast(states, states, known, rows, accelerator)
    wrong = contrast({"tokens": states["tokens"].roll(1, 0)}, states, known, rows, accelerator)
    assert right < 0.1 < wrong
    # the same text twice, in two languages: neither is a negative of the other
    twice = {"tokens": states["tokens"].repeat(2, 1, 1)}
    forgiven = contrast(twice, twice, known, rows.repeat(2), accelerator)
    counted = contrast(twice, twice, known, torch.arange(24), accelerator)
    assert forgiven < 0.1 < counted


def test_the_ridge_regression_is_the_one_of_the_normal_equations():
    torch.manual_seed(0)
    inputs, weight, bias = torch.randn(400, 6), torch.randn(3, 6), torch.randn(3)
    targets = inputs @ weight.T + bias
    regression = RidgeRegression()
    for start in range(0, 400, 100):
        regression.add(inputs[start : start + 100].view(20, 5, 6), targets[start : start + 100].view(20, 5, 3))
    found, offset = regression.solve(penalty=1e-9)
    assert torch.allclose(found.float(), weight, atol=1e-4)
    assert torch.allclose(offset.float(), bias, atol=1e-4)
    shrunk, _ = regression.solve(penalty=1e3)
    assert shrunk.norm() < 0.01 * weight.norm()


def test_attention_reads_tokens_as_a_set():
    pipe = tiny.stable_diffusion()
    probe = AttentionProbe(pipe.unet, 32, queries=8, layers_at_once=9)
    generator = torch.Generator().manual_seed(0)
    with probe.listening(generator):
        visited(pipe, prompts(4), range(4), condition(pipe, [""]), num_inference_steps=2, guidance_scale=3.0, **SIZE)
    tokens = torch.randn(5, 9, 32, requires_grad=True)
    probe.calibrate(tokens)
    assert probe(tokens[:, torch.randperm(9)], tokens, generator).abs().max() < 1e-6
    loss = probe(tokens.roll(1, 0), tokens.detach(), generator)
    assert loss.min() > 0.1
    loss.sum().backward()
    assert tokens.grad.abs().sum() > 0


def test_a_probed_layer_answers_as_in_the_denoiser():
    pipe = tiny.stable_diffusion()
    probe = AttentionProbe(pipe.unet, 32, queries=4)
    layer = next(iter(probe.layers.values()))
    states, tokens = torch.randn(3, 4, layer.to_q.in_features), torch.randn(3, 9, 32)
    from textcond.pipelines.alignment.attention import _answers

    for row in range(3):
        ours = _answers(layer, layer.to_q(states[row]), tokens[row : row + 1])
        assert torch.allclose(ours, layer(states[row : row + 1], tokens[row : row + 1]), atol=1e-6)


# -- rounds ----------------------------------------------------------------------------------------------------------

PIPELINES = {
    "epsilon": tiny.stable_diffusion,
    "epsilon, pooled": tiny.stable_diffusion_xl,
    "velocity": tiny_families.stable_diffusion_2,
    "flow matching": tiny_families.stable_diffusion_3,
    "flow matching, distilled guidance": tiny_families.flux,
    "mask forwarded": tiny_families.pixart,
    "instruction before the prompt": tiny_families.sana,
}
# PixArt draws in the sizes that it was trained for; Flux's T5 slot would ask for 512 positions.
CALLS = {
    "mask forwarded": {"use_resolution_binning": False},
    "instruction before the prompt": {"use_resolution_binning": False, "height": 32, "width": 32},
}
SLOTS = {"flow matching, distilled guidance": "text_encoder"}


@pytest.mark.parametrize("kind", PIPELINES)
def test_the_teacher_answers_a_mixed_question_as_it_did_on_its_way(kind):
    pipe, texts = PIPELINES[kind](), prompts(4)
    empty = condition(pipe, [""])
    call = SIZE | CALLS.get(kind, {})
    visits = visited(pipe, texts, range(4), empty, num_inference_steps=3, guidance_scale=3.0, **call)
    visit = mixed(visits, np.array([0, 2, 1, 2]))
    answer = replay(denoiser_of(pipe), visit, condition(pipe, texts))
    for row, which in enumerate([0, 2, 1, 2]):
        assert torch.allclose(answer[row], visits[which].output[row], atol=1e-4)
    silent = replay(
        denoiser_of(pipe), visit, {name: tensor.expand(4, *tensor.shape[1:]) for name, tensor in empty.items()}
    )
    assert torch.allclose(silent, visit.unconditional, atol=1e-4)
    assert (effects(visits) > 0).all()


# -- pictures --------------------------------------------------------------------------------------------------------


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number, colour in enumerate(("red", "green", "blue")):
        Image.new("RGB", (20, 30), colour).save(folder / f"{number}.png")
    rows = [{"file_name": f"{number}.png", "text": f"picture {number}"} for number in range(3)]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.mark.parametrize("kind", ["epsilon", "velocity", "flow matching"])
def test_the_answer_to_a_noised_picture_leads_back_to_it(pictures, kind):
    pipe = PIPELINES[kind]()
    call = {"num_inference_steps": 2, "guidance_scale": 3.0, **SIZE}
    visit = visited(pipe, prompts(3), range(3), condition(pipe, [""]), **call)[0]
    found = CaptionedPictures(pipe, pictures)
    rows = np.array([2, 0, 1])
    question, answer = found.question(rows, visit, torch.Generator().manual_seed(0))
    assert found.texts(rows) == ["picture 2", "picture 0", "picture 1"]
    name = "sample" if "sample" in visit.inputs else "hidden_states"
    noisy, timestep = question.inputs[name], question.inputs["timestep"]
    clean = torch.cat([found._latents(pictures / f"{row}.png", noisy.shape[-2:]) for row in rows])
    if kind == "flow matching":
        recovered = noisy - timestep[:, None, None, None] / 1000 * answer
    else:
        alpha = pipe.scheduler.alphas_cumprod[timestep][:, None, None, None]
        if kind == "epsilon":
            recovered = (noisy - (1 - alpha).sqrt() * answer) / alpha.sqrt()
        else:
            recovered = alpha.sqrt() * noisy - (1 - alpha).sqrt() * answer
    assert torch.allclose(recovered, clean, atol=1e-3)
    assert replay(denoiser_of(pipe), question, condition(pipe, found.texts(rows))).shape == answer.shape


def test_in_bfloat16_the_first_steps_get_their_noise_too(pictures, monkeypatch):
    pipe, zeros = tiny.stable_diffusion(), torch.zeros(512, 4, 2, 2, dtype=torch.bfloat16)
    pipe.scheduler = diffusers.DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    monkeypatch.setattr(CaptionedPictures, "_latents", lambda self, file, size: zeros[:1].float())
    like = Visit({"sample": zeros, "timestep": torch.tensor(1)}, 1.0, zeros, None)
    asked, noise = CaptionedPictures(pipe, pictures).question(
        np.zeros(512, int), like, torch.Generator().manual_seed(0)
    )
    added = (asked.inputs["sample"].float() / noise.float()).flatten(1).median(1).values
    alphas = pipe.scheduler.alphas_cumprod[asked.inputs["timestep"]]
    torch.testing.assert_close(added, (1 - alphas).sqrt(), rtol=0.02, atol=0)


def test_captioned_pictures_change_what_is_learned(tmp_path, pictures):
    options = AlignmentOptions(**SHORT | {"token_steps": 0})
    weights = [
        align(tiny.stable_diffusion(), tiny.text_encoder("bert"), prompts(), tmp_path / name, options, pictures=folder)
        for name, folder in {"with": pictures, "without": None}.items()
    ]
    one, two = (model.bridge.out_proj.weight for model in weights)
    assert not torch.equal(one, two)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("not json", "line 2: give"),
        ('{"file_name": "0.png"}', "line 2: give"),
        ('{"file_name": "gone.png", "text": "x"}', r"line 2: there is no picture .*gone\.png"),
    ],
)
def test_a_bad_line_of_the_pictures_is_named(pictures, line, message):
    good = '{"file_name": "0.png", "text": "x"}'
    (pictures / "metadata.jsonl").write_text(f"{good}\n{line}\n")
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        CaptionedPictures(tiny.stable_diffusion(), pictures)


# -- the whole -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", PIPELINES)
def test_every_kind_of_denoiser_is_aligned_and_the_folder_swaps_in(tmp_path, kind):
    pipe = PIPELINES[kind]()
    options = AlignmentOptions(**SHORT | {"call": SIZE | CALLS.get(kind, {}), "slot": SLOTS.get(kind)})
    # Sana's instruction is longer than this BERT reads.
    text_encoder = tiny.text_encoder("t5" if isinstance(pipe, diffusers.SanaPipeline) else "bert")
    align(pipe, text_encoder, prompts(), tmp_path / "aligned", options)
    swap_text_encoder(pipe, tmp_path / "aligned", options.slot)
    assert tiny_families.generate(pipe, "a red fox").isfinite().all()


def test_a_growing_bridge_is_aligned_by_all_steps(tmp_path):
    pipe = tiny.stable_diffusion()
    texts = prompts() + [" ".join(WORDS[number:] * 4) for number in range(6)]
    given = {"bridge": "resampler", "width": 32, "tokens": 77, "chunk": 20, "prompt_length": 60, "bridge_depth": 1}
    distances = []
    for steps in (0, 30):
        encoder = ConditioningEncoder.from_text_encoder(tiny.text_encoder("t5"), **given)
        options = SHORT | {"token_steps": steps, "denoiser_steps": steps // 8}
        align(pipe, encoder, texts, tmp_path / str(steps), AlignmentOptions(**options))
        distances.append(held_out(tmp_path / str(steps)))
    assert distances[1] < distances[0]
    swap_text_encoder(pipe, tmp_path / "30")
    assert pipe.encode_prompt([texts[-1]], "cpu", 1, False)[0].shape[1] > 77
    assert tiny.generate(pipe).isfinite().all()


def test_a_bfloat16_pipeline_trains_float32_weights(tmp_path):
    options = AlignmentOptions(**SHORT | {"token_steps": 40, "denoiser_steps": 4, "learning_rate": 1e-3})
    distances = []
    for dtype in (torch.float32, torch.bfloat16):
        pipe, text_encoder = tiny.stable_diffusion().to(dtype), tiny.text_encoder("bert")
        before = text_encoder.backbone.get_input_embeddings().weight.clone()
        encoder = align(pipe, text_encoder, prompts(), tmp_path / str(dtype), options)
        assert encoder.dtype == torch.float32
        assert torch.equal(text_encoder.backbone.get_input_embeddings().weight, before)
        swap_text_encoder(pipe, tmp_path / str(dtype))
        assert pipe.text_encoder.dtype == dtype
        assert tiny.generate(pipe).isfinite().all()
        distances.append(held_out(tmp_path / str(dtype)))
    assert distances[1] == pytest.approx(distances[0], rel=0.1)


def test_a_bfloat16_pipeline_leaves_every_value_of_the_encoder(tmp_path):
    pipe, text_encoder = tiny.stable_diffusion().to(torch.bfloat16), tiny.text_encoder("mistral")
    values = {name: value.clone() for name, value in text_encoder.backbone.named_buffers()}
    assert values  # of rotary positions, which no state_dict has
    none = {"token_steps": 0, "denoiser_steps": 0, "closed_form_prompts": 0}
    align(pipe, text_encoder, prompts(), tmp_path, AlignmentOptions(**SHORT | none))
    assert all(torch.equal(value, values[name]) for name, value in text_encoder.backbone.named_buffers())
    narrow = ConditioningEncoder.from_text_encoder(text_encoder, width=16, tokens=77)
    with pytest.raises(ValueError, match="16"):
        align(pipe, narrow, prompts(), tmp_path / "other", AlignmentOptions(**SHORT))
    assert narrow.dtype == torch.float32


def test_a_pipeline_is_aligned_to_its_own_encoder_and_keeps_it(tmp_path):
    pipe = tiny.stable_diffusion()
    before = {name: value.clone() for name, value in pipe.text_encoder.state_dict().items()}
    options = AlignmentOptions(**SHORT | {"train_backbone": True})
    align(pipe, retrieval_encoder(pipe), prompts(), tmp_path, options)
    after = pipe.text_encoder.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert all(parameter.requires_grad for parameter in pipe.text_encoder.parameters())


def test_a_float16_pipeline_is_told_what_to_load(tmp_path):
    pipe = tiny.stable_diffusion().to(torch.float16)
    with pytest.raises(ValueError, match="load the pipeline in bfloat16 or float32"):
        align(pipe, tiny.text_encoder("bert"), prompts(), tmp_path, AlignmentOptions(**SHORT))
    assert not list(tmp_path.iterdir())


def test_a_compiled_denoiser_is_aligned_like_its_own_layers(tmp_path):
    plain, compiled = tiny.stable_diffusion(), tiny.stable_diffusion()
    compiled.unet = torch.compile(compiled.unet, backend="eager")
    tiny.generate(compiled)  # hooks of later on are not seen by what was compiled
    options = AlignmentOptions(**SHORT)
    weights = [
        align(pipe, tiny.text_encoder("bert"), prompts(), tmp_path / name, options).state_dict()
        for name, pipe in {"plain": plain, "compiled": compiled}.items()
    ]
    assert hasattr(compiled.unet, "_orig_mod")
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.parametrize(
    "make",
    [
        tiny_families.refiner,
        lambda: diffusers.StableDiffusionImg2ImgPipeline.from_pipe(tiny.stable_diffusion()),
        partial(tiny_families.flux, "Img2Img"),
    ],
    ids=["refiner", "image to image", "flux image to image"],
)
def test_a_pipeline_that_starts_from_a_picture_is_aligned_from_noise(tmp_path, make):
    pipe = make()
    options = AlignmentOptions(**SHORT | {"learning_rate": 1e-3})
    align(pipe, tiny.text_encoder("t5"), prompts(300), tmp_path / "aligned", options)
    none = AlignmentOptions(**SHORT | {"token_steps": 0, "denoiser_steps": 0, "closed_form_prompts": 0})
    align(pipe, tiny.text_encoder("t5"), prompts(300), tmp_path / "none", none)
    assert held_out(tmp_path / "aligned") < held_out(tmp_path / "none")
    swap_text_encoder(pipe, tmp_path / "aligned")
    start = Image.new("RGB", (16, 16), "gray")
    assert np.isfinite(pipe(prompt="a fox", image=start, num_inference_steps=4, output_type="np").images).all()


def test_a_pipeline_that_follows_a_picture_names_the_one_to_align_to(tmp_path):
    pipe = diffusers.StableDiffusionInpaintPipeline.from_pipe(tiny.stable_diffusion())
    with pytest.raises(ValueError, match=r"StableDiffusionInpaintPipeline follows a picture.*text-to-image"):
        align(pipe, tiny.text_encoder("bert"), prompts(), tmp_path, AlignmentOptions(**SHORT))
    assert not list(tmp_path.iterdir())


def test_a_timestep_aware_connector_is_aligned_and_comes_with_the_folder(tmp_path):
    pipe = tiny.stable_diffusion(width=48)  # the backbone is 32 wide
    unet = pipe.unet
    none = SHORT | {"bridge": "timestep", "token_steps": 0, "denoiser_steps": 0}
    align(pipe, tiny.text_encoder("bert"), prompts(), tmp_path / "start", AlignmentOptions(**none))
    options = SHORT | {"bridge": "timestep", "token_steps": 30, "denoiser_steps": 12}
    align(pipe, tiny.text_encoder("bert"), prompts(), tmp_path / "aligned", AlignmentOptions(**options))
    assert pipe.unet is unet
    assert held_out(tmp_path / "aligned") < held_out(tmp_path / "start")
    before = swap_text_encoder(pipe, tmp_path / "aligned")
    assert type(pipe.unet).__name__ == "TimestepAwareUNet"
    assert pipe.unet.connector.blocks[0].modulation.weight.abs().sum() > 0
    assert tiny.generate(pipe).isfinite().all()
    pipe.register_modules(**before)
    assert pipe.unet is unet


def held_out(folder):
    return json.loads((folder / "alignment.json").read_text())["held_out_distance"]


def test_alignment_beats_an_untrained_bridge_on_held_out_prompts(tmp_path):
    pipe = tiny.stable_diffusion()
    own = pipe.text_encoder
    none = AlignmentOptions(**SHORT | {"token_steps": 0, "denoiser_steps": 0, "closed_form_prompts": 0})
    solved = AlignmentOptions(**SHORT | {"token_steps": 0, "denoiser_steps": 0, "closed_form_prompts": 256})
    trained = AlignmentOptions(**SHORT | {"token_steps": 60, "denoiser_steps": 10, "closed_form_prompts": 256})
    distances = []
    for name, options in {"none": none, "solved": solved, "trained": trained}.items():
        align(pipe, tiny.text_encoder("bert"), prompts(300), tmp_path / name, options)
        distances.append(held_out(tmp_path / name))
    assert distances[0] > distances[1] > distances[2]
    assert pipe.text_encoder is own
    assert all(parameter.requires_grad for parameter in pipe.unet.parameters())


def test_a_killed_alignment_goes_on_to_the_same_weights(tmp_path, monkeypatch):
    options = AlignmentOptions(**SHORT)

    def run(out):
        return align(tiny.stable_diffusion(), tiny.text_encoder("bert"), prompts(), out, options)

    whole = run(tmp_path / "whole")
    from textcond.pipelines.alignment.align import Aligner

    for stage, at in [("_token_step", 4), ("_denoiser_step", 3)]:
        step_of = getattr(Aligner, stage)

        def cut(self, module, step, at=at, step_of=step_of):
            if step == at:
                raise KeyboardInterrupt
            return step_of(self, module, step)

        with monkeypatch.context() as patch:
            patch.setattr(Aligner, stage, cut)
            with pytest.raises(KeyboardInterrupt):
                run(tmp_path / "cut")
    resumed = run(tmp_path / "cut")
    for (name, one), two in zip(whole.state_dict().items(), resumed.state_dict().values()):
        assert torch.equal(one, two), name
    assert not (tmp_path / "cut" / "alignment" / "teacher").exists()


def test_each_stage_learns_at_its_own_rate(tmp_path, monkeypatch):
    rates = {}

    def fit(name, *arguments, learning_rate, adam_rate, **options):
        rates[name] = (learning_rate, adam_rate)
        return loop.fit(name, *arguments, learning_rate=learning_rate, adam_rate=adam_rate, **options)

    monkeypatch.setattr(importlib.import_module("textcond.pipelines.alignment.align"), "fit", fit)
    options = AlignmentOptions(**SHORT | {"learning_rate": 2e-3, "denoiser_learning_rate": 1e-5})
    align(tiny.stable_diffusion(), tiny.text_encoder("bert"), prompts(), tmp_path, options)
    assert rates == {"tokens": (2e-3, 1e-3), "denoiser": (1e-5, 1e-5)}


def test_a_folder_begun_otherwise_is_refused(tmp_path):
    align(tiny.stable_diffusion(), tiny.text_encoder("bert"), prompts(), tmp_path, AlignmentOptions(**SHORT))
    other = AlignmentOptions(**SHORT | {"learning_rate": 0.5})
    with pytest.raises(ValueError, match="begun with another learning_rate"):
        align(tiny.stable_diffusion(), tiny.text_encoder("bert"), prompts(), tmp_path, other)
    another = tiny.text_encoder("bert")
    with torch.no_grad():
        another.backbone.get_input_embeddings().weight.mul_(2)
    with pytest.raises(ValueError, match="begun with another encoder"):
        align(tiny.stable_diffusion(), another, prompts(), tmp_path, AlignmentOptions(**SHORT))
    pipe = tiny.stable_diffusion()
    pipe.scheduler = diffusers.LCMScheduler.from_config(pipe.scheduler.config)
    with torch.no_grad():
        pipe.unet.conv_out.bias.add_(1)
    with pytest.raises(ValueError, match="begun with another denoiser, scheduler"):
        align(pipe, tiny.text_encoder("bert"), prompts(), tmp_path, AlignmentOptions(**SHORT))
    with pytest.raises(ValueError, match="begun with another prompts"):
        align(tiny.stable_diffusion(), tiny.text_encoder("bert"), prompts(50), tmp_path, AlignmentOptions(**SHORT))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"clip_skip": 1}, "clip_skip in the call"),
        ({"guidance_scale": 3.0}, "guidance_scale in the call"),
        ({"latents": torch.zeros(1)}, "cannot be kept"),
        ({"depth": 3}, "takes no depth"),
    ],
)
def test_a_call_that_would_change_the_question_is_refused(tmp_path, call, message):
    options = AlignmentOptions(**SHORT | {"call": SIZE | call})
    with pytest.raises(ValueError, match=message):
        align(tiny.stable_diffusion(), tiny.text_encoder("bert"), prompts(), tmp_path, options)
    assert not list(tmp_path.iterdir())


def test_tuples_in_the_call_are_the_same_when_it_goes_on(tmp_path):
    pipe = tiny.stable_diffusion_xl()
    options = AlignmentOptions(**SHORT | {"call": SIZE | {"original_size": (16, 16)}})
    align(pipe, tiny.text_encoder("bert"), prompts(), tmp_path, options)
    align(pipe, tiny.text_encoder("bert"), prompts(), tmp_path, options)


def test_a_call_that_failed_leaves_the_folder_to_the_mended_one(tmp_path):
    options = SHORT | {"call": {"height": 13, "width": 16}}
    with pytest.raises(ValueError, match="divisible by 8"):
        align(tiny.stable_diffusion(), tiny.text_encoder("bert"), prompts(), tmp_path, AlignmentOptions(**options))
    align(tiny.stable_diffusion(), tiny.text_encoder("bert"), prompts(), tmp_path, AlignmentOptions(**SHORT))


@pytest.mark.parametrize("change", [{"lora_rank": 4}, {"train_backbone": True}])
def test_what_changes_the_backbone_leaves_its_embeddings(change, tmp_path):
    encoder = tiny.text_encoder("bert")
    before = {name: tensor.clone() for name, tensor in encoder.backbone.state_dict().items()}
    options = AlignmentOptions(**SHORT | change)
    align(tiny.stable_diffusion(), encoder, prompts(), tmp_path, options)
    saved = ConditioningEncoder.from_pretrained(tmp_path).backbone.state_dict()
    assert saved.keys() <= before.keys()
    changed = [name for name, tensor in saved.items() if not torch.equal(tensor, before[name])]
    assert any("query" in name for name in changed)
    assert not any("_embeddings" in name for name in changed)


def test_a_changing_backbone_keeps_the_vectors_of_its_anchors(tmp_path):
    anchors = [f"{word} {place}" for word in ("harbour", "lighthouse", "ferry", "gull") for place in ("north", "east")]
    before = tiny.text_encoder("bert").encode(anchors)
    cosines = []
    for weight in (0.0, 10.0):
        steps = {"token_steps": 12, "denoiser_steps": 0, "validate_every": 12}  # one score: the last weights are kept
        options = AlignmentOptions(**SHORT | steps | {"train_backbone": True, "retrieval_weight": weight})
        out = tmp_path / str(weight)
        made = align(tiny.stable_diffusion(), tiny.text_encoder("bert"), prompts(), out, options, anchors=anchors)
        cosines.append((made.text_encoder.encode(anchors) * before).sum(1).mean())
    assert cosines[0] < cosines[1]
    with pytest.raises(ValueError, match="begun with another anchors"):
        align(tiny.stable_diffusion(), tiny.text_encoder("bert"), prompts(), out, options)


def test_another_number_of_tokens_is_aligned_by_all_steps(tmp_path):
    options = AlignmentOptions(**SHORT | {"tokens": 16, "closed_form_prompts": 8})
    made = align(tiny.stable_diffusion(), tiny.text_encoder("bert"), prompts(), tmp_path, options)
    assert made.config.tokens == 16


def test_without_an_adapter_the_backbone_stays_bit_for_bit(tmp_path):
    encoder = tiny.text_encoder("bert")
    before = {name: tensor.clone() for name, tensor in encoder.backbone.state_dict().items()}
    made = align(tiny.stable_diffusion(), encoder, prompts(), tmp_path, AlignmentOptions(**SHORT))
    for name, tensor in made.backbone.state_dict().items():
        assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"guidance_scale": (0.5, 2.0)}, "guidance_scale=0.5,2.0"),
        ({"guidance_scale": (2.0, float("inf"))}, "guidance_scale=2.0,inf"),
        ({"seed": -1}, "seed=-1: give 0 or more"),
        ({"bridge_depth": 0}, "bridge_depth=0: give 1 or more"),
        ({"patience": 0}, "patience=0: give 1 or more"),
        ({"learning_rate": float("nan")}, "learning_rate=nan: give a positive number"),
        ({"bridge": "bride"}, "bridge='bride': use linear, mlp, resampler or timestep"),
        ({"layers": "zz"}, "layers='zz': use last or average"),
        ({"token_steps": -1}, "token_steps=-1"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"lora_rank": 2, "train_backbone": True}, "give one of them"),
        ({"mixed_precision": "fp8"}, "mixed_precision='fp8'"),
    ],
)
def test_a_bad_option_is_named(option, message):
    with pytest.raises(ValueError, match=message):
        AlignmentOptions(**option)


def test_a_guidance_of_one_asks_for_the_empty_prompt_by_itself(tmp_path):
    options = AlignmentOptions(**SHORT | {"guidance_scale": (1.0, 1.0)})
    align(tiny.stable_diffusion(), tiny.text_encoder("bert"), prompts(), tmp_path, options)
    assert np.isfinite(held_out(tmp_path))


def test_two_processes_give_the_weights_of_one(tmp_path):
    script = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", __file__]
    one = align_for_processes(tmp_path / "one").state_dict()
    done = subprocess.run(
        [*script, str(tmp_path / "two")], capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-2000:]
    two = ConditioningEncoder.from_pretrained(tmp_path / "two").state_dict()
    start = align_for_processes(tmp_path / "start", token_steps=0, denoiser_steps=0).state_dict()
    trained = [name for name in two if not torch.equal(one[name], start[name])]
    assert any("query" in name for name in trained)
    apart = torch.cat([(two[name] - one[name]).flatten() for name in trained]).norm()
    moved = torch.cat([(start[name] - one[name]).flatten() for name in trained]).norm()
    # A last-bit difference can cross a bfloat16 rounding inside Muon.
    assert apart < 0.05 * moved


def align_for_processes(out, **changes):
    # Small steps, so that both runs find the same weights best.
    options = AlignmentOptions(
        **SHORT | {"contrast_weight": 1.0, "learning_rate": 1e-3, "denoiser_batch_size": 8} | changes,
        train_backbone=True,
    )
    return align(tiny.stable_diffusion(), tiny.text_encoder("bert"), prompts(), out, options)


@pytest.mark.slow
def test_a_polite_kill_leaves_a_checkpoint_that_goes_on(tmp_path):
    child = subprocess.Popen([sys.executable, __file__, str(tmp_path / "out"), "100000"], stderr=subprocess.PIPE)
    checkpoint = tmp_path / "out" / "alignment" / "tokens" / "log.jsonl"
    for _ in range(600):
        if checkpoint.exists():
            break
        time.sleep(0.1)
    child.send_signal(signal.SIGTERM)
    child.wait(60)
    mark = json.loads((tmp_path / "out" / "alignment" / "tokens" / "checkpoint" / "step.json").read_text())
    assert mark["step"] >= 100


if __name__ == "__main__":
    from pathlib import Path

    align_for_processes(Path(sys.argv[1]), **({"token_steps": int(sys.argv[2])} if len(sys.argv) > 2 else {}))


def test_a_connector_for_sdxl_is_aligned_through_one_encoder(tmp_path):
    pipe = tiny.stable_diffusion_xl()
    options = AlignmentOptions(**SHORT | {"bridge": "timestep", "token_steps": 2, "denoiser_steps": 2})
    align(pipe, tiny.text_encoder("bert"), prompts(), tmp_path / "aligned", options)
    swap_text_encoder(pipe, tmp_path / "aligned")
    assert tiny.generate(pipe).isfinite().all()


def test_held_out_prompts_leave_those_that_are_trained_on(tmp_path):
    given, kept = prompts(), prompts()[:4]
    training = read_prompts(given).without(kept)
    assert set(training.teacher) == set(given) - set(kept)
    with pytest.raises(ValueError, match="leaves none to train on"):
        read_prompts(kept).without(given)
    options = AlignmentOptions(**SHORT | {"token_steps": 1, "denoiser_steps": 0})
    with pytest.raises(ValueError, match="leaves none to train on"):
        align(tiny.stable_diffusion(), tiny.text_encoder("bert"), kept, tmp_path, options, held_out=given)


@pytest.mark.parametrize(
    ("changes", "given", "message"),
    [
        ({}, {"anchors": ["a gull"]}, "give train_backbone or lora_rank"),
        ({"denoiser_steps": 0}, {"pictures": "nowhere"}, "pictures are read in denoiser steps"),
        ({"bridge": "mlp"}, {"encoder": "conditioning"}, "bridge='mlp', and the encoder goes on with"),
        ({"tokens": 5}, {"encoder": "conditioning"}, "tokens=5, and the encoder goes on with"),
        ({}, {"encoder": "identity"}, "read through a connector"),
        ({"call": {"hieght": 16}}, {}, "takes no hieght"),
        ({"bridge": "timestep"}, {"pipe": tiny_families.flux}, "before a UNet2DConditionModel"),
        ({}, {"pipe": tiny_audio.musicldm}, "cannot teach: .*mend_clap"),
    ],
)
def test_what_would_fail_later_or_be_ignored_is_refused_at_once(tmp_path, changes, given, message):
    pipe = given.pop("pipe", tiny.stable_diffusion)()
    encoders = {"identity": partial(tiny.conditioning, bridge="identity"), "conditioning": tiny.conditioning}
    make = encoders.get(given.get("encoder"), tiny.text_encoder)
    given = {name: value for name, value in given.items() if name != "encoder"}
    with pytest.raises(ValueError, match=message):
        align(pipe, make(), prompts(), tmp_path / "out", AlignmentOptions(**SHORT | changes), **given)
    assert not (tmp_path / "out" / "alignment").exists()


def test_pictures_are_refused_at_once_where_latents_are_packed(pictures):
    with pytest.raises(ValueError, match="FluxPipeline has no plain latents"):
        CaptionedPictures(tiny_families.flux(), pictures)
