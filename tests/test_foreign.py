"""Weights and tokenizers as they are distributed: Hugging Face, OpenCLIP, BERT's and RoBERTa's files.

Every file is built here, small, with the real names. Where transformers is installed, this code
computes what transformers computes."""
import json
from dataclasses import replace

import pytest
import torch

from m3ae_mini import M3AE, ModelConfig
from m3ae_mini.config import UserError
from m3ae_mini.model import ViT, patchify
from m3ae_mini.tokenizer import Tokenizer
from m3ae_mini.weights import load_clip, load_pretrained, load_text, origin_table
from test_weights import CFG, SENTENCES, hugging_face, safetensors, same, saved, text_weights

WIDTH, PATCH = 64, 8
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def openai_clip(blocks=3):
    """The image encoder of CLIP in OpenAI's names, and a matrix that nothing reads."""
    draw = torch.Generator().manual_seed(0)

    def tensor(*shape):
        return torch.randn(*shape, generator=draw) * 0.1
    weights = {"visual.class_embedding": tensor(WIDTH), "visual.positional_embedding": tensor(5, WIDTH),
               "visual.conv1.weight": tensor(WIDTH, 3, PATCH, PATCH), "visual.proj": tensor(WIDTH, 16)}
    for norm in ("ln_pre", "ln_post", *(f"transformer.resblocks.{i}.ln_{j}" for i in range(blocks)
                                        for j in (1, 2))):
        weights |= {f"visual.{norm}.weight": 1 + tensor(WIDTH), f"visual.{norm}.bias": tensor(WIDTH)}
    for i in range(blocks):
        block = f"visual.transformer.resblocks.{i}."
        weights |= {f"{block}attn.in_proj_weight": tensor(3 * WIDTH, WIDTH),
                    f"{block}attn.in_proj_bias": tensor(3 * WIDTH)}
        for name, out, inside in (("attn.out_proj", WIDTH, WIDTH), ("mlp.c_fc", 4 * WIDTH, WIDTH),
                                  ("mlp.c_proj", WIDTH, 4 * WIDTH)):
            weights |= {f"{block}{name}.weight": tensor(out, inside), f"{block}{name}.bias": tensor(out)}
    return weights


