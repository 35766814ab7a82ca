"""The step: cached and shared gradients are those of the plain joint batch, for every loss and with dropout."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from tiny import text_encoder
from torch import nn

from textcond.data import Example
from textcond.features import Features
from textcond.losses import build_loss
from textcond.training import TextBatch, backward
from textcond.training.step import chunks, encode_chunk, sum_gradients

DIRECTIONS = ["query_to_document", "document_to_query", "query_to_query", "document_to_document"]
LOSSES = {
    "infonce": {"name": "infonce", "temperature": 0.1, "directions": DIRECTIONS},
    "sum": [
        {"name": "infonce", "temperature": 0.1},
        {"name": "listwise_kl", "weight": 0.5, "temperature": 0.1},
    ],
    "m3": {"name": "m3", "temperature": 0.2},
    "matryoshka": {"name": "matryoshka", "dims": [32, 8], "loss": {"name": "infonce", "temperature": 0.1}},
    "learned": {"name": "infonce", "temperature": 0.1, "learn_temperature": True},
    "vectors": [
        {"name": "infonce", "temperature": 0.1, "margin": 0.1},
        {"name": "vector_mse"},
    ],
}
QUERIES = ["red fox", "a", "the green bird sings", "dog", "cold winter night", "two"]
NEGATIVES = [0, 1, 3, 2, 0, 1]


def examples(count=5, prompts=False):
    """Ragged examples: other numbers of explicit negatives, other lengths, an own instruction before every other."""
    made = []
    for row, (query, negatives) in enumerate(zip(QUERIES[:count], NEGATIVES)):
        made.append(
            Example(
                query=query,
                positives=[f"about {query} {'and more ' * row}"],
                negatives=[f"no {query[::-1]} {'x ' * number}{number}" for number in range(negatives)],
                positive_scores=[2.0 + row],
                negative_scores=[float(number) for number in range(negatives)],
                prompt=f"find {row % 3}: " if prompts and row % 2 else None,
            )
        )
    return made


def drawn(count=5, prompts=False):
    return TextBatch.draw(examples(count, prompts), 3, torch.Generator().manual_seed(0))


def encoder(dropout=0.0, heads=False):
    made = text_encoder(prompts={"query": "q: ", "document": "d: "})
    for module in made.modules():
        if isinstance(module, nn.Dropout):
            module.p = dropout
    if heads:
        torch.manual_seed(3)
        made.add_heads(tokens=8)
    return made.train()


def frozen():
    return text_encoder(prompts={"query": "as ", "document": ""}).eval().requires_grad_(False)


def gradients(loss="infonce", *, mini_batch=None, dropout=0.0, count=5, prompts=False):
    """Loss and gradients of a joint batch by name."""
    made, scorer = encoder(dropout, heads=loss == "m3"), build_loss(LOSSES[loss])
    kept = {"teacher": frozen(), "guide": frozen()} if loss == "vectors" else {}
    torch.manual_seed(11)
    value = backward(made, scorer, drawn(count, prompts), Accelerator(cpu=True), mini_batch=mini_batch, **kept)
    named = [*made.named_parameters(), *((f"loss.{name}", tensor) for name, tensor in scorer.named_parameters())]
    found = {name: tensor.grad for name, tensor in named if tensor.grad is not None}
    # a zero gradient and none are the same
    return {name: tensor for name, tensor in found.items() if tensor.abs().max() > 0} | {"value": torch.tensor(value)}


def assert_same(found, expected, tolerance=1e-5):
    total = torch.cat([tensor.flatten() for name, tensor in expected.items() if name != "value"]).norm()
    assert total > 0.01
    for name in found.keys() | expected.keys():
        one, other = (side.get(name, torch.zeros(())) for side in (found, expected))
        # of a gradient that is noise around 0, such as that of a key's bias, the share in the whole
        assert (one - other).norm() <= tolerance * max(other.norm(), 0.1 * total), name


@pytest.mark.parametrize("mini_batch", [1, 3])
@pytest.mark.parametrize("loss", LOSSES)
def test_cached_gradients_are_those_of_the_whole_batch(loss, mini_batch):
    whole = gradients(loss)
    assert_same(gradients(loss, mini_batch=mini_batch), whole)
    if loss == "learned":
        assert whole["loss.log_temperature"].abs() > 1e-3


def test_gradients_are_those_of_autograd_through_everything():
    made, batch = encoder(), drawn()
    joint = batch.joint(made.features(batch.queries, kind="query"), made.features(batch.documents, kind="document"))
    value = build_loss(LOSSES["sum"])(joint)
    value.backward()
    expected = {name: p.grad for name, p in made.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert_same(gradients("sum", mini_batch=2), expected | {"value": value.detach()})


@pytest.mark.parametrize("mini_batch", [1, 3])
def test_with_dropout_the_second_pass_meets_the_masks_of_the_first(mini_batch):
    found = gradients(dropout=0.3, mini_batch=mini_batch)
    made, batch = encoder(0.3), drawn()
    torch.manual_seed(11)
    parts = {
        kind: [encode_chunk(made, chunk) for chunk in chunks(texts, kind, [None] * len(texts), mini_batch)]
        for kind, texts in (("query", batch.queries), ("document", batch.documents))
    }
    value = build_loss(LOSSES["infonce"])(batch.joint(Features.cat(parts["query"]), Features.cat(parts["document"])))
    value.backward()
    expected = {name: p.grad for name, p in made.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert_same(found, expected | {"value": value.detach()})
    with pytest.raises(AssertionError):
        assert_same(found, gradients(mini_batch=mini_batch))


def test_dropout_draws_on_after_a_step():
    torch.manual_seed(11)
    backward(encoder(0.3), build_loss(LOSSES["infonce"]), drawn(), Accelerator(cpu=True), mini_batch=1)
    cached = torch.rand(1)
    torch.manual_seed(11)
    assert cached != torch.rand(1)


@pytest.mark.parametrize("mini_batch", [None, 2])
def test_an_own_prompt_replaces_the_encoders_for_its_query_alone(mini_batch):
    seen = {}

    class Spy(nn.Module):
        def forward(self, batch):
            seen["queries"] = batch.queries.dense
            return (batch.queries.dense.sum() + batch.documents.dense.sum()) * 1.0

    made, batch = encoder(), drawn(prompts=True)
    config = made.config
    backward(made, Spy(), batch, Accelerator(cpu=True), mini_batch=mini_batch)
    assert made.config is config
    with torch.no_grad():
        for row, (query, prompt) in enumerate(zip(batch.queries, batch.prompts)):
            own = made.config.prompts["query"] if prompt is None else prompt
            made.config = replace(config, prompts={"query": own})
            torch.testing.assert_close(seen["queries"][row], made.features([query], kind="query").dense[0])
            made.config = config
    assert_same(gradients(prompts=True, mini_batch=2), gradients(prompts=True))


def test_the_joint_batch_knows_positives_owners_and_all_right_answers():
    rows = examples(3)
    rows[0].positives.append("also right")
    rows[0].positive_scores.append(9.0)
    batch = TextBatch.draw(rows, 2, torch.Generator().manual_seed(1))
    assert batch.owners == [0, 1, 1, 2, 2, 2]
    joint = batch.joint(Features(torch.zeros(3, 2)), Features(torch.zeros(6, 2)))
    assert joint.positives.tolist() == [0, 1, 3]
    for query, place in enumerate(joint.positives):
        assert batch.documents[place] in rows[query].positives
        assert joint.document_keys[place] in joint.known_positives[query]
    assert (joint.known_positives != 0).sum(1).tolist() == [2, 1, 1]
    for document, owner, score in zip(batch.documents, batch.owners, joint.teacher_scores.tolist()):
        texts = [*rows[owner].positives, *rows[owner].negatives]
        scores = [*rows[owner].positive_scores, *rows[owner].negative_scores]
        assert scores[texts.index(document)] == score


def test_negatives_are_drawn_anew_and_a_batch_without_scores_has_none():
    row = Example(query="q", positives=["p"], negatives=[f"n{number}" for number in range(8)])
    draws = {tuple(TextBatch.draw([row], 2, torch.Generator().manual_seed(seed)).documents) for seed in range(8)}
    assert len(draws) > 3
    assert all(len(set(draw)) == 3 and draw[0] == "p" for draw in draws)
    batch = TextBatch.draw([row], 2, torch.Generator())
    assert batch.joint(Features(torch.zeros(1, 2)), Features(torch.zeros(3, 2))).teacher_scores is None


@pytest.mark.parametrize("processes", [1, 2, 3, 5])
def test_shares_hold_every_text_once_and_a_query_with_its_documents(processes):
    batch = drawn()
    shares = batch.shares(processes)
    assert [row for queries, _ in shares for row in queries] == list(range(5))
    assert [row for _, documents in shares for row in documents] == list(range(len(batch.documents)))
    for queries, documents in shares:
        assert len(queries) in (5 // processes, -(-5 // processes))
        assert {batch.owners[row] for row in documents} == set(queries)


def test_with_fewer_queries_than_processes_some_have_none():
    assert [len(queries) for queries, _ in drawn(1).shares(2)] == [0, 1]


def test_a_loss_that_is_not_finite_is_refused_before_any_gradient():
    class NoNumber(nn.Module):
        def forward(self, batch):
            return batch.queries.dense.sum() * float("nan")

    made = encoder()
    with pytest.raises(FloatingPointError, match="the loss is nan"):
        backward(made, NoNumber(), drawn(), Accelerator(cpu=True))
    assert all(parameter.grad is None for parameter in made.parameters())


def test_a_parameter_without_gradient_on_any_process_keeps_none():
    module = nn.ModuleDict({"read": nn.Linear(2, 1, bias=False), "unread": nn.Linear(2, 1, bias=False)})
    module["read"](torch.tensor([1.0, 2.0])).backward()
    sum_gradients(module, Accelerator(cpu=True))
    assert module["read"].weight.grad.tolist() == [[1, 2]]
    assert module["unread"].weight.grad is None


# -- two processes ---------------------------------------------------------------------------------------------------

CASES = [(loss, mini_batch) for loss in LOSSES for mini_batch in (None, 2)]


class Watch(nn.Module):
    """Checks what a loss sees against the texts encoded by one process, in whose order it must be."""

    def __init__(self, made, batch):
        super().__init__()
        with torch.no_grad():
            self.queries = made.features(batch.queries, kind="query")
            self.documents = made.features(batch.documents, kind="document")
        self.batch = batch

    def forward(self, joint):
        expected = self.batch.joint(self.queries, self.documents)
        for name in ("positives", "owners", "query_keys", "document_keys", "known_positives", "teacher_scores"):
            assert torch.equal(getattr(joint, name), getattr(expected, name)), name
        for side in ("queries", "documents"):
            for name, tensor in vars(getattr(expected, side)).items():
                other = getattr(getattr(joint, side), name)
                assert other.shape == tensor.shape, name
                assert other.dtype == tensor.dtype, name
                torch.testing.assert_close(other, tensor, rtol=1e-4, atol=1e-5)
        for row, place in enumerate(joint.positives.tolist()):
            assert joint.owners[place] == row
            assert joint.document_keys[place] == joint.known_positives[row, 0]
        return joint.queries.dense.sum() + joint.documents.dense.sum()


def process(out: Path):
    """What each of the two processes does."""
    made, batch = encoder(heads=True), drawn()
    for mini_batch in (None, 1):
        backward(made, Watch(made, batch), batch, Accelerator(cpu=True), mini_batch=mini_batch)
    for loss, mini_batch in CASES:
        found = gradients(loss, mini_batch=mini_batch, prompts=loss == "sum")
        if Accelerator(cpu=True).is_main_process:
            save_file(found, out / f"{loss}-{mini_batch}.safetensors")
    Accelerator(cpu=True).end_training()


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    out = tmp_path_factory.mktemp("two")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", __file__]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, str(out)], capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-6000:]
    return out


@pytest.mark.slow
@pytest.mark.parametrize(("loss", "mini_batch"), CASES)
def test_two_processes_give_the_gradients_of_one(two_processes, loss, mini_batch):
    assert_same(load_file(two_processes / f"{loss}-{mini_batch}.safetensors"), gradients(loss, prompts=loss == "sum"))


if __name__ == "__main__":
    process(Path(sys.argv[1]))
