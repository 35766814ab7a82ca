"""What every store must do, as one suite: subclass `StoreConformance` and give it `open_store`."""

from __future__ import annotations

import numpy as np
import pytest

from textcond.index.filters import conditions
from textcond.index.lexical import query_terms
from textcond.index.store import Row

DIM = 8
TEXTS = [
    "a red fox",
    "a green fox in a green wood",
    "the house by the river",
    "snow",
    "a dog in the snow",
    "森の中の狐",
    "雪の中の犬",
    "红色的狐狸",
    "สุนัขในหิมะ",
    "l'été d'une fée",
]
METADATA = [
    {"style": "noto", "steps": 20, "seed": 2**60 + 1, "nested": {"a": [1, None, "x"]}},
    {"style": "noto", "steps": 30.5, "done": True},
    {"style": 'it\'s "blob" \\ %', "steps": 50, "done": False},
    {"style": 3, "steps": "20"},
    {"steps": None, "day": "2026-01-31"},
    {"style": "言語", "day": "2026-02-01", "steps": 49},
    {"a.b": "x", "ü \"q' \\": "y", "steps": -1e-3},
    {"": 1, "done": 1},
    {"style": ["noto"], "steps": True},
    {"steps": -0.0, "mark": 'a"\x01\n\\'},
]
FILTERS = [
    {},
    {"style": "noto"},
    {"style": ["noto", "言語"], "steps": {"gte": 20, "lt": 50}},
    {"style": 'it\'s "blob" \\ %'},
    {"style": 3},
    {"style": "3"},
    {"style": None},
    {"steps": 20},
    {"steps": 20.0},
    {"steps": [20, 30.5]},
    {"steps": {"gt": 20}},
    {"steps": {"lte": -0.001}},
    {"steps": {"gte": 20, "lt": float("inf")}},
    {"seed": {"gt": 10**30}},
    {"seed": {"lt": 10**400, "gt": -(10**5000)}},
    {"steps": {"gte": "2"}},
    {"steps": [None, "20"]},
    {"seed": 2**60 + 1},
    {"seed": 2**60},
    {"done": True},
    {"done": [False, None]},
    {"done": 1},
    {"day": {"gte": "2026-01-31", "lt": "2026-02-01"}},
    {"a.b": "x"},
    {"ü \"q' \\": "y"},
    {"style": "noto", "done": True, "steps": {"gt": 30}},
    {"nested": "x"},
    {"steps": 0},
    {"steps": [*range(1000, 1990), 0, 50.0, "20", None, True, 30.5]},
    {"style": [*(f"style {number}" for number in range(900)), "noto", "言語", 3]},
    {"style": [None, *(f"style {number}" for number in range(900))]},
    {"mark": 'a"\x01\n\\'},
    {"mark": {"gte": 'a"\x01\n\\'}},
    {"mark": {"gt": 'a"\x01\n\\'}},
    {"mark": {"gt": "a!", "lt": "a#"}},
    {"mark": {"gt": 'a"\x00\x7f', "lt": 'a"\x01\n\\\x00'}},
    {"mark": {"lt": 'a"\x01\n[', "gt": 'a"\x01\n'}},
    {"style": {"gt": "it's", "lt": "ｚ"}},
    {"ü \"q' \\": {"gte": "y"}},
    {"absent": "'; DROP TABLE rows; --"},
]


def rows(vectors: np.ndarray | None = None) -> list[Row]:
    """`TEXTS` with `METADATA`; the first two have one picture, the fifth another."""
    if vectors is None:
        vectors = np.random.default_rng(0).standard_normal((len(TEXTS), DIM)).astype(np.float32)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    pictures = {0: b"\x89one", 1: b"\x89one", 4: bytes(range(256)) * 300}
    return [
        Row(f"id {place}'", text, values, vector, pictures.get(place), place in pictures)
        for place, (text, values, vector) in enumerate(zip(TEXTS, METADATA, vectors))
    ]


def ids(places) -> set[str]:
    return {f"id {place}'" for place in places}


