import io
import json
import shutil

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

from textcond import PromptIndex, TextEncoder, TextEncoderConfig
from textcond.index.fusion import NearTexts, maximal_marginal_relevance, reciprocal_rank_fusion
from textcond.index.lance import LanceStore

TEXTS = ["a red fox", "a green fox", "the house by the river", "snow", "a dog in the snow", "森の中の狐"]


def encoder(seed=0, width=32, **config):
    backbone, tokenizer = tiny.backbone("bert", width=width, seed=seed)
    with torch.no_grad():
        for parameter in backbone.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
    return TextEncoder(backbone, tokenizer, TextEncoderConfig(**config))


@pytest.fixture(scope="module")
def model():
    return encoder()


def filled(index):
    index.add(TEXTS, [{"number": number, "name": f"é{number}"} for number in range(len(TEXTS))], ids=list("abcdef"))
    return index


@pytest.fixture
def index(model):
    return filled(PromptIndex(model))


def answers(hits):
    return [(hit.id, pytest.approx(hit.score, abs=1e-6), hit.text, hit.metadata) for hit in hits]


# searching


def test_dense_search_ranks_by_cosine(index):
    hits = index.search("a red fox", k=3, mode="dense")
    expected = index.encoder.encode(TEXTS) @ index.encoder.encode("a red fox")
    assert [hit.id for hit in hits] == ["abcdef"[place] for place in np.argsort(-expected)[:3]]
    assert (hits[0].text, hits[0].metadata, hits[0].image) == ("a red fox", {"number": 0, "name": "é0"}, None)
    assert [hit.score for hit in hits] == pytest.approx(np.sort(expected)[::-1][:3].tolist(), abs=2e-3)
    assert [(hit.dense_rank, hit.lexical_rank) for hit in hits] == [(1, None), (2, None), (3, None)]


def test_lexical_search_finds_shared_words_without_the_encoder(index):
    hits = index.search("green river snow", mode="lexical")
    assert {hit.id for hit in hits} == {"b", "c", "d", "e"}
    assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)
    assert [(hit.dense_rank, hit.lexical_rank) for hit in hits] == [(None, rank) for rank in (1, 2, 3, 4)]
    assert [hit.id for hit in index.search("狐", mode="lexical")] == ["f"]
    assert index.search("zebra", mode="lexical") == []


def test_hybrid_search_sums_reciprocal_ranks(index):
    hits = index.search("a dog in the snow", k=6)
    assert hits[0].id == "e"
    for hit in hits:
        ranks = [rank for rank in (hit.dense_rank, hit.lexical_rank) if rank is not None]
        assert hit.score == pytest.approx(sum(1 / (60 + rank) for rank in ranks))
    assert sorted(hit.dense_rank for hit in hits) == [1, 2, 3, 4, 5, 6]
    assert {hit.id for hit in hits if hit.lexical_rank is None} == {"f"}


def test_a_vector_and_its_text_find_the_same_whatever_the_vector_length(index):
    vector = index.encoder.encode("the dog", kind="query")
    assert answers(index.search(vector * 7)) == answers(index.search("the dog", mode="dense"))


def test_what_is_like_a_row_is_found_without_itself(index):
    for mode in ("dense", "lexical", "hybrid"):
        by_text = index.search("a red fox", mode=mode, k=6)
        assert [hit.id for hit in index.search(id="a", mode=mode)] == [hit.id for hit in by_text if hit.id != "a"]
    with pytest.raises(KeyError, match="there is no row 'z'"):
        index.search(id="z")


def test_queries_and_documents_get_their_prompts():
    both = encoder(prompts={"query": "query: ", "document": "doc: "})
    index = PromptIndex(both)
    index.add(["a fox"])
    hit = index.search("a fox", mode="dense")[0]
    assert hit.score == pytest.approx(float(both.encode("doc: a fox") @ both.encode("query: a fox")), abs=2e-3)


def test_every_row_comes_back_when_more_are_asked_for_and_none_from_nothing(index, model):
    assert sorted(hit.id for hit in index.search("fox", k=1000)) == list("abcdef")
    assert PromptIndex(model).search("fox") == []


