"""Weights in and out: CLIP, RoBERTa and BERT, released M³AE, and this project's own checkpoints."""
import math
import re
import sys
from collections import Counter
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .checkpoint import CHECKPOINTS, saved_settings, write_atomic
from .config import ModelConfig, TrainConfig, read_json, reading, require
from .distributed import run
from .foreign_files import read_safetensors, read_torch
from .objectives import M3AE, OBJECTIVES
from .weight_names import from_official, name_table, to_official, to_openai


CLIP_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors",
              "open_clip_pytorch_model.bin", "model.safetensors", "pytorch_model.bin")
CLIP_HEADS = {768: 12, 1024: 16, 1280: 16, 1408: 16, 1664: 16}       # of the widths of OpenCLIP
RESIZED = {"vit.pos_embed": "image positions resized", "text.word.weight": "token rows cut"}


class State(dict):
    """{name here: tensor}. `unused`: names in the file that have no place in any such model;
    `note`: what was assumed about the file."""
    unused: list[str] = []
    note = ""


Sources = dict[str, State]             # {"--init_image ViT-B-16.pt": its tensors, …}


def module_of(name: str) -> str:
    """The module that a tensor belongs to: vit, text, fusion, or a head (mlm, …)."""
    first, second = f"{name}.".split(".")[:2]
    return {"vit": first, "text": first, "objectives": second}.get(first, "fusion")


# ------------------------------------------------------------------------------------ reading files

def read_tensors(path: Path) -> tuple[Any, dict[str, Tensor]]:
    """A safetensors file or a torch archive -> (its content, {name: tensor})"""
    if path.suffix == ".safetensors":
        return {}, read_safetensors(path)
    return read_torch(path)


def find_file(path: Path | str, *names: str) -> Path:
    """The file itself, or the first of `names` in a folder. UserError if there is none."""
    files = [Path(path, name) for name in names if Path(path, name).is_file()]
    require(files or Path(path).is_file(),
            f"{path} can't be read: give a file, or a folder with one of {', '.join(names)}")
    return files[0] if files else Path(path)


def rename_keys(tensors: dict[str, Tensor], path: Path, released: str, anchor: str) -> State:
    """Tensors under a file's names -> State; `released` replaces the prefix of `anchor`."""
    prefixes = [name.removesuffix(anchor) for name in tensors if name.endswith(anchor)]
    require(len(prefixes) == 1,
            f"{path} has no tensor {anchor}, or several: is it the right kind of file?")
    prefix = re.compile(f"^{re.escape(prefixes[0])}")
    released_to_file = {prefix.sub(released, name): name for name in tensors}

    # No model is deeper, so this renames all layers of the file.
    deep = ModelConfig(vit_blocks=99, text_layers=99, fusion_layers=99, decoder_layers=99)
    with reading(path):
        released_tensors = {r: tensors[name] for r, name in released_to_file.items()}
        state = State(from_official(released_tensors, deep))
    used = {r for name, names in name_table(deep) if name in state for r in names}
    state.unused = [name for r, name in released_to_file.items() if r not in used]
    return state


