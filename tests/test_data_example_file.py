import os
import pickle

import numpy as np
import pytest

from textcond.data import Example, ExampleFile, TextTable, as_example_file, read_examples, write_examples
from textcond.data.rows import Problems


def test_rows_are_found_by_number_also_after_pickling(tmp_path):
    texts = ["zero", "一", "two " * 5000, "three"]
    write_examples([Example(text, [f"{text} yes"]) for text in texts], tmp_path / "a.jsonl")
    file = ExampleFile(tmp_path / "a.jsonl")
    assert len(file) == 4
    assert [file[row].query for row in (3, 1, 2, 0, -1)] == ["three", "一", texts[2], "zero", "three"]
    assert pickle.loads(pickle.dumps(file))[1].positives == ["一 yes"]
    assert [example.query for example in file] == texts
    with pytest.raises(IndexError, match="row 4 of"):
        file[4]
    assert file._offsets.nbytes == 8 * 4


def test_a_last_line_without_an_end_and_blank_lines(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"query": "a", "pos": ["p"]}\n\n{"query": "b", "pos": ["p"]}')
    assert [example.query for example in ExampleFile(tmp_path / "a.jsonl")] == ["a", "b"]


def test_what_is_not_there_or_broken_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="write_examples"):
        ExampleFile(tmp_path / "a.jsonl")
    (tmp_path / "a.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="holds no example"):
        ExampleFile(tmp_path / "a.jsonl")
    (tmp_path / "a.jsonl").write_text('{"query": "a", "pos": ["p"]}\n{"query": "b"}\n')
    with pytest.raises(ValueError, match=r"a\.jsonl, row 2: no key 'pos'"):
        ExampleFile(tmp_path / "a.jsonl")[1]


def test_a_source_is_converted_once_and_again_when_it_changes(tmp_path):
    source = tmp_path / "a.csv"
    source.write_text("q,p\none,yes\ntwo,no\n")
    file = as_example_file(source, cache=tmp_path / "cache")
    assert [example.query for example in file] == ["one", "two"]
    before = file.path.stat().st_mtime_ns
    again = as_example_file(source, cache=tmp_path / "cache")
    assert (again.path, again.path.stat().st_mtime_ns) == (file.path, before)
    assert isinstance(again._offsets, np.memmap)
    source.write_text("q,p\nthree,yes\nfour,no\nfive,no\n")
    assert len(as_example_file(source, cache=tmp_path / "cache")) == 3
    assert len(list((tmp_path / "cache").glob("*.jsonl"))) == 2
    source.write_text("q,p\nthree,yes\n,no\n")
    with pytest.raises(ValueError, match=r"a\.csv:3: the query is empty"):
        as_example_file(source, cache=tmp_path / "cache")
    assert len(as_example_file(source, cache=tmp_path / "cache", on_error="skip")) == 1
    assert not [entry for entry in os.listdir(tmp_path / "cache") if entry.startswith(".")]


def test_a_changed_table_beside_the_rows_is_another_source_and_an_unrelated_file_is_not(tmp_path):
    examples = [Example("q", ["p"], query_id="1", positive_ids=["a"])]
    write_examples(examples, tmp_path / "set", "tevatron")
    rows = tmp_path / "set" / "train.jsonl"
    first = as_example_file(rows, cache=tmp_path / "set")
    (tmp_path / "set" / "notes.txt").write_text("x")
    assert as_example_file(rows, cache=tmp_path / "set").path == first.path
    corpus = tmp_path / "set" / "corpus.jsonl"
    corpus.write_text(corpus.read_text().replace('"p"', '"changed"'))
    assert as_example_file(rows, cache=tmp_path / "set")[0].positives == ["changed"]


def test_texts_are_found_by_id_in_every_kind_of_table(tmp_path):
    import pyarrow
    import pyarrow.parquet

    rows = [(f"id{place}", f"text {place} 犬") for place in range(300)]
    (tmp_path / "a.tsv").write_text("".join(f"{ident}\t{text}\n" for ident, text in rows))
    pyarrow.parquet.write_table(
        pyarrow.table({"document_id": [row[0] for row in rows], "text": [row[1] for row in rows]}),
        tmp_path / "a.parquet",
    )
    examples = [Example("q", [text], positive_ids=[ident], query_id=f"q{ident}") for ident, text in rows]
    write_examples(examples[:1], tmp_path / "one", "ids")
    for path in (tmp_path / "a.tsv", tmp_path / "a.parquet"):
        table = TextTable(path)
        assert (len(table), dict(table.items())) == (300, dict(rows))
        assert [table[ident] for ident, _ in reversed(rows)] == [text for _, text in reversed(rows)]
        assert "id7" in table
        assert "id300" not in table
        with pytest.raises(KeyError, match="no id 'x' in"):
            table["x"]
        assert table._hashes.nbytes + table._offsets.nbytes == 16 * 300
    assert TextTable(tmp_path / "one" / "documents.jsonl")["id0"] == "text 0 犬"


def test_an_id_that_comes_twice_and_a_row_without_text_are_named(tmp_path):
    path = tmp_path / "a.tsv"
    path.write_text("1\tone\n2\ttwo\n1\tagain\n")
    with pytest.raises(ValueError, match=r"a\.tsv:3: the id '1' comes again"):
        TextTable(path)
    problems = Problems("skip")
    assert TextTable(path, problems=problems)["1"] == "one"
    assert problems.skipped == 1
    path.write_text("1\tone\nalone\n")
    with pytest.raises(ValueError, match=r"a\.tsv:2: 'alone' has no tab"):
        TextTable(path)
    (tmp_path / "b.jsonl").write_text('{"name": "x"}\n')
    with pytest.raises(ValueError, match=r"b\.jsonl:1: no column for an id among name: name it one of _id"):
        TextTable(tmp_path / "b.jsonl")


def test_reading_does_not_hold_the_rows(tmp_path):
    import tracemalloc

    def many():
        for place in range(4000):
            yield Example(f"query {place}", ["x" * 2000])

    write_examples(many(), tmp_path / "a.jsonl")
    tracemalloc.start()
    assert sum(1 for _ in read_examples(tmp_path / "a.jsonl")) == 4000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20  # the texts take 8 MB
