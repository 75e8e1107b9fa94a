"""The backbone, the objectives and the configuration: shapes, what each part may see, what it may leave out."""
import itertools
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from m3ae_mini import M3AE, ModelConfig
from m3ae_mini import model as model_module
from m3ae_mini import ops
from m3ae_mini.config import UserError
from m3ae_mini.model import CrossAttention, SelfAttention
from m3ae_mini.ops import attention, attention_weights

PATCHES, KEPT = 16, 4                       # of the small model's 32 × 32 images


def seeded(cfg, seed=0):
    torch.manual_seed(seed)
    return M3AE(cfg)


def close(one, other, tolerance=1e-5):
    torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


# -------------------------------------------------------------------------------- shapes

def test_shapes_of_pretraining(small_config, random_batch):
    cfg = small_config()
    model, batch = seeded(cfg), random_batch(cfg)
    out = model(batch)
    assert {name: tuple(value.shape) for name, value in out.items()} == {
        "loss": (), "mlm_loss": (), "mlm_logits": (8, 50), "mlm_targets": (8,),
        "mim_loss": (), "mim_pred": (4, PATCHES, 192), "mim_hidden": (4, PATCHES),
        "itm_loss": (), "itm_logits": (4, 2)}
    labels = batch["mlm_labels"]
    assert torch.equal(out["mlm_targets"], labels[labels != -100])             # row-major order
    assert torch.equal(out["mim_hidden"].sum(1), torch.full((4,), float(PATCHES - KEPT)))


def test_shapes_of_the_backbone(small_config, random_batch):
    cfg = small_config()
    model, batch = seeded(cfg), random_batch(cfg)
    mask = batch["text_mask"]
    text, image = model.encode_text(batch["text_ids"], mask), model.encode_image(batch["image"])
    kept, ids_restore = model.encode_visible(batch["image"], batch["mim_noise"])
    assert text.shape == (4, 12, 64) and image.shape == (4, 1 + PATCHES, 64)
    assert kept.shape == (4, 1 + KEPT, 64) and ids_restore.shape == (4, PATCHES)
    assert [x.shape for x in model.fuse(text, image, mask)] == [text.shape, image.shape]
    assert [x.shape for x in model.fuse(text, kept, mask)] == [text.shape, kept.shape]
    assert model.pooled_pair(text, image, mask).shape == (4, 128)


@pytest.mark.parametrize("task, columns", [("vqa", 9), ("cls", 5), ("irtr", 3)])
def test_shapes_of_the_tasks(task, columns, small_config, random_batch):
    cfg = small_config(task=task)
    out = seeded(cfg)(random_batch(cfg))
    assert set(out) == {f"{task}_loss", f"{task}_logits", "loss"}
    assert out[f"{task}_logits"].shape == (4, columns) and torch.equal(out["loss"], out[f"{task}_loss"])


# -------------------------------------------------------------------------------- attention

@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("width, heads", [(24, 3), (128, 2)])
def test_fused_attention_is_plain_attention(width, heads, masked, monkeypatch):
    torch.manual_seed(0)
    q, k, v = (torch.randn(3, n, width, dtype=torch.float64, requires_grad=True) for n in (5, 7, 7))
    mask = torch.arange(7) < torch.tensor([7, 4, 1])[:, None, None, None]      # (B, 1, 1, N)
    mask = mask if masked else None
    results = []
    for fused in (True, False):
        monkeypatch.setattr(ops, "fused_is_faster", lambda *_: fused)
        out = attention(q, k, v, heads, mask)
        results.append([out, *torch.autograd.grad(out.square().sum(), (q, k, v))])
    for fused, plain in zip(*results):
        close(fused, plain, 1e-12)


