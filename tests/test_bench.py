"""The plain way of tests/bench.py is the model's own step, only slower: same losses, same gradients."""
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
import bench
from m3ae_mini import M3AE


@pytest.mark.parametrize("mim_layer", [0, 2, -1])
def test_the_plain_way_computes_the_same(mim_layer, small_config, random_batch):
    cfg = small_config(mim_layer=mim_layer)
    torch.manual_seed(0)
    model, batch, found = M3AE(cfg), random_batch(cfg), {}
    for way, losses in bench.WAYS.items():
        model.zero_grad()
        out = losses(model, batch)
        out["loss"].backward()
        gradients = [parameter.grad for parameter in model.parameters()]
        assert all(gradient is not None for gradient in gradients)   # all of them are reduced over processes
        found[way] = [out[name] for name in ("mlm_loss", "mim_loss", "itm_loss", "loss")] + gradients
    for plain, fast in zip(found["plain"], found["fast"]):
        assert (plain - fast).abs().max() <= 1e-5 * max(1, fast.abs().max())


def test_another_loss_is_noticed():
    with pytest.raises(bench.UserError, match="mlm_loss of the two ways differ"):
        bench.agree("mlm_loss", torch.tensor(1.0), torch.tensor(1.001))
    with pytest.raises(bench.UserError):
        bench.agree("mlm_loss", torch.tensor(torch.nan), torch.tensor(1.0))
