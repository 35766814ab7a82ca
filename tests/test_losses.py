"""Every loss against a plain float64 loop over its paper's formula, and on what real batches hold."""

import doctest
import importlib
import math
import pkgutil

import pytest
import torch
import torch.nn.functional as F

import textcond.losses
from textcond.features import ContrastiveBatch, Features
from textcond.losses import (
    InfoNCE,
    ListwiseKL,
    M3SelfDistillation,
    MarginMSE,
    Matryoshka,
    Triplet,
    VectorMSE,
    WeightedSum,
    build_loss,
    info_nce,
)
from textcond.losses.masks import not_negatives
from textcond.similarity import similarity

DIRECTIONS = ("query_to_document", "document_to_query", "query_to_query", "document_to_document")
NAN = float("nan")


def texts(count, generator, dtype=torch.float64):
    """Random features of every kind."""

    def unit(*shape):
        return F.normalize(torch.randn(*shape, generator=generator, dtype=dtype), dim=-1)

    mask = torch.arange(5) < torch.randint(1, 6, (count, 1), generator=generator)
    return Features(
        dense=unit(count, 8),
        token_ids=torch.randint(9, (count, 5), generator=generator),
        token_mask=mask,
        sparse=torch.rand(count, 5, generator=generator, dtype=dtype) * mask,
        tokens=unit(count, 5, 4) * mask[:, :, None],
    )


def ragged_batch(seed=0):
    """Six queries with 0 to 3 negatives in any order, things that repeat, and some teacher scores."""
    generator = torch.Generator().manual_seed(seed)
    owners = torch.tensor([4, 0, 1, 1, 2, 5, 0, 3, 0, 4, 4, 5, 5, 0])
    positives = torch.tensor([1, 2, 4, 7, 9, 5])
    query_keys = torch.tensor([1, 2, 1, 3, 4, 5])  # queries 0 and 2 read the same
    document_keys = torch.arange(14) + 100
    document_keys[7] = document_keys[2]  # queries 1 and 3 have one positive
    document_keys[8] = document_keys[0]  # a negative twice
    document_keys[10] = 999  # another known positive of query 5, drawn for query 4
    document_keys[13] = document_keys[1]  # a negative that equals its own positive
    known = torch.zeros(6, 2, dtype=torch.int64)
    known[:, 0] = document_keys[positives]
    known[5, 1] = 999
    known[2, 1] = document_keys[9]  # the positive of query 4 is right for query 2, and not the other way round
    teacher = torch.randn(14, generator=generator, dtype=torch.float64) * 3
    teacher[[6, 5]] = NAN
    return ContrastiveBatch(
        queries=texts(6, generator),
        documents=texts(14, generator),
        positives=positives,
        owners=owners,
        query_keys=query_keys,
        document_keys=document_keys,
        known_positives=known,
        teacher_scores=teacher,
        teacher_queries=torch.randn(6, 8, generator=generator, dtype=torch.float64),
        teacher_documents=torch.randn(14, 8, generator=generator, dtype=torch.float64),
        guide_queries=F.normalize(torch.randn(6, 3, generator=generator, dtype=torch.float64), dim=-1),
        guide_documents=F.normalize(torch.randn(14, 3, generator=generator, dtype=torch.float64), dim=-1),
    )


def leaves(batch):
    """The features' tensors as leaves of a gradient."""
    tensors = []
    for side in (batch.queries, batch.documents):
        for name in ("dense", "sparse", "tokens"):
            if getattr(side, name) is not None:
                setattr(side, name, getattr(side, name).detach().requires_grad_())
                tensors.append(getattr(side, name))
    return tensors


