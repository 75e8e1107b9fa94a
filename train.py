"""Pre-train M³AE.

    python train.py                                                    minutes on a laptop, on phantoms
    python train.py --data packs/medpix --preset small --out runs/medpix
    python train.py --data packs/roco,packs/medicat --preset base --gpus 4 --out runs/base
"""
import itertools
import math
import re
import time
from collections import defaultdict
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import m3ae_mini                       # before torch: it says how threads wait for each other
import numpy as np
import torch
from tqdm import tqdm

from data import phantoms
from data.pack import open_packs
from m3ae_mini import M3AE, loop, masking, metrics, plots, weights
from m3ae_mini.config import require, parse
from m3ae_mini.data import VAL_SEED, Samples, load, normalise, training_micro_batches, validation_micro_batches
from m3ae_mini.model import patchify
from m3ae_mini.objectives import MIM
from m3ae_mini.text import Tokenizer


def main():
    cfg, train_cfg, run_cfg, args = parse(__doc__)
    out = Path(run_cfg.out)

    # ------------------------------------------------------------------------------------ what to learn from
    cfg, sources = weights.read_init_files(cfg, train_cfg, vars(args))
    make = partial(prepare, cfg, train_cfg, run_cfg, sources)
    dist_env, (train, val, tokenizer, cfg) = loop.begin(train_cfg, cfg, run_cfg, make)
    train_cfg, run_cfg = loop.epochs_to_steps(train_cfg, run_cfg, train.n)

    settings = {"model": asdict(cfg), "train": asdict(train_cfg), "run": asdict(run_cfg),
                "data": {"packs": [pack.fingerprint() for pack in train.packs], "tokenizer": tokenizer.hash}}
    checkpoint = dist_env.broadcast(lambda: loop.open_run(run_cfg, settings, dist_env))  # --gpus starts torchrun
    if dist_env.is_main:
        loop.write_atomic(out / "tokenizer.json", lambda file: file.write(tokenizer.json.encode()))
        print(f"{train.n:,} training and {val.n:,} validation samples; {train.cut + val.cut:,} captions of "
              f"more than {cfg.max_text_len} tokens are cut; vocabulary {cfg.vocab_size:,}")

    # ------------------------------------------------------------------------------------ the model
    torch.manual_seed(train_cfg.seed)
    model = M3AE(cfg)
    if sources and not checkpoint:
        dist_env.print(weights.load_pretrained(model, sources))           # they are put in on every process, told by one
    net, optimizer, scaler, step, best = loop.learner(model, train, train_cfg, run_cfg, dist_env, checkpoint)
    log = loop.Log(out, step) if dist_env.is_main else None
    del sources, make                                                          # they hold what was loaded

    # ------------------------------------------------------------------------------------ the loop
    chunks = train_cfg.batch_size // train_cfg.micro_batch // dist_env.world_size      # of a step, on this process
    batches = load(train, training_micro_batches(train, train_cfg, step, dist_env.rank, dist_env.world_size), train_cfg.seed,
                   dist_env.device, crop=train_cfg.min_crop_area < 1)
    bar = tqdm(total=train_cfg.steps, initial=step, unit="step", disable=not dist_env.is_main, dynamic_ncols=True)
    sums, since, skipped, clock = {}, 0, 0, time.perf_counter()                # since the log's last line
    stop, stopping, in_a_row = loop.StopSignal(), False, 0
    model.train()

    while step < train_cfg.steps and not stopping:
        rate = loop.set_lr(optimizer, step, train_cfg)

        # Forward and backward, a chunk at a time; the processes add up their gradients at the last one.
        for i, (_, chunk, _, batch) in enumerate(itertools.islice(batches, chunks), 1):
            torch.manual_seed(masking.torch_seed(train_cfg.seed, step, chunk))         # dropout
            with net.no_sync() if dist_env.world_size > 1 and i < chunks else nullcontext():
                with dist_env.autocast():
                    losses = net(batch)
                scaler.scale(losses["loss"] / chunks).backward()
            for name in [name for name in losses if name.endswith("loss")]:
                sums[name] = sums.get(name, 0) + losses[name].detach()

        # Step. A gradient that is not finite is the same on all processes by now, so all of them skip it.
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), train_cfg.grad_clip or math.inf)
        norm, stopping = stop.agree(norm, dist_env)                                       # one host read
        if math.isfinite(norm):
            scaler.step(optimizer)
            in_a_row = 0
        else:
            skipped, in_a_row = skipped + 1, in_a_row + 1
            require(in_a_row < 20, loop.DIVERGED)
        scaler.update()                                    # float16: a lower scale after such a gradient
        optimizer.zero_grad()
        step, since = step + 1, since + 1

        # Log; then, while the clock stands still, validate and save.
        last = step == train_cfg.steps
        if step % run_cfg.log_every == 0 or last:
            means = {name: value / (since * chunks * dist_env.world_size)
                     for name, value in dist_env.reduce_sums(sums).items()}
            if dist_env.is_main:
                speed = since * train_cfg.batch_size / (time.perf_counter() - clock)
                log.write(step, "train", lr=rate, norm=norm, skipped=skipped, samples_per_s=speed, **means)
                shown = [f"{name[:3]} {value:.3f}" for name, value in means.items() if name != "loss"]
                bar.set_postfix_str(" ".join(shown) + f" {speed:,.0f} samples/s")
                bar.update(step - bar.n)
            sums, since, skipped, clock = {}, 0, 0, time.perf_counter()

        pause = time.perf_counter()
        if step % run_cfg.eval_every == 0 or last:
            found = evaluate(model, val, dist_env, run_cfg.eval_samples)
            # The best checkpoint is chosen as in the release.
            score = found.get("itm_acc", 0) + found.get("mlm_acc", 0) - found.get("mim_loss", 0)
            if dist_env.is_main:
                log.write(step, "val", score=score, **found)
                shown = "  ".join(f"{name} {value:.4g}" for name, value in found.items())
                tqdm.write(f"step {step:,}  {shown}")
                plots.reconstructions(model, val, dist_env, out / "plots" / f"step{step:06d}.png")
                plots.curves(log.lines(), out / "plots" / "curves.png")
                if score > best:
                    loop.save(out / "best.pt", model, step)
            best = max(best, score)

        if (step % run_cfg.save_every == 0 or last or stopping) and dist_env.is_main:
            loop.save_checkpoint(out, model, optimizer, scaler, step, best)
        clock += time.perf_counter() - pause
    bar.close()

    if stopping and step < train_cfg.steps:
        dist_env.print(f"stopped after step {step:,}; go on with --resume")
    elif run_cfg.test_samples and any(len(pack.split["test"]) for pack in train.packs):
        report(model, train, run_cfg.test_samples, dist_env, out)


