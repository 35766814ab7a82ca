"""One step on a joint batch: gradients exact for every loss, in the memory of a mini-batch, on any number of processes.

GradCache (Gao et al., 2021) with one change: the loss sees the features of all processes, and every process computes
the whole of it. So nothing in a loss communicates, and hard negatives of one process cannot be taken for the
positives of another.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from textcond.data import Example
from textcond.encoder import TextEncoder
from textcond.features import ContrastiveBatch, Features


@dataclass
class TextBatch:
    """The texts of a joint batch: q queries, and the n documents drawn for them, in the order of their queries.

    - `prompts`: what each query has before it in place of the encoder's query prompt; None for the encoder's own.
    - `owners`: the query of each document. The first document of a query is its positive.
    - `known_positives`: of each query, all texts that are right for it.
    - `teacher_scores`: of each document, NaN where unknown.
    - `scored`: a loss may count on teacher scores, though none of this batch be known.
    """

    queries: list[str]
    prompts: list[str | None]
    documents: list[str]
    owners: list[int]
    known_positives: list[list[str]]
    teacher_scores: list[float]
    scored: bool = False

    @classmethod
    def draw(cls, examples: Sequence[Example], negatives: int, rng: torch.Generator) -> TextBatch:
        """Draw one positive and up to `negatives` explicit negatives of each example."""
        batch = cls([], [], [], [], [], [])
        for row, example in enumerate(examples):
            positive = int(torch.randint(len(example.positives), (1,), generator=rng))
            chosen = torch.randperm(len(example.negatives), generator=rng)[:negatives].tolist()
            batch.queries.append(example.query)
            batch.prompts.append(example.prompt)
            batch.known_positives.append(example.positives)
            batch.documents += [example.positives[positive], *(example.negatives[index] for index in chosen)]
            batch.owners += [row] * (1 + len(chosen))
            scores = example.positive_scores
            batch.teacher_scores.append(float("nan") if scores is None else scores[positive])
            scores = example.negative_scores
            batch.teacher_scores += [float("nan") if scores is None else scores[index] for index in chosen]
        return batch

    def shares(self, processes: int) -> list[tuple[range, range]]:
        """Return for each process the queries and the documents that it encodes: neighbours, nearly equally many.

        With fewer queries than processes, such as in what is left of an epoch, some have none.
        """
        total = len(self.queries)
        bounds = [total * process // processes for process in range(processes + 1)]
        starts = [bisect_left(self.owners, bound) for bound in bounds]
        return [
            (range(bounds[process], bounds[process + 1]), range(starts[process], starts[process + 1]))
            for process in range(processes)
        ]

    def joint(self, queries: Features, documents: Features) -> ContrastiveBatch:
        """Return what a loss sees, from the features of all queries and all documents."""
        device = queries.dense.device
        owners = torch.tensor(self.owners, device=device)
        keys = [[_key(text) for text in texts] for texts in self.known_positives]
        width = max(map(len, keys))
        scores = torch.tensor(self.teacher_scores, dtype=torch.float32, device=device)
        return ContrastiveBatch(
            queries=queries,
            documents=documents,
            positives=torch.searchsorted(owners, torch.arange(len(self.queries), device=device)),
            owners=owners,
            query_keys=torch.tensor([_key(text) for text in self.queries], device=device),
            document_keys=torch.tensor([_key(text) for text in self.documents], device=device),
            known_positives=torch.tensor([row + [0] * (width - len(row)) for row in keys], device=device),
            teacher_scores=scores if self.scored or not scores.isnan().all() else None,
        )


def _key(text: str) -> int:
    """A 63-bit key of a text, never 0."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1 | 1


@dataclass
class Chunk:
    """Texts that go through the encoder together, and the random state in which they did."""

    texts: list[str]
    kind: str
    prompt: str | None
    rows: list[int]
    state: dict[str, Tensor] | None = None


def written_out(
    encoder: TextEncoder, queries: Sequence[str], prompts: Sequence[str | None]
) -> tuple[Sequence[str], Sequence[str | None]]:
    """Make prompts a part of their queries, where pooling reads both alike: one chunk then holds many prompts."""
    if not encoder.config.include_prompt or not any(prompts):
        return queries, prompts
    usual = encoder.config.prompts.get("query", "")
    texts = [(usual if prompt is None else prompt) + query for query, prompt in zip(queries, prompts)]
    return texts, [""] * len(texts)


