"""Fine-tune M³AE on questions (vqa), classes (cls) or retrieval (irtr); test it once.

Each task has defaults of its own: TASKS in m3ae_mini/config.py. --help shows those of pre-training.

    python finetune.py vqa --init runs/pretrain                      on phantoms, after train.py
    python finetune.py vqa --init none --tokenizer runs/pretrain     the same from random weights
    python finetune.py cls --data packs/medpix --preset small --init runs/medpix --out runs/parts
    python finetune.py irtr --init runs/pretrain --zero_shot         rank by the matching head alone
    python finetune.py vqa --init runs/vqa --predict chest.png "Is there a pneumothorax?"
    python finetune.py irtr --init runs/itc --search "effusion"      after train.py --itc 1
    python finetune.py embed --init runs/pretrain --data packs/medpix --out features.npz
"""
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import m3ae_mini                       # before torch: sets OMP_WAIT_POLICY
import torch
from torch.nn.parallel import DistributedDataParallel

from data.bag_of_words import fit_bag_of_words
from data.baselines import mean_image, most_frequent_label
from data.card import write_card
from data.confusion import draw_confusion
from data.labels import (
    check_scored, label_ids, label_note, list_labels, saved_labels, several_labels)
from data.predict import trained_on, use_run
from data.prepare import describe_packs, open_packs
from data.report import log_names
from data.task_metrics import (
    figure_intervals, figures, predict_table, report_table, score, write_table)
from data.texts import choose_tokenizer, text_notes
from m3ae_mini import M3AE, checkpoint, config, optim, weights
from m3ae_mini.config import ModelConfig, RunConfig, TrainConfig, opt, require
from m3ae_mini.distributed import (
    DistEnv, keep_freed_memory, launch_torchrun, num_processes, pick_device, run,
    started_by_torchrun)
from m3ae_mini.loader import Samples
from m3ae_mini.model import compile_layers, use_grad_checkpointing
from m3ae_mini.tokenizer import Tokenizer
from train import fit


@dataclass
class TaskConfig:
    """What only the downstream tasks need."""
    answers: str = opt(
        "train", "the answer list: train (of the training questions) or all (as released)")
    blind: bool = opt(
        False, "show the mean image instead of every image, in training and in test")
    zero_shot: bool = opt(
        False, "irtr: rank with the weights of --init, without training")
    rank: str = opt(
        "match", "irtr: rank by match (the fusion scores every pair) or itc (the ITC head)")
    rerank: int = opt(
        0, "irtr: after --rank itc, the fusion ranks this many candidates again")

    def check(self) -> None:
        """Raise UserError if a setting is not known or two contradict each other."""
        require(self.answers in ("train", "all"), f"--answers {self.answers}: use train or all")
        require(self.rank in ("match", "itc"), f"--rank {self.rank}: use match or itc")
        require(self.rerank == 0 or self.rank == "itc" and self.rerank > 0,
                "--rerank needs --rank itc, and a value of 1 or more")


class Data(NamedTuple):
    """Samples, labels and settings of a fine-tuning run."""
    train: Samples
    val: Samples
    test: Samples | None               # None if the packs hold no test samples
    labels: list[str]                  # the answer list or the classes; retrieval has none
    ranking: tuple[str, int]           # of retrieval's candidates: --rank, --rerank
    tokenizer: Tokenizer
    cfg: ModelConfig                   # with the sizes of vocabulary and label list
    unused: list[str]                  # names of the parameters that no loss reads
    settings: dict                     # written to config.json, compared on resume


