import io
import json
import shutil
import zipfile

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

from textcond import PromptIndex, TextEncoder, TextEncoderConfig

TEXTS = ["a red fox", "a green fox", "the house by the river", "snow", "a dog in the snow", ""]


def encoder(seed=0, width=32, **config):
    backbone, tokenizer = tiny.backbone("bert", width=width, seed=seed)
    with torch.no_grad():
        for parameter in backbone.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
    return TextEncoder(backbone, tokenizer, TextEncoderConfig(**config))


@pytest.fixture
def index():
    index = PromptIndex(encoder())
    index.add(TEXTS, metadata=[{"number": number, "name": f"é{number}"} for number in range(len(TEXTS))])
    return index


def answers(hits):
    return [(hit.id, hit.score, hit.text, hit.metadata) for hit in hits]


def test_search_ranks_by_cosine(index):
    hits = index.search("a red fox", k=3)
    expected = index.encoder.encode(TEXTS) @ index.encoder.encode("a red fox")
    assert [hit.id for hit in hits] == np.argsort(-expected)[:3].tolist()
    assert hits[0].text == "a red fox"
    assert hits[0].metadata == {"number": 0, "name": "é0"}
    assert hits[0].image is None
    assert hits[0].score == pytest.approx(1, abs=1e-3)
    assert [hit.score for hit in hits] == pytest.approx(np.sort(expected)[::-1][:3].tolist(), abs=1e-3)


def test_a_vector_and_its_text_find_the_same_whatever_the_vector_length(index):
    vector = index.encoder.encode("the dog", kind="query")
    by_vector, by_text = index.search(vector * 7), index.search("the dog")
    assert [hit.id for hit in by_vector] == [hit.id for hit in by_text]
    assert [hit.score for hit in by_vector] == pytest.approx([hit.score for hit in by_text], abs=1e-6)


def test_queries_and_documents_get_their_prompts():
    both = encoder(prompts={"query": "query: ", "document": "doc: "})
    index = PromptIndex(both)
    index.add(["a fox"])
    hit = index.search("a fox")[0]
    assert hit.score == pytest.approx(float(both.encode("doc: a fox") @ both.encode("query: a fox")), abs=1e-3)
    assert index.search("a fox", kind="document")[0].score > hit.score + 1e-3


def test_every_row_comes_back_when_more_are_asked_for_and_none_from_nothing(index):
    assert sorted(hit.id for hit in index.search("fox", k=1000)) == list(range(len(TEXTS)))
    assert PromptIndex(encoder()).search("fox") == []


def test_rows_come_in_the_order_of_adding(index):
    assert [(row.id, row.text, row.metadata["number"]) for row in index.rows()] == [
        (number, text, number) for number, text in enumerate(TEXTS)
    ]


def test_equal_rows_come_in_the_order_of_adding():
    index = PromptIndex(encoder())
    for _ in range(7):
        index.add(["a fox", "a dog", "a fox"] * 3)
    foxes = [row for row in range(63) if row % 3 != 1]
    for k in (1, 5, 42):
        hits = index.search("a fox", k=k)
        assert [hit.id for hit in hits] == foxes[:k]
    assert len({hit.score for hit in index.search("a fox", k=42)}) == 1


def test_adding_in_parts_is_adding_at_once(index):
    parts = PromptIndex(encoder())
    parts.add(iter(TEXTS[:2]))
    parts.search("fox")
    parts.add([])
    parts.add(text for text in TEXTS[2:])
    assert len(parts) == len(TEXTS)
    assert [(hit.id, hit.score) for hit in parts.search("fox")] == [
        (hit.id, pytest.approx(hit.score, abs=1e-6)) for hit in index.search("fox")
    ]


def test_an_opened_index_gives_exactly_the_same_answers(index, tmp_path):
    before = answers(index.search("a fox in the snow"))
    index.save(tmp_path / "prompts.idx")
    opened = PromptIndex.open(tmp_path / "prompts.idx", encoder())
    assert answers(opened.search("a fox in the snow")) == before
    assert len(opened) == len(TEXTS)
    config = json.loads((tmp_path / "prompts.idx/config.json").read_text())
    assert (config["rows"], config["dim"], config["vectors"]) == (6, 32, "float16")

    opened.add(["another"])
    opened.save(tmp_path / "prompts.idx")
    assert len(PromptIndex.open(tmp_path / "prompts.idx", encoder())) == 7
    assert [path.name for path in tmp_path.iterdir()] == ["prompts.idx"]


def test_an_empty_index_is_saved_and_opened(tmp_path):
    PromptIndex(encoder()).save(tmp_path / "empty")
    opened = PromptIndex.open(tmp_path / "empty", encoder())
    assert len(opened) == 0
    opened.add(["a"])
    assert opened.search("a")[0].id == 0


# pictures