def test_a_filter_limits_what_is_found_and_counted(index):
    wanted = {"number": {"gte": 1, "lt": 5}, "name": ["é1", "é4", "é5"]}
    for mode in ("dense", "lexical", "hybrid"):
        assert {hit.id for hit in index.search("a fox in the snow", mode=mode, filter=wanted)} == {"b", "e"}
    assert index.count(wanted) == 2
    assert {row.id for row in index.rows(wanted)} == {"b", "e"}


def test_near_duplicates_are_collapsed_into_the_best_and_the_rest_fills_up(model):
    index = PromptIndex(model)
    same = [
        "a portrait of a red fox in the snow",
        "A portrait of a red fox, in the snow!",
        "a portrait of a red fox in snow",
    ]
    index.add([*same * 60, "a dog by the river", "the moon"], ids=[f"{n:03}" for n in range(182)])
    hits = index.search(same[0], k=3)
    assert len({hit.text in same for hit in hits}) == 2
    assert [hit.text in same for hit in hits] == [True, False, False]
    assert len(index.search(same[0], k=5, collapse=False)) == 5
    assert all(hit.text in same for hit in index.search(same[0], k=5, collapse=False))


def test_equal_rows_come_in_the_order_of_ids_with_equal_scores(model):
    index = PromptIndex(model)
    index.add(["a fox", "a dog", "a fox"] * 7, ids=[f"{(n * 5) % 21:02}" for n in range(21)])
    foxes = sorted(f"{(n * 5) % 21:02}" for n in range(21) if n % 3 != 1)
    for k in (1, 5, 14):
        hits = index.search("a fox", k=k, mode="dense", collapse=False)
        assert [hit.id for hit in hits] == foxes[:k]
        assert len({hit.score for hit in hits}) == 1


def test_diversity_trades_relevance_for_difference(model):
    index = PromptIndex(model)
    vectors = np.array([[1, 0.0], [1, 0.05], [1, 0.06], [0.7, 0.7]] + [[0.0, 1]] * 4) @ np.eye(2, 32)
    index.add(
        [f"text {word}" for word in ("one", "two", "three", "four", "five", "six", "seven", "eight")], vectors=vectors
    )

    def found(diversity):
        query = np.eye(32)[0]
        return [hit.text.split()[1] for hit in index.search(query, k=2, diversity=diversity, collapse=False)]

    assert found(0) == found(0.05) == ["one", "two"]
    # between the two, relevance and difference cancel at 0.5 in this plane
    assert found(0.6)[0] == "one"
    assert found(0.6)[1] not in ("two", "three")
    assert found(1)[1] in ("five", "six", "seven", "eight")


def test_reciprocal_ranks_by_hand():
    assert reciprocal_rank_fusion([["a", "b"], ["b", "c"]]) == [
        ("b", 1 / 62 + 1 / 61),
        ("a", 1 / 61),
        ("c", 1 / 62),
    ]
    assert reciprocal_rank_fusion([["b", "a"], ["a", "b"]])[0][0] == "a"


def test_marginal_relevance_by_hand():
    vectors = np.array([[1, 0], [1, 0], [0, 1]], np.float32)
    scores = np.array([1.0, 0.9, 0.0])
    assert maximal_marginal_relevance(scores, vectors, 3, 0.0) == [0, 1, 2]
    # the second is worth 0.4 * 0.9 - 0.6 * 1, the third 0
    assert maximal_marginal_relevance(scores, vectors, 2, 0.6) == [0, 2]
    assert maximal_marginal_relevance(np.array([]), np.empty((0, 2)), 2, 0.5) == []


def test_near_texts():
    near = NearTexts()
    assert near.add("A red fox, in the snow.")
    assert not near.add("a red FOX in the snow")
    assert near.add("a blue whale in the sea")
    assert near.add("")
    assert near.add("")


# adding, changing, removing


def test_an_equal_row_is_kept_once_and_ids_come_in_the_order_of_texts(model):
    index = PromptIndex(model)
    ids = index.add(["a", "b", "a", "a"], [{"n": 1}, None, {"n": 1}, {"n": 2}])
    assert (ids[0] == ids[2], len(set(ids)), len(index)) == (True, 3, 3)
    assert index.add(["b", "c"])[0] == ids[1]
    assert len(index) == 4
    assert [hit.text for hit in index.get([ids[3], "none", ids[1]])] == ["a", "b"]
    assert PromptIndex(model).add(["b"]) == [ids[1]]


