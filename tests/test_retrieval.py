from dataclasses import dataclass, field, replace
from functools import partial

import pytest
import tiny_audio
import torch
from tiny import stable_diffusion, stable_diffusion_xl, text_encoder
from tiny_families import PIPELINES, generate

from textcond import PromptIndex
from textcond.pipelines import load_reference, swap_text_encoder
from textcond.pipelines.audio import mend_clap
from textcond.pipelines.reference import open_reference_index
from textcond.pipelines.retrieval import TEMPERATURE, blend, expand, retrieve, suggest
from textcond.pipelines.swap import make_encoder

TEXTS = [
    "a red fox, noto style, on a green background",
    "a fox, noto style, soft light",
    "a dog in the snow, blob style",
    "a green bird",
    "two birds, watercolor, night",
    "a house by the sea, noto style",
]
IMAGES = {
    "sd": stable_diffusion,
    "sd-img2img": partial(stable_diffusion, "Img2Img"),
    "sd-controlnet": partial(stable_diffusion, controlnet=True),
    "sdxl": stable_diffusion_xl,
    "sdxl-img2img": partial(stable_diffusion_xl, "Img2Img"),
    **PIPELINES,
}
# One of each family that makes pictures, whose slots one encoder of ours can fill.
FAMILIES = ("sd", "sdxl", "sd3", "flux", "pixart-alpha", "sana")


def quick_for(*names):
    """Every pipeline, those not named as slow tests."""
    return [pytest.param(name, marks=() if name in names else pytest.mark.slow) for name in IMAGES]


@dataclass
class Near:
    """What of a hit is read."""

    text: str
    score: float = 0.9
    metadata: dict = field(default_factory=dict)


@pytest.fixture(scope="module")
def index():
    found = PromptIndex(text_encoder())
    found.add(TEXTS, [{"place": place} for place in range(len(TEXTS))])
    return found


@pytest.fixture(scope="module")
def pipe():
    return stable_diffusion()


def music():
    pipe = tiny_audio.musicldm()
    mend_clap(pipe)
    return pipe


def with_ours(name):
    pipe = IMAGES[name]()
    swap_text_encoder(pipe, make_encoder(pipe, text_encoder("t5"), bridge_depth=1))
    return pipe


def drawn(pipe, arguments, **options):
    """A picture by the arguments of a retrieval; `generate` itself passes a prompt."""
    return generate(pipe, **{"prompt": None, **arguments, **options})


# retrieve


class Unsearchable:
    def search(self, *args, **kwargs):
        raise AssertionError("searched")


@pytest.mark.parametrize("prompt", ["a red fox", ["a red fox", "a dog"]])
def test_off_looks_nothing_up_and_passes_the_prompt_on(pipe, prompt):
    found = retrieve(pipe, Unsearchable(), prompt)
    assert found.arguments == {"prompt": prompt}
    assert found.prompt == prompt
    assert found.hits == ([] if isinstance(prompt, str) else [[], []])


def test_suggest_gives_neighbours_and_leaves_the_prompt_alone(pipe, index):
    found = retrieve(pipe, index, "a fox", "suggest", k=3)
    assert found.arguments == {"prompt": "a fox"}
    assert [hit.metadata["place"] for hit in found.hits] == [TEXTS.index(hit.text) for hit in found.hits]
    assert len(found.hits) == 3


def test_a_prompt_is_not_its_own_neighbour_and_scores_are_cosines(index):
    hits = suggest(index, TEXTS[3].upper(), 10)
    assert sorted(hit.text for hit in hits) == sorted(TEXTS[:3] + TEXTS[4:])
    one, other = index.encoder.encode([TEXTS[3].upper()], kind="query")[0], index.encoder.encode([hits[0].text])[0]
    cosine = one @ other / (one @ one) ** 0.5 / (other @ other) ** 0.5
    assert hits[0].score == pytest.approx(float(cosine), abs=1e-5)


@pytest.mark.parametrize("mode", ["suggest", "expand", "blend"])
def test_an_empty_prompt_has_no_neighbours(pipe, index, mode):
    found = retrieve(pipe, index, ["", "  "], mode, strength=1.0)
    assert found.hits == [[], []]
    assert found.arguments == {"prompt": ["", "  "]}


@pytest.mark.parametrize("mode", ["suggest", "expand", "blend"])
@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3", "flux"])
def test_strength_0_is_bit_identical_to_off(index, name, mode):
    pipe = IMAGES[name]()
    off, zero = (retrieve(pipe, index, "a fox", one, strength=0) for one in ("off", mode))
    assert len(zero.hits) == 5
    assert torch.equal(drawn(pipe, off.arguments), drawn(pipe, zero.arguments))


