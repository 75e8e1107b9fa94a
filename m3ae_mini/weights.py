"""Weights in and out: CLIP, RoBERTa and BERT, released M³AE, and this project's own checkpoints.
Files come from strangers: nothing in them is ever run."""
import io
import json
import math
import pickle
import re
import sys
import zipfile
from collections import Counter, namedtuple
from dataclasses import asdict, fields, replace
from pathlib import Path

import torch
import torch.nn.functional as F

from .config import ModelConfig, require, reading
from .loop import run, write_atomic
from .objectives import M3AE

# {name here: released name}. A name that ends in a dot stands for two, its weight and its bias. Of several
# released names the tensors stand one upon the other here: query, key and value are one matrix.
CLIP_BLOCK = {"norm1.": "ln_1.", "attn.qkv.": "attn.in_proj_", "attn.out.": "attn.out_proj.",
              "norm2.": "ln_2.", "fc1.": "mlp.c_fc.", "fc2.": "mlp.c_proj."}
BERT_LAYER = {"attn.qkv.": "attention.self.query. attention.self.key. attention.self.value.",
              "attn.out.": "attention.output.dense.", "attn_norm.": "attention.output.LayerNorm.",
              "fc1.": "intermediate.dense.", "fc2.": "output.dense.", "fc2_norm.": "output.LayerNorm."}
FUSION_LAYER = BERT_LAYER | {
    "cross.q.": "crossattention.self.query.",
    "cross.kv.": "crossattention.self.key. crossattention.self.value.",
    "cross.out.": "crossattention.output.dense.", "cross_norm.": "crossattention.output.LayerNorm."}
VIT = {"cls_token": "class_embedding", "pos_embed": "positional_embedding", "patch_embed.weight": "conv1.weight",
       "norm_pre.": "ln_pre.", "norm_post.": "ln_post."}
TEXT = {"word.weight": "word_embeddings.weight", "position.weight": "position_embeddings.weight",
        "token_type.weight": "token_type_embeddings.weight", "norm.": "LayerNorm."}
FUSION = {"modality": "modality_type_embeddings.weight",
          "text_proj.": "multi_modal_language_proj.", "text_pooler.": "multi_modal_language_pooler.dense.",
          "image_proj.": "multi_modal_vision_proj.", "image_pooler.": "multi_modal_vision_pooler.dense."}
HEADS = {"mlm.dense.": "mlm_head.transform.dense.", "mlm.norm.": "mlm_head.transform.LayerNorm.",
         "mlm.decoder.weight": "mlm_head.decoder.weight", "mlm.decoder.bias": "mlm_head.bias",
         "mim.mask_token": "mim_head.mask_token", "mim.embed.": "mim_head.decoder_embed.",
         "mim.norm.": "mim_head.decoder_norm.", "mim.pred.": "mim_head.decoder_pred.",
         "itm.fc.": "itm_head.fc.", "irtr.fc.": "irtr_head."}
HEADS |= {f"{task}.head.{i}.": f"{task}_head.{i}." for task in ("vqa", "cls") for i in (0, 1, 3)}


def name_table(cfg):
    """Pairs (name here, [released names]) for every tensor that a model of any task may hold."""
    vit, mim, fusion = cfg.vit_blocks, cfg.decoder_layers, cfg.fusion_layers
    groups = (("vit.", "vision_encoder.visual.", 1, VIT), ("text.", "language_encoder.embeddings.", 1, TEXT),
              ("", "", 1, FUSION), ("objectives.", "", 1, HEADS),
              ("vit.blocks.{}.", "vision_encoder.visual.transformer.resblocks.{}.", vit, CLIP_BLOCK),
              ("text.layers.{}.", "language_encoder.encoder.layer.{}.", cfg.text_layers, BERT_LAYER),
              ("fusion.text_layers.{}.", "multi_modal_language_layers.{}.", fusion, FUSION_LAYER),
              ("fusion.image_layers.{}.", "multi_modal_vision_layers.{}.", fusion, FUSION_LAYER),
              ("objectives.mim.blocks.{}.", "mim_head.decoder.resblocks.{}.", mim, CLIP_BLOCK))
    return [(mine.format(i) + name + end, [theirs.format(i) + other + end for other in others.split()])
            for mine, theirs, count, names in groups for i in range(count) for name, others in names.items()
            for end in (("weight", "bias") if name.endswith(".") else ("",))]


