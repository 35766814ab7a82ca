import random

import pytest

from textcond.duplicates import DistinctTexts, jaccard, normalised, shingles, text_key, without_punctuation

SYLLABLES = ("ba", "ce", "di", "fo", "gu", "ha", "je", "ki", "lo", "mu")
WORDS = [a + b for a in SYLLABLES for b in ("nar", "ves", "tip", "gol", "ruz")]


def words(rng: random.Random, count: int) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(count))


def test_normalised_texts_and_shingles():
    assert normalised("  Ｆｏｏ\n BAR ") == "foo bar"
    assert text_key("Foo  bar") == text_key("foo bar") != text_key("foobar")
    assert jaccard(shingles("abcdefgh"), shingles("abcdefgh")) == 1
    assert jaccard(shingles("abcdef"), shingles("abcdeX")) == pytest.approx(1 / 3)
    assert jaccard(shingles("ab"), shingles("cd")) == 0


def test_punctuation_and_spacing_go_and_marks_on_letters_stay():
    assert without_punctuation("  Don\u2019t — STOP!\n") == "don t stop"
    assert without_punctuation("हिन्दी।") == "हिन्दी"
    assert without_punctuation("…!") == ""


def test_duplicates_are_found_exactly_as_a_full_comparison_finds_them():
    rng = random.Random(0)
    texts = []
    for _ in range(150):
        text = words(rng, 8)
        texts += [text, text.upper() + " !", text.replace(rng.choice(text.split()), "x", 1), text + " end"]
    rng.shuffle(texts)
    seen = DistinctTexts()
    kept = [text for text in texts if seen.add(text)]
    expected: list[set[str]] = []
    for text in texts:
        plain = f" {' '.join(text.lower().replace('!', ' ').split())} "
        trigrams = {plain[i : i + 3] for i in range(len(plain) - 2)}
        if all(len(trigrams & other) < 0.8 * len(trigrams | other) for other in expected):
            expected.append(trigrams)
    assert len(kept) == len(expected)
    assert 150 <= len(kept) < 400
    assert DistinctTexts().add("猫") is True
    both = DistinctTexts()
    assert both.add("赤いりんごが好きです")
    assert not both.add("赤いりんごが好きです。")
    assert both.add("青い魚が泳いでいます")