def test_an_id_that_is_there_is_refused_by_add_and_replaced_by_upsert(index):
    with pytest.raises(ValueError, match="there is a row 'b' already: use upsert"):
        index.add(["x", "y"], ids=["new", "b"])
    assert len(index) == 6
    assert index.upsert(["x", "a blue whale"], ids=["new", "b"]) == ["new", "b"]
    assert len(index) == 7
    assert index.search("a blue whale", k=1)[0].id == "b"
    assert "b" not in {hit.id for hit in index.search("green", mode="lexical")}


def test_delete_by_id_and_by_filter(index):
    assert index.delete(["a", "a", "none"]) == 1
    assert index.delete(filter={"number": [1, 2]}) == 2
    assert index.delete(["d", "e"], filter={"number": 3}) == 1
    assert {row.id for row in index.rows()} == {"e", "f"}
    with pytest.raises(ValueError, match="delete what"):
        index.delete()
    assert index.delete(filter={}) == 2
    assert len(index) == 0


def test_given_vectors_are_used_and_made_unit_length(model):
    index = PromptIndex(model)
    index.add(["x", "y"], vectors=np.eye(2, 32) * 5, ids=["x", "y"])
    hits = index.search(np.eye(32)[1], mode="dense")
    assert [(hit.id, round(hit.score, 3)) for hit in hits] == [("y", 1), ("x", 0)]


def test_adding_in_parts_is_adding_at_once(index, model):
    parts = PromptIndex(model)
    parts.add(iter(TEXTS[:2]), ids=["a", "b"])
    parts.search("fox")
    assert parts.add([]) == []
    parts.add((text for text in TEXTS[2:]), ids=list("cdef"))
    assert [(hit.id, hit.score) for hit in parts.search("fox")] == [(hit.id, hit.score) for hit in index.search("fox")]


# on disk


def test_what_is_added_is_on_disk_at_once(tmp_path, model):
    index = filled(PromptIndex.create(tmp_path / "prompts.idx", model))
    opened = PromptIndex.open(tmp_path / "prompts.idx", model)
    assert answers(opened.search("a fox in the snow")) == answers(index.search("a fox in the snow"))
    opened.add(["another"])
    assert len(index) == len(opened) == 7
    with pytest.raises(FileExistsError, match=r"there is an index at .* already"):
        PromptIndex.create(tmp_path / "prompts.idx", model)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/a.png").touch()
    with pytest.raises(FileExistsError, match="holds other files"):
        PromptIndex.create(tmp_path / "photos", model)
    (tmp_path / "prompts.idx/index.json").rename(tmp_path / "kept")
    with pytest.raises(FileExistsError, match=r"holds rows\.lance.* put that back, or choose another folder"):
        PromptIndex.create(tmp_path / "prompts.idx", model)
    (tmp_path / "kept").rename(tmp_path / "prompts.idx/index.json")
    assert len(PromptIndex.open(tmp_path / "prompts.idx", model)) == 7


def test_somebody_elses_tables_stay(tmp_path, model):
    import lancedb

    lancedb.connect(tmp_path / "foreign").create_table("pictures", [{"name": "cat", "content": b"cat"}])
    with pytest.raises(FileExistsError):
        PromptIndex.create(tmp_path / "foreign", model)
    assert lancedb.connect(tmp_path / "foreign").open_table("pictures").count_rows() == 1


def test_a_saved_index_gives_the_same_answers_and_is_one_folder(index, tmp_path, model):
    before = answers(index.search("a fox in the snow"))
    index.save(tmp_path / "prompts.idx")
    opened = PromptIndex.open(tmp_path / "prompts.idx", model)
    assert answers(opened.search("a fox in the snow")) == before
    assert [path.name for path in tmp_path.iterdir()] == ["prompts.idx"]
    assert sorted(path.name for path in (tmp_path / "prompts.idx").iterdir()) == [
        "index.json",
        "pictures.lance",
        "rows.lance",
    ]
    opened.delete(["a"])
    index.save(tmp_path / "prompts.idx")
    assert len(PromptIndex.open(tmp_path / "prompts.idx", model)) == 6
    with pytest.raises(ValueError, match="is the index itself"):
        opened.save(tmp_path / "." / "prompts.idx")
    PromptIndex(model).save(tmp_path / "empty")
    assert len(PromptIndex.open(tmp_path / "empty", model)) == 0


