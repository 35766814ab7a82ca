import csv
import gzip
import json
import logging
import math

import datasets
import pyarrow.parquet
import pytest

from textcond.data import Example, read_examples, write_examples
from textcond.data.formats import READERS

FULL = [
    Example(
        "red apple", ["a red fruit"], ["a blue car", 'a dog, "big"'], [0.9], [0.25, -1.5], "q1", ["p1"], ["n1", "n2"]
    ),
    Example(
        "赤いりんご",
        ["果物"],
        ["犬", "a blue car"],
        [0.8],
        [0.5, 0.1],
        "q2",
        ["p2"],
        ["n3", "n1"],
    ),
]


def lines(path, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join((row if isinstance(row, str) else json.dumps(row, ensure_ascii=False)) + "\n" for row in rows)
    if path.name.endswith(".gz"):
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text, encoding="utf-8")
    return path


def parts(example, *names):
    return [getattr(example, name) for name in names or ("query", "positives", "negatives")]


def scores(example):
    return [example.positive_scores, example.negative_scores]


# flagembedding


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_canonical_rows_come_back_whole(tmp_path, name):
    examples = [*FULL, Example("q", ["p", "p2"], prompt="Find it: ", positive_scores=[1.0, math.nan], source="web")]
    assert write_examples(examples, tmp_path / name) == 3
    reader = read_examples(tmp_path / name)
    assert reader.format == "flagembedding"
    back = list(reader)
    assert [example.source for example in back] == [name, name, "web"]
    assert [repr(example) for example in back] == [
        repr(Example(**{**vars(example), "source": example.source or name})) for example in examples
    ]


def test_flagembedding_reads_what_others_write_and_ignores_what_it_does_not_know(tmp_path):
    path = lines(tmp_path / "a.jsonl", {"query": "q", "pos": ["p"], "neg": ["n"], "type": "normal", "pos_scores": [1]})
    (example,) = read_examples(path)
    assert (example.positive_scores, example.negative_scores, example.query_id) == ([1.0], None, None)


def test_a_folder_of_jsonl_is_read_in_the_order_of_names(tmp_path):
    for name in ("b", "a"):
        lines(tmp_path / "set" / f"{name}.jsonl", {"query": name, "pos": ["p"]})
    assert [example.query for example in read_examples(tmp_path / "set")] == ["a", "b"]


BAD = [
    ("{", "not JSON"),
    ('["q"]', "a JSON list, not an object"),
    ({"query": "q"}, "no key 'pos'"),
    ({"query": "q", "pos": []}, "no positive"),
    ({"query": "  ", "pos": ["p"]}, "the query is empty"),
    ({"query": "q", "pos": ["p", ""]}, "positive 2 is empty"),
    ({"query": "q", "pos": ["p"], "neg": [" "]}, "negative 1 is empty"),
    ({"query": 3, "pos": ["p"]}, "the query is 3"),
    ({"query": "q", "pos": "p"}, "pos is 'p': give a list"),
    ({"query": "q", "pos": ["p"], "neg": ["n"], "neg_scores": [1, 2]}, "1 negatives with 2 negative_scores"),
    ({"query": "q", "pos": ["p"], "pos_scores": ["high"]}, "pos_scores holds 'high'"),
    ({"query": "q", "pos": ["p"], "neg_ids": ["x"]}, "0 negatives with 1 negative_ids"),
    ({"query": "q", "pos": ["p"], "prompt": 1}, "prompt is 1"),
    ('{"query": "\\ud83d", "pos": ["p"]}', "the query holds half of a surrogate pair"),
]


