import os
import shutil
import subprocess
import sys
import time
from datetime import timedelta

import numpy as np
import pytest
from store_conformance import StoreConformance

from textcond.index import lance
from textcond.index.lance import LanceStore
from textcond.index.store import Row


class TestLanceInAFolder(StoreConformance):
    @pytest.fixture
    def open_store(self, tmp_path):
        return lambda: LanceStore(tmp_path / "an index")


class TestLanceInMemory(StoreConformance):
    @pytest.fixture
    def open_store(self):
        store = LanceStore()
        return lambda: store


def store_of(path, count=60):
    store = LanceStore(path, keep_versions=timedelta(milliseconds=1))
    store.set_info({"dim": 16})
    vectors = np.random.default_rng(0).standard_normal((count, 16)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    store.upsert([Row(f"{place:04}", f"text {place}", {}, vector) for place, vector in enumerate(vectors)])
    return store, vectors


def test_a_look_at_nothing_leaves_nothing(tmp_path):
    assert LanceStore(tmp_path / "none").info() == {}
    assert list(tmp_path.iterdir()) == []


def test_a_read_writes_nothing(tmp_path):
    store, vectors = store_of(tmp_path / "idx")
    store.optimize()
    before = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*")}
    opened = LanceStore(tmp_path / "idx")
    opened.dense(vectors[0], 3, {"a": 1}, False), opened.lexical(["text"], 3, None), opened.count(None)
    opened.get(["0001"], vectors=True, images=True), list(opened.scan(None, batch=7, vectors=False, images=True))
    assert {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*")} == before


def test_a_filter_of_many_values_is_quick_and_kills_nothing(tmp_path):
    store, vectors = store_of(tmp_path / "idx", 5000)
    wanted = {"seed": [*range(999), None]}
    start = time.monotonic()
    assert (len(store.dense(vectors[0], 10, wanted, True)), store.count(wanted)) == (10, 5000)
    assert time.monotonic() - start < 3


def test_a_making_that_was_killed_goes_on(tmp_path, monkeypatch):
    def killed(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(lance, "write_mark", killed)
        with pytest.raises(KeyboardInterrupt):
            LanceStore(tmp_path / "idx").set_info({"dim": 16})
    (tmp_path / "idx/.textcond-0123.partial").touch()
    # another was killed when LanceDB had written no version of a table yet
    (tmp_path / "other/rows.lance/_transactions").mkdir(parents=True)
    (tmp_path / "other/rows.lance/_transactions/0.txn").touch()
    for name in ("idx", "other"):
        assert LanceStore(tmp_path / name).is_unfinished()
        store, _ = store_of(tmp_path / name, 3)
        assert store.count(None) == 3


def test_tables_of_others_and_rows_without_info_are_never_dropped(tmp_path):
    import lancedb

    foreign = lancedb.connect(tmp_path / "foreign")
    foreign.create_table("pictures", [{"name": "a", "content": b"b"}])
    foreign.create_table("rows", [{"x": 1}]).delete("true")
    foreign.create_table("more", [{"x": 1}])
    assert not LanceStore(tmp_path / "foreign").is_unfinished()
    store_of(tmp_path / "lost", 3)
    (tmp_path / "lost/index.json").unlink()
    (tmp_path / "damaged/rows.lance/data").mkdir(parents=True)
    (tmp_path / "damaged/rows.lance/data/a.lance").write_bytes(b"content")
    before = {file for file in tmp_path.rglob("*") if file.name != ".lock"}
    for name in ("foreign", "lost", "damaged"):
        with pytest.raises(FileExistsError, match=r"holds rows\.lance, .* no index\.json: put that back, or choose"):
            LanceStore(tmp_path / name).set_info({"dim": 16})
    assert {file for file in tmp_path.rglob("*") if file.name != ".lock"} == before


def test_a_picture_is_stored_once_and_goes_with_its_last_row(tmp_path):
    store, vectors = store_of(tmp_path / "idx", 1)
    picture = bytes(range(256)) * 50
    store.upsert([Row(name, name, {}, vectors[0], picture) for name in ("a", "b")])
    store.upsert([Row("c", "c", {}, vectors[0], picture)])
    assert store.stats()["pictures"] == 1
    store.delete(["a", "b"], None)
    store.optimize()
    assert store.get(["c"], vectors=False, images=True)[0].image == picture
    store.delete(["c"], None)
    store.optimize()
    assert store.stats()["pictures"] == 0


def test_optimize_drops_old_versions(tmp_path):
    store, vectors = store_of(tmp_path / "idx")
    for _ in range(8):
        store.upsert([Row(f"{place:04}", "changed", {}, vector, b"x" * 3000) for place, vector in enumerate(vectors)])
    before = store.stats()
    store.optimize()
    after = store.stats()
    assert (before["rows"], after["rows"], after["pieces"]) == (60, 60, 1)
    assert after["bytes"] < before["bytes"] / 2


def test_many_small_writes_are_compacted_on_the_way(tmp_path, monkeypatch):
    monkeypatch.setattr(lance, "MOST_PIECES", 5)
    store, vectors = store_of(tmp_path / "idx", 1)
    for number in range(12):
        store.upsert([Row(f"n{number}", "a", {}, vectors[0])])
        assert store.stats()["pieces"] <= 6
    assert store.count(None) == 13


def test_a_large_store_gets_an_ann_index_whose_recall_was_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(lance, "ANN_ROWS", 2000)
    store, vectors = store_of(tmp_path / "idx", 1999)
    store.optimize()
    assert store.stats()["ann"] is None
    store.upsert([Row("last", "text", {}, vectors[5])])
    store.optimize()
    ann = store.stats()["ann"]
    assert ann["recall"] >= lance.RECALL
    opened = LanceStore(tmp_path / "idx")
    queries = np.random.default_rng(1).standard_normal((50, 16)).astype(np.float32)
    queries = queries / np.linalg.norm(queries, axis=1, keepdims=True)
    shared = [
        len(
            {row.id for row, _ in opened.dense(query, 10, None, True)}
            & {row.id for row, _ in opened.dense(query, 10, None, False)}
        )
        for query in queries
    ]
    assert np.mean(shared) / 10 >= 0.9
    # what came after the index is found at once
    opened.upsert([Row("new", "new", {}, queries[0])])
    assert opened.dense(queries[0], 1, None, False)[0][0].id == "new"


def test_damage_is_told_in_one_sentence(tmp_path):
    store, _ = store_of(tmp_path / "idx")
    store.optimize()
    data = max((tmp_path / "idx/rows.lance/data").iterdir(), key=lambda file: file.stat().st_size)
    data.write_bytes(data.read_bytes()[:100])
    with pytest.raises(OSError, match=r"^cannot read .*idx \(.*\): if its files are damaged, build it again$") as error:
        list(LanceStore(tmp_path / "idx").scan(None, batch=9, vectors=True, images=False))
    assert len(str(error.value)) < 600
    shutil.rmtree(tmp_path / "idx/rows.lance")
    with pytest.raises(FileNotFoundError, match=r"holds no rows\.lance"):
        LanceStore(tmp_path / "idx").count(None)
    (tmp_path / "idx/index.json").write_text("{")
    with pytest.raises(ValueError, match=r"index\.json is not valid JSON"):
        LanceStore(tmp_path / "idx").info()
    with pytest.raises(NotADirectoryError, match="is a file"):
        LanceStore(tmp_path / "idx/index.json")


FULL = """
import resource, signal, sys
import numpy as np
from textcond.index.lance import LanceStore
from textcond.index.store import Row
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
store = LanceStore(sys.argv[1])
vector = np.eye(16, dtype=np.float32)[0]
store.count(None)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
try:
    store.upsert([Row(f"big {n}", "text", {}, vector, np.random.default_rng(n).bytes(50_000)) for n in range(20)])
except OSError as error:
    print("told:", error)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
store.upsert([Row("after", "text", {}, vector)])
"""


def test_a_full_disk_is_told_and_nothing_is_lost(tmp_path):
    store, _ = store_of(tmp_path / "idx")
    done = run(FULL, tmp_path / "idx")
    told = done.communicate()[0]
    assert "told: cannot write" in told
    assert "no space left): free some, then give the same command again" in told
    assert store.count(None) == 61
    assert store.get(["big 0"], vectors=False, images=False) == []


WRITER = """
import sys
import numpy as np
from textcond.index.lance import LanceStore
from textcond.index.store import Row
store, name, batches = LanceStore(sys.argv[1]), sys.argv[2], int(sys.argv[3])
vector = np.eye(16, dtype=np.float32)[0]
for batch in range(batches):
    store.upsert([Row(f"{name} {batch} {n}", f"text {n}", {"batch": f"{name} {batch}"}, vector, bytes([n, 7]) * 500)
                  for n in range(20)])
    print(batch, flush=True)
    if batch % 3 == 2:
        store.optimize()
"""

READER = """
import sys, time
import numpy as np
from textcond.index.lance import LanceStore
store, vector, last = LanceStore(sys.argv[1]), np.eye(16, dtype=np.float32)[0], -1
while True:
    count = store.count(None)
    assert count >= last and count % 20 == 0, (last, count)
    last = count
    found = [row.id for row, _ in store.dense(vector, 5, None, False)]
    assert len(found) == min(5, count) or not count
    assert len(store.get(found, vectors=False, images=True)) == len(found)
    store.lexical(["text", "7"], 5, None)
    if count == int(sys.argv[2]):
        break
    time.sleep(0.3)
print("counted", count)
"""


def run(code, *arguments):
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def test_four_readers_and_two_writers_at_once(tmp_path):
    store = LanceStore(tmp_path / "idx")
    store.set_info({"dim": 16})
    writers = [run(WRITER, tmp_path / "idx", name, 3) for name in ("a", "b")]
    readers = [run(READER, tmp_path / "idx", 120) for _ in range(4)]
    for writer in writers:
        told = writer.communicate()[0]
        assert (writer.returncode, told.split()) == (0, list("012")), told
    assert store.count(None) == 120
    for reader in readers:
        assert reader.communicate()[0].strip() == "counted 120"


def killed_at(path, name, seconds):
    """Kill a writer some time after its first batch; return the batches that it acknowledged."""
    writer = run(WRITER, path, name, 10_000)
    acknowledged = [int(writer.stdout.readline())]
    time.sleep(seconds)
    writer.kill()
    return acknowledged + [int(line) for line in writer.stdout.read().split("\n") if line.strip()]


def check_kills(path, times):
    store = LanceStore(path)
    store.set_info({"dim": 16})
    for number, seconds in enumerate(times):
        batches = killed_at(path, f"w{number}", seconds)
        assert batches == list(range(len(batches)))
        # all that was acknowledged, and of the batch that was under way everything or nothing
        count = store.count({"batch": [f"w{number} {batch}" for batch in range(len(batches) + 2)]})
        assert count - 20 * len(batches) in (0, 20)
    rows = [row for part in store.scan(None, batch=500, vectors=True, images=True) for row in part]
    assert len(rows) == store.count(None)
    assert len({row.id for row in rows}) == len(rows)
    assert all(row.image and row.vector.size == 16 for row in rows)
    found = store.lexical(["text", "3"], 10_000, None)
    assert len(found) == len(rows)
    store.optimize()
    assert store.count(None) == len(rows)


def test_what_a_killed_writer_acknowledged_is_there_whole(tmp_path):
    check_kills(tmp_path / "idx", [0.02, 0.11, 0.3])


@pytest.mark.slow
def test_nothing_is_lost_at_fifty_random_moments(tmp_path):
    check_kills(tmp_path / "idx", np.random.default_rng(0).uniform(0, 0.6, 50))
