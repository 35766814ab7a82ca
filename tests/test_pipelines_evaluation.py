import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import conditioning, stable_diffusion, stable_diffusion_xl, text_encoder

from textcond import ConditioningEncoder, TextEncoder
from textcond.pipelines import (
    AlignmentOptions,
    TimestepAwareUNet,
    align,
    make_encoder,
    retrieval_encoder,
    swap_text_encoder,
    swapped,
)
from textcond.pipelines.alignment.align import Aligner
from textcond.pipelines.alignment.prompts import LONGEST as LONGEST_LINE
from textcond.pipelines.evaluation import Case, ClipJudge, EmojiJudge, evaluate_conditioning, read_cases, write_cases
from textcond.pipelines.evaluation.cache import ResultCache, fingerprint
from textcond.pipelines.evaluation.controls import isometry, random_encoder, raw_encoder, shuffled_texts
from textcond.pipelines.evaluation.distance import EMPTY, share, share_interval, squared_distances
from textcond.pipelines.evaluation.grid import grid_blocks, shortened
from textcond.pipelines.evaluation.judges import shares_weights
from textcond.pipelines.evaluation.pictures import latent_seed, pixel_spread
from textcond.pipelines.evaluation.report import Measured, Report
from textcond.pipelines.evaluation.stages import earlier_states, set_state
from textcond.pipelines.families import condition
from textcond.pipelines.reference.data import is_held_out, is_held_out_concept, is_unseen_concept
from textcond.pipelines.reference.held_out import CASES, SENTENCES
from textcond.pipelines.reference.judge import Judge
from textcond.pipelines.reference.phrases import REWORDED

QUICK = {"steps": 2, "guidance": (3.0,), "seeds": (0,)}


@pytest.fixture(autouse=True)
def small_counts(monkeypatch):
    monkeypatch.setattr("textcond.pipelines.evaluation.harness._TIMED_ENCODINGS", 1)
    monkeypatch.setattr("textcond.pipelines.evaluation.harness._TIMED_PICTURES", 1)


@pytest.fixture
def cases():
    return [
        Case("a red fox", expected={"concept": "fox"}),
        Case("der rote Fuchs", "a red fox", "de", {"concept": "fox"}),
        Case("a green bird", expected={"concept": "bird"}),
        Case("der Vogel", "a green bird", "de", {"concept": "bird"}),
    ]


class Brightness:
    """A judge that says how bright a picture is, and counts what it was asked."""

    fingerprint = "brightness"

    def __init__(self):
        self.asked = 0

    def __call__(self, pictures, cases):
        self.asked += len(pictures)
        brightness = np.array([np.asarray(picture).mean() / 255 for picture in pictures])
        return {"brightness": brightness, "unasked": np.full(len(pictures), np.nan)}


def count_calls(pipe, monkeypatch):
    """Prompts that the pipeline is asked to draw to a picture."""
    drawn, cls = [], type(pipe)
    call = cls.__call__

    def counted(self, prompt, *args, **kwargs):
        if isinstance(prompt, list) and kwargs.get("output_type") != "latent":
            drawn.extend(prompt)
        return call(self, prompt, *args, **kwargs)

    monkeypatch.setattr(cls, "__call__", counted)
    return drawn


# -- cases -----------------------------------------------------------------------------------------------------------


def test_cases_survive_writing_and_reading(tmp_path, cases):
    write_cases(tmp_path / "cases.jsonl", cases)
    assert read_cases(tmp_path / "cases.jsonl") == cases


