"""Fine-tune M³AE on questions (vqa), classes (cls) or retrieval (irtr); the test split is looked at once.

    python finetune.py vqa --init runs/pretrain                         on phantoms, after `python train.py`
    python finetune.py vqa --init none --tokenizer runs/pretrain        the same from random values
    python finetune.py cls --data packs/medpix --preset small --init runs/medpix --out runs/parts
    python finetune.py irtr --init runs/pretrain --zero_shot            retrieval by the matching head alone
    python finetune.py vqa --init runs/vqa --predict chest.png "Is there a pneumothorax?"
"""
import itertools
import json
import math
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import m3ae_mini                       # before torch: it says how threads wait for each other
import numpy as np
import torch
from tqdm import tqdm

from data.pack import open_packs
from data.prepare import clean, open_image, square
from m3ae_mini import M3AE, ModelConfig, loop, masking, metrics, plots, weights
from m3ae_mini.config import RunConfig, TrainConfig, UserError, require, opt, parse
from m3ae_mini.data import VAL_SEED, Samples, load, normalise, numbered, training_micro_batches, validation_micro_batches
from m3ae_mini.text import Tokenizer

PAIRS = 128                            # (image, text) pairs of one fusion in retrieval
NAMES = {"acc": "accuracy", "acc_open": "on open questions", "acc_closed": "on closed questions",
         "answer_not_in_list": "right answer not in the list"}
RIGHT = {"vqa": "answer", "cls": "label"}                  # where a pack's line says what is right


@dataclass
class TaskConfig:
    """What only the tasks ask."""
    answers: str = opt("train", "the answer list: train (of the training questions) or all (as released)")
    blind: bool = opt(False, "put the mean image in the dist_env of every image, in training and in test")
    zero_shot: bool = opt(False, "irtr: rank by the matching head of --init, without training")