def score(a, i, b, j, kind="dense"):
    """One score by its formula."""
    if kind == "dense":
        return (a.dense[i] @ b.dense[j]).item()
    left = a.token_mask[i].nonzero()[:, 0].tolist()
    right = b.token_mask[j].nonzero()[:, 0].tolist()
    if kind == "tokens":
        return sum(max((a.tokens[i, s] @ b.tokens[j, t]).item() for t in right) for s in left) / len(left)
    total = 0.0
    for token in {a.token_ids[i, s].item() for s in left}:
        mine = max(a.sparse[i, s].item() for s in left if a.token_ids[i, s] == token)
        theirs = [b.sparse[j, t].item() for t in right if b.token_ids[j, t] == token]
        total += mine * max(theirs, default=0.0)
    return total


def reference_candidates(batch, i, direction, in_batch=True, margin=None, strategy="absolute", kind="dense"):
    """(score, row) of what query i is pushed away from in one direction, read from the words of the docstrings."""
    queries, documents = range(len(batch.queries)), range(len(batch.documents))
    keys, positives, owners = batch.document_keys.tolist(), batch.positives.tolist(), batch.owners.tolist()
    query_keys = batch.query_keys.tolist()

    def right(query):
        known = {key for key in batch.known_positives[query].tolist() if key}
        return known | {keys[positives[other]] for other in queries if query_keys[other] == query_keys[query]}

    def guided(a, b):
        if margin is None:
            return True
        mine = (batch.guide_queries[i] @ batch.guide_documents[positives[i]]).item()
        limit = mine - (margin if strategy == "absolute" else margin * abs(mine))
        return (a @ b).item() <= limit

    q, d, p = batch.queries, batch.documents, positives[i]
    found = []
    for j in documents if direction.endswith("document") else queries:
        if direction == "query_to_document":
            wanted = j != p and keys[j] not in right(i) and (in_batch or owners[j] == i)
            vectors, value = (batch.guide_queries[i], batch.guide_documents[j]), lambda j=j: score(q, i, d, j, kind)
        elif direction == "document_to_query":
            wanted = j != i and keys[p] not in right(j)
            vectors, value = (batch.guide_documents[p], batch.guide_queries[j]), lambda j=j: score(q, j, d, p, kind)
        elif direction == "query_to_query":
            alike = keys[p] in right(j) or keys[positives[j]] in right(i)
            wanted = query_keys[i] != query_keys[j] and not alike
            vectors, value = (batch.guide_queries[i], batch.guide_queries[j]), lambda j=j: score(q, i, q, j, kind)
        else:
            wanted = owners[j] != i and keys[j] not in right(i)
            vectors, value = (batch.guide_documents[p], batch.guide_documents[j]), lambda j=j: score(d, p, d, j, kind)
        if wanted and guided(*vectors):
            found.append((value(), j))
    return found


def reference_info_nce(
    batch, temperature, directions, partition="joint", hardness=None, strength=0.0, kind="dense", **mask
):
    total = 0.0
    for i, p in enumerate(batch.positives.tolist()):
        positive = math.exp(score(batch.queries, i, batch.documents, p, kind) / temperature)
        sums = []
        for direction in directions:
            value = positive if partition == "per_direction" or direction in DIRECTIONS[:2] else 0.0
            for found, j in reference_candidates(batch, i, direction, kind=kind, **mask):
                logit = found / temperature
                own = batch.owners[j].item() == i
                chosen = {"in_batch_negatives": not own, "hard_negatives": own, "all_negatives": True, None: False}
                if direction == "query_to_document" and chosen[hardness]:
                    logit += strength * found
                value += math.exp(logit)
            sums.append(value)
        if partition == "joint":
            joint = sum(sums) + (0.0 if set(directions) & set(DIRECTIONS[:2]) else positive)
            total -= math.log(positive / joint)
        else:
            total -= sum(math.log(positive / value) for value in sums) / len(sums)
    return total / len(batch.positives)


