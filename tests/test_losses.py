import pytest
import torch

from textcond.losses import info_nce


def reference(anchors, candidates, temperature, mask=None):
    """InfoNCE as in the paper, one anchor at a time in float64."""
    total = 0.0
    for i, anchor in enumerate(anchors.double()):
        allowed = [j for j in range(len(candidates)) if j == i or mask is None or not mask[i, j]]
        exponents = torch.stack([(anchor @ candidates[j].double()) / temperature for j in allowed])
        total = total - torch.log(torch.exp(exponents[allowed.index(i)]) / torch.exp(exponents).sum())
    return total / len(anchors)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("extra", [0, 5])
def test_info_nce_equals_the_formula_in_float64(masked, extra):
    generator = torch.Generator().manual_seed(0)
    anchors, candidates = torch.randn(7, 16, generator=generator), torch.randn(7 + extra, 16, generator=generator)
    anchors, candidates = anchors / anchors.norm(dim=1, keepdim=True), candidates / candidates.norm(dim=1, keepdim=True)
    mask = torch.rand(7, 7 + extra, generator=generator) < 0.4 if masked else None
    loss = info_nce(anchors, candidates, 0.05, false_negatives=mask)
    assert loss.item() == pytest.approx(reference(anchors, candidates, 0.05, mask).item(), rel=1e-5)


def test_masked_candidates_get_no_gradient_and_the_positive_always_does():
    anchors, candidates = torch.randn(2, 4), torch.randn(3, 4, requires_grad=True)
    mask = torch.tensor([[True, False, True], [False, True, True]])
    info_nce(anchors, candidates, 1.0, false_negatives=mask).backward()
    assert candidates.grad[2].abs().sum() == 0
    assert (candidates.grad[:2].abs().sum(1) > 0).all()


def test_shapes_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match=r"\(4, 8\).*\(3, 8\)"):
        info_nce(torch.randn(4, 8), torch.randn(3, 8), 0.1)
    with pytest.raises(ValueError, match="the mask is"):
        info_nce(torch.randn(4, 8), torch.randn(4, 8), 0.1, false_negatives=torch.zeros(4, 3, dtype=torch.bool))
