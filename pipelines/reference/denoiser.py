"""Stage "denoiser": a text-conditioned UNet on the autoencoder's latents."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import AutoencoderTiny, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import nn
from tqdm import tqdm
from transformers import CLIPTextModel, CLIPTokenizer

from textcond.folders import atomic_folder
from textcond.pipelines.loop import fit, share, step_generator

from .data import COLOURS, ReferenceData, is_held_out, sample_caption

LATENT_SIZE = 16


@dataclass
class DenoiserRecipe:
    """Options of the stage. `concepts` limits the vocabulary to a prefix of the curriculum."""

    concepts: int = 300
    channels: tuple[int, ...] = (96, 192, 256)
    layers: int = 1
    steps: int = 3100
    batch: int = 64
    learning_rate: float = 1e-3
    decay: float = 0.3
    ema: float = 0.998
    empty_captions: float = 0.1
    min_snr: float = 5.0
    seed: int = 2


def new_denoiser(recipe: DenoiserRecipe, latent_channels: int, text_width: int) -> UNet2DConditionModel:
    """An untrained UNet: convolutions at 16x16, cross-attention at 8x8 and 4x4."""
    return UNet2DConditionModel(
        sample_size=LATENT_SIZE,
        in_channels=latent_channels,
        out_channels=latent_channels,
        block_out_channels=recipe.channels,
        layers_per_block=recipe.layers,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=text_width,
        attention_head_dim=32,
    )


def new_scheduler() -> DDIMScheduler:
    """v-prediction with zero terminal SNR and trailing timesteps (Lin et al., 2023)."""
    return DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=1,  # without effect on trailing steps; diffusers warns about any other value
    )


@torch.inference_mode()
def encode_latents(data: ReferenceData, rows: list[int], vae: AutoencoderTiny, out: Path) -> np.ndarray:
    """Scaled latents of every row on every colour, `(rows, colours, c, 16, 16)` float16, cached at `out`."""
    if out.is_file():
        return np.load(out, mmap_mode="r")
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name("partial-" + out.name)
    shape = (len(rows), len(COLOURS), vae.config.latent_channels, LATENT_SIZE, LATENT_SIZE)
    latents = np.lib.format.open_memmap(partial, mode="w+", dtype=np.float16, shape=shape)
    for index, row in enumerate(tqdm(rows, desc="latents", unit="drawing", mininterval=5)):
        pixels = data.composite([row] * len(COLOURS), list(COLOURS))
        latents[index] = (vae.encoder(pixels) * vae.config.scaling_factor).numpy()
    latents.flush()
    partial.rename(out)
    return np.load(out, mmap_mode="r")


class TextStates:
    """The frozen text encoder's states, as a pipeline gives them to the UNet, with a cache of recurring captions."""

    def __init__(self, text_model: CLIPTextModel, tokenizer: CLIPTokenizer, limit: int = 20000):
        self.text_model, self.tokenizer, self.limit = text_model.eval(), tokenizer, limit
        self.cache: dict[str, torch.Tensor] = {}

    @torch.no_grad()
    def __call__(self, captions: list[str]) -> torch.Tensor:
        """Captions -> `(b, tokens, width)` float32, padded to the tokenizer's length."""
        missing = list(dict.fromkeys(text for text in captions if text not in self.cache))
        found: dict[str, torch.Tensor] = {}
        if missing:
            ids = self.tokenizer(missing, padding="max_length", truncation=True, return_tensors="pt").input_ids
            found = dict(zip(missing, self.text_model(ids)[0].half()))
            if len(self.cache) + len(found) <= self.limit:
                self.cache |= {text: states.clone() for text, states in found.items()}
        return torch.stack([found[text] if text in found else self.cache[text] for text in captions]).float()