def test_expand_passes_the_longer_text_on(pipe, index):
    found = retrieve(pipe, index, ["a fox", "a cat in noto style"], "expand", strength=1.0)
    assert found.arguments == {"prompt": found.prompt}
    assert found.prompt[0].startswith("a fox, ")
    assert "noto" not in found.prompt[1].removeprefix("a cat in noto style")
    single = retrieve(pipe, index, "a fox", "expand", strength=1.0)
    assert single.prompt == found.prompt[0]
    assert [hit.text for hit in single.hits] == [hit.text for hit in found.hits[0]]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"mode": "mix"}, ValueError, "no mode 'mix': choose from off, suggest, expand, blend"),
        ({"mode": "blend", "strength": 1.5}, ValueError, "strength is 1.5"),
        ({"mode": "expand", "strength": float("nan")}, ValueError, "strength is nan"),
        ({"mode": "suggest", "k": 0}, ValueError, "k=0"),
        ({"mode": "blend", "prompt": [None]}, TypeError, "a prompt is None"),
    ],
)
def test_bad_options_are_named(pipe, index, options, error, message):
    with pytest.raises(error, match=message):
        retrieve(pipe, index, **{"prompt": "a fox"} | options)


def test_prompts_and_hits_must_be_as_many(pipe):
    with pytest.raises(ValueError, match="2 prompts with 1 lists of hits"):
        blend(pipe, ["a fox", "a dog"], [[Near("a cat")]])


# blend


@pytest.mark.parametrize("name", quick_for(*FAMILIES))
def test_full_strength_with_one_neighbour_is_that_neighbour_s_picture_with_the_same_negative(name):
    pipe = IMAGES[name]()
    arguments = blend(pipe, "a fox", [Near("a green bird")], 1.0)
    guided = {"negative_prompt": "a dog"} | ({"true_cfg_scale": 3.0} if name in ("flux", "flux-img2img") else {})
    if name.startswith("flux") and "true_cfg_scale" not in guided:
        guided = {}
    picture, wanted = drawn(pipe, arguments, **guided), generate(pipe, "a green bird", **guided)
    assert torch.allclose(picture, wanted, atol=1e-5)
    assert not torch.allclose(picture, generate(pipe, "a fox", **guided), atol=1e-5)


@pytest.mark.parametrize(
    ("name", "ours"),
    [
        pytest.param(name, ours, marks=() if ours == (name in ("sd", "flux", "pixart-alpha")) else pytest.mark.slow)
        for name in (*FAMILIES, "flux-img2img")
        for ours in (False, True)
    ],
)
def test_batches_negatives_and_several_pictures_of_a_prompt(index, name, ours):
    pipe = with_ours(name) if ours else IMAGES[name]()
    prompts = ["a fox", "a dog"]
    found = retrieve(pipe, index, prompts, "blend", strength=0.4, k=2)
    guided = {"true_cfg_scale": 3.0} if "flux" in name else {}
    negative, each = ["", "a cat"], ["", "", "a cat", "a cat"]
    one = drawn(pipe, found.arguments, negative_prompt=negative, **guided)
    assert len(one) == 2
    several = retrieve(pipe, index, prompts, "blend", strength=0.4, k=2, pictures=2).arguments
    repeated = name not in ("sd", "sdxl", "pixart-alpha")
    pictures = drawn(pipe, several, negative_prompt=each if repeated else negative, **guided)
    plain = generate(pipe, prompts, num_images_per_prompt=2, negative_prompt=negative, **guided)
    assert pictures.shape == plain.shape
    assert pictures.isfinite().all()
    assert (pictures - plain).abs().amax(dim=(1, 2, 3)).min() > 1e-5
    # The same blend from the same noise, whichever way the pictures are counted.
    wanted = retrieve(pipe, index, [text for text in prompts for _ in range(2)], "blend", strength=0.4, k=2).arguments
    assert torch.allclose(pictures, drawn(pipe, wanted, negative_prompt=each, **guided), atol=1e-4)
    off = retrieve(pipe, index, prompts, pictures=2).arguments
    assert torch.equal(drawn(pipe, off, negative_prompt=negative, **guided), plain)
    for place, prompt in enumerate(prompts):
        alone = retrieve(pipe, index, prompt, "blend", strength=0.4, k=2).arguments
        for argument, values in found.arguments.items():
            assert torch.allclose(values[[place]].float(), alone[argument].float(), atol=1e-4)
    assert all(values.dtype != torch.float64 and not values.requires_grad for values in found.arguments.values())


