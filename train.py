"""Pre-train M³AE.

    python train.py                                                    minutes on a laptop, on phantoms
    python train.py --data packs/medpix --preset small --out runs/medpix
    python train.py --data packs/roco,packs/medicat --preset base --gpus 4 --out runs/base
"""
import itertools
import math
import re
import time
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path

import m3ae_mini                       # before torch: it says how threads wait for each other
import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from data import phantoms
from m3ae_mini import M3AE, loop, masking, metrics, pictures
from m3ae_mini.config import parse
from m3ae_mini.data import VAL_SEED, Samples, load, normalise, training_chunks, validation_chunks
from m3ae_mini.text import Tokenizer


def main():
    cfg, train_cfg, run_cfg, _ = parse(__doc__)
    place = loop.Place(run_cfg)
    out = Path(run_cfg.out)

    # ------------------------------------------------------------------------------------ what to learn from
    cfg.check()
    if run_cfg.gpus and not loop.under_torchrun():
        # Whatever can be wrong is found, and the phantoms are drawn, before any process starts.
        loop.check_batches(train_cfg, cfg, run_cfg.gpus)
        prepare(cfg, train_cfg, run_cfg)
        loop.launch(run_cfg.gpus)

    loop.check_batches(train_cfg, cfg, place.world)
    place.join(run_cfg.timeout)
    place.from_main(lambda: prepare(cfg, train_cfg, run_cfg) and None)
    packs, tokenizer, cfg = prepare(cfg, train_cfg, run_cfg)
    train, val = (Samples(packs, split, tokenizer, cfg, train_cfg) for split in ("train", "val"))

    settings = {"model": asdict(cfg), "train": asdict(train_cfg), "run": asdict(run_cfg),
                "data": {"packs": [pack.fingerprint() for pack in packs], "tokenizer": tokenizer.hash}}
    checkpoint = place.from_main(lambda: loop.open_run(run_cfg, settings))     # the path of one, or None
    if place.main:
        loop.write_whole(out / "tokenizer.json", lambda file: file.write(tokenizer.json().encode()))
        print(f"{train.n:,} training and {val.n:,} validation samples; {train.cut:,} captions of more than "
              f"{cfg.max_text_len} tokens are cut; vocabulary {cfg.vocab_size:,}")

    # ------------------------------------------------------------------------------------ the model
    torch.manual_seed(train_cfg.seed)
    model = M3AE(cfg)
    unread = loop.unread_parameters(M3AE, cfg)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in unread)
    model.to(place.device)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(loop.parameter_groups(model, train_cfg), lr=train_cfg.lr, eps=1e-8,
                                  betas=(0.9, train_cfg.beta2), fused=place.device.type != "mps")
    scaler = torch.amp.GradScaler(place.device.type, enabled=place.dtype == torch.float16)

    step, best = 0, -math.inf
    if checkpoint:
        state = loop.load_checkpoint(checkpoint)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        scaler.load_state_dict(state["scaler"])
        step, best = state["step"], state["best"]
        del state

    net = torch.compile(model) if run_cfg.compile else model
    if place.world > 1:
        net = DistributedDataParallel(net, device_ids=[place.device] if place.device.type == "cuda" else None,
                                      gradient_as_bucket_view=True)

    if place.main:
        print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} million parameters on {place.world} × "
              f"{place.device.type} in {str(place.dtype)[6:]}; "
              + (f"going on from step {step:,}" if step else f"{train_cfg.steps:,} steps"))
    log = loop.Log(out, step) if place.main else None

    # ------------------------------------------------------------------------------------ the loop
    chunks = train_cfg.batch_size // train_cfg.micro_batch // place.world      # of a step, on this process
    batches = load(train, training_chunks(train, train_cfg, step, place.rank, place.world), train_cfg.seed,
                   place.device, crop=train_cfg.crop < 1)
    bar = tqdm(total=train_cfg.steps, initial=step, unit="step", disable=not place.main, dynamic_ncols=True)
    sums, since, skipped, clock = {}, 0, 0, time.perf_counter()
    model.train()

    while step < train_cfg.steps:
        rate = loop.set_rate(optimizer, step, train_cfg)

        # Forward and backward, a chunk at a time; the processes add up their gradients at the last one.
        for i, (_, chunk, _, batch) in enumerate(itertools.islice(batches, chunks), 1):
            torch.manual_seed(masking.torch_seed(train_cfg.seed, step, chunk))         # dropout
            with net.no_sync() if place.world > 1 and i < chunks else nullcontext():
                with place.autocast():
                    losses = net(batch)
                scaler.scale(losses["loss"] / chunks).backward()
            for name in losses:
                if name.endswith("loss"):
                    sums[name] = sums.get(name, 0) + losses[name].detach()

        # Step. A gradient that is not finite is the same on all processes by now, so all of them skip it.
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(parameters, train_cfg.clip or math.inf).item()  # one host read
        if math.isfinite(norm) or scaler.is_enabled():
            scaler.step(optimizer)
            scaler.update()
            skipped = 0
        else:
            skipped += 1
            loop.give_up(skipped, step, out)
        optimizer.zero_grad()
        step, since = step + 1, since + 1

        # Log, validate, save.
        last = step == train_cfg.steps
        if step % run_cfg.log_every == 0 or last:
            means = {name: value / (since * chunks * place.world)
                     for name, value in place.total(sums).items()}
            if place.main:
                speed = since * train_cfg.batch_size / (time.perf_counter() - clock)
                log.write(step, "train", lr=rate, norm=norm, skipped=skipped, samples_per_s=speed, **means)
                shown = [f"{name[:3]} {value:.3f}" for name, value in means.items() if name != "loss"]
                bar.set_postfix_str(" ".join(shown) + f" {speed:,.0f} samples/s")
                bar.update(step - bar.n)
            sums, since, clock = {}, 0, time.perf_counter()

        if step % run_cfg.eval_every == 0 or last:
            found = evaluate(model, val, place, run_cfg.eval_samples)
            score = found.get("itm_acc", 0) + found.get("mlm_acc", 0) - found.get("mim_loss", 0)
            if place.main:
                log.write(step, "val", score=score, **found)
                shown = "  ".join(f"{name} {value:.4g}" for name, value in found.items())
                tqdm.write(f"step {step:,}  {shown}")
                pictures.reconstructions(model, val, place, out / "pictures" / f"step{step:06d}.png")
                pictures.curves(log.lines(), out / "pictures" / "curves.png")
                if score > best:
                    state = {"model": model.state_dict(), "step": step, "model_config": asdict(cfg)}
                    loop.write_whole(out / "best.pt", lambda file: torch.save(state, file))
            best = max(best, score)
            clock = time.perf_counter()

        if (step % run_cfg.save_every == 0 or last) and place.main:
            loop.save_checkpoint(out, {"model": model.state_dict(), "optimizer": optimizer.state_dict(),
                                       "scaler": scaler.state_dict(), "step": step, "best": best,
                                       "model_config": asdict(cfg)})
            clock = time.perf_counter()
    bar.close()

    if run_cfg.test_samples and any(len(pack.split["test"]) for pack in packs):
        report(model, packs, tokenizer, cfg, train_cfg, run_cfg.test_samples, place, out)