def test_a_text_file_gives_prompts_and_translations(tmp_path):
    (tmp_path / "prompts.txt").write_text("a fox\n\na dog\tein Hund\n", encoding="utf-8")
    assert read_cases(tmp_path / "prompts.txt") == [Case("a fox"), Case("ein Hund", "a dog", "other")]
    (tmp_path / "prompts.txt").write_text(f"a fox\t\n{'x' * LONGEST_LINE}\r\n")
    assert read_cases(tmp_path / "prompts.txt") == [Case("a fox"), Case("x" * LONGEST_LINE)]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("a dog\tein Hund\tun chien", "line 2: 3 columns: write `prompt`, or `english TAB other`"),
        ("x" * 30_000, "line 2: 30,000 characters: write a case a line, of at most 20,000"),
        ("\tein Hund", "line 2: english of a case is empty"),
    ],
    ids=["three columns", "long", "no english"],
)
def test_a_line_that_is_no_prompt_is_named(tmp_path, line, message):
    (tmp_path / "prompts.txt").write_text(f"a fox\n{line}\n", encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        read_cases(tmp_path / "prompts.txt")


def test_a_limit_counts_each_language_by_itself(tmp_path, cases):
    write_cases(tmp_path / "cases.jsonl", cases)
    assert read_cases(tmp_path / "cases.jsonl", limit=1) == cases[:2]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "a fox"', "line 2: not valid JSON"),
        ('{"english": "a fox"}', 'line 2: no object with a "prompt"'),
        ('{"prompt": "a fox", "langauge": "en"}', "line 2: unknown key 'langauge'"),
        ('{"prompt": 3}', "line 2: prompt of a case is 3"),
        ('{"prompt": " "}', "line 2: prompt of a case is empty"),
        ('{"prompt": "a fox", "language": "all"}', "line 2: language of a case is 'all'"),
        ('{"prompt": "a fox", "expected": "fox"}', "line 2: expected of a case is 'fox'"),
        (json.dumps({"prompt": "x" * 30_000}), "line 2: 30,014 characters"),
    ],
)
def test_a_line_that_is_no_case_is_named(tmp_path, line, message):
    (tmp_path / "cases.jsonl").write_text(f'{{"prompt": "a dog"}}\n{line}\n', encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        read_cases(tmp_path / "cases.jsonl")


def test_a_missing_or_empty_prompts_file_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.jsonl"):
        read_cases(tmp_path / "nowhere.jsonl")
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(ValueError, match="holds no prompt"):
        read_cases(tmp_path / "empty.txt")
    (tmp_path / "latin.txt").write_bytes("für\n".encode("latin-1"))
    with pytest.raises(ValueError, match="not UTF-8"):
        read_cases(tmp_path / "latin.txt")


@pytest.mark.parametrize(("kind", "subjects"), [("prompts", 60), ("dictionary", 25), ("unseen", 35)])
def test_shipped_cases_are_held_out_and_the_shipped_judge_knows_them(kind, subjects):
    shipped = read_cases(CASES / f"{kind}.jsonl")
    EmojiJudge().check(shipped)
    assert len({case.language for case in shipped}) == 15
    assert len({case.subject for case in shipped}) == subjects
    for case in shipped:
        concept = case.expected["concept"]
        assert is_held_out(concept, case.expected["style"], case.expected["colour"])
        assert is_held_out_concept(concept) == (kind != "prompts")
        assert is_unseen_concept(concept) == (kind == "unseen")


def test_shipped_wordings_say_shipped_captions_in_other_words_than_alignment_reads():
    captions = {(case.english, case.language): case for case in read_cases(CASES / "prompts.jsonl")}
    shipped = read_cases(CASES / "wordings.jsonl")
    assert len(shipped) == 60 * len(SENTENCES)
    for case in shipped:
        plain = captions[case.english, case.language]
        assert case.expected == plain.expected
        assert case.prompt != plain.prompt
        assert case.expected["style"] in case.prompt
    for language, (sentence, _) in SENTENCES.items():
        assert sentence not in [template.replace("|", "") for template in REWORDED[language]]


def test_one_concept_in_five_is_held_out():
    share_held_out = np.mean([is_held_out_concept(f"Concept {number}") for number in range(5000)])
    assert 0.18 < share_held_out < 0.22
    assert is_held_out_concept("Monkey") == is_held_out_concept("monkey")


# -- controls --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "columns"), [(8, 5), (5, 5), (5, 8)])
def test_an_isometry_keeps_inner_products_or_is_orthonormal(rows, columns):
    matrix = isometry(rows, columns)
    assert matrix.shape == (rows, columns)
    product = matrix.T @ matrix if columns <= rows else matrix @ matrix.T
    torch.testing.assert_close(product, torch.eye(min(rows, columns)), atol=1e-5, rtol=0)


def test_the_raw_control_gives_the_backbones_own_states_padded_with_zeros():
    pipe, encoder = stable_diffusion(width=48), text_encoder()
    swap_text_encoder(pipe, raw_encoder(pipe, encoder))
    given = condition(pipe, ["a red fox"])["encoder_hidden_states"]
    assert not given[..., 32:].any()
    tokens = encoder.tokenizer("a red fox", return_tensors="pt")
    states = encoder.backbone(**tokens).last_hidden_state
    torch.testing.assert_close(given[:, : states.shape[1], :32], states, atol=1e-4, rtol=1e-4)


def test_shuffled_texts_are_the_english_of_another_subject(cases):
    given = shuffled_texts(cases)
    assert given == ["a green bird", "a green bird", "a red fox", "a red fox"]
    with pytest.raises(ValueError, match="two things"):
        shuffled_texts(cases[:2])


def test_a_random_control_grows_as_the_encoder_does():
    pipe = stable_diffusion()
    like = make_encoder(pipe, text_encoder(), tokens=8, chunk=16, prompt_length=40)
    made = random_encoder(pipe, text_encoder("roberta"), like)
    assert (made.config.tokens, made.config.chunk, made.tokenizer.model_max_length) == (8, 16, 40)


SHORT = {
    "token_steps": 4, "denoiser_steps": 2, "num_inference_steps": 2, "batch_size": 4, "denoiser_batch_size": 2,
    "denoiser_learning_rate": 1e-2, "closed_form_prompts": 16, "held_out": 4, "call": {"height": 16, "width": 16},
}  # fmt: skip


def aligned(folder, **options):
    """A folder in which an encoder was aligned with a tiny pipeline."""
    lines = [f"{colour} {thing}" for colour in ("red", "green", "blue") for thing in ("fox", "dog", "bird", "house")]
    align(stable_diffusion(), text_encoder(), lines, folder, AlignmentOptions(**{**SHORT, **options}))
    return folder


@pytest.mark.parametrize("options", [{}, {"train_backbone": True}, {"bridge": "timestep"}], ids=str)
def test_the_steps_of_an_alignment_are_controls(tmp_path, cases, monkeypatch, options):
    # What each step left is taken from the run itself.
    before, fit = [], Aligner._fit

    def watched(self, *args):
        before.append({name: value.clone() for name, value in self.trained.state_dict().items()})
        fit(self, *args)

    monkeypatch.setattr(Aligner, "_fit", watched)
    folder = aligned(tmp_path / "one", **options)
    states = earlier_states(folder)
    assert list(states) == ["closed_form", "tokens"]
    for state, expected in zip(states.values(), before, strict=True):
        encoder = ConditioningEncoder.from_pretrained(folder)
        unet = stable_diffusion().unet
        file = folder / "connector.safetensors"
        connector = TimestepAwareUNet.with_connector(unet, file).connector if file.is_file() else None
        set_state(state, encoder, connector)
        found = dict(encoder.named_parameters())
        found |= {f"connector.{name}": value for name, value in (connector.named_parameters() if connector else ())}
        for name, value in expected.items():
            if "pooler" not in name:  # it is not saved
                assert torch.equal(found[name.replace("/", ".")], value), name
    report = evaluate_conditioning(stable_diffusion(), [folder], cases[::2], **QUICK)
    assert list(report.rows) == ["original", "one", "raw", "random", "closed_form", "tokens", "shuffled"]
    closed_form, tokens = (report.results[name]["en"]["distance"]["share"] for name in states)
    assert abs(closed_form - tokens) > 1e-4
    assert "- `tokens`: the first encoder after step 1" in report.markdown()


def test_a_step_that_an_alignment_did_not_keep_is_no_control(tmp_path, cases):
    pipe = stable_diffusion()
    ended = aligned(tmp_path / "ended", denoiser_steps=0)
    assert list(earlier_states(ended)) == ["closed_form"]  # after step 1 it is the encoder itself
    adapted = aligned(tmp_path / "adapted", lora_rank=2)
    assert earlier_states(adapted) == {}
    conditioning().save_pretrained(tmp_path / "other")
    for encoders in ([ended], [adapted, ended], [tmp_path / "other"], {"new": conditioning()}, []):
        with pytest.raises(ValueError, match="the control tokens is the first encoder after that step"):
            evaluate_conditioning(pipe, encoders, cases, controls=["tokens"], **QUICK)
    assert "tokens" not in evaluate_conditioning(pipe, [adapted], cases[:1], **QUICK).rows
    with pytest.raises(ValueError, match=r"closed-form\.safetensors is not of the encoder beside it"):
        set_state(earlier_states(ended)["closed_form"], conditioning(tokens=5))


def test_a_step_is_shown_in_its_own_slot_and_the_other_is_left_alone(tmp_path, cases):
    pipe = stable_diffusion_xl()
    swap_text_encoder(pipe, make_encoder(pipe, text_encoder("bert"), slot="text_encoder"), "text_encoder")
    before = {name: value.clone() for name, value in pipe.text_encoder.state_dict().items()}
    options = AlignmentOptions(**{**SHORT, "held_out": 2, "slot": "text_encoder_2"})
    lines = ["a red fox", "a dog", "the bird", "a house"]
    align(pipe, text_encoder("bert"), lines, tmp_path / "second", options)
    report = evaluate_conditioning(
        pipe, [tmp_path / "second"], cases[:1], controls=["tokens"], slot="text_encoder_2", **QUICK
    )
    assert "tokens" in report.rows
    assert all(torch.equal(value, before[name]) for name, value in pipe.text_encoder.state_dict().items())


def test_the_original_encoder_gets_a_bridge_of_the_same_size_to_be_compared_with(tmp_path, cases):
    pipe = stable_diffusion()
    pipe.save_pretrained(tmp_path / "pipe")
    for part in ("text_encoder", "tokenizer"):
        shutil.copytree(tmp_path / "pipe" / part, tmp_path / "clip", dirs_exist_ok=True)
    lines = ["a red fox", "a dog", "the bird", "a house"]
    for name, encoder in (("same", retrieval_encoder(pipe)), ("files", TextEncoder.from_pretrained(tmp_path / "clip"))):
        align(stable_diffusion(), encoder, lines, tmp_path / name, AlignmentOptions(**{**SHORT, "held_out": 2}))
    report = evaluate_conditioning(
        stable_diffusion(), [tmp_path / "same", tmp_path / "files"], cases[:1], controls=(), **QUICK
    )
    same, files = (report.results[name]["en"]["distance"]["share"] for name in ("same", "files"))
    assert same == pytest.approx(files)


# -- distance --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [stable_diffusion, stable_diffusion_xl])
def test_the_teacher_is_at_distance_0_and_the_empty_prompt_at_1(make):
    pipe = make()
    texts = ["a red fox", "a green bird"]
    timesteps, found = squared_distances(
        pipe,
        texts,
        {"teacher": condition(pipe, texts), "nothing": condition(pipe, ["", ""])},
        generators=[torch.Generator().manual_seed(seed) for seed in range(2)],
        steps=3,
        guidance=4.0,
    )
    assert len(timesteps) == 3
    assert timesteps == sorted(timesteps, reverse=True)
    assert found["teacher"].shape == (2, 3)
    assert share(found["teacher"], found[EMPTY]) < 1e-6
    assert share(found["nothing"], found[EMPTY]) == pytest.approx(1)


def test_the_interval_of_a_share_holds_it_and_narrows_with_equal_cases():
    generator = np.random.default_rng(0)
    empty = generator.random((40, 3)) + 1
    low, high = share_interval(empty * generator.random((40, 1)), empty)
    assert 0 < low < high < 1
    assert share_interval(empty / 2, empty) == pytest.approx((0.5, 0.5))


# -- judges ----------------------------------------------------------------------------------------------------------


def tiny_judge(folder, names=("fox", "bird", "dog")):
    torch.manual_seed(0)
    Judge(len(names), (8, 8, 8, 8), names).save_pretrained(folder)
    return folder


def test_the_emoji_judge_scores_what_a_case_expects(tmp_path):
    judge = EmojiJudge(tiny_judge(tmp_path / "judge"), among=3)
    with torch.no_grad():
        for head, winner in ((judge.model.concept, 1), (judge.model.colour, 0)):
            head.weight.zero_()
            head.bias.zero_()
            head.bias[winner] = 1
    pictures = [Image.new("RGB", (32, 32), "red")] * 3
    cases = [
        Case("bird", expected={"concept": "bird", "colour": "white"}),
        Case("fox", expected={"concept": "fox", "colour": "red"}),
        Case("anything"),
    ]
    scores = judge(pictures, cases)
    np.testing.assert_array_equal(scores["concept"], [1, 0, np.nan])
    np.testing.assert_array_equal(scores["top5"], [1, 1, np.nan])
    np.testing.assert_array_equal(scores["colour"], [1, 0, np.nan])
    assert np.isnan(scores["style"]).all()


def test_the_emoji_judge_refuses_what_it_does_not_know(tmp_path):
    judge = EmojiJudge(tiny_judge(tmp_path / "judge"), among=2)
    for case, message in (
        (Case("a", expected={"concept": "unicorn"}), "knows no concept 'unicorn'"),
        (Case("a", expected={"concept": "dog"}), "'dog' is concept 3 .* first 2"),
        (Case("a", expected={"size": "big"}), "does not score 'size'"),
        (Case("a"), "no case says what to expect"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluate_conditioning(stable_diffusion(), {}, [case], judge=judge, **QUICK)
    with pytest.raises(ValueError, match="among is 4"):
        EmojiJudge(tmp_path / "judge", among=4)
    nameless = tmp_path / "nameless"
    Judge(3, (8, 8, 8, 8)).save_pretrained(nameless)
    with pytest.raises(ValueError, match="does not name its concepts"):
        EmojiJudge(nameless, among=3)


def test_the_shipped_judge_recognises_the_shipped_models_own_sample_colours():
    judge = EmojiJudge()
    scores = judge([Image.new("RGB", (128, 128), (229, 57, 53))], [Case("a", expected={"colour": "red"})])
    assert scores["colour"].tolist() == [1]


def test_a_clip_judge_without_weights_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"holds no \*\.safetensors"):
        ClipJudge(str(tmp_path / "empty"))
    with pytest.raises(FileNotFoundError, match="check the path"):
        ClipJudge(str(tmp_path / "nowhere" / "at" / "all"))
    with pytest.raises(ValueError, match="names no weights"):
        ClipJudge("open_clip:ViT-B-32")
    with pytest.raises(FileNotFoundError, match="gives no judge"):
        ClipJudge("open_clip:ViT-B-32/nothing-of-that-name")


def test_a_clip_judge_gives_the_cosine_of_transformers_own_embeddings(tmp_path):
    import transformers
    from tiny_reference import clip_tokenizer

    torch.manual_seed(0)
    tokenizer = clip_tokenizer()
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.CLIPConfig(
        text_config=size | {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id},
        vision_config=size | {"image_size": 32, "patch_size": 16},
        projection_dim=8,
    )
    model = transformers.CLIPModel(config).eval()
    model.save_pretrained(tmp_path)
    processor = transformers.CLIPProcessor(
        transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}), tokenizer
    )
    processor.save_pretrained(tmp_path)
    pictures = [Image.new("RGB", (48, 48), colour) for colour in ("red", "blue")]
    cases = [Case("der Fuchs", "the fox", "de"), Case("a bird")]
    found = ClipJudge(str(tmp_path))(pictures, cases)["cosine"]
    inputs = processor(text=["the fox", "a bird"], images=pictures, padding="max_length", return_tensors="pt")
    with torch.no_grad():
        expected = model(**inputs)
    cosine = torch.nn.functional.cosine_similarity(expected.image_embeds, expected.text_embeds)
    np.testing.assert_allclose(found, cosine.numpy(), atol=1e-5)