def prepare(cfg, train_cfg, run_cfg, sources):
    """Open the packs and the tokenizer, fit the configuration to it -> the samples to train and to validate
    on, tokenizer, configuration. UserError where they, or the weights to start from, don't fit each other."""
    packs = open_packs(run_cfg.data, cfg.image_size, train_cfg.min_crop_area)
    captions = (line["text"] for pack in packs for line in pack.lines("train"))
    tokenizer = Tokenizer.choose(train_cfg, run_cfg, captions)
    cfg = replace(cfg, vocab_size=tokenizer.vocab_size, text_kind=tokenizer.kind)
    cfg.check()
    weights.check(cfg, sources)
    train = Samples(packs, "train", tokenizer, cfg, train_cfg, train_cfg.train_samples)
    return train, Samples(packs, "val", tokenizer, cfg, train_cfg), tokenizer, cfg


@torch.no_grad()
def evaluate(model, samples, dist_env, limit):
    """Means over at most `limit` samples, each counted once, masks fixed; what counted none is left out."""
    model.eval()
    sums = {}
    chunks = validation_micro_batches(samples, limit, dist_env.rank, dist_env.world_size)
    for _, _, _, batch in load(samples, chunks, VAL_SEED, dist_env.device):
        with dist_env.autocast():
            for name, pair in validation_metrics(model, batch).items():
                sums[name] = sums.get(name, 0) + pair
    model.train()
    return {name: total / count for name, (total, count) in dist_env.reduce_sums(sums).items() if count}


