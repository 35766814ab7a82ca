"""What decides an alignment, saved beside the weights."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from textcond.bridges import BRIDGES, LAYERS


@dataclass
class AlignmentOptions:
    """Options of `align`.

    Attributes:
        slot: which encoder is replaced; None for all that one encoder can stand for.
        bridge: "resampler", or "linear" or "mlp", which keep the length; "timestep" for a TimestepAwareUNet's, which is
            saved beside the encoder; None for what the slot needs.
        bridge_depth: blocks of a resampler.
        tokens: that the denoiser gets; None for as many as it gets now.
        layers: "last", or "average" for a learned average of the backbone's layers.
        lora_rank: of an adapter on the backbone, merged at the end; 0 for none.
        train_backbone: train the layers of the backbone too, which a small one needs; its embeddings stay. Without this
            and without an adapter the backbone, and so retrieval, is untouched.
        retrieval_weight: of the loss that holds a changing backbone to the vectors that it gave of the anchors before;
            see `Anchor`.
        closed_form_prompts: texts of step 0, the ridge regression of the bridge's last layer; 0 leaves it out.
        token_steps: steps of the loss between token states; 0 leaves the stage out.
        denoiser_steps: steps of the loss between the denoiser's outputs; 0 leaves the stage out.
        batch_size: texts of a step of the token loss, over all processes.
        denoiser_batch_size: texts of a step of the denoiser loss, over all processes.
        num_inference_steps: of the teacher's trajectories, each latent of which is one question.
        guidance_scale: range from which a trajectory's guidance is drawn.
        call: further arguments of the pipeline's call when the teacher samples, such as height and width.
        token_weight: of the distance between token states, position by position.
        attention_weight: of the loss between the outputs of the denoiser's cross-attention.
        empty_weight: of the empty prompt in the token loss.
        contrast_weight: of InfoNCE in the token loss.
        picture_weight: of the denoiser's own loss on captioned pictures, where there are some.
        learning_rate: of the bridge's matrices, by Muon; the rest learns by AdamW, at 1e-3 or at this if it is less.
        denoiser_learning_rate: the same in the denoiser stage. At the token stage's rate it undoes some of what that
            has reached.
        held_out: teacher texts that are kept out of training; the best weights by them are kept.
        validate_every: steps between scores on them.
        patience: scores in a row without a better one that end a stage; None for never.
        mixed_precision: "no" or "bf16", of encoder and denoiser; the trained weights stay float32.
        cache_limit: gigabytes of disk for the teacher's states.
        seed: of everything random.
        save_every: seconds between checkpoints.
    """

    slot: str | None = None
    bridge: str | None = None
    bridge_depth: int = 2
    tokens: int | None = None
    layers: str = "last"
    lora_rank: int = 0
    train_backbone: bool = False
    retrieval_weight: float = 1.0
    closed_form_prompts: int = 4096
    token_steps: int = 2000
    denoiser_steps: int = 500
    batch_size: int = 64
    denoiser_batch_size: int = 16
    num_inference_steps: int = 8
    guidance_scale: tuple[float, float] = (2.0, 5.0)
    call: dict[str, Any] = field(default_factory=dict)
    token_weight: float = 1.0
    attention_weight: float = 1.0
    empty_weight: float = 0.1
    contrast_weight: float = 0.1
    picture_weight: float = 0.1
    learning_rate: float = 4e-3
    denoiser_learning_rate: float = 1e-4
    held_out: int = 64
    validate_every: int = 250
    patience: int | None = None
    mixed_precision: str = "no"
    cache_limit: float = 20.0
    seed: int = 0
    save_every: float = 180.0

    def __post_init__(self):
        low, high = self.guidance_scale
        if not 1 <= low <= high < math.inf:
            raise ValueError(f"guidance_scale={low},{high}: give a range from 1 upwards, such as 2,5")
        if self.bridge not in (None, "timestep", *BRIDGES):
            raise ValueError(f"bridge={self.bridge!r}: use {', '.join(BRIDGES)} or timestep")
        if self.layers not in LAYERS:
            raise ValueError(f"layers={self.layers!r}: use {' or '.join(LAYERS)}")
        if self.mixed_precision not in ("no", "bf16"):
            raise ValueError(f"mixed_precision={self.mixed_precision!r}: use no or bf16")
        if self.lora_rank and self.train_backbone:
            raise ValueError("lora_rank and train_backbone both change the backbone: give one of them")
        for name in ("learning_rate", "denoiser_learning_rate"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)}: give a positive number, such as 1e-3")
        for name in ("token_steps", "denoiser_steps", "closed_form_prompts", "lora_rank", "cache_limit", "seed"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)}: give 0 or more")
        positive = ("batch_size", "denoiser_batch_size", "num_inference_steps", "held_out", "validate_every")
        for name in (*positive, "bridge_depth", "tokens", "patience"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: give 1 or more")

    def to_dict(self) -> dict[str, Any]:
        """The options as JSON values."""
        return asdict(self) | {"guidance_scale": list(self.guidance_scale)}