def test_a_judge_made_of_the_encoders_weights_is_warned_of(cases):
    pipe = stable_diffusion()

    class Relative(Brightness):
        model = pipe.text_encoder

    with pytest.warns(UserWarning, match="the judge shares weights with the text encoder of original"):
        report = evaluate_conditioning(pipe, {}, cases[:1], judge=Relative(), controls=(), **QUICK)
    assert "shares weights" in report.markdown()
    assert not shares_weights(pipe.text_encoder, conditioning())


# -- the harness -----------------------------------------------------------------------------------------------------


def test_every_row_is_drawn_from_the_same_latents_and_the_pipeline_is_as_before(cases, monkeypatch):
    pipe = stable_diffusion()
    before, latents = pipe.text_encoder, []
    prepare = type(pipe).prepare_latents

    def spy(self, *args, **kwargs):
        latents.append(prepare(self, *args, **kwargs))
        return latents[-1]

    monkeypatch.setattr(type(pipe), "prepare_latents", spy)
    report = evaluate_conditioning(
        pipe, {"new": conditioning()}, cases, judge=Brightness(), **QUICK, batch_size=len(cases)
    )
    assert list(report.rows) == ["original", "new", "untranslated", "raw", "random", "shuffled"]
    batches = [given for given in latents if len(given) == len(cases)]
    assert len(batches) >= 4
    assert all(torch.equal(given, batches[0]) for given in batches)
    # One picture in two languages starts from the same noise, another picture from other noise.
    assert torch.equal(batches[0][0], batches[0][1])
    assert not torch.equal(batches[0][0], batches[0][2])
    # The original draws a text that two languages share once.
    assert torch.equal(latents[0], batches[0][::2])
    assert pipe.text_encoder is before