def validation_metrics(model, batch):
    """Everything validation wants to know of one chunk -> {name: tensor (2,) of sum and count}.

    The cross-modal gain asks whether the two modalities have learned to use each other. The same hidden words
    are restored with the right image, with another row's (`other`) and with one of the same kind (`kin`);
    the same hidden patches with the right text and with another row's. Rows without one don't count."""
    own = torch.arange(len(batch["image"]), device=batch["image"].device)     # (B,)
    random, hard = batch["random_negative_index"], batch["hard_negative_index"]                     # (B,) each
    text = model.encode_text(batch["text_ids"], batch["text_mask"])           # (B, T, D)
    sums, image = {}, model.encode_image(batch["image"])                      # (B, 1+L, D)

    if "mlm" in model.objectives:
        def restored(index):
            out = model.objectives["mlm"](model, batch, text, image.index_select(0, index))
            return out, (out["mlm_logits"].argmax(-1) == out["mlm_targets"])  # (M,)

        out, right = restored(own)
        counts = out["mlm_targets"] != -100                                   # (M,) fillers don't count
        row = batch["mlm_positions"] // batch["mlm_ids"].shape[1]             # (M,) each masked token's row
        sums["mlm_loss"] = torch.stack([out["mlm_loss"] * counts.sum(), counts.sum()])
        sums["mlm_acc"] = metrics.sum_and_count(right, counts)
        for name, index in (("random", random), ("hard", hard)):
            partner = counts & (index != own)[row]                            # (M,)
            swapped = restored(index)[1]
            sums[f"mlm_acc_{name}"] = metrics.sum_and_count(swapped, partner)
            sums[f"mlm_gain_{name}"] = metrics.sum_and_count(right.float() - swapped.float(), partner)

    if "mim" in model.objectives:
        def error(index):
            swapped = batch | {"text_mask": batch["text_mask"].index_select(0, index)}
            out = model.objectives["mim"](model, swapped, text.index_select(0, index), image)
            target = MIM.target(batch["image"], model.cfg)
            return (out["mim_pred"] - target).square().mean(-1), out["mim_hidden"].bool()   # (B, L) each

        with_own, hidden = error(own)
        sums["mim_loss"] = metrics.sum_and_count(with_own, hidden)
        sums["mim_gain_random"] = metrics.sum_and_count(error(random)[0] - with_own, hidden & (random != own)[:, None])

    if "itm" in model.objectives:
        def says_match(index):
            out = model.objectives["itm"](model, batch | {"itm_index": index}, text, image)
            return out["itm_logits"].argmax(-1) == 1, out["itm_loss"]         # (B,), ()

        right = says_match(own)[0]
        mixed, loss = says_match(batch["itm_index"])
        sums["itm_loss"] = torch.stack([loss * len(own), loss.new_tensor(len(own))])
        sums["itm_acc"] = metrics.sum_and_count(mixed == (batch["itm_index"] == own))
        for name, index in (("random", random), ("hard", hard)):
            partner = index != own                                            # (B,)
            both = (right.float() + (~says_match(index)[0]).float()) / 2
            sums[f"itm_acc_{name}"] = metrics.sum_and_count(both, partner)

    for name in model.objectives.keys() - {"mlm", "mim", "itm"}:              # of your own: its loss alone
        loss = model.objectives[name](model, batch, text, image)[f"{name}_loss"]
        sums[f"{name}_loss"] = torch.stack([loss * len(own), loss.new_tensor(len(own))])
    return sums


