import os
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import tiny
from PIL import Image
from store_conformance import StoreConformance

from textcond import PromptIndex
from textcond.index import milvus
from textcond.index.filters import conditions
from textcond.index.lexical import query_terms
from textcond.index.milvus import MilvusStore
from textcond.index.store import Row

SERVER = os.environ.get("TEXTCOND_MILVUS")
server_only = pytest.mark.skipif(
    not SERVER, reason="set TEXTCOND_MILVUS=http://host:port to test against a Milvus server"
)


def rows(count=60, dim=8, start=0):
    vectors = np.random.default_rng(start).standard_normal((count, dim)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return [
        Row(
            f"row {number}", f"red fox number{number} 赤い狐", {"steps": number, "style": "ab"[number % 2]},
            vectors[number - start],
        )
        for number in range(start, start + count)
    ]  # fmt: skip


def collection(address, name):
    """A store of a new collection on a server."""
    store = MilvusStore(f"{address}/{name}")
    if store.info():
        store._client.drop_collection(name)
        store.close()
        store = MilvusStore(f"{address}/{name}")
    return store


@pytest.fixture(params=["lite", pytest.param("server", marks=server_only)])
def store(request, tmp_path):
    if request.param == "server":
        store = collection(SERVER, "textcond_test")
        yield store
        store._client.drop_collection("textcond_test")
    else:
        store = MilvusStore(tmp_path / "index.db")
        yield store
    store.close()


class TestMilvusLite(StoreConformance):
    @pytest.fixture
    def open_store(self, tmp_path):
        opened = []

        def open_store():
            opened.append(MilvusStore(tmp_path / "index.db"))
            return opened[-1]

        yield open_store
        for store in opened:
            store.close()


@server_only
class TestMilvusServer(StoreConformance):
    @pytest.fixture
    def open_store(self):
        opened = [collection(SERVER, "textcond_conformance")]

        def open_store():
            opened.append(MilvusStore(opened[0].address))
            return opened[-1]

        yield open_store
        opened[0]._client.drop_collection("textcond_conformance")
        for store in opened:
            store.close()


def test_rows_and_info_are_found_by_the_next_store(store):
    assert store.info() == {}
    store.set_info({"dim": 8, "encoder": "ü"})
    store.upsert(rows())
    store.set_info({"dim": 8, "encoder": "b"})
    again = MilvusStore(store.address)
    assert again.info() == {"dim": 8, "encoder": "b"}
    assert again.count(None) == 60
    again.close()
    assert store.count(None) == 60  # closing one store leaves the others of the process open


AWKWARD = {
    'quote"': 'a"b',
    "back\\slash": "a\\b",
    "path/like~": "a'b",
    "ümlaut 🦊": "é🦊\n\t",
    "seed": 2**63 + 5,
    "": "empty name",
    "list": [1, {"a": None}],
    "nothing": None,
    "one": 1,
    "half": 0.5,
    "yes": True,
}


@pytest.mark.parametrize(
    "filter",
    [{name: value} for name, value in AWKWARD.items() if name and not isinstance(value, list)]
    + [{"list": None}, {"absent": None}, {"one": True}, {"one": "1"}, {"yes": 1}, {"one": 1.0}, {"half": {"gt": 0}}]
    + [{"one": {"gte": 1, "lt": float("inf")}}, {"yes": {"gt": 0}}, {"back\\slash": {"gte": "a", "lt": "b"}}]
    + [{"one": [None, "x", 1]}, {"nothing": [None, 3]}, {"half": {"gt": "a"}}, {"seed": {"gt": 10**30}}],
)
def test_filters_mean_what_they_mean_in_python(filter, awkward):
    content = [row for page in awkward.scan(None, batch=10, vectors=False, images=False) for row in page]
    expected = {row.id for row in content if all(condition.holds(row.metadata) for condition in conditions(filter))}
    found = [row for page in awkward.scan(filter, batch=10, vectors=False, images=False) for row in page]
    assert {row.id for row in found} == expected
    assert awkward.count(filter) == len(expected)


@pytest.fixture(scope="module", params=["lite", pytest.param("server", marks=server_only)])
def awkward(request, tmp_path_factory):
    if request.param == "server":
        store = collection(SERVER, "textcond_awkward")
    else:
        store = MilvusStore(tmp_path_factory.mktemp("awkward") / "index.db")
    store.set_info({"dim": 8})
    plain = rows(4)
    plain[0].metadata, plain[0].id = AWKWARD, 'it\'s "row" \\ 0'
    plain[1].metadata = {}
    store.upsert(plain)
    yield store
    store.close()


def test_metadata_and_ids_come_back_as_they_were(awkward):
    (row,) = awkward.get(['it\'s "row" \\ 0'], vectors=False, images=False)
    assert row.metadata == AWKWARD
    assert list(row.metadata) == list(AWKWARD)


def test_a_list_of_many_values_is_searched_by_halving(store):
    store.set_info({"dim": 8})
    store.upsert(rows(2000))
    wanted = {"steps": [*range(-500, 100), *range(1999, 2399)]}
    start = time.monotonic()
    assert {row.id for row, _ in store.dense(rows(1)[0].vector, 999, wanted, False)} == {
        f"row {place}" for place in (*range(100), 1999)
    }
    assert time.monotonic() - start < 3


def test_large_pictures_come_back_whole(store):
    store.set_info({"dim": 8})
    content = rows(3)
    content[0].image = os.urandom(200_001)
    content[1].image = b"x"
    store.upsert(content)
    found = store.get([row.id for row in content], vectors=False, images=True)
    assert [row.image for row in found] == [content[0].image, b"x", None]
    assert [row.has_image for row in found] == [True, True, False]
    assert [row.image for row in store.get(["row 0"], vectors=False, images=False)] == [None]


def test_a_batch_with_many_pictures_goes_in_several_requests(store, monkeypatch):
    monkeypatch.setattr(milvus, "REQUEST_BYTES", 100_000)
    content = rows(20)
    for row in content:
        row.image = os.urandom(30_000)
    store.set_info({"dim": 8})
    store.upsert(content)
    assert store.count(None) == 20


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text": "狐" * 30_000}, "its text has 90,000 bytes, Milvus takes 65,535"),
        ({"id": "i" * 2_000}, "its id has 2,000 bytes"),
        ({"metadata": {"a": "x" * 70_000}}, "its metadata has"),
    ],
)
def test_what_milvus_cannot_hold_is_refused_before_anything_is_written(tmp_path, change, message):
    store = MilvusStore(tmp_path / "index.db")
    store.set_info({"dim": 8})
    content = rows(3)
    for name, value in change.items():
        setattr(content[2], name, value)
    with pytest.raises(ValueError, match=message):
        store.upsert(content)
    assert store.count(None) == 0
    store.close()


