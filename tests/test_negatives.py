import dataclasses
import json
import sys

import numpy as np
import pytest
import tiny
import torch

from textcond.data import Example
from textcond.negatives import (
    BM25,
    Corpus,
    CrossEncoderTeacher,
    Dense,
    EncoderTeacher,
    KnownPositives,
    MiningOptions,
    MiningReport,
    Random,
    RunFile,
    build_sources,
    cached_embeddings,
    mine,
    mining,
)

ANIMALS = ("fox", "dog", "cat", "owl", "bear")
PLACES = ("in snow", "by a river", "on a hill", "under trees", "at night", "near town")
CORPUS = {f"d{n}": f"the {a} {p}" for n, (a, p) in enumerate((a, p) for a in ANIMALS for p in PLACES)}
TEXTS = list(CORPUS.values())
EXAMPLES = [
    Example(f"{a} seen {p}", [f"the {a} {p}"], query_id=f"q{a}{p[0]}{p[-1]}") for a in ANIMALS for p in PLACES[::2]
]


@pytest.fixture(scope="module")
def encoder():
    return tiny.text_encoder(prompts={"query": "q: "})


def lookup(scores):
    """A teacher that knows a score for each document."""
    return lambda pairs: [scores[document] for _, document in pairs]


def options(**changes):
    return MiningOptions(**{"num_negatives": 3, "near_duplicate": None, **changes})


def run_file(tmp_path, ranking, query_id="q1"):
    path = tmp_path / "run.tsv"
    path.write_text("".join(f"{query_id}\t{name}\t{rank}\n" for rank, name in enumerate(ranking, 1)))
    return RunFile(path)


@pytest.fixture
def letters(tmp_path):
    """Mine for one query whose run ranks a, b, c ... and whose teacher scores are given."""

    def negatives(ranking, scores, positives=("p",), extra=(), **changes):
        corpus = {name: f"text {name}" for name in scores if name not in extra}
        example = Example("question", [f"text {name}" for name in positives], query_id="q1")
        teacher = lookup({f"text {name}": score for name, score in scores.items()})
        report = MiningReport()
        sources = {run_file(tmp_path, ranking): 1.0}
        found = list(mine([example], corpus, sources, options(**changes), teacher=teacher, report=report))
        return ("".join(found[0].negative_ids) if found else None), found, report

    return negatives


def test_ranks_count_before_anything_is_removed(letters):
    scores = dict.fromkeys("abcdef", 0.1) | {"p": 1.0}
    # p holds rank 1; b is removed by score, and still holds rank 2
    scores["b"] = 0.99
    assert letters("apbcdef", scores, range_min=1, range_max=4, relative=0.95)[0] == "c"
    assert letters("apbcdef", scores, range_min=1, range_max=4)[0] == "bc"


def test_relative_margin_and_bounds_keep_what_the_papers_say(letters):
    scores = {"p": 0.8, "a": 0.77, "b": 0.75, "c": 0.5, "d": 0.2, "e": 0.1}
    assert letters("abcde", scores, relative=0.95, num_negatives=9)[0] == "bcde"
    assert letters("abcde", scores, margin=0.1, num_negatives=9)[0] == "cde"
    assert letters("abcde", scores, max_score=0.75, min_score=0.2, num_negatives=9)[0] == "bcd"
    found, examples, report = letters("abcde", scores, relative=0.95, max_score=0.6)
    assert found == "cde"
    assert examples[0].negative_scores == [0.5, 0.2, 0.1]
    assert examples[0].positive_scores == [0.8]
    assert (report.candidates, report.filtered, report.negatives) == (5, 2, 3)


def test_a_negative_positive_score_never_lets_better_documents_through(letters):
    scores = {"p": -2.0, "a": -1.95, "b": -2.05, "c": -2.2, "d": -9.0}
    assert letters("abcd", scores, relative=0.95, num_negatives=9)[0] == "cd"


