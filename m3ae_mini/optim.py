"""The optimizer's parameter groups, the learning-rate schedule, and what is frozen."""
import torch
from torch import nn

from .config import RunConfig, TrainConfig
from .distributed import DistEnv

DIVERGED = ("no finite gradient in 20 steps in a row: try a lower --lr, a longer --warmup or "
            "--dtype float32")


def param_groups(model: nn.Module, train_cfg: TrainConfig) -> list[dict]:
    """AdamW's groups: a rate each for text encoder, image encoder, fusion and heads; only matrices
    decay."""
    lr_mults = {"text": 1.0, "vit": train_cfg.vit_lr_mult, "objectives": train_cfg.head_lr_mult}
    groups: dict[tuple, dict] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        part = name.split(".")[0]
        lr_mult = lr_mults.get(part, train_cfg.fusion_lr_mult)
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


def freeze_unused(model: nn.Module, batch: dict[str, torch.Tensor]) -> None:
    """Freeze what no loss reads (without ITM, the last layer's image stream): DDP refuses
    parameters that get no gradient. One step of a copy on the meta device, which has shapes but no
    numbers, finds them."""
    with torch.device("meta"):
        meta_model = type(model)(model.cfg)
    meta_batch = {name: tensor.to("meta") for name, tensor in batch.items()}
    meta_model.to("meta")(meta_batch)["loss"].backward()
    for parameter, meta_parameter in zip(model.parameters(), meta_model.parameters(), strict=True):
        if meta_parameter.grad is None:
            parameter.requires_grad_(False)


def describe(model: nn.Module, dist_env: DistEnv) -> str:
    """The start-up line: how many parameters, where, in what type."""
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    return (f"{millions:.1f} million parameters on {dist_env.world_size} × "
            f"{dist_env.device.type} in {str(dist_env.dtype).removeprefix('torch.')}")