@pytest.mark.parametrize("fused", [True, False])
def test_one_row_stands_beside_many(fused, monkeypatch, small_config, random_batch):
    """Retrieval shows one image to a block of texts without copies of it."""
    monkeypatch.setattr(ops, "fused_is_faster", lambda *_: fused)
    cfg = small_config(task="irtr")
    model, batch = M3AE(cfg).double().eval(), random_batch(cfg)
    text, mask = model.encode_text(batch["text_ids"], batch["text_mask"]), batch["text_mask"]
    image = model.encode_image(batch["image"][:1].double())                    # (1, 1+L, D)
    close(model.pooled_pair(text, image, mask), model.pooled_pair(text, image.expand(len(text), -1, -1), mask), 1e-12)
    close(model.pooled_pair(text[:1], model.encode_image(batch["image"].double()), mask[:1])[:1],
          model.pooled_pair(text[:1], image, mask[:1]), 1e-12)


def test_dropout_of_attention_has_the_right_share(monkeypatch):
    """Each path drops weights, not outputs, and scales up what is left: the mean stays."""
    torch.manual_seed(0)
    q, v = torch.zeros(1, 4, 8), torch.ones(1, 2000, 8)                        # equal weights on 2000 keys
    for fused in (True, False):
        monkeypatch.setattr(ops, "fused_is_faster", lambda *_: fused)
        out = attention(q, torch.zeros_like(v), v, 2, dropout=0.3)
        assert 0.001 < out.std() and (out - 1).abs().max() < 0.1


def test_cross_attention_weights_are_those_of_forward():
    torch.manual_seed(0)
    cross = CrossAttention(24, 3)
    x, other = torch.randn(2, 5, 24), torch.randn(2, 7, 24)
    mask = torch.arange(7) < torch.tensor([7, 4])[:, None, None, None]
    weights = cross.weights(x, other, mask)                                    # (B, H, Q, N)
    assert weights.shape == (2, 3, 5, 7) and not weights[1, ..., 4:].any()
    close(weights.sum(-1), torch.ones(2, 3, 5))

    values = cross.kv(other)[..., 24:].unflatten(-1, (3, 8)).transpose(1, 2)   # (B, H, N, W/H)
    close(cross(x, other, mask), cross.out((weights @ values).transpose(1, 2).flatten(2)))


def test_attention_weights_by_hand():
    q = torch.tensor([[2.0, 0, 0, 0]])[None, None]
    k = torch.tensor([[3.0, 0, 0, 0], [1.0, 0, 0, 0], [9.0, 0, 0, 0]])[None, None]
    weights = attention_weights(q, k, torch.tensor([True, True, False])[None, None, None])
    scores = torch.tensor([2 * 3 / 4 ** 0.5, 2 * 1 / 4 ** 0.5, -math.inf])
    close(weights[0, 0, 0], scores.exp() / scores.exp().sum())


def test_self_attention_of_the_first_queries():
    torch.manual_seed(0)
    attention, x = SelfAttention(24, 3), torch.randn(2, 7, 24)
    close(attention(x, num_queries=2), attention(x)[:, :2])


# -------------------------------------------------------------------------------- what each part may see

FUSED = dict(text_width=64, text_heads=1, fusion_heads=1)                      # heads of width 64


@pytest.mark.parametrize("changes", [{}, dict(text_kind="bert"), FUSED], ids=["roberta", "bert", "fused"])
def test_padding_is_inert(changes, small_config, random_batch):
    """More padding: the same features of real tokens, the same losses."""
    cfg = small_config(**changes)
    model, batch = seeded(cfg), random_batch(cfg)
    filler = {"text_ids": 1 if cfg.text_kind == "roberta" else 0, "text_mask": 0, "mlm_labels": -100}
    filler["mlm_ids"] = filler["text_ids"]
    padded = batch | {name: F.pad(batch[name], (0, 5), value=value) for name, value in filler.items()}

    one, other = model(batch), model(padded)
    for name in one:
        close(one[name], other[name])

    def features(batch):
        text = model.encode_text(batch["text_ids"], batch["text_mask"])
        return model.fuse(text, model.encode_image(batch["image"]), batch["text_mask"])
    (text, image), (padded_text, padded_image) = features(batch), features(padded)
    real = batch["text_mask"].bool()
    close(text[real], padded_text[:, :12][real])
    close(image, padded_image)