def test_several_positives_compare_with_the_lowest_or_the_highest(letters):
    scores = {"p": 0.9, "r": 0.5, "a": 0.7, "b": 0.6, "c": 0.4}
    assert letters("prabc", scores, positives="pr", relative=0.95)[0] == "c"
    assert letters("prabc", scores, positives="pr", relative=0.95, against="highest")[0] == "abc"


def test_a_positive_that_the_corpus_lacks_is_scored_and_counted(letters):
    scores = {"p": 0.5, "a": 0.9, "b": 0.1}
    found, examples, report = letters("ab", scores, extra="p", relative=0.95)
    assert found == "b"
    assert examples[0].positive_scores == [0.5]
    assert (report.missing_positives, report.short, report.written) == (1, 1, 1)


def test_short_queries_are_kept_dropped_or_an_error(letters):
    scores = {"p": 0.5, "a": 0.9, "b": 0.1}
    assert letters("ab", scores)[0] == "ab"
    found, _, report = letters("ab", scores, on_short="drop")
    assert found is None
    assert (report.short, report.queries, report.written) == (1, 1, 0)
    with pytest.raises(ValueError, match=r"2 negatives for 'question', 3 asked"):
        letters("ab", scores, on_short="error")


@pytest.mark.parametrize("source", ["bm25", "dense", "random"])
def test_known_positives_the_query_and_copies_are_never_negatives(source, encoder, tmp_path):
    texts = [*TEXTS, "THE  fox in snow", "the ｆｏｘ by a river", "fox seen in snow", " ", "the dog in snow", "the cat"]
    examples = [
        Example("fox seen in snow", ["the fox in snow"]),
        Example("fox seen in snow", ["the fox by a river", "nowhere to be found"]),
    ]
    report = MiningReport()
    sources = build_sources({source: 1.0}, encoder=encoder, cache=tmp_path)
    for example in mine(examples, texts, sources, options(num_negatives=40), report=report):
        assert not {text.lower() for text in example.negatives} & {
            "the  fox in snow",
            "the fox in snow",
            "the fox by a river",
        }
        assert not {"fox seen in snow", " ", "the ｆｏｘ by a river"} & set(example.negatives)
        assert len(set(example.negatives)) == len(example.negatives) > 5
    assert report.known_positives > 5
    assert report.missing_positives == 1


def test_a_positive_is_known_by_its_id_too():
    example = Example("fox in snow", ["a text that was edited since"], positive_ids=["d0"])
    report = MiningReport()
    found = next(mine([example], CORPUS, {BM25(): 1.0}, options(num_negatives=40), report=report))
    assert "d1" in found.negative_ids
    assert "d0" not in found.negative_ids
    assert report.missing_positives == 0


def test_near_duplicates_of_positives_and_of_each_other_are_passed_over():
    texts = [
        "a red fox runs through the deep white snow",
        "a red fox runs through the deep white snow!",
        "red fox red fox red fox and its den, a story",
        "red fox red fox red fox and its den, a story.",
        "a fox is red",
    ]
    example = Example("red fox", [texts[0]])
    report = MiningReport()
    found = next(mine([example], texts, {BM25(): 1.0}, options(near_duplicate=0.8), report=report))
    assert len(found.negatives) == 2
    assert "a fox is red" in found.negatives
    assert report.duplicates == 2
    assert len(next(mine([example], texts, {BM25(): 1.0}, options(num_negatives=9))).negatives) == 4


