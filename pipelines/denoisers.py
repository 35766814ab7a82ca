"""A timestep-aware connector between text encoder and UNet, as in ELLA (Hu et al., 2024), for unmodified pipelines.

The text encoder gives its backbone's own states (`bridge="identity"`), and the UNet, a subclass that keeps the stock
weights, resamples them anew at every denoising step, so that early steps may read other parts of a prompt than late
ones.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import DiffusionPipeline, UNet2DConditionModel
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from diffusers.utils.torch_utils import unwrap_module
from torch import Tensor, nn
from torch.nn import functional as F

from textcond.bridges import PerceiverBlock, ResamplerBridge
from textcond.files import read_tensors, write_tensors

# Sinusoidal channels of a timestep, those of Stable Diffusion's own embedding.
_TIME_CHANNELS = 320
_KIND = "timestep_resampler_{tokens}x{depth}"
_KIND_PATTERN = re.compile(r"timestep_resampler_([1-9]\d*)x([1-9]\d*)")


def _modulate(x: Tensor, shift_and_scale: Tensor) -> Tensor:
    shift, scale = shift_and_scale.chunk(2, dim=-1)
    return x * (1 + scale) + shift


def _token_width(cross_attention_dim: int | Sequence[int]) -> int:
    widths = {cross_attention_dim} if isinstance(cross_attention_dim, int) else set(cross_attention_dim)
    if len(widths) > 1:
        raise ValueError(f"the UNet's blocks read tokens of the widths {sorted(widths)}: a connector gives only one")
    return widths.pop()


class AdaptiveBlock(PerceiverBlock):
    """A PerceiverBlock whose three layer norms are shifted and scaled by the timestep (AdaLN).

    AdaLN starts at zero, as in DiT (Peebles & Xie, 2023), where the block is exactly a PerceiverBlock.
    """

    def __init__(self, width: int):
        super().__init__(width)
        self.modulation = nn.Linear(width, 6 * width)

    def reset_parameters(self) -> None:
        """Initialise to the block without a timestep."""
        super().reset_parameters()
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, queries: Tensor, states: Tensor, mask: Tensor, time: Tensor | None = None) -> Tensor:
        """Refine `queries` `(batch, n, width)` from `states` `(batch, tokens, width)` at `time` `(batch|1, width)`."""
        if time is None:
            return super().forward(queries, states, mask)
        for_queries, for_states, for_mlp = self.modulation(time)[:, None].chunk(3, dim=-1)
        normed = _modulate(self.attention.norm_queries(queries), for_queries)
        states = _modulate(self.attention.norm_states(states), for_states)
        queries = queries + self.attention.attend(normed, states, mask)
        return queries + self.fc2(F.gelu(self.fc1(_modulate(self.norm(queries), for_mlp))))


class TimestepResampler(ResamplerBridge):
    """The connector of ELLA (Hu et al., 2024, section 3.2): a perceiver resampler that knows the timestep.

    `(batch, any length, input_width)` -> `(batch, tokens, width)`. The timestep moves the queries and, by AdaLN, what
    each block reads; both start at zero. So the untrained connector is a ResamplerBridge, whose trained weights it
    takes by `connector.load_state_dict(bridge.state_dict(), strict=False)`.
    """

    block = AdaptiveBlock

    def __init__(self, input_width: int, width: int, tokens: int, depth: int):
        super().__init__(input_width, width, tokens, depth)
        self.time_proj = Timesteps(_TIME_CHANNELS, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embedding = TimestepEmbedding(_TIME_CHANNELS, width)
        self.time_queries = nn.Linear(width, width)
        nn.init.zeros_(self.time_queries.weight)
        nn.init.zeros_(self.time_queries.bias)

    def forward(self, states: Tensor, timestep: Tensor | float | None = None) -> Tensor:
        """Resample the text for one denoising step.

        Args:
            states: of the text backbone, `(batch, tokens, input_width)`. Pipelines pass no mask, so a state of zeros
                is taken for padding; a text without any other gives zeros, by which stock SDXL means "no prompt".
            timestep: of the denoiser, a number, or one for each text `(batch,)`. None reads the text without one, as
                the untrained connector does at any timestep: a token loss trains that, a denoiser loss the rest.
        """
        keep = (states != 0).any(dim=-1)
        queries, time = self.queries.expand(len(states), -1, -1), None
        if timestep is not None:
            timestep = torch.as_tensor(timestep, device=states.device).reshape(-1)
            time = F.silu(self.time_embedding(self.time_proj(timestep).to(states.dtype)))
            queries = queries + self.time_queries(time)[:, None]
        projected = self.placed(states, keep)
        mask = torch.cat([keep, keep.new_ones(len(keep), self.queries.shape[0])], dim=1)[:, None, None, :]
        for block in self.blocks:
            queries = block(queries, projected, mask, time)
        return self.out_proj(self.norm(queries)) * keep.any(dim=1)[:, None, None]


class TimestepAwareUNet(UNet2DConditionModel):
    """A stock UNet that reads backbone states through a TimestepResampler; the pipeline around it stays unmodified.

    ```python
    pipe.unet = TimestepAwareUNet.from_unet(pipe.unet, encoder_width=384)
    encoder = ConditioningEncoder.from_text_encoder(text_encoder, bridge="identity", width=384)
    swap_text_encoder(pipe, encoder)
    ```

    `connector` is what is trained. A saved pipeline names this class, so loading it needs `import textcond.pipelines`.
    LoRA and IP-Adapter work as on the stock UNet, `from_pipe` needs to be told: `from_pipe(pipe, unet=pipe.unet)`. A
    ControlNet does not work: it reads the states without the connector.
    """

    _no_split_modules = [*UNet2DConditionModel._no_split_modules, "TimestepResampler"]  # noqa: RUF012 - as diffusers

    @classmethod
    def from_unet(
        cls, unet: UNet2DConditionModel, encoder_width: int, *, tokens: int = 64, depth: int = 6, seed: int = 0
    ) -> TimestepAwareUNet:
        """Put an untrained connector before the very modules of a stock UNet; both share them from then on, LoRA too.

        Args:
            unet: of any Stable Diffusion 1.x, 2.x or XL pipeline.
            encoder_width: width of the states that the text encoder gives; of both encoders together in SDXL.
            tokens: how many tokens the UNet's cross-attention reads.
            depth: blocks of the connector.
            seed: of the connector's initial weights.

        Raises:
            ValueError: if the UNet already maps what it reads, or its blocks read different widths.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            connector = TimestepResampler(encoder_width, _token_width(unet.config.cross_attention_dim), tokens, depth)
        return cls._join(unet, connector)

    @classmethod
    def with_connector(cls, unet: UNet2DConditionModel, file: str | Path) -> TimestepAwareUNet:
        """Put a connector that `save_connector` wrote before the very modules of a stock UNet, as `from_unet` does.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if it is damaged or holds no connector, or one for another width than the UNet reads.
        """
        file = Path(file).expanduser()
        if not file.is_file():
            raise FileNotFoundError(f"no file {file}: give one that TimestepAwareUNet.save_connector wrote")
        weights = read_tensors(file)
        depth = sum(name.startswith("blocks.") and name.endswith(".modulation.bias") for name in weights)
        if not depth or not {"queries", "proj_in.weight"} <= weights.keys():
            raise ValueError(f"{file} holds no connector: give one that TimestepAwareUNet.save_connector wrote")
        (tokens, width), expected = weights["queries"].shape, _token_width(unet.config.cross_attention_dim)
        if width != expected:
            raise ValueError(f"the connector in {file} gives {width}-wide tokens, the UNet reads {expected}: train one")
        with init_empty_weights():
            connector = TimestepResampler(weights["proj_in.weight"].shape[1], width, tokens, depth)
        connector.load_state_dict(weights, assign=True)
        return cls._join(unet, connector)

    def stock_unet(self) -> UNet2DConditionModel:
        """The UNet without its connector; both share every other module."""
        with init_empty_weights():
            model = UNet2DConditionModel.from_config(self.config, encoder_hid_dim=None, encoder_hid_dim_type=None)
        _take_modules(model, self)
        return model.train(self.training)

    def save_connector(self, file: str | Path) -> None:
        """Write the connector alone as safetensors: a small file beside an encoder, for anyone's copy of the UNet."""
        write_tensors(Path(file), self.connector.state_dict())

    @classmethod
    def _join(cls, unet: UNet2DConditionModel, connector: TimestepResampler) -> TimestepAwareUNet:
        unet = unwrap_module(unet)  # of torch.compile
        if unet.config.encoder_hid_dim_type is not None:
            raise ValueError(
                f"this UNet already maps its text by {unet.config.encoder_hid_dim_type!r}: pass a UNet without a map"
            )
        (tokens, _), depth = connector.queries.shape, len(connector.blocks)
        kind, width = _KIND.format(tokens=tokens, depth=depth), connector.proj_in.in_features
        with init_empty_weights():
            model = cls.from_config(unet.config, encoder_hid_dim=width, encoder_hid_dim_type=kind)
        _take_modules(model, unet)
        model.connector = connector.to(unet.device, unet.dtype)
        return model.train(unet.training)

    def _set_encoder_hid_proj(
        self, encoder_hid_dim_type: str | None, cross_attention_dim: int | tuple[int, ...], encoder_hid_dim: int | None
    ) -> None:
        kind = _KIND_PATTERN.fullmatch(encoder_hid_dim_type or "")
        if kind is None or encoder_hid_dim is None:
            raise ValueError(
                f"encoder_hid_dim={encoder_hid_dim}, encoder_hid_dim_type={encoder_hid_dim_type!r} describe no "
                "timestep-aware connector: load the UNet as UNet2DConditionModel and use TimestepAwareUNet.from_unet"
            )
        tokens, depth = map(int, kind.groups())
        # Beside `encoder_hid_proj`, which belongs to IP-Adapter once that is loaded.
        self.encoder_hid_proj = None
        self.connector = TimestepResampler(encoder_hid_dim, _token_width(cross_attention_dim), tokens, depth)

    # Tools bind the arguments of a call to the names in the stock signature.
    @wraps(UNet2DConditionModel.forward)
    def forward(
        self, sample: Tensor, timestep: Tensor | float, encoder_hidden_states: Tensor, *args: Any, **kwargs: Any
    ) -> UNet2DConditionOutput | tuple[Tensor]:
        """Denoise as the stock UNet does, under what the connector reads of the text at this timestep."""
        return super().forward(sample, timestep, self.connector(encoder_hidden_states, timestep), *args, **kwargs)


def _take_modules(model: UNet2DConditionModel, unet: UNet2DConditionModel) -> None:
    for name, module in unet.named_children():
        if name != "connector":
            setattr(model, name, module)
    # Names of the adapters in those modules.
    for name in ("peft_config", "_hf_peft_config_loaded"):
        if hasattr(unet, name):
            setattr(model, name, getattr(unet, name))


def controlnet_problems(pipe: DiffusionPipeline) -> list[str]:
    """What is wrong with the ControlNet of a pipeline whose UNet has a connector."""
    unet = unwrap_module(getattr(pipe, "unet", None))
    if getattr(pipe, "controlnet", None) is None or not isinstance(unet, TimestepAwareUNet):
        return []
    return [
        "the ControlNet reads the text encoder's states without the connector of TimestepAwareUNet: put the stock UNet "
        'and an encoder with a "resampler" bridge into this pipeline, or leave the ControlNet out'
    ]


# What model_index.json names: the package, whatever file of it holds the class.
TimestepAwareUNet.__module__ = "textcond.pipelines"
