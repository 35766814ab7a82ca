"""The common words: dictd dictionaries, and what several of them hold."""

import gzip

import pytest

from textcond.pipelines.reference import lexicon
from textcond.pipelines.reference.lexicon import DIGITS, entries

SIGNS = "".join(DIGITS)


def _digits(number):
    return (_digits(number // 64) if number >= 64 else "") + SIGNS[number % 64]


@pytest.fixture
def written(tmp_path):
    """Write a dictionary of texts by headword, as dictfmt does."""

    def write(texts):
        content, lines = b"", []
        for word, text in texts.items():
            lines.append(f"{word}\t{_digits(len(content))}\t{_digits(len(text.encode()))}\n")
            content += text.encode()
        (tmp_path / "freedict-eng-xyz.index").write_text("".join(lines), encoding="utf-8")
        (tmp_path / "freedict-eng-xyz.dict.dz").write_bytes(gzip.compress(content))
        return tmp_path / "freedict-eng-xyz"

    return write


def test_entries_give_the_first_terms_of_the_first_sense(written):
    path = written({
        "00databaseinfo": "00-database-info\nabout it\n",
        "apple": "apple /ˈapəl/ <n>\nりんご, 林檎, アップル\nfruit of a tree\n",
        "bureau": "bureau /bjˈʊəɹəʊ/\n1. büro (iş), yazıhane\n2. çekmece\n",
        "Ärger": "Ärger <masc>\nanger {mood}\n   Synonym: {Wut}\n" + "x" * 5000,
        "empty": "empty /x/\n",
        "last": "last\nfinal\n",
    })  # fmt: skip
    assert list(entries(path)) == [
        ("apple", ["りんご", "林檎"]),
        ("bureau", ["büro", "yazıhane"]),
        ("Ärger", ["anger"]),
        ("empty", [""]),
        ("last", ["final"]),
    ]


def test_words_are_kept_that_many_languages_translate(monkeypatch):
    many = [("apple", f"word{number}", f"l{number}") for number in range(lexicon.SHARED)]
    japanese = [("apple", word, "ja") for word in ("林檎", "りんご", "アップル", "リンゴ", "林檎")]
    monkeypatch.setattr(lexicon, "japanese_pairs", lambda: japanese)
    monkeypatch.setattr(lexicon, "chinese_pairs", lambda: [("rare", "罕", "zh")])
    monkeypatch.setattr(lexicon, "freedict", lambda: many)
    found = list(lexicon.lexicon())
    assert [word for _, word, language in found if language == "ja"] == ["林檎", "りんご", "アップル"]
    assert set(many) <= set(found)
    assert not any(english == "rare" for english, _, _ in found)


@pytest.mark.parametrize(
    ("english", "word", "language", "pair"),
    [
        ("to eat", "essen", "de", ("eat", "essen")),
        ("Unicorns", "التنّين", "ar", ("unicorns", "تنين")),
        ("apple", "я́бълка", "bg", ("apple", "ябълка")),
        ("copy", "नकल~उतारना", "hi", ("copy", "नकल उतारना")),
        ("diplopia", "gözün tek cisimleri çift görmesi", "tr", None),
        ("eleven", "11", "de", None),
        ("", "nichts", "de", None),
    ],
)
def test_a_pair_is_two_short_texts_as_a_prompt_writes_them(english, word, language, pair):
    assert list(lexicon._pair(english, word, language)) == ([] if pair is None else [(*pair, language)])


def test_dictionaries_between_english_and_a_known_language_are_read():
    assert lexicon._languages("eng-ita") == ("eng", "ita")
    assert lexicon._languages("ita-eng") == ("ita", "eng")
    assert lexicon._languages("ita-deu") is None
    assert lexicon._languages("eng-lat") is None