def from_official(state, cfg):
    """Tensors (or gradients) under released names -> {name here: tensor}. What no model uses is left out."""
    mine = {}
    for name, released in name_table(cfg):
        if all(r in state for r in released):
            tensor = torch.cat([state[r] for r in released])
            if name == "vit.patch_embed.weight":
                tensor = tensor.permute(0, 2, 3, 1).flatten(1)                         # (W, P·P·3)
            mine[name] = tensor.flatten() if name == "objectives.mim.mask_token" else tensor
    return mine


def to_official(state, cfg):
    """The inverse of from_official, bit for bit: from this model's names to the released ones."""
    theirs = {}
    for name, released in name_table(cfg):
        if name in state:
            tensor = state[name][None, None] if name == "objectives.mim.mask_token" else state[name]
            if name == "vit.patch_embed.weight":                                             # (W, 3, P, P)
                tensor = tensor.unflatten(1, (cfg.patch_size, cfg.patch_size, 3)).permute(0, 3, 1, 2)
            theirs.update(zip(released, tensor.chunk(len(released))))
    return theirs


# As safetensors call them, and as pickles do. Other kinds of numbers are no weights, and not read.
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "torch.DoubleStorage": torch.float64, "torch.FloatStorage": torch.float32,
          "torch.HalfStorage": torch.float16, "torch.BFloat16Storage": torch.bfloat16}
Stored = namedtuple("Stored", "dtype entry offset shape stride")               # a tensor that is not read yet


