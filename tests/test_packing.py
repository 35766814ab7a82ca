import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F
from torch import nn

from textcond import ConditioningEncoder, onednn, packing
from textcond.onednn import OneDnnLinear
from textcond.packing import can_pack, packed_states

FAMILIES = ["bert", "roberta", "xlm-roberta", "electra", "llama", "mistral", "qwen2"]
TEXTS = [*tiny.PROMPTS, "the dog", "fox", "a <pad> b", "a fox , the dog . " * 8]


def padded(encoder, texts):
    """Token ids of texts, longest first, and the lengths."""
    inputs = encoder.tokenize(sorted(texts, key=lambda text: -len(encoder.tokenizer(text).input_ids)))
    return inputs, inputs["attention_mask"].sum(1).tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_states_and_gradients_are_those_of_padded_texts(family):
    encoder = tiny.text_encoder(family)
    backbone = encoder.backbone
    inputs, lengths = padded(encoder, TEXTS)
    assert can_pack(backbone, lengths[0])
    mask = inputs["attention_mask"].bool().unsqueeze(-1)
    weights = torch.randn(*mask.shape[:2], backbone.config.hidden_size, generator=torch.Generator().manual_seed(0))
    gradients = []
    states = []
    for row in (packed_states(backbone, inputs["input_ids"], lengths), backbone(**inputs).last_hidden_state):
        states.append(torch.where(mask, row, 0))
        named = {name: p for name, p in backbone.named_parameters() if "pooler" not in name}
        gradients.append(dict(zip(named, torch.autograd.grad((states[-1] * weights).sum(), list(named.values())))))
    assert torch.allclose(states[0], states[1], atol=2e-6)
    largest = max(gradient.abs().max() for gradient in gradients[1].values())
    for name, gradient in gradients[1].items():
        # a key bias has no gradient but rounding: all scores of a query move alike
        assert torch.allclose(gradients[0][name], gradient, rtol=1e-4, atol=1e-6 * float(largest)), name


def test_texts_that_share_a_row_do_not_see_each_other():
    encoder = tiny.text_encoder("bert")
    inputs, lengths = padded(encoder, ["the dog and", "the fox", "a cat"])
    before = packed_states(encoder.backbone, inputs["input_ids"], lengths)
    inputs["input_ids"][1, 2] += 1
    after = packed_states(encoder.backbone, inputs["input_ids"], lengths)
    assert (after[1] - before[1]).abs().max() > 1e-3
    assert torch.equal(after[[0, 2]], before[[0, 2]])


def test_dropout_is_active_in_training_and_follows_the_seed():
    encoder = tiny.text_encoder("bert").train()
    rows = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        rows.append(encoder.features(TEXTS).dense.detach())
    assert torch.equal(rows[0], rows[1])
    assert (rows[0] - rows[2]).abs().max() > 1e-3
    assert (rows[0] - encoder.eval().features(TEXTS).dense).abs().max() > 1e-3


def test_dropout_of_attention_alone_is_active_too():
    encoder = tiny.text_encoder("bert").train()
    for module in encoder.backbone.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    plain = encoder.features(TEXTS).dense
    for layer in encoder.backbone.encoder.layer:
        layer.attention.self.dropout.p = 0.5
    assert (encoder.features(TEXTS).dense - plain).abs().max() > 1e-3


@pytest.mark.parametrize("family", ["t5", "mpnet", "clip"])
def test_backbones_that_are_not_known_are_padded(family):
    assert not can_pack(tiny.text_encoder(family).backbone, 5)


def test_what_would_change_the_result_is_padded():
    backbone = tiny.text_encoder("bert").backbone
    assert can_pack(backbone, 5)
    backbone.train().gradient_checkpointing_enable()  # recomputes attention after the packed call has ended
    assert not can_pack(backbone, 5)
    assert can_pack(backbone.eval(), 5)
    backbone.set_attn_implementation("eager")
    assert not can_pack(backbone, 5)
    mistral = tiny.text_encoder("mistral").backbone
    mistral.config.sliding_window = 8
    assert can_pack(mistral, 8)
    assert not can_pack(mistral, 9)


