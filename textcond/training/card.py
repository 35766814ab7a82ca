"""The model card of a trained encoder: data, recipe, scores."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from textcond.evaluation import GENERATION, METRICS, Comparison

from .recipe import Recipe

# keys of a recipe whose values are files or folders here, and those whose values may be hub ids as well
FILES = ("path", "corpus", "tasks", "options")
MODELS = ("model", "teacher", "guide", "cross_encoder")


def model_card(recipe: Recipe, comparison: Comparison | None) -> str:
    """Return Markdown with the front matter that the hub and sentence-transformers read."""
    lines = ["---", "library_name: sentence-transformers", "pipeline_tag: sentence-similarity"]
    lines += ["tags: [textcond, sentence-similarity, feature-extraction]", "---", ""]
    values = _public(recipe.to_dict())
    lines += [f"# Fine-tuned from {values['model']}", ""]
    lines += ["Trained by `textcond train`; `textcond.TextEncoder` and sentence-transformers load this folder.", ""]
    lines += ["| stage | data | loss | steps | batch | negatives | learning rate |", "|---|---|---|---|---|---|---|"]
    for number, stage in enumerate(recipe.stages):
        data = ", ".join(data["path"] for data in values["stages"][number]["data"])
        batch = f"{stage.batch_size} queries" if stage.batch_size else f"{stage.batch_tokens} tokens"
        lines.append(
            f"| {stage.name or number} | {data} | `{json.dumps(stage.loss)}` | {stage.steps} | {batch} "
            f"| {stage.negatives} | {stage.learning_rate:g} |"
        )
    if comparison is not None:
        lines += ["", "## Scores", "", "In brackets the difference to the untouched base model, with its paired"]
        lines += ["bootstrap 95% interval; bold where the interval leaves out 0."]
        for metric in comparison.metrics():
            if metric in (recipe.evaluation.metric, METRICS[0], GENERATION):
                lines += ["", comparison.markdown(metric)]
    lines += ["", "## Recipe", "", "```json", json.dumps(values, indent=1), "```", ""]
    return "\n".join(lines)


def _public(value: Any, key: str = "") -> Any:
    """Return a recipe's values with the names of files and folders in place of the paths to them."""
    if isinstance(value, dict):
        return {name: _public(item, key if key in FILES else name) for name, item in value.items()}
    if isinstance(value, list):
        return [_public(item, key) for item in value]
    if not isinstance(value, str) or key not in FILES + MODELS:
        return value
    # of a model the part after "open_clip:local-dir:" may be a path
    kind, colon, rest = value.rpartition(":") if key in MODELS else ("", "", value)
    path = Path(rest).expanduser()
    local = key in FILES or path.is_absolute() or path.exists() or path.suffix == ".safetensors"
    return kind + colon + os.path.basename(os.path.abspath(path)) if local else value
