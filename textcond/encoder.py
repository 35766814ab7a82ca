"""The retrieval face of a text encoder: texts in, one vector each out."""

import copy
import dataclasses
import hashlib
import json
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from huggingface_hub import HfApi
from tokenizers import normalizers
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForTextEncoding,
    AutoTokenizer,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_TEXT_ENCODING_MAPPING

from .features import Features
from .folders import atomic_folder, check_weights, model_folder, read_json, write_json
from .heads import load_heads, new_heads, save_heads
from .onednn import OneDnnLinear
from .open_clip_import import load_open_clip_text
from .packing import TURN, can_pack, packed_states
from .pooling import POOLINGS, pool
from .sentence_folder import as_projection, dense_layers, read_sentence_folder, write_sentence_folder

OPEN_CLIP = "open_clip:"
WINDOW = 16_384  # texts that encode sorts by length at a time, and all that it holds of a generator
BATCH_TOKENS = 4096  # tokens that go through the backbone together
PACKED_BATCH_TOKENS = 2048  # few enough that the states of a layer stay in a CPU's cache
MODEL_FOLDER_OWNS = ("*.json", "*.safetensors", "*.bin", "*.txt", "*.model", "*.jinja", "[0-9]_*", "[0-9][0-9]_*")
TOKENIZER_FILES = ("tokenizer*.json", "vocab.*", "*.model")