def test_bm25_and_dense_scores_are_those_of_their_models(encoder, tmp_path):
    dense = next(mine(EXAMPLES, CORPUS, {Dense(encoder, tmp_path): 1.0}, options()))
    vectors = encoder.encode([*dense.positives, *dense.negatives], kind="document")
    expected = vectors @ encoder.encode(dense.query, kind="query")
    assert [*dense.positive_scores, *dense.negative_scores] == pytest.approx(expected.tolist(), abs=1e-5)
    assert dense.negative_scores == sorted(dense.negative_scores, reverse=True)
    assert [CORPUS[name] for name in dense.negative_ids] == dense.negatives

    lexical = next(mine(EXAMPLES, TEXTS, {BM25(): 1.0}, options()))
    assert lexical.negative_scores == sorted(lexical.negative_scores, reverse=True)
    assert lexical.positive_scores[0] > lexical.negative_scores[0]
    assert lexical.negative_ids is None
    assert all("fox" in text or "in snow" in text for text in lexical.negatives)
    assert next(mine(EXAMPLES, TEXTS, {Random(): 1.0}, options())).negative_scores is None


def test_the_scores_of_a_mixture_are_of_one_scorer(encoder, tmp_path):
    found = next(mine(EXAMPLES, CORPUS, {BM25(): 0.5, Dense(encoder, tmp_path): 0.5}, options(num_negatives=8)))
    expected = encoder.encode(found.negatives, kind="document") @ encoder.encode(found.query, kind="query")
    assert found.negative_scores == pytest.approx(expected.tolist(), abs=1e-5)


def test_an_instruction_takes_the_place_of_the_query_prompt(encoder, tmp_path):
    example = dataclasses.replace(EXAMPLES[0], prompt="find the animal: ")
    found = next(mine([example], CORPUS, {Dense(encoder, tmp_path): 1.0}, options()))
    plain = tiny.text_encoder(prompts={"query": "find the animal: "})
    expected = plain.encode(found.negatives, kind="document") @ plain.encode(example.query, kind="query")
    assert found.negative_scores == pytest.approx(expected.tolist(), abs=1e-5)
    assert encoder.config.prompts == {"query": "q: "}


def test_weights_hold_over_queries_and_an_empty_source_is_filled_in(tmp_path):
    path = tmp_path / "run.txt"
    path.write_text("".join(f"q{q} Q0 r{n} {n + 1} 0 tag\n" for q in range(400) for n in range(5)))
    corpus = {f"r{n}": f"of the run {n}" for n in range(5)} | {f"b{n}": f"apple number {n}" for n in range(50)}
    examples = [Example("apple", ["not there"], query_id=f"q{q}") for q in range(400)]
    found = list(mine(examples, corpus, {RunFile(path): 0.3, BM25(): 0.7}, options()))
    counts = [sum(name[0] == "r" for name in example.negative_ids) for example in found]
    assert set(counts) == {0, 1}  # a share of 0.9 of one
    assert 0.84 < np.mean(counts) < 0.96
    assert {len(example.negatives) for example in found} == {3}
    # nothing but what the run has
    filled = next(mine(examples[:1], corpus, {RunFile(path): 0.01, BM25(): 0.99}, options(num_negatives=54)))
    assert len(filled.negatives) == 54


def test_a_seed_decides_everything_and_blocks_nothing(encoder, tmp_path, monkeypatch):
    def found(seed):
        sources = {BM25(): 0.4, Dense(encoder, tmp_path): 0.3, Random(): 0.3}
        return [e.negatives for e in mine(EXAMPLES, CORPUS, sources, options(sampling="random", seed=seed))]

    np.random.seed(1)
    first = found(5)
    np.random.seed(2)
    monkeypatch.setattr(mining, "QUERY_BLOCK", 2)
    assert found(5) == first
    assert found(6) != first


def test_random_sampling_draws_from_the_whole_window(tmp_path):
    ranking = [f"d{n}" for n in range(30)]
    examples = [Example("query", ["not there"], query_id="q1")] * 200
    mined = mine(
        examples, CORPUS, {run_file(tmp_path, ranking): 1.0}, options(sampling="random", range_min=5, range_max=15)
    )
    drawn = [name for example in mined for name in example.negative_ids]
    assert set(drawn) == set(ranking[5:15])
    assert max(drawn.count(name) for name in set(drawn)) < 100