def test_the_original_is_at_0_and_others_are_not(cases):
    report = evaluate_conditioning(stable_diffusion(), {"new": conditioning()}, cases, judge=Brightness(), **QUICK)
    results = report.results
    assert results["original"]["all"]["distance"]["share"] < 1e-6
    assert results["shuffled"]["all"]["distance"]["share"] > 0.01
    assert results["new"]["de"]["distance"]["share"] > 0.01
    assert len(results["new"]["de"]["distance"]["timesteps"]) == 2
    # Read in English, the untranslated original is the original.
    english = results["untranslated"]["en"]
    assert english["distance"]["share"] < 1e-6
    assert english["guidance"]["3"]["scores"]["brightness"]["difference"]["mean"] == 0
    assert results["untranslated"]["de"]["distance"]["share"] > 0.01


def test_the_same_encoder_swapped_in_keeps_everything(cases):
    pipe = stable_diffusion()
    report = evaluate_conditioning(
        pipe, {"same": pipe.text_encoder}, cases[::2], judge=Brightness(), controls=(), **QUICK
    )
    score = report.results["same"]["en"]["guidance"]["3"]["scores"]["brightness"]
    assert score["kept"] == 1
    assert (score["difference"]["low"], score["difference"]["high"]) == (0, 0)


def test_a_finished_evaluation_is_taken_from_the_cache(tmp_path, cases, monkeypatch):
    pipe, judge, new = stable_diffusion(), Brightness(), conditioning()
    options = {"judge": judge, "cache": tmp_path, **QUICK}
    first = evaluate_conditioning(pipe, {"new": new}, cases, **options)
    asked, drawn = judge.asked, count_calls(pipe, monkeypatch)
    again = evaluate_conditioning(pipe, {"new": new}, cases, **options)
    assert drawn == []
    assert judge.asked == asked
    assert again.results == first.results
    with torch.no_grad():
        new.bridge.out_proj.weight.mul_(2)
    changed = evaluate_conditioning(pipe, {"new": new}, cases, **options)
    # The new encoder's pictures are made again; those of the backbone, which did not change, are not.
    assert drawn == [case.prompt for case in cases]
    assert changed.results["new"] != first.results["new"]
    assert changed.results["raw"] == first.results["raw"]