@dataclass
class TextEncoderConfig:
    """How texts become vectors around the backbone; saved as JSON.

    - `pooling`: one of `textcond.pooling.POOLINGS`.
    - `normalize`: give vectors unit length.
    - `prompts`: what is put before a text, by kind: `{"query": "query: ", "document": "passage: "}`.
    - `default_prompt_name`: the prompt of texts that are encoded without a kind.
    - `include_prompt`: let the prompt's tokens take part in pooling (INSTRUCTOR models do not).
    - `max_length`: tokens that are kept of a text; None leaves it to the tokenizer and the backbone.
    - `do_lower_case`: lower-case texts before the tokenizer's own rules.

    Raises:
        ValueError: for an unknown pooling, a max_length below 1, or a default prompt that is not there.
    """

    pooling: str = "mean"
    normalize: bool = True
    prompts: dict[str, str] = field(default_factory=dict)
    default_prompt_name: str | None = None
    include_prompt: bool = True
    max_length: int | None = None
    do_lower_case: bool = False

    def __post_init__(self):
        if self.pooling not in POOLINGS:
            raise ValueError(f"unknown pooling {self.pooling!r}: use one of {', '.join(POOLINGS)}")
        if self.max_length is not None and self.max_length < 1:
            raise ValueError(f"max_length={self.max_length}: give a number of tokens, or None")
        if self.default_prompt_name is not None and self.default_prompt_name not in self.prompts:
            raise ValueError(
                f"default_prompt_name={self.default_prompt_name!r} is not among the prompts {sorted(self.prompts)}"
            )

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "TextEncoderConfig":
        """Return the config that `to_dict` wrote.

        Raises:
            ValueError: names a key that is not a field.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise ValueError(f"unknown text encoder option {', '.join(unknown)}: the options are {', '.join(known)}")
        return cls(**values)


class TextEncoderOutput(NamedTuple):
    """`token_states` (batch, tokens, backbone width) and the float32 `vectors` (batch, dim) made from them."""

    token_states: Tensor
    vectors: Tensor


class TextEncoder(nn.Module):
    """A backbone, its tokenizer, and what turns token states into one vector: pooling, projection, normalising.

    Any transformers model that gives `last_hidden_state` for `input_ids` can be the backbone: an encoder, the encoder
    of T5, CLIP's text tower, or a decoder without its language-model head.

    Args:
        backbone: the model; shared, not copied. Of a CLIPTextModelWithProjection, its text model, and its projection
            unless another is given.
        tokenizer: its tokenizer.
        config: pooling, normalising, prompts and length.
        projection: None, a Linear, or what a sentence-transformers folder holds as Dense.

    Raises:
        ValueError: if widths or lengths of the parts do not fit.
        TypeError: for a projection that a sentence-transformers folder could not hold.
    """

    def __init__(
        self,
        backbone: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        config: TextEncoderConfig | None = None,
        projection: nn.Module | None = None,
    ):
        super().__init__()
        if isinstance(backbone, CLIPTextModelWithProjection):
            projection = backbone.text_projection if projection is None else projection
            backbone = backbone.text_model
        self.backbone = backbone
        self.tokenizer = tokenizer
        self.config = config or TextEncoderConfig()
        self.projection = as_projection(projection)
        self.heads = nn.ModuleDict()
        self.name_or_path: str | None = None
        if self.projection is not None:
            expected = dense_layers(self.projection)[0].linear.in_features
            if expected != backbone.config.hidden_size:
                raise ValueError(
                    f"the projection reads {expected}-wide vectors, the backbone gives {backbone.config.hidden_size}"
                )
        special = tokenizer.num_special_tokens_to_add()
        if self.max_length is not None and self.max_length <= special:
            raise ValueError(
                f"max_length={self.max_length} leaves no room for a text beside {special} special tokens: raise it"
            )
        if self.config.pooling == "eos" and tokenizer.eos_token_id is None:
            raise ValueError("eos pooling needs a tokenizer with an eos token: use 'last'")
        if self.config.do_lower_case:
            _lower_case(tokenizer)

    @property
    def dim(self) -> int:
        """Width of the vectors."""
        if self.projection is None:
            return self.backbone.config.hidden_size
        return dense_layers(self.projection)[-1].linear.out_features

    @property
    def device(self) -> torch.device:
        """Where the backbone is."""
        return next(self.backbone.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """What the backbone computes in; vectors are float32 whatever it is."""
        return next(self.backbone.parameters()).dtype

    @property
    def max_length(self) -> int | None:
        """Tokens that are kept of a text, special tokens included; None means that nothing limits it.

        It is the config's value, else the tokenizer's, and never more than the backbone has positions for.
        """
        stated = self.config.max_length
        if stated is None and self.tokenizer.model_max_length < 1_000_000:  # tokenizers write "unlimited" as 1e30
            stated = self.tokenizer.model_max_length
        limits = [limit for limit in (stated, position_capacity(self.backbone)) if limit is not None]
        return min(limits) if limits else None

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, pooling_mask: Tensor | None = None
    ) -> TextEncoderOutput:
        """Encode token ids `(batch, tokens)`.

        Args:
            input_ids: `(batch, tokens)`.
            attention_mask: `(batch, tokens)`, 1 for a token that is there; None means all are.
            pooling_mask: `(batch, tokens)`, 1 for a token that pooling reads; None means those attended to.
        """
        if pooling_mask is None:
            pooling_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        with OneDnnLinear():
            states = self.backbone(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
            return TextEncoderOutput(states, self._vectors(states, input_ids, pooling_mask))

    def _vectors(self, states: Tensor, input_ids: Tensor, pooling_mask: Tensor) -> Tensor:
        vectors = pool(
            states,
            pooling_mask,
            self.config.pooling,
            input_ids=input_ids,
            eos_token_id=self.tokenizer.eos_token_id,
        )
        if self.projection is not None:
            vectors = self.projection(vectors.to(next(self.projection.parameters()).dtype)).float()
        if self.config.normalize:
            vectors = nn.functional.normalize(vectors, dim=-1)
        return vectors

    def tokenize(self, texts: Sequence[str], *, kind: str | None = None) -> dict[str, Tensor]:
        """Return the arguments of `forward` for a batch of texts, `(batch, tokens)` each, padded at the right.

        Raises:
            ValueError: for a kind without a prompt rule.
        """
        prompt = self._prompt(kind)
        return self._pad(self._token_ids(texts, prompt), self._prompt_tokens(prompt))

    def features(self, texts: Sequence[str], *, kind: str | None = None) -> Features:
        """Encode texts for a loss: in their order, with gradients, and with dropout where the encoder is in training.

        Args:
            texts: of any lengths; they go through the backbone as `encode`'s do.
            kind: as in `encode`.

        Raises:
            TypeError: if something among the texts is not a string.
            ValueError: for an unknown kind.
        """
        prompt = self._prompt(kind)
        prompt_tokens = self._prompt_tokens(prompt)
        if not len(texts):
            return Features(torch.empty(0, self.dim, device=self.device))
        ids = self._token_ids(texts, prompt)
        batches = list(self._batches(ids))
        parts = [self._features([ids[index] for index in batch], prompt_tokens) for batch in batches]
        inverse = torch.tensor([index for batch in batches for index in batch], device=self.device).argsort()
        return Features.cat(parts).map(lambda tensor: tensor[inverse])

    def _batches(self, ids: Sequence[Sequence[int]], batch_tokens: int | None = None) -> Iterator[list[int]]:
        lengths = [len(row) for row in ids]
        packed = can_pack(self.backbone, max(lengths))
        return _batches(lengths, batch_tokens or (PACKED_BATCH_TOKENS if packed else BATCH_TOKENS), packed=packed)

    def _features(self, ids: Sequence[Sequence[int]], prompt_tokens: int) -> Features:
        """Return what the backbone and the heads give of texts, longest first."""
        inputs = self._pad(ids, prompt_tokens)
        input_ids, attention_mask = inputs["input_ids"], inputs.get("attention_mask")
        lengths = [len(row) for row in ids]
        with OneDnnLinear():
            if attention_mask is not None and can_pack(self.backbone, lengths[0]):
                states = packed_states(self.backbone, input_ids, lengths)
            else:
                with TURN:
                    states = self.backbone(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
            mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
            mask = inputs.get("pooling_mask", mask)
            features = Features(self._vectors(states, input_ids, mask))
            if len(self.heads):
                special = torch.isin(input_ids, torch.tensor(self.tokenizer.all_special_ids, device=self.device))
                mask = mask.bool()
                mask[:, 0] &= ~special[:, 0]  # [CLS] stands for the whole text, and has the dense vector
                features.token_ids, features.token_mask = input_ids, mask
                if "sparse" in self.heads:
                    features.sparse = self.heads["sparse"](states, mask & ~special)
                if "tokens" in self.heads:
                    features.tokens = self.heads["tokens"](states, mask)
        return features

    def add_heads(self, *, sparse: bool = True, tokens: bool | int = True) -> None:
        """Put new BGE-M3 heads with random weights on the token states, in place of those that were there.

        Args:
            sparse: a head that weighs every token, for lexical matching.
            tokens: a head that gives every token a vector: its width, or True for the backbone's.

        Raises:
            ValueError: for a negative width.
        """
        if tokens < 0:
            raise ValueError(f"tokens={tokens}: give the width of the token vectors, True or False")
        width = self.backbone.config.hidden_size
        heads = new_heads(width, sparse=sparse, tokens=width if tokens is True else int(tokens))
        self.heads = heads.to(self.device, self.dtype).train(self.training)

    def encode(
        self,
        texts: str | Iterable[str],
        *,
        kind: str | None = None,
        batch_tokens: int | None = None,
        show_progress_bar: bool = False,
        convert_to_tensor: bool = False,
        output: str = "dense",
    ) -> np.ndarray | Tensor | list | dict[int, float]:
        """Encode texts to float32 vectors `(n, dim)` in their order; a single string to `(dim,)`.

        Texts are read a window at a time, so that a generator is never held whole, and within a window texts of equal
        or nearly equal length go through the backbone together, so that little is computed on padding.

        Args:
            texts: a text, or any iterable of texts.
            kind: "query" or "document" for that prompt, or the name of any other prompt in the config; None for the
                default prompt, if the config names one.
            batch_tokens: tokens in a batch, padding included; None for what suits the backbone. Raise it on an
                accelerator.
            show_progress_bar: show progress and rate.
            convert_to_tensor: return a tensor on the encoder's device in place of a numpy array.
            output: "dense"; or with such heads "sparse", a list of `{token id: weight}` with the largest weight of
                each token that has one above 0, or "tokens", a list of unit vectors `(tokens, width)`. Of a single
                string the one thing, not a list.

        Raises:
            TypeError: if something among the texts is not a string.
            ValueError: for an unknown kind or output, an output without its head, or a batch_tokens below 1.
        """
        if batch_tokens is not None and batch_tokens < 1:
            raise ValueError(f"batch_tokens={batch_tokens}: give at least 1")
        if output != "dense" and output not in self.heads:
            raise ValueError(f"no head for output={output!r}: use one of {', '.join(['dense', *self.heads])}")
        single = isinstance(texts, str)
        texts = [texts] if single else texts
        prompt = self._prompt(kind)
        prompt_tokens = self._prompt_tokens(prompt)
        target = self.device if convert_to_tensor else torch.device("cpu")
        total = len(texts) if hasattr(texts, "__len__") else None

        windows = [torch.empty(0, self.dim, device=target)]
        ragged: list[Any] = []
        source = iter(texts)
        training = [module for module in self.modules() if module.training]
        self.eval()
        try:
            with tqdm(total=total, desc="encode", unit="text", disable=not show_progress_bar) as progress:
                while window := list(islice(source, WINDOW)):
                    ids = self._token_ids(window, prompt)
                    vectors = torch.empty(len(ids), self.dim, device=target)
                    start = len(ragged)
                    ragged += [None] * (0 if output == "dense" else len(ids))
                    for batch in self._batches(ids, batch_tokens):
                        with torch.inference_mode():
                            features = self._features([ids[index] for index in batch], prompt_tokens)
                            if output == "dense":
                                vectors[batch] = features.dense.to(target)
                            else:
                                for index, row in zip(batch, _ragged(features, output, target)):
                                    ragged[start + index] = row
                        progress.update(len(batch))
                    windows.append(vectors)
        finally:
            for module in training:
                module.training = True
        if output != "dense":
            rows = ragged if output == "sparse" or convert_to_tensor else [row.numpy() for row in ragged]
            return rows[0] if single else rows
        vectors = torch.cat(windows) if len(windows) > 2 else windows[-1]
        vectors = vectors[0] if single else vectors
        return vectors if convert_to_tensor else vectors.numpy()

    def weights_hash(self) -> str:
        """Return a SHA-256 of everything that fixes the vectors: parameters, pooling, normalising, prompts, length.

        Equal after saving and loading, on every device, and as the retrieval face of a ConditioningEncoder. Parameters
        are compared as float32, so float16 weights hash alike in float16 and float32, and rounding weights to another
        dtype is a change.
        """
        settings = self.config.to_dict() | {
            "prompts": {name: prompt for name, prompt in self.config.prompts.items() if prompt},
            "max_length": self.max_length,
        }
        layers = [] if self.projection is None else [type(module).__name__ for module in self.projection.modules()]
        digest = hashlib.sha256(json.dumps([settings, layers], sort_keys=True).encode())
        tensors = {f"backbone.{name}": tensor for name, tensor in self.backbone.state_dict().items()}
        if self.projection is not None:
            tensors |= {f"projection.{name}": tensor for name, tensor in self.projection.state_dict().items()}
        tensors |= {f"heads.{name}": tensor for name, tensor in self.heads.state_dict().items()}
        for name in sorted(tensors):
            if name.startswith("backbone.pooler."):  # BERT's head for next-sentence prediction: no vector passes it
                continue
            tensor = tensors[name].detach().to("cpu", torch.float32).contiguous()
            digest.update(f"{name} {tuple(tensor.shape)}".encode())
            digest.update(memoryview(tensor.numpy()).cast("B") if tensor.numel() else b"")
        return digest.hexdigest()

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device | None = None,
        adapter: str | Path | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
        pooling: str | None = None,
        prompts: dict[str, str] | None = None,
        max_length: int | None = None,
        normalize: bool | None = None,
    ) -> "TextEncoder":
        """Load an encoder from a folder, a hub id or open_clip.

        `name_or_path` may be
        - a sentence-transformers folder, in the layout of any release;
        - a plain transformers folder: mean pooling, or the last token of a decoder, or CLIP's end-of-text token with
          its projection; not normalised, as sentence-transformers takes such a folder;
        - a ConditioningEncoder folder, whose retrieval face is read;
        - the hub id of any of these;
        - `open_clip:MODEL/PRETRAINED`, where PRETRAINED is a tag or a `*.safetensors` file, `open_clip:hf-hub:ID` or
          `open_clip:local-dir:FOLDER`.

        Args:
            name_or_path: see above.
            dtype: of the backbone; vectors are float32.
            device: of the backbone.
            adapter: folder or hub id of a peft adapter for the backbone; merged into the weights.
            revision: of a hub model.
            trust_remote_code: run code that a model folder brings.
            pooling: replaces what the folder says.
            prompts: added to those of the folder; the same name replaces.
            max_length: replaces what the folder says.
            normalize: replaces what the folder says.

        Raises:
            FileNotFoundError: no such model, or no safetensors weights in it.
            ValueError: damaged, incomplete or unsupported content, by name.
        """
        name = str(name_or_path)
        projection = folder = heads = None
        if name.startswith(OPEN_CLIP):
            backbone, projection, tokenizer = load_open_clip_text(name.removeprefix(OPEN_CLIP))
            backbone.to(dtype)
            config = TextEncoderConfig(pooling="eos")
        else:
            folder = model_folder(name_or_path, revision=revision, code=trust_remote_code)
            if (folder / "modules.json").exists():
                backbone, projection, tokenizer, config = _from_sentence_folder(folder, dtype, trust_remote_code)
            elif _model_type(folder) == "textcond_conditioning":
                from .conditioning import ConditioningEncoder

                check_weights(folder)
                face = ConditioningEncoder.from_pretrained(folder, dtype=dtype).text_encoder
                backbone, projection, tokenizer, config = face.backbone, face.projection, face.tokenizer, face.config
                heads = face.heads
            else:
                backbone = load_backbone(folder, dtype=dtype, trust_remote_code=trust_remote_code)
                tokenizer = _load_tokenizer(folder, trust_remote_code)
                config = TextEncoderConfig(pooling=default_pooling(backbone), normalize=False)

        overrides = {"pooling": pooling, "max_length": max_length, "normalize": normalize}
        config = dataclasses.replace(
            config,
            prompts=config.prompts | (prompts or {}),
            **{option: value for option, value in overrides.items() if value is not None},
        )
        if adapter is not None:
            backbone = merge_adapter(backbone, model_folder(adapter))
        encoder = cls(backbone, tokenizer, config, projection)
        encoder.name_or_path = name
        if heads is not None:
            encoder.heads = heads
        elif folder is not None:
            encoder.heads = load_heads(folder, backbone.config.hidden_size, dtype)
        return encoder if device is None else encoder.to(device)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a folder that `from_pretrained` reads back exactly, and sentence-transformers with equal vectors.

        The folder is complete or not there; one that was there is replaced, files beside the model carried over.

        Raises:
            ValueError: if the backbone has unmerged adapters, which its own saving would separate from it.
        """
        if getattr(self.backbone, "peft_config", None):
            raise ValueError("the backbone carries a peft adapter: merge it (merge_and_unload) before saving")
        tokenizer = copy.deepcopy(self.tokenizer)
        if tokenizer.pad_token is None and tokenizer.eos_token is not None:
            tokenizer.pad_token = (
                tokenizer.eos_token
            )  # sentence-transformers pads with the tokenizer, and must be able to
        if tokenizer.is_fast:  # else the file repeats the truncation of the last call
            tokenizer.backend_tokenizer.no_truncation()
            tokenizer.backend_tokenizer.no_padding()
        settings = self.config.to_dict() | {"max_length": self.max_length}
        with atomic_folder(folder, owned=MODEL_FOLDER_OWNS) as new:
            self.backbone.save_pretrained(new)
            tokenizer.save_pretrained(new)
            write_sentence_folder(new, settings, self.projection, self.backbone.config.hidden_size)
            save_heads(self.heads, new)
            if self.config.pooling == "eos":  # a pooling that the sentence-transformers files have no word for
                write_json(new / "textcond.json", {"pooling": "eos"})

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | None = None,
        revision: str | None = None,
        commit_message: str = "Add text encoder",
    ) -> str:
        """Upload what `save_pretrained` writes; returns the address of the commit."""
        api = HfApi(token=token)
        api.create_repo(repo_id, private=private, exist_ok=True)
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary) / "encoder"
            self.save_pretrained(folder)
            return str(
                api.upload_folder(repo_id=repo_id, folder_path=folder, revision=revision, commit_message=commit_message)
            )

    def _prompt(self, kind: str | None) -> str:
        """Return the prompt of a kind; the default prompt is for texts without one, as in sentence-transformers."""
        prompts = self.config.prompts
        if kind is None:
            kind = self.config.default_prompt_name
        elif kind not in prompts and kind not in ("query", "document"):
            names = dict.fromkeys(["query", "document", *prompts])
            raise ValueError(f"no prompt for kind {kind!r}: use one of {', '.join(names)}")
        return prompts.get(kind, "")

    def _prompt_tokens(self, prompt: str) -> int:
        """Return how many tokens at the start of a text the pooling must leave out."""
        if self.config.include_prompt or not prompt:
            return 0
        ids = self._token_ids([prompt], "")[0]
        return len(ids) - (ids[-1] in self.tokenizer.all_special_ids)

    def _token_ids(self, texts: Sequence[str], prompt: str) -> list[list[int]]:
        for text in texts:
            if not isinstance(text, str):
                raise TypeError(f"a text is a string, got {type(text).__name__} {text!r:.80}")
        ids = self.tokenizer(
            [prompt + text for text in texts] if prompt else list(texts),
            truncation=self.max_length is not None,
            max_length=self.max_length,
            padding=False,
            return_attention_mask=False,
            return_token_type_ids=False,
        )["input_ids"]
        # a tokenizer without special tokens makes nothing of "", and a backbone needs one token
        return [row or [self._blank_id] for row in ids]

    def _pad(self, ids: Sequence[Sequence[int]], prompt_tokens: int) -> dict[str, Tensor]:
        length = max(map(len, ids))
        lengths = [len(row) for row in ids]
        blank = [self._blank_id] * (length - min(lengths))
        input_ids = torch.tensor([[*row, *blank[: length - len(row)]] for row in ids], device=self.device)
        inputs = {"input_ids": input_ids}
        if min(lengths) < length or prompt_tokens:
            position = torch.arange(length, device=self.device)
            inputs["attention_mask"] = (position < torch.tensor(lengths, device=self.device).unsqueeze(1)).long()
        if prompt_tokens:
            inputs["pooling_mask"] = inputs["attention_mask"] * (position >= prompt_tokens)
        return inputs

    @property
    def _blank_id(self) -> int:
        """The id that fills up a row: padding, or for tokenizers without it (decoders) end of text."""
        ids = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, self.tokenizer.bos_token_id)
        return next((token_id for token_id in ids if token_id is not None), 0)


