import pytest
import torch

from textcond.bridges import (
    BRIDGES,
    GrowingResamplerBridge,
    LayerAverage,
    PooledBridge,
    ResamplerBridge,
    build_bridge,
)


def make(kind: str, input_width=48, width=64, tokens=7, depth=2):
    torch.manual_seed(0)
    return build_bridge(kind, input_width, width, tokens, depth)


def states(batch=3, tokens=11, width=48):
    return torch.randn(batch, tokens, width, generator=torch.Generator().manual_seed(1)) * 5 + 2


def keep_first(lengths, tokens=11):
    return torch.arange(tokens) < torch.tensor(lengths)[:, None]


@pytest.mark.parametrize("kind", BRIDGES)
def test_untrained_output_has_the_unit_variance_of_clips_final_layer_norm(kind):
    output = make(kind)(states(batch=16), keep_first([11] * 16))
    assert output.shape == (16, 7 if kind == "resampler" else 11, 64)
    assert 0.85 < output.std() < 1.15
    assert output.mean().abs() < 0.2


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_length_preserving_bridges_map_each_token_by_itself(kind):
    bridge, x = make(kind), states()
    whole = bridge(x, keep_first([11, 11, 11]))
    assert torch.allclose(bridge(x[:, 4:5], keep_first([1, 1, 1], 1)), whole[:, 4:5], atol=1e-5)


def test_resampler_is_blind_to_masked_states_and_to_the_amount_of_padding():
    bridge, x = make("resampler"), states()
    keep = keep_first([3, 11, 5])
    output = bridge(x, keep)
    spoiled = torch.where(keep[..., None], x, torch.full_like(x, 1e4))
    assert torch.equal(bridge(spoiled, keep), output)
    longer = torch.cat([x, torch.randn(3, 9, 48)], dim=1)
    assert torch.allclose(bridge(longer, keep_first([3, 11, 5], 20)), output, atol=1e-5)
    x.requires_grad_()
    bridge(x, keep).sum().backward()
    assert x.grad[~keep].abs().max() == 0
    assert x.grad[keep].abs().sum() > 0


def test_growing_resampler_reads_every_state_into_a_power_of_two_of_blocks():
    bridge = GrowingResamplerBridge(24, 32, tokens=6, depth=2, chunk=5)
    for length, blocks in ((1, 1), (5, 1), (6, 2), (10, 2), (11, 4), (15, 4), (21, 8)):
        states, keep = torch.randn(1, length, 24, requires_grad=True), torch.ones(1, length, dtype=torch.bool)
        tokens = bridge(states, keep)
        assert tokens.shape == (1, blocks * 6, 32)
        tokens.square().sum().backward()
        assert (states.grad.abs().sum(dim=-1) > 0).all()
        if blocks == 1:
            assert torch.equal(tokens, ResamplerBridge.forward(bridge, states, keep))


def test_growing_resampler_repeats_the_blocks_of_shorter_texts():
    bridge = GrowingResamplerBridge(24, 32, tokens=6, depth=2, chunk=5)
    states, lengths = torch.randn(3, 16, 24), torch.tensor([3, 9, 16])
    together = bridge(states, torch.arange(16) < lengths[:, None])
    assert together.shape == (3, 24, 32)
    for i, (length, repeats) in enumerate(((3, 4), (9, 2), (16, 1))):
        alone = bridge(states[i : i + 1, :length], torch.ones(1, length, dtype=torch.bool))
        assert torch.allclose(together[i], alone[0].repeat(repeats, 1), atol=1e-5)
    asked = bridge(states[:1, :3], torch.ones(1, 3, dtype=torch.bool), 8)
    assert torch.allclose(asked, together[:1].repeat(1, 2, 1), atol=1e-5)
    assert [bridge.blocks_in(tokens) for tokens in (6, 24, 18, 25, 3)] == [1, 4, None, None, None]


def test_untrained_resampler_tells_texts_apart():
    bridge = make("resampler")
    one, other = bridge(states()[:1], keep_first([11])), bridge(states()[1:2], keep_first([11]))
    assert (one - other).std() > 0.2


def test_an_untrained_query_reads_the_states_around_its_place():
    torch.manual_seed(0)
    bridge = ResamplerBridge(48, 256, tokens=12, depth=1)
    attention = bridge.blocks[0].attention
    placed = attention.norm_states(bridge.placed(torch.randn(64, 12, 48), torch.ones(64, 12, dtype=torch.bool)))
    q = attention.split(attention.q_proj(attention.norm_queries(bridge.queries)[None]))
    k = attention.split(attention.k_proj(placed))
    logits = (q @ k.transpose(-1, -2)).mean((0, 1))
    distance = (torch.arange(12)[:, None] - torch.arange(12)).abs()
    near, middle, far = (
        logits[(low <= distance) & (distance < high)].mean() for low, high in ((0, 2), (3, 5), (8, 12))
    )
    assert near > middle + 0.5
    assert middle > far


@pytest.mark.parametrize("kind", BRIDGES)
def test_every_bridge_has_a_projection_that_diffusers_recognises_in_a_lora_file(kind):
    names = [name.rsplit(".", 1)[-1] for name, module in make(kind).named_modules() if not list(module.children())]
    assert {"q_proj", "k_proj", "v_proj", "out_proj"} & set(names)


def test_pooled_bridge_gives_unit_variance():
    output = PooledBridge(48, 256)(states(batch=64)[:, 0])
    assert output.shape == (64, 256)
    assert 0.85 < output.std() < 1.15


def test_layer_average_starts_as_the_mean_of_normalised_layers_and_can_prefer_one():
    average = LayerAverage(3)
    layers = tuple(states() * scale for scale in (1, 100, 0.01))
    normalised = [torch.nn.functional.layer_norm(layer, (48,)) for layer in layers]
    assert torch.allclose(average(layers), sum(normalised) / 3, atol=1e-5)
    with torch.no_grad():
        average.logits[2] = 50
    assert torch.allclose(average(layers), normalised[2], atol=1e-5)


def test_odd_widths_get_heads_that_divide_them():
    assert make("resampler", width=192 + 2)(states(), keep_first([3, 2, 1])).shape == (3, 7, 194)


def test_errors_name_the_value_and_the_mend():
    with pytest.raises(ValueError, match=r"'cubic'.*linear, mlp, resampler"):
        build_bridge("cubic", 8, 8, 4, 1)
    with pytest.raises(ValueError, match="pass tokens=77"):
        build_bridge("resampler", 8, 8, None, 1)
