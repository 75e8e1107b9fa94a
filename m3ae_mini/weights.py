"""Weights in and out: CLIP, RoBERTa and BERT, released M³AE, and this project's own checkpoints.

Such files come from strangers. Nothing in them is ever run: a pickle is read as data (`unpickle`). Memory is
reserved for what a file holds, not for what it claims.
"""
import json
import math
import os
import pickletools
import re
import sys
import zipfile
from collections import Counter
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path

import torch
import torch.nn.functional as F

from .config import ModelConfig, UserError
from .objectives import M3AE


# --------------------------------------------------------------------------------------------- released names

def name_table(cfg):
    """Pairs (name here, [released names]) for every tensor the model may hold. Of several released names the
    tensors stand one upon the other here: query, key and value are one matrix."""
    table = []

    def add(mine, *released):
        for end in (".weight", ".bias"):
            table.append((mine + end, [name + end for name in released]))

    def clip_block(mine, released):
        table.append((f"{mine}.attn.qkv.weight", [f"{released}.attn.in_proj_weight"]))
        table.append((f"{mine}.attn.qkv.bias", [f"{released}.attn.in_proj_bias"]))
        add(f"{mine}.attn.out", f"{released}.attn.out_proj")
        add(f"{mine}.norm1", f"{released}.ln_1")
        add(f"{mine}.norm2", f"{released}.ln_2")
        add(f"{mine}.up", f"{released}.mlp.c_fc")
        add(f"{mine}.down", f"{released}.mlp.c_proj")

    def bert_layer(mine, released, cross=False):
        def query_key_value(part):
            return [f"{released}.{part}.self.{what}" for what in ("query", "key", "value")]
        add(f"{mine}.attn.qkv", *query_key_value("attention"))
        add(f"{mine}.attn.out", f"{released}.attention.output.dense")
        add(f"{mine}.attn_norm", f"{released}.attention.output.LayerNorm")
        if cross:
            add(f"{mine}.cross.q", query_key_value("crossattention")[0])
            add(f"{mine}.cross.kv", *query_key_value("crossattention")[1:])
            add(f"{mine}.cross.out", f"{released}.crossattention.output.dense")
            add(f"{mine}.cross_norm", f"{released}.crossattention.output.LayerNorm")
        add(f"{mine}.up", f"{released}.intermediate.dense")
        add(f"{mine}.down", f"{released}.output.dense")
        add(f"{mine}.down_norm", f"{released}.output.LayerNorm")

    clip = "vision_encoder.visual"
    table.append(("vit.cls", [f"{clip}.class_embedding"]))
    table.append(("vit.pos", [f"{clip}.positional_embedding"]))
    table.append(("vit.patch.weight", [f"{clip}.conv1.weight"]))
    add("vit.norm_pre", f"{clip}.ln_pre")
    add("vit.norm_post", f"{clip}.ln_post")
    for i in range(cfg.vit_blocks):
        clip_block(f"vit.blocks.{i}", f"{clip}.transformer.resblocks.{i}")

    bert = "language_encoder"
    for kind in ("word", "position", "token_type"):
        table.append((f"text.{kind}.weight", [f"{bert}.embeddings.{kind}_embeddings.weight"]))
    add("text.norm", f"{bert}.embeddings.LayerNorm")
    for i in range(cfg.text_layers):
        bert_layer(f"text.layers.{i}", f"{bert}.encoder.layer.{i}")

    table.append(("modality", ["modality_type_embeddings.weight"]))
    for mine, released in (("text", "language"), ("image", "vision")):
        add(f"{mine}_proj", f"multi_modal_{released}_proj")
        add(f"{mine}_pooler", f"multi_modal_{released}_pooler.dense")
        for i in range(cfg.fusion_layers):
            bert_layer(f"fusion.{mine}_layers.{i}", f"multi_modal_{released}_layers.{i}", cross=True)

    add("objectives.mlm.dense", "mlm_head.transform.dense")
    add("objectives.mlm.norm", "mlm_head.transform.LayerNorm")
    table.append(("objectives.mlm.decoder.weight", ["mlm_head.decoder.weight"]))
    table.append(("objectives.mlm.decoder.bias", ["mlm_head.bias"]))

    table.append(("objectives.mim.mask_token", ["mim_head.mask_token"]))
    for layer in ("embed", "norm", "pred"):
        add(f"objectives.mim.{layer}", f"mim_head.decoder_{layer}")
    for i in range(cfg.decoder_layers):
        clip_block(f"objectives.mim.blocks.{i}", f"mim_head.decoder.resblocks.{i}")

    add("objectives.itm.fc", "itm_head.fc")
    for task in ("vqa", "cls"):
        for i in (0, 1, 3):
            add(f"objectives.{task}.head.{i}", f"{task}_head.{i}")
    add("objectives.irtr.fc", "irtr_head")
    return table


