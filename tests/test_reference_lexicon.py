"""The common words: dictd dictionaries, and what several of them hold."""

import gzip

import pytest

from textcond.pipelines.reference import lexicon
from textcond.pipelines.reference.lexicon import DIGITS, Pair, entries

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
        "Ärger": "Ärger, Zorn <masc>\nanger {mood}, wrath (of, say, God), rage\n   Synonym: {Wut}\n" + "x" * 5000,
        "empty": "empty /x/\n",
        "last": "last\nfinal\n",
    })  # fmt: skip
    assert list(entries(path)) == [
        ("apple", ["りんご", "林檎"]),
        ("bureau", ["büro (iş)", "yazıhane"]),
        ("Ärger", ["anger {mood}", "wrath (of, say, God)"]),
        ("empty", [""]),
        ("last", ["final"]),
    ]


def _shared(english):
    return [Pair(english, f"word{number}", f"l{number}", "a", 0) for number in range(lexicon.SHARED)]


def _lexicon(monkeypatch, japanese=(), chinese=(), others=()):
    monkeypatch.setattr(lexicon, "japanese_pairs", lambda: japanese)
    monkeypatch.setattr(lexicon, "chinese_pairs", lambda: chinese)
    monkeypatch.setattr(lexicon, "freedict", lambda: others)
    return lexicon.lexicon()


def test_words_are_kept_that_many_languages_translate(monkeypatch):
    found = _lexicon(monkeypatch, chinese=[Pair("rare", "罕", "zh", "c", 0)], others=_shared("apple"))
    assert found == [("apple", f"word{number}", f"l{number}") for number in range(lexicon.SHARED)]


def test_the_usual_translations_come_first_and_the_rest_is_cut(monkeypatch):
    chinese = [Pair("big", word, "zh", "c", place) for word, place in (("京", 1), ("俣", 0), ("伟", 0), ("大", 0))]
    chinese += [Pair("adult", "大人", "zh", "c", 0), Pair("university", "大学", "zh", "c", 0)]
    german = [Pair("big", "erwachsen", "de", "eng-deu", 0), Pair("big", "groß", "de", "eng-deu", 1)]
    german += [Pair("big", "groß", "de", "deu-eng", 0), Pair("big", "beleibt", "de", "deu-eng", 0)]
    monkeypatch.setattr(lexicon, "MOST", 3)
    found = _lexicon(monkeypatch, chinese=chinese, others=[*_shared("big"), *german])
    assert [word for _, word, language in found if language == "zh"] == ["大", "俣", "伟"]
    assert [word for _, word, language in found if language == "de"] == ["groß", "beleibt", "erwachsen"]


@pytest.mark.parametrize(
    ("english", "word", "language", "pair"),
    [
        ("to eat", "essen (etwas)", "de", ("eat", "essen")),
        ("Unicorns", "البقرة", "ar", ("unicorns", "بقرة")),
        ("Unicorns", "التنّين", "ar", ("unicorns", "التنين")),
        ("apple", "я́бълка", "bg", ("apple", "ябълка")),
        ("copy", "नकल~उतारना", "hi", ("copy", "नकल उतारना")),
        ("diplopia", "gözün tek cisimleri çift görmesi", "tr", None),
        ("cacti", "cacti) kaktüs", "tr", None),
        ("urinary", "Urin…", "de", None),
        ("cross", "CruzRoja", "es", None),
        ("television", "TV", "de", ("television", "TV")),
        ("eleven", "11", "de", None),
        ("", "nichts", "de", None),
    ],
)
def test_a_pair_is_two_short_texts_as_a_prompt_writes_them(english, word, language, pair):
    found = [(one.english, one.word) for one in lexicon._pair(english, word, language, "a", 0)]
    assert found == ([] if pair is None else [pair])


def test_what_needs_a_bracket_stands_lower():
    assert [pair.place for pair in lexicon._pair("the Sun (newspaper)", "太阳报", "zh", "a", 0)] == [lexicon.BRACKET]


def test_dictionaries_between_english_and_a_known_language_are_read():
    names = ("eng-ita", "ita-eng", "ita-deu", "eng-lat", "jpn-eng")
    assert [lexicon._languages(name) for name in names] == [True, True, False, False, False]