# -- InfoNCE ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("margin", [None, (0.1, "absolute"), (0.3, "relative")])
@pytest.mark.parametrize("partition", ["joint", "per_direction"])
@pytest.mark.parametrize(
    "directions",
    [*((direction,) for direction in DIRECTIONS), DIRECTIONS[:2], DIRECTIONS[2:], DIRECTIONS, DIRECTIONS[::-1]],
)
def test_info_nce_equals_its_formula_in_every_direction(directions, partition, margin):
    batch = ragged_batch()
    options = {} if margin is None else {"margin": margin[0], "margin_strategy": margin[1]}
    loss = InfoNCE(0.1, directions=directions, partition=partition, **options)(batch)
    mask = {} if margin is None else {"margin": margin[0], "strategy": margin[1]}
    assert loss.item() == pytest.approx(reference_info_nce(batch, 0.1, directions, partition, **mask), rel=1e-10)


@pytest.mark.parametrize("kind", ["dense", "sparse", "tokens"])
@pytest.mark.parametrize("in_batch", [True, False])
def test_info_nce_equals_its_formula_for_every_score(kind, in_batch):
    batch = ragged_batch()
    loss = InfoNCE(0.1, scores=kind, in_batch=in_batch)(batch)
    expected = reference_info_nce(batch, 0.1, ["query_to_document"], kind=kind, in_batch=in_batch)
    assert loss.item() == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("mode", ["in_batch_negatives", "hard_negatives", "all_negatives"])
def test_hardness_adds_to_the_logits_of_the_chosen_negatives(mode):
    batch = ragged_batch()
    loss = InfoNCE(0.1, hardness_mode=mode, hardness_strength=4.0, directions=DIRECTIONS)(batch)
    expected = reference_info_nce(batch, 0.1, DIRECTIONS, hardness=mode, strength=4.0)
    assert loss.item() == pytest.approx(expected, rel=1e-10)
    assert expected != pytest.approx(reference_info_nce(batch, 0.1, DIRECTIONS), rel=1e-7)


def test_a_learned_temperature_learns_and_stays_within_its_bounds():
    batch = ragged_batch()
    loss = InfoNCE(0.1, learn_temperature=True, temperature_bounds=(0.05, 0.2))
    assert loss(batch).item() == pytest.approx(InfoNCE(0.1)(batch).item(), rel=1e-6)
    loss(batch).backward()
    step = 1e-3
    slope = (InfoNCE(0.1 * math.exp(step))(batch) - InfoNCE(0.1 * math.exp(-step))(batch)).item() / (2 * step)
    assert loss.log_temperature.grad.item() == pytest.approx(slope, rel=1e-3)
    with torch.no_grad():
        loss.log_temperature.fill_(5.0)
    assert loss.temperature.item() == pytest.approx(0.2)
    loss(batch).backward()
    assert loss.log_temperature.item() == pytest.approx(math.log(0.2))
    assert list(InfoNCE(0.1).parameters()) == []


def test_excluded_candidates_get_no_gradient_and_the_positive_always_does():
    anchors, candidates = torch.randn(2, 4), torch.randn(3, 4, requires_grad=True)
    mask = torch.tensor([[True, False, True], [False, True, True]])
    info_nce(anchors @ candidates.T, torch.arange(2), excluded=mask).backward()
    assert candidates.grad[2].abs().sum() == 0
    assert (candidates.grad[:2].abs().sum(1) > 0).all()


def test_a_mask_of_another_shape_is_named():
    with pytest.raises(ValueError, match=r"\(4, 3\).*\(4, 4\)"):
        info_nce(torch.randn(4, 4), torch.arange(4), excluded=torch.zeros(4, 3, dtype=torch.bool))