def from_official(state, cfg):
    """Tensors under released names -> tensors under this model's names: {name: tensor}. Also takes gradients.
    What the model does not use (CLIP's text side, RoBERTa's pooler, buffers) is left out."""
    mine = {}
    for name, released in name_table(cfg):
        if any(r not in state for r in released):
            continue
        shapes = {r: tuple(state[r].shape) for r in released}
        if len(set(shapes.values())) > 1:
            raise UserError(f"tensors of one shape differ: {shapes}")
        tensor = state[released[0]] if len(released) == 1 else torch.cat([state[r] for r in released])
        if name == "vit.patch.weight" and tensor.ndim == 4:
            tensor = tensor.permute(0, 2, 3, 1).flatten(1)  # a convolution's (W, 3, P, P) -> (W, P·P·3)
        elif name == "objectives.mim.mask_token":
            tensor = tensor.flatten()                       # (1, 1, W) -> (W,)
        mine[name] = tensor
    return mine


def to_official(state, cfg):
    """The inverse of from_official, bit for bit: from this model's names to the released ones."""
    theirs = {}
    for name, released in name_table(cfg):
        if name not in state:
            continue
        tensor = state[name]
        if name == "vit.patch.weight":
            tensor = tensor.unflatten(1, (cfg.patch_size, cfg.patch_size, 3)).permute(0, 3, 1, 2).contiguous()
        elif name == "objectives.mim.mask_token":
            tensor = tensor[None, None]
        theirs.update(zip(released, tensor.chunk(len(released))))
    return theirs


# ---------------------------------------------------------------------------------------------- reading files

class Inert(dict):
    """Stands for what a pickle names or builds: class, function, object, container. It keeps what is said of
    it (name, arguments, items; its state is the item "") and can do nothing."""

    def __init__(self, name=None, args=()):
        super().__init__()
        self.name, self.args = name, args


def unpickle(data):
    """A pickle's bytes (protocol 2, torch's) -> what it holds, as plain data. Nothing is imported or called.

    Of containers only tuples and items under strings are kept: nothing else is asked for, and other keys need
    a hash, which for a tuple of tuples can take for ever."""
    stack, marks, memo = [], [], {}
    for opcode, value, _ in pickletools.genops(data):
        # What an opcode takes from the stack, pickletools knows: so many objects, or all down to a mark.
        wanted, start = opcode.stack_before, len(stack) - len(opcode.stack_before)
        if pickletools.markobject in wanted:
            start = marks.pop() - wanted.index(pickletools.markobject)
        taken = stack[start:]
        del stack[start:]

        match opcode.name:
            case "STOP": return taken[0]
            case "MARK": marks.append(len(stack))
            case "BINPUT" | "LONG_BINPUT": memo[value] = stack[-1]
            case "BINGET" | "LONG_BINGET": stack.append(memo[value])
            case "GLOBAL": stack.append(Inert(value))
            case "REDUCE" | "NEWOBJ": stack.append(Inert(taken[0].name, taken[1]))
            case "EMPTY_TUPLE" | "TUPLE1" | "TUPLE2" | "TUPLE3" | "TUPLE": stack.append(tuple(taken))
            case "NEWTRUE" | "NEWFALSE" as name: stack.append(name == "NEWTRUE")
            case "BINPERSID" | "APPEND" | "APPENDS": stack.append(taken[0])     # a storage stays a tuple
            case "SETITEM" | "SETITEMS" | "BUILD" as name:
                items = ["", taken[1]] if name == "BUILD" else taken[1:]
                taken[0].update((k, v) for k, v in zip(items[::2], items[1::2]) if isinstance(k, str))
                stack.append(taken[0])
            case _ if opcode.stack_after: stack.append(value if opcode.arg else Inert())


# Other kinds of numbers are no weights, and not read. As safetensors call them, and as pickles do.
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "torch DoubleStorage": torch.float64, "torch FloatStorage": torch.float32,
          "torch HalfStorage": torch.float16, "torch BFloat16Storage": torch.bfloat16}


