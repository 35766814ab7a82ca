"""The same embeddings through sentence-transformers' own loss modules."""

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from textcond.features import ContrastiveBatch, Features
from textcond.losses import InfoNCE, ListwiseKL, MarginMSE, Matryoshka, Triplet, VectorMSE

peers = pytest.importorskip("sentence_transformers.sentence_transformer.losses")
ST_DIRECTIONS = {
    "query_to_document": "query_to_doc",
    "document_to_query": "doc_to_query",
    "query_to_query": "query_to_query",
    "document_to_document": "doc_to_doc",
}


@dataclass
class Columns:
    """One tensor a column, as sentence-transformers takes them: queries, positives, negatives."""

    student: list[torch.Tensor]
    guide: list[torch.Tensor]
    teacher: torch.Tensor

    def batch(self) -> ContrastiveBatch:
        count, ways = self.teacher.shape
        rows = torch.arange(count)
        keys = torch.arange(count * ways) + 1
        return ContrastiveBatch(
            queries=Features(self.student[0]),
            documents=Features(torch.cat(self.student[1:])),
            positives=rows,
            owners=rows.repeat(ways),
            query_keys=rows + 1,
            document_keys=keys,
            known_positives=keys[:count, None],
            teacher_scores=self.teacher.T.flatten(),
            guide_queries=self.guide[0],
            guide_documents=torch.cat(self.guide[1:]),
        )


def columns(negatives, count=7, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def vectors(width):
        return [
            F.normalize(torch.randn(count, width, generator=generator, dtype=torch.float64), dim=1)
            for _ in range(negatives + 2)
        ]

    teacher = torch.randn(count, negatives + 1, generator=generator, dtype=torch.float64)
    return Columns([x.requires_grad_() for x in vectors(16)], vectors(3), teacher)


def assert_same(ours, theirs, data, factor=1.0):
    """Equal values and equal gradients on every column."""
    torch.testing.assert_close(ours, theirs * factor)
    mine = torch.autograd.grad(ours, data.student, retain_graph=True, allow_unused=True, materialize_grads=True)
    peer = torch.autograd.grad(theirs * factor, data.student, allow_unused=True, materialize_grads=True)
    for a, b in zip(mine, peer):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("negatives", [0, 1, 3])
@pytest.mark.parametrize("hardness", [None, "in_batch_negatives", "hard_negatives", "all_negatives"])
@pytest.mark.parametrize(
    ("directions", "partition"),
    [
        (["query_to_document"], "joint"),
        (["query_to_document", "document_to_query"], "joint"),
        (["query_to_document", "document_to_query"], "per_direction"),
        (["query_to_document", "query_to_query"], "joint"),
        (["query_to_document", "document_to_document"], "joint"),
        (list(ST_DIRECTIONS), "joint"),
    ],
)
def test_info_nce_equals_multiple_negatives_ranking(directions, partition, hardness, negatives):
    data = columns(negatives)
    peer = peers.MultipleNegativesRankingLoss(
        model=None,
        scale=20.0,
        similarity_fct=lambda a, b: a @ b.T,
        directions=tuple(ST_DIRECTIONS[direction] for direction in directions),
        partition_mode=partition,
        hardness_mode=hardness,
        hardness_strength=5.0 if hardness else 0.0,
    )
    ours = InfoNCE(0.05, directions=directions, partition=partition, hardness_mode=hardness, hardness_strength=5.0)
    assert_same(ours(data.batch()), peer.compute_loss_from_embeddings(data.student, None), data)


def test_both_take_the_cosine_for_unit_vectors():
    data = columns(2)
    peer = peers.MultipleNegativesRankingLoss(model=None, scale=50.0)
    torch.testing.assert_close(InfoNCE(0.02)(data.batch()), peer.compute_loss_from_embeddings(data.student, None))


@pytest.mark.parametrize(("margin", "strategy"), [(0.0, "absolute"), (0.2, "absolute"), (0.3, "relative")])
@pytest.mark.parametrize(
    ("negatives", "anchors", "positives"),
    [(0, False, False), (0, True, True), (1, True, False), (3, False, False), (3, True, False)],
)
def test_the_guide_margin_equals_cached_gist(negatives, anchors, positives, margin, strategy):
    data = columns(negatives)
    peer = peers.CachedGISTEmbedLoss.__new__(peers.CachedGISTEmbedLoss)
    nn.Module.__init__(peer)
    peer.similarity_fct, peer.temperature, peer.cross_entropy_loss = (
        nn.CosineSimilarity(-1),
        0.01,
        nn.CrossEntropyLoss(),
    )
    peer.margin, peer.margin_strategy, peer.mini_batch_size = margin, strategy, 4
    peer.contrast_anchors, peer.contrast_positives = anchors, positives
    peer.show_progress_bar = peer.gather_across_devices = False
    theirs = peer.calculate_loss([[x] for x in data.student], [[x] for x in data.guide])
    directions = ["query_to_document"] + ["query_to_query"] * anchors + ["document_to_document"] * positives
    guided = InfoNCE(0.01, directions=directions, margin=margin, margin_strategy=strategy)(data.batch())
    torch.testing.assert_close(guided, theirs)
    assert not torch.allclose(guided, InfoNCE(0.01, directions=directions)(data.batch()))


@pytest.mark.parametrize("distance", ["cosine", "euclidean"])
def test_triplet_equals_triplet(distance):
    data = columns(1)
    metric = getattr(peers.TripletDistanceMetric, distance.upper())
    peer = peers.TripletLoss(model=None, distance_metric=metric, triplet_margin=0.3)
    theirs = peer.compute_loss_from_embeddings(data.student, None)
    assert theirs > 0
    assert_same(Triplet(0.3, distance=distance)(data.batch()), theirs, data)


@pytest.mark.parametrize("negatives", [1, 3])
def test_margin_mse_equals_margin_mse(negatives):
    data = columns(negatives)
    theirs = peers.MarginMSELoss(model=None).compute_loss_from_embeddings(data.student, data.teacher)
    assert_same(MarginMSE()(data.batch()), theirs, data)


@pytest.mark.parametrize("negatives", [1, 3])
def test_listwise_kl_equals_distill_kl_div_less_its_squared_temperature(negatives):
    data = columns(negatives)
    peer = peers.DistillKLDivLoss(model=None, student_temperature=0.2, teacher_temperature=0.5)
    theirs = peer.compute_loss_from_embeddings(data.student, data.teacher)
    assert_same(ListwiseKL(0.2, teacher_temperature=0.5)(data.batch()), theirs, data, factor=1 / 0.2**2)


def test_vector_mse_equals_mse():
    data = columns(0)
    target = torch.randn(7, 16, dtype=torch.float64)
    theirs = peers.MSELoss(model=None).compute_loss_from_embeddings(data.student, [target, target])
    batch = data.batch()
    batch.teacher_queries = target
    assert_same(VectorMSE()(batch), theirs, data)


def test_matryoshka_equals_matryoshka():
    data = columns(2)

    class Columnwise(nn.Module):
        def forward(self, features):
            return {"sentence_embedding": features["vectors"]}

        def get_embedding_dimension(self):
            return 16

    inner = peers.MultipleNegativesRankingLoss(model=Columnwise(), scale=20.0)
    peer = peers.MatryoshkaLoss(inner.model, inner, [16, 8, 4], [1.0, 0.5, 0.25])
    theirs = peer([{"vectors": vectors} for vectors in data.student], None)
    ours = Matryoshka(InfoNCE(0.05), [16, 8, 4], [1.0, 0.5, 0.25])(data.batch())
    assert_same(ours, theirs, data)
