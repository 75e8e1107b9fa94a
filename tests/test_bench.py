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


@pytest.mark.parametrize("flags, figure, ways", [
    ("step --preset tiny --attn_dropout 0 --ways plain fast", "samples/s", 2),
    ("loader --images 16", "images/s and core", 3),
    ("retrieval --preset tiny --pairs 16", "s per pair", 2)])
def test_it_runs(flags, figure, ways, monkeypatch, capsys):
    """The packs that it writes itself are packs that the loader reads: each way gives a row with figures."""
    threads = torch.get_num_threads()
    monkeypatch.setattr(bench, "in_fresh_process", lambda function, *args: function(*args))
    monkeypatch.setattr(sys, "argv", ["bench.py", *flags.split(), "--repeats", "1", "--device", "cpu"])
    bench.main()
    torch.set_num_threads(threads)
    names, _, *rows = [[cell.strip() for cell in line.split("|")]
                       for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(rows) == ways and all(float(row[names.index(figure)]) > 0 for row in rows)


def test_a_pack_of_noise_is_a_pack(tmp_path, small_config):
    cfg = small_config()
    bench.write_pack(tmp_path, 10, cfg)
    samples = bench.open_pack(tmp_path, cfg, bench.TrainConfig())
    assert samples.n == 10 and len(samples.text(0)) == cfg.max_text_len - 2
    assert len(list(samples.packs[0].lines("train"))) == 10