@pytest.mark.parametrize(("stop", "left"), [(4, 3), (8, 0)], ids=["while drawing", "while measuring distances"])
def test_an_interrupted_evaluation_goes_on_where_it_was(tmp_path, cases, monkeypatch, stop, left):
    pipe, new = stable_diffusion(), conditioning()
    options = {"judge": Brightness(), "batch_size": 1, "controls": (), **QUICK}
    whole = evaluate_conditioning(pipe, {"new": new}, cases, **options)
    calls, call = [], type(pipe).__call__

    def interrupted(self, prompt, *args, **kwargs):
        if isinstance(prompt, list):
            calls.append(prompt)
            if len(calls) == stop:
                raise KeyboardInterrupt
        return call(self, prompt, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(type(pipe), "__call__", interrupted)
        with pytest.raises(KeyboardInterrupt):
            evaluate_conditioning(pipe, {"new": new}, cases, cache=tmp_path, **options)
    drawn = count_calls(pipe, monkeypatch)
    report = evaluate_conditioning(pipe, {"new": new}, cases, cache=tmp_path, **options)
    # The original reads the same English for two languages: two pictures, then four of the new encoder.
    assert len(drawn) == left
    assert report.results == whole.results
    assert not list(tmp_path.rglob("*.partial"))


def test_the_cache_knows_weights_configurations_and_nothing_else():
    pipe = stable_diffusion()
    assert fingerprint(pipe.text_encoder) == fingerprint(stable_diffusion().text_encoder)
    before = fingerprint(pipe.scheduler)
    pipe.scheduler.register_to_config(steps_offset=0)
    assert fingerprint(pipe.scheduler) != before
    assert ResultCache(None).picture("key") is None


def test_a_report_holds_tables_grid_plots_and_numbers(tmp_path, cases):
    report = evaluate_conditioning(
        stable_diffusion(), {"new": conditioning()}, cases, judge=Brightness(), controls=("shuffled",), steps=2,
        guidance=(2, 5), seeds=(0, 1),
    )  # fmt: skip
    path = report.save(tmp_path / "out")
    text = path.read_text(encoding="utf-8")
    for expected in (
        "## all languages, guidance 2",
        "## de, guidance 5",
        "brightness x 100",
        "| new |",
        "diversity",
        "encode one prompt",
        "![pictures](grid.png)",
        "en: a red fox | de: der rote Fuchs",
    ):
        assert expected in text, expected
    assert "unasked" not in text
    for name in ("grid.png", "distance-all.png", "distance-de.png", "guidance-brightness.png"):
        with Image.open(tmp_path / "out" / name) as picture:
            assert picture.width > 100
            assert len(picture.convert("RGB").getcolors(1 << 24)) > 3
        assert f"({name})" in text
    numbers = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))
    assert numbers["results"]["new"]["de"]["guidance"]["5"]["diversity"]["mean"] > 0
    assert np.array(numbers["scores"]["new"]["2"]["brightness"]).shape == (4, 2)
    assert numbers["costs"]["new"]["parameters"] == 4 * sum(p.numel() for p in conditioning().parameters())
    assert numbers["costs"]["shuffled"]["encode_seconds"] is None