def main():
    # Settings: a preset's for the task, and those given as flags.
    configs = ModelConfig, TrainConfig, RunConfig, TaskConfig
    parser = config.make_parser(__doc__, configs)
    parser.add_argument("task", choices=("vqa", "cls", "irtr", "embed"))
    parser.add_argument(
        "--predict", nargs="+", metavar=("IMAGE", "TEXT"),
        help="answers of the run --init: for an image and a text, a table, or a folder of images")
    parser.add_argument(
        "--search", metavar="QUERY", help="irtr: images for words, or texts for an image file")
    cfg, train_cfg, run_cfg, task_cfg, args = config.parse(parser, configs)

    # The use of a finished run: nothing is trained.
    if args.predict or args.search or cfg.task == "embed":
        return use_run(cfg.task, args, args.data, pick_device(run_cfg))
    run_cfg.out = args.out or f"runs/{cfg.task}"
    out = Path(run_cfg.out)
    train_cfg.check()
    run_cfg.check()
    task_cfg.check()
    require(train_cfg.init, "give --init RUN or CHECKPOINT, or --init none for random weights")
    check_data(args.data, train_cfg.init, cfg.task)

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
        data = load_data(new_cfg, train_cfg, run_cfg, task_cfg, init_weights)
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
        data = load_data(cfg, train_cfg, run_cfg, task_cfg, init_weights)
        if dist_env.is_main:
            checkpoint.check_same_settings(out, data.settings)
            checkpoint.save_settings(out, data.settings, data.tokenizer)
    dist_env.print(f"{data.train.n:,} training and {data.val.n:,} validation samples; "
                   f"labels: {label_note(data.train, data.labels)}")
    for line in text_notes(data.tokenizer, *filter(None, (data.train, data.val, data.test))):
        dist_env.print(line)

    # The model, its first weights, and what is frozen.
    torch.manual_seed(train_cfg.seed)
    model = M3AE(data.cfg)
    if init_weights and not resume_from:
        dist_env.print(weights.origin_table(model, *weights.load_pretrained(model, init_weights)))
    fit_bag_of_words(model, data.train, dist_env, resumed=bool(resume_from))
    optim.freeze(model, train_cfg, data.unused)
    model.to(dist_env.device)
    keep_freed_memory()
    if task_cfg.zero_shot:
        return report(model, data, run_cfg, dist_env, step=0)

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

    # Train, with the loop of train.py; then test the best checkpoint, once.
    def validate(model: M3AE, step: int) -> dict[str, float]:
        table = predict_table(
            model, data.val, data.labels, dist_env, run_cfg.eval_samples, data.ranking)
        found = figures(table, cfg.task)
        return found | {"score": score(found, cfg.task)}

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
    if finished and run_cfg.test_samples:
        best = checkpoint.load_best(out, dist_env)
        model.load_state_dict(best["model"])
        report(model, data, run_cfg, dist_env, best["step"])


def check_data(given: str | None, init: str, task: str) -> None:
    """UserError where phantoms would follow by mistake on the real images of --init."""
    require(not (Path(init) / "few_pairs.json").is_file(),
            f"{init} holds the stages of data.few_pairs: give --init {init}/all")
    require(given or trained_on(init) == "phantoms",
            f"{init} was not trained on phantoms: give --data, a pack of {task}")


