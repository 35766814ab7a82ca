"""Time of a picture and parameters of each way from a text encoder to the reference model's UNet.

The reference model draws the same guided pictures with its own encoder and with one of the same size (random weights:
time does not depend on them) behind each bridge, or behind the connector of a TimestepAwareUNet, which runs at every
step. The resamplers have ELLA's 6 blocks (Hu et al., 2024). Rounds go through all rows in turn, so that a busy machine
slows all alike; the fastest round counts.

    python tests/benchmarks/bench_connectors.py
"""

import time

import diffusers
import torch
import transformers
from rich.console import Console
from rich.table import Table

from textcond import ConditioningEncoder, TextEncoder, TextEncoderConfig
from textcond.bridges import BRIDGES
from textcond.pipelines import TimestepAwareUNet, load_reference, swap_text_encoder

PROMPT, STEPS, GUIDANCE, ROUNDS, DEPTH = "a red fox in winter", 20, 4.0, 3, 6
ORIGINAL, AWARE = "original", "timestep-aware resampler"


def build(name: str):
    """The reference pipeline of a row, and how many parameters lie between backbone and UNet."""
    pipe = load_reference()
    pipe.set_progress_bar_config(disable=True)
    if name == ORIGINAL:
        return pipe, 0
    native, width = pipe.text_encoder.config, pipe.unet.config.cross_attention_dim
    backbone = transformers.CLIPTextModel(native)
    tokens = pipe.tokenizer.model_max_length
    encoder = TextEncoder(backbone, pipe.tokenizer, TextEncoderConfig(pooling="eos", max_length=tokens))
    conditioning = ConditioningEncoder.from_text_encoder(
        encoder,
        bridge="identity" if name == AWARE else name,
        width=native.hidden_size if name == AWARE else width,
        tokens=tokens,
        bridge_depth=DEPTH,
    )
    between = conditioning.bridge
    if name == AWARE:
        pipe.unet = TimestepAwareUNet.from_unet(pipe.unet, native.hidden_size, tokens=tokens, depth=DEPTH)
        between = pipe.unet.connector
    swap_text_encoder(pipe, conditioning)
    return pipe, sum(parameter.numel() for parameter in between.parameters())


def seconds(pipe) -> float:
    """CPU time of one guided picture."""
    start = time.process_time()
    pipe(PROMPT, num_inference_steps=STEPS, guidance_scale=GUIDANCE, generator=torch.Generator().manual_seed(0))
    return time.process_time() - start


def main() -> None:
    """Measure every row and print the table."""
    torch.set_num_threads(1)
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    names = (ORIGINAL, *BRIDGES, AWARE)
    pipes = {name: build(name) for name in names}
    times: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(ROUNDS + 1):
        for name, (pipe, _) in pipes.items():
            times[name].append(seconds(pipe))
    # The first round warms up.
    best = {name: min(values[1:]) for name, values in times.items()}
    table = Table(title=f"one picture, {STEPS} steps, guidance {GUIDANCE}, float32, CPU time of one thread")
    for column in ("encoder to UNet", "parameters", "time", "/ original"):
        table.add_column(column, justify="left" if column == "encoder to UNet" else "right", no_wrap=True)
    for name in names:
        parameters = f"{pipes[name][1] / 1e6:.2f}M"
        table.add_row(name, parameters, f"{best[name]:.2f} s", f"{best[name] / best[ORIGINAL]:.3f}")
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