def hugging_face_clip(weights, prefix="vision_model."):
    """The same weights in Hugging Face's names, with a piece of a text encoder beside them."""
    names = {"class_embedding": "embeddings.class_embedding", "conv1": "embeddings.patch_embedding",
             "positional_embedding": "embeddings.position_embedding.weight", "ln_pre": "pre_layrnorm",
             "ln_post": "post_layernorm", "transformer.resblocks": "encoder.layers",
             "ln_1": "layer_norm1", "ln_2": "layer_norm2", "attn.out_proj": "self_attn.out_proj",
             "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
    theirs = {}
    for name, tensor in weights.items():
        if name == "visual.proj":
            theirs["visual_projection.weight"] = tensor.T.contiguous()
            continue
        name = name.removeprefix("visual.")
        for ours, hugging in names.items():
            name = name.replace(ours, hugging)
        if "attn.in_proj_" in name:
            for part, chunk in zip("qkv", tensor.chunk(3)):
                theirs[prefix + name.replace("attn.in_proj_", f"self_attn.{part}_proj.")] = chunk.clone()
        else:
            theirs[prefix + name] = tensor
    if prefix:
        theirs |= {"text_model.embeddings.token_embedding.weight": torch.randn(9, 8),
                   "text_model.encoder.layers.0.self_attn.q_proj.weight": torch.randn(8, 8),
                   "text_model.encoder.layers.0.self_attn.k_proj.weight": torch.randn(8, 8),
                   "text_model.encoder.layers.0.self_attn.v_proj.weight": torch.randn(8, 8),
                   "logit_scale": torch.tensor(4.6)}
    return theirs


def clip_folder(folder, form="safetensors", act="quick_gelu", prefix="vision_model."):
    weights = hugging_face_clip(openai_clip(), prefix)
    if form == "safetensors":
        (folder / "model.safetensors").write_bytes(safetensors(weights))
    else:
        saved(folder / "pytorch_model.bin", weights)
    vision = {"hidden_size": WIDTH, "num_attention_heads": 4, "hidden_act": act, "patch_size": PATCH,
              "intermediate_size": 4 * WIDTH, "num_hidden_layers": 3, "image_size": 16}
    (folder / "config.json").write_text(json.dumps({"model_type": "clip", "vision_config": vision}))
    return folder


# --------------------------------------------------------------------------------------------- CLIP

@pytest.mark.parametrize("form", ["safetensors", "bin"])
@pytest.mark.parametrize("prefix", ["vision_model.", ""])
def test_hugging_face_clip_equals_openai(tmp_path, form, prefix):
    """Folder or file: the same tensors bit for bit; the configuration tells heads and activation."""
    path = saved(tmp_path / "ViT.pt", openai_clip())
    fields, state = load_clip(path, vit_heads=4)
    folder = tmp_path / "clip"
    folder.mkdir()
    found, theirs = load_clip(clip_folder(folder, form, "gelu", prefix))
    assert same(state, theirs) and len(state) == 3 * 12 + 7
    assert found == fields | {"vit_act": "gelu"} and fields["vit_act"] == "quick_gelu"
    assert "QuickGELU is assumed" in state.note and not theirs.note
    assert same(load_clip(folder / f"{'model' if form == 'safetensors' else 'pytorch_model'}.{form}")[1],
                theirs)


@pytest.mark.parametrize("name", ["open_clip_model.safetensors", "open_clip_pytorch_model.bin"])
@pytest.mark.parametrize("quick", [None, True])
def test_open_clip(tmp_path, name, quick):
    weights = openai_clip()
    if name.endswith("bin"):
        saved(tmp_path / name, weights)
    else:
        (tmp_path / name).write_bytes(safetensors(weights))
    config = {"embed_dim": 16, "vision_cfg": {"width": WIDTH, "layers": 3, "head_width": 16}}
    config |= {"quick_gelu": quick} if quick is not None else {}
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    fields, state = load_clip(tmp_path)
    assert fields["vit_act"] == ("quick_gelu" if quick else "gelu") and fields["vit_heads"] == 4
    assert same(state, load_clip(saved(tmp_path / "a.pt", weights), vit_heads=4)[1])


def test_the_activation_is_used():
    torch.manual_seed(0)
    patches = torch.randn(2, 16, 192)
    quick, exact = (ViT(replace(CFG, vit_act=act)) for act in ("quick_gelu", "gelu"))
    for parameter in quick.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    exact.load_state_dict(quick.state_dict())
    gap = (quick(patches) - exact(patches)).abs().max().item()
    assert 1e-4 < gap < 1                                   # near to each other, and not the same
    assert M3AE(replace(CFG, vit_act="gelu")).objectives["mim"].blocks[0].act == "quick_gelu"


@pytest.mark.parametrize("width, heads", [(768, 12), (1024, 16), (1280, 16)])
def test_heads_of_known_widths(tmp_path, width, heads):
    weights = {"class_embedding": torch.ones(width), "conv1.weight": torch.ones(width, 3, 2, 2)}
    assert load_clip(saved(tmp_path / "ViT.pt", weights))[0]["vit_heads"] == heads


def test_other_image_encoders_are_refused(tmp_path):
    path = saved(tmp_path / "b.bin", {"visual.trunk.cls_token": torch.ones(1, 1, 8)})
    with pytest.raises(UserError, match=r"b.bin holds an image encoder of timm \(as in BiomedCLIP\)"):
        load_clip(path)
    folder = tmp_path / "clip"
    folder.mkdir()
    with pytest.raises(UserError, match="clip can't be read: give a file, or a folder with one of"):
        load_clip(folder)
    with pytest.raises(UserError, match="hidden_act relu .* must be quick_gelu or gelu"):
        load_clip(clip_folder(folder, act="relu"))
    weights = hugging_face_clip(openai_clip())
    del weights["vision_model.encoder.layers.1.self_attn.k_proj.bias"]
    (folder / "model.safetensors").write_bytes(safetensors(weights))
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match="model.safetensors can't be read.*k_proj.bias"):
        load_clip(folder)


@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
def test_clip_computes_what_transformers_computes(tmp_path, act):
    """The release drops the last block, so the hidden state before it; before the last norm."""
    transformers = pytest.importorskip("transformers")
    theirs = transformers.CLIPVisionModel.from_pretrained(clip_folder(tmp_path, act=act)).eval()
    fields, state = load_clip(tmp_path)
    vit = ViT(replace(CFG, **fields, image_size=16)).eval()
    vit.load_state_dict({name.removeprefix("vit."): state[name] for name in state
                         if name.removeprefix("vit.") in vit.state_dict()})
    vit.norm_post = torch.nn.Identity()
    image = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        hidden = theirs(pixel_values=image, output_hidden_states=True).hidden_states[2]
        gap = (vit(patchify(image, PATCH)) - hidden).abs().max().item()
    print(f"{act}: largest difference of a hidden state: {gap:.1e}")
    assert gap < 1e-5


