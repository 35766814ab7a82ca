"""Recall@10 and nDCG@10 of lexical, dense and hybrid search for queries that are not the stored text.

    python tests/benchmarks/bench_lookup_quality.py --names names.tsv --encoder MiniLM=FOLDER --encoder e5-small=FOLDER

The file's lines are language, name, English name; the index holds each English name once, and one is right for a query:

- exact: the English name itself, as a check.
- keywords: two or more of the words of an English name, shuffled.
- misspelled: an English name with one letter of a longer word lost, doubled, swapped with the next or replaced.
- a language: the name in it, as a translation that no encoder is told of.

Queries are drawn by a seed. After a figure stands half the width of its 95 % interval.
"""

import argparse
import os
import random
import re
from collections import defaultdict
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}  # read when numpy and torch are loaded

import numpy as np
from rich.console import Console
from rich.table import Table

from textcond import PromptIndex, TextEncoder

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


def queries(file: Path, languages: list[str], count: int) -> tuple[list[str], dict[str, list[tuple[str, str]]]]:
    """Return the names of the index, and for each kind at most `count` queries with the name that is right."""
    translations = defaultdict(set)
    with open(file, encoding="utf-8") as lines:
        for line in lines:
            language, name, english = line.rstrip("\n").split("\t")[:3]
            translations[language].add((name, english))
    names = sorted({english for pairs in translations.values() for _, english in pairs})
    draw = random.Random(0)
    found = {"exact": [(name, name) for name in names]}
    for kind, change in (("keywords", keywords), ("misspelled", misspelled)):
        changed = [(change(name, draw), name) for name in names]
        found[kind] = [(query, name) for query, name in changed if query and query not in names]
    for language in languages:
        # names that are English too are no translations
        found[language] = sorted(pair for pair in translations[language] if pair[0].lower() != pair[1].lower())
    return names, {kind: draw.sample(pairs, min(count, len(pairs))) for kind, pairs in found.items() if pairs}


def score(index: PromptIndex, pairs: list[tuple[str, str]], mode: str) -> tuple[np.ndarray, np.ndarray]:
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


def main() -> None:
    """Print one table an encoder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--names", type=Path, required=True, help="language, name, English name, tab-separated")
    parser.add_argument("--encoder", action="append", required=True, help="NAME=FOLDER or hub id; may be repeated")
    parser.add_argument("--languages", nargs="*", default=["de", "fr", "ja", "zh", "ar", "hi", "th"])
    parser.add_argument("--queries", type=int, default=200, help="of each kind")
    arguments = parser.parse_args()
    names, asked = queries(arguments.names, arguments.languages, arguments.queries)
    for encoder in arguments.encoder:
        title, _, folder = encoder.partition("=")
        index = PromptIndex(TextEncoder.from_pretrained(folder or title))
        index.add(names)
        table = Table(title=f"{title}: {len(names):,} names, the right one among the first {K}")
        table.add_column("query")
        table.add_column("queries", justify="right")
        for mode in MODES:
            table.add_column(f"{mode}\nrecall@{K}", justify="right")
            table.add_column(f"\nnDCG@{K}", justify="right")
        everything = {mode: [[], []] for mode in MODES}
        for kind, pairs in asked.items():
            cells = []
            for mode in MODES:
                found = score(index, pairs, mode)
                cells += map(shown, found)
                for values, new in zip(everything[mode], found):
                    values.append(new)
            table.add_row(kind, str(len(pairs)), *cells)
        table.add_section()
        means = [shown(np.concatenate(values)) for mode in MODES for values in everything[mode]]
        table.add_row("all", str(sum(map(len, asked.values()))), *means)
        Console(width=140).print(table)


if __name__ == "__main__":
    main()
