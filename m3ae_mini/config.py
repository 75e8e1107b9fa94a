"""Every hyper-parameter once, with its meaning, its presets and its flag: a new setting is one new line."""
import math
from argparse import ArgumentParser, BooleanOptionalAction, RawDescriptionHelpFormatter
from contextlib import contextmanager
from dataclasses import dataclass, field, fields


class UserError(Exception):
    """A mistake of the user's making: one sentence on what is wrong and how to mend it, safe to print."""

    def __init__(self, sentence):
        super().__init__("".join(c if c.isprintable() else " " for c in sentence[:1500]))


def require(right, sentence):
    """UserError with this sentence where something is not right."""
    if not right:
        raise UserError(sentence)


@contextmanager
def reading(path):
    """Whatever goes wrong while a file is read is the file's fault, and said so."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{path} can't be read: is the path right, the file whole and of the right kind? "
                        f"({type(error).__name__}: {str(error)[:200]})") from error


def opt(default, help):
    return field(default=default, metadata={"help": help})


@dataclass
class ModelConfig:
    """The architecture and its losses; the defaults are the paper's (366 million parameters)."""
    task: str = opt("pretrain", "pretrain, vqa, cls or irtr: which heads and losses are built")
    image_size: int = opt(288, "side of the square image, in pixels")
    patch_size: int = opt(16, "side of a patch, in pixels")
    vocab_size: int = opt(50265, "number of tokens; the scripts take it from the tokenizer")
    max_text_len: int = opt(64, "longest text in tokens, special tokens included; longer ones are cut")
    text_kind: str = opt("roberta", "roberta or bert: positions, padding, norms, token types")
    text_max_positions: int = opt(514, "rows of the text's table of positions")
    vit_width: int = opt(768, "width of the image encoder")
    vit_blocks: int = opt(11, "blocks of the image encoder (the release uses 11 of CLIP's 12)")
    vit_heads: int = opt(12, "attention heads of the image encoder")
    text_width: int = opt(768, "width of the text encoder")
    text_layers: int = opt(12, "layers of the text encoder")
    text_heads: int = opt(12, "attention heads of the text encoder")
    fusion_width: int = opt(768, "width of the fusion")
    fusion_layers: int = opt(6, "pairs of fusion layers")
    fusion_heads: int = opt(12, "attention heads of the fusion")
    mim_layer: int = opt(3, "pixels are decoded after so many pairs of fusion layers; -1: after all")
    decoder_width: int = opt(384, "width of the pixel decoder")
    decoder_layers: int = opt(4, "blocks of the pixel decoder")
    decoder_heads: int = opt(6, "attention heads of the pixel decoder")
    mask_ratio: float = opt(0.75, "share of the patches that is hidden")
    norm_pix_loss: bool = opt(True, "reconstruct each patch normalised by its own mean and variance")
    num_answers: int = opt(0, "size of the answer list (vqa); the scripts take it from the data")
    num_classes: int = opt(0, "number of classes (cls); the scripts take it from the data")
    dropout: float = opt(0.1, "dropout on embeddings and sub-layer outputs of text encoder and fusion")
    attn_dropout: float = opt(0.1, "dropout on their attention weights; 0 keeps the fused kernel on a CPU")
    mlm: float = opt(1.0, "weight of masked language modelling; 0 leaves it out")
    mim: float = opt(1.0, "weight of masked image modelling; 0 leaves it out")
    itm: float = opt(1.0, "weight of image-text matching; 0 leaves it out")

    @classmethod
    def preset(cls, name, **changes):
        """The architecture called "tiny", "small" or "base", with `changes` on top."""
        return cls(**{**of_preset(cls, name), **changes})

    def check(self):
        """Raise UserError where a setting is out of range or two contradict each other."""
        require(self.task in ("pretrain", "vqa", "cls", "irtr"), f"--task {self.task} is not known")
        require(self.text_kind in ("roberta", "bert"), f"--text_kind {self.text_kind}: use roberta or bert")
        for name, value in vars(self).items():
            if name.endswith(("_size", "_width", "_heads", "_blocks", "_layers")):
                require(value >= 1, f"--{name} {value} must be at least 1")
        for part in ("vit", "text", "fusion", "decoder"):
            width, heads = getattr(self, f"{part}_width"), getattr(self, f"{part}_heads")
            require(width % heads == 0, f"--{part}_width {width} can't be divided among --{part}_heads {heads}")
        require(self.decoder_width % 4 == 0, f"--decoder_width {self.decoder_width} must be a multiple of 4")
        require(-1 <= self.mim_layer < self.fusion_layers,
             f"--mim_layer {self.mim_layer} is out of range: use -1 (the last) to {self.fusion_layers - 1}")
        require(self.image_size % self.patch_size == 0,
             f"--image_size {self.image_size} is not a multiple of --patch_size {self.patch_size}")
        patches = (self.image_size // self.patch_size) ** 2
        require(0 <= self.mask_ratio < 1 and 0 < int(patches * (1 - self.mask_ratio)) < patches,
             f"--mask_ratio {self.mask_ratio} must hide at least one of the {patches} patches and keep one")
        room = self.text_max_positions - 2 * (self.text_kind == "roberta")
        require(3 <= self.max_text_len <= room,
             f"--max_text_len {self.max_text_len} must lie in 3 … {room}, as --text_max_positions allows")
        require(0 <= self.dropout < 1 and 0 <= self.attn_dropout < 1,
             "--dropout and --attn_dropout must be at least 0 and below 1")
        weights = (self.mlm, self.mim, self.itm)
        require(all(0 <= weight < math.inf for weight in weights) and (self.task != "pretrain" or any(weights)),
             "--mlm, --mim and --itm are weights: none below 0, and one of them above it")
        require({"vqa": self.num_answers, "cls": self.num_classes}.get(self.task, 1) >= 1,
             f"a {self.task} model needs at least one answer or class to choose")


@dataclass
class TrainConfig:
    """What is learned from, in what order and at which rates: a run that resumes must keep all of these."""
    steps: int = opt(100_000, "optimizer steps")
    epochs: float = opt(0.0, "length in passes over the training samples, in place of --steps")
    train_samples: int = opt(0, "use only so many of the training samples; 0: all")
    batch_size: int = opt(256, "samples a step, over all processes")
    micro_batch: int = opt(32, "samples of one forward pass: the chunk, the unit of all randomness")
    lr: float = opt(1e-5, "peak learning rate of the text encoder")
    vit_lr_mult: float = opt(1.0, "rate of the image encoder, as a multiple of --lr; the paper: 1")
    head_lr_mult: float = opt(5.0, "rate of the heads, as a multiple of --lr")
    fusion_lr_mult: float = opt(5.0, "rate of projections, modality embedding, fusion, poolers: multiple of --lr")
    warmup: float = opt(0.1, "share of the steps in which the rate rises; then it falls to 0, linearly")
    weight_decay: float = opt(0.01, "AdamW's decay of matrices; one-dimensional parameters never decay")
    beta2: float = opt(0.98, "AdamW's second beta; the first is 0.9")
    grad_clip: float = opt(0.0, "gradient clipping: the largest norm; 0 turns it off")
    mlm_ratio: float = opt(0.15, "share of the text's tokens that is hidden")
    whole_word: bool = opt(True, "hide whole words; off: single tokens")
    hard_negatives: float = opt(0.0, "share of wrong images that are of the text's kind (hard negatives); paper: 0")
    min_crop_area: float = opt(1.0, "least share of a training image's area that a random crop keeps; 1: none")
    tokenizer_vocab: int = opt(8192, "largest vocabulary of a tokenizer trained on the data")
    init: str = opt("", "start from this run or M³AE checkpoint; none: from random values")
    init_image: str = opt("", "start the image encoder from this file of CLIP")
    init_text: str = opt("", "start the text encoder from this Hugging Face folder of RoBERTa or BERT")
    seed: int = opt(0, "all randomness follows from it")


@dataclass
class RunConfig:
    """Where a run lives and what it runs on; a run that resumes may change these, but not the data."""
    data: str = opt("phantoms", "one pack or several, separated by commas; phantoms are drawn on first use")
    out: str = opt("runs/pretrain", "the run's folder; finetune.py: runs/TASK")
    tokenizer: str = opt("", "a tokenizer.json or its folder; empty: that of --init_text, --init, the data")
    resume: bool = opt(False, "go on from the run's last checkpoint, or start if there is none")
    gpus: int = opt(0, "start this many processes by torchrun, each with a GPU (or a part of the CPU)")
    device: str = opt("auto", "auto, cuda, cpu or mps (mps is untested)")
    dtype: str = opt("auto", "auto, float32, bfloat16 or float16: arithmetic of the matrix products")
    grad_checkpointing: bool = opt(False, "compute layers again in the backward pass: less memory, a third slower")
    compile: bool = opt(False, "compile the model with torch.compile")
    log_every: int = opt(20, "steps between two lines of metrics.jsonl")
    eval_every: int = opt(1000, "steps between two validations; 0: an epoch")
    save_every: int = opt(1000, "steps between two checkpoints; 0: an epoch")
    eval_samples: int = opt(1024, "at most this many validation samples are used")
    test_samples: int = opt(1_000_000, "at most this many test samples are in the last report; 0: no report")
    timeout: int = opt(600, "seconds after which a process that waits in vain for the others gives up")


# What differs from the defaults. A rate of 1e-5 is for CLIP's and RoBERTa's weights, not for random ones.
SCRATCH = dict(mim_layer=1, decoder_layers=2, decoder_heads=4, attn_dropout=0.0, batch_size=64, head_lr_mult=1.0,
               fusion_lr_mult=1.0, weight_decay=0.05, grad_clip=1.0)
PRESETS = {
    "base": {},
    "small": SCRATCH | dict(
        image_size=128, max_text_len=48, text_max_positions=130, vit_width=192, vit_blocks=4, vit_heads=6,
        text_width=192, text_layers=3, text_heads=6, fusion_width=192, fusion_layers=3, fusion_heads=6,
        decoder_width=128, steps=3000, lr=5e-4, hard_negatives=0.5, eval_every=250, save_every=250),
    "tiny": SCRATCH | dict(
        image_size=48, patch_size=12, max_text_len=32, text_max_positions=66, vit_width=128, vit_blocks=3,
        vit_heads=4, text_width=128, text_layers=2, text_heads=4, fusion_width=128, fusion_layers=2,
        fusion_heads=4, decoder_width=64, dropout=0.0, steps=1500, lr=1e-3, hard_negatives=0.75, tokenizer_vocab=1024,
        eval_every=375, save_every=375, eval_samples=512)}

# Fine-tuning: what differs from the preset in each task; for base as in the paper.
EACH_EPOCH = dict(eval_every=0, save_every=0)
TASKS = {
    "base": {"vqa": dict(image_size=384, max_text_len=32, batch_size=64, epochs=50.0, lr=5e-6, head_lr_mult=50.0),
             "cls": dict(image_size=384, max_text_len=128, batch_size=16, micro_batch=16, epochs=20.0,
                         lr=5e-6, head_lr_mult=10.0, min_crop_area=0.9),
             "irtr": dict(image_size=384, max_text_len=40, micro_batch=16, epochs=10.0, lr=5e-6, min_crop_area=0.9)},
    "small": {"vqa": dict(epochs=50.0, lr=3e-4, head_lr_mult=5.0, batch_size=16, micro_batch=16, grad_clip=0.0),
              "cls": dict(epochs=30.0, lr=3e-4), "irtr": dict(epochs=10.0, lr=2e-4)},
    "tiny": {"vqa": dict(epochs=40.0, lr=3e-5, head_lr_mult=50.0, fusion_lr_mult=3.0),
             "cls": dict(epochs=40.0, lr=3e-4, head_lr_mult=10.0, fusion_lr_mult=3.0),
             "irtr": dict(steps=94, lr=3e-4, eval_samples=128, test_samples=256)}}      # 15 epochs of 400

DERIVED = ("task", "vocab_size", "text_kind", "num_answers", "num_classes")    # no flags: from data or script


def of_preset(cls, preset, task="pretrain", given={}):
    """What a preset, the task in it and the flags given say of the settings in `cls`: {name: value}."""
    require(preset in PRESETS, f"--preset {preset} is not known: use {', '.join(PRESETS)}")
    values = PRESETS[preset] | (EACH_EPOCH | TASKS[preset][task] if task in TASKS[preset] else {}) | given
    return {f.name: values[f.name] for f in fields(cls) if f.name in values}


def parse(description, configs=(ModelConfig, TrainConfig, RunConfig), add=lambda parser: None, argv=None):
    """The command line -> one object for each of `configs`, every field of which is a flag of the same name;
    and all flags, None where one was not given. `add` may put more on the parser, a "task" among them."""
    parser = ArgumentParser(description=description, allow_abbrev=False,
                            formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="tiny", choices=list(PRESETS),
                        help="tiny: minutes on a laptop; small: thousands of real images; base: the paper's")
    add(parser)
    for cls in configs:
        group = parser.add_argument_group(cls.__name__, cls.__doc__)
        for f in fields(cls):
            values = [f"{name} {preset[f.name]}" for name, preset in PRESETS.items() if f.name in preset]
            shown = f"{f.metadata['help']} [{', '.join([f'{f.default}', *values])}]"
            kind = dict(action=BooleanOptionalAction) if f.type is bool else dict(type=f.type, metavar="X")
            if f.name not in DERIVED:
                group.add_argument(f"--{f.name}", default=None, help=shown, **kind)

    args = parser.parse_args(argv)
    given = {name: value for name, value in vars(args).items() if value is not None}
    require("steps" not in given or not given.get("epochs"), "--steps and --epochs both say how long: give one")
    given = {"epochs": 0.0} | given if "steps" in given else given         # it wins over a preset's epochs
    task = given.get("task", "pretrain")
    return *(cls(**of_preset(cls, args.preset, task, given)) for cls in configs), args
