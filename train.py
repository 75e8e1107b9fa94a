"""Pre-train M³AE.

    python train.py                                                 minutes on a laptop, on phantoms
    python train.py --data packs/mine --preset small --out runs/mine
    python train.py --data packs/roco,packs/medicat --preset base --gpus 4 --out runs/base
"""
import itertools
import math
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple

import m3ae_mini                       # before torch: sets OMP_WAIT_POLICY
import torch
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from data.bag_of_words import fit_bag_of_words
from data.prepare import describe_packs, open_packs
from data.report import report_pretraining
from data.texts import choose_tokenizer, text_notes
from m3ae_mini import M3AE, checkpoint, config, evaluate, masking, optim, plots, weights
from m3ae_mini.config import ModelConfig, RunConfig, TrainConfig
from m3ae_mini.distributed import (
    DistEnv, StopSignal, keep_freed_memory, launch_torchrun, num_processes, pick_device, run,
    started_by_torchrun)
from m3ae_mini.loader import Samples, Settings, load, training_micro_batches
from m3ae_mini.model import compile_layers, use_grad_checkpointing
from m3ae_mini.objectives import OBJECTIVES, loss_weights
from m3ae_mini.tokenizer import Tokenizer

MAX_NONFINITE = 20                  # steps in a row without a finite gradient before a run gives up
FEW_PAIRS = 5000                    # a guess: 1,556 taught all losses at once too little


class Data(NamedTuple):
    """Samples and settings of a pre-training run."""
    train: Samples
    val: Samples
    tokenizer: Tokenizer
    cfg: ModelConfig                   # with the size of the tokenizer's vocabulary
    unused: list[str]                  # names of the parameters that no loss reads
    settings: dict                     # written to config.json, compared on resume


def main():
    # Settings: a preset's, and those given as flags.
    configs = ModelConfig, TrainConfig, RunConfig
    parser = config.make_parser(__doc__, configs, OBJECTIVES["pretrain"])
    cfg, train_cfg, run_cfg, args = config.parse(parser, configs)
    train_cfg.check()
    run_cfg.check()
    out = Path(run_cfg.out)

    # The micro-batch that fits the number of processes.
    resumed = out if run_cfg.resume else None
    saved = checkpoint.saved_settings(out) if resumed else None
    lines = config.fit_micro_batch(
        cfg, train_cfg, num_processes(run_cfg), args.micro_batch, saved)

    # --gpus N: check everything in this process; then torchrun replaces it and starts N.
    if run_cfg.gpus and not started_by_torchrun():
        pick_device(run_cfg)
        checkpoint.check_run_dir(out, run_cfg.resume)
        new_cfg, init_weights = weights.read_init_files(cfg, train_cfg, vars(args), resumed)
        data = load_data(new_cfg, train_cfg, run_cfg, init_weights)
        checkpoint.check_same_settings(out, data.settings)
        launch_torchrun(run_cfg.gpus)

    # Join the process group. Rank 0 opens and locks the run's folder.
    dist_env = DistEnv(run_cfg)
    for line in lines:
        dist_env.print(line)
    resume_from = None
    with dist_env.main_process_first():
        if dist_env.is_main:
            resume_from = checkpoint.open_run_dir(out, run_cfg.resume)
    resume_from = dist_env.broadcast(resume_from)

    # Weights to start from, and data. Rank 0 goes first: it may write packs and token caches.
    cfg, init_weights = weights.read_init_files(cfg, train_cfg, vars(args), resumed)
    with dist_env.main_process_first():
        data = load_data(cfg, train_cfg, run_cfg, init_weights)
        if dist_env.is_main:
            checkpoint.check_same_settings(out, data.settings)
            checkpoint.save_settings(out, data.settings, data.tokenizer)
    dist_env.print(f"{data.train.n:,} training and {data.val.n:,} validation samples; "
                   f"vocabulary {data.cfg.vocab_size:,}")
    for line in (*text_notes(data.tokenizer, data.train, data.val), *advice(data, init_weights)):
        dist_env.print(line)

    # The model, its first weights, and what is frozen.
    torch.manual_seed(train_cfg.seed)
    model = M3AE(data.cfg)
    if init_weights and not resume_from:
        loaded = weights.load_pretrained(model, init_weights)
        dist_env.print(weights.origin_table(model, *loaded))
    fit_bag_of_words(model, data.train, dist_env, resumed=bool(resume_from))
    optim.freeze(model, train_cfg, data.unused)
    model.to(dist_env.device)
    keep_freed_memory()

    # The optimizer; a checkpoint, if the run continues.
    optimizer = torch.optim.AdamW(
        optim.param_groups(model, train_cfg),
        lr=train_cfg.lr,
        betas=(0.9, train_cfg.beta2),
        eps=1e-8,
        fused=True)
    scaler = torch.amp.GradScaler(
        dist_env.device.type,
        enabled=dist_env.dtype == torch.float16)
    step, best_score = 0, -math.inf
    if resume_from:
        step, best_score = checkpoint.load_training_state(resume_from, model, optimizer, scaler)
        dist_env.print(f"continuing from {resume_from}, step {step:,}")

    # Compile its layers and wrap it in DDP.
    if run_cfg.compile:
        compile_layers(model)
    if run_cfg.grad_checkpointing:
        use_grad_checkpointing(model)
    net = model
    if dist_env.world_size > 1:
        net = DistributedDataParallel(model, gradient_as_bucket_view=True)
    dist_env.print(optim.describe(model, dist_env))

    # Train; then test the best checkpoint, once.
    def validate(model: M3AE, step: int) -> dict[str, float]:
        metrics = evaluate.pretraining(model, data.val, dist_env, run_cfg.eval_samples)
        if dist_env.is_main:
            path = out / "plots" / f"step{step:06d}.png"
            plots.reconstructions(model, data.val, dist_env, path)
        return metrics

    finished = fit(
        model,
        net,
        optimizer,
        scaler,
        data.train,
        validate,
        step,
        best_score,
        train_cfg,
        run_cfg,
        dist_env)
    has_test = any(len(pack.split["test"]) for pack in data.train.packs)
    if finished and run_cfg.test_samples and has_test:
        report_pretraining(model, data.train, out, run_cfg.test_samples, dist_env)
    elif finished and not has_test:
        dist_env.print("no report: the data hold no test samples")