def main():
    def add(parser):
        parser.add_argument("task", choices=("vqa", "cls", "irtr"), help="questions, classes or retrieval")
        parser.add_argument("--predict", nargs=2, metavar=("IMAGE", "TEXT"),
                            help="the likeliest answers of the run --init for an image of your own")

    configs = ModelConfig, TrainConfig, RunConfig, TaskConfig
    cfg, train_cfg, run_cfg, task_cfg, args = parse(__doc__, configs, add)
    if args.predict:
        return predict(cfg.task, train_cfg.init, *args.predict)
    run_cfg = replace(run_cfg, out=args.out or f"runs/{cfg.task}")
    out = Path(run_cfg.out)

    # ------------------------------------------------------------------------------------ what to learn from
    require(train_cfg.init, "say by --init which run or checkpoint to start from, or --init none")
    cfg, sources = weights.read_init_files(cfg, train_cfg, vars(args))
    make = partial(prepare, cfg, train_cfg, run_cfg, task_cfg, sources)
    dist_env, (train, val, test, choices, tokenizer, cfg) = loop.begin(train_cfg, cfg, run_cfg, make)
    train_cfg, run_cfg = loop.epochs_to_steps(train_cfg, run_cfg, train.n)

    settings = {"model": asdict(cfg), "train": asdict(train_cfg), "run": asdict(run_cfg),
                "task": asdict(task_cfg),
                "data": {"packs": [pack.fingerprint() for pack in train.packs], "tokenizer": tokenizer.hash,
                         "choices": choices}}
    checkpoint = dist_env.broadcast(lambda: loop.open_run(run_cfg, settings, dist_env))  # --gpus starts torchrun
    mean = mean_image(train, dist_env.device) if task_cfg.blind else None       # (3, S, S) or None
    if dist_env.is_main:
        loop.write_atomic(out / "tokenizer.json", lambda file: file.write(tokenizer.json.encode()))
        print(f"{train.n:,} training and {val.n:,} validation samples; {train.cut + val.cut + test.cut:,} "
              f"texts of more than {cfg.max_text_len} tokens are cut; choices: {len(choices):,}")

    # ------------------------------------------------------------------------------------ the model
    torch.manual_seed(train_cfg.seed)
    model = M3AE(cfg)
    if sources and not checkpoint:
        dist_env.print(weights.load_pretrained(model, sources))           # they are put in on every process, told by one
    net, optimizer, scaler, step, best = loop.learner(model, train, train_cfg, run_cfg, dist_env, checkpoint)
    log = loop.Log(out, step) if dist_env.is_main else None
    del sources, make                  # they hold what was loaded
    if task_cfg.zero_shot:
        return report(model, test, choices, mean, dist_env, run_cfg, step)

    # ------------------------------------------------------------------------------------ the loop
    chunks = train_cfg.batch_size // train_cfg.micro_batch // dist_env.world_size      # of a step, on this process
    batches = load(train, training_micro_batches(train, train_cfg, step, dist_env.rank, dist_env.world_size), train_cfg.seed,
                   dist_env.device, crop=train_cfg.min_crop_area < 1)
    bar = tqdm(total=train_cfg.steps, initial=step, unit="step", disable=not dist_env.is_main, dynamic_ncols=True)
    sums, since, skipped, clock = 0, 0, 0, time.perf_counter()                 # since the log's last line
    stop, stopping, in_a_row = loop.StopSignal(), False, 0
    model.train()

    while step < train_cfg.steps and not stopping:
        rate = loop.set_lr(optimizer, step, train_cfg)

        # Forward and backward, a chunk at a time; the processes add up their gradients at the last one.
        for i, (_, chunk, _, batch) in enumerate(itertools.islice(batches, chunks), 1):
            torch.manual_seed(masking.torch_seed(train_cfg.seed, step, chunk))         # dropout
            if mean is not None:
                batch["image"] = mean.expand_as(batch["image"])
            with net.no_sync() if dist_env.world_size > 1 and i < chunks else nullcontext():
                with dist_env.autocast():
                    loss = net(batch)["loss"]
                scaler.scale(loss / chunks).backward()
            sums = sums + loss.detach()

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
            value = dist_env.reduce_sums({"loss": sums})["loss"] / (since * chunks * dist_env.world_size)
            if dist_env.is_main:
                speed = since * train_cfg.batch_size / (time.perf_counter() - clock)
                log.write(step, "train", lr=rate, norm=norm, skipped=skipped, samples_per_s=speed, loss=value)
                bar.set_postfix_str(f"loss {value:.3f} {speed:,.0f} samples/s")
                bar.update(step - bar.n)
            sums, since, skipped, clock = 0, 0, 0, time.perf_counter()

        pause = time.perf_counter()
        if step % run_cfg.eval_every == 0 or last:
            found = evaluate(model, val, choices, mean, dist_env, run_cfg.eval_samples)
            if dist_env.is_main:
                log.write(step, "val", **found)
                shown = "  ".join(f"{name} {value:.4g}" for name, value in found.items() if " " not in name)
                tqdm.write(f"step {step:,}  {shown}")
                plots.curves(log.lines(), out / "plots" / "curves.png")
                if found["score"] > best:
                    loop.save(out / "best.pt", model, step)
            best = max(best, found["score"])

        if (step % run_cfg.save_every == 0 or last or stopping) and dist_env.is_main:
            loop.save_checkpoint(out, model, optimizer, scaler, step, best)
        clock += time.perf_counter() - pause
    bar.close()

    if stopping and step < train_cfg.steps:
        return dist_env.print(f"stopped after step {step:,}; go on with --resume")
    if run_cfg.test_samples:
        tested = dist_env.broadcast(partial(loop.latest_valid_checkpoint, out, "best.pt", "last.pt"))
        state = loop.load_checkpoint(tested)
        model.load_state_dict(state["model"])
        report(model, test, choices, mean, dist_env, run_cfg, state["step"])


def prepare(cfg, train_cfg, run_cfg, task_cfg, sources):
    """Open the packs and the tokenizer, fit the configuration to them -> the samples of three splits, answers
    or classes (none in retrieval), tokenizer, configuration. UserError where these or the weights misfit."""
    packs = open_packs(run_cfg.data, cfg.image_size, train_cfg.min_crop_area, cfg.task)
    texts = (line["text"] for pack in packs for line in pack.lines("train"))
    tokenizer = Tokenizer.choose(train_cfg, run_cfg, texts)
    matched = any(weights.part(name) in ("itm", "irtr") for state in sources.values() for name in state)
    require(not task_cfg.zero_shot or cfg.task == "irtr" and matched,
         "--zero_shot is for irtr, with an --init that has learned to match")

    choices = list_choices(packs, cfg.task, task_cfg.answers)
    number = {"vqa": "num_answers", "cls": "num_classes"}.get(cfg.task)
    cfg = replace(cfg, vocab_size=tokenizer.vocab_size, text_kind=tokenizer.kind,
                  **({number: len(choices)} if number else {}))
    cfg.check()
    require(saved_labels(train_cfg.init, cfg.task) in (None, choices), f"{train_cfg.init} has learned other answers "
         "or classes: start from the run that it was started from")
    weights.check(cfg, sources)
    index = {choice: i for i, choice in enumerate(choices)}
    splits = []
    for split, limit in ("train", train_cfg.train_samples), ("val", 0), ("test", 0):
        samples = Samples(packs, split, tokenizer, cfg, train_cfg, limit)
        if choices:                    # the first right answer that is in the list, or -1
            known = ((index[name] for name in truth(samples.line(n), cfg.task) if name in index)
                     for n in range(samples.n))
            samples.labels = np.array([next(right, -1) for right in known])
        splits.append(samples)
    return *splits, choices, tokenizer, cfg