def test_padding_of_a_task_is_inert(small_config, random_batch):
    cfg = small_config(task="vqa")
    model, batch = seeded(cfg), random_batch(cfg)
    padded = batch | {"text_ids": F.pad(batch["text_ids"], (0, 3), value=1),
                      "text_mask": F.pad(batch["text_mask"], (0, 3))}
    close(model(batch)["vqa_logits"], model(padded)["vqa_logits"])


def test_token_positions(small_config):
    ids = torch.tensor([[0, 7, 8, 2, 1, 1], [0, 7, 8, 9, 7, 2]])
    assert seeded(small_config()).text.positions(ids).tolist() == [[2, 3, 4, 5, 1, 1], [2, 3, 4, 5, 6, 7]]
    assert seeded(small_config(text_kind="bert")).text.positions(ids).tolist() == [0, 1, 2, 3, 4, 5]


def test_limits_of_fuse_leave_the_numbers_alone(small_config, random_batch):
    cfg = small_config()
    model, batch = seeded(cfg), random_batch(cfg)
    mask = batch["text_mask"]
    text, image = model.encode_text(batch["text_ids"], mask), model.encode_image(batch["image"])

    for depth in range(cfg.fusion_layers + 1):
        # A fusion cut off after `depth` pairs, the plain way.
        cut_text, cut_image = text, image
        for i in range(depth):
            cut_text, cut_image = (
                model.fusion.text_layers[i](cut_text, mask.bool()[:, None, None], cut_image),
                model.fusion.image_layers[i](cut_image, None, cut_text, mask.bool()[:, None, None]))
        both = model.fuse(text, image, mask, depth=depth)
        close(both[0], cut_text)
        close(both[1], cut_image)

        for want, num_queries in itertools.product([("text",), ("image",), ("text", "image")], [None, 1, 3]):
            if depth:
                limited = model.fuse(text, image, mask, depth=depth, streams=want, num_queries=num_queries)
                for name, mine, whole in zip(("text", "image"), limited, both):
                    assert (mine is not None) == (name in want)
                    if name in want:
                        close(mine, whole[:, :num_queries])

    whole = model.fuse(text, image, mask)
    close(whole[0], both[0])
    pooled = model.text_pooler(whole[0][:, 0]), model.image_pooler(whole[1][:, 0])
    close(model.pooled_pair(text, image, mask), torch.cat(pooled, dim=1).tanh())


def hidden_pixels(batch, size=8):
    """bool (B, 1, S, S): the pixels of the patches that are hidden"""
    kept = batch["mim_noise"].argsort(1)[:, :KEPT]
    hidden = torch.ones(4, PATCHES, dtype=torch.bool).scatter(1, kept, False)
    return hidden.view(4, 1, 4, 4).repeat_interleave(size, 2).repeat_interleave(size, 3)


def test_encoder_never_sees_hidden_patches(small_config, random_batch):
    cfg = small_config()
    model, batch = seeded(cfg), random_batch(cfg)
    hidden, image = hidden_pixels(batch), batch["image"]
    one, _ = model.encode_visible(image, batch["mim_noise"])
    junk = torch.where(hidden, torch.randn_like(image) * 100, image)
    other, _ = model.encode_visible(junk, batch["mim_noise"])
    assert torch.equal(one, other)

    leaf = image.clone().requires_grad_()
    model.encode_visible(leaf, batch["mim_noise"])[0].square().sum().backward()
    seen = leaf.grad.abs().sum(1, keepdim=True) > 0
    assert torch.equal(seen, ~hidden)

    # The prediction doesn't know hidden pixels either; the loss must.
    out, other = model(batch), model(batch | {"image": junk})
    assert torch.equal(out["mim_pred"], other["mim_pred"]) and out["mim_loss"] != other["mim_loss"]
    assert torch.equal(out["mim_hidden"].bool().view(4, 1, 4, 4), hidden[:, :, ::8, ::8])