def test_vectors_are_stored_as_float16(tmp_path, model):
    index = PromptIndex(model)
    vectors = np.random.default_rng(0).standard_normal((2000, 32))
    index.add([f"text {n}" for n in range(2000)], vectors=vectors)
    index.save(tmp_path / "idx")
    assert LanceStore(tmp_path / "idx")._table("rows").schema.field("vector").type.value_type == "halffloat"


def test_pictures_are_stored_as_given_once_each_and_read_when_asked_for(tmp_path, model):
    picture = Image.new("RGB", (5, 4), (200, 10, 10))
    picture.save(tmp_path / "fox.webp", lossless=True)
    given = (tmp_path / "fox.webp").read_bytes()
    memory = Image.new("RGBA", (3, 3), (0, 0, 255, 128))
    index = PromptIndex.create(tmp_path / "idx", model)
    images = [tmp_path / "fox.webp", None, memory, str(tmp_path / "fox.webp"), given, Image.new("CMYK", (2, 2))]
    index.add(TEXTS, images=images, ids=list("abcdef"))
    (tmp_path / "fox.webp").unlink()

    opened = PromptIndex.open(tmp_path / "idx", model)
    assert opened.stats()["pictures"] == 3
    assert opened.store.get(["a"], vectors=False, images=True)[0].image == given
    hits = {hit.id: hit for hit in opened.search("fox", k=6)}
    assert hits["a"].image.getpixel((0, 0)) == hits["d"].image.getpixel((4, 3)) == (200, 10, 10)
    assert hits["b"].image is None
    assert hits["c"].image.tobytes() == memory.tobytes()
    assert hits["f"].image.size == (2, 2)
    assert hits["a"].image is hits["a"].image
    shutil.rmtree(tmp_path / "idx")
    assert hits["e"]._read_image is not None  # never asked for, so never read


def test_bad_pictures_are_named_and_nothing_is_added(index, tmp_path, monkeypatch):
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(buffer, "PNG")
    (tmp_path / "cut.png").write_bytes(buffer.getvalue()[:6000])
    (tmp_path / "text.png").write_text("hello")
    for name, message in (("cut.png", "damaged or cut short"), ("text.png", "is not a readable")):
        with pytest.raises(ValueError, match=rf"{name} {message}|{name}.*{message}"):
            index.add(["good", "bad"], images=[buffer.getvalue(), tmp_path / name])
    with pytest.raises(FileNotFoundError, match=r"no image file .*none\.png"):
        index.add(["a"], images=[tmp_path / "none.png"])
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ValueError, match="pixels"):
        index.add(["bomb"], images=[buffer.getvalue()])
    assert len(index) == 6
    assert index.stats()["pictures"] == 0


def test_a_stored_picture_has_the_limits_of_one_that_comes_in(index, monkeypatch):
    index.add(["a"], images=[Image.new("RGB", (64, 64))], ids=["wide"])
    monkeypatch.setattr("textcond.index.pictures.MAX_PIXELS", 1000)
    with pytest.raises(ValueError, match=r"picture of row wide is damaged .*64 x 64 pixels"):
        _ = index.get(["wide"])[0].image


def test_rebuild_makes_new_vectors_of_the_same_rows_and_goes_on_where_it_stopped(tmp_path, model, monkeypatch, capsys):
    index = PromptIndex.create(tmp_path / "old", model)
    index.add(TEXTS, [{"n": n} for n in range(6)], [Image.new("L", (2, 2), 9)] + [None] * 5, ids=list("abcdef"))
    other = encoder(seed=1, width=16)
    partly = PromptIndex.create(tmp_path / "new", other)
    partly.add(TEXTS[:2], [{"n": 0}, {"n": 1}], [Image.new("L", (2, 2), 9), None], ids=["a", "b"])
    encoded = []
    encode = other.encode
    monkeypatch.setattr(other, "encode", lambda texts, **options: encoded.extend(texts) or encode(texts, **options))

    # the encoder of the old index is not needed
    rebuilt = PromptIndex.open(tmp_path / "old").rebuild(tmp_path / "new", other, show_progress_bar=True)
    assert "6/6" in capsys.readouterr().err
    assert sorted(encoded) == sorted(TEXTS[2:])
    assert [(hit.text, hit.metadata["n"]) for hit in rebuilt.get(list("abcdef"))] == list(zip(TEXTS, range(6)))
    assert rebuilt.get(["a"])[0].image.getpixel((0, 0)) == 9
    assert rebuilt.search("snow", k=1)[0].id == "d"
    with pytest.raises(ValueError, match="holds 16-wide vectors"):
        index.rebuild(tmp_path / "new", encoder(seed=2))