def report(model, train, limit, dist_env, out):
    """The best checkpoint on the test split, each figure beside what ignorance gives. train: its Samples."""
    best = loop.load_checkpoint(dist_env.broadcast(partial(loop.latest_valid_checkpoint, out, "best.pt", "last.pt")))
    model.load_state_dict(best["model"])
    cfg, test = train.cfg, Samples(train.packs, "test", train.tokenizer, train.cfg, train.train_cfg)
    found = evaluate(model, test, dist_env, limit)
    if not dist_env.is_main:
        return

    def drawn_clean(numbers):
        keys = (map(int, re.findall(r"\d+", test.line(n)["source"])) for n in numbers)     # seed and number
        drawn = np.stack([phantoms.draw(*key, cfg.image_size, noise=False) for key in keys])
        return normalise(torch.from_numpy(drawn)[:, None].expand(-1, 3, -1, -1))       # (B, 3, S, S)

    embedded = all(pack.meta["name"] == "phantoms" for pack in train.packs)
    found = defaultdict(lambda: math.nan, found)           # a gain is none where no sample has a partner
    found |= baselines(train, test, limit, dist_env.device, drawn_clean if embedded else None)
    loop.Log(out, math.inf).write(best["step"], "test", **found)
    print(f"\nOn {min(limit, test.n):,} held-out samples (step {best['step']:,}):")
    if cfg.mlm:
        print(f"  masked tokens restored    {found['mlm_acc']:6.1%}   always the commonest token: "
              f"{found['commonest']:.1%}")
        print(f"    cross-modal gain        {100 * found['mlm_gain_random']:+6.1f} points over another image")
        print(f"    within the kind        {100 * found['mlm_gain_hard']:+7.1f} points over one of its kind"
              if "mlm_gain_hard" in found else "    within the kind: the data name no kinds")
    if cfg.itm:
        print(f"  matching, any image     {found['itm_acc_random']:6.1%}   guessing: 50.0%; the kind alone: "
              f"{found['group_only']:.1%}")
        print(f"    within the kind         {found['itm_acc_hard']:6.1%}   guessing and the kind alone: 50.0%"
              if "itm_acc_hard" in found else "    within the kind: the data name no kinds")
    if cfg.mim:
        share = 1 - found["mim_loss"] / found["mean_patch"]
        print(f"  reconstruction error      {found['mim_loss']:6.3f}   the mean patch at each dist_env: "
              f"{found['mean_patch']:.3f} ({abs(share):.0%} {'below' if share > 0 else 'above'})")
        print(f"    cross-modal gain        {found['mim_gain_random']:+6.3f} with another row's text")
        if "noise_floor" in found:
            print(f"    the floor               {found['noise_floor']:6.3f}   the same image without noise")
    print(f"Images: {out / 'images'}")


@torch.no_grad()
def baselines(train, test, limit, device, drawn_clean=None, most=8192):
    """What can be had on at most `limit` test samples without understanding them: {name: float}.

    commonest: the share of the commonest token among the masked ones. group_only: matching accuracy over any
    wrong image of one who sees only its kind. mean_patch: error of the mean normalised patch at each
    dist_env, the best guess that knows only the dist_env, from `most` training images at most. noise_floor:
    error of the images drawn_clean(sample number) -> (B, 3, S, S), which know all but the noise."""
    cfg, mean, seen = test.cfg, 0, 0
    for _, _, _, batch in load(train, validation_micro_batches(train, most), VAL_SEED, device):
        mean = mean + MIM.target(batch["image"], cfg).sum(0)                  # (L, 3·P²)
        seen += len(batch["image"])
    mean = mean / seen

    tokens, sums = [], {}
    for _, _, numbers, batch in load(test, validation_micro_batches(test, limit), VAL_SEED, device):
        image, target = batch["image"], MIM.target(batch["image"], cfg)       # (B, L, 3·P²)
        ids_keep, ids_restore = masking.random_masking(batch["mim_noise"], cfg.mask_ratio)
        hidden = ids_restore >= ids_keep.shape[1]                                     # (B, L)
        pairs = {"mean_patch": metrics.sum_and_count((mean - target).square().mean(-1), hidden)}
        if drawn_clean:
            clean = patchify(drawn_clean(numbers).to(image), cfg.patch_size)  # (B, L, 3·P²)
            if cfg.norm_pix_loss:          # measured in the same units: the noisy patch's own mean and spread
                var, middle = torch.var_mean(patchify(image, cfg.patch_size), dim=-1, keepdim=True)
                clean = (clean - middle) / (var + 1e-6).sqrt()
            pairs["noise_floor"] = metrics.sum_and_count((clean - target).square().mean(-1), hidden)

        group = np.array([test.line(n).get("group", "") for n in numbers])
        other = batch["random_negative_index"].cpu().numpy()
        partner = torch.from_numpy(other != np.arange(len(other)))
        told = torch.from_numpy(group != group[other])     # who knows the kind says "no" to these, else "yes"
        pairs["group_only"] = metrics.sum_and_count((1 + told.float()) / 2, partner).to(device)
        tokens.append(batch["mlm_labels"][batch["mlm_labels"] != -100].cpu())
        sums = {name: sums.get(name, 0) + pair for name, pair in pairs.items()}

    tokens = torch.cat(tokens)
    return {"most_frequent_token": (tokens.bincount().max() / len(tokens)).item(),
            **{name: (total / count).item() for name, (total, count) in sums.items()}}


if __name__ == "__main__":
    loop.run(main)