@contextmanager
def readable(path):
    """Whatever goes wrong while a file is read is the file's fault, and said so."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{path} can't be read: is the path right, the file whole and of the right kind? "
                        f"({type(error).__name__}: {str(error)[:200]})") from error


def read_safetensors(path):
    """-> {name: float32 tensor}. The format: the header's length, the header in JSON, tensors without gap."""
    tensors, place = {}, 0
    with readable(path), open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        space = os.path.getsize(path) - 8 - length          # bytes of tensors
        if space < 0:
            raise ValueError(f"it claims a header of {length} bytes")
        header = json.loads(file.read(length))
        header.pop("__metadata__", None)

        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            start, end = entry["data_offsets"]
            if not place == start <= end <= space:
                raise ValueError(f"tensor {name} claims bytes {start} to {end} of {place} to {space}")
            data, place = bytearray(file.read(end - start)), end
            if entry["dtype"] in DTYPES:
                shape = torch.empty(entry["shape"], device="meta").shape    # refuses what is no shape
                tensors[name] = torch.frombuffer(data, dtype=DTYPES[entry["dtype"]]).float().view(shape)
    return tensors


def read_torch(path):
    """A file of torch.save or torch.jit.save -> (all it holds, as data; {dotted name: float32 tensor})."""
    with readable(path), open(path, "rb") as file:
        if not os.path.isfile(path) or not zipfile.is_zipfile(file):
            raise ValueError("no whole zip archive; if PyTorch < 1.6 wrote it, load and save it again there")
        archive, size = zipfile.ZipFile(file), os.path.getsize(path)
        (pickled,) = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        content = unpickle(archive.open(pickled).read(size))
        weights = next((content[key] for key in ("state_dict", "model") if key in content), content)

        # Entries of a zip may overlap, and tensors be endless views of a few numbers: hence the budget.
        tensors, storages, seen, todo, budget = {}, {}, set(), [("", weights)], 3 * size
        while todo:
            name, node = todo.pop()
            if not isinstance(node, Inert) or id(node) in seen or len(name) > 255:
                continue
            if node.name != "torch._utils _rebuild_tensor_v2":
                seen.add(id(node))
                todo += [(f"{name}.{key}".strip("."), item) for key, item in node.items()]
                todo += [(name, item) for item in node.args[:1]]    # what a Parameter is made of
                continue

            storage, offset, shape, stride = node.args[:4]
            kind, entry = storage[1].name, pickled.removesuffix(".pkl") + "/" + storage[2]
            if kind not in DTYPES:
                continue
            if entry not in storages:
                data = bytearray(archive.open(entry).read(size))
                storages[entry] = torch.frombuffer(data, dtype=DTYPES[kind]).float()
                budget -= len(data)
            tensors[name] = storages[entry].as_strided(shape, stride, offset)
            budget -= tensors[name].numel() * DTYPES[kind].itemsize + len(shape)
            if budget < 0:
                raise ValueError(f"tensor {name} claims more numbers than the file has")
    return content, tensors


# ------------------------------------------------------------------------------------------ what is in a file

class State(dict):
    """Tensors under this model's names. `rest` are names of the file that have no place in any such model,
    `notes` are sentences on what was assumed."""
    rest, notes = (), ()


def translate(tensors, path, ending="", released=""):
    """Tensors under a file's names -> State. What stands before `ending` in the one name that ends so is the
    prefix of all others too, and `released` takes its place."""
    prefixes = [name.removesuffix(ending) for name in tensors if name.endswith(ending)] if ending else [""]
    if len(prefixes) != 1:
        raise UserError(f"{path} has {len(prefixes)} tensors named {ending}, and must have one")
    names = {released + name[len(prefixes[0]):]: name for name in tensors if name.startswith(prefixes[0])}

    # There are no more layers than numbers in the names, and a table too long does no harm.
    most = min(200, len({piece for name in names for piece in name.split(".") if piece.isdigit()}))
    cfg = ModelConfig(vit_blocks=most, text_layers=most, fusion_layers=most, decoder_layers=most)
    state = State(from_official({name: tensors[names[name]] for name in names}, cfg))
    used = {names[name] for mine, theirs in name_table(cfg) if mine in state for name in theirs}
    state.rest = [name for name in tensors if name not in used]
    return state


def part(name):
    """The part of the model a tensor belongs to: vit, text, a head (mlm, …), or fusion: all between."""
    first, second = f"{name}.".split(".")[:2]
    return second if first == "objectives" else first if first in ("vit", "text") else "fusion"