def test_loss_of_hidden_patches_alone(small_config, random_batch):
    """What the model predicts for visible patches is not in the loss."""
    cfg = small_config(mlm=0, itm=0)
    model, batch = seeded(cfg), random_batch(cfg)
    out = model(batch)
    out["mim_pred"].retain_grad()
    out["loss"].backward()
    assert torch.equal(out["mim_pred"].grad.abs().sum(-1) > 0, out["mim_hidden"].bool())


def test_rows_do_not_see_each_other(small_config, random_batch):
    cfg = small_config()
    model, batch = seeded(cfg), random_batch(cfg)
    batch["itm_index"] = torch.arange(4)
    whole = model(batch)
    own = {"itm_index": torch.zeros(1, dtype=torch.long)}
    rows = [model({name: x[i:i + 1] for name, x in batch.items()} | own) for i in range(4)]
    for name in ("mim_pred", "itm_logits", "mlm_logits"):
        close(whole[name], torch.cat([row[name] for row in rows]))


def test_each_stream_reads_the_other(small_config, random_batch):
    """A word's logits depend on the image, a patch's prediction on the text: the model is cross-modal."""
    cfg = small_config()
    model, batch = seeded(cfg), random_batch(cfg)
    out = model(batch)
    other_image = batch | {"image": -batch["image"]}
    other_text = batch | {name: batch[name].roll(1, 0) for name in ("text_ids", "text_mask")}
    assert not torch.equal(out["mlm_logits"], model(other_image)["mlm_logits"])
    assert not torch.equal(out["mim_pred"], model(other_text)["mim_pred"])


def test_matching_pairs_texts_with_the_images_of_the_index(small_config, random_batch):
    cfg = small_config(mlm=0, mim=0)
    model, batch = seeded(cfg), random_batch(cfg)
    index = torch.tensor([2, 1, 0, 2])
    mixed = model({**batch, "itm_index": index})
    straight = model({**batch, "image": batch["image"][index], "itm_index": torch.arange(4)})
    close(mixed["itm_logits"], straight["itm_logits"])
    close(mixed["itm_loss"], F.cross_entropy(mixed["itm_logits"], torch.tensor([0, 1, 0, 0])))


# -------------------------------------------------------------------------------- objectives

COMBINATIONS = [c for n in (1, 2, 3) for c in itertools.combinations(("mlm", "mim", "itm"), n)]


def only(names):
    """The weights of the losses: 1 for those named, 0 for the others."""
    return {name: float(name in names) for name in ("mlm", "mim", "itm")}


@pytest.mark.parametrize("names", COMBINATIONS, ids="+".join)
def test_every_combination_of_losses_trains(names, small_config, random_batch):
    cfg = small_config(vit_blocks=1, text_layers=1, fusion_layers=2, mim_layer=1, **only(names))
    model, batch = seeded(cfg), random_batch(cfg)
    assert set(model.objectives) == set(names)                                 # the others have no parameters

    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    losses = []
    for _ in range(10):
        out = model(batch)
        optimizer.zero_grad()
        out["loss"].backward()
        optimizer.step()
        losses.append({name: out[f"{name}_loss"].item() for name in names})
    assert {name.partition("_")[0] for name in out} == {"loss", *names}
    for name in names:
        assert losses[-1][name] < 0.95 * losses[0][name], (name, losses)


# How often the image encoder, the text encoder, and text and image layers of the fusion must run. MIM decodes
# what enters fusion layer 2: two image layers, one text layer. MLM leaves out the last image layer. The masked
# text goes through the text encoder together with the whole one.
WORK = {("mlm",): (1, 1, 3, 2), ("mim",): (1, 1, 1, 2), ("itm",): (1, 1, 3, 3),
        ("mlm", "mim"): (2, 1, 4, 4), ("mlm", "itm"): (1, 1, 6, 5), ("mim", "itm"): (2, 1, 4, 5),
        ("mlm", "mim", "itm"): (2, 1, 7, 7)}