def chunks(texts: Sequence[str], kind: str, prompts: Sequence[str | None], size: int | None) -> list[Chunk]:
    """Cut texts into chunks of one prompt each and at most `size` texts."""
    by_prompt: dict[str | None, list[int]] = {}
    for row, prompt in enumerate(prompts):
        by_prompt.setdefault(prompt, []).append(row)
    cut = []
    for prompt, rows in by_prompt.items():
        for start in range(0, len(rows), size or len(rows)):
            part = rows[start : start + (size or len(rows))]
            cut.append(Chunk([texts[row] for row in part], kind, prompt, part))
    return cut


def encode_chunk(encoder: TextEncoder, chunk: Chunk) -> Features:
    """Return the features of a chunk, its own prompt in place of the encoder's."""
    if chunk.prompt is None:
        return encoder.features(chunk.texts, kind=chunk.kind)
    own = encoder.config
    encoder.config = replace(own, prompts={**own.prompts, chunk.kind: chunk.prompt})
    try:
        return encoder.features(chunk.texts, kind=chunk.kind)
    finally:
        encoder.config = own


def backward(
    encoder: TextEncoder,
    loss: nn.Module,
    batch: TextBatch,
    accelerator: Accelerator,
    *,
    mini_batch: int | None = None,
    teacher: TextEncoder | None = None,
    guide: TextEncoder | None = None,
    bf16: bool = False,
) -> float:
    """Add the gradients of a joint batch to the parameters of encoder and loss, and return the loss.

    Each process encodes its share. With more than one chunk it does so without a graph, keeps the random state of each
    chunk, and goes through the chunks again with the gradients of their features. The gradients of the encoder are
    summed over processes; those of the loss are the same on each.

    Args:
        encoder: in training or evaluation mode, as the caller wants its dropout.
        loss: `ContrastiveBatch -> scalar`.
        batch: the same on every process.
        accelerator: knows the processes.
        mini_batch: texts that are in memory with their graph at a time; None for all.
        teacher: a frozen encoder whose vectors are distilled.
        guide: a frozen encoder that tells false negatives.
        bf16: let the encoder multiply in bfloat16; the loss stays in float32.
    """
    shares = batch.shares(accelerator.num_processes)
    own_queries, own_documents = shares[accelerator.process_index]
    # a process without a share encodes a text that `gather` cuts off, so that all take part in every exchange
    own_queries, own_documents = own_queries or range(1), own_documents or range(1)
    queries, prompts = ([texts[row] for row in own_queries] for texts in (batch.queries, batch.prompts))
    documents = [batch.documents[row] for row in own_documents]
    texts, own_prompts = written_out(encoder, queries, prompts)
    sides = [
        chunks(texts, "query", own_prompts, mini_batch),
        chunks(documents, "document", [None] * len(documents), mini_batch),
    ]
    cached = mini_batch is not None and sum(map(len, sides)) > 2
    outputs, leaves = [], []
    for side in sides:
        parts = []
        for chunk in side:
            chunk.state = _random_state(accelerator.device) if cached else None
            with torch.set_grad_enabled(not cached), _precision(bf16, accelerator.device):
                parts.append(encode_chunk(encoder, chunk))
        outputs.append(parts)
        leaves.append(_in_order(parts, side))
    leaves = [side.map(_as_leaf) for side in leaves]
    counts = [[len(share[which]) for share in shares] for which in (0, 1)]
    seen = batch.joint(*(gather(side, count, accelerator) for side, count in zip(leaves, counts)))
    for name, frozen in (("teacher", teacher), ("guide", guide)):
        if frozen is not None:
            vectors = (
                gather(_frozen(frozen, texts, kind, mini_batch), count, accelerator).dense
                for texts, kind, count in zip((queries, documents), ("query", "document"), counts)
            )
            seen = replace(seen, **dict(zip((f"{name}_queries", f"{name}_documents"), vectors)))
    value = loss(seen)
    if not torch.isfinite(value):
        raise FloatingPointError(f"the loss is {float(value.detach())}")
    value.backward()
    for side, parts, leaf in zip(sides, outputs, leaves):
        for chunk, output in zip(side, parts):
            rows = torch.tensor(chunk.rows, device=accelerator.device)
            if cached:
                with _replayed(chunk.state, accelerator.device), _precision(bf16, accelerator.device):
                    output = encode_chunk(encoder, chunk)
            pulled, gradients = [], []
            for name in ("dense", "sparse", "tokens"):
                tensor, source = getattr(output, name), getattr(leaf, name)
                if tensor is None or source.grad is None:
                    continue
                gradient = source.grad[rows]
                pulled.append(tensor)
                gradients.append(gradient if tensor.ndim < 2 or name == "dense" else gradient[:, : tensor.shape[1]])
            if pulled:
                torch.autograd.backward(pulled, gradients)
    if accelerator.num_processes > 1:
        sum_gradients(encoder, accelerator)
    return float(value.detach())