# -- triplet ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("negatives", ["explicit", "hardest"])
@pytest.mark.parametrize("distance", ["cosine", "euclidean"])
def test_triplet_equals_its_formula(distance, negatives):
    batch = ragged_batch()
    batch.queries.dense, batch.documents.dense = batch.queries.dense * 3, batch.documents.dense * 0.7

    def apart(i, j):
        a, b = batch.queries.dense[i], batch.documents.dense[j]
        return (a - b).norm().item() if distance == "euclidean" else 1 - (a @ b / a.norm() / b.norm()).item()

    losses = []
    for i, p in enumerate(batch.positives.tolist()):
        found = reference_candidates(batch, i, "query_to_document", in_batch=negatives == "hardest")
        rows = [j for _, j in found]
        if negatives == "hardest":
            rows = sorted(rows, key=lambda j: apart(i, j))[:1]
        losses += [max(0.0, apart(i, p) - apart(i, j) + 0.4) for j in rows]
    loss = Triplet(0.4, distance=distance, negatives=negatives)(batch)
    assert loss.item() == pytest.approx(sum(losses) / len(losses), rel=1e-10)
    assert any(losses)


@pytest.mark.parametrize("kind", ["sparse", "tokens"])
def test_triplet_takes_other_scores(kind):
    batch = ragged_batch()
    losses = []
    for i, p in enumerate(batch.positives.tolist()):
        positive = score(batch.queries, i, batch.documents, p, kind)
        found = reference_candidates(batch, i, "query_to_document", in_batch=False, kind=kind)
        losses += [max(0.0, negative - positive + 0.4) for negative, _ in found]
    assert Triplet(0.4, scores=kind)(batch).item() == pytest.approx(sum(losses) / len(losses), rel=1e-10)


@pytest.mark.parametrize("negatives", ["explicit", "hardest"])
def test_a_query_whose_candidates_are_all_right_makes_no_triplet(negatives):
    batch = ragged_batch()
    expected = Triplet(1.0, negatives=negatives)(batch).item()
    lonely = ragged_batch()
    lonely.known_positives = torch.cat([lonely.known_positives, torch.zeros(6, 14, dtype=torch.int64)], 1)
    lonely.known_positives[4, 2:] = lonely.document_keys
    assert 0 < Triplet(1.0, negatives=negatives)(lonely).item() != expected
    lonely.document_keys = torch.full_like(lonely.document_keys, 7)
    assert Triplet(1.0, negatives=negatives)(lonely).item() == 0


# -- distillation ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["dense", "sparse", "tokens"])
def test_listwise_kl_equals_its_formula_over_ragged_lists(kind):
    batch = ragged_batch()
    total, lists = 0.0, 0
    for i in range(6):
        rows = [j for j in range(14) if batch.owners[j] == i and not batch.teacher_scores[j].isnan()]
        if len(rows) < 2:
            continue
        teacher = [math.exp(batch.teacher_scores[j].item() / 1.5) for j in rows]
        student = [math.exp(score(batch.queries, i, batch.documents, j, kind) / 0.3) for j in rows]
        total += sum(
            t / sum(teacher) * math.log((t / sum(teacher)) / (s / sum(student))) for t, s in zip(teacher, student)
        )
        lists += 1
    assert 0 < lists < 6
    loss = ListwiseKL(0.3, teacher_temperature=1.5, scores=kind)(batch)
    assert loss.item() == pytest.approx(total / lists, rel=1e-10)


@pytest.mark.parametrize("kind", ["dense", "sparse", "tokens"])
def test_margin_mse_equals_its_formula_over_ragged_lists(kind):
    batch = ragged_batch()
    errors = []
    for j, i in enumerate(batch.owners.tolist()):
        p = batch.positives[i].item()
        teacher = (batch.teacher_scores[p] - batch.teacher_scores[j]).item()
        if j == p or math.isnan(teacher):
            continue
        scores = [score(batch.queries, i, batch.documents, row, kind) / 0.5 for row in (p, j)]
        errors.append((scores[0] - scores[1] - teacher) ** 2)
    assert len(errors) == 5
    assert MarginMSE(0.5, scores=kind)(batch).item() == pytest.approx(sum(errors) / len(errors), rel=1e-10)