# ------------------------------------------------------------------------------------ text encoders

def word_list(lower):
    """A WordPiece vocabulary of the sentences: words, their letters, and pieces of two letters."""
    text = " ".join(SENTENCES)
    text = text.lower() if lower else text
    words = [word for word in text.replace("-", " ").replace(",", " ").split() if word.isalpha()]
    letters = sorted(set(text) - {" "})
    pieces = sorted({word[i:i + 2] for word in words for i in range(1, len(word) - 1)})
    return [*SPECIAL, *letters, *dict.fromkeys(w for w in words if len(w) > 1), *(f"##{x}" for x in letters),
            *(f"##{x}" for x in pieces)]


def with_vocabulary(folder, lower, **settings):
    (folder / "vocab.txt").write_text("\n".join(word_list(lower)) + "\n", encoding="utf-8")
    if settings:
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.mark.parametrize("lower, settings, expected", [
    (True, {}, True), (False, {}, False),                   # the vocabulary tells the case
    (True, {"do_lower_case": True}, True), (False, {"do_lower_case": False}, False),
    (True, {"do_lower_case": None, "strip_accents": False}, True)])
def test_vocab_txt(tmp_path, lower, settings, expected):
    tokenizer = Tokenizer.load(with_vocabulary(tmp_path, lower, **settings))
    assert tokenizer.kind == "bert" and ('"lowercase":true' in tokenizer.json) == expected
    vocabulary = word_list(lower)
    (ids, starts), = tokenizer.encode(["No effusion, oedema"])
    text = [vocabulary[i] for i in ids]
    assert text[1:3] == ["effusion", ","] and starts[1] and "[UNK]" not in text
    assert text[0] == ("no" if expected else "No")
    assert same_ids(tokenizer, tmp_path, expected, settings)
    # What a run keeps of it is the same tokenizer.
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "tokenizer.json").write_text(tokenizer.json)
    assert Tokenizer.load(tmp_path / "run").hash == tokenizer.hash


def same_ids(tokenizer, folder, lower, settings):
    """Are the ids those of transformers' tokenizer? True where it is not installed."""
    try:
        from transformers import BertTokenizer
    except ImportError:
        return True
    extra = {name: value for name, value in settings.items() if name == "strip_accents"}
    theirs = BertTokenizer.from_pretrained(folder, do_lower_case=lower, **extra)
    sentences = [*SENTENCES, "Œdème naïve Ödem 2,5 cm; 漢字 [MASK]-like"]
    ours = [ids.tolist() for ids, _ in tokenizer.encode(sentences[:-1])]
    return ours == [theirs.encode(text, add_special_tokens=False) for text in sentences[:-1]]


def test_vocab_json_and_merges(tmp_path):
    """RoBERTa's files, trained here on the sentences."""
    import tokenizers
    backend = tokenizers.ByteLevelBPETokenizer()
    backend.train_from_iterator(SENTENCES, vocab_size=360, special_tokens=[
        "<s>", "<pad>", "</s>", "<unk>", "<mask>"])
    backend.save_model(str(tmp_path))
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.kind == "roberta" and tokenizer.vocab_size == 360
    ours = [ids.tolist() for ids, _ in tokenizer.encode(SENTENCES)]
    assert ours == [encoding.ids for encoding in backend.encode_batch(SENTENCES)]
    (tmp_path / "merges.txt").unlink()
    with pytest.raises(UserError, match="vocab.json can't be read"):
        Tokenizer.load(tmp_path)

    backend.save_model(str(tmp_path))
    try:
        from transformers import RobertaTokenizer
    except ImportError:
        return
    theirs = RobertaTokenizer.from_pretrained(tmp_path)
    assert ours == [theirs.encode(text, add_special_tokens=False) for text in SENTENCES]


def test_a_causal_encoder_is_refused(tmp_path):
    with pytest.raises(UserError, match="config.json: is_decoder is True, not False"):
        load_text(hugging_face(tmp_path, "bert", is_decoder=True))