def load_data(cfg: ModelConfig, train_cfg: TrainConfig, run_cfg: RunConfig,
              task_cfg: TaskConfig, init_weights: dict) -> Data:
    """Open packs and tokenizer, list the labels. UserError if they and the weights don't fit."""
    packs = open_packs(run_cfg.data, cfg.image_size, train_cfg.min_crop_area, cfg.task)
    texts = (line["text"] for pack in packs for line in pack.lines("train"))
    tokenizer = choose_tokenizer(train_cfg, run_cfg, texts)
    labels = list_labels(packs, cfg.task, task_cfg.answers)
    cfg = replace(cfg, vocab_size=tokenizer.vocab_size, text_kind=tokenizer.kind)
    if cfg.task == "vqa":
        cfg.num_answers = len(labels)
    if cfg.task == "cls":
        cfg.num_classes = len(labels)
    cfg.check()

    # The weights to start from must fit the model, and have learned the same labels if any.
    modules = {weights.module_of(name) for state in init_weights.values() for name in state}
    need_matching = task_cfg.rank == "match" or task_cfg.rerank
    learned = modules & {"itm", "irtr"} if need_matching else modules & {"itc"}
    require(not task_cfg.zero_shot or cfg.task == "irtr" and learned,
            "--zero_shot is for irtr, with an --init that has the head that --rank uses")
    require(task_cfg.rank == "match" or cfg.itc > 0,
            "--rank itc needs an ITC head: give an --init trained with --itc, or --itc 1")
    has_head = bool(labels) and cfg.task in modules
    require(not has_head or saved_labels(Path(train_cfg.init), cfg.task) == labels,
            f"{train_cfg.init} was trained with other labels: give --init the run that it was "
            "fine-tuned from")
    weights.check(cfg, init_weights)

    # The samples, their labels, and the image that --blind shows.
    train = Samples(packs, "train", tokenizer, cfg, train_cfg, train_cfg.train_samples)
    val = Samples(packs, "val", tokenizer, cfg, train_cfg)
    has_test = any(len(pack.split["test"]) for pack in packs)
    require(has_test and run_cfg.test_samples or not task_cfg.zero_shot,
            "--zero_shot ranks the test samples: prepare a pack with some, and leave out "
            "--test_samples 0")
    test = Samples(packs, "test", tokenizer, cfg, train_cfg) if has_test else None
    mean = mean_image(train) if task_cfg.blind else None
    for samples in filter(None, (train, val, test)):
        samples.constant_image = mean
        if labels:
            samples.label_ids = label_ids(samples, labels)
    several = several_labels(packs, cfg.task)
    if several:
        check_scored(val, run_cfg.eval_samples)

    unused = optim.dry_run(cfg, train_cfg, train.example())
    optim.epochs_to_steps(train_cfg, run_cfg, train.n)
    settings = {
        "model": asdict(cfg),
        "train": asdict(train_cfg),
        "run": asdict(run_cfg),
        "task": asdict(task_cfg),
        "data": describe_packs(packs) | {"tokenizer": tokenizer.hash, "labels": labels,
                                        "several_labels": several}}
    ranking = task_cfg.rank, task_cfg.rerank
    return Data(train, val, test, labels, ranking, tokenizer, cfg, unused, settings)


def report(model: M3AE, data: Data, run_cfg: RunConfig, dist_env: DistEnv, step: int) -> None:
    """Evaluate on the test split, if there is one; log and print the metrics."""
    if data.test is None:
        return dist_env.print("no report: the data hold no test samples")
    count = min(run_cfg.test_samples, data.test.n)
    if data.cfg.task == "irtr" and data.ranking[0] == "match":
        dist_env.print(f"scoring up to {count:,} × {count:,} pairs; --rank itc --rerank 32 would "
                       f"score {64 * count:,}")
    table = predict_table(
        model, data.test, data.labels, dist_env, run_cfg.test_samples, data.ranking)
    if not dist_env.is_main:
        return

    # The figures, their intervals, and the table that all of them come from.
    out, task = Path(run_cfg.out), data.cfg.task
    found, ranges = figures(table, task), figure_intervals(table, task)
    log = checkpoint.Log(out, math.inf)
    baseline = {}
    several = data.settings["data"]["several_labels"]
    if task != "irtr" and not several:
        share = most_frequent_label(data.train, table["target"], data.labels)
        baseline = {"most_frequent_label": share}
    log.write(step, "test", **found, score=score(found, task), **baseline, **log_names(ranges))
    write_table(table, out / "test_predictions.csv")
    if task == "cls" and not several:
        draw_confusion(table, out / "plots" / "confusion.png")
    by = "patient" if any("patient" in data.test.line(n) for n in range(count)) else "image"
    print(f"\nOn {count:,} test samples (step {step:,}), with 95 % intervals by {by}:")
    print(report_table(found, ranges, table))
    if baseline:
        print(f"  {'always the most frequent label':32}{share:>7.1%}")
    write_card(out, data.test.packs)
    print(f"Predictions: {out / 'test_predictions.csv'}")
    print(f"Model card: {out / 'card.md'}")


if __name__ == "__main__":
    run(main)