def _ragged(features: Features, output: str, device: torch.device) -> Iterator[Any]:
    """Yield one text's sparse weights as `{token id: weight}`, or its token vectors, at a time."""
    if output == "tokens":
        for vectors, mask in zip(features.tokens, features.token_mask):
            yield vectors[mask].to(device)
        return
    for ids, weights in zip(features.token_ids.tolist(), features.sparse.tolist()):
        largest: dict[int, float] = {}
        for token_id, weight in zip(ids, weights):
            if weight > largest.get(token_id, 0):
                largest[token_id] = weight
        yield largest


def _batches(lengths: Sequence[int], batch_tokens: int, packed: bool = False) -> Iterator[list[int]]:
    """Yield the indices of texts that go through the backbone together, longest first.

    A batch ends when it is full; and unless it will be packed where the length changes once it is a quarter full: by
    then another batch costs less than padding to this one's length would.
    """
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        longest = lengths[batch[0]] if batch else 0
        full = (len(batch) + 1) * longest > batch_tokens
        shorter = not packed and lengths[index] < longest and len(batch) * longest * 4 >= batch_tokens
        if batch and (full or shorter):
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def load_backbone(
    folder: Path, *, dtype: torch.dtype = torch.float32, trust_remote_code: bool = False
) -> PreTrainedModel:
    """Load the text model of a transformers folder; of CLIP with its text projection where there is one.

    Raises:
        FileNotFoundError: no config, no safetensors weights, or a peft adapter in place of a model.
        ValueError: for a damaged file, weights that lack a part of the model, or a model that cannot read text alone.
    """
    _model_type(folder)
    check_weights(folder)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    model, info = _model_class(config).from_pretrained(
        folder,
        dtype=dtype,
        use_safetensors=True,
        trust_remote_code=trust_remote_code,
        output_loading_info=True,
    )
    missing = {name.removeprefix("text_model.") for name in info["missing_keys"]}
    lost = sorted(name for name in missing if not name.startswith("pooler."))
    if lost:
        raise ValueError(
            f"{folder}: the weights lack {len(lost)} parameters of {type(model).__name__}, such as {lost[0]}"
        )
    if missing:
        model.pooler = None  # transformers has filled it with random numbers, and pooling here never reads it
    if model.config.is_encoder_decoder:
        raise ValueError(f"{folder}: {type(model).__name__} has a decoder and no known way to load its encoder alone")
    if hasattr(model.config, "use_cache"):
        model.config.use_cache = False  # a text is encoded once: keys and values need not be kept
    return model.eval()


