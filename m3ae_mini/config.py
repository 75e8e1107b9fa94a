"""Every setting once, with its meaning, its presets and its flag: a new setting is one new line.

Errors of the user's making are raised here, too: `require` checks a condition, `reading` guards a
file."""
import json
import math
import sys
from argparse import SUPPRESS, ArgumentParser, BooleanOptionalAction, Namespace
from argparse import RawDescriptionHelpFormatter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any


# ------------------------------------------------------------------------------------------- errors

class UserError(Exception):
    """A mistake of the user's making: one sentence that says what is wrong and how to mend it."""

    def __init__(self, sentence: str):
        super().__init__("".join(c if c.isprintable() else " " for c in sentence[:1500]))


def require(condition: Any, sentence: str) -> None:
    """Raise UserError with this sentence unless the condition holds."""
    if not condition:
        raise UserError(sentence)


@contextmanager
def reading(path: str | Path) -> Iterator[None]:
    """If anything fails while this file is read, raise a UserError that names it."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"{path} can't be read: is it the right path, a complete file of the right type? "
            f"({type(error).__name__}: {str(error)[:200]})") from error


def read_json(path: Path) -> dict:
    """A JSON file's object; {} if there is no such file."""
    with reading(path):
        return dict(json.loads(path.read_bytes())) if path.is_file() else {}


# ----------------------------------------------------------------------------------------- settings

def opt(default: Any, help: str) -> Any:
    """A field of a configuration, with the help text of its flag."""
    return field(default=default, metadata={"help": help})