def test_examples_stream_and_a_stream_takes_known_positives(encoder):
    taken = []

    def stream():
        for example in EXAMPLES * 200:
            taken.append(example)
            yield example

    mined = mine(stream(), CORPUS, {Random(): 1.0}, options(), known_positives=KnownPositives(EXAMPLES))
    next(mined)
    assert len(taken) == mining.QUERY_BLOCK


def test_run_files_of_both_shapes_in_any_order_and_their_errors(tmp_path):
    trec = tmp_path / "run.trec"
    trec.write_text(
        "q2 Q0 d9 1 9.5 bm25\nq1 Q0 d1 2 3.5 bm25\nq2 Q0 d8 2 9 bm25\nq1 Q0 d0 1 4.5 bm25\nq1 Q0 gone 3 1 bm25\n"
    )
    source = RunFile(trec)
    source.prepare(Corpus(CORPUS))
    rows = source.candidates([Example("x", ["y"], query_id=name) for name in ("q1", "q2", "q3")], 10, [])
    assert [own.tolist() for own in rows] == [[0, 1, -1], [9, 8], []]
    with pytest.raises(ValueError, match="no query_id"):
        source.candidates([Example("x", ["y"])], 10, [])
    trec.write_text("q1 Q0 d0 1 4.5 bm25\nq1 d0 first\n")
    with pytest.raises(ValueError, match=r"run\.trec:2: .q1 d0 first. is no line of a run"):
        RunFile(trec)
    trec.write_text("q1\tother\t1\n")
    source = RunFile(trec)
    source.prepare(Corpus(CORPUS))
    with pytest.raises(ValueError, match="none of the documents of query q1"):
        source.candidates([Example("x", ["y"], query_id="q1")], 10, [])


def test_the_teacher_is_called_across_queries_and_checked():
    calls = []

    def teacher(pairs):
        calls.append(len(pairs))
        return [float(len(document)) for _, document in pairs]

    list(mine(EXAMPLES, CORPUS, {BM25(): 1.0}, options(), teacher=teacher))
    assert len(calls) == 1
    assert calls[0] > 2 * len(EXAMPLES)
    with pytest.raises(ValueError, match=r"shape \(1,\) for \d+ pairs"):
        list(mine(EXAMPLES, CORPUS, {BM25(): 1.0}, options(), teacher=lambda pairs: [1.0]))
    with pytest.raises(ValueError, match=r"not a number for \('fox seen in snow', 'the fox in snow'\)"):
        list(mine(EXAMPLES, CORPUS, {BM25(): 1.0}, options(), teacher=lambda pairs: [float("nan")] * len(pairs)))


def test_encoders_and_cross_encoders_teach(encoder, tmp_path):
    pairs = [("fox", "the fox in snow"), ("dog", "the fox in snow"), ("fox", "the owl at night")]
    expected = [float(encoder.encode(q, kind="query") @ encoder.encode(d, kind="document")) for q, d in pairs]
    assert EncoderTeacher(encoder)(pairs) == pytest.approx(expected, abs=1e-5)

    from sentence_transformers import CrossEncoder
    from transformers import BertConfig, BertForSequenceClassification

    tokenizer = tiny.tokenizer()
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(vocab_size=len(tokenizer), num_labels=1, **sizes)).eval()
    model.classifier.weight.data *= 20
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    teacher = CrossEncoderTeacher(CrossEncoder(str(tmp_path), device="cpu"), activation=torch.nn.Identity())
    with torch.inference_mode():
        inputs = tokenizer([q for q, _ in pairs], [d for _, d in pairs], padding=True, return_tensors="pt")
        expected = model(**inputs).logits[:, 0].tolist()
    assert list(teacher(pairs)) == pytest.approx(expected, abs=1e-5)
    found = next(mine(EXAMPLES, CORPUS, {BM25(): 1.0}, options(max_score=100), teacher=teacher))
    assert found.negative_scores == pytest.approx(list(teacher([(found.query, t) for t in found.negatives])), abs=1e-5)