@pytest.mark.parametrize("names", COMBINATIONS, ids="+".join)
def test_nothing_is_computed_twice_or_for_nobody(names, small_config, random_batch):
    cfg = small_config(**only(names))
    model, calls = seeded(cfg), []
    parts = ([model.vit], [model.text], model.fusion.text_layers, model.fusion.image_layers)
    for place, modules in enumerate(parts):
        for module in modules:
            module.register_forward_hook(lambda *_, place=place: calls.append(place))
    model(random_batch(cfg))
    assert tuple(calls.count(place) for place in range(4)) == WORK[names]


def test_gradient_reaches_every_parameter(small_config, random_batch):
    cfg = small_config()
    model = seeded(cfg)
    model(random_batch(cfg))["loss"].backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_loss_weights(small_config, random_batch):
    weights = {"mlm": 2.0, "mim": 0.5, "itm": 3.0}
    cfg = small_config(**weights)
    out = seeded(cfg)(random_batch(cfg))
    close(out["loss"], sum(weight * out[f"{name}_loss"] for name, weight in weights.items()))
    plain = seeded(small_config())(random_batch(cfg))
    assert all(torch.equal(out[f"{name}_loss"], plain[f"{name}_loss"]) for name in weights)


@torch.no_grad()
def test_objective_of_weight_zero_leaves_the_others_alone(small_config, random_batch):
    size = dict(vit_blocks=1, text_layers=1, fusion_layers=2, mim_layer=1)
    whole, batch = seeded(small_config(**size)), random_batch(small_config(**size))
    out = whole(batch)
    for names in COMBINATIONS:
        part = M3AE(small_config(**size, **only(names)))
        part.load_state_dict({name: whole.state_dict()[name] for name in part.state_dict()})
        for name, value in part(batch).items():
            if name != "loss":
                close(value, out[name])


def test_masked_positions_with_filler(small_config, random_batch):
    """The loader rounds the number of masked positions up; filler points at a token that is not masked."""
    cfg = small_config()
    model, batch = seeded(cfg), random_batch(cfg)
    positions = (batch["mlm_labels"].flatten() != -100).nonzero()[:, 0]
    results = []
    for extra in ({}, {"mlm_positions": positions}, {"mlm_positions": F.pad(positions, (0, 5))}):
        out = model({**batch, **extra})
        grads = torch.autograd.grad(out["loss"], [p for p in model.parameters()])
        results.append((out["mlm_loss"], out["mlm_logits"][:8], out["mlm_targets"][:8], *grads))
    assert out["mlm_targets"].tolist()[8:] == [-100] * 5
    for other in results[1:]:
        for one, two in zip(results[0], other):
            close(one, two)


def test_answer_outside_the_list_is_no_answer(small_config, random_batch):
    cfg = small_config(task="vqa")
    batch = random_batch(cfg) | {"vqa_labels": torch.full((4,), -1)}
    out = seeded(cfg)(batch)
    close(out["vqa_loss"], F.softplus(out["vqa_logits"]).sum(1).mean())


# -------------------------------------------------------------------------------- size and initial values

def test_parameters_of_base():
    """The release's 366.3 million count RoBERTa's unused pooler and the decoder's fixed positions."""
    with torch.device("meta"):
        model = M3AE(ModelConfig.preset("base"))
    ours = sum(p.numel() for p in model.parameters())
    pooler, positions = 768 * 768 + 768, (1 + 18 * 18) * 384
    assert ours == 365_589_083
    assert round((ours + pooler + positions) / 1e6, 1) == 366.3
    assert model.objectives["mim"].pos_embed.numel() == positions


