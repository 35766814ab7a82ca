"""Recall@10 and nDCG@10 of lexical, dense and hybrid search for queries that are not the stored text.

    python tests/benchmarks/bench_lookup_quality.py --names names.tsv --encoder MiniLM=FOLDER --encoder e5-small=FOLDER

The file's lines are language, name, English name; the index holds each English name once, and one is right for a query:

- exact: the English name itself, as a check.
- keywords: two or more of the words of an English name, shuffled.
- misspelled: an English name with one letter of a longer word lost, doubled, swapped with the next or replaced.
- paraphrases: the name in another English (en-GB, en-AU ...), where it differs.
- a language: the name in it, as a translation that no encoder is told of.

`--seen` names what an encoder was trained on: a query is left out if it or its right answer is one of those texts (a
column of a line, a string in JSON) or one of their parts between commas and semicolons, case and width set aside. What
the public encoders were trained on is not known.

Queries are drawn by a seed. After a figure stands half the width of its 95 % interval.
"""

import argparse
import json
import os
import random
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}  # read when numpy and torch are loaded

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from textcond import PromptIndex
from textcond.duplicates import normalised
from textcond.index.image_text import load_encoder

K = 10
MODES = ("lexical", "dense", "hybrid")


def misspelled(name: str, draw: random.Random) -> str | None:
    """Return a name with one wrong letter inside a word of four or more; None if it has no such word."""
    words = list(re.finditer(r"[a-z]{4,}", name, re.IGNORECASE))
    if not words:
        return None
    word = draw.choice(words)
    at = draw.randrange(word.start() + 1, word.end() - 1)
    kind = draw.choice(("lost", "doubled", "swapped", "replaced"))
    if kind == "lost":
        return name[:at] + name[at + 1 :]
    if kind == "doubled":
        return name[:at] + name[at] + name[at:]
    if kind == "swapped" and name[at] != name[at + 1]:
        return name[:at] + name[at + 1] + name[at] + name[at + 2 :]
    others = [letter for letter in "etaoinshrdlu" if letter != name[at].lower()]
    return name[:at] + draw.choice(others) + name[at + 1 :]


def keywords(name: str, draw: random.Random) -> str | None:
    """Return some words of a name, in another order; None if it has less than three."""
    words = re.findall(r"\w+", name)
    if len(words) < 3:
        return None
    chosen = draw.sample(words, draw.randrange(2, len(words)))
    return " ".join(chosen)


Pairs = list[tuple[str, str]]


def queries(file: Path, languages: list[str]) -> tuple[list[str], dict[str, Pairs]]:
    """Return the names of the index, and the queries of each kind with the name that is right."""
    translations = defaultdict(set)
    with open(file, encoding="utf-8") as lines:
        for line in lines:
            language, name, english = line.rstrip("\n").split("\t")[:3]
            # names that are English too are no translations
            if language == "en" or normalised(name) != normalised(english):
                translations[language].add((name, english))
    names = sorted({english for pairs in translations.values() for _, english in pairs})
    draw = random.Random(0)
    found = {"exact": [(name, name) for name in names]}
    for kind, change in (("keywords", keywords), ("misspelled", misspelled)):
        changed = [(change(name, draw), name) for name in names]
        found[kind] = [(query, name) for query, name in changed if query and query not in names]
    others = [translations[language] for language in translations if language.startswith("en-")]
    found["paraphrases"] = sorted(pair for pair in set().union(*others) if pair[0] not in names)
    return names, found | {language: sorted(translations[language]) for language in languages}


def seen(files: list[Path], wanted: set[str]) -> set[str]:
    """Return those of the wanted texts that training texts are, or hold between commas and semicolons."""
    found = set()
    for file in files:
        for text in training_texts(file):
            told = normalised(text)
            found |= wanted.intersection((told, *(part.strip() for part in re.split("[,;،؛、；]", told))))
    return found