def gather(features: Features, counts: Sequence[int], accelerator: Accelerator) -> Features:
    """Return the features of all processes, in their order; the own ones keep their graph.

    Args:
        features: of this process.
        counts: texts of each process.
        accelerator: knows the processes.
    """
    if accelerator.num_processes == 1:
        return features

    def joined(tensor: Tensor) -> Tensor:
        tensor = tensor[: counts[accelerator.process_index]]
        own = tensor
        if tensor.ndim > 1:
            width = int(accelerator.gather(torch.tensor([tensor.shape[1]], device=tensor.device)).max())
            own = nn.functional.pad(tensor, (0, 0) * (tensor.ndim - 2) + (0, width - tensor.shape[1]))
        bare = nn.functional.pad(own.detach(), (0, 0) * (own.ndim - 1) + (0, max(counts) - len(own)))
        if bare.dtype == torch.bool:
            bare = bare.to(torch.uint8)  # gloo has no bool
        parts = [part[:count].to(own.dtype) for part, count in zip(accelerator.gather(bare).split(max(counts)), counts)]
        parts[accelerator.process_index] = own
        return torch.cat(parts)

    return features.map(joined)


def sum_gradients(module: nn.Module, accelerator: Accelerator) -> None:
    """Sum the gradients of a module over processes, in one transfer.

    A parameter without one on a process counts 0; without one on any it keeps none, so that no weight decay moves it.
    """
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    known = torch.tensor([float(parameter.grad is not None) for parameter in parameters], device=accelerator.device)
    flat = torch.cat(
        [
            known,
            *(
                (torch.zeros_like(parameter) if parameter.grad is None else parameter.grad).flatten().float()
                for parameter in parameters
            ),
        ]
    )
    known, *gradients = accelerator.reduce(flat, "sum").split([len(known), *(part.numel() for part in parameters)])
    for parameter, gradient, count in zip(parameters, gradients, known.tolist()):
        parameter.grad = gradient.view_as(parameter).to(parameter.dtype) if count else None


def _in_order(parts: Sequence[Features], side: Sequence[Chunk]) -> Features:
    joined = Features.cat(parts)
    order = torch.tensor([row for chunk in side for row in chunk.rows], device=joined.dense.device).argsort()
    return joined.map(lambda tensor: tensor.detach()[order])


def _precision(bf16: bool, device: torch.device) -> torch.autocast:
    # not accelerate's: its precision is one for the life of a process
    return torch.autocast(device.type, torch.bfloat16, enabled=bf16)


def _as_leaf(tensor: Tensor) -> Tensor:
    return tensor.requires_grad_() if tensor.is_floating_point() else tensor


@torch.no_grad()
def _frozen(encoder: TextEncoder, texts: Sequence[str], kind: str, size: int | None) -> Features:
    side = chunks(texts, kind, [None] * len(texts), size)
    return _in_order([Features(encode_chunk(encoder, chunk).dense) for chunk in side], side)


def _random_state(device: torch.device) -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


@contextmanager
def _replayed(state: dict[str, Tensor], device: torch.device) -> Iterator[None]:
    """Go back to a random state for a while."""
    now = _random_state(device)
    _set_random_state(state, device)
    try:
        yield
    finally:
        _set_random_state(now, device)


def _set_random_state(state: dict[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