class StoreConformance:
    """The contract of `textcond.index.store.Store`."""

    @pytest.fixture
    def open_store(self, tmp_path):
        """A function that opens the same store again and again, as another process would; a new one at first."""
        raise NotImplementedError

    @pytest.fixture
    def store(self, open_store):
        store = open_store()
        store.set_info({"dim": DIM, "name": "é"})
        store.upsert(rows())
        yield store
        store.close()

    def test_a_new_store_has_no_info_and_an_opened_one_what_was_set(self, open_store):
        store = open_store()
        assert store.info() == {}
        store.set_info({"dim": DIM, "name": "é", "list": [1, None]})
        assert (store.count(None), store.dense(np.eye(DIM, dtype=np.float32)[0], 3, None, False)) == (0, [])
        assert store.lexical(["fox"], 3, None) == []
        assert list(store.scan(None, batch=2, vectors=True, images=True)) == []
        store.set_info({"dim": DIM, "name": "other"})
        assert store.info() == {"dim": DIM, "name": "other"}
        assert open_store().info() == {"dim": DIM, "name": "other"}

    def test_rows_come_back_as_they_were_given(self, store, open_store):
        for opened in (store, open_store()):
            found = opened.get([row.id for row in rows()], vectors=True, images=True)
            assert found == rows()
            assert [row.image for row in found] == [row.image for row in rows()]
            assert [row.has_image for row in found] == [row.has_image for row in rows()]
            for row, given in zip(found, rows()):
                np.testing.assert_allclose(row.vector, given.vector, atol=1e-3)
                assert row.vector.dtype == np.float32
                assert np.linalg.norm(row.vector) == pytest.approx(1, abs=1e-6)

    def test_vectors_and_pictures_are_left_out_unless_asked_for(self, store):
        (row,) = store.get(["id 0'"], vectors=False, images=False)
        assert (row.vector.size, row.image, row.has_image) == (0, None, True)

    def test_get_keeps_the_order_and_leaves_out_what_is_not_there(self, store):
        wanted = ["id 3'", "none", "id 0'"]
        assert [row.id for row in store.get(wanted, vectors=False, images=False)] == ["id 3'", "id 0'"]
        assert store.get([], vectors=False, images=False) == []

    def test_upsert_replaces_and_adds(self, store, open_store):
        changed = rows()[0]
        changed.text, changed.metadata, changed.image, changed.has_image = "a blue whale", {"style": "new"}, None, False
        changed.vector = -changed.vector
        store.upsert([changed, Row("new", "a whale", {}, changed.vector)])
        store.upsert([])
        for opened in (store, open_store()):
            assert opened.count(None) == len(TEXTS) + 1
            (row,) = opened.get(["id 0'"], vectors=True, images=True)
            assert (row.text, row.metadata, row.image, row.has_image) == ("a blue whale", {"style": "new"}, None, False)
            assert {row.id for row, _ in opened.lexical(["whale"], 5, None)} == {"id 0'", "new"}
            assert "id 0'" not in {row.id for row, _ in opened.lexical(["red"], 5, None)}
            assert {row.id for row, _ in opened.dense(changed.vector, 2, None, True)} == {"id 0'", "new"}

    def test_delete_by_ids_by_filter_and_by_both(self, store, open_store):
        assert store.delete(["id 0'", "none", "id 4'"], {"style": "noto"}) == 1
        assert store.delete(["id 4'", "none"], None) == 1
        assert store.delete(None, {"day": "2026-02-01"}) == 1
        assert store.delete(["none"], None) == store.delete([], None) == 0
        for opened in (store, open_store()):
            assert opened.count(None) == len(TEXTS) - 3
            assert opened.lexical(["red"], 5, None) == []
            assert {row.id for row, _ in opened.dense(rows()[0].vector, 99, None, False)} == ids({1, 2, 3, 6, 7, 8, 9})
        assert store.delete(None, {}) == len(TEXTS) - 3
        assert store.count(None) == 0
        store.upsert(rows())
        assert store.count(None) == len(TEXTS)

    def test_dense_is_the_cosine_best_first(self, store):
        matrix = np.stack([row.vector for row in rows()])
        query = np.random.default_rng(1).standard_normal(DIM).astype(np.float32)
        query /= np.linalg.norm(query)
        expected = matrix @ query
        for exact in (True, False):
            found = store.dense(query, 4, None, exact)
            assert [row.id for row, _ in found] == [f"id {place}'" for place in np.argsort(-expected)[:4]]
            np.testing.assert_allclose([score for _, score in found], np.sort(expected)[::-1][:4], atol=2e-3)
        assert len(store.dense(query, 99, None, True)) == len(TEXTS)

    def test_equal_rows_have_equal_scores_and_the_order_of_ids(self, open_store):
        store = open_store()
        store.set_info({"dim": DIM})
        vector = rows()[0].vector
        store.upsert([Row(f"{place:02}", "a fox", {}, vector) for place in reversed(range(20))])
        for found in (store.dense(vector, 30, None, True), store.lexical(["fox"], 30, None)):
            assert [row.id for row, _ in found] == [f"{place:02}" for place in range(20)]
            assert len({score for _, score in found}) == 1

    def test_equal_rows_come_in_the_order_of_ids_where_k_cuts_them(self, open_store):
        store = open_store()
        store.set_info({"dim": DIM})
        best, equal = rows()[0].vector, rows()[1].vector
        store.upsert([Row(f"{(place * 7) % 50:02}", "a fox", {}, equal) for place in range(50)])
        store.upsert([Row("z", "fox", {}, best)])
        for k in (1, 3, 20):
            expected = ["z", *(f"{place:02}" for place in range(k - 1))]
            assert [row.id for row, _ in store.dense(best, k, None, True)] == expected
            assert [row.id for row, _ in store.lexical(["fox"], k, None)] == expected

    def test_a_search_for_the_most_rows_is_answered(self, store):
        k = 100_000 if store.most is None else store.most
        assert len(store.dense(rows()[0].vector, k, None, False)) == len(TEXTS)
        assert len(store.lexical(["fox"], k, None)) == 2

    @pytest.mark.slow
    def test_a_filter_at_its_limits_is_answered(self, store):
        values = [*range(500), *(f"x{number}" for number in range(500))]
        wanted = {f"field {number}": values for number in range(99)} | {"steps": values}
        assert store.dense(rows()[0].vector, 5, wanted, False) == store.lexical(["fox"], 5, wanted) == []

    def test_half_a_surrogate_pair_is_one_sentence(self, store):
        half, vector = "fox \ud83e", rows()[0].vector
        for use in (
            lambda: store.count({"style": half}),
            lambda: store.dense(vector, 3, {half: 1}, False),
            lambda: store.delete(["id 0'", half], None),
            lambda: store.get([half], vectors=False, images=False),
            lambda: store.upsert([rows()[0], Row(half, "a fox", {}, vector)]),
            lambda: store.upsert([Row("new", half, {}, vector)]),
            lambda: store.upsert([Row("new", "a fox", {"deep": [{half: 1}]}, vector)]),
        ):
            with pytest.raises(ValueError, match=r"\\ud83e.* holds half of a surrogate pair: write it again as UTF-8"):
                use()
        assert store.count(None) == len(TEXTS)
        store.lexical(query_terms(half), 3, None)

    @pytest.mark.parametrize(
        ("query", "places"),
        [
            ("fox", {0, 1}),
            ("FOX, snow!", {0, 1, 3, 4}),
            ("狐", {5, 7}),
            ("犬", {6}),
            ("森の中", {5, 6}),
            ("狐狸", {7}),
            ("สุนัข", {8}),
            ("หิมะ", {8}),
            ("ÉTÉ", {9}),
            ("ete", set()),
            ("zebra", set()),
            ("!?", set()),
        ],
    )
    def test_lexical_finds_shared_words_in_every_script(self, store, query, places):
        assert {row.id for row, _ in store.lexical(query_terms(query), 99, None)} == ids(places)

    def test_lexical_ranks_as_bm25_does(self, store):
        found = store.lexical(query_terms("green snow"), 99, None)
        # a rare word is worth more twice than once, a short text more than a long one, and all are above zero
        assert [row.id for row, _ in found] == ["id 1'", "id 3'", "id 4'"]
        scores = [score for _, score in found]
        assert scores == sorted(scores, reverse=True)
        assert min(scores) > 0
        assert store.lexical(query_terms("green snow"), 1, None) == found[:1]

    @pytest.mark.parametrize("place", range(len(FILTERS)))
    def test_a_filter_means_the_same_everywhere(self, store, place):
        wanted = FILTERS[place]
        expected = {
            f"id {row}'"
            for row, metadata in enumerate(METADATA)
            if all(condition.holds(metadata) for condition in conditions(wanted))
        }
        assert store.count(wanted) == len(expected)
        assert {row.id for row, _ in store.dense(rows()[0].vector, 99, wanted, False)} == expected
        everything = query_terms(" ".join(TEXTS))
        assert {row.id for row, _ in store.lexical(everything, 99, wanted)} == expected
        assert {row.id for part in store.scan(wanted, batch=3, vectors=False, images=False) for row in part} == expected

    def test_scan_gives_every_row_once_in_small_lists(self, store):
        parts = list(store.scan(None, batch=4, vectors=True, images=True))
        assert max(map(len, parts)) <= 4
        found = sorted((row for part in parts for row in part), key=lambda row: row.id)
        assert found == rows()
        assert [row.image for row in found] == [row.image for row in rows()]
        np.testing.assert_allclose(found[3].vector, rows()[3].vector, atol=1e-3)

    def test_a_write_is_seen_by_stores_that_were_open_before(self, store, open_store):
        other = open_store()
        assert other.count(None) == len(TEXTS)
        other.lexical(["fox"], 3, None)
        store.upsert([Row("late", "a late fox", {}, rows()[3].vector)])
        assert other.count(None) == len(TEXTS) + 1
        assert "late" in {row.id for row, _ in other.lexical(["late"], 3, None)}
        assert "late" in {row.id for row, _ in other.dense(rows()[3].vector, 2, None, False)}
        store.delete(["late"], None)
        assert other.count(None) == len(TEXTS)

    def test_optimize_changes_nothing_that_is_found(self, store, open_store):
        def answers(store):
            return (
                store.count(None),
                [row.id for row, _ in store.dense(rows()[0].vector, 5, {"steps": {"gte": 0}}, True)],
                sorted(row.id for row, _ in store.lexical(["fox", "狐"], 9, None)),
                store.get(["id 4'"], vectors=False, images=True),
                store.get(["id 4'"], vectors=False, images=True)[0].image,
            )

        store.delete(["id 0'"], None)
        before = answers(store)
        store.optimize()
        assert answers(store) == before
        assert answers(open_store()) == before

    def test_stats_count(self, store):
        stats = store.stats()
        assert stats["rows"] == len(TEXTS)
        assert {"store", "bytes", "ann"} <= set(stats)