def test_words_are_found_in_rows_as_they_are_now(store):
    store.set_info({"dim": 8})
    assert store.lexical(query_terms("fox"), 5, None) == []
    store.upsert(rows(10))
    assert [row.id for row, _ in store.lexical(query_terms("number7"), 5, None)] == ["row 7"]
    changed = rows(10)[7]
    changed.text = "blue whale"
    store.upsert([changed])
    assert store.lexical(query_terms("number7"), 5, None) == []
    assert [row.id for row, _ in store.lexical(query_terms("whale"), 5, None)] == ["row 7"]
    assert len(store.lexical(query_terms("狐"), 20, {"style": "a"})) == 5
    store.delete(["row 7"], None)
    assert store.lexical(query_terms("whale"), 5, None) == []


def test_another_store_of_the_process_sees_changed_words(store):
    store.set_info({"dim": 8})
    store.upsert(rows(5))
    other = MilvusStore(store.address)
    assert len(other.lexical(query_terms("fox"), 10, None)) == 5
    store.upsert(rows(5, start=5))
    assert other.count(None) == 10  # waits until a server shows the write
    assert len(other.lexical(query_terms("fox"), 10, None)) == 10
    other.close()


def test_an_ann_index_is_built_when_there_are_many_rows_and_set_aside_on_demand(store, monkeypatch):
    monkeypatch.setattr(milvus, "ANN_ROWS", 300)
    content = rows(400, dim=16)
    matrix = np.stack([row.vector for row in content])
    store.set_info({"dim": 16})
    store.upsert(content[:200])
    store.optimize()
    assert store.stats()["ann"] is None
    store.upsert(content[200:])
    store.optimize()
    assert store.stats()["ann"] == "HNSW"
    query = matrix[7] + 0.1
    query /= np.linalg.norm(query)
    expected = [f"row {place}" for place in np.argsort(-(matrix @ query))[:10]]
    assert [row.id for row, _ in store.dense(query, 10, None, exact=True)] == expected
    assert len({row.id for row, _ in store.dense(query, 10, None, exact=False)} & set(expected)) >= 9
    again = MilvusStore(store.address)
    assert again.stats()["ann"] == "HNSW"
    again.upsert(rows(1, dim=16, start=1000))
    assert again.count(None) == 401
    again.close()