# the encoder behind an index


def test_another_encoder_is_refused_with_the_mend(index, tmp_path):
    index.save(tmp_path / "idx")
    for other in (encoder(seed=1), encoder(pooling="cls"), encoder(prompts={"query": "q: "}), encoder().bfloat16()):
        with pytest.raises(ValueError, match=r"built with another encoder.* in float32, or .*`textcond index rebuild`"):
            PromptIndex.open(tmp_path / "idx", other)
    with pytest.raises(ValueError, match="holds 32-wide vectors, the encoder gives 16"):
        PromptIndex.open(tmp_path / "idx", encoder(width=16))
    nameless = PromptIndex.open(tmp_path / "idx")
    assert (len(nameless), nameless.search("dog", mode="lexical")[0].id) == (6, "e")
    with pytest.raises(ValueError, match="names no encoder, as it was built with one in memory: pass encoder="):
        nameless.search("dog")


@pytest.mark.parametrize(("place", "stored"), [("idx/encoder", "encoder"), ("text_encoder", "../text_encoder")])
def test_an_encoder_inside_or_beside_the_index_moves_with_it(tmp_path, place, stored):
    old = tmp_path / "old"
    encoder().save_pretrained(old / place)
    index = filled(PromptIndex(TextEncoder.from_pretrained(old / place)))
    index.save(old / "idx")
    index.save(old / "idx")  # replacing the index keeps the encoder inside it
    assert json.loads((old / "idx/index.json").read_text())["encoder"] == stored
    expected = answers(index.search("fox"))
    shutil.move(old, tmp_path / "new")
    moved = PromptIndex.open(tmp_path / "new/idx")
    assert answers(moved.search("fox")) == expected
    moved.save(tmp_path / "new/copy/idx")
    assert answers(PromptIndex.open(tmp_path / "new/copy/idx").search("fox")) == expected


def test_an_encoder_elsewhere_is_named_by_its_folder_and_dtype(tmp_path):
    encoder().save_pretrained(tmp_path / "models/encoder")
    loaded = TextEncoder.from_pretrained(tmp_path / "models/encoder", dtype=torch.bfloat16)
    index = filled(PromptIndex.create(tmp_path / "indexes/idx", loaded))
    opened = PromptIndex.open(tmp_path / "indexes/idx")
    assert opened.encoder.dtype == torch.bfloat16
    assert answers(opened.search("fox")) == answers(index.search("fox"))
    shutil.rmtree(tmp_path / "models")
    with pytest.raises(FileNotFoundError, match="models/encoder"):
        PromptIndex.open(tmp_path / "indexes/idx").search("fox")


def test_an_encoder_that_was_trained_since_is_refused_at_saving(tmp_path):
    index = filled(PromptIndex(encoder()))
    with torch.no_grad():
        index.encoder.backbone.embeddings.word_embeddings.weight.add_(0.1)
    with pytest.raises(ValueError, match="the encoder changed after rows were added"):
        index.save(tmp_path / "idx")
    assert not (tmp_path / "idx").exists()


# bad input


def test_bad_queries_are_named(index):
    for k in (0, -1):
        with pytest.raises(ValueError, match=f"k={k}: ask for at least 1"):
            index.search("fox", k=k)
    for vector, message in (
        (np.ones(31), r"the query has shape \(31,\), the index holds vectors of shape \(32,\)"),
        (np.ones((1, 32)), r"shape \(1, 32\)"),
        (np.zeros(32), "zero or not finite"),
        (np.full(32, np.nan), "zero or not finite"),
        (Image.new("L", (2, 2)), "reads no pictures"),
    ):
        with pytest.raises(ValueError, match=message):
            index.search(vector)
    for query in ("", " \n"):
        with pytest.raises(ValueError, match="the query is empty"):
            index.search(query)
    with pytest.raises(ValueError, match="the query has 1,048,576 characters, at most 10,000"):
        index.search("x" * 2**20)
    with pytest.raises(ValueError, match="a query or an id"):
        index.search()
    with pytest.raises(ValueError, match="a query or an id"):
        index.search("fox", id="a")
    with pytest.raises(ValueError, match="mode 'fuzzy' is unknown: use hybrid, dense or lexical"):
        index.search("fox", mode="fuzzy")
    with pytest.raises(ValueError, match=r"diversity=1\.5"):
        index.search("fox", diversity=1.5)
    with pytest.raises(ValueError, match="has no words"):
        index.search(np.ones(32), mode="lexical")