def default_pooling(backbone: PreTrainedModel) -> str:
    """Return the pooling of a model that names none: CLIP's end of text, a decoder's last token, else the mean."""
    if isinstance(backbone, (CLIPTextModel, CLIPTextModelWithProjection)):
        return "eos"
    causal = any(getattr(module, "is_causal", False) for module in backbone.modules())
    return "last" if causal else "mean"


def position_capacity(backbone: PreTrainedModel) -> int | None:
    """Return the longest input in tokens that the backbone has positions for; None where positions are relative.

    RoBERTa, XLM-R and MPNet count from `padding_idx + 1`, so that many of their positions are never used.
    """
    positions = getattr(backbone.config, "max_position_embeddings", None)
    if not positions or positions < 0:
        return None
    for module in backbone.modules():
        offset = getattr(module, "padding_idx", None)
        if isinstance(offset, int) and isinstance(getattr(module, "position_embeddings", None), nn.Embedding):
            return positions - offset - 1
    return positions


def merge_adapter(backbone: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """Return the backbone with the weights of a peft adapter added to its own.

    Raises:
        FileNotFoundError: if the folder holds no adapter in safetensors form.
        ValueError: if the adapter was made for other layers than the backbone has.
    """
    from peft import PeftConfig, get_peft_model, set_peft_model_state_dict
    from safetensors.torch import load_file

    read_json(folder / "adapter_config.json")
    check_weights(folder)
    misfit = f"adapter {folder} does not fit {type(backbone).__name__}"
    try:
        adapted = get_peft_model(backbone, PeftConfig.from_pretrained(str(folder)))
    except ValueError as error:
        raise ValueError(f"{misfit}: {error}") from error
    weights = load_file(folder / "adapter_model.safetensors")
    own = list(adapted.state_dict())
    # an adapter of a model with a head names the layers below "model."
    nested = "base_model.model.model."
    if not any(name.startswith(nested) for name in own):
        weights = {name.replace(nested, "base_model.model."): tensor for name, tensor in weights.items()}
    result = set_peft_model_state_dict(adapted, weights)
    missing = [name for name in result.missing_keys if ".lora_" in name or ".modules_to_save." in name]
    if result.unexpected_keys or missing:
        raise ValueError(f"{misfit}: {(result.unexpected_keys or missing)[0]} is on one side only")
    return adapted.merge_and_unload()


def _model_class(config: PretrainedConfig) -> type:
    if config.model_type == "clip" or "CLIPTextModelWithProjection" in (config.architectures or ()):
        return CLIPTextModelWithProjection
    return AutoModelForTextEncoding if type(config) in MODEL_FOR_TEXT_ENCODING_MAPPING else AutoModel


def _model_type(folder: Path) -> str | None:
    if (folder / "adapter_config.json").exists() and not (folder / "config.json").exists():
        base = read_json(folder / "adapter_config.json").get("base_model_name_or_path")
        raise FileNotFoundError(
            f"{folder} is a peft adapter: load its base model ({base}) with adapter={str(folder)!r}"
        )
    return read_json(folder / "config.json").get("model_type")


def _load_tokenizer(folder: Path, trust_remote_code: bool, **options: Any) -> PreTrainedTokenizerBase:
    # without any file transformers makes an empty tokenizer of the model's kind, which turns every word into "unknown"
    if not any(file for pattern in TOKENIZER_FILES for file in folder.glob(pattern)):
        raise FileNotFoundError(f"{folder} holds no tokenizer: save the model's tokenizer into it")
    return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code, **options)