def test_bm25_of_the_server_is_used_where_there_is_one(tmp_path, monkeypatch):
    # Milvus Lite has the function of Milvus 2.5, though with another analyzer and statistics by segment
    monkeypatch.setattr(milvus, "SPLIT_TOKENS", {"tokenizer": "standard"})
    store = MilvusStore(tmp_path / "index.db")
    store._has_bm25 = True
    store.set_info({"dim": 8})
    store.upsert(rows(20))
    monkeypatch.setattr(store, "_words_of_rows", None)
    assert store.stats()["lexical"] == "Milvus BM25"
    assert [row.id for row, _ in store.lexical(query_terms("number7"), 5, None)] == ["row 7"]
    assert len(store.lexical(query_terms("狐"), 50, {"style": "a"})) == 10
    again = MilvusStore(tmp_path / "index.db")
    assert again.stats()["lexical"] == "Milvus BM25"
    again.close()
    store.close()


def test_a_second_process_on_a_lite_file_is_refused(tmp_path):
    store = MilvusStore(tmp_path / "index.db")
    store.set_info({"dim": 8})
    program = "import sys; from textcond.index.milvus import MilvusStore; MilvusStore(sys.argv[1]).set_info({'dim': 8})"
    command = [sys.executable, "-c", program, str(tmp_path / "index.db")]
    refused = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "another process has the Milvus Lite index" in refused.stderr.splitlines()[-1]
    assert "DataDirLockedError" not in refused.stderr
    store.close()
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0


def test_what_was_written_survives_a_kill(tmp_path):
    program = """
import os, signal, sys
sys.path[:0] = [sys.argv[2]]
from test_index_milvus import rows
from textcond.index.milvus import MilvusStore
store = MilvusStore(sys.argv[1])
store.set_info({"dim": 8})
for start in range(0, 300, 100):
    store.upsert(rows(100, start=start))
os.kill(os.getpid(), signal.SIGKILL)
"""
    command = [sys.executable, "-c", program, str(tmp_path / "index.db"), os.path.dirname(__file__)]
    assert subprocess.run(command, check=False).returncode == -9
    store = MilvusStore(tmp_path / "index.db")
    assert store.count(None) == 300
    store.close()


def test_a_collection_whose_making_was_interrupted_is_finished(tmp_path):
    store = MilvusStore(tmp_path / "index.db")
    store.set_info({"dim": 8})
    store._client.release_collection("prompts")
    store._client.drop_index("prompts", "vector")
    store.close()
    store = MilvusStore(tmp_path / "index.db")
    store.upsert(rows(5))
    assert len(store.dense(rows(1)[0].vector, 5, None, exact=True)) == 5
    store.close()