def infer(state, path, known):
    """What the shapes of a State tell: fields of ModelConfig. The number of heads is in no shape: it is
    `known`, or heads are 64 wide. A tensor that is missing tells nothing; `fit` reports it."""
    def size(name, axis=0):
        shape = state[name].shape if name in state else ()
        return shape[axis] if axis < len(shape) else 0

    def depth(prefix):
        return min(200, len({name[len(prefix):].split(".")[0] for name in state if name.startswith(prefix)}))

    patch = math.isqrt(size("vit.patch.weight", 1) // 3)
    found = dict(
        patch_size=patch, image_size=patch * math.isqrt(max(1, size("vit.pos")) - 1),
        vit_width=size("vit.cls"), vit_blocks=depth("vit.blocks."),
        vocab_size=size("text.word.weight"), text_max_positions=size("text.position.weight"),
        text_width=size("text.word.weight", 1), text_layers=depth("text.layers."),
        text_kind={0: None, 1: "roberta"}.get(size("text.token_type.weight"), "bert"),
        fusion_width=size("modality", 1), fusion_layers=depth("fusion.text_layers."),
        decoder_width=size("objectives.mim.mask_token"), decoder_layers=depth("objectives.mim.blocks."),
        num_answers=size("objectives.vqa.head.3.bias"), num_classes=size("objectives.cls.head.3.bias"))
    found = {field: value for field, value in found.items() if value}

    for width in [field for field in found if field.endswith("_width")]:
        heads = width.replace("width", "heads")
        if heads not in known and found[width] % 64:
            raise UserError(f"{path} does not tell the heads of a width of {found[width]}: give --{heads}")
        found[heads] = known.get(heads, found[width] // 64)

    parts = {part(name) for name in state}
    found.update({"task": task for task in ("vqa", "cls", "irtr") if task in parts})
    if parts & {"mlm", "mim", "itm"}:
        found.update({name: known.get(name, 1.0) if name in parts else 0.0 for name in ("mlm", "mim", "itm")})
    return found


def load_clip(path):
    """CLIP's image encoder, from OpenAI's archive or a plain state dict -> (fields of ModelConfig, State).

    As released, vit_blocks leaves out the last block. Fewer blocks and another image_size do as well."""
    state = translate(read_torch(path)[1], path, "class_embedding", "vision_encoder.visual.")
    found = infer(state, path, {})
    found["vit_blocks"] = found.get("vit_blocks", 1) - 1
    found.pop("image_size", None)
    return found, state


def load_text(path, text_heads=None):
    """A Hugging Face folder of RoBERTa or BERT -> (fields of ModelConfig, State). `text_heads` is for folders
    without config.json."""
    folder, config = Path(path), {}
    if (folder / "config.json").exists():
        with readable(folder / "config.json"):
            config = json.loads((folder / "config.json").read_bytes())
            text_heads = int(config["num_attention_heads"])
    if not text_heads:
        raise UserError(f"{path} has no config.json, which tells the number of heads: give --text_heads")

    safe = folder / "model.safetensors"
    tensors = read_safetensors(safe) if safe.exists() else read_torch(folder / "pytorch_model.bin")[1]
    for old, new in ("LayerNorm.gamma", "LayerNorm.weight"), ("LayerNorm.beta", "LayerNorm.bias"):
        tensors = {name.replace(old, new): tensor for name, tensor in tensors.items()}
    state = translate(tensors, path, "embeddings.word_embeddings.weight", "language_encoder.")
    found = infer(state, path, {"text_heads": text_heads})

    roberta = found.get("text_kind") == "roberta"
    needed = {"model_type": "roberta" if roberta else "bert", "pad_token_id": int(roberta),
              "layer_norm_eps": 1e-5 if roberta else 1e-12, "hidden_act": "gelu",
              "position_embedding_type": "absolute"}
    for key, value in needed.items():
        if config.get(key, value) != value:
            raise UserError(f"{folder / 'config.json'}: {key} is {config[key]}, needed is {value}")
    return found, state


def load_m3ae(path, **given):
    """A checkpoint of M³AE, released or of this project, or a run's folder -> (ModelConfig, State).

    What shapes do not tell is taken from `given`, else from the file's configuration, else from the paper."""
    if Path(path).is_dir():
        path = Path(path, "best.pt" if Path(path, "best.pt").exists() else "last.pt")
    content, tensors = read_torch(path)
    own = any(part(name) == "vit" for name in tensors)
    state = State(tensors) if own else translate(tensors, path)

    with readable(path):
        config = content.get("model_config", content.get("hyper_parameters", {}))
        config = config.get("config", config)
        config = {"fusion_heads": config.get("num_heads")} | config         # its released name
        kinds = {f.name: (int, float) if f.type is float else f.type for f in fields(ModelConfig)}
        known = {name: config[name] for name in kinds if isinstance(config.get(name), kinds[name])} | given
        found = infer(state, path, known)
        paper = {"mim_layer": 3 if found.get("fusion_layers", 6) > 3 else -1,
                 "max_text_len": min(64, found.get("text_max_positions", 514) - 2)}
        cfg = ModelConfig(**paper | known | found)

        if cfg.decoder_width * (cfg.image_size // cfg.patch_size) ** 2 > 2 ** 26:
            raise ValueError(f"too wide a decoder, {cfg.decoder_width}, for so many patches")
        with torch.device("meta"):                          # takes no memory, but for the decoder's positions
            fit(M3AE(cfg), state, path, needed=("vit", "text", "fusion"))

    assumed = [f"{field} {getattr(cfg, field)}" for field in ("mim_layer", *found)
               if field.endswith(("_layer", "_heads")) and field not in known]
    state.notes = [f"not told by the file, so assumed: {', '.join(assumed)}"] if assumed else []
    return cfg, state


# -------------------------------------------------------------------------------------- into a model, and out

def resize_positions(pos, patches):
    """Learned positions of a square grid (1+L, W) -> (1+patches, W), bicubic; the class position is kept."""
    old, new = math.isqrt(max(1, len(pos)) - 1), math.isqrt(patches)
    if not len(pos) - 1 == old ** 2 > 0:
        raise UserError(f"vit.pos has {len(pos)} positions: not one for the class and a square grid")
    grid = pos[1:].T.reshape(1, -1, old, old)                                          # (1, W, √L, √L)
    grid = F.interpolate(grid, size=(new, new), mode="bicubic", align_corners=False, antialias=False)
    return torch.cat([pos[:1], grid.flatten(2)[0].T])                                  # (1+patches, W)


def fit(model, state, source, needed=()):
    """The tensors of `state` that `model` takes, positions resized. A part of the model comes whole or, if it
    is not `needed`, not at all: a missing tensor is a UserError, so is a wrong shape."""
    released, parts, taken = dict(name_table(model.cfg)), {*needed, *map(part, state)}, {}
    for name, here in model.state_dict().items():
        if part(name) not in parts:
            continue
        if name not in state:
            raise UserError(f"{source} has no tensor {name} (as released: {', '.join(released[name])})")
        tensor = state[name]
        if name == "vit.pos" and tensor.ndim == 2 and len(tensor) != len(here):
            tensor = resize_positions(tensor, len(here) - 1)
        if tensor.shape != here.shape:
            words = name in ("text.word.weight", "objectives.mlm.decoder.weight")
            raise UserError(f"{source}: {name} has shape {tuple(tensor.shape)}, needed is {tuple(here.shape)}"
                            + ("; --tokenizer must be the one of these weights" if words else ""))
        taken[name] = tensor
    return taken


def start(model, sources):
    """Put weights into a model. sources: {"--init_image ViT-B-16.pt": State, …}, of which later ones win
    -> a table to print: what came from where, what is left random, what of the files is not used."""
    origin, tensors, weights, lines = {}, Counter(), Counter(), []
    for source, state in sources.items():
        taken = fit(model, state, source)
        model.load_state_dict(taken, strict=False)
        origin.update(dict.fromkeys(taken, source))

        lines += [f"{source}: {note}" for note in state.notes]
        if "vit.pos" in taken and len(taken["vit.pos"]) != len(state["vit.pos"]):
            lines += [f"{source}: {len(state['vit.pos'])} image positions resized to {len(taken['vit.pos'])}"]
        rest = [*state.rest, *(name for name in state if name not in taken)]
        groups = Counter(re.split(r"\.\d+\.|\.(?:weight|bias)$", name)[0] for name in rest)
        if rest:
            lines += [f"{source}: not used, as this model has no place for them: "
                      + ", ".join(f"{group} ({n})" for group, n in groups.items())]

    for name, tensor in model.state_dict().items():
        row = part(name), origin.get(name, "random")
        tensors[row] += 1
        weights[row] += tensor.numel()
    rows = [f"{row[0]:8}{tensors[row]:8,}{weights[row]:14,}  {row[1]}" for row in tensors]
    return "\n".join([f"{'part':8}{'tensors':>8}{'weights':>14}  from", *rows, *lines])


def export(run, out):
    """Write a run's weights under the released names, beside `out` first, so that it is never half a file."""
    cfg, state = load_m3ae(run)
    beside = f"{out}.tmp-{os.getpid()}"
    with open(beside, "wb") as file:
        torch.save({"state_dict": to_official(state, cfg), "model_config": asdict(cfg)}, file)
    os.replace(beside, out)


if __name__ == "__main__":
    try:
        if len(sys.argv) != 4 or sys.argv[1] != "export":
            raise UserError("usage: python -m m3ae_mini.weights export RUN OUT.ckpt")
        export(*sys.argv[2:])
    except (UserError, OSError) as error:
        print(error, file=sys.stderr)
        sys.exit(2)