def test_pictures_are_stored_as_given_once_each_and_read_when_asked_for(tmp_path):
    picture = Image.new("RGB", (5, 4), (200, 10, 10))
    picture.save(tmp_path / "fox.webp", lossless=True)
    memory = Image.new("RGBA", (3, 3), (0, 0, 255, 128))
    index = PromptIndex(encoder())
    index.add(TEXTS[:4], images=[tmp_path / "fox.webp", None, memory, str(tmp_path / "fox.webp")])
    by_id = {hit.id: hit for hit in index.search("fox", k=4)}
    assert by_id[0].image.size == (5, 4)
    assert by_id[2].image.tobytes() == memory.tobytes()
    index.save(tmp_path / "idx")
    given = (tmp_path / "fox.webp").read_bytes()
    (tmp_path / "fox.webp").unlink()

    opened = PromptIndex.open(tmp_path / "idx", encoder())
    with zipfile.ZipFile(tmp_path / "idx/images.zip") as archive:
        assert len(archive.namelist()) == 2
        assert given in [archive.read(name) for name in archive.namelist()]
        assert {info.compress_type for info in archive.infolist()} == {zipfile.ZIP_STORED}
    by_id = {hit.id: hit for hit in opened.search("fox", k=4)}
    assert by_id[0].image.getpixel((0, 0)) == by_id[3].image.getpixel((4, 3)) == (200, 10, 10)
    assert by_id[1].image is None
    assert by_id[2].image.tobytes() == memory.tobytes()
    assert by_id[0].image is by_id[0].image

    opened.add(["more"], images=[Image.new("CMYK", (2, 2))])
    opened.save(tmp_path / "idx")
    again = PromptIndex.open(tmp_path / "idx", encoder())
    pictures = [hit.image for hit in sorted(again.search("fox", k=5), key=lambda hit: hit.id)]
    assert [image and image.size for image in pictures] == [(5, 4), None, (3, 3), (5, 4), (2, 2)]


def test_the_same_index_is_the_same_bytes(tmp_path):
    for name in ("one", "two"):
        index = PromptIndex(encoder())
        index.add(["a"], images=[Image.new("RGB", (4, 4))])
        index.save(tmp_path / name)
    for file in (tmp_path / "one").iterdir():
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes()


# the encoder behind an index


def test_another_encoder_is_refused_with_the_mend(index, tmp_path):
    index.save(tmp_path / "idx")
    for other in (encoder(seed=1), encoder(pooling="cls"), encoder(prompts={"query": "q: "}), encoder().bfloat16()):
        with pytest.raises(ValueError, match=r"built with another encoder.* in float32, or build it again"):
            PromptIndex.open(tmp_path / "idx", other)
    with pytest.raises(ValueError, match="holds 32-wide vectors, the encoder gives 16"):
        PromptIndex.open(tmp_path / "idx", encoder(width=16))
    with pytest.raises(ValueError, match="names no encoder, as it was built with one in memory: pass encoder="):
        PromptIndex.open(tmp_path / "idx")


@pytest.mark.parametrize(("place", "stored"), [("idx/encoder", "encoder"), ("text_encoder", "../text_encoder")])
def test_an_encoder_inside_or_beside_the_index_moves_with_it(tmp_path, place, stored):
    old = tmp_path / "old"
    encoder().save_pretrained(old / place)
    index = PromptIndex(TextEncoder.from_pretrained(old / place))
    index.add(TEXTS)
    index.save(old / "idx")
    index.save(old / "idx")  # replacing the index keeps the encoder inside it
    assert json.loads((old / "idx/config.json").read_text())["encoder"] == stored
    expected = answers(index.search("fox"))
    shutil.move(old, tmp_path / "new")
    assert answers(PromptIndex.open(tmp_path / "new/idx").search("fox")) == expected


def test_an_encoder_elsewhere_is_named_by_its_folder_and_dtype(tmp_path):
    encoder().save_pretrained(tmp_path / "models/encoder")
    index = PromptIndex(TextEncoder.from_pretrained(tmp_path / "models/encoder", dtype=torch.bfloat16))
    index.add(TEXTS)
    index.save(tmp_path / "indexes/idx")
    opened = PromptIndex.open(tmp_path / "indexes/idx")
    assert opened.encoder.dtype == torch.bfloat16
    assert answers(opened.search("fox")) == answers(index.search("fox"))
    shutil.rmtree(tmp_path / "models")
    with pytest.raises(FileNotFoundError, match="models/encoder"):
        PromptIndex.open(tmp_path / "indexes/idx")


def test_an_encoder_that_was_trained_since_is_refused_at_saving(index, tmp_path):
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
    with pytest.raises(ValueError, match=r"the query has shape \(31,\), the index holds vectors of shape \(32,\)"):
        index.search(np.ones(31))
    with pytest.raises(ValueError, match=r"shape \(1, 32\)"):
        index.search(np.ones((1, 32)))
    for bad in (np.zeros(32), np.full(32, np.nan)):
        with pytest.raises(ValueError, match="zero or not finite"):
            index.search(bad)
    assert len(index.search("", k=2)) == 2