def saved_labels(run, task):
    """The answers or classes that a run has learned for a task, as its config.json tells, or None."""
    try:
        told = json.loads((Path(run) / "config.json").read_text())
        fits = told["model"]["task"] == task and not told["task"]["blind"]
        return [str(name) for name in told["data"]["choices"]] if fits else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def truth(line, task):
    """What is right for a sample: the answers, any of which will do (between them stands #), or the class."""
    return line["answer"].split("#") if task == "vqa" else [line["label"]]


def list_choices(packs, task, answers):
    """The answers of the training split (or of all splits) in order of appearance, or the classes, sorted."""
    if task == "irtr":
        return []
    require(answers in ("train", "all"), f"--answers {answers} is not known: use train or all")
    for pack in packs:
        require(all(RIGHT[task] in line for line in pack.lines()),
             f"{pack.folder} holds samples without {RIGHT[task]}: prepare it with --task {task}")
    seen = {split: dict.fromkeys(name for pack in packs for line in pack.lines(split)
                                 for name in truth(line, task)) for split in ("train", "val", "test")}
    if task == "vqa":
        return list(seen["train"] if answers == "train" else seen["train"] | seen["val"] | seen["test"])
    unseen = sorted((seen["val"] | seen["test"]).keys() - seen["train"].keys())
    require(not unseen, f"no training sample has the class {', '.join(unseen)}: prepare another split")
    return sorted(seen["train"])


def mean_image(samples, device):
    """What --blind shows: the mean of (at most 2,048 of) the training images, (3, S, S), normalised."""
    total, count = 0, 0
    for _, _, _, batch in load(samples, validation_micro_batches(samples, 2048), VAL_SEED, device):
        total, count = total + batch["image"].sum(0), count + len(batch["image"])
    return total / count


# ---------------------------------------------------------------------------------------------- evaluation

@torch.no_grad()
def evaluate(model, samples, choices, mean, dist_env, limit):
    """Every figure of the task over at most `limit` samples, each counted once, and `score`, by which the
    best checkpoint is chosen: accuracy, or the mean of the recalls."""
    model.eval()
    if model.cfg.task == "irtr":
        found = retrieval(model, samples, mean, dist_env, limit)
        found["score"] = sum(found.values()) / len(found)
    else:
        sums = {}
        chunks = validation_micro_batches(samples, limit, dist_env.rank, dist_env.world_size)
        for _, _, numbers, batch in load(samples, chunks, VAL_SEED, dist_env.device):
            if mean is not None:
                batch["image"] = mean.expand_as(batch["image"])
            with dist_env.autocast():
                logits = model(batch)[f"{model.cfg.task}_logits"]                      # (B, A)
            lines = [samples.line(n) for n in numbers]
            told = [choices[i] for i in logits.argmax(-1).tolist()]
            pairs = metrics.answer_metrics(told, [truth(line, model.cfg.task) for line in lines], choices,
                                   model.cfg.task, [line.get("closed") for line in lines])
            for name, pair in pairs.items():
                sums[name] = sums.get(name, 0) + pair
        found = {name: total / count for name, (total, count) in dist_env.reduce_sums(sums).items() if count}
        found["score"] = found["acc"]
    model.train()
    return found


