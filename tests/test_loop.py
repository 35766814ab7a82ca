import json
import os
import subprocess
import sys

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import nn

from textcond.pipelines.loop import Validation, fit, share, step_generator, warmup_stable_decay
from textcond.pipelines.optimizers import MuonAdamW

BATCH, STEPS = 8, 12


def new_module():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.SiLU(), nn.Flatten(), nn.Linear(8 * 36, 4))


def loss_of(accelerator, stop_at=None):
    mine = share(accelerator, BATCH)

    def loss(module, step):
        if step == stop_at:
            raise KeyboardInterrupt
        x = torch.randn(BATCH, 3, 8, 8, generator=step_generator(5, step))
        value = (module(x[mine]) - x[mine, 0, 0, :4]).square().mean()
        return value, {"again": value.item()}

    return loss


def run(out, accelerator, stop_at=None, module=None, **options):
    return fit(
        "test", module or new_module(), loss_of(accelerator, stop_at), out=out, steps=STEPS, batch=BATCH,
        learning_rate=1e-2, accelerator=accelerator, ema=0.9, save_every=0.0, **options,
    )  # fmt: skip


def test_an_interrupted_run_resumes_to_the_very_same_weights(tmp_path):
    accelerator = Accelerator(cpu=True)
    whole = run(tmp_path / "whole", accelerator)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", accelerator, stop_at=7)
    assert json.loads((tmp_path / "cut" / "checkpoint" / "step.json").read_text())["step"] == 7
    resumed = run(tmp_path / "cut", accelerator)
    assert whole.keys() == resumed.keys()
    for key in whole:
        assert torch.equal(whole[key], resumed[key]), key


@pytest.mark.parametrize("first", [True, False])
def test_a_run_that_only_gets_worse_returns_its_start_if_that_was_scored(tmp_path, first):
    start, accelerator = new_module().state_dict(), Accelerator(cpu=True)

    def resumed(stop_at):
        module = new_module()
        moved = Validation(
            lambda step: float((module[0].weight.detach() - start["0.weight"]).norm()), every=4, first=first
        )
        return run(tmp_path, accelerator, stop_at, module, validation=moved)

    with pytest.raises(KeyboardInterrupt):
        resumed(stop_at=2)
    assert torch.equal(resumed(stop_at=None)["0.weight"], start["0.weight"]) == first


def test_dropout_can_be_left_out(tmp_path):
    accelerator = Accelerator(cpu=True)
    plain = run(tmp_path / "plain", accelerator)
    for dropout in (True, False):
        module = nn.Sequential(*new_module(), nn.Dropout(0.5))
        result = run(tmp_path / str(dropout), accelerator, module=module, dropout=dropout)
        assert all(torch.equal(plain[key], result[key]) for key in plain) == (not dropout)


def test_two_processes_give_the_weights_of_one(tmp_path):
    one = run(tmp_path / "one", Accelerator(cpu=True))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", __file__]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, str(tmp_path / "two")], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    two = torch.load(tmp_path / "two" / "weights.pt", weights_only=True)
    start = new_module().state_dict()
    for key in one:
        # Usually 5e-6 of the way; a last-bit difference can cross a bfloat16 rounding inside Muon and make it 1e-2.
        # Training on one process's half of each batch alone ends 0.36 to 0.80 of the way apart.
        assert (two[key] - one[key]).norm() < 0.05 * (one[key] - start[key]).norm(), key


def test_a_batch_that_does_not_divide_is_refused():
    class Three:
        num_processes, process_index = 3, 0

    with pytest.raises(ValueError, match="batch size 8 does not divide among 3 processes"):
        share(Three(), BATCH)


def test_learning_rate_rises_stays_and_falls_to_zero():
    factors = [warmup_stable_decay(step, 100, 10, 0.2) for step in range(101)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[10:80] == [1.0] * 70
    assert factors[90] == pytest.approx(0.5)
    assert factors[100] == 0


def test_a_convolution_is_trained_through_its_flattened_view():
    module = new_module()
    before = module[0].weight.detach().clone()
    optimizer = MuonAdamW(module, 1e-2, 1e-3, 0.0)
    module(torch.randn(4, 3, 8, 8)).square().mean().backward()
    optimizer.step()
    change = (module[0].weight - before).flatten(1)
    # Muon's update is close to orthogonal: its singular values are nearly equal.
    values = torch.linalg.svdvals(change)
    assert values.min() > 0.3 * values.max()


if __name__ == "__main__":
    from pathlib import Path

    folder = Path(sys.argv[1])
    accelerator = Accelerator(cpu=True)
    weights = run(folder, accelerator)
    if accelerator.is_main_process:
        torch.save(weights, folder / "weights.pt")


@pytest.mark.parametrize("broken", ["loss", "figure", "gradient"])
def test_a_figure_that_is_not_finite_ends_a_run_before_it_reaches_the_weights(tmp_path, broken):
    accelerator, fine = Accelerator(cpu=True), loss_of(Accelerator(cpu=True))

    def loss(module, step):
        value, figures = fine(module, step)
        if step == 5 and broken == "loss":
            value = value * float("inf")
        if step == 5 and broken == "gradient":
            value = value + (module[0].weight.flatten()[0] - module[0].weight.flatten()[0].detach()).abs().sqrt()
        return value, {"figure": float("nan")} if step == 5 and broken == "figure" else figures

    with pytest.raises(RuntimeError, match=rf"{broken} became (nan|inf) at step 6: .* lower learning rate"):
        fit("test", new_module(), loss, out=tmp_path, steps=STEPS, batch=BATCH, learning_rate=1e-2,
            accelerator=accelerator, save_every=0.0)  # fmt: skip
    kept = load_file(tmp_path / "checkpoint" / "state-5.safetensors")
    assert all(tensor.isfinite().all() for tensor in kept.values())
