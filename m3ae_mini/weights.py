"""Tensors in and out: the released names of M³AE and this project's."""
import torch


# ---------------------------------------------------------------------------------------------- released names

def name_table(cfg):
    """Pairs (name here, [released names]) for every tensor the model may hold. Where there are several released names
    their tensors stand one upon the other here: query, key and value are one matrix."""
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
    for mine, released in (("word", "word"), ("position", "position"), ("token_type", "token_type")):
        table.append((f"text.{mine}.weight", [f"{bert}.embeddings.{released}_embeddings.weight"]))
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
    add("objectives.mim.embed", "mim_head.decoder_embed")
    add("objectives.mim.norm", "mim_head.decoder_norm")
    add("objectives.mim.pred", "mim_head.decoder_pred")
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
        tensor = state[released[0]] if len(released) == 1 else torch.cat([state[r] for r in released])
        if name == "vit.patch.weight":
            tensor = tensor.permute(0, 2, 3, 1).flatten(1)         # a convolution's (W, 3, P, P) -> (W, P·P·3)
        elif name == "objectives.mim.mask_token":
            tensor = tensor.flatten()                              # (1, 1, W) -> (W,)
        mine[name] = tensor
    return mine


def to_official(state, cfg):
    """The inverse of from_official, bit for bit: tensors under this model's names -> under the released names."""
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
