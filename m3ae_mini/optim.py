"""The optimizer's parameter groups, the learning-rate schedule, and what is frozen."""
import torch
from torch import nn

from .config import ModelConfig, RunConfig, TrainConfig, UserError, require
from .distributed import DistEnv
from .objectives import M3AE

DIVERGED = ("no finite gradient in 20 steps in a row: try a lower --lr, a longer --warmup or "
            "--dtype float32")


def part_of(name: str) -> str:
    """The part whose rate a parameter has: vit, text, head, or fusion (with projections and
    poolers)."""
    first = name.split(".")[0]
    return {"vit": "vit", "text": "text", "objectives": "head"}.get(first, "fusion")


def lr_mults(train_cfg: TrainConfig) -> dict[str, float]:
    """Each part's rate, as a multiple of --lr."""
    return {"vit": train_cfg.vit_lr_mult, "text": train_cfg.text_lr_mult,
            "fusion": train_cfg.fusion_lr_mult, "head": train_cfg.head_lr_mult}


def freeze(model: nn.Module, train_cfg: TrainConfig) -> None:
    """Freeze the parts whose rate is 0: no gradient, no optimizer state, no dropout there."""
    frozen = {part for part, lr_mult in lr_mults(train_cfg).items() if lr_mult == 0}
    for name, parameter in model.named_parameters():
        if part_of(name) in frozen:
            parameter.requires_grad_(False)
    for name, module in model.named_modules():
        for field in ("dropout", "p"):                                # ours, nn.Dropout's
            if part_of(name) in frozen and isinstance(getattr(module, field, None), float):
                setattr(module, field, 0.0)
    require(any(parameter.requires_grad for parameter in model.parameters()),
            "all parts are frozen, so nothing is trained: give one of --vit_lr_mult, "
            "--text_lr_mult, --fusion_lr_mult, --head_lr_mult a value above 0")


def param_groups(model: nn.Module, train_cfg: TrainConfig) -> list[dict]:
    """AdamW's groups: a rate for each part, and decay for matrices alone."""
    mults = lr_mults(train_cfg)
    groups: dict[tuple, dict] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        lr_mult = mults[part_of(name)]
        decay = train_cfg.weight_decay if parameter.ndim > 1 else 0.0
        group = groups.setdefault((lr_mult, decay),
                                  {"params": [], "lr_mult": lr_mult, "weight_decay": decay})
        group["params"].append(parameter)
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
    """Turn lengths in epochs into steps: --epochs, and --eval_every 0 and --save_every 0, "an
    epoch"."""
    epoch = num_samples / train_cfg.batch_size
    if train_cfg.epochs:
        train_cfg.steps = max(1, round(train_cfg.epochs * epoch))
    run_cfg.eval_every = run_cfg.eval_every or max(1, round(epoch))
    run_cfg.save_every = run_cfg.save_every or max(1, round(epoch))


def check_model(cfg: ModelConfig, train_cfg: TrainConfig, batch: dict[str, torch.Tensor]) -> None:
    """What `freeze` and `dry_run` refuse, found before a run begins: UserError."""
    with torch.device("meta"):
        model = M3AE(cfg)
    freeze(model, train_cfg)
    dry_run(model, batch)


def dry_run(model: nn.Module, batch: dict[str, torch.Tensor]) -> None:
    """One step of a copy on the meta device, which has shapes but no numbers, before the first
    step.

    It freezes what no loss reads (without ITM, the last layer's image stream): DDP refuses
    parameters that get no gradient. UserError where the fusion does not keep to its contract
    (Fusion.forward)."""
    with torch.device("meta"):
        meta_model = type(model)(model.cfg).to("meta")
    meta_batch = {name: tensor.to("meta") for name, tensor in batch.items()}
    meta_model(meta_batch)["loss"].backward()
    for parameter, meta_parameter in zip(model.parameters(), meta_model.parameters(), strict=True):
        if meta_parameter.grad is None:
            parameter.requires_grad_(False)
    check_fusion(meta_model.eval(), meta_batch)


@torch.no_grad()
def check_fusion(model: nn.Module, batch: dict[str, torch.Tensor]) -> None:
    """Retrieval fuses one image with many texts, and one text with many images: try both, on
    shapes."""
    mask = batch["text_mask"]                                         # (B, T)
    text = model.encode_text(batch["text_ids"], mask)                 # (B, T, D)
    image = model.encode_image(batch["image"])                        # (B, 1+L, D)
    for what, one_text, one_image in (("one image beside many texts", slice(None), slice(1)),
                                      ("one text beside many images", slice(1), slice(None))):
        inputs = text[one_text], image[one_image], mask[one_text]
        try:
            streams = model.fuse(*inputs)
            shapes = [stream.shape for stream in streams]
        except Exception as error:
            raise UserError(f"Fusion.forward fails with {what}, which retrieval needs (see its "
                            f"docstring): {str(error)[:300]}") from error
        wanted = [(len(text), *text.shape[1:]), (len(text), *image.shape[1:])]
        require([tuple(shape) for shape in shapes] == wanted,
                f"Fusion.forward with {what} returns {[tuple(shape) for shape in shapes]}, not "
                f"{wanted}, which retrieval needs (see its docstring)")


def describe(model: nn.Module, dist_env: DistEnv) -> str:
    """The start-up line: how many parameters, how many of them are trained, where, in what type."""
    total = sum(p.numel() for p in model.parameters()) / 1e6
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad) / 1e6
    return (f"{total:.1f} million parameters, {trained:.1f} million trained, on "
            f"{dist_env.world_size} × {dist_env.device.type} in "
            f"{str(dist_env.dtype).removeprefix('torch.')}")