@pytest.mark.parametrize(
    ("wanted", "error", "message"),
    [
        ("noto", TypeError, "a filter is a dict"),
        ({"a": {"above": 3}}, ValueError, "bounds .*above.*: use gt, gte, lt, lte"),
        ({"a": {}}, ValueError, "use gt"),
        ({"a": {"gt": None}}, TypeError, "bound gt is None"),
        ({"a": []}, ValueError, "lists no value"),
        ({"a": [["x"]]}, TypeError, "asks for"),
        ({"a": float("nan")}, TypeError, "asks for nan"),
        ({3: "x"}, TypeError, "names metadata fields by strings"),
        ({"a": list(range(50_000))}, ValueError, "'a' lists 50,000 values: at most 1,000 are asked for, split"),
        ({f"field {n}": 1 for n in range(101)}, ValueError, "over 101 fields: at most 100"),
        ({"a": "x\ud800"}, ValueError, r"filter 'a': 'x\\ud800' holds half of a surrogate pair: write it again"),
        ({"a": {"lt": "\udfff"}}, ValueError, r"bound lt '\\udfff' holds half"),
        ({"\ud800": 1}, ValueError, r"filter '\\ud800' holds half"),
        ({"a": [1, 2**64]}, ValueError, r"'a' asks for an integer of 65 bits: .* to 2\*\*64 - 1"),
        ({"a": -(10**5000)}, ValueError, "an integer of 16,610 bits"),
    ],
)
def test_bad_filters_are_named(index, wanted, error, message):
    for use in (lambda: index.search("fox", filter=wanted), lambda: index.count(wanted)):
        with pytest.raises(error, match=message):
            use()


def test_bad_rows_are_named_and_nothing_is_added(index):
    for error, message, arguments in (
        (TypeError, "put the one text in a list", {"texts": "fox"}),
        (ValueError, "2 texts with 1 metadata", {"texts": ["a", "b"], "metadata": [{}]}),
        (ValueError, "2 texts with 3 images", {"texts": ["a", "b"], "images": [None] * 3}),
        (ValueError, "2 texts with 1 ids", {"texts": ["a", "b"], "ids": ["x"]}),
        (ValueError, "id 'x' is given twice", {"texts": ["a", "b"], "ids": ["x", "x"]}),
        (TypeError, "an id is a string", {"texts": ["a"], "ids": [3]}),
        (TypeError, "metadata 1 is not a dict of JSON values", {"texts": ["a", "b"], "metadata": [None, {"x": {1}}]}),
        (TypeError, "metadata 0 is not a dict of JSON", {"texts": ["a"], "metadata": [{"x": float("nan")}]}),
        (TypeError, "a text is a string, got int at place 1", {"texts": ["a", 3]}),
        (ValueError, "text 1 is empty", {"texts": ["a", " "]}),
        (ValueError, "text 0 is empty", {"texts": [""], "images": [Image.new("L", (2, 2))]}),
        (ValueError, r"vectors have shape \(1, 32\)", {"texts": ["a", "b"], "vectors": np.ones((1, 32))}),
        (
            ValueError,
            "the vector of 'b' is zero or not finite",
            {"texts": ["a", "b"], "vectors": np.eye(2, 32) * [[1], [0]]},
        ),
    ):
        for write in (index.add, index.upsert):
            with pytest.raises(error, match=message):
                write(**arguments)
    assert len(index) == len(index.search("fox", k=100)) == len(TEXTS)