def train_denoiser(
    data: ReferenceData,
    vae_folder: Path,
    clip_folder: Path,
    out: Path,
    recipe: DenoiserRecipe,
    accelerator: Accelerator,
) -> Path:
    """Train the UNet on the frozen autoencoder and text encoder; save the whole pipeline as `out/pipeline`."""
    torch.manual_seed(recipe.seed)
    vae = AutoencoderTiny.from_pretrained(vae_folder).eval()
    text_model = CLIPTextModel.from_pretrained(clip_folder / "text_encoder", dtype=torch.float32)
    tokenizer = CLIPTokenizer.from_pretrained(clip_folder / "tokenizer")
    rows = data.rows(concepts=recipe.concepts)
    with accelerator.main_process_first():
        latents = encode_latents(data, rows, vae, out / f"latents-{recipe.concepts}.npy")
    states = TextStates(text_model, tokenizer)
    scheduler = new_scheduler()
    alphas = scheduler.alphas_cumprod
    unet = new_denoiser(recipe, vae.config.latent_channels, text_model.config.hidden_size)
    by_concept: dict[int, list[int]] = {}
    for index, row in enumerate(rows):
        by_concept.setdefault(data.icons[row][0], []).append(index)
    names = list(COLOURS)
    shown = {  # the colours on which a drawing is trained; the rest of the combinations are held out
        index: [c for c, name in enumerate(names)
                if not is_held_out(data.concepts[data.icons[row][0]].name, data.icons[row][1], name)]
        for index, row in enumerate(rows)
    }  # fmt: skip
    mine = share(accelerator, recipe.batch)
    shape = (recipe.batch, *latents.shape[2:])

    def loss(prepared: nn.Module, step: int) -> tuple[torch.Tensor, dict[str, float]]:
        generator, rng = step_generator(recipe.seed, step), np.random.default_rng([recipe.seed, step])
        clean, captions = [], []
        for _ in range(recipe.batch):
            index = int(rng.choice(by_concept[int(rng.integers(len(by_concept)))]))
            concept, style = data.icons[rows[index]]
            # Half on white: that is what a prompt without a colour gets.
            colour = 0 if rng.random() < 0.5 else int(rng.choice(shown[index]))
            clean.append(latents[index, colour])
            text = sample_caption(data.concepts[concept], style, names[colour], rng)
            captions.append("" if rng.random() < recipe.empty_captions else text)
        # Stratified timesteps: one in each slice of the schedule, so that the loss of a batch varies less.
        spread = (torch.arange(recipe.batch) + torch.rand(recipe.batch, generator=generator)) / recipe.batch
        timesteps = (spread[torch.randperm(recipe.batch, generator=generator)] * 1000).long().clamp(0, 999)[mine]
        noise = torch.randn(shape, generator=generator)[mine]
        sample = torch.from_numpy(np.stack(clean[mine])).float()
        alpha = alphas[timesteps][:, None, None, None]
        noisy = alpha.sqrt() * sample + (1 - alpha).sqrt() * noise
        velocity = alpha.sqrt() * noise - (1 - alpha).sqrt() * sample
        output = prepared(noisy, timesteps, states(captions[mine])).sample.float()
        # Min-SNR (Hang et al., 2023), shifted by one: the error of the picture counts min(SNR, gamma) + 1 times, so
        # that it still counts at zero terminal SNR, where sampling starts and the text decides the subject.
        snr = alpha / (1 - alpha).clamp_min(1e-8)
        weight = ((snr.clamp(max=recipe.min_snr) + 1) / (snr + 1)).flatten()
        error = (output - velocity).square().flatten(1).mean(1)
        return (weight * error).mean(), {"velocity": error.detach().mean().item()}

    average = fit(
        "denoiser", unet, loss, out=out, steps=recipe.steps, batch=recipe.batch, decay=recipe.decay, ema=recipe.ema,
        learning_rate=recipe.learning_rate, weight_decay=0.01, bf16=True, accelerator=accelerator,
    )  # fmt: skip
    if accelerator.is_main_process:
        unet.load_state_dict(average)
        save_pipeline(out / "pipeline", vae, text_model, tokenizer, unet)
    accelerator.wait_for_everyone()
    return out / "pipeline"


def save_pipeline(
    folder: Path,
    vae: AutoencoderTiny,
    text_model: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    unet: UNet2DConditionModel,
) -> None:
    """Write an ordinary Stable Diffusion folder in float32."""
    pipe = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_model,
        tokenizer=tokenizer,
        unet=unet.eval(),
        scheduler=new_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    with atomic_folder(folder, owned=("*",)) as partial:
        pipe.save_pretrained(partial)