@pytest.mark.parametrize(("row", "message"), BAD)
def test_a_malformed_line_is_named_or_counted(tmp_path, row, message, caplog):
    path = lines(tmp_path / "a.jsonl", {"query": "first", "pos": ["p"]}, "", row, {"query": "last", "pos": ["p"]})
    with pytest.raises(ValueError, match=message) as caught:
        list(read_examples(path))
    assert str(caught.value).startswith(f"{path}:3: ")
    reader = read_examples(path, on_error="skip")
    with caplog.at_level(logging.WARNING):
        assert [example.query for example in reader] == ["first", "last"]
        assert list(reader) == []
    assert reader.skipped == 1
    assert reader.first_problem.startswith(f"{path}:3: ")
    assert len([record for record in caplog.records if "1 malformed rows" in record.message]) == 1


def test_bytes_that_are_not_utf8_and_cut_gzip_are_named(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"query": "q", "pos": ["p"]}\n{"query": "\xff"}\n')
    with pytest.raises(ValueError, match=r"a\.jsonl:2: not UTF-8"):
        list(read_examples(tmp_path / "a.jsonl"))
    packed = gzip.compress(b'{"query": "q", "pos": ["p"]}\n' * 1000)
    (tmp_path / "b.jsonl.gz").write_bytes(packed[: len(packed) // 2])
    with pytest.raises(ValueError, match=r"b\.jsonl\.gz is damaged or cut short"):
        list(read_examples(tmp_path / "b.jsonl.gz", "flagembedding"))
    (tmp_path / "c.csv").write_bytes("query,positive\nq,😀\n".encode() + "q,😀".encode() + b"\xff\nq,p\n")
    with pytest.raises(ValueError, match=r"c\.csv:3: not UTF-8"):
        list(read_examples(tmp_path / "c.csv", "csv"))


@pytest.mark.parametrize("on_error", ["raise", "skip"])
@pytest.mark.parametrize("name", ["a.csv", "a.tsv"])
@pytest.mark.parametrize("code", ["utf-16", "latin-1"])
def test_a_table_in_another_encoding_is_named(tmp_path, name, code, on_error):
    sign = "\t" if name.endswith("tsv") else ","
    (tmp_path / name).write_bytes(f"query{sign}größe\nq{sign}p\nq{sign}p\n".encode(code))
    with pytest.raises(ValueError, match=rf"{name}.* not UTF-8.*: convert (it|the file) to UTF-8"):
        list(read_examples(tmp_path / name, name[2:], on_error=on_error))


DAMAGED = {
    "pages": lambda content: content[:4] + b"\xff" * (len(content) // 2) + content[4 + len(content) // 2 :],
    "foot": lambda content: content[:-40] + b"\xff" * 32 + content[-8:],
    "text": lambda content: content.replace(b"positive 7", b"positive\xff7"),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_parquet_file_is_named(tmp_path, damage):
    path = tmp_path / "a.parquet"
    rows = [{"query": f"query {row}", "positive": f"positive {row}"} for row in range(3000)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, compression="none")
    path.write_bytes(DAMAGED[damage](path.read_bytes()))
    with pytest.raises(ValueError, match=r"a\.parquet is not a whole Parquet file \(.+\): download or write it again$"):
        list(read_examples(path, "parquet"))


def test_a_damaged_datasets_folder_is_named(tmp_path):
    datasets.Dataset.from_list([{"query": "q", "positive": "p"}] * 100).save_to_disk(tmp_path / "set")
    (file,) = (tmp_path / "set").glob("*.arrow")
    file.write_bytes(file.read_bytes()[:300])
    with pytest.raises(ValueError, match=r"\.arrow is not a whole Arrow file \(.+\): download or write it again$"):
        list(read_examples(tmp_path / "set"))


# sentence-transformers


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.parquet", "a.csv.gz", "a.tsv"])
@pytest.mark.parametrize("shape", ["triplet", "n-tuple", "labeled-list", "labeled-pair", "pair"])
@pytest.mark.parametrize("with_scores", [True, False])
def test_every_shape_comes_back_from_every_file(tmp_path, name, shape, with_scores):
    path = tmp_path / name
    write_examples(FULL, path, "sentence-transformers", shape=shape, scores=with_scores)
    back = list(read_examples(path))
    expected = []
    for example in FULL:
        values = scores(example) if with_scores and shape != "pair" else [None, None]
        if shape == "triplet":
            for place, negative in enumerate(example.negatives):
                negative_scores = [values[1][place]] if values[1] else None
                expected.append([example.query, example.positives, [negative], values[0], negative_scores])
        else:
            expected.append([example.query, example.positives, example.negatives if shape != "pair" else [], *values])
    assert [[*parts(example), *scores(example)] for example in back] == expected


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.parquet"])
@pytest.mark.parametrize("shape", ["triplet", "n-tuple", "labeled-pair", "labeled-list"])
def test_datasets_loads_what_is_written_and_its_folder_reads_the_same(tmp_path, name, shape):
    datasets = pytest.importorskip("datasets")
    path = tmp_path / name
    write_examples(FULL, path, "sentence-transformers", shape=shape)
    kind = {"jsonl": "json"}.get(path.suffix[1:], path.suffix[1:])
    data = datasets.load_dataset(kind, data_files=str(path), split="train", cache_dir=str(tmp_path / "cache"))
    texts = [column for column in data.column_names if column not in ("score", "scores")]
    assert len(texts) == {"triplet": 3, "n-tuple": 4}.get(shape, 2)
    data.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": data, "dev": data.select([0])}).save_to_disk(tmp_path / "both")
    straight = [[*parts(example), *scores(example)] for example in read_examples(path)]
    for folder in ("saved", "both"):
        reader = read_examples(tmp_path / folder)
        assert reader.format == "sentence-transformers"
        assert [[*parts(example), *scores(example)] for example in reader] == straight
    assert len(list(read_examples(tmp_path / "both", split="dev", threshold=-9))) == 1
    with pytest.raises(ValueError, match="no split 'test', it has train, dev"):
        list(read_examples(tmp_path / "both", "sentence-transformers", split="test"))


@pytest.mark.slow
def test_what_sentence_transformers_mines_is_read(tmp_path):
    datasets = pytest.importorskip("datasets")
    mine = pytest.importorskip("sentence_transformers.util").mine_hard_negatives
    from sentence_transformers import SentenceTransformer
    from tiny import text_encoder

    text_encoder().save_pretrained(tmp_path / "model")
    model = SentenceTransformer(str(tmp_path / "model"), device="cpu")
    texts = ["apple", "car", "dog", "house", "tree", "bird"]
    pairs = datasets.Dataset.from_dict({"q": [f"the {text}" for text in texts], "a": texts})
    for shape in ("triplet", "n-tuple", "labeled-pair", "labeled-list"):
        mined = mine(pairs, model, num_negatives=2, output_format=shape, output_scores=True, range_max=5, verbose=False)
        mined.save_to_disk(tmp_path / shape)
        examples = list(read_examples(tmp_path / shape))
        assert len(examples) == (12 if shape == "triplet" else 6)
        assert all(example.negative_scores for example in examples)
        wanted = {(row["q"], *sorted(row["a"] if isinstance(row["a"], list) else [row["a"]])) for row in mined}
        if shape in ("triplet", "n-tuple"):
            assert {(example.query, example.positives[0]) for example in examples} == wanted


@pytest.mark.slow
def test_our_n_tuples_train_in_sentence_transformers(tmp_path):
    datasets = pytest.importorskip("datasets")
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.losses import MultipleNegativesRankingLoss
    from sentence_transformers.util import batch_to_device
    from tiny import text_encoder

    text_encoder().save_pretrained(tmp_path / "model")
    model = SentenceTransformer(str(tmp_path / "model"), device="cpu")
    write_examples(FULL, tmp_path / "a.parquet", "sentence-transformers", shape="n-tuple", scores=False)
    data = datasets.load_dataset(
        "parquet", data_files=str(tmp_path / "a.parquet"), split="train", cache_dir=str(tmp_path / "cache")
    )
    collator = pytest.importorskip("sentence_transformers.sentence_transformer.data_collator")
    batch = collator.SentenceTransformerDataCollator(model.preprocess)(list(data))
    columns = [name.removesuffix("_input_ids") for name in batch if name.endswith("_input_ids")]
    assert columns == ["anchor", "positive", "negative_1", "negative_2"]
    features = [
        {"input_ids": batch[f"{name}_input_ids"], "attention_mask": batch[f"{name}_attention_mask"]} for name in columns
    ]
    assert MultipleNegativesRankingLoss(model)([batch_to_device(item, "cpu") for item in features], None).isfinite()


def test_columns_are_read_by_order_not_by_name(tmp_path):
    path = lines(
        tmp_path / "a.jsonl", {"positive": "q", "anchor": "p", "x": "n"}, {"x": "n2", "anchor": "p2", "positive": "q2"}
    )
    assert [parts(example) for example in read_examples(path)] == [["q", ["p"], ["n"]], ["q2", ["p2"], ["n2"]]]


def test_csv_fields_may_hold_quotes_commas_and_lines(tmp_path):
    with (tmp_path / "a.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["q", "p"], ['say "hi",\nthen go', "a\r\nb"], ["second", "x" * 200_000]])
    first, second = read_examples(tmp_path / "a.csv")
    assert parts(first) == ['say "hi",\nthen go', ["a\r\nb"], []]
    assert len(second.positives[0]) == 200_000


def test_csv_errors_name_the_line_on_which_the_row_starts(tmp_path):
    path = lines(tmp_path / "a.csv", "q,p", '"two\nlines",ok', "one,two,three", "fine,fine")
    with pytest.raises(ValueError, match=r"a\.csv:4: 3 fields where the header has 2"):
        list(read_examples(path))
    reader = read_examples(path, on_error="skip")
    assert [example.query for example in reader] == ["two\nlines", "fine"]
    path = lines(tmp_path / "b.csv", "q,p", "a,b", '"open,c', "d,e")
    with pytest.raises(ValueError, match=r"b\.csv:3: not CSV"):
        list(read_examples(path))


def test_margins_labels_and_thresholds(tmp_path):
    path = lines(tmp_path / "a.jsonl", {"q": "q", "p": "p", "n": "n", "label": 0.7})
    (example,) = read_examples(path)
    assert scores(example) == [[0.0], [-0.7]]
    path = lines(
        tmp_path / "b.jsonl",
        *({"a": "q", "b": text, "score": score} for text, score in [("x", 0.4), ("y", 0.8), ("z", 0.9)]),
    )
    (example,) = read_examples(path)
    assert parts(example) == ["q", ["z"], ["x", "y"]]
    (example,) = read_examples(path, threshold=0.5)
    assert parts(example) == ["q", ["y", "z"], ["x"]]
    with pytest.raises(ValueError, match=r"b\.jsonl:1: no positive among 3 documents of 'q'"):
        list(read_examples(path, threshold=0.95))
    path = lines(tmp_path / "c.jsonl", {"a": "q", "b": "p", "c": "n", "scores": [1, 2, 3]})
    with pytest.raises(ValueError, match=r"c\.jsonl:1: 3 scores for a positive and 1 negatives"):
        list(read_examples(path))
    path = lines(tmp_path / "d.jsonl", {"a": "q", "b": "p", "label": "x"})
    with pytest.raises(ValueError, match=r"d\.jsonl:1: label is 'x'"):
        list(read_examples(path))
    reader = read_examples(path, on_error="skip")
    assert (list(reader), reader.skipped) == ([], 1)


def test_rows_of_other_columns_are_errors(tmp_path):
    path = lines(tmp_path / "a.jsonl", {"q": "q", "p": "p"}, {"q": "q", "p": "p", "n": "n"})
    with pytest.raises(ValueError, match=r"a\.jsonl:2: columns q, p, n, the first row has q, p"):
        list(read_examples(path))


# tables and ids


def msmarco(folder, **more):
    lines(folder / "collection.tsv", "0\tfirst passage", '1\tsecond "passage', "2\tthird passage", "3\tfourth")
    lines(folder / "queries.train.tsv", "10\tfirst query", "11\tsecond query")
    lines(folder / "qrels.train.tsv", "10\t0\t0\t1", "11\t0\t2\t1", "10\t0\t3\t1")
    for name, rows in more.items():
        lines(folder / name, *rows)
    return folder


def test_msmarco_folder_with_a_run(tmp_path):
    folder = msmarco(tmp_path / "ms", **{"run.tsv": ["10\t1\t2", "10\t0\t1", "10\t2\t3", "11\t0\t1"]})
    first, second = read_examples(folder)
    assert parts(first) == ["first query", ["first passage", "fourth"], []]
    assert parts(first, "query_id", "positive_ids") == ["10", ["0", "3"]]
    first, second = read_examples(folder, run=folder / "run.tsv", negatives=1)
    assert parts(first, "negatives", "negative_ids", "negative_scores") == [['second "passage'], ["1"], None]
    assert parts(second) == ["second query", ["third passage"], ["first passage"]]
    lines(folder / "trec.tsv", "10 Q0 0 1 9.5 x", "10 Q0 1 2 8.5 x", "11 Q0 1 1 3 x")
    first, second = read_examples(folder, run=folder / "trec.tsv")
    assert first.positive_scores[0] == 9.5
    assert math.isnan(first.positive_scores[1])
    assert first.negative_scores == [8.5]
    assert scores(second) == [None, [3.0]]


def test_msmarco_triples_of_ids_and_of_texts(tmp_path):
    folder = msmarco(tmp_path, **{"qidpidtriples.tsv": ["10\t0\t1", "11\t2\t0"], "triples.small.tsv": ["q\tp\tn"]})
    first, second = read_examples(folder / "qidpidtriples.tsv")
    assert parts(first) == ["first query", ["first passage"], ['second "passage']]
    assert parts(second, "query_id", "positive_ids", "negative_ids") == ["11", ["2"], ["0"]]
    (only,) = read_examples(folder / "triples.small.tsv")
    assert parts(only) == ["q", ["p"], ["n"]]


def test_missing_documents_queries_and_bad_judgements_are_named(tmp_path):
    folder = msmarco(tmp_path / "a")
    lines(folder / "qrels.train.tsv", "10\t0\t99\t1", "77\t0\t1\t1", "11\t0\t2\t1", "what")
    with pytest.raises(ValueError, match=r"qrels\.train\.tsv:4: 'what' is no judgement"):
        list(read_examples(folder))
    lines(folder / "qrels.train.tsv", "10\t0\t99\t1", "77\t0\t1\t1", "11\t0\t2\t1")
    with pytest.raises(ValueError, match=r"qrels\.train\.tsv:1: the id '99' is not in .*collection\.tsv"):
        list(read_examples(folder))
    reader = read_examples(folder, on_error="skip")
    assert [example.query_id for example in reader] == ["11"]
    assert reader.skipped == 2
    with pytest.raises(FileNotFoundError, match=r"holds no qrels\.dev\.tsv or qrels\.tsv"):
        list(read_examples(folder, split="dev"))
    lines(folder / "run.tsv", "10\t1")
    with pytest.raises(ValueError, match=r"run\.tsv:1: '10\\t1' is no line of a run"):
        list(read_examples(folder, run=folder / "run.tsv"))


@pytest.mark.parametrize("packed", ["", ".gz"])
def test_beir_folder(tmp_path, packed):
    lines(
        tmp_path / f"corpus.jsonl{packed}",
        {"_id": "a", "title": "T", "text": "body"},
        {"_id": "b", "title": "", "text": "other"},
        {"_id": "c", "title": "", "text": ""},
    )
    lines(tmp_path / f"queries.jsonl{packed}", {"_id": "1", "text": "one"}, {"_id": "2", "text": "two"})
    lines(tmp_path / "qrels" / "train.tsv", "query-id\tcorpus-id\tscore", "1\ta\t2", "1\tb\t0", "2\tb\t0")
    (example,) = read_examples(tmp_path)
    assert parts(example) == ["one", ["T body"], ["other"]]
    assert scores(example) == [None, None]
    lines(tmp_path / "qrels" / "train.tsv", "query-id\tcorpus-id\tscore", "1\tc\t1")
    with pytest.raises(ValueError, match=r"train\.tsv:2: the text of 'c' in .* is empty"):
        list(read_examples(tmp_path))


def test_tevatron_with_a_corpus_and_with_passages(tmp_path):
    rows = {"query_id": "1", "query_text": "q", "positive_document_ids": ["a"], "negative_document_ids": ["b"]}
    path = lines(tmp_path / "set" / "train.jsonl", rows)
    lines(tmp_path / "set" / "corpus.jsonl", {"docid": "a", "document_text": "A"}, {"docid": "b", "document_text": "B"})
    for source in (path.parent, path):
        reader = read_examples(source)
        assert reader.format == "tevatron"
        (example,) = reader
        assert parts(example) == ["q", ["A"], ["B"]]
    old = {
        "query_id": "1",
        "query": "q",
        "positive_passages": [{"docid": "a", "title": "T", "text": "A"}],
        "negative_passages": [],
    }
    (example,) = read_examples(lines(tmp_path / "old.jsonl", old))
    assert parts(example, "query", "positives", "positive_ids") == ["q", ["T A"], ["a"]]


def test_distillation_tables_with_lists_written_as_text(tmp_path):
    lines(
        tmp_path / "train.jsonl",
        {"query_id": 1, "document_ids": "['3', '4']", "scores": "[0.1, 0.9]"},
        {"query_id": 2, "document_ids": [4, 3], "scores": [0.7, 0.6]},
    )
    lines(tmp_path / "queries.jsonl", {"query_id": 1, "text": "one"}, {"query_id": 2, "text": "two"})
    lines(tmp_path / "documents.jsonl", {"document_id": 3, "text": "three"}, {"document_id": 4, "text": "four"})
    reader = read_examples(tmp_path)
    assert reader.format == "ids"
    assert [[*parts(example), *scores(example)] for example in reader] == [
        ["one", ["four"], ["three"], [0.9], [0.1]],
        ["two", ["four"], ["three"], [0.7], [0.6]],
    ]
    lines(tmp_path / "train.jsonl", {"query_id": 1, "document_ids": ["3"], "scores": [1, 2]})
    with pytest.raises(ValueError, match=r"train\.jsonl:1: 1 document_ids with 2 scores"):
        list(read_examples(tmp_path))


def test_natural_questions_pairs_and_dpr(tmp_path):
    path = lines(tmp_path / "a.jsonl", {"query": "q", "answer": "a"})
    assert read_examples(path).format == "natural-questions"
    (example,) = read_examples(path)
    assert parts(example) == ["q", ["a"], []]
    (example,) = read_examples(lines(tmp_path / "b.jsonl", {"question": "q", "answers": ["a", "b"]}))
    assert example.positives == ["a", "b"]
    passage = {"title": "T", "text": "x", "score": 3, "passage_id": "7"}
    row = {
        "question": "q",
        "answers": ["a"],
        "positive_ctxs": [passage],
        "negative_ctxs": [{"title": "", "text": "n"}],
        "hard_negative_ctxs": [{"title": "", "text": "h"}],
    }
    (tmp_path / "c.json").write_text(json.dumps([row, {**row, "positive_ctxs": []}, row], indent=1))
    text = (tmp_path / "c.json").read_text()
    starts = [line for line, content in enumerate(text.splitlines(), 1) if content == " {"]
    with pytest.raises(ValueError, match=rf"c\.json:{starts[1]}: no positive"):
        list(read_examples(tmp_path / "c.json"))
    reader = read_examples(tmp_path / "c.json", on_error="skip")
    first, _ = reader
    assert (reader.format, reader.skipped) == ("dpr", 1)
    assert parts(first) == ["q", ["T x"], ["h", "n"]]
    assert parts(first, "positive_ids", "positive_scores", "negative_scores") == [["7"], [3.0], None]


def test_a_json_array_larger_than_the_buffer_streams_and_names_where_it_breaks(tmp_path):
    rows = [{"question": f"q{place}", "positive_ctxs": [{"text": "x" * 5000}]} for place in range(700)]
    text = "[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n"
    (tmp_path / "a.json").write_text(text)
    assert [example.query for example in read_examples(tmp_path / "a.json")] == [row["question"] for row in rows]
    (tmp_path / "a.json").write_text(text[:-40])
    with pytest.raises(ValueError, match=r"a\.json:701: not JSON"):
        list(read_examples(tmp_path / "a.json"))
    (tmp_path / "a.json").write_text(text.replace('"q400",', '"q400"', 1))
    with pytest.raises(ValueError, match=r"a\.json:402: not JSON \(Expecting ',' delimiter\)"):
        list(read_examples(tmp_path / "a.json"))


def test_parallel_text_in_one_file_and_in_two(tmp_path):
    one = lines(tmp_path / "one.txt", "cat\t猫", "dog\t犬")
    lines(tmp_path / "pair" / "set.en", "cat", "dog")
    lines(tmp_path / "pair" / "set.ja", "猫", "犬")
    for source, format in ((one, "parallel"), (tmp_path / "pair", "auto"), (tmp_path / "pair" / "set", "auto")):
        assert [parts(example) for example in read_examples(source, format)] == [
            ["cat", ["猫"], []],
            ["dog", ["犬"], []],
        ]
    lines(tmp_path / "pair" / "set.ja", "猫")
    with pytest.raises(ValueError, match=r"set\.ja:2: ends before its translation"):
        list(read_examples(tmp_path / "pair"))
    lines(tmp_path / "pair" / "set.ja", "猫", "")
    with pytest.raises(ValueError, match=r"set\.en:2: positive 1 is empty"):
        list(read_examples(tmp_path / "pair"))


# writing, detection


@pytest.mark.parametrize("format", ["tevatron", "ids", "beir", "msmarco", "dpr", "natural-questions", "parallel"])
def test_every_other_format_comes_back(tmp_path, format):
    path = tmp_path / {"dpr": "a.json", "natural-questions": "a.jsonl", "parallel": "a.txt"}.get(format, "set")
    write_examples(FULL, path, format)
    options = {"run": path / "run.train.tsv"} if format in ("beir", "msmarco") else {}
    back = list(read_examples(path, "parallel" if format == "parallel" else "auto", **options))
    names = ["query", "positives"]
    if format not in ("natural-questions", "parallel"):
        names += ["negatives", "positive_scores", "negative_scores", "positive_ids", "negative_ids"]
        names += [] if format == "dpr" else ["query_id"]
    assert [parts(example, *names) for example in back] == [parts(example, *names) for example in FULL]


@pytest.mark.parametrize("format", ["beir", "msmarco"])
def test_a_written_run_ranks_by_score_and_without_scores_keeps_the_order(tmp_path, format):
    scored = Example("q", ["p"], ["low", "high"], [0.5], [0.2, 0.9], "1", ["p"], ["l", "h"])
    bare = Example("q2", ["p"], ["first", "second"], None, None, "2", ["p"], ["x", "a"])
    write_examples([scored, bare], tmp_path / "set", format)
    run = tmp_path / "set" / "run.train.tsv"
    assert [line.split()[:4] for line in run.read_text().splitlines()] == [
        ["1", "Q0", "h", "1"],
        ["1", "Q0", "p", "2"],
        ["1", "Q0", "l", "3"],
        ["2", "x", "1"],
        ["2", "a", "2"],
    ]
    first, second = read_examples(tmp_path / "set", run=run)
    assert parts(first, "negatives", "positive_scores", "negative_scores") == [["high", "low"], [0.5], [0.9, 0.2]]
    assert parts(second, "negatives", "negative_scores") == [["first", "second"], None]


def test_texts_without_ids_get_the_same_id_for_the_same_text(tmp_path):
    bare = [Example("q1", ["same", "p"]), Example("q2", ["same"], ["n"])]
    write_examples(bare, tmp_path / "set", "tevatron")
    first, second = read_examples(tmp_path / "set")
    assert first.positive_ids[0] == second.positive_ids[0]
    assert len((tmp_path / "set" / "corpus.jsonl").read_text().splitlines()) == 3
    clash = [Example("q1", ["one"], positive_ids=["a"]), Example("q2", ["two"], positive_ids=["a"])]
    with pytest.raises(ValueError, match="the id 'a' has two texts"):
        write_examples(clash, tmp_path / "set", "beir")
    assert [example.query for example in read_examples(tmp_path / "set")] == ["q1", "q2"]


def test_a_failed_write_leaves_what_was_there(tmp_path):
    write_examples(FULL, tmp_path / "a.jsonl")

    def broken():
        yield FULL[0]
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        write_examples(broken(), tmp_path / "a.jsonl")
    assert len(list(read_examples(tmp_path / "a.jsonl"))) == 2
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.jsonl"]


@pytest.mark.parametrize(
    ("examples", "name", "options", "message"),
    [
        ([], "a.jsonl", {}, "no example to write"),
        ([], "a.parquet", {"format": "parquet"}, "no example to write"),
        (FULL, "a.jsonl", {"format": "nope"}, "format 'nope': pass one of"),
        (FULL, "a.txt", {"format": "sentence-transformers"}, r"name it \.jsonl"),
        (FULL, "a.jsonl", {"format": "sentence-transformers", "shape": "x"}, "shape 'x'"),
        (
            FULL,
            "a.csv",
            {"format": "csv", "shape": "n-tuple", "negatives": 3},
            "example 1 .* has 2 negatives, the n-tuple needs 3",
        ),
        ([Example("q", ["p"])], "a.csv", {"format": "csv"}, "has no negative"),
        ([FULL[0], Example("q", ["p"], ["n"])], "a.csv", {"format": "csv"}, "example 2 .* lacks scores"),
        ([Example("q", ["a\tb"], ["n"])], "a.tsv", {"format": "tsv"}, "TSV cannot hold"),
        ([FULL[0], FULL[0]], "set", {"format": "beir"}, "query 'q1' comes again"),
    ],
)
def test_what_cannot_be_written_is_an_error(tmp_path, examples, name, options, message):
    with pytest.raises(ValueError, match=message):
        write_examples(examples, tmp_path / name, **options)
    assert list(tmp_path.iterdir()) == []


def test_unknown_things_are_named_with_what_is_known(tmp_path):
    with pytest.raises(ValueError, match="a first row with the columns foo is none of the formats flagembedding"):
        read_examples(lines(tmp_path / "a.jsonl", {"foo": 1}))
    with pytest.raises(ValueError, match=r"a file named a\.doc is none of the formats"):
        read_examples(lines(tmp_path / "a.doc", "x"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="a folder of nothing is none of the formats"):
        read_examples(tmp_path / "empty")
    with pytest.raises(ValueError, match=r"b\.jsonl holds no row"):
        read_examples(lines(tmp_path / "b.jsonl"))
    with pytest.raises(FileNotFoundError, match="no file or folder"):
        read_examples(tmp_path / "none.jsonl")
    with pytest.raises(ValueError, match=r"format 'beer': pass one of auto, flagembedding"):
        read_examples(tmp_path / "a.jsonl", "beer")
    with pytest.raises(ValueError, match=r"format 'dpr' has no option 'run'"):
        read_examples(tmp_path / "a.jsonl", "dpr", run="x")
    with pytest.raises(ValueError, match="on_error is 'ignore'"):
        read_examples(tmp_path / "a.jsonl", "dpr", on_error="ignore")
    assert set(READERS) >= {"csv", "tsv", "parquet", "parallel", "beir", "ids"}