def prepare(cfg, train_cfg, run_cfg):
    """Open the packs and the tokenizer (the one asked for, else that of the run, else one trained on the
    captions) and fit the configuration to it. -> packs, tokenizer, configuration"""
    packs = loop.open_packs(run_cfg.data, cfg.image_size)
    of_run = Path(run_cfg.out) / "tokenizer.json"
    if run_cfg.tokenizer:
        tokenizer = Tokenizer.load(run_cfg.tokenizer)
    elif of_run.is_file():
        tokenizer = Tokenizer.load(of_run)
    else:
        captions = (line["text"] for pack in packs for line in pack.lines("train"))
        tokenizer = Tokenizer.train(captions, train_cfg.vocab)
    cfg = replace(cfg, vocab_size=tokenizer.vocab_size, text_kind=tokenizer.kind)
    cfg.check()
    for split in ("train", "val"):
        Samples(packs, split, tokenizer, cfg, train_cfg)
    return packs, tokenizer, cfg


@torch.no_grad()
def evaluate(model, samples, place, limit):
    """Mean of every validation figure over at most `limit` samples, each counted once, with fixed masks."""
    model.eval()
    sums = {}
    chunks = validation_chunks(samples, limit, place.rank, place.world)
    for _, _, _, batch in load(samples, chunks, VAL_SEED, place.device):
        with place.autocast():
            for name, pair in metrics.pretraining(model, batch).items():
                sums[name] = sums.get(name, 0) + pair
    model.train()
    return {name: total / max(count, 1) for name, (total, count) in place.total(sums).items()}


def report(model, packs, tokenizer, cfg, train_cfg, limit, place, out):
    """The best checkpoint on the test split, each figure beside what ignorance gives."""
    best = loop.load_checkpoint(place.from_main(lambda: out / "best.pt"))  # once the main process wrote it
    model.load_state_dict(best["model"])
    test = Samples(packs, "test", tokenizer, cfg, train_cfg)
    found = evaluate(model, test, place, limit)
    if not place.main:
        return

    def drawn_clean(numbers):
        keys = (map(int, re.findall(r"\d+", test.line(n)["source"])) for n in numbers)     # seed and number
        drawn = np.stack([phantoms.draw(*key, cfg.image_size, noise=False) for key in keys])
        return normalise(torch.from_numpy(drawn)[:, None].expand(-1, 3, -1, -1))       # (B, 3, S, S)

    embedded = all(pack.meta["name"] == "phantoms" for pack in packs)
    train = Samples(packs, "train", tokenizer, cfg, train_cfg)
    found |= metrics.ignorance(train, test, limit, place.device, drawn_clean if embedded else None)
    loop.Log(out, train_cfg.steps).write(best["step"], "test", **found)
    print(f"\nOn {min(limit, test.n):,} held-out samples (step {best['step']:,}):")
    if cfg.mlm:
        print(f"  masked tokens restored    {found['mlm_acc']:6.1%}   always the commonest token: "
              f"{found['commonest']:.1%}")
        print(f"    cross-modal gain        {100 * found['mlm_gain_other']:+6.1f} points over another image")
        print(f"    within the kind         {100 * found['mlm_gain_kin']:+6.1f} points over one of its kind")
    if cfg.itm:
        print(f"  matching, any picture     {found['itm_acc_other']:6.1%}   guessing: 50.0%; the kind alone: "
              f"{found['kind_alone']:.1%}")
        print(f"    within the kind         {found['itm_acc_kin']:6.1%}   guessing and the kind alone: 50.0%")
    if cfg.mim:
        share = 1 - found["mim_loss"] / found["constant_patch"]
        print(f"  reconstruction error      {found['mim_loss']:6.3f}   the mean patch at each place: "
              f"{found['constant_patch']:.3f} ({share:.0%} below)")
        print(f"    cross-modal gain        {found['mim_gain_other']:+6.3f} with another row's text")
        if "noise_floor" in found:
            print(f"    the floor               {found['noise_floor']:6.3f}   the same picture without noise")
    print(f"Pictures: {out / 'pictures'}")


if __name__ == "__main__":
    loop.run(main)