def test_a_collection_of_something_else_is_refused(tmp_path):
    from pymilvus import MilvusClient

    client = MilvusClient(str(tmp_path / "index.db"))
    client.create_collection("prompts", dimension=4)
    with pytest.raises(ValueError, match="holds no prompt index"):
        MilvusStore(tmp_path / "index.db")
    client.close()


def test_a_server_that_does_not_answer_is_one_error_within_seconds():
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{silent.getsockname()[1]}/prompts"
        start = time.monotonic()
        with pytest.raises(OSError, match="no Milvus server answers at http://127") as refused:
            MilvusStore(address)
        silent.listen(1)
        with pytest.raises(OSError, match="no Milvus server answers at http://127") as unanswered:
            MilvusStore(address)
    assert time.monotonic() - start < 15
    assert "\n" not in f"{refused.value}{unanswered.value}"


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("http://localhost:19530", "names no collection"),
        ("http://localhost:19530/a-b", "names no collection"),
        ("http://me:secret@localhost:19530/a", "MILVUS_TOKEN"),
        ("ftp://localhost/a", "form http://host:port/collection"),
        ("prompts.idx", "neither a Milvus Lite path"),
    ],
)
def test_addresses_of_another_form_are_refused(address, message):
    with pytest.raises(ValueError, match=message) as error:
        MilvusStore(address)
    assert "secret" not in str(error.value)


def test_bad_lite_paths_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder"):
        MilvusStore(tmp_path / "nowhere" / "index.db")
    (tmp_path / "old.db").write_bytes(b"SQLite format 3")
    with pytest.raises(ValueError, match="not a Milvus Lite 3 database"):
        MilvusStore(tmp_path / "old.db")


def test_a_closed_store_says_so(tmp_path):
    store = MilvusStore(tmp_path / "index.db")
    store.close()
    store.close()
    with pytest.raises(OSError, match="was closed: open it again"):
        store.count(None)


def test_more_rows_than_milvus_gives_are_refused(tmp_path):
    store = MilvusStore(tmp_path / "index.db")
    store.set_info({"dim": 8})
    for search in (
        lambda: store.dense(rows(1)[0].vector, 20_000, None, exact=True),
        lambda: store.lexical(["fox"], 20_000, None),
    ):
        with pytest.raises(ValueError, match="at most 16,384"):
            search()
    store.close()


def test_a_prompt_index_lives_in_milvus(tmp_path):
    encoder = tiny.text_encoder()
    index = PromptIndex.create(tmp_path / "index.db", encoder)
    texts = [f"a {colour} {animal}" for colour in ("red", "green", "blue") for animal in ("fox", "dog", "bird")]
    index.add(texts, [{"place": place} for place in range(9)])
    (picture,) = index.add(["a picture"], images=[Image.new("RGB", (8, 8), "red")])
    expected = [(hit.text, hit.lexical_rank) for hit in index.search("green dog", k=4)]
    assert expected[0] == ("a green dog", 1)
    assert index.get([picture])[0].image.size == (8, 8)
    with pytest.raises(FileExistsError):
        PromptIndex.create(tmp_path / "index.db", encoder)
    index.save(tmp_path / "folder")
    PromptIndex.open(tmp_path / "folder", encoder).save(tmp_path / "copy.db")
    for place in ("index.db", "folder", "copy.db"):
        again = PromptIndex.open(tmp_path / place, encoder)
        assert [(hit.text, hit.lexical_rank) for hit in again.search("green dog", k=4)] == expected
        assert [hit.text for hit in again.search("dog", mode="lexical", filter={"place": {"lt": 3}})] == ["a red dog"]
    other = index.rebuild(tmp_path / "rebuilt.db", tiny.text_encoder("mpnet"))
    assert (len(other), other.search("green dog", k=1)[0].text) == (10, "a green dog")
    with pytest.raises(ValueError, match="textcond index rebuild"):
        PromptIndex.open(tmp_path / "rebuilt.db", encoder)