def test_rows_of_no_token_are_cut_and_said(tmp_path):
    """Files pad the embedding for speed: 50 rows, of which the tokenizer has 40."""
    fields, state = load_text(hugging_face(tmp_path, "bert"))
    net = M3AE(replace(CFG, **fields | {"vocab_size": 40}))
    table = origin_table(net, *load_pretrained(net, {"--init_text folder": state}))
    assert torch.equal(net.text.word.weight, state["text.word.weight"][:40])
    assert "--init_text folder: 50 token rows cut to 40" in table


def test_bert_computes_what_transformers_computes(tmp_path):
    """From vocab.txt and pytorch_model.bin to hidden states, a `bert.` prefix and a head beside."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    with_vocabulary(tmp_path, True)
    size = len(word_list(True))
    config = transformers.BertConfig(vocab_size=size, hidden_size=64, num_hidden_layers=2,
                                     num_attention_heads=4, intermediate_size=256,
                                     max_position_embeddings=80)
    theirs = transformers.BertForPreTraining(config).eval()
    saved(tmp_path / "pytorch_model.bin", theirs.state_dict())
    config.save_pretrained(tmp_path)

    fields, state = load_text(tmp_path)
    cfg = ModelConfig(**{**vars(CFG), **fields, "vocab_size": size, "max_text_len": 78})
    net = M3AE(cfg).eval()
    load_pretrained(net, {"--init_text folder": state})
    tokenizer = Tokenizer.load(tmp_path)
    for text in SENTENCES:
        (ids, _), = tokenizer.encode([text])
        ids = torch.tensor([[2, *ids.tolist(), 3]])
        assert ids.tolist()[0] == transformers.BertTokenizer.from_pretrained(tmp_path).encode(text)
        with torch.no_grad():
            hidden = theirs.bert(input_ids=ids).last_hidden_state
            gap = (net.text(ids, torch.ones_like(ids)) - hidden).abs().max().item()
        assert gap < 1e-4


def test_text_weights_without_a_configuration(tmp_path):
    saved(tmp_path / "pytorch_model.bin", text_weights("bert."))
    with pytest.raises(UserError, match="--text_heads"):
        load_text(tmp_path)


# Files and tensor names as the hub lists them: (kind, prefix, head beside, tokenizer's files, lower case)
PUBLISHED = {
    "BiomedBERT": ("bert", "bert.", "cls.predictions.transform.dense.weight", {"do_lower_case": True}, True),
    "Bio_ClinicalBERT": ("bert", "bert.", "cls.seq_relationship.weight", None, False),
    "biobert-v1.1": ("bert", "", "", {"do_lower_case": False}, False),
    "scibert_scivocab_uncased": ("bert", "bert.", "cls.predictions.decoder.weight", None, True),
    "RadBERT-RoBERTa-4m": ("roberta", "roberta.", "lm_head.dense.weight", {}, False),
    "biomed_roberta_base": ("roberta", "roberta.", "lm_head.decoder.weight", {}, False)}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_text_encoders(tmp_path, name):
    """A miniature of each, with pytorch_model.bin: loaded, tokenised, every tensor in its place."""
    import tokenizers
    kind, prefix, head, settings, lower = PUBLISHED[name]
    if kind == "bert":
        with_vocabulary(tmp_path, lower, **(settings or {}))
    else:
        backend = tokenizers.ByteLevelBPETokenizer()
        backend.train_from_iterator(SENTENCES, vocab_size=340, special_tokens=[
            "<s>", "<pad>", "</s>", "<unk>", "<mask>"])
        backend.save_model(str(tmp_path))
        (tmp_path / "added_tokens.json").write_text("{}")
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.kind == kind and ('"lowercase":true' in tokenizer.json) == lower

    cfg = replace(CFG, text_kind=kind, vocab_size=tokenizer.vocab_size)
    weights = text_weights(prefix, cfg)
    weights |= {head: torch.randn(4, 4)} if head else {}
    fields, state = load_text(hugging_face(tmp_path, kind, prefix, "bin", weights))
    assert fields["vocab_size"] == tokenizer.vocab_size and fields["text_kind"] == kind
    net = M3AE(replace(cfg, **fields))
    table = origin_table(net, *load_pretrained(net, {"--init_text folder": state}))
    loaded = {key: tensor for key, tensor in net.state_dict().items() if key.startswith("text.")}
    assert same(loaded, {key: tensor for key, tensor in state.items() if key.startswith("text.")})
    assert (head.rsplit(".", 1)[0] in table) if head else "pooler" in table