def test_an_error_in_a_packed_call_leaves_the_backbone_as_it_was(monkeypatch):
    encoder = tiny.text_encoder("bert")
    expected = encoder.features(TEXTS).dense
    with monkeypatch.context() as patch:
        patch.setattr(packing, "_position_ids", lambda backbone, ids: torch.full_like(ids, 10_000))
        with pytest.raises((IndexError, RuntimeError)):
            encoder.features(TEXTS)
    assert encoder.backbone.config._attn_implementation == "sdpa"
    assert torch.equal(encoder.features(TEXTS).dense, expected)


@pytest.mark.parametrize("bias", [True, False])
def test_onednn_gives_the_linear_layer_and_its_gradients(monkeypatch, bias):
    monkeypatch.setattr(onednn, "SMALLEST", 1)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    torch.manual_seed(0)
    layer = nn.Linear(48, 32, bias=bias)
    rows = torch.randn(3, 40, 48, requires_grad=True)
    wanted = torch.randn(3, 40, 32)
    leaves = [rows, *layer.parameters()]
    calls = []
    to_mkldnn = torch.Tensor.to_mkldnn
    monkeypatch.setattr(torch.Tensor, "to_mkldnn", lambda tensor: calls.append(1) or to_mkldnn(tensor))
    with OneDnnLinear():
        output = layer(rows)
        gradients = torch.autograd.grad(output, leaves, wanted)
    assert calls
    double = [leaf.detach().double().requires_grad_() for leaf in leaves]
    reference = F.linear(*double)
    assert torch.allclose(output.double(), reference, atol=1e-5)
    for gradient, expected in zip(gradients, torch.autograd.grad(reference, double, wanted.double())):
        assert torch.allclose(gradient.double(), expected, atol=1e-4)


def test_onednn_leaves_other_types_and_autocast_alone(monkeypatch):
    monkeypatch.setattr(onednn, "SMALLEST", 1)
    monkeypatch.setattr(torch.Tensor, "to_mkldnn", lambda tensor: pytest.fail("changed the layout"))
    layer = nn.Linear(48, 32)
    rows = torch.randn(4, 48)
    with OneDnnLinear(), torch.autocast("cpu", torch.bfloat16):
        assert layer(rows).dtype == torch.bfloat16
    with OneDnnLinear():
        assert layer.double()(rows.double()).dtype == torch.float64
        assert layer.bfloat16()(rows.bfloat16()).dtype == torch.bfloat16


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads the memory of a process from /proc")
def test_memory_hardly_grows_with_the_number_of_batch_shapes():
    code = """
import torch
from textcond.onednn import OneDnnLinear
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 / 2**20
weight = torch.randn(384, 384, requires_grad=True)
for rows in range(100, 400):
    before = resident() if rows == 140 else 0 if rows < 140 else before
    with OneDnnLinear():
        torch.nn.functional.linear(torch.randn(rows, 384), weight).sum().backward()
print(resident() - before)
"""
    usual = {name: value for name, value in os.environ.items() if name != "ONEDNN_PRIMITIVE_CACHE_CAPACITY"}
    usual |= {"OMP_NUM_THREADS": "1"}
    grown = [
        float(subprocess.run([sys.executable, "-c", code], env=usual | extra, check=True, capture_output=True).stdout)
        for extra in ({}, {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "1024"})
    ]
    assert grown[0] < 0.7 * grown[1]


def test_threads_may_share_an_encoder_and_its_conditioning_face():
    encoder = tiny.text_encoder("bert")
    conditioning = ConditioningEncoder.from_text_encoder(encoder, bridge="linear", width=16)
    texts = [f"a fox {'and an owl ' * (number % 5)}" for number in range(24)]
    expected = encoder.encode(texts)
    ids = conditioning.tokenizer(texts, padding="max_length", max_length=32, truncation=True, return_tensors="pt")
    with torch.no_grad():
        tokens = conditioning(**ids).last_hidden_state

        def work(number: int) -> bool:
            with torch.no_grad():
                if number % 2:
                    return bool(torch.equal(conditioning(**ids).last_hidden_state, tokens))
                return bool(np.allclose(encoder.encode(texts), expected, atol=1e-6))

        with ThreadPoolExecutor(4) as pool:
            assert all(pool.map(work, range(40)))