@pytest.mark.parametrize("fusion_width", [64, 768])
def test_initial_values(fusion_width, small_config):
    """Matrices have the paper's deviation of 0.02 at its width of 768, a larger one at a smaller width."""
    cfg = small_config(vit_blocks=3, fusion_width=fusion_width, fusion_layers=1, mim_layer=0)
    model = seeded(cfg)
    matrices = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    expected = dict.fromkeys(matrices, 0.02 * (768 / fusion_width) ** 0.5)
    expected |= {"vit.cls_token": 48 ** -0.5, "vit.pos_embed": 48 ** -0.5}
    for i in range(3):
        expected |= {f"vit.blocks.{i}.attn.qkv.weight": 48 ** -0.5,
                     f"vit.blocks.{i}.attn.out.weight": 48 ** -0.5 / 6 ** 0.5,
                     f"vit.blocks.{i}.fc1.weight": 96 ** -0.5,
                     f"vit.blocks.{i}.fc2.weight": 48 ** -0.5 / 6 ** 0.5}
    for i in range(2):
        expected[f"objectives.mim.blocks.{i}.attn.qkv.weight"] = (2 / (24 + 72)) ** 0.5       # Xavier

    norms = {name for name, module in model.named_modules() if isinstance(module, nn.LayerNorm)}
    for name, p in model.named_parameters():
        if name.rpartition(".")[0] in norms:
            assert (p == (1 if name.endswith(".weight") else 0)).all(), name
        elif name.endswith(".bias"):
            assert not p.any(), name
        else:
            std = expected.pop(name, 0.02)
            spread = 5 * std * (2 * p.numel()) ** -0.5                         # five standard errors
            assert abs(p.std() - std) < spread and abs(p.mean()) < 2 * spread, name
    assert not expected, "parameters that are not there"

    bound = (6 / (24 + 72)) ** 0.5
    assert 0.98 * bound < model.objectives["mim"].blocks[0].attn.qkv.weight.abs().max() <= bound


@pytest.mark.parametrize("kind, text", [("roberta", 1e-5), ("bert", 1e-12)])
def test_eps_of_the_norms(kind, text, small_config):
    """Too small a difference to show in a loss, so it is read off."""
    expected = {"vit": 1e-5, "text": text, "fusion": 1e-12, "objectives.mlm": 1e-12, "objectives.mim": 1e-5,
                "objectives.vqa": 1e-5}
    seen = set()
    for task in ("pretrain", "vqa"):
        for name, module in seeded(small_config(task=task, text_kind=kind)).named_modules():
            if isinstance(module, nn.LayerNorm):
                part = next(part for part in expected if name.startswith(part + "."))
                assert module.eps == expected[part], name
                seen.add(part)
    assert seen == set(expected)


# -------------------------------------------------------------------------------- configuration

MISTAKES = [
    (dict(task="captioning"), "--task"), (dict(text_kind="gpt"), "--text_kind"),
    (dict(image_size=33), "--image_size"), (dict(image_size=4), "--image_size"),
    (dict(image_size=0), "--image_size"), (dict(vit_heads=5), "--vit_heads"),
    (dict(text_heads=3), "--text_width"), (dict(fusion_heads=0), "--fusion_heads"),
    (dict(decoder_heads=7), "--decoder_heads"),
    (dict(decoder_width=18), "--decoder_width"), (dict(mim_layer=3), "--mim_layer"),
    (dict(mim_layer=-2), "--mim_layer"), (dict(mask_ratio=1.0), "--mask_ratio"),
    (dict(mask_ratio=-0.1), "--mask_ratio"), (dict(mask_ratio=0.0), "--mask_ratio"),
    (dict(mask_ratio=0.99), "--mask_ratio"), (dict(max_text_len=23), "--max_text_len"),
    (dict(text_kind="bert", max_text_len=25), "--max_text_len"), (dict(dropout=1.0), "--dropout"),
    (dict(attn_dropout=-0.1), "--attn_dropout"), (dict(mlm=-1), "--mlm"),
    (dict(mlm=0, mim=0, itm=0), "--itm")]