def advice(data: Data, init_weights: dict) -> list[str]:
    """What to do instead, where a run is known to learn little (tests/README.md)."""
    if data.train.n >= FEW_PAIRS or init_weights or len(loss_weights(data.cfg)) == 1:
        return []
    return ["so few pairs teach random weights little when all losses start at once: "
            "python -m data.few_pairs learns in stages"]


def load_data(cfg: ModelConfig, train_cfg: TrainConfig, run_cfg: RunConfig,
              init_weights: dict) -> Data:
    """Open the packs and the tokenizer. UserError if they and the first weights don't fit."""
    packs = open_packs(run_cfg.data, cfg.image_size, train_cfg.min_crop_area)
    captions = (line["text"] for pack in packs for line in pack.lines("train"))
    tokenizer = choose_tokenizer(train_cfg, run_cfg, captions)
    cfg = replace(cfg, vocab_size=tokenizer.vocab_size, text_kind=tokenizer.kind)
    cfg.check()
    weights.check(cfg, init_weights)

    train = Samples(packs, "train", tokenizer, cfg, train_cfg, train_cfg.train_samples)
    val = Samples(packs, "val", tokenizer, cfg, train_cfg)
    unused = optim.dry_run(cfg, train_cfg, train.example())
    optim.epochs_to_steps(train_cfg, run_cfg, train.n)
    settings = {
        "model": asdict(cfg),
        "train": asdict(train_cfg),
        "run": asdict(run_cfg),
        "data": describe_packs(packs) | {"tokenizer": tokenizer.hash}}
    return Data(train, val, tokenizer, cfg, unused, settings)


# ----------------------------------------------------------------------------------------- the loop

def settings_at(step: int, cfg: ModelConfig, train_cfg: TrainConfig) -> Settings:
    """The settings of a training step. Edit this to change one of them during training.

    It must be a pure function of the step: the loader thread calls it ahead of the loop.
    Validation uses the configured values. A mask ratio that rises from 0.5 to 0.75:
    mask_ratio=0.5 + 0.25 * step / (train_cfg.steps - 1), rounded to whole patches."""
    return Settings(
        mask_ratio=cfg.mask_ratio,
        mlm_ratio=train_cfg.mlm_ratio,
        hard_negatives=train_cfg.hard_negatives,
        loss_weights=loss_weights(cfg))