def test_one_seed_has_no_diversity_and_no_judge_no_scores(tmp_path, cases):
    report = evaluate_conditioning(stable_diffusion(), {}, cases[::2], **QUICK)
    assert list(report.rows) == ["original", "shuffled"]
    report.save(tmp_path)
    numbers = json.loads((tmp_path / "report.json").read_text())
    assert numbers["results"]["original"]["en"]["guidance"]["3"] == {
        "scores": {},
        "diversity": {"mean": None, "low": None, "high": None},
    }


def test_spread_is_0_for_equal_pictures_and_1_for_black_and_white():
    black, white = Image.new("RGB", (4, 4)), Image.new("RGB", (4, 4), "white")
    assert pixel_spread([black, black]) == 0
    assert pixel_spread([black, white]) == 1
    assert np.isnan(pixel_spread([black]))
    assert latent_seed(Case("x", "a"), 0) == latent_seed(Case("y", "a"), 0) != latent_seed(Case("y", "a"), 1)


def test_the_grid_shows_a_prompt_in_its_languages_or_many_prompts_in_one(cases):
    assert grid_blocks(cases) == [[0, 1], [2, 3]]
    assert grid_blocks(cases[::2]) == [[0, 1]]


class Font:
    """A font whose letters are ten pixels wide, and what it measured."""

    def __init__(self):
        self.measured = []

    def getlength(self, text):
        self.measured.append(len(text))
        return 10 * len(text)