def test_vector_mse_draws_text_and_translation_to_the_teachers_vector_of_the_text():
    batch = ragged_batch()

    def mse(pairs):
        return sum(((a - b) ** 2).mean().item() for a, b in pairs) / len(pairs)

    queries = mse(list(zip(batch.queries.dense, batch.teacher_queries)))
    translations = mse([(batch.documents.dense[p], batch.teacher_queries[i]) for i, p in enumerate(batch.positives)])
    documents = mse(list(zip(batch.documents.dense, batch.teacher_documents)))
    assert VectorMSE()(batch).item() == pytest.approx((queries + translations) / 2, rel=1e-10)
    assert VectorMSE(["documents"])(batch).item() == pytest.approx(translations, rel=1e-10)
    both = VectorMSE(documents_to="documents")(batch).item()
    assert both == pytest.approx((queries + documents) / 2, rel=1e-10)


# -- BGE-M3, Matryoshka, sums ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("in_batch", [True, False])
@pytest.mark.parametrize("taught", [True, False])
def test_m3_equals_its_formula(taught, in_batch):
    batch, total = ragged_batch(), 0.0
    for i, p in enumerate(batch.positives.tolist()):
        rows = [p, *(j for _, j in reference_candidates(batch, i, "query_to_document", in_batch=in_batch))]
        dense, sparse, tokens = (
            [score(batch.queries, i, batch.documents, j, kind) / 0.2 for j in rows]
            for kind in ("dense", "sparse", "tokens")
        )
        ensemble = [d + 0.3 * s + t for d, s, t in zip(dense, sparse, tokens)]

        def log_softmax(values):
            return [value - math.log(sum(map(math.exp, values))) for value in values]

        heads = [log_softmax(values) for values in (dense, sparse, tokens)]
        goal = log_softmax(ensemble)
        pull = -(heads[0][0] + 0.1 * heads[1][0] + heads[2][0] + goal[0]) / 4
        learn = [-sum(math.exp(t) * s for t, s in zip(goal, head)) for head in heads]
        self_distillation = (learn[0] + 0.1 * learn[1] + learn[2]) / 3
        total += (pull + self_distillation) / 2 if taught else pull
    loss = M3SelfDistillation(0.2, self_distillation=taught, in_batch=in_batch)(batch)
    assert loss.item() == pytest.approx(total / 6, rel=1e-10)


def test_the_ensemble_teaches_without_learning():
    batch = ragged_batch()
    tensors = leaves(batch)

    def gradients(loss):
        return torch.autograd.grad(loss(batch), tensors, retain_graph=True)

    whole, pulled = gradients(M3SelfDistillation(0.2)), gradients(M3SelfDistillation(0.2, self_distillation=False))
    with torch.no_grad():
        excluded = not_negatives(batch, "query_to_document")
        kinds = [similarity(batch.queries, batch.documents, kind) / 0.2 for kind in ("dense", "sparse", "tokens")]
        target = (kinds[0] + 0.3 * kinds[1] + kinds[2]).masked_fill(excluded, -torch.inf).softmax(1)
    logits = (batch.queries.dense @ batch.documents.dense.T / 0.2).masked_fill(excluded, -torch.inf)
    taught = -(target * logits.log_softmax(1).masked_fill(excluded, 0)).sum(1).mean() / 3
    expected = torch.autograd.grad(taught, tensors[0])[0]
    torch.testing.assert_close(2 * whole[0] - pulled[0], expected)


@pytest.mark.parametrize("inner", [InfoNCE(0.1), Triplet(0.5), ListwiseKL(0.3), MarginMSE(), M3SelfDistillation(0.2)])
def test_matryoshka_sums_the_loss_of_each_width(inner):
    def cut(dim):
        batch = ragged_batch()
        for side in (batch.queries, batch.documents):
            side.dense = side.dense[:, :dim] / side.dense[:, :dim].norm(dim=1, keepdim=True)
        return inner(batch).item()

    loss = Matryoshka(inner, [8, 4, 2], weights=[1.0, 0.5, 0.25])(ragged_batch())
    assert loss.item() == pytest.approx(cut(8) + 0.5 * cut(4) + 0.25 * cut(2), rel=1e-10)


