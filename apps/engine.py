"""One pipeline behind many requests: loaded on first use, encoders swapped as they are asked for, an index for each."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from .finder import Finder, open_index
from .generation import draw
from .loading import find_encoder, load_pipeline
from .metadata import NATIVE, REFERENCE, Parameters

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from PIL.Image import Image
    from transformers import PreTrainedModel

KEPT_ENCODERS = 2


class Engine:
    """A pipeline, its encoder choices and what each of them finds. Safe to call from many threads; pictures take turns.

    Args:
        pipeline: "reference", a diffusers folder, or a hub id.
        index: the prompts to look in; None is the reference model's.
        device, dtype: as for `load_pipeline`.
    """

    def __init__(
        self,
        pipeline: str = REFERENCE,
        index: str | Path | None = None,
        device: str | None = None,
        dtype: str | None = None,
    ):
        self.name, self.index_path, self.device, self.dtype = pipeline, index, device, dtype
        self._pipe: DiffusionPipeline | None = None
        self._encoders: dict[str, PreTrainedModel] = {}
        self._turn, self._loading, self._opening = threading.Lock(), threading.RLock(), threading.Lock()
        self._own: Finder | None = None
        self._finders: dict[str, Finder] = {}

    @property
    def ready(self) -> bool:
        """Whether the pipeline is in memory."""
        return self._pipe is not None

    def warm_up(self) -> None:
        """Load the pipeline, so that the first picture need not wait for it."""
        self._pipeline()

    def draw(
        self, parameters: Parameters, on_step: Callable[[int, int, Callable[[], Image | None]], None] | None = None
    ) -> tuple[Image, Parameters]:
        """Make one picture with the encoder that `parameters` name; see `generation.draw`."""
        with self._conditioned(parameters.encoder) as pipe:
            return draw(pipe, parameters, on_step)

    def can_find(self, encoder: str) -> bool:
        """Whether `finder` answers at once."""
        return encoder in self._finders

    def finder(self, encoder: str = NATIVE) -> Finder:
        """What finds prompts with the weights that condition the pictures when `encoder` is chosen.

        The index on disk serves the encoder that made it. For any other one its texts are encoded again, once.

        Raises:
            ValueError, OSError: the encoder does not exist or does not fit the pipeline, or there is no index.
        """
        if encoder not in self._finders:
            if encoder == NATIVE and self.name == REFERENCE and self.index_path is None:
                self._finders[encoder] = self._stored()
            else:
                self._finders[encoder] = self._shared(encoder)
        return self._finders[encoder]

    def _stored(self) -> Finder:
        with self._opening:
            if self._own is None:
                self._own = Finder(open_index(self.index_path))
        return self._own

    def _shared(self, encoder: str) -> Finder:
        from textcond.pipelines import retrieval_encoder

        with self._conditioned(encoder) as pipe:
            face = retrieval_encoder(pipe)
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
            yield pipe

    def _pipeline(self) -> DiffusionPipeline:
        with self._loading:
            if self._pipe is None:
                self._pipe = load_pipeline(self.name, device=self.device, dtype=self.dtype)
        return self._pipe

    def _loaded(self, encoder: str) -> PreTrainedModel:
        from textcond.pipelines.swap import load_encoder

        with self._loading:
            if encoder not in self._encoders:
                unet = self._pipeline().unet
                loaded = load_encoder(find_encoder(encoder), dtype=unet.dtype, device=unet.device)
                self._encoders = dict([*self._encoders.items(), (encoder, loaded)][-KEPT_ENCODERS:])
            return self._encoders[encoder]