def test_a_caption_is_shortened_without_measuring_all_of_a_giant_text():
    font = Font()
    assert shortened("fox\n " * 100_000, 112, font) == "fox fox ..."
    assert max(font.measured) < 210
    assert shortened("a fox", 112, font) == "a fox"


def test_a_giant_prompt_is_reported_in_a_readable_line(tmp_path, cases):
    giant = "der rote Fuchs\n" * 1_000
    given = [Case(giant, giant, "de"), Case("a fox", giant), *cases[2:]]
    report = evaluate_conditioning(stable_diffusion(), {}, given, controls=(), **QUICK)
    text = report.save(tmp_path).read_text(encoding="utf-8")
    shown = next(line for line in text.splitlines() if line.startswith("- de: der rote"))
    assert shown.endswith("... | en: a fox")
    assert len(shown) < 230
    assert json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))["cases"][0]["prompt"] == giant


@pytest.mark.parametrize("make", [stable_diffusion, stable_diffusion_xl])
def test_an_encoder_that_grows_is_measured_on_prompts_of_mixed_lengths(make):
    pipe = make()
    new = make_encoder(pipe, text_encoder(), tokens=8, chunk=8, prompt_length=60)
    mixed = [Case("fox"), Case("a red fox in winter " * 3), Case("a green bird"), Case("a dog and a big fox")]
    shares = []
    for batch_size in (1, 2, 4):
        report = evaluate_conditioning(
            pipe, {"new": new}, mixed, controls=("random",), batch_size=batch_size, **QUICK
        )  # fmt: skip
        shares.append(report.rows["new"].distances / report.rows["new"].empty_distances)
    with swapped(pipe, new):
        lengths = {condition(pipe, [case.prompt])["encoder_hidden_states"].shape[1] for case in mixed}
    assert lengths == {8, 16, 64}
    np.testing.assert_allclose(shares[0], shares[2], rtol=1e-3)
    np.testing.assert_allclose(shares[1], shares[2], rtol=1e-3)
    alone = evaluate_conditioning(pipe, {"new": new}, mixed[:1], controls=(), **QUICK).rows["new"]
    np.testing.assert_allclose(shares[0][:1], alone.distances / alone.empty_distances, rtol=1e-3)


def test_sdxl_is_compared_through_both_its_slots(cases):
    new = conditioning(width=64, pooled_width=32)
    report = evaluate_conditioning(stable_diffusion_xl(), {"new": new}, cases[:1], controls=("raw", "random"), **QUICK)
    assert list(report.rows) == ["original", "new", "raw", "random"]
    assert report.results["original"]["en"]["distance"]["share"] < 1e-6


