import numpy as np
import pytest
import torch

from textcond.negatives import ExactSearch
from textcond.negatives import search as search_module


def vectors(rows, dim=24, seed=0, clusters=40):
    generator = np.random.default_rng(seed)
    centres = generator.standard_normal((clusters, dim))
    points = centres[generator.integers(clusters, size=rows)] + 0.5 * generator.standard_normal((rows, dim))
    return (points / np.linalg.norm(points, axis=1, keepdims=True)).astype(np.float32)


def reference(queries, corpus, k):
    scores = queries.astype(np.float64) @ corpus.astype(np.float64).T
    rows = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(scores, rows, 1), rows


def recall(rows, expected):
    return np.mean([len(set(a) & set(b)) / len(b) for a, b in zip(rows.tolist(), expected.tolist())])


@pytest.mark.parametrize("rows", [1, 15, 16, 700, 20_001])
def test_search_gives_the_largest_inner_products_in_order(rows):
    corpus, queries = vectors(rows), vectors(300, seed=1)
    scores, found = ExactSearch(corpus).search(queries, 50)
    expected, expected_rows = reference(queries, corpus, min(50, rows))
    np.testing.assert_allclose(scores, expected, atol=1e-6)
    assert recall(found, expected_rows) > 0.9999


def test_vectors_need_not_be_of_unit_length_and_float16_is_read():
    corpus = (vectors(3000) * np.random.default_rng(2).uniform(0.1, 30, (3000, 1))).astype(np.float16)
    queries = vectors(20, seed=1) * 5
    scores, _ = ExactSearch(corpus).search(queries, 10)
    np.testing.assert_allclose(scores, reference(queries, corpus.astype(np.float32), 10)[0], rtol=1e-5)


def test_what_bfloat16_cannot_tell_apart_is_still_ranked_right():
    # 20,000 rows whose scores differ by less than one bfloat16 step, so that the scan keeps the wrong ones
    generator = np.random.default_rng(0)
    base = vectors(1)[0]
    corpus = (base + 1e-4 * generator.standard_normal((20_000, 24))).astype(np.float32)
    search = ExactSearch(corpus)
    _, _, safe = search._search(base[None], 50, torch.bfloat16, None)
    assert not safe.any()
    assert recall(search.search(base[None], 50)[1], reference(base[None], corpus, 50)[1]) > 0.97


def test_candidates_to_spare_make_a_second_scan_needless():
    corpus, queries = vectors(5000, dim=64, clusters=100), vectors(50, dim=64, clusters=100)
    assert ExactSearch(corpus)._search(queries, 10, torch.bfloat16, None)[2].all()
    assert ExactSearch(corpus, spare=1)._search(queries, 10, torch.bfloat16, None)[2].mean() < 0.2


def test_equal_rows_come_in_their_order_and_whatever_the_blocks(monkeypatch):
    corpus = np.tile(vectors(500), (4, 1))
    queries = vectors(40, seed=1)
    scores, rows = ExactSearch(corpus).search(queries, 8)
    assert (np.diff(rows.reshape(40, 2, 4), axis=2) == 500).all()
    monkeypatch.setattr(search_module, "CORPUS_BLOCK", 96)
    monkeypatch.setattr(search_module, "QUERY_BLOCK", 7)
    monkeypatch.setattr(search_module, "QUERIES_A_PASS", 9)
    again = ExactSearch(corpus).search(queries, 8)
    np.testing.assert_array_equal(again[0], scores)
    np.testing.assert_array_equal(again[1], rows)


def test_a_memory_map_is_searched_like_an_array(tmp_path):
    np.save(tmp_path / "vectors.npy", vectors(2000))
    mapped = np.load(tmp_path / "vectors.npy", mmap_mode="r")
    queries = vectors(10, seed=1)
    np.testing.assert_array_equal(
        ExactSearch(mapped).search(queries, 5)[1], ExactSearch(vectors(2000)).search(queries, 5)[1]
    )


def test_bad_input_is_named():
    corpus = vectors(100)
    with pytest.raises(ValueError, match=r"\(3, 5\) do not fit vectors of shape \(100, 24\)"):
        ExactSearch(corpus).search(np.zeros((3, 5), np.float32), 1)
    with pytest.raises(ValueError, match="k=0"):
        ExactSearch(corpus).search(corpus[:1], 0)
    with pytest.raises(ValueError, match="query vector is not finite"):
        ExactSearch(corpus).search(np.full((1, 24), np.nan, np.float32), 1)
    corpus[70] = np.inf
    with pytest.raises(ValueError, match="rows 0 to 99 is not finite"):
        ExactSearch(corpus).search(vectors(1), 1)
    with pytest.raises(ValueError, match="int64"):
        ExactSearch(np.zeros((3, 2), np.int64))


def test_a_corpus_in_the_worst_order_is_searched_right():
    # every row is nearer than all before it, so that each passes the running threshold
    queries = vectors(1)
    corpus = vectors(20_000, seed=4)
    corpus = corpus[np.argsort(corpus @ queries[0])]
    scores, rows = ExactSearch(corpus).search(queries, 20)
    assert rows[0].tolist() == list(range(19_999, 19_979, -1))
    assert (np.diff(scores[0]) <= 0).all()