@pytest.mark.parametrize("make", [tiny_audio.audioldm2, music, tiny_audio.stable_audio])
def test_full_strength_with_one_neighbour_is_that_neighbour_s_sound(index, make):
    pipe = make()
    arguments = blend(pipe, "drums", [Near("rain on a tin roof")], 1.0)
    # AudioLDM2 pads to the longest of a batch, and its mask says so.
    sound, wanted = tiny_audio.waveforms(pipe, None, **arguments), tiny_audio.waveforms(pipe, "rain on a tin roof")
    assert (sound - wanted).abs().max() <= 1e-3 * wanted.abs().max()
    other = tiny_audio.waveforms(pipe, "drums")
    assert (sound - other).abs().max() > 1e-2 * wanted.abs().max()
    several = retrieve(pipe, index, ["drums", "a dog"], "blend", pictures=2)
    sounds = tiny_audio.waveforms(pipe, None, **several.arguments)
    assert len(sounds) == 4
    assert sounds.isfinite().all()


def encoded(pipe, text):
    with torch.no_grad():
        return pipe.encode_prompt(text, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False)


def test_a_blend_is_the_mean_by_strength_and_softmaxed_similarity_pooled_vectors_included():
    pipe = stable_diffusion_xl()
    hits = [Near("a dog", 0.9), Near("a cat", 0.9 - TEMPERATURE * torch.log(torch.tensor(3.0)).item())]
    mixed = blend(pipe, "a fox", hits, 0.4)
    parts = [encoded(pipe, text) for text in ("a fox", "a dog", "a cat")]
    for name, place in (("prompt_embeds", 0), ("pooled_prompt_embeds", 2)):
        fox, dog, cat = (part[place] for part in parts)
        assert torch.allclose(mixed[name], 0.6 * fox + 0.3 * dog + 0.1 * cat, atol=1e-5)
    assert mixed.keys() == {"prompt_embeds", "pooled_prompt_embeds"}


def test_a_mask_is_the_prompt_s_own_below_a_half_and_each_token_is_mixed_of_the_texts_that_reach_it():
    pipe = PIPELINES["pixart-alpha"]()
    with torch.no_grad():
        (short, long), (own, other), _, _ = pipe.encode_prompt(["a fox", "a green bird at night"], False)
    assert own.sum() < other.sum()
    kept, taken = (blend(pipe, "a fox", [Near("a green bird at night")], strength) for strength in (0.3, 0.7))
    assert torch.equal(kept["prompt_attention_mask"][0], own)
    assert torch.equal(taken["prompt_attention_mask"][0], other)
    both, beyond = own.bool(), other.bool() & ~own.bool()
    assert torch.allclose(kept["prompt_embeds"][0][both], 0.7 * short[both] + 0.3 * long[both], atol=1e-5)
    assert torch.allclose(taken["prompt_embeds"][0][beyond], long[beyond], atol=1e-5)
    # A shorter neighbour leaves the end of the prompt whole.
    cut = blend(pipe, "a green bird at night", [Near("a fox")], 0.3)
    assert torch.equal(cut["prompt_attention_mask"][0], other)
    assert torch.allclose(cut["prompt_embeds"][0][beyond], long[beyond], atol=1e-5)
    assert cut["prompt_embeds"].isfinite().all()


def test_a_blend_keeps_the_pipeline_s_dtype():
    pipe = stable_diffusion_xl().to(torch.bfloat16)
    assert {values.dtype for values in blend(pipe, "a fox", [Near("a dog")], 0.5).values()} == {torch.bfloat16}


def test_a_prompt_without_hits_stays_itself_in_a_batch(pipe):
    mixed = blend(pipe, ["a fox", ""], [[Near("a dog")], []], 0.5)
    assert torch.allclose(mixed["prompt_embeds"][1], encoded(pipe, "")[0][0], atol=1e-5)


# expand


def expanded(pipe, prompt, *texts, strength=1.0):
    return expand(pipe, prompt, [Near(text) for text in texts], strength)