def test_matryoshka_cuts_the_teachers_vectors_too():
    batch = ragged_batch()
    student, teacher = (F.normalize(x[:, :4], dim=1) for x in (batch.queries.dense, batch.teacher_queries))
    loss = Matryoshka(VectorMSE(["queries"]), [4])(batch)
    assert loss.item() == pytest.approx((student - teacher).square().mean().item(), rel=1e-10)
    student, teacher = (F.normalize(x[:, :4], dim=1) for x in (batch.documents.dense, batch.teacher_documents))
    loss = Matryoshka(VectorMSE(["documents"], documents_to="documents"), [4])(batch)
    assert loss.item() == pytest.approx((student - teacher).square().mean().item(), rel=1e-10)


def test_a_sum_is_weighted_and_trains_the_parameters_of_its_parts():
    batch = ragged_batch()
    loss = WeightedSum([(1.0, InfoNCE(0.1, learn_temperature=True)), (0.2, ListwiseKL(0.3))])
    expected = InfoNCE(0.1)(batch) + 0.2 * ListwiseKL(0.3)(batch)
    assert loss(batch).item() == pytest.approx(expected.item(), rel=1e-6)
    assert len(list(loss.parameters())) == 1


# -- what real batches hold ------------------------------------------------------------------------------------------

ALL = [
    InfoNCE(0.01),
    InfoNCE(0.01, directions=DIRECTIONS, margin=0.0, hardness_mode="all_negatives"),
    InfoNCE(0.01, directions=DIRECTIONS, partition="per_direction", scores="tokens"),
    InfoNCE(0.01, in_batch=False, scores="sparse"),
    Triplet(0.5),
    Triplet(0.5, negatives="hardest"),
    Triplet(5.0, distance="euclidean"),
    Triplet(5.0, distance="euclidean", negatives="hardest"),
    ListwiseKL(),
    MarginMSE(),
    VectorMSE(),
    M3SelfDistillation(),
    Matryoshka(M3SelfDistillation(in_batch=False, margin=0.5), [8, 2]),
]


@pytest.mark.parametrize("loss", ALL, ids=lambda loss: type(loss).__name__)
@pytest.mark.parametrize(
    "batch", ["ragged", "no negatives", "all masked", "duplicates", "one query", "no scores known"]
)
def test_loss_and_gradients_are_finite_whatever_the_batch(loss, batch):
    full, name = ragged_batch(), batch
    if name == "no negatives":
        rows = full.positives
        full = ContrastiveBatch(
            queries=full.queries,
            documents=full.documents.map(lambda x: x[rows]),
            positives=torch.arange(6),
            owners=torch.arange(6),
            query_keys=full.query_keys,
            document_keys=full.document_keys[rows],
            known_positives=full.known_positives,
            teacher_scores=full.teacher_scores[rows],
            teacher_queries=full.teacher_queries,
            teacher_documents=full.teacher_documents[rows],
            guide_queries=full.guide_queries,
            guide_documents=full.guide_documents[rows],
        )
    elif name == "all masked":
        full.query_keys, full.document_keys = torch.ones_like(full.query_keys), torch.full_like(full.document_keys, 7)
    elif name == "duplicates":
        same = full.documents.map(lambda x: x[:1])
        full.queries, full.documents = (same.map(lambda x, n=n: x.expand(n, *x.shape[1:]).clone()) for n in (6, 14))
        full.query_keys, full.document_keys = torch.ones_like(full.query_keys), torch.full_like(full.document_keys, 7)
        full.guide_queries = full.guide_documents[:1].expand(6, -1)
        full.guide_documents = full.guide_documents[:1].expand(14, -1)
    elif name == "one query":
        one = torch.arange(1)
        full = ContrastiveBatch(
            queries=full.queries.map(lambda x: x[:1]),
            documents=full.documents.map(lambda x: x[:1]),
            positives=one,
            owners=one,
            query_keys=one + 1,
            document_keys=one + 9,
            known_positives=one[:, None] + 9,
            teacher_scores=torch.ones(1),
            teacher_queries=full.teacher_queries[:1],
            teacher_documents=full.teacher_documents[:1],
            guide_queries=full.guide_queries[:1],
            guide_documents=full.guide_documents[:1],
        )
    elif name == "no scores known":
        full.teacher_scores = torch.full_like(full.teacher_scores, NAN)
    tensors = leaves(full)
    value = loss(full)
    value.backward()
    assert value.shape == ()
    assert value.isfinite()
    for tensor in tensors:
        assert tensor.grad is None or tensor.grad.isfinite().all()


