import pytest
import torch

from textcond.pooling import POOLINGS, pool

STATES = torch.arange(24, dtype=torch.float32).reshape(2, 4, 3)
RIGHT = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
LEFT = RIGHT.flip(1)


@pytest.mark.parametrize(("mask", "first", "last"), [(RIGHT, (0, 0), (2, 1)), (LEFT, (1, 2), (3, 3))])
def test_cls_and_last_are_the_ends_of_the_text_with_either_padding(mask, first, last):
    rows = torch.arange(2)
    assert torch.equal(pool(STATES, mask, "cls"), STATES[rows, list(first)])
    assert torch.equal(pool(STATES, mask, "last"), STATES[rows, list(last)])


@pytest.mark.parametrize("mask", [RIGHT, LEFT])
def test_mean_and_max_read_attended_tokens_only(mask):
    expected_mean = torch.stack([row[keep.bool()].mean(0) for row, keep in zip(STATES, mask)])
    expected_max = torch.stack([row[keep.bool()].amax(0) for row, keep in zip(STATES, mask)])
    poisoned = STATES.masked_fill(~mask.bool().unsqueeze(-1), float("nan"))
    assert torch.allclose(pool(poisoned, mask, "mean"), expected_mean)
    assert torch.equal(pool(STATES.masked_fill(~mask.bool().unsqueeze(-1), 1e9), mask, "max"), expected_max)


def test_max_of_negative_states_is_not_the_zero_of_padding():
    assert torch.equal(pool(-STATES - 1, RIGHT, "max"), -STATES[:, 0] - 1)


def test_eos_is_the_first_end_of_text_even_where_padding_repeats_it():
    ids = torch.tensor([[5, 6, 9, 9], [5, 9, 9, 9]])
    everything = torch.ones_like(ids)
    picked = pool(STATES, everything, "eos", input_ids=ids, eos_token_id=9)
    assert torch.equal(picked, STATES[[0, 1], [2, 1]])


def test_eos_ignores_end_of_text_in_left_padding():
    ids = torch.tensor([[9, 5, 6, 9], [9, 9, 5, 9]])
    picked = pool(STATES, LEFT, "eos", input_ids=ids, eos_token_id=9)
    assert torch.equal(picked, STATES[:, 3])


def test_eos_of_a_text_without_one_is_its_last_token():
    ids = torch.tensor([[5, 6, 7, 0], [5, 9, 0, 0]])
    picked = pool(STATES, RIGHT, "eos", input_ids=ids, eos_token_id=9)
    assert torch.equal(picked, STATES[[0, 1], [2, 1]])


@pytest.mark.parametrize("pooling", POOLINGS)
def test_a_text_without_tokens_gives_zeros(pooling):
    mask = torch.tensor([[0, 0, 0, 0], [1, 0, 0, 0]])
    pooled = pool(STATES + 1, mask, pooling, input_ids=torch.ones(2, 4, dtype=torch.long), eos_token_id=1)
    assert torch.equal(pooled[0], torch.zeros(3))
    assert torch.equal(pooled[1], STATES[1, 0] + 1)


def test_bfloat16_states_are_summed_in_float32():
    states = torch.full((1, 1001, 1), 1.0, dtype=torch.bfloat16)
    states[0, 0] = 2.0
    pooled = pool(states, torch.ones(1, 1001), "mean")
    assert pooled.dtype == torch.float32
    assert pooled.item() == pytest.approx(1002 / 1001, abs=1e-6)


def test_gradients_reach_attended_tokens_only():
    states = STATES.clone().requires_grad_()
    pool(states, RIGHT, "mean").sum().backward()
    assert torch.equal(states.grad.any(-1), RIGHT.bool())


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="unknown pooling 'median': use one of cls, mean"):
        pool(STATES, RIGHT, "median")
    with pytest.raises(ValueError, match=r"\(2, 4, 3\) and \(2, 3\)"):
        pool(STATES, RIGHT[:, :3], "mean")
    with pytest.raises(ValueError, match="eos pooling needs"):
        pool(STATES, RIGHT, "eos")
