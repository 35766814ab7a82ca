import json

import pytest
import tiny

from textcond.data import Example, read_examples, write_examples
from textcond.negatives import BM25, Corpus, Dense, MiningOptions, Random, mine, mine_file
from textcond.negatives import mining_file as module

CORPUS = {f"d{n}": f"the {animal} number {n}" for n, animal in enumerate(["fox", "dog", "cat", "owl"] * 8)}
EXAMPLES = [
    Example(f"which {text.split()[1]} is {name}", [text], query_id=name.replace("d", "q"), positive_ids=[name])
    for name, text in CORPUS.items()
]
OPTIONS = MiningOptions(num_negatives=3, sampling="random", seed=3)


class Cut(Exception):
    pass


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "QUERY_BLOCK", 5)
    write_examples(EXAMPLES, tmp_path / "in.jsonl", format="flagembedding")
    return tmp_path / "in.jsonl", tmp_path / "out.jsonl"


def sources():
    return {BM25(): 0.5, Random(): 0.5}


def test_a_file_is_mined_as_examples_are(files):
    report = mine_file(*files, CORPUS, sources(), OPTIONS)
    found = list(read_examples(files[1]))
    expected = list(mine(EXAMPLES, CORPUS, sources(), OPTIONS))
    assert [(e.query, e.negatives, e.negative_ids) for e in found] == [
        (e.query, e.negatives, e.negative_ids) for e in expected
    ]
    assert [e.negative_scores for e in found] == [pytest.approx(e.negative_scores) for e in expected]
    assert (report.queries, report.written, report.negatives) == (32, 32, 96)
    assert sorted(path.name for path in files[0].parent.iterdir()) == ["in.jsonl", "out.jsonl"]


def cut_off(files, monkeypatch, blocks, **changes):
    plain, calls = module.Miner.mine, []

    def failing(self, examples, first):
        calls.append(first)
        for example in plain(self, examples, first):
            if len(calls) > blocks and example.query_id.endswith("2"):
                raise Cut
            yield example

    with monkeypatch.context() as patch:
        patch.setattr(module.Miner, "mine", failing)
        with pytest.raises(Cut):
            mine_file(*files, CORPUS, sources(), OPTIONS, **changes)


def test_a_run_that_was_cut_off_goes_on_to_the_same_bytes(files, monkeypatch, tmp_path):
    whole = mine_file(files[0], tmp_path / "whole.jsonl", CORPUS, sources(), OPTIONS)
    files[1].write_text("what was here before\n")
    cut_off(files, monkeypatch, 3)
    assert files[1].read_text() == "what was here before\n"
    state = json.loads((tmp_path / "out.jsonl.mining.json").read_text())
    assert state["done"] == 20
    # what was written after the last note is not believed
    with open(tmp_path / "out.jsonl.mining.jsonl", "a") as file:
        file.write('{"query": "half a li' + "n" * 100_000)
    firsts = []
    plain = module.Miner.mine
    monkeypatch.setattr(module.Miner, "mine", lambda s, block, first: firsts.append(first) or plain(s, block, first))
    assert mine_file(*files, CORPUS, sources(), OPTIONS) == whole
    assert firsts == [20, 25, 30]
    assert files[1].read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl", "whole.jsonl"]


def test_a_resume_with_anything_changed_is_refused_by_name(files, monkeypatch, tmp_path):
    cut_off(files, monkeypatch, 2)

    def refused(what, corpus=CORPUS, chosen=None, options=OPTIONS, **named):
        with pytest.raises(ValueError, match=rf"other {what}: .*delete out\.jsonl\.mining\.json"):
            mine_file(*files, corpus, chosen or sources(), options, **named)

    refused("seed", options=MiningOptions(num_negatives=3, sampling="random", seed=4))
    refused("corpus", corpus=CORPUS | {"d0": "changed"})
    refused("sources", chosen={BM25(): 0.6, Random(): 0.4})
    refused("teacher", teacher=lambda pairs: [0.0] * len(pairs), teacher_name="constant")
    with open(files[0], "a") as file:
        file.write(json.dumps(EXAMPLES[0].to_row()) + "\n")
    refused("examples")


def test_other_weights_are_another_source(files, monkeypatch, tmp_path):
    first, second = tiny.text_encoder(), tiny.text_encoder(normalize=False)
    assert Dense(first, tmp_path).describe() != Dense(second, tmp_path).describe()


def test_what_recurs_later_in_the_file_is_known_as_right(files):
    twice = [Example("fox", ["the fox number 0"]), *EXAMPLES[:8], Example("fox", ["the fox number 4"])]
    write_examples(twice, files[0], format="flagembedding")
    mine_file(*files, CORPUS, {BM25(): 1.0}, MiningOptions(num_negatives=9, near_duplicate=None))
    found = [example for example in read_examples(files[1]) if example.query == "fox"]
    assert [len(example.negatives) for example in found] == [6, 6]
    assert not {"the fox number 0", "the fox number 4"} & {text for example in found for text in example.negatives}


def test_other_formats_come_out_and_a_teacher_needs_a_name(files, tmp_path):
    out, form = tmp_path / "rows.parquet", {"output_format": "parquet", "writer": {"shape": "n-tuple"}}
    mine_file(files[0], out, Corpus(CORPUS), sources(), OPTIONS, **form)
    found = list(read_examples(out))
    assert [len(example.negatives) for example in found] == [3] * 32
    with pytest.raises(ValueError, match="teacher and a teacher_name together"):
        mine_file(*files, CORPUS, sources(), OPTIONS, teacher=lambda pairs: [0.0] * len(pairs))
    with pytest.raises(FileNotFoundError, match=r"no examples .*absent\.jsonl"):
        mine_file(tmp_path / "absent.jsonl", files[1], CORPUS, sources(), OPTIONS)