@dataclass
class ModelConfig:
    """The architecture and its losses; the defaults are the paper's (366 million parameters)."""
    task: str = opt("pretrain", "pretrain, vqa, cls or irtr: which heads and losses are built")
    image_size: int = opt(288, "side of the square image, in pixels")
    patch_size: int = opt(16, "side of a patch, in pixels")
    vocab_size: int = opt(50265, "number of tokens; the scripts take it from the tokenizer")
    max_text_len: int = opt(64, "longest text in tokens, special tokens included")
    text_kind: str = opt("roberta", "roberta or bert: positions, padding, norms, token types")
    text_max_positions: int = opt(514, "size of the text position embedding")
    vit_width: int = opt(768, "width of the image encoder")
    vit_blocks: int = opt(11, "blocks of the image encoder (the release uses 11 of CLIP's 12)")
    vit_heads: int = opt(12, "attention heads of the image encoder")
    vit_act: str = opt("quick_gelu", "activation of the image encoder: quick_gelu or gelu")
    text_width: int = opt(768, "width of the text encoder")
    text_layers: int = opt(12, "layers of the text encoder")
    text_heads: int = opt(12, "attention heads of the text encoder")
    fusion_width: int = opt(768, "width of the fusion")
    fusion_layers: int = opt(6, "layers of the fusion")
    fusion_heads: int = opt(12, "attention heads of the fusion")
    mim_layer: int = opt(3, "decode pixels after this many fusion layers; -1: after all")
    decoder_width: int = opt(384, "width of the pixel decoder")
    decoder_layers: int = opt(4, "blocks of the pixel decoder")
    decoder_heads: int = opt(6, "attention heads of the pixel decoder")
    mask_ratio: float = opt(0.75, "share of the patches that is hidden")
    norm_pix_loss: bool = opt(True, "reconstruct each patch normalised by its mean and variance")
    num_answers: int = opt(0, "size of the answer list (vqa); the scripts take it from the data")
    num_classes: int = opt(0, "number of classes (cls); the scripts take it from the data")
    dropout: float = opt(0.1, "dropout on embeddings and sub-layers of text encoder and fusion")
    attn_dropout: float = opt(0.1, "dropout on their attention weights; 0 is faster on a CPU")
    mlm: float = opt(1.0, "weight of masked language modelling; 0 leaves it out")
    mim: float = opt(1.0, "weight of masked image modelling; 0 leaves it out")
    itm: float = opt(1.0, "weight of image-text matching; 0 leaves it out")
    itc: float = opt(0.0, "weight of image-text contrast; 0, as in the paper, leaves it out")
    itc_pool: str = opt("class", "what ITC compares: class (tokens) or mean (tokens, quarters)")
    itc_words: int = opt(0, "ITC: size of the space of the text's bag of words; 0: without it")
    itc_soft: float = opt(0.0, "ITC: share of the target given to texts of like words")
    loss_weights: dict = field(default_factory=dict)     # of losses without a setting of their own

    @classmethod
    def preset(cls, name: str, **changes) -> "ModelConfig":
        """The architecture called "tiny", "small" or "base", with `changes` on top."""
        return cls(**{**preset_values(cls, name), **changes})

    def check(self) -> None:
        """Raise UserError if a setting is out of range or two contradict each other."""
        # Names and sizes.
        require(self.task in ("pretrain", "vqa", "cls", "irtr"), f"--task {self.task} is not known")
        require(self.text_kind in ("roberta", "bert"), "--text_kind: use roberta or bert")
        require(self.vit_act in ("quick_gelu", "gelu"), "--vit_act: use quick_gelu or gelu")
        for name, value in vars(self).items():
            if name.endswith(("_size", "_width", "_heads", "_blocks", "_layers")):
                require(value >= 1, f"--{name} {value} must be at least 1")
        for part in ("vit", "text", "fusion", "decoder"):
            width, heads = getattr(self, f"{part}_width"), getattr(self, f"{part}_heads")
            require(width % heads == 0,
                    f"--{part}_width {width} can't be divided among --{part}_heads {heads}")
        require(self.decoder_width % 4 == 0,
                f"--decoder_width {self.decoder_width} must be a multiple of 4")
        require(-1 <= self.mim_layer < self.fusion_layers,
                f"--mim_layer {self.mim_layer}: use -1 (the last) to {self.fusion_layers - 1}")

        # Images and texts.
        require(self.image_size % self.patch_size == 0,
                f"--image_size {self.image_size}: use a multiple of --patch_size {self.patch_size}")
        num_patches = (self.image_size // self.patch_size) ** 2
        num_visible = int(num_patches * (1 - self.mask_ratio))
        require(0 <= self.mask_ratio < 1 and 0 < num_visible < num_patches,
                f"--mask_ratio {self.mask_ratio}: mask some of the {num_patches} patches, not all")
        longest = self.text_max_positions - 2 * (self.text_kind == "roberta")
        require(3 <= self.max_text_len <= longest,
                f"--max_text_len {self.max_text_len}: use 3 to {longest} (--text_max_positions)")

        # Dropout, losses, heads.
        require(0 <= self.dropout < 1 and 0 <= self.attn_dropout < 1,
                "--dropout and --attn_dropout must be at least 0 and below 1")
        losses = {name: getattr(self, name) for name in ("mlm", "mim", "itm", "itc")}
        for name, weight in {**losses, **self.loss_weights}.items():
            require(0 <= weight < math.inf, f"--{name} {weight} is a weight: use 0 or more")
        require(self.itc_pool in ("class", "mean"), "--itc_pool: use class or mean")
        require(self.itc_words >= 0 and 0 <= self.itc_soft < 1,
                "--itc_words: use 0 or more; --itc_soft: at least 0 and below 1")
        require(not self.itc_soft or self.itc_words,
                "--itc_soft compares bags of words: give --itc_words, too, such as 200")
        labels = {"vqa": self.num_answers, "cls": self.num_classes}.get(self.task, 1)
        require(labels >= 1, f"a {self.task} model needs at least one answer or class")


@dataclass
class TrainConfig:
    """Data, length and learning rates. A resumed run must keep all of these."""
    steps: int = opt(100_000, "optimizer steps")
    epochs: float = opt(0.0, "length in passes over the training samples, instead of --steps")
    train_samples: int = opt(0, "use at most this many training samples; 0: all")
    batch_size: int = opt(256, "samples per step, over all processes")
    micro_batch: int = opt(32, "samples of one forward pass of one process")
    lr: float = opt(1e-5, "peak learning rate")
    text_lr_mult: float = opt(1.0, "rate of the text encoder, times --lr; 0 freezes it")
    vit_lr_mult: float = opt(1.0, "rate of the image encoder, times --lr; 0 freezes it")
    head_lr_mult: float = opt(5.0, "rate of the heads, times --lr; 0 freezes them")
    fusion_lr_mult: float = opt(5.0, "rate of the rest, times --lr; 0 freezes it")
    warmup: float = opt(0.1, "share of the steps with linear warm-up; linear decay follows")
    weight_decay: float = opt(0.01, "AdamW's weight decay; vectors have none")
    beta2: float = opt(0.98, "AdamW's second beta; the first is 0.9")
    grad_clip: float = opt(0.0, "maximum norm of the gradient; 0: no clipping")
    mlm_ratio: float = opt(0.15, "share of the text's tokens that is masked")
    whole_word: bool = opt(True, "mask whole words; off: single tokens")
    hard_negatives: float = opt(0.0, "share of ITM's negatives that are of the text's own group")
    min_crop_area: float = opt(1.0, "minimum area of a training crop, as a share; 1: no crops")
    augment: bool = opt(False, "training images: small rotations, contrast, brightness, noise")
    tokenizer_vocab: int = opt(8192, "maximum vocabulary of a tokenizer trained on the data")
    init: str = opt("", "start from this run or M³AE checkpoint; none: from random weights")
    init_image: str = opt("", "start the image encoder from this file of CLIP")
    init_text: str = opt("", "start the text encoder from this folder of RoBERTa or BERT")
    seed: int = opt(0, "random seed")

    def check(self) -> None:
        """Raise UserError if a number makes no sense."""
        at_least_one = ("steps", "batch_size", "micro_batch", "tokenizer_vocab")
        limits = {"warmup": 1, "mlm_ratio": 1, "hard_negatives": 1, "min_crop_area": 1,
                  "beta2": 0.9999, "seed": 2 ** 63 - 1}
        for name, value in vars(self).items():
            least, most = int(name in at_least_one), limits.get(name, 10 ** 9)
            require(isinstance(value, str) or least <= value <= most,
                    f"--{name} {value}: use {least} to {most:,}")
        require(self.lr > 0, "--lr 0 trains nothing: to freeze a part use --vit_lr_mult 0, "
                "--text_lr_mult 0, --fusion_lr_mult 0 or --head_lr_mult 0")


@dataclass
class RunConfig:
    """Folders and hardware. A resumed run may change these, but not the data."""
    data: str = opt("phantoms", "a pack, or several with commas between; phantoms are drawn once")
    out: str = opt("runs/pretrain", "the run's folder; finetune.py: runs/TASK")
    tokenizer: str = opt("", "a tokenizer.json, or its folder; else that of the weights or data")
    resume: bool = opt(False, "continue from the run's last checkpoint, if there is one")
    gpus: int = opt(0, "number of processes to start, each with a GPU (or part of the CPU)")
    device: str = opt("auto", "auto, cuda or cpu")
    dtype: str = opt("auto", "auto, float32, bfloat16 or float16: type of the matrix products")
    grad_checkpointing: bool = opt(False, "recompute layers in the backward pass: saves memory")
    compile: bool = opt(False, "compile the layers: the first step may take minutes")
    log_every: int = opt(20, "steps between two lines of metrics.jsonl")
    eval_every: int = opt(1000, "steps between two validations; 0: once an epoch")
    save_every: int = opt(1000, "steps between two checkpoints; 0: once an epoch")
    eval_samples: int = opt(1024, "maximum number of validation samples")
    test_samples: int = opt(1_000_000, "maximum number of test samples; 0: no report")
    timeout: int = opt(600, "seconds after which a process stops waiting for the others")

    def check(self) -> None:
        """Raise UserError if a number makes no sense."""
        for name, value in vars(self).items():
            at_least = int(name in ("log_every", "eval_samples", "timeout"))
            ok = isinstance(value, str) or value >= at_least
            require(ok, f"--{name} {value}: use {at_least} or more")


FEW_NEGATIVES = 8                      # below it, matching is warned of: see fit_micro_batch


def fit_micro_batch(model_cfg: ModelConfig, train_cfg: TrainConfig, world_size: int,
                    given: int | None, saved: dict | None) -> list[str]:
    """Set the micro-batch for `world_size` processes -> lines to print about it

    given: --micro_batch, None if it was not given; saved: config.json of a resumed run, which keeps
    its own. Else it is the preset's, or the largest below it that divides.
    UserError if batch, micro-batch and number of processes do not fit each other."""
    batch_size, preset = train_cfg.batch_size, train_cfg.micro_batch
    if given is None and saved is not None:
        given = saved.get("train", {}).get("micro_batch", preset)

    # Wrong images and texts are other rows of the micro-batch: matching needs two at least.
    matching = model_cfg.task == "pretrain" and (model_cfg.itm or model_cfg.itc)
    matching = matching or model_cfg.task == "irtr"
    require(given != 1 or not matching, "--micro_batch 1 leaves no other row for a wrong image or "
            "text: use 2, or pre-train with --itm 0 --itc 0")
    sizes = [given] if given else range(preset, 1 if matching else 0, -1)
    counts = [n for n in range(1, 1025)                    # numbers of processes that fit
              if any(batch_size % (n * size) == 0 for size in sizes)]
    asked = f"--batch_size {batch_size}" + f" in steps of --micro_batch {given}" * bool(given)
    require(world_size in counts, f"{asked} can't be divided among {world_size} processes: "
            f"{' or '.join(map(str, counts)) or 'no number of them'} would do")
    fitting = [m for m in sizes if batch_size % (m * world_size) == 0]
    micro_batch = train_cfg.micro_batch = fitting[0]

    lines = []
    if micro_batch != preset and not given:
        lines.append(f"--micro_batch {micro_batch} instead of {preset}, as {world_size} processes "
                     f"share a batch of {batch_size}; one process with --micro_batch {micro_batch} "
                     "has the same losses")
    if matching and micro_batch < FEW_NEGATIVES:
        lines.append(f"warning: --micro_batch {micro_batch} offers few wrong images and texts: use "
                     f"{FEW_NEGATIVES}, with a --batch_size of n × {FEW_NEGATIVES * world_size}")
    return lines


# ------------------------------------------------------------------------------------------ presets

# What differs from the defaults. Their rate of 1e-5 suits CLIP and RoBERTa, not random weights.
FROM_SCRATCH = dict(mim_layer=1, decoder_layers=2, decoder_heads=4, attn_dropout=0.0, batch_size=64,
                    head_lr_mult=1.0, fusion_lr_mult=1.0, weight_decay=0.05, grad_clip=1.0)
PRESETS = {
    "base": {},
    "small": FROM_SCRATCH | dict(
        image_size=128, max_text_len=48, text_max_positions=130, decoder_width=128,
        vit_width=192, vit_blocks=4, vit_heads=6, text_width=192, text_layers=3, text_heads=6,
        fusion_width=192, fusion_layers=3, fusion_heads=6,
        steps=3000, lr=5e-4, hard_negatives=0.5, eval_every=250, save_every=250),
    "tiny": FROM_SCRATCH | dict(
        image_size=48, patch_size=12, max_text_len=32, text_max_positions=66, decoder_width=64,
        vit_width=128, vit_blocks=3, vit_heads=4, text_width=128, text_layers=2, text_heads=4,
        fusion_width=128, fusion_layers=2, fusion_heads=4, dropout=0.0, tokenizer_vocab=1024,
        steps=1500, lr=1e-3, hard_negatives=0.75, eval_every=375, save_every=375, eval_samples=512)}

# Fine-tuning: what differs from the preset in each task; for base as in the paper.
TASKS = {
    "base": {
        "vqa": dict(image_size=384, max_text_len=32, batch_size=64, epochs=50.0, lr=5e-6,
                    head_lr_mult=50.0),
        "cls": dict(image_size=384, max_text_len=128, batch_size=16, micro_batch=16, epochs=20.0,
                    lr=5e-6, head_lr_mult=10.0, min_crop_area=0.9),
        "irtr": dict(image_size=384, max_text_len=40, micro_batch=16, epochs=10.0, lr=5e-6,
                     min_crop_area=0.9, eval_samples=256, test_samples=2000)},
    "small": {
        "vqa": dict(epochs=50.0, lr=3e-4, head_lr_mult=5.0, batch_size=16, micro_batch=16,
                    grad_clip=0.0),
        "cls": dict(epochs=30.0, lr=3e-4), "irtr": dict(epochs=10.0, lr=2e-4)},
    "tiny": {
        "vqa": dict(epochs=40.0, lr=3e-5, head_lr_mult=50.0, fusion_lr_mult=3.0),
        "cls": dict(epochs=40.0, lr=3e-4, head_lr_mult=10.0, fusion_lr_mult=3.0),
        "irtr": dict(steps=94, lr=3e-4, eval_samples=128, test_samples=256)}}    # 15 epochs of 400


def preset_values(cls: type, preset: str, task: str = "pretrain",
                  given: dict | None = None) -> dict:
    """The fields of `cls` that a preset, its task and the flags set: {name: value}."""
    require(preset in PRESETS, f"--preset {preset} is not known: use {', '.join(PRESETS)}")
    values = dict(PRESETS[preset])
    if task in TASKS[preset]:
        values |= {"eval_every": 0, "save_every": 0, **TASKS[preset][task]}         # once an epoch
    values |= given or {}
    return {f.name: values[f.name] for f in fields(cls) if f.name in values}


# ------------------------------------------------------------------------------------- command line

# No flags: the scripts take these from the data.
DERIVED = ("task", "vocab_size", "text_kind", "num_answers", "num_classes", "loss_weights")
# What --help shows; --help_all shows every flag.
COMMON = ("data out resume gpus device dtype steps epochs batch_size micro_batch lr init "
          "init_image init_text seed mask_ratio mlm_ratio eval_every").split()


def make_parser(description: str, configs: tuple, losses: Iterable[str] = ()) -> ArgumentParser:
    """A parser with one flag for every field of `configs`; --help shows the common ones.

    losses: names of objectives; those that are no field get a flag for their weight, too."""
    show_all = "--help_all" in sys.argv
    parser = ArgumentParser(description=description, allow_abbrev=False, usage="%(prog)s [flags]",
                            formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--help_all", action="help", help="show every flag, with its presets")
    parser.add_argument("--preset", default="tiny", choices=list(PRESETS), metavar="NAME",
                        help="tiny: minutes on a laptop; small: thousands of pairs; base: paper's")
    for cls in configs:
        group = parser.add_argument_group(cls.__name__, cls.__doc__) if show_all else parser
        for f in [f for f in fields(cls) if f.name not in DERIVED]:
            values = [f"{name} {p[f.name]}" for name, p in PRESETS.items() if f.name in p]
            text = f"{f.metadata['help']} [{', '.join([str(f.default), *values])}]"
            kind = dict(action=BooleanOptionalAction)
            if f.type is not bool:
                kind = dict(type=f.type, metavar="X")
            group.add_argument(f"--{f.name}", default=None, **kind,
                               help=text if show_all or f.name in COMMON else SUPPRESS)
    for name in sorted(set(losses) - {f.name for cls in configs for f in fields(cls)}):
        parser.add_argument(f"--{name}", dest=f"loss_weights.{name}", type=float, metavar="X",
                            help=f"weight of the loss {name}; 0 leaves it out [1.0]")
    return parser


def parse(parser: ArgumentParser, configs: tuple, argv: list[str] | None = None) -> tuple:
    """The command line -> one object for each of `configs`, and all flags (None: not given)."""
    args: Namespace = parser.parse_args(argv)
    given = {name: value for name, value in vars(args).items() if value is not None}
    require("steps" not in given or not given.get("epochs"),
            "--steps and --epochs both set the length: give one")
    if "steps" in given:
        given["epochs"] = 0.0                                  # --steps wins over a preset's epochs
    given["loss_weights"] = {name.removeprefix("loss_weights."): value
                             for name, value in given.items() if name.startswith("loss_weights.")}
    task = given.get("task", "pretrain")
    settings = [cls(**preset_values(cls, args.preset, task, given)) for cls in configs]
    return *settings, args
