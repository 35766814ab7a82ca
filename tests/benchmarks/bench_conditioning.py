"""Time and memory of one conditioning forward: ConditioningEncoder against the stock CLIP encoder of the same size.

Both encode what one guided Stable Diffusion 1.x picture needs: a prompt and the empty negative prompt, padded to 77
tokens, 768 wide, from a backbone of 12 layers. Random weights. Each row runs in its own process.

    python tests/benchmarks/bench_conditioning.py
"""

import multiprocessing
import resource
import time

import torch
import transformers
from rich.console import Console
from rich.table import Table

from textcond import ConditioningEncoder, ConditioningEncoderConfig
from textcond.bridges import BRIDGES

SIZE = {
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 77,
}
LENGTH, PAD, RUNS = 77, 0, 7
PEER = "stock CLIPTextModel"


def build(name: str) -> torch.nn.Module:
    """The encoder of a row."""
    if name == PEER:
        return transformers.CLIPTextModel(transformers.CLIPTextConfig(**SIZE)).eval()
    family, bridge = name.split(" + ")
    config = {"BERT": transformers.BertConfig, "CLIP": transformers.CLIPTextConfig}[family](**SIZE)
    return ConditioningEncoder(
        ConditioningEncoderConfig(
            text_config=config,
            backbone_class=f"{'Bert' if family == 'BERT' else 'CLIPText'}Model",
            bridge=bridge,
            tokens=LENGTH if bridge == "resampler" else None,
            pad_token_id=PAD,
        )
    ).eval()


def token_ids(words: int) -> torch.Tensor:
    """A prompt of so many tokens and an empty one, `(2, 77)`; padding is token 0, ends are token 49407."""
    ids = torch.full((2, LENGTH), PAD)
    ids[0, :words] = torch.arange(1, words + 1)
    ids[1, :2] = 1
    ids[0, words - 1] = ids[1, 1] = SIZE["vocab_size"] - 1
    return ids


def peak_mb() -> float:
    """Largest resident size of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(name: str, answers) -> None:
    """Put `(parameters, CPU ms of a short prompt, of a full one, MB over the imports)` of a row into a queue."""
    torch.set_num_threads(1)
    before = peak_mb()
    encoder = build(name)
    times = []
    with torch.inference_mode():
        for words in (12, LENGTH):
            ids, runs = token_ids(words), []
            encoder(ids)
            for _ in range(RUNS):
                start = time.process_time()
                encoder(ids)
                runs.append(1000 * (time.process_time() - start))
            times.append(min(runs))
    answers.put((sum(p.numel() for p in encoder.parameters()), *times, peak_mb() - before))


def main() -> None:
    """Measure every row and print the table."""
    context = multiprocessing.get_context("spawn")
    table = Table(title="one conditioning forward, batch 2, float32, CPU time of one thread")
    columns = ("encoder", "parameters", "12 tokens", "/ peer", "77 tokens", "/ peer", "peak memory", "/ peer")
    for column in columns:
        table.add_column(column, justify="left" if column == "encoder" else "right", no_wrap=True)
    peer = None
    for name in (PEER, *(f"{family} + {bridge}" for family in ("BERT", "CLIP") for bridge in BRIDGES)):
        answers = context.Queue()
        process = context.Process(target=measure, args=(name, answers))
        process.start()
        row = answers.get()
        process.join()
        peer = peer or row
        parameters, short, full, memory = row
        cells = []
        for value, theirs, unit in ((short, peer[1], "ms"), (full, peer[2], "ms"), (memory, peer[3], "MB")):
            cells += [f"{value:.0f} {unit}", f"{value / theirs:.2f}"]
        table.add_row(name, f"{parameters / 1e6:.0f}M", *cells)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
