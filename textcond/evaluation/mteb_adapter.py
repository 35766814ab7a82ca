"""TextEncoders in mteb, and retrieval folders as mteb tasks that need no network."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from textcond.encoder import TextEncoder

from .retrieval import RetrievalTask

if TYPE_CHECKING:
    import mteb


def evaluate_mteb(
    encoder: TextEncoder | str | Path,
    tasks: Sequence[str | RetrievalTask],
    *,
    out: str | Path | None = None,
    batch_tokens: int = 4096,
    show_progress_bar: bool = False,
) -> dict[str, dict[str, float]]:
    """Run mteb tasks (Muennighoff et al., 2023); what `textcond eval mteb` runs. Needs the extra `mteb`.

    Prompts are the encoder's "query" and "document" prompts where mteb says which side a text is on, else its default.

    Args:
        encoder: an encoder, or what `TextEncoder.from_pretrained` takes.
        tasks: names that mteb knows, whose data it downloads; BEIR folders; or `RetrievalTask`s.
        out: folder for mteb's result files, from which a later run takes tasks that are done; None keeps none.
        batch_tokens: tokens in a batch of `encode`.
        show_progress_bar: show mteb's progress.

    Returns:
        task -> metric -> mean over mteb's subsets of the first split, with "main_score" among the metrics.

    Raises:
        ModuleNotFoundError: without mteb.
        ValueError: for no tasks, or a name that is neither a folder nor one of mteb's.
    """
    try:
        import mteb
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("mteb is not installed: run `pip install textcond[mteb]`") from error

    if not tasks:
        raise ValueError("no mteb tasks are given: pass names or BEIR folders")
    chosen = [_task(task) for task in tasks]
    encoder = encoder if isinstance(encoder, TextEncoder) else TextEncoder.from_pretrained(encoder)
    result = mteb.evaluate(
        mteb_encoder(encoder),
        chosen,
        encode_kwargs={"batch_tokens": batch_tokens, "show_progress_bar": show_progress_bar},
        cache=None if out is None else mteb.ResultCache(Path(out)),
        show_progress_bar=show_progress_bar,
        co2_tracker=False,
    )
    return {task.task_name: _means(next(iter(task.scores.values()))) for task in result.task_results}


def mteb_encoder(encoder: TextEncoder) -> Any:
    """Return an encoder in the form that `mteb.evaluate` takes."""
    from mteb.models import ModelMeta
    from mteb.models.abs_encoder import AbsEncoder
    from mteb.models.model_meta import ScoringFunction
    from mteb.types import PromptType

    class MtebEncoder(AbsEncoder):
        """A TextEncoder as mteb sees it."""

        # mteb keys its result files by name and revision: other weights are another revision
        mteb_model_meta = ModelMeta.create_empty(
            {
                "name": f"textcond/{Path(encoder.name_or_path or 'encoder').name}",
                "revision": encoder.weights_hash()[:16],
                "embed_dim": encoder.dim,
                "max_tokens": encoder.max_length,
                "similarity_fn_name": ScoringFunction.COSINE,
                "framework": ["PyTorch"],
            }
        )

        def encode(self, inputs, *, task_metadata, hf_split, hf_subset, prompt_type=None, **options):
            kinds = {PromptType.query: "query", PromptType.document: "document"}
            texts = (text for batch in inputs for text in batch["text"])
            return encoder.encode(texts, kind=kinds.get(prompt_type), batch_tokens=options["batch_tokens"])

    return MtebEncoder()


def mteb_task(task: RetrievalTask) -> mteb.AbsTask:
    """Return a retrieval task as one of mteb's, its data already there."""
    from datasets import Dataset
    from mteb import TaskMetadata
    from mteb.abstasks import AbsTaskRetrieval
    from mteb.abstasks.retrieval_dataset_loaders import RetrievalSplitData

    class LocalTask(AbsTaskRetrieval):
        """A retrieval task that mteb did not bring."""

        metadata = TaskMetadata(
            name=task.name,
            description=f"The local retrieval task {task.name}.",
            dataset={"path": "local/none", "revision": "v1"},
            type="Retrieval",
            category="t2t",
            eval_splits=["test"],
            eval_langs=["mul-Zyyy"],
            main_score="ndcg_at_10",
        )

        def load_data(self, num_proc=None, **kwargs):
            def table(texts):
                return Dataset.from_dict({"id": list(texts), "text": list(texts.values())})

            split = RetrievalSplitData(
                queries=table(task.queries), corpus=table(task.corpus), relevant_docs=task.qrels, top_ranked=None
            )
            self.dataset = {"default": {"test": split}}
            self.data_loaded = True

    return LocalTask()


def _task(task: str | Path | RetrievalTask) -> mteb.AbsTask:
    import mteb

    if isinstance(task, RetrievalTask):
        return mteb_task(task)
    if Path(task).is_dir():
        return mteb_task(RetrievalTask.load(task))
    try:
        return mteb.get_task(str(task))
    except KeyError as error:
        raise ValueError(f"{str(task)!r} is neither a BEIR folder nor a task of mteb: check the name") from error


def _means(subsets: list[dict[str, Any]]) -> dict[str, float]:
    """Return the means over subsets of what is a number in all of them."""
    numbers = [name for name, value in subsets[0].items() if isinstance(value, int | float)]
    return {name: float(sum(subset[name] for subset in subsets) / len(subsets)) for name in numbers}
