"""One pipeline behind many requests: loaded on first use, encoders swapped as they are asked for, an index for each."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from textcond.folders import model_folder, read_json
from textcond.index.prompt_index import LONGEST_QUERY

from .finder import Finder, open_index
from .generation import default_guidance, default_size, draw, longest_reader, prompt_length
from .loading import find_encoder, find_pipeline, import_libraries, load_pipeline
from .metadata import NATIVE, REFERENCE, Parameters, usual_encoder

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from PIL.Image import Image
    from transformers import PreTrainedModel

    from textcond import PromptIndex, TextEncoder
    from textcond.pipelines import Contract

KEPT_ENCODERS = 4


@dataclass(frozen=True)
class Read:
    """What an encoder makes of a prompt.

    Attributes:
        tokens, limit: of the prompt, and how many of them are read.
        mean: of the tokens that the denoiser gets, `(width,)`.
        seconds: that it took to encode.
    """

    tokens: int
    limit: int
    mean: np.ndarray
    seconds: float

    def cosine(self, other: Read) -> float:
        """Between the two means, -1 to 1."""
        product = np.linalg.norm(self.mean) * np.linalg.norm(other.mean)
        return float(self.mean @ other.mean / product) if product else 0.0


class Engine:
    """A pipeline, its encoder choices and what each of them finds. Safe to call from many threads; pictures take turns.

    Args:
        pipeline: "reference", a diffusers folder, or a hub id.
        index: the prompts to look in; None is the reference model's.
        device, dtype: as for `load_pipeline`.
        own_index: where a copy of the reference model's index is made when something is to be saved into it; once it
            is there, it is looked in.
    """

    def __init__(
        self,
        pipeline: str = REFERENCE,
        index: str | Path | None = None,
        device: str | None = None,
        dtype: str | None = None,
        own_index: Path | None = None,
    ):
        self.own_index = own_index
        self.name, self.index_path, self.device, self.dtype = pipeline, index, device, dtype
        self._pipe: DiffusionPipeline | None = None
        self._encoders: dict[str, PreTrainedModel] = {}
        self._turn, self._loading, self._opening = threading.Lock(), threading.RLock(), threading.Lock()
        self._replacing = threading.Lock()
        self._own: Finder | None = None
        self._copy: PromptIndex | None = None
        self._finders: dict[str, Finder] = {}

    @property
    def ready(self) -> bool:
        """Whether the pipeline is in memory."""
        return self._pipe is not None

    def warm_up(self) -> None:
        """Load the pipeline and its usual encoder, so that the first picture need not wait for them."""
        self._pipeline()
        if (encoder := usual_encoder(self.name)) != NATIVE:
            self._loaded(encoder)

    def load(
        self,
        pipeline: str,
        device: str | None = None,
        dtype: str | None = None,
        on_progress: Callable[[float, str], None] | None = None,
    ) -> None:
        """Load another pipeline, and put it in the place of the present one once it is complete and its turn comes.

        Raises:
            ValueError, OSError: as `load_pipeline` does; the present pipeline stays then.
        """
        import_libraries()
        tell = on_progress or (lambda share, what: None)
        tell(0, f"finding {pipeline}")
        # a hub may take minutes: nobody waits for that but who asked
        found = pipeline if pipeline == REFERENCE else str(find_pipeline(pipeline))
        tell(0, "waiting for its turn")
        with self._replacing:
            loaded = load_pipeline(found, device=device, dtype=dtype, on_progress=on_progress)
            tell(1, "waiting for the picture that is being drawn")
            with self._turn, self._loading:
                self.name, self.device, self.dtype, self._pipe = pipeline, device, dtype, loaded
                self._encoders, self._finders = {}, {}

    def contracts(self) -> list[Contract]:
        """What the pipeline expects of its text encoders."""
        import_libraries()
        from textcond.pipelines import inspect_pipeline

        return inspect_pipeline(self._pipeline())

    def may_take(self, encoder: str) -> bool:
        """False for a folder whose encoder gives tokens of another width than the loaded pipeline reads."""
        config = Path(encoder) / "config.json"
        if self._pipe is None or not config.is_file():
            return True
        import_libraries()
        from textcond.pipelines.swap import CONNECTOR

        if (config.parent / CONNECTOR).is_file():
            return True  # it is the connector that gives what the pipeline reads
        try:
            wanted = {contract.token_width for contract in self.contracts()}
            given = read_json(config).get("hidden_size")
        except (OSError, ValueError):  # who swaps it in is told
            return True
        # Of several slots each has its own width, and one encoder may stand for all.
        return None in (given, *wanted) or len(wanted) > 1 or given in wanted

    @property
    def place(self) -> str:
        """Where the pipeline is and in what precision; empty before it is loaded."""
        if (pipe := self._pipe) is None:
            return ""
        where = f"{pipe._execution_device}, {str(pipe.dtype).removeprefix('torch.')}"
        return f"{where}, one part at a time" if _offloaded(pipe) else where

    @property
    def guidance(self) -> float:
        """What the pipeline is best used with."""
        return default_guidance(self._pipeline(), self.name)

    def share(self, parameters: Parameters) -> float:
        """How many times as much as one of the pipeline's own size a picture has to compute, about."""
        try:
            own = default_size(self._pipe)
        except ValueError:  # not loaded, or it does not tell
            return 1.0
        return (parameters.width or own) * (parameters.height or own) / own**2

    def draw(
        self, parameters: Parameters, on_step: Callable[[int, int, Callable[[], Image | None]], None] | None = None
    ) -> tuple[Image, Parameters]:
        """Make one picture with the encoder that `parameters` name; see `generation.draw`."""
        with self._conditioned(parameters.encoder) as pipe:
            return draw(pipe, parameters, on_step)

    def read(self, prompt: str, encoder: str = NATIVE) -> Read:
        """What that encoder gives the denoiser for `prompt`.

        Raises:
            ValueError: the pipeline is of a family that is not supported, or the encoder does not fit it.
        """
        import_libraries()
        import torch

        from textcond.pipelines.denoisers import TimestepAwareUNet
        from textcond.pipelines.families import denoiser_of, family_of

        with self._conditioned(encoder) as pipe, torch.inference_mode():
            arguments = family_of(pipe).arguments
            began = time.monotonic()
            tokens = arguments(pipe, [prompt])["prompt_embeds"]
            if isinstance(denoiser := denoiser_of(pipe), TimestepAwareUNet):
                tokens = denoiser.connector(tokens)
            tokens = tokens.float().cpu()
            seconds = time.monotonic() - began
            tokenizer, padded = longest_reader(pipe)
            length = prompt_length(tokenizer, prompt, padded)
            return Read(length.tokens, length.limit, tokens[0].mean(0).numpy(), seconds)

    def save(self, path: Path, parameters: Parameters) -> int:
        """Put a picture file and what made it into the index; the number of rows that are there now.

        The index of the reference model is shipped with it and stays as it is: a copy at `own_index` takes the rows.

        Raises:
            ValueError: the prompt is empty, or the reference model's index would be written.
            OSError: it cannot be written.
        """
        from PIL import Image

        from textcond import PromptIndex

        if not parameters.prompt.strip():
            raise ValueError("the picture has an empty prompt: nothing would find it")
        stored = self._stored()
        with self._opening:
            if self.index_path is None and stored.index is not self._copy:
                if self.own_index is None:
                    raise ValueError("the reference model's index stays as it is: pass an index of your own")
                stored.index.save(self.own_index)
                stored.index = self._copy = PromptIndex.open(self.own_index, stored.encoder)
            told = asdict(parameters)
            # an empty negative prompt tells something: a click on the row empties the box
            metadata = {name: told[name] for name in told if name != "prompt" and told[name] not in (None, {})}
            with Image.open(path) as image:
                for finder in {id(one): one for one in (stored, *self._finders.values())}.values():
                    finder.add(parameters.prompt, metadata, image)
        return len(stored)

    def retrieved(self, parameters: Parameters, k: int = 5) -> Parameters:
        """Look up what `parameters.retrieval` asks for, a mode and a strength or nothing, and fill it in.

        Returns:
            The parameters with the neighbours, and in the mode "expand" with the longer prompt.

        Raises:
            ValueError: an unknown mode or strength, or a pipeline of a family that is not supported.
        """
        if not parameters.retrieval:
            return parameters
        import_libraries()
        from textcond.pipelines.retrieval import MODES, expand, suggest

        mode, strength = parameters.retrieval["mode"], parameters.retrieval["strength"]
        if mode not in MODES:
            raise ValueError(f"there is no mode {mode!r}: choose from {', '.join(MODES)}")
        if not 0 <= strength <= 1:
            raise ValueError(f"strength is {strength}: choose from 0, which is off, to 1")
        hits = suggest(self.finder(parameters.encoder).index, parameters.prompt[:LONGEST_QUERY], k)
        filled = {"mode": mode, "strength": strength, "neighbours": [[hit.text, hit.score] for hit in hits]}
        prompt = parameters.prompt
        if mode == "expand":
            filled["prompt"] = prompt
            with self._conditioned(parameters.encoder) as pipe:
                prompt = expand(pipe, prompt, hits, strength)
        return replace(parameters, prompt=prompt, retrieval=filled)

    def can_find(self, encoder: str) -> bool:
        """Whether `finder` answers at once."""
        return encoder in self._finders

    def finder(self, encoder: str | None = None) -> Finder:
        """What finds prompts with the weights that condition the pictures when `encoder`, or the usual one, is chosen.

        The index on disk serves the encoder that made it. For any other one its texts are encoded again, once.

        Raises:
            ValueError, OSError: the encoder does not exist or does not fit the pipeline, or there is no index.
        """
        encoder = encoder or usual_encoder(self.name)
        finders = self._finders  # `load` puts a new one there
        if encoder not in finders:
            if self.name == REFERENCE and encoder == usual_encoder(REFERENCE) and self.index_path is None:
                finders[encoder] = self._stored()
            else:
                finders[encoder] = self._shared(encoder)
        return finders[encoder]

    def _stored(self) -> Finder:
        import_libraries()
        with self._opening:
            if self._own is None:
                if self.index_path is None and self.own_index is not None and self.own_index.exists():
                    self._own = Finder(open_index(self.own_index))
                    self._copy = self._own.index
                else:
                    self._own = Finder(open_index(self.index_path))
        return self._own

    def _shared(self, encoder: str) -> Finder:
        from textcond.pipelines import retrieval_encoder

        with self._conditioned(encoder) as pipe:
            face = _seeing(retrieval_encoder(pipe), pipe.text_encoder.name_or_path)
        weights = face.weights_hash()
        known = [self._stored(), *self._finders.values()]
        same = next((finder for finder in known if finder.weights_hash == weights), None)
        return same or Finder(self._stored().index, face)

    @contextlib.contextmanager
    def _conditioned(self, encoder: str) -> Iterator[DiffusionPipeline]:
        """The pipeline with `encoder` swapped in, for one user at a time. Loading takes nobody's turn."""
        from textcond.pipelines import swapped

        pipe = self._pipeline()
        loaded = None if encoder == NATIVE else self._loaded(encoder)
        with self._turn, contextlib.nullcontext(pipe) if loaded is None else swapped(pipe, loaded):
            if loaded is not None and _offloaded(pipe):
                pipe.enable_model_cpu_offload(device=pipe._execution_device)  # hooks the new encoder too
            yield pipe

    def _pipeline(self) -> DiffusionPipeline:
        if (pipe := self._pipe) is not None:  # another one may be loading meanwhile
            return pipe
        import_libraries()
        with self._loading:
            if self._pipe is None:
                self._pipe = load_pipeline(self.name, device=self.device, dtype=self.dtype)
        return self._pipe

    def _loaded(self, encoder: str) -> PreTrainedModel | str:
        from textcond.pipelines.families import denoiser_of
        from textcond.pipelines.swap import CONNECTOR, load_encoder

        with self._loading:
            if encoder not in self._encoders:
                denoiser, folder = denoiser_of(self._pipeline()), find_encoder(encoder)
                if (model_folder(folder) / CONNECTOR).is_file():
                    return folder  # the swap reads both
                loaded = load_encoder(folder, dtype=denoiser.dtype, device=denoiser.device)
                self._encoders = dict([*self._encoders.items(), (encoder, loaded)][-KEPT_ENCODERS:])
            return self._encoders[encoder]


def _offloaded(pipe: DiffusionPipeline) -> bool:
    return bool(getattr(pipe, "_all_hooks", None))


def _seeing(encoder: TextEncoder, folder: str) -> TextEncoder:
    """The encoder with the image tower that lies beside its weights, if one does."""
    from textcond.index.image_text import ImageTextEncoder, load_image_tower

    tower = load_image_tower(Path(folder)) if (Path(folder) / "config.json").is_file() else None
    return encoder if tower is None else ImageTextEncoder.from_towers(encoder, tower.to(encoder.device, encoder.dtype))
