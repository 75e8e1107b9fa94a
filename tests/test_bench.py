"""The plain way of bench.py is the model's own step, only slower: same losses, same gradients."""
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent / "experiments"))
import bench
import gpu
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
        assert all(gradient is not None for gradient in gradients)   # DDP needs all of them
        found[way] = [out[name] for name in ("mlm_loss", "mim_loss", "itm_loss", "loss")]
        found[way] += gradients
    for plain, fast in zip(found["plain"], found["fast"]):
        assert (plain - fast).abs().max() <= 1e-5 * max(1, fast.abs().max())


def test_another_loss_is_noticed():
    with pytest.raises(bench.UserError, match="mlm_loss of the two ways differ"):
        bench.require_equal("mlm_loss", torch.tensor(1.0), torch.tensor(1.001))
    with pytest.raises(bench.UserError):
        bench.require_equal("mlm_loss", torch.tensor(torch.nan), torch.tensor(1.0))


@pytest.mark.parametrize("flags, column, ways", [
    ("step --preset tiny --attn_dropout 0", "samples/s", 4),
    ("loader --images 16", "images/s and core", 3),
    ("retrieval --preset tiny --pairs 16", "s per pair", 2),
    ("launches --preset tiny", "kernels", 2)])
def test_each_way_gives_a_row_of_numbers(flags, column, ways, monkeypatch, capsys):
    threads = torch.get_num_threads()
    monkeypatch.setattr(bench, "in_fresh_process", lambda function, *args: function(*args))
    monkeypatch.setattr(sys, "argv", ["bench.py", *flags.split(), "--repeats", "1",
                                      "--device", "cpu"])
    bench.main()
    torch.set_num_threads(threads)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    names, _, *rows = [[cell.strip() for cell in line.split("|")] for line in lines]
    assert len(rows) == ways and all(float(row[names.index(column)]) > 0 for row in rows)


def test_kernels_are_counted_without_views():
    x, weight = torch.ones(4, 4), torch.ones(4, 4, requires_grad=True)
    with bench.KernelCounter() as counter:
        loss = (x.T[:, :2].contiguous() @ weight[:2]).tanh().sum()    # views and four kernels
    assert counter.count == 4 and loss.requires_grad


def test_the_parts_of_a_step_add_up_to_it(small_config):
    cfg = small_config()
    args = bench.argparse.Namespace(batch_size=4, device="cpu", dtype=torch.float32, compile=False)
    seconds = bench.TimedStep(cfg, args).step("fast")
    parts = sum(value for name, value in seconds.items() if name != "step")
    assert parts == pytest.approx(seconds["step"]) and min(seconds.values()) > 0


def test_a_pack_of_noise_is_a_pack(tmp_path, small_config):
    cfg = small_config()
    bench.write_noise_pack(tmp_path, 10, cfg)
    samples = bench.noise_samples(tmp_path, cfg, bench.TrainConfig())
    assert samples.n == 10 and len(samples.token_ids(0)) == cfg.max_text_len - 2
    assert len(list(samples.packs[0].lines("train"))) == 10


@pytest.mark.parametrize("parts", ["attention", "types overlap steps"])
def test_what_waits_for_a_gpu_is_rehearsed_on_a_cpu(parts, monkeypatch, capsys):
    flags = f"{parts} --device cpu --preset tiny --rows 2 --repeats 1"
    monkeypatch.setattr(sys, "argv", ["gpu.py", *flags.split()])
    gpu.main()
    assert "FAILED" not in capsys.readouterr().out

    # Without any tolerance nothing is equal: what fails is named at the end.
    monkeypatch.setattr(gpu, "ROUNDING", dict.fromkeys(gpu.ROUNDING, 0.0))
    monkeypatch.setattr(sys, "argv", ["gpu.py", "attention", "--device", "cpu"])
    with pytest.raises(bench.UserError, match="^failed: attention$"):
        gpu.main()
