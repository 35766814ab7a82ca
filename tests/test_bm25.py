import subprocess
import sys

import pytest

from textcond.bm25 import BM25Index
from textcond.words import words

PASSAGES = [
    "The Eiffel Tower is a lattice tower in Paris, made of iron.",
    "東京タワーは東京都港区にある電波塔である。",
    "京都は日本の古い都で、多くの寺がある。",
    "กรุงเทพมหานครเป็นเมืองหลวงของประเทศไทย",
    "เชียงใหม่เป็นจังหวัดทางภาคเหนือ มีภูเขามาก",
    "長城是中國古代的軍事防禦工程。",
    "हिन्दी भारत की एक भाषा है",
    "",
]


@pytest.mark.parametrize(
    ("query", "row"),
    [
        ("iron tower in PARIS", 0),
        ("東京タワーはどこにありますか", 1),
        ("日本の古い寺", 2),
        ("เมืองหลวงของไทย", 3),
        ("ภูเขาทางภาคเหนือ", 4),
        ("中國的長城", 5),
        ("भारत की भाषा", 6),
    ],
)
def test_a_query_in_any_script_finds_its_passage(query, row):
    rows, scores = BM25Index(PASSAGES).search(query, 3)
    assert rows[0] == row
    assert len(rows) == 1 or scores[0] > 1.5 * scores[1]


def test_words_are_words_or_bigrams():
    assert words("Hello, WÖRLD_2!") == ["hello", "wörld", "2"]
    assert words("हिन्दी है") == ["हिन्दी", "है"]  # vowel signs do not split a word
    assert words("私はPythonを書く") == ["私は", "python", "を書", "書く"]
    assert words("ラ") == ["ラ"]
    assert words("ﾄｳｷｮｳ") == words("トウキョウ")
    assert words("한국어 문장") == ["한국어", "문장"]  # Korean has spaces
    assert words(" …!") == []


def test_scores_are_lucene_bm25_by_its_formula():
    import math

    texts = ["red fox fox", "a red dog runs far", "a blue dog", "nothing here"]
    rows, scores = BM25Index(texts).search("red fox", 4)
    mean = sum(len(words(text)) for text in texts) / 4

    def expected(text):
        total = 0.0
        for term in ("red", "fox"):
            frequency = sum(term in words(other) for other in texts)
            count = words(text).count(term)
            weight = math.log(1 + (4 - frequency + 0.5) / (frequency + 0.5))
            total += weight * count / (count + 1.5 * (0.25 + 0.75 * len(words(text)) / mean))
        return total

    assert rows.tolist() == [0, 1]
    assert scores.tolist() == pytest.approx([expected(texts[0]), expected(texts[1])], rel=1e-6)


def test_a_text_scores_the_same_in_the_corpus_and_by_itself():
    index = BM25Index(PASSAGES)
    rows, scores = index.search("tower in 東京 タワー ある", 8)
    assert len(rows) > 2
    assert index.score("tower in 東京 タワー ある", [PASSAGES[row] for row in rows]) == pytest.approx(
        scores.tolist(), rel=1e-5
    )


def test_equal_scores_come_in_the_order_of_rows_and_unknown_words_find_nothing():
    index = BM25Index(["fox", "dog", "fox", "fox"])
    assert index.search("fox", 2)[0].tolist() == [0, 2]
    assert index.search("zebra", 2)[0].tolist() == []
    assert index.search("", 2)[0].tolist() == []
    with pytest.raises(ValueError, match="no word"):
        BM25Index(["", "…"])


def test_it_needs_no_torch():
    code = "import sys, textcond.index.milvus, textcond.bm25; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
