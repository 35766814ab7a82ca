"""The model card of a trained encoder: data, recipe, scores."""

from __future__ import annotations

import json

from textcond.evaluation import Comparison

from .recipe import Recipe


def model_card(recipe: Recipe, comparison: Comparison | None) -> str:
    """Return Markdown with the front matter that the hub and sentence-transformers read."""
    lines = ["---", "library_name: sentence-transformers", "pipeline_tag: sentence-similarity"]
    lines += ["tags: [textcond, sentence-similarity, feature-extraction]", "---", ""]
    lines += [f"# Fine-tuned from {recipe.model}", ""]
    lines += ["Trained by `textcond train`; `textcond.TextEncoder` and sentence-transformers load this folder.", ""]
    lines += ["| stage | data | loss | steps | batch | negatives | learning rate |", "|---|---|---|---|---|---|---|"]
    for number, stage in enumerate(recipe.stages):
        data = ", ".join(data.path for data in stage.data)
        batch = f"{stage.batch_size} queries" if stage.batch_size else f"{stage.batch_tokens} tokens"
        lines.append(
            f"| {stage.name or number} | {data} | `{json.dumps(stage.loss)}` | {stage.steps} | {batch} "
            f"| {stage.negatives} | {stage.learning_rate:g} |"
        )
    if comparison is not None:
        metric = recipe.evaluation.metric
        lines += ["", f"## {metric}", "", "In brackets the difference to the untouched base model, with its paired"]
        lines += ["bootstrap 95% interval; bold where the interval leaves out 0.", "", comparison.markdown(metric)]
    lines += ["", "## Recipe", "", "```json", json.dumps(recipe.to_dict(), indent=1), "```", ""]
    return "\n".join(lines)