def infer_config(state: State, path: Path, known: dict) -> dict:
    """The settings that shapes tell: {field of ModelConfig: value}

    No shape tells the number of heads: it is in `known`, or heads are 64 wide. A missing tensor
    tells nothing; `check` reports it."""
    def size(name: str, axis: int = 0) -> int:
        return state[name].shape[axis] if name in state and state[name].ndim > axis else 0

    def depth(prefix: str) -> int:
        return len({name.removeprefix(prefix).split(".")[0]
                    for name in state if name.startswith(prefix)})

    # Sizes; 0 stands for "not known".
    patch_size = math.isqrt(size("vit.patch_embed.weight", 1) // 3)
    grid = math.isqrt(max(1, size("vit.pos_embed")) - 1)
    found = dict(
        patch_size=patch_size, image_size=patch_size * grid,
        vit_width=size("vit.cls_token"), vit_blocks=depth("vit.blocks."),
        vocab_size=size("text.word.weight"), text_max_positions=size("text.position.weight"),
        text_width=size("text.word.weight", 1), text_layers=depth("text.layers."),
        text_kind={0: None, 1: "roberta"}.get(size("text.token_type.weight"), "bert"),
        fusion_width=size("modality", 1), fusion_layers=depth("fusion.text_layers."),
        decoder_width=size("objectives.mim.mask_token"),
        decoder_layers=depth("objectives.mim.blocks."),
        num_answers=size("objectives.vqa.head.3.bias"),
        num_classes=size("objectives.cls.head.3.bias"))
    found = {field: value for field, value in found.items() if value}

    # Heads.
    for width in [field for field in found if field.endswith("_width")]:
        heads = width.replace("width", "heads")
        require(heads in known or found[width] % 64 == 0,
                f"{path} gives no number of heads for width {found[width]}: give --{heads}")
        found[heads] = known.get(heads, found[width] // 64)

    # The task, and the losses of pre-training.
    modules = {module_of(name) for name in state}
    found |= {"task": task for task in ("vqa", "cls", "irtr") if task in modules}
    if modules & OBJECTIVES["pretrain"].keys():
        for name in [f.name for f in fields(ModelConfig) if f.name in OBJECTIVES["pretrain"]]:
            found[name] = (known.get(name) or 1.0) if name in modules else 0.0
    return found


def load_clip(path: Path | str, **given) -> tuple[dict, State]:
    """CLIP's image encoder -> (fields of ModelConfig, State)

    path: OpenAI's archive; a file in the names of OpenAI, OpenCLIP or Hugging Face; or a folder
    that holds one and its configuration. As in the release, vit_blocks leaves out the last block.
    Fewer blocks and another image size are fine."""
    file = find_file(path, *CLIP_FILES)
    _, tensors = read_tensors(file)
    require(not any(name.startswith("visual.trunk.") for name in tensors),
            f"{file} holds an image encoder of timm (as in BiomedCLIP): use CLIP's own")
    with reading(file):
        tensors = to_openai(tensors)
    state = rename_keys(tensors, file, "vision_encoder.visual.", "class_embedding")

    # The activation and the number of heads: as the configuration has them, else assumed.
    width, settings = len(state.get("vit.cls_token", ())), clip_settings(file.parent)
    if not settings:
        state.note = "nothing tells the activation: QuickGELU is assumed, as in OpenAI's weights"
        settings = {"vit_heads": CLIP_HEADS[width]} if width in CLIP_HEADS else {}
    known = {"vit_act": "quick_gelu", **settings, **given}
    require("vit_heads" in known, f"{file}: nothing tells its number of heads: give --vit_heads")
    found = infer_config(state, file, known) | {"vit_act": known["vit_act"]}
    found["vit_blocks"] = found.get("vit_blocks", 1) - 1
    found.pop("image_size", None)
    return found, state


def clip_settings(folder: Path) -> dict:
    """{"vit_act", "vit_heads"} of CLIP's image encoder by its folder's configuration, or {}"""
    with reading(folder):
        if openclip := read_json(folder / "open_clip_config.json").get("model_cfg"):
            vision = openclip["vision_cfg"]
            return {"vit_act": "quick_gelu" if openclip.get("quick_gelu") else "gelu",
                    "vit_heads": vision["width"] // vision.get("head_width", 64)}
        config = read_json(folder / "config.json")
        if not str(config.get("model_type")).startswith("clip"):
            return {}
        # A copy may hold only what differs from these defaults.
        vision = config.get("vision_config", config)
        act, eps = vision.get("hidden_act", "quick_gelu"), vision.get("layer_norm_eps", 1e-5)
        require(act in ("quick_gelu", "gelu") and eps == 1e-5, f"{folder}: hidden_act {act} and "
                f"layer_norm_eps {eps} must be quick_gelu or gelu, and 1e-05: use another encoder")
        return {"vit_act": act, "vit_heads": int(vision.get("num_attention_heads", 12))}


def load_text(path: Path | str, **given) -> tuple[dict, State]:
    """A Hugging Face folder of RoBERTa or BERT -> (fields of ModelConfig, State)"""
    file = find_file(path, "model.safetensors", "pytorch_model.bin")
    config_file = file.with_name("config.json")
    config = read_json(config_file)
    with reading(config_file):
        known = {"text_heads": int(config["num_attention_heads"])} if config else given
    require(known.get("text_heads"),
            f"{path} has no config.json with the number of heads: give --text_heads")

    # The tensors; old files call a norm's weight and bias gamma and beta.
    _, tensors = read_tensors(file)
    tensors = {name.replace("Norm.gamma", "Norm.weight").replace("Norm.beta", "Norm.bias"): tensor
               for name, tensor in tensors.items()}
    state = rename_keys(tensors, path, "language_encoder.", "embeddings.word_embeddings.weight")
    found = infer_config(state, path, known)

    # What shapes do not tell must be what this model computes.
    is_roberta = found.get("text_kind") == "roberta"
    needed = dict(hidden_act="gelu", position_embedding_type="absolute", is_decoder=False,
                  pad_token_id=1 if is_roberta else 0, layer_norm_eps=1e-5 if is_roberta else 1e-12)
    for key, value in needed.items():
        require(config.get(key, value) == value,
                f"{config_file}: {key} is {config.get(key)}, not {value}: use another text encoder")
    return found, state


def load_m3ae(path: Path | str, **given) -> tuple[ModelConfig, State]:
    """A checkpoint of M³AE, released or of this project, or a run's folder -> (ModelConfig, State)

    What shapes do not tell is taken from `given`, else from the file's settings, else from the
    paper."""
    if Path(path).is_dir():
        path = Path(path, "best.pt" if Path(path, "best.pt").exists() else "last.pt")
    content, tensors = read_torch(path)
    if any(module_of(name) == "vit" for name in tensors):
        state = State(tensors)
    else:
        state = rename_keys(tensors, path, "", "vision_encoder.visual.class_embedding")

    with reading(path):
        config = content.get("model_config", content.get("hyper_parameters", {}))
        config = config.get("config", config)
        config = {"fusion_heads": config.get("num_heads"), **config}    # num_heads: as released
        known = {f.name: f.type(config[f.name]) for f in fields(ModelConfig)
                 if isinstance(config.get(f.name), (bool, int, float, str))}
        known |= given
        cfg = ModelConfig(**known | infer_config(state, path, known))
        check(cfg, {path: state}, needed=("vit", "text", "fusion"))
    return cfg, state


def read_init_files(cfg: ModelConfig, train_cfg: TrainConfig, flags: dict,
                    resumed: Path | None = None) -> tuple[ModelConfig, Sources]:
    """Read --init, --init_image, --init_text -> (cfg with their architecture, {source: State})

    flags: {setting: value, None if it was not given}; what was given wins over what a file tells.
    resumed: the folder of a run that continues: where it has a checkpoint, no file is read, and its
    own settings tell the architecture."""
    heads = {name: v for name, v in flags.items() if name.endswith("_heads") and v is not None}
    found, init_weights = {}, {}
    has_checkpoint = resumed and any((resumed / name).exists() for name in CHECKPOINTS)
    if has_checkpoint:
        found = (saved_settings(resumed) or {}).get("model", {})
    for flag, loader in (("init", load_m3ae), ("init_image", load_clip), ("init_text", load_text)):
        path = getattr(train_cfg, flag)
        if path and (flag, path) != ("init", "none") and not has_checkpoint:
            config, state = loader(path, **heads)
            init_weights[f"--{flag} {path}"] = state
            found |= config if isinstance(config, dict) else asdict(config)

    # Tensors fix the architecture. Image size, lengths, dropout and losses are the user's.
    fixed = re.compile(".*_(width|heads|layers|blocks|act)|patch_size|text_max_positions|mim_layer"
                       + "|itc.*" * (cfg.task == "irtr"))      # retrieval keeps the head of ITC
    arch_fields = {name: value for name, value in found.items()
                   if fixed.fullmatch(name) and flags.get(name) is None}
    return replace(cfg, **arch_fields), init_weights


# ------------------------------------------------------------------------------------- into a model

def check(cfg: ModelConfig, init_weights: Sources, needed: tuple = ()) -> dict[str, dict]:
    """What a model of `cfg` takes of each source: {source: {name: tensor}}, positions resized

    A module comes whole or, if it is not `needed`, not at all: a missing tensor is a UserError, and
    so is a wrong shape."""
    with torch.device("meta"):                             # shapes without numbers
        shapes = {name: tensor.shape for name, tensor in M3AE(cfg).state_dict().items()}
    released = {name: " + ".join(names) for name, names in name_table(cfg)}
    taken: dict[str, dict[str, Tensor]] = {}
    for source, state in init_weights.items():
        taken[source] = {}
        modules = {*needed, *map(module_of, state)}
        for name in [name for name in shapes if module_of(name) in modules]:
            require(name in state,
                    f"{source} has no tensor {name} (as released: {released.get(name, 'none')})")
            tensor, shape = state[name], shapes[name]
            if name == "vit.pos_embed" and tensor.ndim == 2 and len(tensor) != shape[0]:
                tensor = resize_positions(tensor, shape[0] - 1)
            if name == "text.word.weight" and modules == {"text"} and tensor.ndim == 2:
                tensor = tensor[:shape[0]]                 # files pad it with rows of no token
            require(tensor.shape == shape,
                    f"{source}: {name} has shape {(*tensor.shape,)}, not {(*shape,)}: give the "
                    "--preset, --tokenizer and sizes of these weights")
            taken[source][name] = tensor
    return taken


def resize_positions(pos_embed: Tensor, num_patches: int) -> Tensor:
    """Position embedding (1+L, W) of a square grid -> (1+num_patches, W), bicubic"""
    old, new = math.isqrt(max(1, len(pos_embed)) - 1), math.isqrt(num_patches)
    require(len(pos_embed) - 1 == old ** 2 > 0,
            f"vit.pos_embed has {len(pos_embed)} positions, not one and a square grid's")
    grid = pos_embed[1:].T.reshape(1, -1, old, old)                   # (1, W, √L, √L)
    grid = F.interpolate(grid, (new, new), mode="bicubic", align_corners=False)
    return torch.cat([pos_embed[:1], grid.flatten(2)[0].T])           # (1+num_patches, W)


def load_pretrained(model: M3AE, init_weights: Sources) -> tuple[dict[str, str], list[str]]:
    """Load weights into a model; of several sources the later one wins -> what to tell about it:

    {name: source it came from}, and sentences on what was changed or not used."""
    origin: dict[str, str] = {}
    notes: list[str] = []
    for source, state in init_weights.items():
        tensors = dict(state)
        if "irtr" in model.objectives and "objectives.irtr.fc.weight" not in state:
            # The paper's retrieval score starts as "they match", row 1 of the ITM head.
            for name in [name for name in state if module_of(name) == "itm" and state[name].ndim]:
                new_name = name.replace("itm", "irtr")
                tensors[new_name] = tensors.pop(name)[1:]
                notes.append(f"{source}: {new_name} is row 1 of {name}")

        taken = check(model.cfg, {source: tensors})[source]
        model.load_state_dict(taken, strict=False)
        origin.update(dict.fromkeys(taken, source))
        if state.note:
            notes.append(f"{source}: {state.note}")
        for name, what in RESIZED.items():
            if name in taken and len(taken[name]) != len(state[name]):
                notes.append(f"{source}: {len(state[name])} {what} to {len(taken[name])}")

        unused = [*state.unused, *(name for name in tensors if name not in taken)]
        if unused:
            groups = Counter(re.split(r"\.\d+\.|\.(?:weight|bias)$", name)[0] for name in unused)
            listed = ", ".join(f"{group} ({count})" for group, count in groups.items())
            notes.append(f"{source}: not used by this model: {listed}")
    return origin, notes


def origin_table(model: M3AE, origin: dict[str, str], notes: list[str]) -> str:
    """A table for the terminal: how many weights of each module came from where, then the notes."""
    counts: Counter = Counter()
    for name, tensor in model.state_dict().items():
        counts[module_of(name), origin.get(name, "random")] += tensor.numel()
    rows = [f"{module:8}{count:14,}  {source}" for (module, source), count in counts.items()]
    return "\n".join([f"{'module':8}{'weights':>14}  from", *rows, *notes])


# ------------------------------------------------------------------------------------------- export

def export() -> None:
    """python -m m3ae_mini.weights export RUN OUT: write weights under released names."""
    require(len(sys.argv) == 4 and sys.argv[1] == "export",
            "usage: python -m m3ae_mini.weights export RUN OUT")
    run_folder, out = sys.argv[2:]
    require(not Path(out).exists(), f"{out} exists already: choose another name")
    cfg, state = load_m3ae(run_folder)
    content = {"state_dict": to_official(state, cfg), "model_config": asdict(cfg)}
    require(from_official(content["state_dict"], cfg).keys() == state.keys(),
            f"{run_folder} can't be exported: ITC and losses of your own have no released names")
    write_atomic(out, lambda file: torch.save(content, file))
    print(f"wrote {out}")


if __name__ == "__main__":
    run(export)