# without hardness and the teaching ensemble: constants to the gradient, not to differences
SMOOTH = [
    *(loss for loss in ALL if not isinstance(loss, (M3SelfDistillation, Matryoshka)) and loss != ALL[1]),
    InfoNCE(0.05, directions=DIRECTIONS, margin=0.0),
    Matryoshka(M3SelfDistillation(0.2, self_distillation=False), [8, 2]),
]


@pytest.mark.parametrize("loss", SMOOTH, ids=lambda loss: type(loss).__name__)
def test_gradients_equal_finite_differences(loss):
    batch = ragged_batch()
    tensors = leaves(batch)
    gradients = torch.autograd.grad(loss(batch), tensors, allow_unused=True)
    assert any(gradient is not None for gradient in gradients)
    generator = torch.Generator().manual_seed(1)
    for tensor, gradient in zip(tensors, gradients):
        direction = torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)
        values = []
        for step in (1e-6, -2e-6):
            with torch.no_grad():
                tensor += step * direction
                values.append(loss(batch).item())
        with torch.no_grad():
            tensor += 1e-6 * direction
        slope = (values[0] - values[1]) / 2e-6
        expected = 0.0 if gradient is None else (gradient * direction).sum().item()
        assert expected == pytest.approx(slope, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("loss", ALL, ids=lambda loss: type(loss).__name__)
def test_the_order_of_documents_does_not_matter(loss):
    batch = ragged_batch()
    order = torch.randperm(14, generator=torch.Generator().manual_seed(3))
    shuffled = ragged_batch()
    shuffled.documents = batch.documents.map(lambda x: x[order])
    shuffled.positives = order.argsort()[batch.positives]
    for name in ("owners", "document_keys", "teacher_scores", "teacher_documents", "guide_documents"):
        setattr(shuffled, name, getattr(batch, name)[order])
    assert loss(shuffled).item() == pytest.approx(loss(batch).item(), rel=1e-10)


@pytest.mark.parametrize(
    ("loss", "lacks"),
    [
        (InfoNCE(margin=0.1), "guide_queries"),
        (M3SelfDistillation(margin=0.1), "guide_queries"),
        (ListwiseKL(), "teacher_scores"),
        (MarginMSE(), "teacher_scores"),
        (VectorMSE(), "teacher_queries"),
        (VectorMSE(["documents"], documents_to="documents"), "teacher_documents"),
    ],
)
def test_what_the_data_lacks_is_named(loss, lacks):
    batch = ragged_batch()
    batch.teacher_scores = batch.teacher_queries = batch.teacher_documents = None
    batch.guide_queries = batch.guide_documents = None
    with pytest.raises(ValueError, match=lacks):
        loss(batch)


def test_widths_that_do_not_fit_are_named():
    batch = ragged_batch()
    with pytest.raises(ValueError, match=r"dim 16 .*, 8"):
        Matryoshka(InfoNCE(), [16])(batch)
    batch.teacher_queries = batch.teacher_queries[:, :5]
    with pytest.raises(ValueError, match="5 wide, the student's 8"):
        VectorMSE()(batch)


# -- options ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: InfoNCE(0.0), "temperature 0.0"),
        (lambda: InfoNCE(2.0, learn_temperature=True), "2.0 is outside"),
        (lambda: InfoNCE(temperature_bounds=(1.0, 0.1)), "1.0, 0.1"),
        (lambda: InfoNCE(directions=["sideways"]), "sideways"),
        (lambda: InfoNCE(directions=[]), "directions"),
        (lambda: InfoNCE(partition="both"), "both"),
        (lambda: InfoNCE(in_batch=False, directions=DIRECTIONS), "in_batch=False"),
        (lambda: InfoNCE(hardness_mode="soft"), "soft"),
        (lambda: InfoNCE(hardness_mode="all_negatives", hardness_strength=-1.0), "-1.0"),
        (lambda: InfoNCE(margin=-0.1), "-0.1"),
        (lambda: InfoNCE(margin_strategy="ratio"), "ratio"),
        (lambda: InfoNCE(scores="colbert"), "colbert"),
        (lambda: Triplet(distance="manhattan"), "manhattan"),
        (lambda: Triplet(negatives="semi"), "semi"),
        (lambda: Triplet(-1.0), "-1.0"),
        (lambda: Triplet(distance="euclidean", scores="sparse"), "sparse"),
        (lambda: ListwiseKL(0.0), "0.0"),
        (lambda: MarginMSE(-1.0), "-1.0"),
        (lambda: M3SelfDistillation(0.0), "0.0"),
        (lambda: VectorMSE(["teachers"]), "teachers"),
        (lambda: VectorMSE(documents_to="teachers"), "teachers"),
        (lambda: Matryoshka(InfoNCE(), []), r"dims \[\]"),
        (lambda: Matryoshka(InfoNCE(), [4, 2], weights=[1.0]), "1 weights for 2"),
        (lambda: WeightedSum([]), "no losses"),
        (lambda: build_loss({"name": "info_nce"}), "'info_nce'.*infonce"),
        (lambda: build_loss({"name": "infonce", "scale": 20}), "'infonce' has no option 'scale'"),
        (lambda: build_loss({"name": "infonce", "weight": "much"}), "'much'"),
        (lambda: build_loss({"name": "matryoshka", "loss": {"name": "infonce"}}), "needs the option 'dims'"),
        (lambda: build_loss({"temperature": 0.1}), "unknown loss None"),
        (lambda: build_loss([]), "no losses"),
    ],
)
def test_a_bad_option_is_named(make, named):
    with pytest.raises(ValueError, match=named):
        make()


def test_a_recipe_builds_what_python_builds():
    batch = ragged_batch()
    built = build_loss(
        [
            {
                "name": "matryoshka",
                "dims": [8, 4],
                "loss": [{"name": "infonce", "temperature": 0.02}, {"name": "triplet", "weight": 2, "margin": 0.1}],
            },
            {"name": "listwise_kl", "weight": 0.2},
        ]
    )
    inner = WeightedSum([(1.0, InfoNCE(0.02)), (2.0, Triplet(0.1))])
    by_hand = WeightedSum([(1.0, Matryoshka(inner, [8, 4])), (0.2, ListwiseKL())])
    assert built(batch).item() == by_hand(batch).item()
    assert isinstance(build_loss({"name": "m3"}), M3SelfDistillation)


@pytest.mark.parametrize("name", [info.name for info in pkgutil.iter_modules(textcond.losses.__path__)])
def test_examples_of_the_docstrings_run(name):
    module = importlib.import_module(f"textcond.losses.{name}")
    assert doctest.testmod(module).failed == 0
    classes = [
        value for value in vars(module).values() if isinstance(value, type) and value.__module__ == module.__name__
    ]
    assert all(">>>" in value.__doc__ for value in classes)
