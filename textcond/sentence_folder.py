"""The folder layout of sentence-transformers: read in its old and new forms, written in the form that both read."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .folders import check_weights, read_json, write_json

SENTENCE_POOLINGS = {"cls": "cls", "mean": "mean", "max": "max", "lasttoken": "last"}
LEGACY_POOLINGS = {
    "cls": "pooling_mode_cls_token",
    "mean": "pooling_mode_mean_tokens",
    "max": "pooling_mode_max_tokens",
    "mean_sqrt_len_tokens": "pooling_mode_mean_sqrt_len_tokens",
    "weightedmean": "pooling_mode_weightedmean_tokens",
    "lasttoken": "pooling_mode_lasttoken",
}
IGNORED_MODEL_OPTIONS = {"torch_dtype", "dtype", "attn_implementation"}


class Dense(nn.Module):
    """A linear layer and an activation on pooled vectors, `(batch, in)` to `(batch, out)`."""

    def __init__(self, linear: nn.Linear, activation: nn.Module | None = None):
        super().__init__()
        self.linear = linear
        self.activation = activation or nn.Identity()

    def forward(self, vectors: Tensor) -> Tensor:
        """Map `(batch, in)` to `(batch, out)`."""
        return self.activation(self.linear(vectors))


@dataclass
class SentenceFolder:
    """What a sentence-transformers folder says.

    `settings` are the fields of a TextEncoderConfig that the folder fixes; `projection` runs between pooling and
    normalising.
    """

    transformer: Path
    settings: dict[str, Any] = field(default_factory=dict)
    tokenizer_options: dict[str, Any] = field(default_factory=dict)
    projection: nn.Module | None = None


def read_sentence_folder(folder: Path) -> SentenceFolder:
    """Read `modules.json` and what it names.

    Raises:
        ValueError: names the module or the option that a TextEncoder cannot reproduce.
        FileNotFoundError: for a missing file.
    """
    modules = [(str(module["type"]), _inside(folder, module.get("path", ""))) for module in _modules(folder)]
    kinds = [kind.rsplit(".", 1)[-1] for kind, _ in modules]
    for (kind, _), name in zip(modules, kinds):
        if not kind.startswith("sentence_transformers.") or name not in (
            "Transformer",
            "Pooling",
            "Dense",
            "Normalize",
        ):
            raise ValueError(
                f"{folder}: module {kind} is not supported: only Transformer, Pooling, Dense, Normalize are"
            )
    dense = [path for name, (_, path) in zip(kinds, modules) if name == "Dense"]
    normalize = kinds[-1:] == ["Normalize"]
    expected = ["Transformer", "Pooling", *["Dense"] * len(dense), *["Normalize"] * normalize]
    if kinds != expected:
        raise ValueError(
            f"{folder}: modules in the order {', '.join(kinds)} are not supported: "
            "the order must be Transformer, Pooling, any Dense, at most one Normalize"
        )

    found = SentenceFolder(transformer=modules[0][1])
    _read_transformer(found)
    _read_pooling(found, modules[1][1])
    layers = [_read_dense(path) for path in dense]
    found.projection = nn.Sequential(*layers) if len(layers) > 1 else layers[0] if layers else None
    found.settings["normalize"] = normalize

    if (folder / "config_sentence_transformers.json").exists():
        general = read_json(folder / "config_sentence_transformers.json")
        model_type = general.get("model_type", "SentenceTransformer")
        if model_type != "SentenceTransformer":
            raise ValueError(f"{folder}: it is a {model_type}, not a SentenceTransformer: it gives no dense vectors")
        if general.get("truncate_dim"):
            raise ValueError(f"{folder}: truncate_dim={general['truncate_dim']} is not supported: remove it there")
        prompts = {name: prompt for name, prompt in (general.get("prompts") or {}).items() if prompt}
        default = general.get("default_prompt_name")
        found.settings["prompts"] = prompts
        found.settings["default_prompt_name"] = default if default in prompts else None
    return found


def write_sentence_folder(folder: Path, settings: dict[str, Any], projection: nn.Module | None, width: int) -> None:
    """Write the files around a saved backbone and tokenizer, so that sentence-transformers 2 and later load the folder.

    `settings` are the fields of a TextEncoderConfig, with the `max_length` that is in force; `width` is the width of
    the pooled states.
    """
    types = ["Transformer", "Pooling"]
    layers = dense_layers(projection)
    types += ["Dense"] * len(layers) + ["Normalize"] * bool(settings["normalize"])
    paths = ["", *(f"{index}_{kind}" for index, kind in enumerate(types) if index)]
    modules = [
        {"idx": index, "name": str(index), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for index, (kind, path) in enumerate(zip(types, paths))
    ]
    write_json(folder / "modules.json", modules)
    write_json(
        folder / "sentence_bert_config.json",
        {"max_seq_length": settings["max_length"], "do_lower_case": settings["do_lower_case"]},
    )
    write_json(
        folder / "config_sentence_transformers.json",
        {
            "prompts": settings["prompts"],
            "default_prompt_name": settings["default_prompt_name"],
            "similarity_fn_name": "cosine",
        },
    )
    for path in paths[1:]:
        (folder / path).mkdir()

    # of a tokenizer's output, the end-of-text token that CLIP reads is the last attended one
    pooling = "last" if settings["pooling"] == "eos" else settings["pooling"]
    pooling_config: dict[str, Any] = {"word_embedding_dimension": width}
    for theirs, ours in SENTENCE_POOLINGS.items():
        # releases before 2.3 know no last-token pooling and refuse its key
        if theirs != "lasttoken" or ours == pooling:
            pooling_config[LEGACY_POOLINGS[theirs]] = ours == pooling
    if not settings["include_prompt"]:
        pooling_config["include_prompt"] = False
    write_json(folder / paths[1] / "config.json", pooling_config)

    for path, layer in zip(paths[2:], layers):
        activation = type(layer.activation)
        config = {
            "in_features": layer.linear.in_features,
            "out_features": layer.linear.out_features,
            "bias": layer.linear.bias is not None,
            "activation_function": f"{activation.__module__}.{activation.__qualname__}",
        }
        write_json(folder / path / "config.json", config)
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in layer.state_dict().items()}
        save_file(tensors, folder / path / "model.safetensors", metadata={"format": "pt"})


def as_projection(module: nn.Module | None) -> nn.Module | None:
    """Return a projection in the one form that is saved: None, a Dense, or a Sequential of several.

    Raises:
        TypeError: for anything that is not made of linear layers and activations without parameters.
    """
    if isinstance(module, nn.Linear):
        return Dense(module)
    if isinstance(module, nn.Sequential):
        layers = [as_projection(layer) for layer in module]
        if len(layers) > 1 and all(isinstance(layer, Dense) for layer in layers):
            return nn.Sequential(*layers)
    elif module is None or isinstance(module, Dense):
        return module
    raise TypeError(
        f"projection {type(module).__name__} is not supported: pass a Linear, a Dense, or several in Sequential"
    )


def dense_layers(projection: nn.Module | None) -> list[Dense]:
    """Return the layers of what `as_projection` returned."""
    if projection is None:
        return []
    return list(projection) if isinstance(projection, nn.Sequential) else [projection]


def _modules(folder: Path) -> list[dict[str, Any]]:
    modules = read_json(folder / "modules.json")
    if not (isinstance(modules, list) and modules and all(isinstance(m, dict) and "type" in m for m in modules)):
        raise ValueError(f"{folder / 'modules.json'} is not a list of modules with a type: write or download it again")
    return modules


def _inside(folder: Path, path: str) -> Path:
    inside = folder / path
    if not inside.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"{folder / 'modules.json'}: the path {path!r} leads out of the folder")
    return inside


def _read_transformer(found: SentenceFolder) -> None:
    """Read the options of the Transformer module, whose file is named after BERT whatever the model is."""
    files = sorted(found.transformer.glob("sentence_*_config.json"))
    options = read_json(files[0]) if files else {}
    source = files[0] if files else found.transformer

    def unsupported(name: str) -> ValueError:
        return ValueError(f"{source}: {name}={options[name]!r} is not supported by TextEncoder")

    if options.get("transformer_task", "feature-extraction") != "feature-extraction":
        raise unsupported("transformer_task")
    if "modality_config" in options:
        text = options["modality_config"].get("text", {})
        if text.get("method") != "forward" or text.get("method_output_name") != "last_hidden_state":
            raise unsupported("modality_config")
    if options.get("module_output_name", "token_embeddings") != "token_embeddings":
        raise unsupported("module_output_name")
    for name in ("processing_kwargs", "query_length", "document_length", "query_expansion", "config_args"):
        if options.get(name):
            raise unsupported(name)
    if options.get("config_kwargs"):
        raise unsupported("config_kwargs")
    for name in ("model_args", "model_kwargs"):
        if set(options.get(name) or {}) - IGNORED_MODEL_OPTIONS:
            raise unsupported(name)
    found.tokenizer_options = options.get("processor_kwargs") or options.get("tokenizer_args") or {}
    found.settings["max_length"] = options.get("max_seq_length")
    found.settings["do_lower_case"] = bool(options.get("do_lower_case", False))


def _read_pooling(found: SentenceFolder, path: Path) -> None:
    config = read_json(path / "config.json")
    modes = config.get("pooling_mode")
    if modes is None:
        modes = [mode for mode, key in LEGACY_POOLINGS.items() if config.get(key)] or ["mean"]
    modes = [modes] if isinstance(modes, str) else list(modes)
    if len(modes) != 1 or modes[0] not in SENTENCE_POOLINGS:
        raise ValueError(
            f"{path / 'config.json'}: pooling {' + '.join(modes)} is not supported: "
            f"use one of {', '.join(SENTENCE_POOLINGS)}"
        )
    found.settings["pooling"] = SENTENCE_POOLINGS[modes[0]]
    found.settings["include_prompt"] = config.get("include_prompt", True)


def _read_dense(path: Path) -> Dense:
    config = read_json(path / "config.json")
    for name, default in (("module_input_name", "sentence_embedding"), ("module_output_name", "sentence_embedding")):
        if config.get(name, default) not in (default, None):
            raise ValueError(f"{path / 'config.json'}: {name}={config[name]!r} is not supported: only {default!r} is")
    if config.get("use_residual"):
        raise ValueError(f"{path / 'config.json'}: use_residual is not supported by TextEncoder")
    linear = nn.Linear(config["in_features"], config["out_features"], bias=config.get("bias", True))
    dense = Dense(linear, _activation(config.get("activation_function", "torch.nn.modules.activation.Tanh"), path))
    tensors: dict[str, Tensor] = {}
    for file in check_weights(path):
        tensors |= load_file(file)
    wrong = {name: tensor.shape for name, tensor in dense.state_dict().items()} != {
        name: tensor.shape for name, tensor in tensors.items()
    }
    if wrong:
        raise ValueError(
            f"{path}: the weights do not fit the config ({config['in_features']} to {config['out_features']})"
        )
    dense.load_state_dict({name: tensor.to(torch.float32) for name, tensor in tensors.items()})
    return dense


def _activation(name: str, path: Path) -> nn.Module:
    # only classes of torch.nn, so that a config can name nothing else to run
    activation = getattr(nn, name.rsplit(".", 1)[-1], None) if name.startswith("torch.nn.") else None
    if not (isinstance(activation, type) and issubclass(activation, nn.Module)):
        raise ValueError(f"{path / 'config.json'}: activation {name!r} is not supported: only classes of torch.nn are")
    return activation()
