"""The numbers are the released implementation's: golden cases, and cases of our own against a second model.

That one is written here the slow way. It knows released names alone, uses torch's own attention and loops,
and makes a whole pass for each loss."""
import functools
import json
import math
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from m3ae_mini import M3AE, ModelConfig
from m3ae_mini.model import patchify
from m3ae_mini.objectives import MIM, sine_cosine_positions
from m3ae_mini.weights import from_official, to_official

FOLDER = Path(__file__).parent / "golden"
GOLDEN = sorted(FOLDER.glob("*.npz"))

# What may differ: losses, logits and features (absolute), norms of gradients (relative).
LOSS, FEATURE, NORM = 1e-4, 2e-4, 1e-3

# Released tensors that nothing uses: CLIP's text side, RoBERTa's pooler, positions that are computed.
UNUSED = {
    "vision_encoder.positional_embedding", "vision_encoder.token_embedding.weight",
    "vision_encoder.ln_final.weight", "vision_encoder.ln_final.bias",
    "language_encoder.pooler.dense.weight", "language_encoder.pooler.dense.bias",
    "mim_head.decoder_pos_embed"}


# -------------------------------------------------------------------------------- a second model

def slow_positions(width, side):
    """2-D sine-cosine positions, one number at a time -> (1 + side², width)"""
    table = np.zeros((1 + side * side, width))
    for row in range(side):
        for column in range(side):
            for i in range(width // 4):
                omega = 10000 ** (-i / (width / 4))
                for half, place in enumerate((column, row)):
                    channel = half * width // 2 + i
                    table[1 + row * side + column, channel] = math.sin(place * omega)
                    table[1 + row * side + column, channel + width // 4] = math.cos(place * omega)
    return torch.tensor(table, dtype=torch.float32)


def slow_patches(image, size):
    """image (B, 3, S, S) -> (B, L, 3·size²), one number at a time"""
    batch, side = len(image), image.shape[-1] // size
    patches = torch.empty(batch, side * side, 3 * size * size)
    for b in range(batch):
        for l in range(side * side):
            for i in range(3 * size * size):
                y, x, channel = i // (3 * size), i // 3 % size, i % 3
                patches[b, l, i] = image[b, channel, l // side * size + y, l % side * size + x]
    return patches


def slow_target(image, cfg):
    """Patches, each normalised by numpy in float64 with the unbiased variance -> (B, L, 3·P²)"""
    patches = slow_patches(image, cfg.patch_size)
    if not cfg.norm_pix_loss:
        return patches
    p = patches.double().numpy()
    p = (p - p.mean(-1, keepdims=True)) / np.sqrt(p.var(-1, keepdims=True, ddof=1) + 1e-6)
    return torch.tensor(p, dtype=torch.float32)


class SlowModel:
    """w: {released name: tensor}; cfg as for M3AE. Called with a batch it gives what M3AE gives."""

    def __init__(self, w, cfg):
        self.w, self.cfg = w, cfg

    def linear(self, name, x):
        return F.linear(x, self.w[name + ".weight"], self.w.get(name + ".bias"))

    def norm(self, name, x, eps):
        return F.layer_norm(x, x.shape[-1:], self.w[name + ".weight"], self.w[name + ".bias"], eps)

    def attention(self, x, other, heads, weights, mask=None):
        """weights: weight and bias of the in-, then of the out-projection; mask (B, N), 1 = real."""
        module = nn.MultiheadAttention(x.shape[-1], heads, batch_first=True, device="meta")
        names = ("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias")
        padding = None if mask is None else mask == 0
        return torch.func.functional_call(module, dict(zip(names, weights)), (x, other, other),
                                          {"key_padding_mask": padding})[0]

    def clip_block(self, name, x, heads):
        h = self.norm(f"{name}.ln_1", x, 1e-5)
        x = x + self.attention(h, h, heads, [self.w[f"{name}.attn.{end}"] for end in (
            "in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias")])
        h = self.linear(f"{name}.mlp.c_fc", self.norm(f"{name}.ln_2", x, 1e-5))
        return x + self.linear(f"{name}.mlp.c_proj", h * torch.sigmoid(1.702 * h))

    def bert_attention(self, name, x, other, heads, mask, eps):
        three = [f"{name}.self.{what}" for what in ("query", "key", "value")]
        weights = [torch.cat([self.w[f"{n}.{end}"] for n in three]) for end in ("weight", "bias")]
        weights += [self.w[f"{name}.output.dense.{end}"] for end in ("weight", "bias")]
        return self.norm(f"{name}.output.LayerNorm", x + self.attention(x, other, heads, weights, mask), eps)

    def bert_layer(self, name, x, mask, heads, eps, other=None, other_mask=None):
        x = self.bert_attention(f"{name}.attention", x, x, heads, mask, eps)
        if other is not None:
            x = self.bert_attention(f"{name}.crossattention", x, other, heads, other_mask, eps)
        h = self.linear(f"{name}.output.dense", F.gelu(self.linear(f"{name}.intermediate.dense", x)))
        return self.norm(f"{name}.output.LayerNorm", x + h, eps)

    def encode_image(self, image, kept=None):
        """kept: for every row the list of its visible patches"""
        name, cfg = "vision_encoder.visual", self.cfg
        pos = self.w[f"{name}.positional_embedding"]
        x = F.conv2d(image, self.w[f"{name}.conv1.weight"], stride=cfg.patch_size)
        x = x.flatten(2).transpose(1, 2) + pos[1:]
        if kept is not None:
            x = torch.stack([torch.stack([row[l] for l in visible]) for row, visible in zip(x, kept)])
        cls = (self.w[f"{name}.class_embedding"] + pos[0]).expand(len(x), 1, -1)
        x = self.norm(f"{name}.ln_pre", torch.cat([cls, x], dim=1), 1e-5)
        for i in range(cfg.vit_blocks):
            x = self.clip_block(f"{name}.transformer.resblocks.{i}", x, cfg.vit_heads)
        return self.norm(f"{name}.ln_post", x, 1e-5)

    def encode_text(self, ids, mask):
        name, roberta = "language_encoder", self.cfg.text_kind == "roberta"
        eps = 1e-5 if roberta else 1e-12
        positions = torch.arange(ids.shape[1]).repeat(len(ids), 1)
        if roberta:
            for row, place in zip(ids, positions):
                count = 0
                for t, token in enumerate(row):
                    count += int(token != 1)
                    place[t] = 1 if token == 1 else 1 + count
        words, rows, types = (self.w[f"{name}.embeddings.{what}_embeddings.weight"]
                              for what in ("word", "position", "token_type"))
        x = self.norm(f"{name}.embeddings.LayerNorm", words[ids] + rows[positions] + types[0], eps)
        for i in range(self.cfg.text_layers):
            x = self.bert_layer(f"{name}.encoder.layer.{i}", x, mask, self.cfg.text_heads, eps)
        return x

    def whole_pass(self, ids, mask, image, kept=None):
        """One forward pass -> text (B, T, D), a list of the image stream (B, N, D) before each fusion layer
        and after the last, and the joint feature (B, 2D)"""
        modality = self.w["modality_type_embeddings.weight"]
        text = self.linear("multi_modal_language_proj", self.encode_text(ids, mask)) + modality[0]
        image = self.linear("multi_modal_vision_proj", self.encode_image(image, kept)) + modality[1]
        images, heads = [image], self.cfg.fusion_heads
        for i in range(self.cfg.fusion_layers):
            new_text = self.bert_layer(f"multi_modal_language_layers.{i}", text, mask, heads, 1e-12, image)
            image = self.bert_layer(f"multi_modal_vision_layers.{i}", image, None, heads, 1e-12, text, mask)
            text = new_text
            images.append(image)
        joint = torch.cat([self.linear("multi_modal_language_pooler.dense", text[:, 0]).tanh(),
                           self.linear("multi_modal_vision_pooler.dense", image[:, 0]).tanh()], dim=1)
        return text, images, joint

    def __call__(self, batch):
        self.batch, self.whole = batch, (batch["text_ids"], batch["text_mask"], batch["image"])
        if self.cfg.task != "pretrain":
            return getattr(self, self.cfg.task)()
        out = {**self.mlm(), **self.mim(), **self.itm()}
        return {**out, "loss": out["mlm_loss"] + out["mim_loss"] + out["itm_loss"]}

    def mlm(self):
        text, _, _ = self.whole_pass(self.batch["mlm_ids"], *self.whole[1:])
        h = F.gelu(self.linear("mlm_head.transform.dense", text))
        h = self.norm("mlm_head.transform.LayerNorm", h, 1e-12)
        logits = self.linear("mlm_head.decoder", h) + self.w["mlm_head.bias"]          # (B, T, V)
        labels, rows = self.batch["mlm_labels"], []
        for b in range(labels.shape[0]):
            for t in range(labels.shape[1]):
                if labels[b, t] != -100:
                    rows.append((logits[b, t], labels[b, t]))
        loss = -sum(row.log_softmax(0)[label] for row, label in rows) / len(rows)
        return {"mlm_loss": loss, "mlm_logits": torch.stack([row for row, _ in rows])}

    def mim(self):
        cfg, side = self.cfg, self.cfg.image_size // self.cfg.patch_size
        noise = self.batch["mim_noise"].tolist()
        visible = int(side * side * (1 - cfg.mask_ratio))
        kept = [sorted(range(side * side), key=row.__getitem__)[:visible] for row in noise]
        _, images, _ = self.whole_pass(*self.whole, kept)
        x = self.linear("mim_head.decoder_embed", images[cfg.mim_layer])               # -1: the last output

        rows = []
        for b in range(len(x)):
            row = [self.w["mim_head.mask_token"][0, 0]] * side ** 2
            for place, l in enumerate(kept[b]):
                row[l] = x[b, 1 + place]
            rows.append(torch.stack([x[b, 0], *row]))
        x = torch.stack(rows) + slow_positions(cfg.decoder_width, side)
        for i in range(cfg.decoder_layers):
            x = self.clip_block(f"mim_head.decoder.resblocks.{i}", x, cfg.decoder_heads)
        pred = self.linear("mim_head.decoder_pred", self.norm("mim_head.decoder_norm", x, 1e-5))[:, 1:]

        target = slow_target(self.batch["image"], cfg)
        errors = [((pred[b, l] - target[b, l]) ** 2).mean()
                  for b in range(len(x)) for l in range(side * side) if l not in kept[b]]
        return {"mim_loss": sum(errors) / len(errors), "mim_pred": pred}

    def itm(self):
        index = self.batch["itm_index"].tolist()
        ids, mask, image = self.whole
        logits = self.linear("itm_head.fc", self.whole_pass(ids, mask, image[index])[2])
        label = torch.tensor([int(i == j) for i, j in enumerate(index)])
        return {"itm_loss": F.cross_entropy(logits, label), "itm_logits": logits}

    def head(self, name):
        h = self.linear(f"{name}.0", self.whole_pass(*self.whole)[2])
        return self.linear(f"{name}.3", F.gelu(self.norm(f"{name}.1", h, 1e-5)))

    def vqa(self):
        logits = self.head("vqa_head")
        terms = [F.binary_cross_entropy_with_logits(logit, torch.tensor(float(a == label)))
                 for row, label in zip(logits, self.batch["vqa_labels"]) for a, logit in enumerate(row)]
        loss = sum(terms) / len(logits)
        return {"vqa_loss": loss, "vqa_logits": logits, "loss": loss}

    def cls(self):
        logits = self.head("cls_head")
        loss = F.cross_entropy(logits, self.batch["cls_labels"])
        return {"cls_loss": loss, "cls_logits": logits, "loss": loss}

    def irtr(self):
        ids, mask, image = self.whole
        rows = []
        for b, false in enumerate(self.batch["false_text_index"].tolist()):
            texts = [b, *false]
            joint = self.whole_pass(ids[texts], mask[texts], image[[b] * len(texts)])[2]
            rows.append(self.linear("irtr_head", joint)[:, 0])
        logits = torch.stack(rows)
        loss = -logits.log_softmax(1)[:, 0].mean()
        return {"irtr_loss": loss, "irtr_logits": logits, "loss": loss}


# -------------------------------------------------------------------------------- making and comparing

def released_weights(shapes, seed):
    """The recipe of the golden cases: {released name: shape} -> {released name: tensor}."""
    weights = {}
    for name, shape in shapes.items():
        centre = 1 if len(shape) == 1 and name.endswith(".weight") else 0              # 1: a norm's scale
        numbers = np.random.RandomState(zlib.crc32(name.encode()) ^ seed).standard_normal(shape)
        weights[name] = torch.from_numpy((numbers * 0.05 + centre).astype(np.float32))
    return weights


def loaded(cfg, weights):
    """A model with released weights, dropout off"""
    model = M3AE(cfg).eval()
    model.load_state_dict(from_official(weights, cfg))
    return model


@functools.cache
def golden(path):
    """A golden case -> cfg, released weights, inputs, outputs, gradient norms. Of the tokens' logits only
    those of masked tokens stay: the model computes no others."""
    case = np.load(path)
    fields = json.loads(str(case["config"]))
    weights = released_weights(fields.pop("weights"), fields.pop("seed"))

    def part(name):
        keys = [key for key in case.files if key.startswith(name)]
        return {key.removeprefix(name): torch.from_numpy(case[key]) for key in keys}
    batch, outputs = part("in/"), part("out/")
    if "mlm_logits" in outputs:
        outputs["mlm_logits"] = outputs["mlm_logits"][batch["mlm_labels"] != -100]
    return ModelConfig(**fields), weights, batch, outputs, part("grad_norm/")


def compare(mine, expected):
    """Every loss, logit and prediction that is expected is there and agrees."""
    for name, value in expected.items():
        tolerance = LOSS if name.endswith("loss") else FEATURE
        torch.testing.assert_close(mine[name], value, rtol=0, atol=tolerance, msg=name)


def released_gradients(model, cfg):
    """Backward must have run -> {released name: gradient}, for parameters that got one"""
    return to_official({name: p.grad for name, p in model.named_parameters() if p.grad is not None}, cfg)


# -------------------------------------------------------------------------------- golden cases

def test_golden_cases_are_there():
    assert {"pretrain", "vqa"} <= {path.stem for path in GOLDEN}


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_golden_outputs_and_gradients(path):
    cfg, weights, batch, expected, norms = golden(path)
    model = loaded(cfg, weights)
    out = model(batch)
    below = ("text_feats", "image_feats", "cls_feats", "mim_target")
    compare(out, {name: value for name, value in expected.items() if name not in below})

    out["loss"].backward()
    grads = released_gradients(model, cfg)
    assert set(grads) == set(norms), "another set of parameters gets a gradient"
    for name, norm in norms.items():
        if max(grads[name].norm(), norm) > 1e-6:
            assert abs(grads[name].norm() - norm) <= NORM * norm, name


def test_golden_features_and_target():
    cfg, weights, batch, expected, _ = golden(FOLDER / "pretrain.npz")
    model, mask = loaded(cfg, weights), batch["text_mask"]
    text, image = model.encode_text(batch["text_ids"], mask), model.encode_image(batch["image"])
    compare({"joint": model.pooled_pair(text, image, mask)}, {"joint": expected["cls_feats"]})
    text, image = model.fuse(text, image, mask)
    compare({"image": image}, {"image": expected["image_feats"]})
    real = mask.bool()                                                         # padding may hold anything
    compare({"text": text[real]}, {"text": expected["text_feats"][real]})
    torch.testing.assert_close(MIM.target(batch["image"], cfg), expected["mim_target"])


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_slow_model_agrees_with_golden(path):
    """The yardstick of the cases below is itself measured."""
    cfg, weights, batch, expected, _ = golden(path)
    mine = SlowModel(weights, cfg)(batch)
    compare(mine, {name: expected[name] for name in mine})


# -------------------------------------------------------------------------------- cases of our own

CASES = {"roberta": {}, "bert": dict(text_kind="bert"), "last layer": dict(mim_layer=-1, text_kind="bert"),
         "first layer": dict(mim_layer=0), "plain pixels": dict(norm_pix_loss=False, mask_ratio=0.6),
         "heads of 64": dict(vit_width=64, vit_heads=1, text_width=128, text_heads=2, fusion_heads=1),
         "vqa": dict(task="vqa"), "cls": dict(task="cls", text_kind="bert"), "irtr": dict(task="irtr")}


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES.keys())
def test_slow_model_agrees(changes, small_config, random_batch):
    cfg = small_config(**changes)
    batch = random_batch(cfg)
    released = to_official(M3AE(cfg).state_dict(), cfg)
    weights = released_weights({name: tensor.shape for name, tensor in released.items()}, seed=3)

    model = loaded(cfg, weights)
    out = model(batch)
    out["loss"].backward()
    leaves = {name: tensor.requires_grad_() for name, tensor in weights.items()}
    slow = SlowModel(leaves, cfg)(batch)
    slow["loss"].backward()

    compare(out, slow)
    grads = released_gradients(model, cfg)
    for name, leaf in leaves.items():
        expected = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
        difference = grads.get(name, torch.zeros_like(leaf)) - expected
        assert difference.norm() <= NORM * expected.norm() + 1e-6, name


@pytest.mark.parametrize("width, side", [(64, 4), (24, 5), (384, 3)])
def test_sine_cosine_positions(width, side):
    mine, slow = sine_cosine_positions(width, side), slow_positions(width, side)
    torch.testing.assert_close(mine, slow, rtol=0, atol=1e-6)


@pytest.mark.parametrize("norm_pix_loss", [True, False])
def test_patches_and_target(norm_pix_loss, small_config):
    cfg = small_config(image_size=12, patch_size=4, norm_pix_loss=norm_pix_loss)
    image = torch.randn(2, 3, 12, 12) * 0.3 + 2
    image[:, :, :4, :4] = 1.5                                                  # no variance in this patch
    image[:, :, 4:8, :4] = torch.randn(2, 3, 4, 4) * 1e-3                      # hardly any in this one
    assert torch.equal(patchify(image, 4), slow_patches(image, 4))
    torch.testing.assert_close(MIM.target(image, cfg), slow_target(image, cfg), rtol=1e-4, atol=1e-4)


# -------------------------------------------------------------------------------- names

def same_tensors(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_unused_released_tensors(path):
    cfg, weights, *_ = golden(path)
    used = to_official(from_official(weights, cfg), cfg)
    assert weights.keys() - used.keys() == UNUSED & weights.keys()
    assert same_tensors({name: weights[name] for name in used}, used)


def test_unused_tensors_change_nothing(small_config):
    cfg = small_config()
    released = to_official(M3AE(cfg).state_dict(), cfg)
    extra = dict.fromkeys(UNUSED | {"language_encoder.embeddings.position_ids"}, torch.arange(24)[None])
    assert same_tensors(from_official(released | extra, cfg), from_official(released, cfg))


def test_names_of_a_part(small_config):
    """A dict need not be complete: gradients of some parameters, or the tensors of one encoder."""
    cfg = small_config()
    state = {name: tensor for name, tensor in M3AE(cfg).state_dict().items() if name.startswith("vit.")}
    released = to_official(state, cfg)
    assert all(name.startswith("vision_encoder.visual.") for name in released)
    assert same_tensors(from_official(released, cfg), state)