def retrieval(model, samples, mean, dist_env, limit):
    """Recall at 1, 5 and 10 in both directions among `limit` samples at most (paper, section 3.3).

    Each image is encoded once, each text once a process; only the fusion runs for every pair. The processes
    share the images."""
    numbers = np.concatenate([chunk for _, _, chunk in validation_micro_batches(samples, limit)])        # (n,)
    image_number = numbered((which, int(samples.packs[which].samples["image"][row]))
                            for which, row in samples.where[numbers])                                  # (n,)
    text = numbered(samples.text(n)[:samples.cfg.max_text_len - 2].tobytes() for n in numbers)    # (n,)
    _, first_image = np.unique(image_number, return_index=True)                                      # (P,)
    _, first_text = np.unique(text, return_index=True)                                            # (Q,)

    def batches(rows):
        chunks = ((masking.VALIDATION, 0, rows[i:i + PAIRS]) for i in range(0, len(rows), PAIRS))
        return (batch for _, _, _, batch in load(samples, chunks, VAL_SEED, dist_env.device))

    texts, masks, fc = [], [], model.objectives["irtr"].fc
    with dist_env.autocast():
        for batch in batches(numbers[first_text]):
            room = samples.cfg.max_text_len - batch["text_ids"].shape[1]
            encoded = model.encode_text(batch["text_ids"], batch["text_mask"])                    # (B, T, D)
            texts.append(torch.nn.functional.pad(encoded, (0, 0, 0, room)))
            masks.append(torch.nn.functional.pad(batch["text_mask"], (0, room)))
        texts, masks = torch.cat(texts), torch.cat(masks)                                # (Q, T, D), (Q, T)

        own = np.arange(dist_env.rank, len(first_image), dist_env.world_size)                     # this process's
        scores = torch.zeros(len(texts), len(first_image), device=dist_env.device)                 # (Q, P)
        bar = tqdm(total=len(own) * len(texts), desc="pairs", leave=False, disable=not dist_env.is_main)
        for start, batch in zip(range(0, len(own), PAIRS), batches(numbers[first_image[own]])):
            shown = batch["image"] if mean is None else mean.expand_as(batch["image"])
            for p, image in zip(own[start:start + PAIRS], model.encode_image(shown)):             # (1+L, D)
                for i in range(0, len(texts), PAIRS):
                    some = slice(i, i + PAIRS)
                    feature = model.pooled_pair(texts[some], image[None], masks[some])
                    # In float32: among equal scores the wrong ones come first, and bf16 makes many equal.
                    scores[some, p] = (feature.float() * fc.weight).sum(1) + fc.bias              # (≤ PAIRS,)
                    bar.update(len(texts[some]))
        bar.close()

    scores, right = dist_env.all_reduce(scores).cpu(), torch.zeros(scores.shape, dtype=torch.bool)          # (Q, P)
    right[text, image_number] = True
    return {**metrics.recall(scores, right, "t2i"),
            **metrics.recall(scores.T, right.T, "i2t")}


def report(model, test, choices, mean, dist_env, run_cfg, step):
    """The test split, once, in metrics.jsonl and in words."""
    found = evaluate(model, test, choices, mean, dist_env, run_cfg.test_samples)
    if not dist_env.is_main:
        return
    loop.Log(run_cfg.out, math.inf).write(step, "test", **found)
    print(f"\nOn {min(run_cfg.test_samples, test.n):,} test samples (step {step:,}):")
    del found["score"]
    for name, value in found.items():
        print(f"  {NAMES.get(name, name):32}{value:7.1%}")


# ---------------------------------------------------------------------------------------------- prediction

@torch.no_grad()
def predict(task, run, path, text):
    """Print the five likeliest answers of a fine-tuned run about an image, and save the text's attention."""
    run, path, text, choices = Path(run), Path(path), clean(text), saved_labels(run, task)
    require(choices, f"{run} is no run of finetune.py {task} that saw images: give one by --init")
    tokenizer, (cfg, state) = Tokenizer.load(run), weights.load_m3ae(run)
    try:
        pixels = np.array(square(open_image(path), cfg.image_size).convert("RGB"))         # (S, S, 3)
    except Exception as error:         # Pillow's formats raise all kinds on a damaged file
        raise UserError(f"{path} can't be read as an image ({error})") from None

    model = M3AE(cfg).eval()
    model.load_state_dict(state)
    (body, _), = tokenizer.encode([text])
    require(0 < len(body) <= cfg.max_text_len - 2,
         f"the text has {len(body)} tokens, 1 to {cfg.max_text_len - 2} can be read: write another")
    ids = torch.tensor([[tokenizer.cls_id, *body, tokenizer.sep_id]])                             # (1, T)
    image = normalise(torch.from_numpy(pixels).permute(2, 0, 1)[None])                          # (1, 3, S, S)
    batch = {"image": image, "text_ids": ids, "text_mask": torch.ones_like(ids),
             f"{cfg.task}_labels": torch.zeros(1, dtype=torch.long)}
    logits = model(batch)[f"{cfg.task}_logits"][0, :len(choices)]                                 # (A,)
    likely = (logits.sigmoid() if cfg.task == "vqa" else logits.softmax(0)).topk(min(5, len(choices)))
    for share, i in zip(likely.values.tolist(), likely.indices.tolist()):
        print(f"{share:7.1%}  {choices[i]}")
    out = run / "plots" / f"{path.stem[:60]}-attention.png"
    out.parent.mkdir(exist_ok=True)
    plots.attention(model, batch, tokenizer.words(ids[0]), out)
    print(f"attention: {out}")


if __name__ == "__main__":
    loop.run(main)