def test_what_is_no_index_is_told(index, tmp_path, model):
    with pytest.raises(FileNotFoundError, match=r"there is no index at .*none"):
        PromptIndex.open(tmp_path / "none")
    (tmp_path / "folder").mkdir()
    with pytest.raises(FileNotFoundError, match=r"holds no prompt index \(index\.json is missing\)"):
        PromptIndex.open(tmp_path / "folder")
    index.save(tmp_path / "idx")
    info = json.loads((tmp_path / "idx/index.json").read_text())

    def opened(content):
        (tmp_path / "idx/index.json").write_text(json.dumps(content))
        return PromptIndex.open(tmp_path / "idx", model)

    with pytest.raises(ValueError, match="has index version 3, this release reads 2"):
        opened(info | {"version": 3})
    with pytest.raises(ValueError, match="is not a prompt index: it says format 'other'"):
        opened(info | {"format": "other"})
    with pytest.raises(ValueError, match="does not say its weights_hash"):
        opened({key: value for key, value in info.items() if key != "weights_hash"})
    assert len(opened(info)) == 6


def test_a_save_that_fails_leaves_the_old_index(index, tmp_path, model, monkeypatch):
    index.save(tmp_path / "idx")
    index.add(["b"])

    def full(*arguments, **options):
        raise OSError("no space left")

    monkeypatch.setattr(LanceStore, "upsert", full)
    with pytest.raises(OSError, match="no space left"):
        index.save(tmp_path / "idx")
    assert len(PromptIndex.open(tmp_path / "idx", model)) == len(TEXTS)
    assert [path.name for path in tmp_path.iterdir()] == ["idx"]


def test_a_rebuild_mixes_no_indexes_and_makes_changed_rows_anew(tmp_path):
    index = PromptIndex.create(tmp_path / "old", encoder())
    index.add(["a fox", "a whale"], ids=["fox", "whale"])
    index.rebuild(tmp_path / "new", encoder(seed=1))
    index.upsert(["a red fox"], ids=["fox"])
    rebuilt = index.rebuild(tmp_path / "new", encoder(seed=1))
    assert {row.id: row.text for row in rebuilt.rows()} == {"fox": "a red fox", "whale": "a whale"}
    np.testing.assert_allclose(
        rebuilt.store.get(["fox"], vectors=True, images=False)[0].vector,
        encoder(seed=1).encode(["a red fox"], kind="document")[0],
        atol=2e-3,
    )
    index.delete(["whale"])
    with pytest.raises(ValueError, match=r"holds the row 'whale', which is not in .*old"):
        index.rebuild(tmp_path / "new", encoder(seed=1))
    with pytest.raises(ValueError, match="is the index itself"):
        index.rebuild(tmp_path / "old", encoder(seed=1))


def test_a_search_asks_a_store_for_no_more_than_it_gives(monkeypatch):
    index = PromptIndex(encoder())
    index.add([f"astronaut horse {'!' * place}" for place in range(60)])  # alike, but for one
    index.add(["a fox"])
    monkeypatch.setattr(index.store, "most", 40, raising=False)
    asked, dense = [], index.store.dense
    monkeypatch.setattr(index.store, "dense", lambda vector, k, *_, **__: asked.append(k) or dense(vector, k, *_, **__))
    assert len(index.search("astronaut horse", k=5)) in (1, 2)
    assert max(asked) == 40
    with pytest.raises(ValueError, match="k=41: this store gives at most 40 rows"):
        index.search("fox", k=41)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"texts": ["\ud800"]}, "text 0 .* half of a surrogate pair"),
        ({"texts": ["fox"], "ids": ["\ud800"]}, "id 0 .* half of a surrogate pair"),
        ({"texts": ["fox"], "metadata": [{"a": ["\ud800"]}]}, "metadata 0 .* half of a surrogate pair"),
        ({"texts": ["fox"], "metadata": [{"a": [2**64]}]}, "its integers of 64 bits"),
        ({"texts": ["fox"], "metadata": [{"a": -(2**63) - 1}]}, "its integers of 64 bits"),
    ],
)
def test_what_no_store_can_keep_is_refused(given, message):
    index = PromptIndex(encoder())
    with pytest.raises((ValueError, TypeError), match=message):
        index.add(**given)
    with pytest.raises(ValueError, match=r"the query .* half of a surrogate pair"):
        index.search("\ud800")
    index.add(["fox"], metadata=[{"a": 2**64 - 1, "b": [-(2**63)]}])
    assert len(index) == 1