@pytest.mark.parametrize("changes, flag", MISTAKES, ids=str)
def test_mistakes_are_named(changes, flag, small_config):
    with pytest.raises(UserError, match=flag) as error:
        M3AE(small_config(**changes))
    assert "\n" not in str(error.value) and len(str(error.value)) < 150


@pytest.mark.parametrize("changes", [
    dict(mim_layer=-1), dict(mim_layer=0), dict(mim_layer=2), dict(max_text_len=22), dict(mask_ratio=0.9),
    dict(text_kind="bert", max_text_len=24), dict(mlm=0, mim=0), dict(task="vqa", mlm=0, mim=0, itm=0)])
def test_limits_are_allowed(changes, small_config):
    small_config(**changes).check()


@pytest.mark.parametrize("name", ["tiny", "small", "base"])
def test_presets(name):
    ModelConfig.preset(name).check()
    assert ModelConfig.preset(name, mim_layer=0).mim_layer == 0
    assert ModelConfig.preset("base") == ModelConfig()


def test_unknown_preset():
    with pytest.raises(UserError, match="--preset huge"):
        ModelConfig.preset("huge")


def test_longest_text_fits(small_config, random_batch):
    """The check of max_text_len is exact: the longest text that it allows has a position for each token."""
    for kind, longest in (("roberta", 22), ("bert", 24)):
        cfg = small_config(text_kind=kind, max_text_len=longest)
        seeded(cfg)(random_batch(cfg, rows=2))


# -------------------------------------------------------------------------------- arithmetic and chance

def test_bfloat16_is_near(small_config, random_batch):
    for heads in (2, 1):                                                       # plain and fused attention
        cfg = small_config(fusion_heads=heads)
        model, batch = seeded(cfg), random_batch(cfg)
        exact = model(batch)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = model(batch)
        out["loss"].backward()
        for name in ("mlm_loss", "mim_loss", "itm_loss", "loss"):
            assert out[name].dtype == torch.float32
            close(out[name], exact[name], 0.02)
        assert all(p.grad.isfinite().all() for p in model.parameters())


def test_same_seed_same_bits(small_config, random_batch):
    cfg = small_config(dropout=0.1, attn_dropout=0.1)
    results = []
    for _ in range(2):
        model = seeded(cfg, 3)
        torch.manual_seed(5)
        out = model(random_batch(cfg))
        out["loss"].backward()
        results.append([*out.values(), *(p.grad for p in model.parameters())])
    assert all(torch.equal(one, other) for one, other in zip(*results))


def test_grad_checkpointing_keeps_less_and_give_the_same_bits(small_config, random_batch):
    """Dropout on: the backward pass must draw again what the forward pass drew, and leave the generator as it
    was: the next draw is the same, too."""
    cfg, found = small_config(dropout=0.3, attn_dropout=0.3), []
    batch = random_batch(cfg)
    for again in False, True:
        model, kept = seeded(cfg), {}
        if again:
            model_module.use_grad_checkpointing(model)
        with torch.autograd.graph.saved_tensors_hooks(
                lambda x: kept.update({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes()}) or x,
                lambda x: x):
            out = model(batch)
        out["loss"].backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
        found.append((sum(kept.values()), out["loss"], *(p.grad for p in model.parameters()), torch.rand(3)))
    (much, *once), (little, *twice) = found
    assert little < 0.6 * much
    assert all(torch.equal(one, other) for one, other in zip(once, twice, strict=True))


