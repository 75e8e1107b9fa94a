"""The names of tensors here and in released files, and conversion between them."""
import re
from collections.abc import Iterator

import torch
from torch import Tensor

from .config import ModelConfig

# Hugging Face's names of CLIP's image encoder, and OpenAI's. Theirs apart: q_proj, k_proj, v_proj.
HUGGING_FACE_CLIP = {
    "embeddings.class_embedding": "class_embedding", "embeddings.patch_embedding.": "conv1.",
    "embeddings.position_embedding.weight": "positional_embedding", "pre_layrnorm.": "ln_pre.",
    "post_layernorm.": "ln_post.", "encoder.layers.": "transformer.resblocks.",
    "layer_norm": "ln_", "self_attn.": "attn.", "mlp.fc1.": "mlp.c_fc.", "mlp.fc2.": "mlp.c_proj."}

# {name here: released name}. A name that ends in a dot stands for two: its weight and its bias.
# Several released names, separated by blanks, are stacked: query, key, value are one matrix.
CLIP_BLOCK = {
    "norm1.": "ln_1.", "attn.qkv.": "attn.in_proj_", "attn.out.": "attn.out_proj.",
    "norm2.": "ln_2.", "fc1.": "mlp.c_fc.", "fc2.": "mlp.c_proj."}
BERT_LAYER = {
    "attn.qkv.": "attention.self.query. attention.self.key. attention.self.value.",
    "attn.out.": "attention.output.dense.", "attn_norm.": "attention.output.LayerNorm.",
    "fc1.": "intermediate.dense.", "fc2.": "output.dense.", "fc2_norm.": "output.LayerNorm."}
FUSION_LAYER = BERT_LAYER | {
    "cross.q.": "crossattention.self.query.",
    "cross.kv.": "crossattention.self.key. crossattention.self.value.",
    "cross.out.": "crossattention.output.dense.", "cross_norm.": "crossattention.output.LayerNorm."}
VIT = {
    "cls_token": "class_embedding", "pos_embed": "positional_embedding",
    "patch_embed.weight": "conv1.weight", "norm_pre.": "ln_pre.", "norm_post.": "ln_post."}
TEXT = {
    "word.weight": "word_embeddings.weight", "position.weight": "position_embeddings.weight",
    "token_type.weight": "token_type_embeddings.weight", "norm.": "LayerNorm."}
FUSION = {
    "modality": "modality_type_embeddings.weight",
    "text_proj.": "multi_modal_language_proj.", "image_proj.": "multi_modal_vision_proj.",
    "text_pooler.": "multi_modal_language_pooler.dense.",
    "image_pooler.": "multi_modal_vision_pooler.dense."}
HEADS = {
    "mlm.dense.": "mlm_head.transform.dense.", "mlm.norm.": "mlm_head.transform.LayerNorm.",
    "mlm.decoder.weight": "mlm_head.decoder.weight", "mlm.decoder.bias": "mlm_head.bias",
    "mim.mask_token": "mim_head.mask_token", "mim.embed.": "mim_head.decoder_embed.",
    "mim.norm.": "mim_head.decoder_norm.", "mim.pred.": "mim_head.decoder_pred.",
    "itm.fc.": "itm_head.fc.", "irtr.fc.": "irtr_head.",
    **{f"{task}.head.{i}.": f"{task}_head.{i}." for task in ("vqa", "cls") for i in (0, 1, 3)}}


def name_table(cfg: ModelConfig) -> Iterator[tuple[str, list[str]]]:
    """(name here, [released names]) for every tensor that a model of any task may hold."""
    vit, layers = "vision_encoder.visual.", "multi_modal_{}_layers.{{}}."
    groups = [
        ("vit.", vit, 1, VIT), ("text.", "language_encoder.embeddings.", 1, TEXT),
        ("", "", 1, FUSION), ("objectives.", "", 1, HEADS),
        ("vit.blocks.{}.", vit + "transformer.resblocks.{}.", cfg.vit_blocks, CLIP_BLOCK),
        ("text.layers.{}.", "language_encoder.encoder.layer.{}.", cfg.text_layers, BERT_LAYER),
        ("fusion.text_layers.{}.", layers.format("language"), cfg.fusion_layers, FUSION_LAYER),
        ("fusion.image_layers.{}.", layers.format("vision"), cfg.fusion_layers, FUSION_LAYER),
        ("objectives.mim.blocks.{}.", "mim_head.decoder.resblocks.{}.", cfg.decoder_layers,
         CLIP_BLOCK)]
    for ours, theirs, count, names in groups:
        for i in range(count):
            for name, released in names.items():
                for end in ("weight", "bias") if name.endswith(".") else ("",):
                    released_names = [theirs.format(i) + part + end for part in released.split()]
                    yield ours.format(i) + name + end, released_names


def to_openai(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A CLIP image encoder in Hugging Face's names -> in OpenAI's; others as they are.

    Query, key and value become one matrix. A text encoder in the same file is left out."""
    if not any(name.endswith("pre_layrnorm.weight") for name in tensors):
        return tensors
    renamed = {}
    for name, tensor in tensors.items():
        if "q_proj." in name:
            parts = [tensors[name.replace("q_proj", f"{part}_proj")] for part in "qkv"]
            name, tensor = name.replace("q_proj.", "in_proj_"), torch.cat(parts)
        for theirs, openai in HUGGING_FACE_CLIP.items():
            name = name.replace(theirs, openai)
        if not re.match(r"text_model\.|.*[kv]_proj\.", name):
            renamed[name] = tensor
    return renamed


def from_official(state: dict[str, Tensor], cfg: ModelConfig) -> dict[str, Tensor]:
    """Tensors (or gradients) under released names -> {name here: tensor}"""
    ours = {}
    known = [row for row in name_table(cfg) if set(row[1]) <= state.keys()]
    for name, released in known:
        tensor = torch.cat([state[r] for r in released])
        if name == "vit.patch_embed.weight":
            tensor = tensor.permute(0, 2, 3, 1).flatten(1)            # (W, P·P·3)
        if name == "objectives.mim.mask_token":
            tensor = tensor.flatten()                                 # (W,)
        ours[name] = tensor
    return ours


def to_official(state: dict[str, Tensor], cfg: ModelConfig) -> dict[str, Tensor]:
    """The inverse of from_official, bit for bit."""
    theirs = {}
    known = [row for row in name_table(cfg) if row[0] in state]
    for name, released in known:
        tensor = state[name]
        if name == "vit.patch_embed.weight":
            tensor = tensor.unflatten(1, (-1, cfg.patch_size, 3)).movedim(3, 1)  # (W, 3, P, P)
        if name == "objectives.mim.mask_token":
            tensor = tensor[None, None]                               # (1, 1, W)
        theirs.update(zip(released, tensor.chunk(len(released))))
    return theirs