def test_bad_rows_are_named_and_nothing_is_added(index, tmp_path):
    with pytest.raises(TypeError, match="put the one text in a list"):
        index.add("fox")
    with pytest.raises(ValueError, match="2 texts with 1 metadata"):
        index.add(["a", "b"], metadata=[{}])
    with pytest.raises(ValueError, match="2 texts with 3 images"):
        index.add(["a", "b"], images=[None] * 3)
    with pytest.raises(TypeError, match=r"metadata 1 is not a dict of JSON values: .'x': .1.."):
        index.add(["a", "b"], metadata=[None, {"x": {1}}])
    with pytest.raises(FileNotFoundError, match=r"no image file .*none\.png"):
        index.add(["a"], images=[tmp_path / "none.png"])
    with pytest.raises(TypeError, match="a text is a string, got int"):
        index.add(["a", 3])
    assert len(index) == len(TEXTS)
    assert len(index.search("fox", k=100)) == len(TEXTS)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 3 is not a row"),
        ('{"text": "x"}', "line 3 is not a row .*metadata"),
        ('{"text": 3, "metadata": {}}', "line 3 is not a row .*text must be a string"),
        ("[]", "line 3 is not a row"),
        ("", "line 3 is not a row"),
        ('{"text": "x", "metadata": {}, "image": "a.png"}', "line 3 names picture 'a.png'"),
    ],
)
def test_malformed_rows_are_named_by_line(index, tmp_path, line, message):
    index.save(tmp_path / "idx")
    rows = (tmp_path / "idx/rows.jsonl").read_text().splitlines()
    rows[2] = line
    (tmp_path / "idx/rows.jsonl").write_text("\n".join(rows) + "\n")
    with pytest.raises(ValueError, match=message):
        PromptIndex.open(tmp_path / "idx", index.encoder)


def test_damaged_indexes_are_named(index, tmp_path):
    index.add(["picture"], images=[Image.new("L", (2, 2))])
    path = tmp_path / "idx"

    def refuse(error, message, damage):
        shutil.rmtree(path, ignore_errors=True)
        index.save(path)
        damage()
        with pytest.raises(error, match=message):
            PromptIndex.open(path, index.encoder)

    def edit(**change):
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps(config | change))

    def drop(key):
        config = json.loads((path / "config.json").read_text())
        del config[key]
        (path / "config.json").write_text(json.dumps(config))

    def cut(name):
        content = (path / name).read_bytes()
        (path / name).write_bytes(content[: len(content) // 2])

    refuse(ValueError, r"config\.json is not valid JSON", lambda: cut("config.json"))
    refuse(ValueError, "is not a prompt index", lambda: edit(format="other"))
    refuse(ValueError, "has index version 2, this release reads 1", lambda: edit(version=2))
    refuse(ValueError, "lacks weights_hash", lambda: drop("weights_hash"))
    refuse(ValueError, r"vectors\.safetensors is damaged or cut short", lambda: cut("vectors.safetensors"))
    refuse(ValueError, r"images\.zip is damaged", lambda: cut("images.zip"))
    refuse(ValueError, "does not hold the 9 vectors", lambda: edit(rows=9))
    refuse(FileNotFoundError, r"holds no vectors\.safetensors", lambda: (path / "vectors.safetensors").unlink())
    refuse(FileNotFoundError, r"holds no rows\.jsonl", lambda: (path / "rows.jsonl").unlink())
    refuse(FileNotFoundError, "no index folder", lambda: shutil.rmtree(path))

    def shorten():
        rows = (path / "rows.jsonl").read_text().splitlines()
        (path / "rows.jsonl").write_text("\n".join(rows[:-1]))

    refuse(ValueError, "has 6 rows, config.json says 7", shorten)


def test_a_save_that_fails_leaves_the_old_index(index, tmp_path):
    index.save(tmp_path / "idx")
    picture = tmp_path / "gone.png"
    Image.new("L", (2, 2)).save(picture)
    index.add(["b"], images=[picture])
    picture.unlink()
    with pytest.raises(FileNotFoundError):
        index.save(tmp_path / "idx")
    assert len(PromptIndex.open(tmp_path / "idx", index.encoder)) == len(TEXTS)
    assert [path.name for path in tmp_path.iterdir()] == ["idx"]


def test_a_picture_is_a_loaded_image_that_needs_no_open_file(tmp_path):
    buffer = io.BytesIO()
    Image.new("L", (2, 2), 7).save(buffer, "PNG")
    (tmp_path / "a.PNG").write_bytes(buffer.getvalue())
    index = PromptIndex(encoder())
    index.add(["a"], images=[tmp_path / "a.PNG"])
    index.save(tmp_path / "idx")
    hit = PromptIndex.open(tmp_path / "idx", index.encoder).search("a")[0]
    image = hit.image
    shutil.rmtree(tmp_path / "idx")
    assert image.getpixel((1, 1)) == 7
