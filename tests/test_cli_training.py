"""`textcond mine`, `train`, `eval` and `synthesize` as a person runs them."""

import json
import os

import pytest
from tiny import text_encoder

from textcond.apps.cli import main

WORDS = ["fox", "owl", "ship", "tree", "apple", "river", "stone", "cloud"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny encoder, a BEIR task and pairs."""
    root = tmp_path_factory.mktemp("train")
    text_encoder("bert").save_pretrained(root / "base")
    task = root / "task"
    (task / "qrels").mkdir(parents=True)
    documents = [{"_id": f"d{n}", "text": f"{word} picture {n}"} for n, word in enumerate(WORDS)]
    queries = [{"_id": f"q{n}", "text": f"the {word}"} for n, word in enumerate(WORDS)]
    pairs = [{"query": q["text"], "pos": [d["text"]]} for q, d in zip(queries, documents)]
    for name, rows in (("corpus.jsonl", documents), ("queries.jsonl", queries), ("pairs.jsonl", pairs)):
        (task / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    (task / "qrels" / "test.tsv").write_text(
        "query-id\tcorpus-id\tscore\n" + "".join(f"q{n}\td{n}\t1\n" for n in range(len(WORDS)))
    )
    (root / "recipe.toml").write_text(
        'model = "base"\n[evaluation]\ntasks = ["task"]\n'
        '[[stages]]\nsteps = 3\nbatch_size = 4\nnegatives = 1\ndata = [{path = "mined.jsonl"}]\n'
    )
    return root


@pytest.fixture
def run(capsys, monkeypatch, folder):
    """Run the command in the folder; give back its exit code, standard output and standard error."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(os, "environ", dict(os.environ))

    def run(*arguments):
        with pytest.raises(SystemExit) as end:
            main(list(arguments))
        return (end.value.code or 0, *capsys.readouterr())

    return run


def test_pairs_become_a_better_known_encoder_in_three_commands(run, folder):
    code, _, said = run("mine", "task/pairs.jsonl", "-c", "task", "-o", "mined.jsonl", "--source", "random", "-n", "2")
    assert code == 0, said
    rows = [json.loads(line) for line in (folder / "mined.jsonl").read_text().splitlines()]
    assert len(rows) == len(WORDS)
    assert all(len(row["neg"]) == 2 and not set(row["neg"]) & set(row["pos"]) for row in rows)

    code, out, said = run("train", "recipe.toml", "--out", "out", "--set", "stages.0.steps=2")
    assert code == 0, said
    assert out.strip() == "out/encoder"
    steps = [json.loads(line) for line in (folder / "out" / "log.jsonl").read_text().splitlines()]
    assert sum("loss" in row for row in steps) == 2

    code, out, said = run("eval", "retrieval", "-e", "base", "-e", "out/encoder", "-t", "task")
    assert code == 0, said
    assert "base (base)" in out
    assert "| encoder |" in out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["train", "nothing", "--out", "x"], "simlm"),
        (["train", "recipe.toml", "--out", "x", "--set", "stages.0.stepz=2"], "stepz"),
        (["mine", "task/pairs.jsonl", "-c", "task", "-o", "m.jsonl", "--source", "bm52"], "bm52"),
        (["mine", "missing.jsonl", "-c", "task", "-o", "m.jsonl"], "missing.jsonl"),
        (["mine", "task/pairs.jsonl", "-c", "task", "-o", "m.jsonl", "--source", "bm25=x"], "bm25=x"),
        (["eval", "retrieval", "-e", "base", "-t", "nowhere"], "nowhere"),
        (["synthesize", "-o", "t.jsonl", "-m", "x", "--base-url", "ftp://there"], "ftp://there"),
    ],
)
def test_bad_input_is_one_line_that_names_it(run, folder, arguments, said):
    code, _, err = run(*arguments)
    assert code == 1
    assert said in err
    assert err.count("textcond: error: ") == 1
    assert not (folder / "m.jsonl").exists()
