import json
import math

import numpy as np
import pytest
import torch
from tiny import text_encoder

from textcond.evaluation import RetrievalTask, compare, evaluate_mteb, evaluate_retrieval, paired_bootstrap
from textcond.evaluation.compare import Comparison
from textcond.evaluation.retrieval import Scores, rank

WORDS = ["fox", "snow", "lamp", "river", "tower", "apple", "dog", "cloud", "stone", "boat", "tree", "glass"]


def write_folder(folder, corpus, queries, qrels, split="test"):
    (folder / "qrels").mkdir(parents=True)
    for name, rows in (("corpus", corpus), ("queries", queries)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    lines = "".join("\t".join(map(str, row)) + "\n" for row in qrels)
    (folder / "qrels" / f"{split}.tsv").write_text("query-id\tcorpus-id\tscore\n" + lines, encoding="utf-8")
    return folder


@pytest.fixture
def folder(tmp_path):
    """Pairs of words in a corpus, one word a query, graded qrels, titles on some documents."""
    corpus = [
        {"_id": f"d{i}", "title": WORDS[i] if i % 2 else "", "text": f"{WORDS[i]} {WORDS[(5 * i + 2) % 12]}"}
        for i in range(12)
    ]
    queries = [{"_id": f"q{i}", "text": WORDS[i]} for i in range(10)]
    qrels = [(f"q{i}", f"d{i}", 2) for i in range(10)] + [(f"q{i}", f"d{(i + 3) % 12}", 1) for i in range(0, 10, 2)]
    return write_folder(tmp_path / "words", corpus, queries, qrels)


def ndcg(ranked, judged, cutoff):
    """Jarvelin and Kekalainen's measure with linear gain, written out."""
    gain = sum(judged.get(document, 0) / math.log2(i + 2) for i, document in enumerate(ranked[:cutoff]))
    best = sum(g / math.log2(i + 2) for i, g in enumerate(sorted(judged.values(), reverse=True)[:cutoff]))
    return gain / best


def test_a_folder_is_read_with_titles_before_texts(folder):
    task = RetrievalTask.load(folder)
    assert task.name == "words"
    assert task.corpus["d1"] == "snow snow cloud"
    assert task.corpus["d0"] == "fox lamp"
    assert task.qrels["q0"] == {"d0": 2, "d3": 1}


def test_queries_without_a_right_document_are_not_asked(tmp_path):
    corpus, queries = [{"_id": "d", "text": "a"}], [{"_id": q, "text": "b"} for q in ("asked", "wrong", "unjudged")]
    folder = write_folder(tmp_path / "task", corpus, queries, [("asked", "d", 1), ("wrong", "d", 0)], split="dev")
    assert list(RetrievalTask.load(folder, "dev").queries) == ["asked"]


@pytest.mark.parametrize(
    ("file", "line", "message"),
    [
        ("corpus.jsonl", "{oops", "corpus.jsonl, line 13 is not JSON"),
        ("corpus.jsonl", '{"_id": "x"}', "corpus.jsonl, line 13"),
        ("corpus.jsonl", '["x"]', "corpus.jsonl, line 13"),
        ("queries.jsonl", '{"_id": "q0", "text": "again"}', "queries.jsonl, line 11 repeats the id 'q0'"),
        ("qrels/test.tsv", "q0\td0\tgood", "test.tsv, line 17 is"),
        ("qrels/test.tsv", "q0 d0 1", "test.tsv, line 17 is"),
        ("qrels/test.tsv", "nobody\td0\t1", "line 17 judges query 'nobody'"),
        ("qrels/test.tsv", "q0\tnowhere\t1", "line 17 judges document 'nowhere'"),
        ("qrels/test.tsv", "q0\td0\t1", "line 17 judges 'd0' for 'q0' a second time"),
    ],
)
def test_a_bad_line_is_an_error_with_file_and_line(folder, file, line, message):
    with (folder / file).open("a", encoding="utf-8") as stream:
        stream.write(line + "\n")
    with pytest.raises(ValueError, match=message):
        RetrievalTask.load(folder)


def test_a_missing_file_is_named(folder):
    with pytest.raises(FileNotFoundError, match=r"qrels.dev\.tsv"):
        RetrievalTask.load(folder, "dev")


def test_scores_are_those_of_the_formulas(folder):
    encoder, task = text_encoder(), RetrievalTask.load(folder)
    queries = encoder.encode(list(task.queries.values()), kind="query")
    documents = encoder.encode(list(task.corpus.values()), kind="document")
    ids = np.array(list(task.corpus))
    scores = evaluate_retrieval(encoder, task)
    for query, vector in zip(task.queries, queries, strict=True):
        ranked = list(ids[np.argsort(-(documents @ vector))])
        judged = task.qrels[query]
        first = min(ranked.index(document) for document in judged)
        assert scores.per_query["nDCG@10"][query] == pytest.approx(ndcg(ranked, judged, 10), abs=1e-6)
        assert scores.per_query["RR@10"][query] == pytest.approx(1 / (first + 1) if first < 10 else 0)
        assert scores.per_query["R@10"][query] == sum(d in judged for d in ranked[:10]) / len(judged)
    assert scores.mean("R@100") == 1
    assert 0 < scores.mean("nDCG@10") < 1


def test_a_query_whose_documents_rank_below_k_counts_as_zero(folder):
    task = RetrievalTask.load(folder)
    scores = evaluate_retrieval(text_encoder(), task, k=1, metrics=["R@1"]).per_query["R@1"]
    assert scores.keys() == task.queries.keys()
    assert min(scores.values()) == 0


def test_queries_and_documents_get_their_prompts(folder):
    prompts = {"query": "query : ", "document": "passage of text : "}
    task = RetrievalTask.load(folder)
    plain = text_encoder()
    prefixed = RetrievalTask(
        task.name,
        {key: prompts["query"] + text for key, text in task.queries.items()},
        {key: prompts["document"] + text for key, text in task.corpus.items()},
        task.qrels,
    )
    expected = evaluate_retrieval(plain, prefixed, metrics=["AP"])
    assert evaluate_retrieval(text_encoder(prompts=prompts), task, metrics=["AP"]) == expected
    assert evaluate_retrieval(plain, task, metrics=["AP"]) != expected


def test_ranking_is_by_cosine_and_keeps_the_best():
    documents = np.array([[10, 10], [1, 0], [0, -3]], dtype=np.float32)
    run = rank(np.array([[2, 0]], dtype=np.float32), documents, ["q"], ["a", "b", "c"], 2)
    assert list(run["q"]) == ["b", "a"]
    assert run["q"]["a"] == pytest.approx(math.sqrt(0.5))


def test_vectors_that_are_not_finite_are_an_error(folder):
    encoder = text_encoder()
    with torch.no_grad():
        next(encoder.backbone.parameters())[:] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        evaluate_retrieval(encoder, RetrievalTask.load(folder))


@pytest.mark.parametrize("metric", ["nDGC@10", "nDCG@", "R@1000"])
def test_a_metric_that_cannot_be_computed_is_named(folder, metric):
    with pytest.raises(ValueError, match=metric):
        evaluate_retrieval(text_encoder(), RetrievalTask.load(folder), metrics=[metric])


def test_bootstrap_intervals_are_seeded_and_cover_the_truth():
    generator = np.random.default_rng(0)
    hits = 0
    for trial in range(200):
        differences = generator.normal(0.1, 0.3, 100)
        base = {str(i): 0.0 for i in range(100)}
        values = {str(i): float(value) for i, value in enumerate(differences)}
        interval = paired_bootstrap(values, base, seed=trial, resamples=400)
        hits += interval.low <= 0.1 <= interval.high
    assert 0.89 <= hits / 200 <= 0.99
    assert paired_bootstrap(values, base, seed=1) == paired_bootstrap(values, base, seed=1)
    assert paired_bootstrap(values, base, seed=1) != paired_bootstrap(values, base, seed=2)


def test_what_is_paired_cancels():
    base = {str(i): i / 100 for i in range(100)}
    better = {key: value + 0.01 for key, value in base.items()}
    interval = paired_bootstrap(better, base)
    assert (interval.low, interval.high) == pytest.approx((0.01, 0.01))
    with pytest.raises(ValueError, match="same queries"):
        paired_bootstrap(better, {"0": 0.0})


def test_the_table_has_the_base_first_and_marks_what_is_certain():
    base = Scores("words", {"nDCG@10": {str(i): 0.5 for i in range(50)}})
    better = Scores("words", {"nDCG@10": {str(i): 0.75 for i in range(50)}})
    noisy = Scores("words", {"nDCG@10": {str(i): float(i % 2) for i in range(50)}})
    table = Comparison({"mini": {"words": base}, "tuned": {"words": better}, "noisy": {"words": noisy}}).markdown()
    rows = table.splitlines()
    assert rows[0] == "| nDCG@10 x 100 | words |"
    assert rows[2] == "| mini (base) | 50.0 |"
    assert rows[3] == "| tuned | 75.0 (**+25.0**: +25.0 to +25.0) |"
    assert rows[4].startswith("| noisy | 50.0 (+0.0: -")


def test_folders_are_compared(folder, tmp_path):
    paths = []
    for run, pooling in (("a", "mean"), ("b", "cls")):
        text_encoder(pooling=pooling).save_pretrained(tmp_path / run / "model")
        paths.append(tmp_path / run / "model")
    result = compare(paths, [folder])
    assert list(result.scores) == ["a/model", "b/model"]
    assert result.base == "a/model"
    assert result.scores["a/model"]["words"] == evaluate_retrieval(text_encoder(), RetrievalTask.load(folder))
    with pytest.raises(ValueError, match="given twice"):
        compare([paths[0], paths[0]], [folder])
    with pytest.raises(ValueError, match="share a name"):
        compare(paths, [folder, folder])


def test_mteb_gives_our_scores(folder):
    encoder = text_encoder(prompts={"query": "query : ", "document": "text : "})
    ours = evaluate_retrieval(encoder, RetrievalTask.load(folder), metrics=["nDCG@10", "AP", "R@10"])
    theirs = evaluate_mteb(encoder, [str(folder)])["words"]
    # mteb rounds means to five digits
    assert theirs["ndcg_at_10"] == pytest.approx(round(ours.mean("nDCG@10"), 5), abs=1e-6)
    assert theirs["map_at_100"] == pytest.approx(round(ours.mean("AP"), 5), abs=1e-6)
    assert theirs["recall_at_10"] == pytest.approx(round(ours.mean("R@10"), 5), abs=1e-6)
    assert theirs["main_score"] == theirs["ndcg_at_10"]


def test_mteb_results_are_kept_by_weights(folder, tmp_path, monkeypatch):
    first, second = text_encoder(), text_encoder(pooling="cls")
    task = RetrievalTask.load(folder)
    scores = [evaluate_mteb(encoder, [task], out=tmp_path / "out")["words"] for encoder in (first, second)]
    assert scores[0]["main_score"] != scores[1]["main_score"]
    monkeypatch.setattr(first, "encode", None)
    again = evaluate_mteb(first, [task], out=tmp_path / "out")["words"]
    assert again["main_score"] == scores[0]["main_score"]


def test_an_unknown_mteb_task_is_named():
    with pytest.raises(ValueError, match="'NoSuchTask' is neither"):
        evaluate_mteb(text_encoder(), ["NoSuchTask"])