def fit(model: M3AE, net: torch.nn.Module, optimizer, scaler, train: Samples, validate: Callable,
        step: int, best_score: float, train_cfg: TrainConfig, run_cfg: RunConfig,
        dist_env: DistEnv) -> bool:
    """THE training loop, of pre-training and of every downstream task -> True after the last step

    model: the module; net: the same module, in DDP; train: training samples;
    validate(model, step) -> metrics; the highest `score` is saved as best.pt; step, best_score:
    where to start. UserError after MAX_NONFINITE steps without a finite gradient."""
    out = Path(run_cfg.out)
    log = checkpoint.Log(out, step) if dist_env.is_main else None

    # This rank's micro-batches, from a background thread.
    def settings_of(step: int) -> Settings:
        return settings_at(step, model.cfg, train_cfg)

    num_micro_batches = train_cfg.batch_size // train_cfg.micro_batch // dist_env.world_size
    order = training_micro_batches(
        train, train_cfg, step, dist_env.rank, dist_env.world_size)
    micro_batches = load(train, order, train_cfg.seed, dist_env.device, settings_of)

    stop_signal, stopping = StopSignal(), False
    num_nonfinite = 0                  # steps in a row whose gradient was not finite
    sums: dict[str, torch.Tensor] = {}
    num_steps, num_skipped = 0, 0      # since the log's last line, as are the sums
    clock = time.perf_counter()
    show_bar = dist_env.is_main and sys.stderr.isatty()    # else a line each --log_every
    bar = tqdm(total=train_cfg.steps, initial=step, unit="step", disable=not show_bar,
               dynamic_ncols=True)
    model.train()

    while step < train_cfg.steps and not stopping:
        lr = optim.set_lr(optimizer, step, train_cfg)
        settings = settings_of(step)
        model.mask_ratio = settings.mask_ratio
        model.loss_weights = settings.loss_weights

        # Forward and backward, a micro-batch at a time. DDP averages the gradients at the last one.
        for i, loaded in enumerate(itertools.islice(micro_batches, num_micro_batches), 1):
            dropout_seed = masking.torch_seed(train_cfg.seed, step, loaded.micro_batch_index)
            torch.manual_seed(dropout_seed)
            is_last = i == num_micro_batches
            with nullcontext() if is_last or dist_env.world_size == 1 else net.no_sync():
                with dist_env.autocast():
                    outputs = net(loaded.batch)
                scaler.scale(outputs["loss"] / num_micro_batches).backward()
            for name, value in outputs.items():
                if name.endswith("loss"):
                    sums[name] = sums.get(name, 0) + value.detach()

        # The gradient's norm is the same on all ranks: all of them step, or all skip the step.
        scaler.unscale_(optimizer)
        max_norm = train_cfg.grad_clip or math.inf
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        norm, stopping = stop_signal.sync(norm, dist_env)      # one all-reduce, one wait
        if math.isfinite(norm):
            scaler.step(optimizer)
            num_nonfinite = 0
        else:
            num_skipped += 1
            num_nonfinite += 1
            config.require(num_nonfinite < MAX_NONFINITE, optim.DIVERGED)
        scaler.update()                # float16: a lower scale after a skipped step
        optimizer.zero_grad(set_to_none=dist_env.world_size == 1)  # DDP: views of its buckets
        step += 1
        num_steps += 1
        is_end = step == train_cfg.steps

        # Log.
        if step % run_cfg.log_every == 0 or is_end:
            count = num_steps * num_micro_batches * dist_env.world_size
            totals = dist_env.reduce_sums(sums)
            losses = {name: total / count for name, total in totals.items()}
            if dist_env.is_main:
                speed = num_steps * train_cfg.batch_size / (time.perf_counter() - clock)
                log.write(step, "train", lr=lr, norm=norm, skipped=num_skipped,
                          samples_per_s=speed, **losses)
                bar.set_postfix_str(checkpoint.format_metrics(losses) + f"  {speed:,.0f} samples/s")
                bar.update(step - bar.n)
                if not show_bar:
                    print(checkpoint.progress_line(step, train_cfg, lr, speed, losses), flush=True)
            sums = {}
            num_steps, num_skipped = 0, 0
            clock = time.perf_counter()

        # Validate and save; the speed excludes this time. A signal during validation saves at once.
        def save() -> None:
            if dist_env.is_main:
                checkpoint.save_checkpoint(out, model, optimizer, scaler, step, best_score)

        pause = time.perf_counter()
        if step % run_cfg.eval_every == 0 or is_end:
            with stop_signal.saving_at_once(save):
                metrics = validate(model, step)
            if dist_env.is_main:
                log.write(step, "val", **metrics)
                tqdm.write(f"step {step:,}  {checkpoint.format_metrics(metrics)}")
                plots.curves({out.name: checkpoint.read_log(out)}, out / "plots" / "curves.png")
                if metrics["score"] > best_score:
                    checkpoint.save_weights(out / "best.pt", model, step)
            best_score = max(best_score, metrics["score"])
        if step % run_cfg.save_every == 0 or is_end or stopping:
            save()
        clock += time.perf_counter() - pause
    bar.close()

    if step < train_cfg.steps:
        dist_env.print(f"stopped after step {step:,}; continue with --resume")
    return step == train_cfg.steps


if __name__ == "__main__":
    run(main)