def test_the_cache_follows_weights_texts_and_kind_and_resumes(encoder, tmp_path, monkeypatch):
    texts = TEXTS
    expected = encoder.encode(texts, kind="document")
    vectors = cached_embeddings(encoder, texts, "document", tmp_path)
    assert isinstance(vectors, np.memmap)
    np.testing.assert_allclose(vectors, expected, atol=1e-6)

    encoded = []
    plain = type(encoder).encode

    def counted(self, texts, **named):
        encoded.append(len(texts))
        return plain(self, texts, **named)

    monkeypatch.setattr(type(encoder), "encode", counted)
    cached_embeddings(encoder, list(texts), "document", tmp_path)
    assert encoded == []  # found
    other = tiny.text_encoder(prompts={"query": "q: "})
    with torch.no_grad():
        other.backbone.embeddings.word_embeddings.weight[5:40] *= -1
    for changed in ((other, texts, "document"), (encoder, [*texts[:-1], "x"], "document"), (encoder, texts, "query")):
        before = len(encoded)
        again = cached_embeddings(*changed, tmp_path)
        assert len(encoded) > before
        assert np.abs(again - expected).max() > 1e-3

    # cut off in the third block: the first two are not encoded again
    monkeypatch.setattr(sys.modules["textcond.negatives.embeddings"], "BLOCK", 10)
    encoded.clear()

    def failing(self, texts, **named):
        if len(encoded) == 2:
            raise KeyboardInterrupt
        return counted(self, texts, **named)

    monkeypatch.setattr(type(encoder), "encode", failing)
    with pytest.raises(KeyboardInterrupt):
        cached_embeddings(encoder, texts, "document", tmp_path / "new")
    monkeypatch.setattr(type(encoder), "encode", counted)
    encoded.clear()
    np.testing.assert_allclose(cached_embeddings(encoder, texts, "document", tmp_path / "new"), expected, atol=1e-5)
    assert encoded == [10]
    assert len(list((tmp_path / "new").iterdir())) == 1


def test_a_corpus_is_a_list_texts_by_id_or_a_beir_folder(tmp_path):
    lines = [{"_id": f"d{n}", "title": "T", "text": f"text é {n}"} for n in range(4)]
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + "\n")
    folder = Corpus(tmp_path)
    by_id = Corpus({f"d{n}": f"T text é {n}" for n in range(4)})
    assert list(folder.texts) == list(by_id.texts) == [folder.texts[row] for row in range(4)]
    assert folder.fingerprint() == by_id.fingerprint()
    assert folder.row_of_id("d2") == 2
    assert folder.row_of_id("2") is None
    assert folder.rows_of_text("t  TEXT é 3") == [3]
    assert Corpus(["a", "b", "A"]).rows_of_text("a") == [0, 2]
    with pytest.raises(ValueError, match="corpus is empty"):
        Corpus([])
    with pytest.raises(ValueError, match="row 1 of the corpus is NoneType"):
        Corpus(["a", None]).fingerprint()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_negatives": 0}, "num_negatives=0"),
        ({"range_min": 5, "range_max": 5}, "range_min=5, range_max=5"),
        ({"sampling": "best"}, "sampling='best': use one of top, random"),
        ({"relative": 95}, "relative=95"),
        ({"near_duplicate": 0}, "near_duplicate=0"),
        ({"on_short": "pad"}, "on_short='pad'"),
    ],
)
def test_options_out_of_range_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        MiningOptions(**changes)


def test_what_does_not_fit_together_is_refused_at_once():
    with pytest.raises(ValueError, match="rules by score, but Random give none"):
        mine(EXAMPLES, CORPUS, {Random(): 1.0}, options(relative=0.95))
    with pytest.raises(ValueError, match="weights"):
        mine(EXAMPLES, CORPUS, {Random(): 0.0})
    with pytest.raises(ValueError, match="'splade'"):
        build_sources({"splade": 1.0})
    with pytest.raises(ValueError, match="'dense' needs an encoder"):
        build_sources({"dense": 1.0})
