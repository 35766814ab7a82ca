import io
import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from textcond.apps.vectors import chunks, read_lines, vector_writer


def _read(path):
    if path.suffix == ".npy":
        return np.load(path)
    if path.suffix == ".safetensors":
        return load_file(path)["vectors"]
    return np.array([json.loads(line)["vector"] for line in path.read_text().splitlines()], np.float32)


@pytest.mark.parametrize("suffix", [".npy", ".safetensors", ".jsonl"])
def test_chunks_of_vectors_come_back_as_one_matrix(tmp_path, suffix):
    vectors = np.random.default_rng(0).normal(size=(2500, 7)).astype(np.float32)
    texts = [f"text {row}" for row in range(2500)]
    with vector_writer(tmp_path / f"v{suffix}") as writer:
        for start in range(0, 2500, 1000):
            writer.add(texts[start : start + 1000], vectors[start : start + 1000])
    np.testing.assert_array_equal(_read(tmp_path / f"v{suffix}"), vectors)
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("suffix", [".npy", ".safetensors", ".jsonl"])
def test_a_failure_midway_leaves_no_file(tmp_path, suffix):
    def write():
        with vector_writer(tmp_path / f"v{suffix}") as writer:
            writer.add(["a"], np.ones((1, 3), np.float32))
            raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        write()
    assert not list(tmp_path.iterdir())


def test_json_lines_keep_the_text(tmp_path):
    with vector_writer(tmp_path / "v.jsonl") as writer:
        writer.add(["赤い\nりんご"], np.array([[0.25, -1.5]], np.float32))
    assert json.loads((tmp_path / "v.jsonl").read_text()) == {"text": "赤い\nりんご", "vector": [0.25, -1.5]}


def test_an_unknown_suffix_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match=r"end it in \.npy, \.safetensors, \.jsonl"), vector_writer(tmp_path / "v.csv"):
        pass
    assert not list(tmp_path.iterdir())


def test_lines_keep_their_places(tmp_path):
    (tmp_path / "a.txt").write_bytes("one\r\n\n三\nlast".encode())
    assert list(read_lines(tmp_path / "a.txt")) == ["one", "", "三", "last"]


def test_a_line_that_is_not_utf8_is_named(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\n\xff\n")
    with pytest.raises(ValueError, match=r"line 2 of .*a\.txt is not UTF-8"):
        list(read_lines(tmp_path / "a.txt"))


def test_standard_input_is_read_as_it_comes(monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"one\ntwo\n")))
    assert list(chunks(read_lines("-"), 1)) == [["one"], ["two"]]