def training_texts(file: Path) -> Iterator[str]:
    """Yield the texts of a JSON or JSONL file, or the columns of lines."""
    with open(file, encoding="utf-8") as lines:
        if file.suffix == ".json":
            yield from strings(json.load(lines))
            return
        for line in lines:
            yield from strings(json.loads(line)) if file.suffix == ".jsonl" else line.rstrip("\n").split("\t")


def strings(value: object) -> Iterator[str]:
    """Yield every text in a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from strings(part)


def held_out(asked: dict[str, Pairs], files: list[Path]) -> dict[str, Pairs]:
    """Return the queries of which neither the text nor the right answer was seen in training; tell how many were."""
    told = seen(files, {normalised(text) for pairs in asked.values() for pair in pairs for text in pair})
    kept = {}
    for kind, pairs in asked.items():
        kept[kind] = [pair for pair in pairs if not told.intersection(map(normalised, pair))]
        same = sum(normalised(query) in told for query, _ in pairs)
        print(
            f"{kind}: {len(pairs) - len(kept[kind]):,} of {len(pairs):,} left out as seen in training: {same:,} for "
            f"the query, the others for their answer"
        )
    return kept


def score(index: PromptIndex, pairs: Pairs, mode: str) -> tuple[np.ndarray, np.ndarray]:
    """Return each query's recall and nDCG among the first ten."""
    ranks = []
    for query, right in pairs:
        texts = [hit.text for hit in index.search(query, K, mode=mode, collapse=False)]
        ranks.append(texts.index(right) + 1 if right in texts else np.inf)
    ranks = np.array(ranks)
    return (ranks <= K).astype(float), 1 / np.log2(ranks + 1)


def shown(values: np.ndarray) -> str:
    """A mean with half its 95 % interval."""
    return f"{values.mean():.3f} ± {1.96 * values.std() / np.sqrt(len(values)):.3f}"


def measured(title: str, index: PromptIndex, asked: dict[str, Pairs], lexical: dict[str, tuple]) -> Table:
    """Search for every query in every mode; `lexical` keeps what no encoder changes."""
    table = Table(title=f"{title}: {len(index):,} names, the right one among the first {K}", box=box.MARKDOWN)
    table.add_column("query")
    table.add_column("queries", justify="right")
    for mode in MODES:
        table.add_column(f"{mode} recall@{K}", justify="right")
        table.add_column(f"{mode} nDCG@{K}", justify="right")
    everything = {mode: ([], []) for mode in MODES}
    for kind, pairs in asked.items():
        cells = []
        for mode in MODES:
            found = lexical.get(kind) if mode == "lexical" else None
            if found is None:
                found = score(index, pairs, mode)
            if mode == "lexical":
                lexical[kind] = found
            cells += map(shown, found)
            for values, new in zip(everything[mode], found):
                values.append(new)
        table.add_row(kind, str(len(pairs)), *cells)
    means = [shown(np.concatenate(values)) for mode in MODES for values in everything[mode]]
    table.add_row("all", str(sum(map(len, asked.values()))), *means)
    return table


def main() -> None:
    """Print one table an encoder, in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--names", type=Path, required=True, help="language, name, English name, tab-separated")
    parser.add_argument("--encoder", action="append", required=True, help="NAME=FOLDER or hub id; may be repeated")
    parser.add_argument("--languages", nargs="*", default=["de", "fr", "ja", "zh", "ar", "hi", "th"])
    parser.add_argument("--queries", type=int, default=200, help="of each kind")
    parser.add_argument("--seen", type=Path, action="append", default=[], help="training texts; may be repeated")
    arguments = parser.parse_args()
    names, asked = queries(arguments.names, arguments.languages)
    if arguments.seen:
        asked = held_out(asked, arguments.seen)
    draw = random.Random(0)
    asked = {kind: draw.sample(pairs, min(arguments.queries, len(pairs))) for kind, pairs in asked.items() if pairs}
    console, lexical = Console(width=160), {}
    for encoder in arguments.encoder:
        title, _, folder = encoder.partition("=")
        index = PromptIndex(load_encoder(folder or title))
        index.add(names)
        console.print(measured(title, index, asked, lexical))


if __name__ == "__main__":
    main()
