"""The optimizer's parameter groups, the learning-rate schedule, and what is frozen."""
from collections.abc import Collection

import torch
from torch import nn

from .config import ModelConfig, RunConfig, TrainConfig, require
from .distributed import DistEnv
from .objectives import M3AE

DIVERGED = "no finite gradient in 20 steps: lower --lr, lengthen --warmup, or use --dtype float32"


def lr_mult_of(name: str, train_cfg: TrainConfig) -> float:
    """The learning rate of a parameter's part, as a multiple of --lr."""
    part = {"vit": "vit", "text": "text", "objectives": "head"}.get(name.split(".")[0], "fusion")
    return getattr(train_cfg, f"{part}_lr_mult")


def freeze(model: nn.Module, train_cfg: TrainConfig, unused: Collection[str] = ()) -> None:
    """Freeze the parts whose rate is 0: no gradient, no optimizer state, no dropout there.

    unused: names of parameters that no loss reads (see `dry_run`). They are frozen, too."""
    for name, parameter in model.named_parameters():
        if name in unused or lr_mult_of(name, train_cfg) == 0:
            parameter.requires_grad_(False)
    for name, module in model.named_modules():
        for field in ("dropout", "p"):                                # ours, nn.Dropout's
            if lr_mult_of(name, train_cfg) == 0 and isinstance(getattr(module, field, None), float):
                setattr(module, field, 0.0)
    require(any(parameter.requires_grad for parameter in model.parameters()),
            "all parts are frozen: one of --vit_lr_mult, --text_lr_mult, --fusion_lr_mult, "
            "--head_lr_mult must be above 0")


def param_groups(model: nn.Module, train_cfg: TrainConfig) -> list[dict]:
    """AdamW's groups: a rate for each part, and decay for matrices alone."""
    groups: dict[tuple, dict] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            lr_mult = lr_mult_of(name, train_cfg)
            decay = train_cfg.weight_decay if parameter.ndim > 1 else 0.0
            new = {"params": [], "lr_mult": lr_mult, "weight_decay": decay}
            groups.setdefault((lr_mult, decay), new)["params"].append(parameter)
    return list(groups.values())


def learning_rate(step: int, train_cfg: TrainConfig) -> float:
    """Linear warm-up over a share of the steps, then linear decay to 0."""
    warmup_steps = max(1, round(train_cfg.warmup * train_cfg.steps))
    decay_steps = max(1, train_cfg.steps - warmup_steps)
    rising = (step + 1) / warmup_steps
    falling = (train_cfg.steps - step) / decay_steps
    return train_cfg.lr * min(rising, falling)


def set_lr(optimizer: torch.optim.Optimizer, step: int, train_cfg: TrainConfig) -> float:
    """Set each group's rate, a multiple of the schedule's -> the schedule's."""
    lr = learning_rate(step, train_cfg)
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_mult"]
    return lr


def epochs_to_steps(train_cfg: TrainConfig, run_cfg: RunConfig, num_samples: int) -> None:
    """Turn epochs into steps: --epochs, and --eval_every 0, --save_every 0 (once an epoch)."""
    epoch = num_samples / train_cfg.batch_size
    if train_cfg.epochs:
        train_cfg.steps = max(1, round(train_cfg.epochs * epoch))
    run_cfg.eval_every = run_cfg.eval_every or max(1, round(epoch))
    run_cfg.save_every = run_cfg.save_every or max(1, round(epoch))


def dry_run(cfg: ModelConfig, train_cfg: TrainConfig, batch: dict[str, torch.Tensor]) -> list[str]:
    """One step on the meta device (shapes without numbers), before a run begins.

    Returns the names of the parameters that get no gradient, as no loss reads them (without ITM,
    the last layer's image stream): DDP refuses them, so `freeze` takes them. UserError if all parts
    are frozen, or if the fusion does not keep to its contract (Fusion.forward)."""
    with torch.device("meta"):
        model = M3AE(cfg).to("meta")
    freeze(model, train_cfg)
    meta_batch = {name: tensor.to("meta") for name, tensor in batch.items()}
    check_fusion(model, meta_batch)
    model(meta_batch)["loss"].backward()
    return [name for name, parameter in model.named_parameters() if parameter.grad is None]


@torch.no_grad()
def check_fusion(model: nn.Module, batch: dict[str, torch.Tensor]) -> None:
    """Retrieval fuses one image with many texts, and vice versa: try both, on shapes."""
    mask = batch["text_mask"]                                         # (B, T)
    text = model.encode_text(batch["text_ids"], mask)                 # (B, T, D)
    image = model.encode_image(batch["image"])                        # (B, 1+L, D)
    wanted = [tuple(text.shape), tuple(image.shape)]
    for what, texts, images in (("one image and many texts", text, image[:1]),
                                ("one text and many images", text[:1], image)):
        try:
            shapes = [tuple(x.shape) for x in model.fuse(texts, images, mask[:len(texts)])]
        except Exception as error:
            shapes = f"the error '{str(error)[:300]}'"
        require(shapes == wanted, f"Fusion.forward fails with {what}, which retrieval needs (see "
                f"its docstring): it returns {shapes}, not {wanted}")


def describe(model: nn.Module, dist_env: DistEnv) -> str:
    """The start-up line: how many parameters, how many of them are trained, where, in what type."""
    total = sum(p.numel() for p in model.parameters()) / 1e6
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad) / 1e6
    where = f"{dist_env.world_size} × {dist_env.device.type} in {str(dist_env.dtype)[6:]}"
    return f"{total:.1f} million parameters, {trained:.1f} million trained, on {where}"