def test_strength_says_how_many_neighbours_must_agree(pipe):
    texts = ["a cat, noto style, soft light", "a dog, noto style", "a cow, noto style", "a pig, red"]
    assert expanded(pipe, "a fox", *texts, strength=0.2) == "a fox"
    assert expanded(pipe, "a fox", *texts, strength=0.25) == "a fox, noto style"
    assert expanded(pipe, "a fox", *texts, strength=1.0) == "a fox, noto style, soft light, red"


def test_the_nearer_neighbour_counts_for_more(pipe):
    hits = [Near("a cat, noto style", 0.9), Near("a dog, blob style", 0.7), Near("a cow, blob style", 0.7)]
    assert expand(pipe, "a fox", hits, 0.5) == "a fox, noto style"


@pytest.mark.parametrize(
    ("prompt", "neighbour", "wanted"),
    [
        ("a fox", "a wolf", "a fox"),  # the subject of another is no detail
        ("a fox in noto style", "a cat, noto style", "a fox in noto style"),
        ("a fox, Noto Style", "a cat, flat style", "a fox, Noto Style"),
        ("a fox in noto style", "a cat, flat style", "a fox in noto style"),
        ("a fox, on a red background", "a cat, on a blue background", "a fox, on a red background"),
        ("a fox with no background", "a cat, on a blue background, ink", "a fox with no background, ink"),
        ("a fox at night", "a cat, sunny day, ink", "a fox at night, ink"),
        ("a fox", "a cat, blob style, flat style", "a fox, blob style"),
        ("a fox.", "a cat, ink", "a fox, ink"),
        ("キツネ、青い背景", "ネコ、インク", "キツネ、青い背景、インク"),
        ("キツネ、青い背景", "ネコ、赤い背景", "キツネ、青い背景"),
        ("a fox", "ネコ、インク", "a fox"),  # not the prompt's script
        ("キツネ", "cat, ink", "キツネ, ink"),
        ("a fox", "a cat, <lora:ink:1>, ink --ar 3:2, gold", "a fox, gold"),
    ],
)
def test_details_neither_repeat_nor_contradict_what_is_there(pipe, prompt, neighbour, wanted):
    assert expanded(pipe, prompt, neighbour) == wanted


def test_an_expanded_prompt_is_read_whole_by_every_encoder():
    pipe = PIPELINES["sd3"]()
    details = [f"detail{number} {word * 9}" for number, word in enumerate("abcdefgh")]
    long = expand(pipe, "a fox", [Near(", ".join(["a cat", *details]))], 1.0)
    assert details[0] in long
    assert not all(detail in long for detail in details)
    for tokenizer in (pipe.tokenizer, pipe.tokenizer_2, pipe.tokenizer_3):
        assert len(tokenizer(long).input_ids) <= 77
    # A detail that does not fit leaves room for a shorter one behind it.
    assert expand(pipe, "a fox", [Near(f"a cat, {'x' * 80}, ink")], 1.0) == "a fox, ink"


def test_an_encoder_that_keeps_the_original_limits_both_of_its_parts():
    pipe = stable_diffusion()
    pipe.tokenizer.model_max_length = 24
    encoder = make_encoder(pipe, text_encoder("t5"), bridge_depth=1)
    swap_text_encoder(pipe, encoder, keep_original="concatenate")
    assert expand(pipe, "a fox", [Near("a cat, ink, a very long detail of it")], 1.0) == "a fox, ink"


# the reference model


def test_the_reference_model_draws_with_what_it_finds():
    pipe, index = load_reference(), open_reference_index()
    pipe.set_progress_bar_config(disable=True)
    found = retrieve(pipe, index, "fox", "blend", strength=0.5, k=3)
    assert any("fox" in hit.text for hit in found.hits)
    assert all(hit.image.size[0] >= 32 for hit in found.hits)
    options = {"num_inference_steps": 1, "output_type": "pt"}
    blended, plain = (
        pipe(**arguments, **options, generator=torch.Generator().manual_seed(0)).images
        for arguments in (found.arguments, {"prompt": "fox"})
    )
    assert not torch.allclose(blended, plain, atol=1e-3)


def test_pictures_without_a_prompt_are_no_neighbours(monkeypatch):
    index = PromptIndex(text_encoder())
    index.add(["a red fox", "a green fox"])
    with_pictures = index.search("fox", k=2)
    empty = [replace(with_pictures[0], id=str(place), text=" ") for place in range(9)]
    monkeypatch.setattr(index, "search", lambda prompt, k: [*empty, *with_pictures][:k])
    assert [hit.text for hit in suggest(index, "fox", 3)] == [hit.text for hit in with_pictures]
    assert suggest(index, "fox " * 5000, 1)