def _from_sentence_folder(
    folder: Path, dtype: torch.dtype, trust_remote_code: bool
) -> tuple[PreTrainedModel, nn.Module | None, PreTrainedTokenizerBase, TextEncoderConfig]:
    found = read_sentence_folder(folder)
    # the vectors of such a folder pass through its Dense modules only, whatever head the weights file also holds
    backbone = load_backbone(found.transformer, dtype=dtype, trust_remote_code=trust_remote_code)
    if isinstance(backbone, CLIPTextModelWithProjection):
        backbone = backbone.text_model
    tokenizer = _load_tokenizer(found.transformer, trust_remote_code, **found.tokenizer_options)
    own = read_json(folder / "textcond.json") if (folder / "textcond.json").exists() else {}
    config = TextEncoderConfig.from_dict(found.settings | own)
    return backbone, found.projection, tokenizer, config


def _lower_case(tokenizer: PreTrainedTokenizerBase) -> None:
    """Put lower-casing before the tokenizer's own normalising, once."""
    backend = tokenizer.backend_tokenizer
    steps = backend.normalizer
    present = list(steps) if isinstance(steps, normalizers.Sequence) else [steps] if steps is not None else []
    if not any(isinstance(step, normalizers.Lowercase) for step in present):
        backend.normalizer = normalizers.Sequence([normalizers.Lowercase(), *present])