def test_options_that_cannot_be_are_refused(tmp_path, cases):
    pipe = stable_diffusion()
    for encoders, options, message in (
        ({}, {"controls": ("rwa",)}, "no control 'rwa'"),
        ({}, {"controls": ("raw",)}, "need a new backbone"),
        ({}, {"steps": 0}, "steps is 0"),
        ({}, {"guidance": ()}, "at least one guidance"),
        ({}, {"guidance": (float("nan"),)}, "guidance is nan"),
        ({}, {"seeds": (1, 1)}, "a seed is given twice"),
        ({"raw": conditioning()}, {}, "named 'raw', as a control is"),
        ({"wide": conditioning(width=48)}, {}, "48-wide tokens"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluate_conditioning(pipe, encoders, cases, **{**QUICK, **options})
    with pytest.raises(FileNotFoundError, match="nowhere"):
        evaluate_conditioning(pipe, [tmp_path / "nowhere" / "at all"], cases, **QUICK)
    with pytest.raises(ValueError, match="no case"):
        evaluate_conditioning(pipe, {}, [], **QUICK)


def test_a_thing_in_many_languages_is_one_witness(cases):
    shape, ones = (len(cases), 1), np.ones((len(cases), 1))
    hits = np.array([1.0, 1.0, 0.0, 0.0]).reshape(shape)
    rows = {"original": Measured({3.0: {"hit": ones}}, {3.0: np.full(4, np.nan)}, ones, ones)}
    rows["new"] = Measured({3.0: {"hit": hits}}, {3.0: np.full(4, np.nan)}, hits, ones)
    report = Report({"guidance": [3.0]}, cases, [500.0], rows)
    score = report.results["new"]["all"]["guidance"]["3"]["scores"]["hit"]
    # Two foxes hit and two birds missed: of two subjects drawn with replacement, both are the same half of the time.
    assert (score["mean"], score["low"], score["high"]) == (0.5, 0, 1)
    assert score["difference"] == {"mean": -0.5, "low": -1, "high": 0}
    distance = report.results["new"]["all"]["distance"]
    assert (distance["share"], distance["low"], distance["high"]) == (0.5, 0, 1)


# -- the command -----------------------------------------------------------------------------------------------------


def test_the_command_compares_folders_and_says_where_the_report_is(tmp_path, cases, monkeypatch, capsys):
    from textcond.apps.cli import main

    pipe = stable_diffusion()
    pipe.save_pretrained(tmp_path / "pipe")
    conditioning().save_pretrained(tmp_path / "new")
    write_cases(tmp_path / "cases.jsonl", cases)
    common = ["eval", "conditioning", "--pipeline", str(tmp_path / "pipe"), "--prompts", str(tmp_path / "cases.jsonl")]
    common += ["--out", str(tmp_path / "out"), "--steps", "2"]
    with pytest.raises(SystemExit) as exit_:
        main([*common, "--encoders", str(tmp_path / "new"), "--guidance", "2,5", "--limit", "1"])
    assert exit_.value.code == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "out" / "report.md")
    assert "| new |" in (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    for wrong, message in (
        (["--encoders", str(tmp_path / "nowhere")], "no encoder folder"),
        (["--guidance", "2,x"], "--guidance '2,x'"),
        (["--among", "3"], "--among is of the judge emoji"),
    ):
        with pytest.raises(SystemExit) as exit_:
            main([*common, *wrong])
        assert exit_.value.code == 1
        assert message in capsys.readouterr().err


def test_an_encoder_is_measured_through_its_own_connector(tmp_path, cases):
    encoders, pipe = {}, stable_diffusion()
    for name in ("one", "two"):
        aware = TimestepAwareUNet.from_unet(pipe.unet, 32, tokens=6, depth=1, seed=len(encoders))
        conditioning(bridge="identity", tokens=40).save_pretrained(tmp_path / name)
        aware.save_connector(tmp_path / name / "connector.safetensors")
        encoders[name] = tmp_path / name
    report = evaluate_conditioning(pipe, encoders, cases[:2], cache=tmp_path / "cache", **QUICK)
    assert {"one", "two", "raw", "random"} < set(report.rows)
    one, two = (report.results[name]["en"]["distance"]["share"] for name in encoders)
    assert one > 1e-6
    assert abs(one - two) > 1e-6
    assert report.results["original"]["en"]["distance"]["share"] < 1e-6


def test_one_slot_of_two_is_compared(cases):
    new = conditioning(width=32, tokens=77)
    report = evaluate_conditioning(
        stable_diffusion_xl(), {"new": new}, cases[:1], slot="text_encoder", controls=("raw", "random"), **QUICK
    )
    assert list(report.rows) == ["original", "new", "raw", "random"]


def test_a_byte_order_mark_is_no_part_of_the_first_case(tmp_path):
    (tmp_path / "prompts.txt").write_text("a fox\n", encoding="utf-8-sig")
    assert read_cases(tmp_path / "prompts.txt") == [Case("a fox")]