def test_compiled_layers_compute_the_same(small_config, random_batch, monkeypatch):
    """With --grad_checkpointing, too. Layers share what was compiled: there are fewer graphs than layers."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    cfg, found = small_config(vit_blocks=8, text_layers=8, dropout=0.0, attn_dropout=0.0), []
    for compiled in False, True:
        model = seeded(cfg)
        if compiled:
            model_module.compile_layers(model)
            model_module.use_grad_checkpointing(model)
        out = model(random_batch(cfg))
        out["loss"].backward()
        found.append([out["loss"], *(p.grad for p in model.parameters())])
    assert all(torch.allclose(one, other, atol=1e-5) for one, other in zip(*found, strict=True))
    layers = [m for m in model.modules() if isinstance(m, (model_module.ViTBlock, model_module.BertLayer))]
    assert 0 < torch._dynamo.utils.counters["stats"]["unique_graphs"] < len(layers)


def test_dropout_is_for_training(small_config, random_batch):
    for changes in (dict(dropout=0.3), dict(attn_dropout=0.3)):
        cfg = small_config(**changes)
        model, batch = seeded(cfg), random_batch(cfg)
        assert model(batch)["loss"] != model(batch)["loss"]
        model.eval()
        assert torch.equal(model(batch)["loss"], model(batch)["loss"])


def test_dropout_zeroes_its_share_and_keeps_the_mean():
    torch.manual_seed(0)
    x = torch.rand(999, 101, requires_grad=True)
    for share in (0.1, 0.5):
        y = ops.drop(x, share)
        kept = y != 0
        assert abs((~kept).float().mean() - share) < 5e-3
        close(y[kept], (x / (1 - share))[kept])
        close(torch.autograd.grad(y.sum(), x)[0], kept / (1 - share))      # the same backwards
    assert ops.drop(x, 0.0) is x and ops.drop(x, 0.1, training=False) is x


def test_where_dropout_acts(small_config, random_batch, monkeypatch):
    """Text: on the embeddings and after both sub-layers of a layer. Fusion: after all three."""
    cfg = small_config(dropout=0.1)
    model, batch, calls = seeded(cfg), random_batch(cfg), []
    monkeypatch.setattr(model_module, "drop", lambda x, share, training: calls.append(share) or x)
    text = model.encode_text(batch["text_ids"], batch["text_mask"])
    assert calls == [0.1] * (1 + 2 * cfg.text_layers)
    calls.clear()
    model.fuse(text, model.encode_image(batch["image"]), batch["text_mask"])
    assert calls == [0.1] * (3 * 2 * cfg.fusion_layers)


def test_dropout_spares_image_encoder_and_decoder(small_config, random_batch):
    cfg = small_config(dropout=0.3, attn_dropout=0.3)
    model, batch = seeded(cfg), random_batch(cfg)
    assert torch.equal(model.encode_image(batch["image"]), model.encode_image(batch["image"]))
    decode = model.objectives["mim"].decode
    kept, ids_restore = model.encode_visible(batch["image"], batch["mim_noise"])
    assert torch.equal(decode(kept, ids_restore), decode(kept, ids_restore))
    encode = model.encode_text
    assert not torch.equal(*(encode(batch["text_ids"], batch["text_mask"]) for _ in range(2)))


def test_a_rows_own_text_is_never_a_false_one(small_config, random_batch):
    """Where partners run out the loader puts the row's own number: the loss is that of fewer false texts."""
    cfg = small_config(task="irtr")
    model, batch = M3AE(cfg).eval(), random_batch(cfg)
    own = torch.arange(4)[:, None]
    few = model(batch | {"false_text_index": (own + 1) % 4})
    filled = model(batch | {"false_text_index": torch.cat([(own + 1) % 4, own, own], dim=1)})
    assert torch.allclose(few["irtr_loss"], filled["irtr_loss"], atol=1e-5)
    assert filled["irtr_logits"][:, 2:].isneginf().all()


def test_a_fusion_layer_without_the_other_stream_is_an_error(small_config):
    """A fusion of one's own that forgets a stream must not turn cross-attention off in silence."""
    cfg = small_config()
    with pytest.raises(TypeError):
        M3AE(cfg).fusion.text_layers[0](torch.randn(2, 3, cfg.fusion_width))
