import pytest
import torch
import torch.nn.functional as F

from textcond import similarity as module
from textcond.features import Features
from textcond.similarity import (
    dense_scores,
    late_interaction_scores,
    own_similarity,
    similarity,
    sparse_scores,
)


def features(count, tokens, seed, vocabulary=12, dtype=torch.float64):
    """Random features with padding; ids repeat, within a text too; the last text has no token."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.arange(tokens) < torch.randint(1, tokens + 1, (count, 1), generator=generator)
    mask[-1] = False
    vectors = F.normalize(torch.randn(count, tokens, 6, generator=generator, dtype=dtype), dim=-1)
    weights = torch.rand(count, tokens, generator=generator, dtype=dtype)
    return Features(
        dense=F.normalize(torch.randn(count, 8, generator=generator, dtype=dtype), dim=-1),
        token_ids=torch.randint(vocabulary, (count, tokens), generator=generator) * 1000,
        token_mask=mask,
        sparse=weights * mask,
        tokens=vectors * mask[:, :, None],
    )


def lexical(query, i, document, j):
    """The formula, over dictionaries of id to largest weight."""

    def weights(texts, row):
        table = {}
        for place in texts.token_mask[row].nonzero()[:, 0].tolist():
            token, weight = texts.token_ids[row, place].item(), texts.sparse[row, place].item()
            table[token] = max(table.get(token, 0.0), weight)
        return table

    left, right = weights(query, i), weights(document, j)
    return sum(weight * right[token] for token, weight in left.items() if token in right)


def maxsim(query, i, document, j):
    """The formula, over the tokens that are there."""
    left, right = query.tokens[i][query.token_mask[i]], document.tokens[j][document.token_mask[j]]
    if not len(left) or not len(right):
        return 0.0
    return sum(max((a @ b).item() for b in right) for a in left) / len(left)


FORMULAS = {
    "dense": lambda query, i, document, j: (query.dense[i] @ document.dense[j]).item(),
    "sparse": lexical,
    "tokens": maxsim,
}


@pytest.mark.parametrize("kind", FORMULAS)
@pytest.mark.parametrize("block", [1, 2**24])
def test_scores_equal_the_formula_in_float64(kind, block, monkeypatch):
    monkeypatch.setattr(module, "BLOCK_ELEMENTS", block)
    queries, documents = features(4, 5, 0), features(7, 9, 1)
    expected = [[FORMULAS[kind](queries, i, documents, j) for j in range(7)] for i in range(4)]
    torch.testing.assert_close(similarity(queries, documents, kind), torch.tensor(expected, dtype=torch.float64))
    owners = torch.tensor([0, 2, 1, 0, 3, 3, 0])
    own = torch.tensor([expected[owner][j] for j, owner in enumerate(owners.tolist())], dtype=torch.float64)
    torch.testing.assert_close(own_similarity(queries, documents, owners, kind), own)


@pytest.mark.parametrize("function", [dense_scores, sparse_scores, late_interaction_scores])
def test_gradients_equal_finite_differences(function):
    queries, documents = features(3, 4, 0), features(4, 5, 1)
    names = {dense_scores: "dense", sparse_scores: "sparse", late_interaction_scores: "tokens"}

    def scores(left, right):
        return function(
            Features(**{**vars(queries), names[function]: left}),
            Features(**{**vars(documents), names[function]: right}),
        )

    leaves = [getattr(texts, names[function]).detach().requires_grad_() for texts in (queries, documents)]
    assert torch.autograd.gradcheck(scores, leaves)


def test_late_interaction_holds_no_more_pairs_than_a_block(monkeypatch):
    monkeypatch.setattr(module, "BLOCK_ELEMENTS", 4000)
    saved = []
    queries, documents = features(20, 8, 0), features(50, 8, 1)
    for texts in (queries, documents):
        texts.tokens.requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor.numel()) or tensor, lambda x: x):
        late_interaction_scores(queries, documents)
    pairs = int(queries.token_mask.sum()) * documents.token_mask.numel()
    assert pairs > 5 * 4000
    assert max(saved) < 4000


def test_a_missing_head_and_an_unknown_kind_are_named():
    plain = Features(torch.eye(2))
    with pytest.raises(ValueError, match="sparse=True"):
        sparse_scores(plain, plain)
    with pytest.raises(ValueError, match="tokens=True"):
        late_interaction_scores(plain, plain)
    with pytest.raises(ValueError, match=r"'colbert'.*tokens"):
        similarity(plain, plain, "colbert")