def read_safetensors(path):
    """-> {name: float32 tensor}. The format: the header's length, the header in JSON, tensors without gap."""
    tensors, here = {}, 0
    with reading(path), open(path, "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        header.pop("__metadata__", None)
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            start, end = entry["data_offsets"]
            data = bytearray(file.read(end - start))
            require(start == here and len(data) == end - start,
                 f"{path} can't be read: tensor {name} claims bytes {start} to {end}, which are not its own")
            here = end
            if entry["dtype"] in DTYPES:
                numbers = torch.frombuffer(data, dtype=DTYPES[entry["dtype"]])
                tensors[name] = numbers.float().view(entry["shape"])
    return tensors


class Inert(dict):
    """Where other names in a pickle lead: it takes anything, keeps items and attributes, does nothing."""
    __init__ = __call__ = append = add = lambda self, *args: None
    __setstate__ = lambda self, state: self.update(state if isinstance(state, dict) else {})
    __hash__ = object.__hash__


class Unpickler(pickle._Unpickler):
    """Reads a pickle as data and imports nothing. (The C unpickler reserves what a pickle claims to need.)"""
    persistent_load = lambda self, storage: storage         # ("storage", dtype, entry in the archive, …)
    dispatch = pickle._Unpickler.dispatch | {pickle.BYTEARRAY8[0]: None}       # reserves what is claimed, too

    def find_class(self, module, name):
        known = {"torch._utils._rebuild_tensor_v2": lambda storage, *view: Stored(*storage[1:3], *view[:3]),
                 "torch._utils._rebuild_parameter": lambda tensor, *_: tensor}
        return (known | DTYPES).get(f"{module}.{name}", Inert)


def read_torch(path):
    """A file of torch.save or torch.jit.save -> (all it holds, as data; {dotted name: float32 tensor})."""
    tensors, storages, seen = {}, {}, set()

    def collect(node, name):                                # the tensors in nested dicts, each dict once
        items = node.items() if isinstance(node, dict) and id(node) not in seen else ()
        seen.add(id(node))
        for key, item in items:
            collect(item, f"{name}.{key}" if name else f"{key}")
        if isinstance(node, Stored) and node.dtype in DTYPES.values():
            dtype, entry, offset, shape, stride = node
            if (entry, dtype) not in storages:
                data = bytearray(archive.read(f"{pickled.removesuffix('.pkl')}/{entry}"))
                storages[entry, dtype] = torch.frombuffer(data, dtype=dtype).float()
            require(math.prod(shape) <= len(storages[entry, dtype]),    # else an endless view of a few numbers
                 f"{path}: tensor {name} claims more numbers than the file has")
            tensors[name] = storages[entry, dtype].as_strided(shape, stride, offset)

    with reading(path), open(path, "rb") as file:
        require(zipfile.is_zipfile(file), f"{path} can't be read: it is no whole zip archive; if PyTorch < 1.6 "
                                       "wrote it, load and save it again there")
        archive = zipfile.ZipFile(file)
        require(sum(info.file_size for info in archive.infolist()) < 10 * Path(path).stat().st_size,
             f"{path} can't be read: unpacked it would be more than ten times as large")
        (pickled,) = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        content = Unpickler(io.BytesIO(archive.read(pickled))).load()
        collect(next((content[key] for key in ("state_dict", "model") if key in content), content), "")
    return content, tensors


class State(dict):
    """Tensors under this model's names. `rest`: names in the file that have no place in any such model."""
    rest = ()


def rename_keys(tensors, path, released, anchor):
    """Tensors under a file's names -> State. `released` replaces the prefix that the name in `anchor` has."""
    prefixes = [name.removesuffix(anchor) for name in tensors if name.endswith(anchor)]
    require(len(prefixes) == 1, f"{path} has no tensor {anchor}, or several: is it the right kind of file?")
    names = {re.sub(f"^{re.escape(prefixes[0])}", released, name): name for name in tensors}
    deep = ModelConfig(vit_blocks=99, text_layers=99, fusion_layers=99, decoder_layers=99)  # deeper than any
    with reading(path):
        state = State(from_official({new: tensors[old] for new, old in names.items()}, deep))
    used = {name for mine, theirs in name_table(deep) if mine in state for name in theirs}
    state.rest = [old for new, old in names.items() if new not in used]
    return state


def part(name):
    """The part of the model a tensor belongs to: vit, text, a head (mlm, …), or fusion: all between."""
    first, second = f"{name}.".split(".")[:2]
    return {"vit": first, "text": first, "objectives": second}.get(first, "fusion")


def infer_config(state, path, known):
    """What shapes tell: {field of ModelConfig: value}. The number of heads is in no shape: it is `known`, or
    heads are 64 wide. A tensor that is missing tells nothing; `check` reports it."""
    def size(name, axis=0):
        return state[name].shape[axis] if name in state and state[name].ndim > axis else 0

    def depth(prefix):
        return len({name.removeprefix(prefix).split(".")[0] for name in state if name.startswith(prefix)})
    patch = math.isqrt(size("vit.patch_embed.weight", 1) // 3)
    found = dict(
        patch_size=patch, image_size=patch * math.isqrt(max(1, size("vit.pos_embed")) - 1),
        vit_width=size("vit.cls_token"), vit_blocks=depth("vit.blocks."),
        vocab_size=size("text.word.weight"), text_max_positions=size("text.position.weight"),
        text_width=size("text.word.weight", 1), text_layers=depth("text.layers."),
        text_kind={0: None, 1: "roberta"}.get(size("text.token_type.weight"), "bert"),
        fusion_width=size("modality", 1), fusion_layers=depth("fusion.text_layers."),
        decoder_width=size("objectives.mim.mask_token"), decoder_layers=depth("objectives.mim.blocks."),
        num_answers=size("objectives.vqa.head.3.bias"), num_classes=size("objectives.cls.head.3.bias"))
    found = {field: value for field, value in found.items() if value}
    for width in [field for field in found if field.endswith("_width")]:
        heads = width.replace("width", "heads")
        require(heads in known or found[width] % 64 == 0,
             f"{path} does not tell the heads of a width of {found[width]}: give --{heads}")
        found[heads] = known.get(heads, found[width] // 64)
    parts = {part(name) for name in state}
    found.update({"task": task for task in ("vqa", "cls", "irtr") if task in parts})
    if parts & {"mlm", "mim", "itm"}:
        found.update({name: known.get(name, 1.0) if name in parts else 0.0 for name in ("mlm", "mim", "itm")})
    return found


def load_clip(path, **given):
    """CLIP's image encoder, from OpenAI's archive or a plain state dict -> (fields of ModelConfig, State). As
    released, vit_blocks leaves out the last block. Fewer blocks and another image_size do as well."""
    state = rename_keys(read_torch(path)[1], path, "vision_encoder.visual.", "class_embedding")
    found = infer_config(state, path, known=given)
    found["vit_blocks"] = found.get("vit_blocks", 1) - 1
    return {field: value for field, value in found.items() if field != "image_size"}, state


def load_text(path, **given):
    """A Hugging Face folder of RoBERTa or BERT -> (fields of ModelConfig, State)"""
    require(Path(path).is_dir(), f"there is no folder {path}: give one with config.json and model.safetensors")
    file, safe = Path(path, "config.json"), Path(path, "model.safetensors")
    with reading(file):
        config = dict(json.loads(file.read_bytes())) if file.exists() else {}
        known = {"text_heads": int(config["num_attention_heads"])} if config else given
    require(known.get("text_heads"), f"{path} has no config.json that tells how many heads: give --text_heads")
    tensors = read_safetensors(safe) if safe.exists() else read_torch(Path(path, "pytorch_model.bin"))[1]
    tensors = {name.replace("Norm.gamma", "Norm.weight").replace("Norm.beta", "Norm.bias"): tensor
               for name, tensor in tensors.items()}         # gamma and beta: in old files
    state = rename_keys(tensors, path, "language_encoder.", "embeddings.word_embeddings.weight")
    found = infer_config(state, path, known)
    pad, eps = (1, 1e-5) if found.get("text_kind") == "roberta" else (0, 1e-12)
    needed = dict(hidden_act="gelu", position_embedding_type="absolute", pad_token_id=pad, layer_norm_eps=eps)
    for key, value in needed.items():
        require(config.get(key, value) == value,
             f"{file}: {key} is {config.get(key)}, needed is {value}: use another text encoder")
    return found, state


def load_m3ae(path, **given):
    """A checkpoint of M³AE, released or of this project, or a run's folder -> (ModelConfig, State). What
    shapes do not tell is taken from `given`, else from the file's configuration, else from the paper."""
    if Path(path).is_dir():
        path = Path(path, "best.pt" if Path(path, "best.pt").exists() else "last.pt")
    content, tensors = read_torch(path)
    own = any(part(name) == "vit" for name in tensors)
    state = State(tensors) if own else rename_keys(tensors, path, "", "vision_encoder.visual.class_embedding")
    with reading(path):
        config = content.get("model_config", content.get("hyper_parameters", {}))
        config = config.get("config", config)
        if "num_heads" in config:                           # the released name of fusion_heads
            config["fusion_heads"] = config["num_heads"]
        config = {name: value for name, value in config.items() if isinstance(value, (bool, int, float, str))}
        known = {f.name: f.type(config[f.name]) for f in fields(ModelConfig) if f.name in config} | given
        cfg = ModelConfig(**known | infer_config(state, path, known))
        check(cfg, {path: state}, needed=("vit", "text", "fusion"))
    return cfg, state


def resize_positions(pos, patches):
    """Learned positions of a square grid (1+L, W) -> (1+patches, W), bicubic; the class position is kept."""
    old, new = math.isqrt(max(1, len(pos)) - 1), math.isqrt(patches)
    require(len(pos) - 1 == old ** 2 > 0, f"vit.pos_embed has {len(pos)} positions, not those of a class and a square")
    grid = pos[1:].T.reshape(1, -1, old, old)                                          # (1, W, √L, √L)
    grid = F.interpolate(grid, size=(new, new), mode="bicubic", align_corners=False, antialias=False)
    return torch.cat([pos[:1], grid.flatten(2)[0].T])                                  # (1+patches, W)


def check(cfg, sources, needed=()):
    """What a model of `cfg` takes: {source: {name: tensor}}, positions resized. A part of it comes whole or,
    if it is not `needed`, not at all: a missing tensor is a UserError, so is a wrong shape."""
    with torch.device("meta"):                              # shapes without numbers
        shapes = {name: tensor.shape for name, tensor in M3AE(cfg).state_dict().items()}
    released, taken = {mine: " + ".join(theirs) for mine, theirs in name_table(cfg)}, {}
    for source, state in sources.items():
        parts, taken[source] = {*needed, *map(part, state)}, {}
        for name in [name for name in shapes if part(name) in parts]:
            require(name in state, f"{source} has no tensor {name} (as released: {released.get(name, 'none')})")
            tensor, shape = state[name], shapes[name]
            if name == "vit.pos_embed" and tensor.ndim == 2 and len(tensor) != shape[0]:
                tensor = resize_positions(tensor, shape[0] - 1)
            require(tensor.shape == shape, f"{source}: {name} has shape {(*tensor.shape,)}, not {(*shape,)}: "
                                        "were --preset, --tokenizer and the sizes those of these weights?")
            taken[source][name] = tensor
    return taken


def load_pretrained(model, sources):
    """Put weights into a model. sources: {"--init_image ViT-B-16.pt": State, …}, of which later ones win
    -> a table to print: what came from where, what is left random, what of the files is not used."""
    origin, weights, lines = {}, Counter(), []
    for source, state in sources.items():
        tensors = dict(state)
        if "irtr" in model.objectives and "objectives.irtr.fc.weight" not in state:
            # The paper's retrieval score starts as "they match", row 1 of the ITM head.
            for name in [name for name in state if part(name) == "itm" and state[name].ndim]:
                tensors[name.replace("itm", "irtr")] = tensors.pop(name)[1:]
                lines += [f"{source}: {name.replace('itm', 'irtr')} is row 1 of {name}"]
        taken = check(model.cfg, {source: tensors})[source]
        model.load_state_dict(taken, strict=False)
        origin.update(dict.fromkeys(taken, source))
        if "vit.pos_embed" in taken and len(taken["vit.pos_embed"]) != len(state["vit.pos_embed"]):
            lines += [f"{source}: {len(state['vit.pos_embed'])} image positions resized to {len(taken['vit.pos_embed'])}"]
        rest = [*state.rest, *(name for name in tensors if name not in taken)]
        groups = Counter(re.split(r"\.\d+\.|\.(?:weight|bias)$", name)[0] for name in rest)
        shown = ", ".join(f"{group} ({count})" for group, count in groups.items())
        lines += [f"{source}: not used, as this model has no place for them: {shown}"] if shown else []
    for name, tensor in model.state_dict().items():
        weights[part(name), origin.get(name, "random")] += tensor.numel()
    rows = [f"{name:8}{count:14,}  {source}" for (name, source), count in weights.items()]
    return "\n".join([f"{'part':8}{'weights':>14}  from", *rows, *lines])


def read_init_files(cfg, train_cfg, flags):
    """Read what --init, --init_image and --init_text name -> (cfg with their architecture, {source: State}).
    flags: {setting: value, or None where it was not given}; what was given wins over what a file says."""
    heads = {name: value for name, value in flags.items() if name.endswith("_heads") and value is not None}
    found, states = {}, {}
    for flag, load in (("init", load_m3ae), ("init_image", load_clip), ("init_text", load_text)):
        path = getattr(train_cfg, flag)
        if path and (flag, path) != ("init", "none"):
            told, states[f"--{flag} {path}"] = load(path, **heads)
            found |= told if isinstance(told, dict) else asdict(told)
    # Tensors fix the architecture. Image size, lengths, dropout and losses are the user's.
    tied = re.compile("patch_size|text_max_positions|mim_layer|.*_(width|heads|layers|blocks)")
    tied = {name: found[name] for name in found if tied.fullmatch(name) and flags.get(name) is None}
    return replace(cfg, **tied), states


def export():
    """python -m m3ae_mini.weights export RUN OUT: writes a run's weights under the released names."""
    require(len(sys.argv) == 4 and sys.argv[1] == "export", "usage: python -m m3ae_mini.weights export RUN OUT")
    run_folder, out = sys.argv[2:]
    require(not Path(out).exists(), f"{out} exists already: choose another name")
    cfg, state = load_m3ae(run_folder)
    content = {"state_dict": to_official(state, cfg), "model_config": asdict(cfg)}
    require(from_official(content["state_dict"], cfg).keys() == state.keys(),
         f"{run_folder} holds tensors that have no released name: it can't be exported")
    write_atomic(out, lambda file: torch.save(content, file))
    print(f"wrote {out}")


if __name__ == "__main__":
    run(export)
