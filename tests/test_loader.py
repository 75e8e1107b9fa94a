"""Tokenizers, packs and the loader."""
import json
import shutil
import threading

import numpy as np
import pytest
import tokenizers
import torch
from PIL import Image
from tokenizers import models, normalizers, pre_tokenizers, processors, trainers

from data import Row, prepare
from m3ae_mini import ModelConfig, masking
from m3ae_mini.config import TrainConfig, UserError, preset_values
from data.pack import Pack
from data.texts import text_notes
from data.prepare import open_packs
from m3ae_mini.loader import (
    VAL_MICRO_BATCH, Samples, Settings, load, normalise, training_micro_batches,
    validation_micro_batches)
from m3ae_mini.tokenizer import Tokenizer

SIDES, SIZES = ("left", "right"), ("small", "large")
FINDINGS = ("pneumothorax", "nodule", "effusion", "cardiomegaly")
CAPTIONS = [f"{size} {finding} on the {side}, number {n}." for n in range(4) for side in SIDES
            for size in SIZES for finding in FINDINGS]


def write_pack(folder, captions, counts, size=16, colour_every=3, seed=0, groups=2):
    """A pack of random images; image n of caption n. -> (Pack, images uint8 (n, 3, size, size))"""
    rng = np.random.default_rng(seed)
    images, rows = [], []
    splits = [split for split, count in counts.items() for _ in range(count)]
    for n, (caption, split) in enumerate(zip(captions, splits)):
        grey = n % colour_every != 0
        pixels = rng.integers(0, 256, (size, size) if grey else (size, size, 3), dtype=np.uint8)
        path = folder.parent / f"{folder.name}-{n}.png"
        Image.fromarray(pixels).save(path)
        images.append(np.stack([pixels] * 3) if grey else pixels.transpose(2, 0, 1))
        rows.append(Row(split, path, caption, group=f"kind {n % groups}" if groups else None))
    prepare.write_pack(rows, out=folder, name="test", task="pretrain", size=size, root=folder.parent,
                       workers=1)
    return Pack(folder), np.stack(images)


def settings(tokenizer, **changes):
    """A small architecture and training settings to go with 16-pixel images."""
    train = {name: changes.pop(name) for name in list(changes) if name in TrainConfig.__dataclass_fields__}
    cfg = ModelConfig.preset("tiny", image_size=16, patch_size=4, vocab_size=tokenizer.vocab_size,
                             text_kind=tokenizer.kind, max_text_len=20, **changes)
    train = {"batch_size": 8, "micro_batch": 8, "steps": 6, **train}
    return cfg, TrainConfig(**preset_values(TrainConfig, "tiny") | train)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("packs") / "one"
    pack, images = write_pack(folder, CAPTIONS, {"train": 37, "val": 21, "test": 6})
    return pack, images, Tokenizer.train(CAPTIONS, 400)


# -------------------------------------------------------------------------------- tokenizers

def bert_tokenizer(texts, path=None):
    """A WordPiece tokenizer as BERT's files have it: with its own cutting and padding switched on."""
    backend = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(vocab_size=60, special_tokens=names, show_progress=False)
    backend.train_from_iterator(texts, trainer)
    backend.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]",
                                                           special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    backend.enable_truncation(4)
    backend.enable_padding(length=128)
    if path:
        backend.save(str(path))
    return backend


def test_trained_tokenizer_has_robertas_special_tokens():
    tokenizer = Tokenizer.train(CAPTIONS, 300)
    assert tokenizer.kind == "roberta" and tokenizer.vocab_size <= 300
    assert (tokenizer.cls_id, tokenizer.pad_id, tokenizer.sep_id) == (0, 1, 2)
    assert tokenizer.mask_id == tokenizer.vocab_size - 1
    assert set(tokenizer.non_special_ids) == set(range(tokenizer.vocab_size)) - {0, 1, 2, 3, tokenizer.mask_id}
    ids, _ = tokenizer.encode(["Large EFFUSION"])[0]
    assert "".join(tokenizer.words(ids)).strip() == "large effusion"


@pytest.mark.parametrize("kind", ["roberta", "bert"])
def test_words_start_where_the_tokenizer_split_them(kind, tmp_path):
    if kind == "roberta":
        tokenizer = Tokenizer.train(CAPTIONS, 262)          # hardly any merges: words fall into letters
    else:
        bert_tokenizer(CAPTIONS, tmp_path / "tokenizer.json")
        tokenizer = Tokenizer.load(tmp_path)
    text = "large pneumothorax, left."
    ids, starts = tokenizer.encode([text])[0]
    assert tokenizer.kind == kind and len(ids) > 8          # not cut at 4, as the file asked
    pieces = tokenizer.words(ids)
    words = [""]
    for piece, start in zip(pieces, starts):
        if start:
            words.append("")
        words[-1] += piece.strip()
    assert words[1:] == ["large", "pneumothorax", ",", "left", "."] and words[0] == ""


@pytest.mark.release
@pytest.mark.parametrize("kind", ["roberta", "bert"])
def test_whole_words_are_hidden_on_both_kinds(kind, tmp_path):
    tokenizer = Tokenizer.train(CAPTIONS, 262) if kind == "roberta" else Tokenizer(bert_tokenizer(CAPTIONS))
    pack, _ = write_pack(tmp_path / "p", CAPTIONS, {"train": 64})
    cfg, train_cfg = settings(tokenizer)
    cfg.max_text_len = 60
    samples = Samples([pack], "train", tokenizer, cfg, train_cfg)
    for whole in (True, False):
        train_cfg.whole_word = whole
        batch = samples.batch(np.arange(64), 0, 0, 0, np.empty((64, 3, 16, 16), np.uint8))
        split_words = 0
        for row in range(64):
            _, starts = tokenizer.encode([pack.line(row)["text"]])[0]
            word = np.cumsum(starts)
            hidden = batch["mlm_labels"][row, 1:1 + len(word)] != -100
            assert hidden.any()
            split_words += sum(0 < hidden[word == w].sum() < (word == w).sum() for w in set(word))
        assert split_words == 0 if whole else split_words > 20


def test_tokenizer_errors(tmp_path):
    with pytest.raises(UserError, match="no tokenizer at"):
        Tokenizer.load(tmp_path / "nothing")
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="can.t be read"):
        Tokenizer.load(tmp_path)
    tokenizers.Tokenizer(models.BPE()).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match="special tokens"):
        Tokenizer.load(tmp_path)
    bert_tokenizer(CAPTIONS, tmp_path / "tokenizer.json")
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["model"]["unk_token"] = "[NONE]"
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="the tokenizer can.t be read.*WordPiece"):
        Tokenizer.load(tmp_path).encode(["漢"])
    content["model"]["vocab"]["nodule"] = 2 ** 31                  # to write it again would take 8 GB
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="large gaps"):
        Tokenizer.load(tmp_path)


def test_unknown_tokens_are_counted(made):
    pack, _, _ = made
    tokenizer = Tokenizer(bert_tokenizer(["left lung"]))     # all other words are unknown to it
    cfg, train_cfg = settings(tokenizer)
    samples = Samples([pack], "train", tokenizer, cfg, train_cfg)
    unknown = tokenizer.backend.token_to_id("[UNK]")
    ids = np.concatenate([tokenizer.encode([line["text"]])[0][0] for line in pack.lines("train")])
    share = (ids == unknown).mean()
    assert share > 0.05
    assert text_notes(tokenizer, samples)[0] == (
        f"warning: texts: lower case, {share:.1%} of the tokens are unknown")
    known = Tokenizer.train(CAPTIONS, 300)
    samples = Samples([pack], "train", known, cfg, train_cfg)
    assert text_notes(known, samples)[0] == "texts: lower case, 0.0% of the tokens are unknown"


def test_long_captions_are_counted_and_cut(made):
    pack, _, tokenizer = made
    cfg, train_cfg = settings(tokenizer)
    cfg.max_text_len = 8
    samples = Samples([pack], "train", tokenizer, cfg, train_cfg)
    lengths = [len(tokenizer.encode([line["text"]])[0][0]) for line in pack.lines("train")]
    truncated = sum(length > 6 for length in lengths)
    assert truncated and f"{truncated} texts of more than 8 tokens" in text_notes(tokenizer, samples)[1]
    ids = samples.batch(np.arange(8), 0, 0, 0, np.empty((8, 3, 16, 16), np.uint8))["text_ids"]
    assert ids.shape[1] == 8 and (ids[:, 0] == tokenizer.cls_id).all()
    assert all((row == tokenizer.sep_id).sum() == 1 for row in ids)


# -------------------------------------------------------------------------------- what a batch holds

def read(samples, chunks, **more):
    return list(load(samples, chunks, samples.train_cfg.seed, "cpu", **more))


def test_order_and_content(made):
    pack, images, tokenizer = made
    cfg, train_cfg = settings(tokenizer, steps=20, micro_batch=4)
    samples = Samples([pack], "train", tokenizer, cfg, train_cfg)
    seen = read(samples, training_micro_batches(samples, train_cfg, 0))
    assert [(step, chunk) for step, chunk, _, _ in seen] == [(s, c) for s in range(20) for c in range(2)]

    stream = np.concatenate([numbers for _, _, numbers, _ in seen])
    for epoch in range(len(stream) // 37):
        assert sorted(stream[37 * epoch:37 * epoch + 37]) == list(range(37))  # nothing dropped at the seam
    assert (stream[:37] != stream[37:74]).any()

    for _, _, numbers, batch in seen[:6]:
        wanted = normalise(torch.from_numpy(images[numbers]))
        assert torch.equal(batch["image"], wanted)
        for row, number in enumerate(numbers):
            ids, mask, labels = (batch[name][row] for name in ("text_ids", "text_mask", "mlm_labels"))
            body = tokenizer.encode([CAPTIONS[number]])[0][0]
            assert ids[mask.bool()].tolist() == [tokenizer.cls_id, *body, tokenizer.sep_id]
            assert (ids[~mask.bool()] == tokenizer.pad_id).all()
            hidden = labels != -100
            assert hidden.any() and (labels[hidden] == ids[hidden]).all()
            assert torch.equal(batch["mlm_ids"][row][~hidden], ids[~hidden])
        places = batch["mlm_positions"]
        hidden = batch["mlm_labels"].flatten() != -100
        assert torch.equal(places[:hidden.sum()], hidden.nonzero()[:, 0])
        assert (places[hidden.sum():] == 0).all()
        assert not hidden[0]                                                  # so filler counts for nothing


def test_a_chunk_is_a_pure_function_of_its_place(made):
    """From any step on, and whoever reads the other chunks, a chunk is the same."""
    pack, _, tokenizer = made
    cfg, train_cfg = settings(tokenizer, steps=9, micro_batch=4)
    samples = Samples([pack], "train", tokenizer, cfg, train_cfg)
    whole = {(step, chunk): (numbers, batch) for step, chunk, numbers, batch
             in read(samples, training_micro_batches(samples, train_cfg, 0))}
    parts = [read(samples, training_micro_batches(samples, train_cfg, start, rank, 2))
             for start in (0, 5) for rank in (0, 1)]
    for step, chunk, numbers, batch in (item for part in parts for item in part):
        same_numbers, same_batch = whole[step, chunk]
        assert (numbers == same_numbers).all()
        assert all(torch.equal(batch[name], same_batch[name]) for name in batch)


def test_shapes_repeat(made):
    """Text comes in at most four lengths, masked positions in multiples of the chunk's rows."""
    pack, _, tokenizer = made
    cfg, train_cfg = settings(tokenizer, steps=30)
    samples = Samples([pack], "train", tokenizer, cfg, train_cfg)
    seen = read(samples, training_micro_batches(samples, train_cfg, 0))
    assert {batch["text_ids"].shape[1] for *_, batch in seen} <= {5, 10, 15, 20}
    assert all(len(batch["mlm_positions"]) % 8 == 0 for *_, batch in seen)


def test_a_pack_smaller_than_a_batch(made, tmp_path):
    _, _, tokenizer = made
    pack, _ = write_pack(tmp_path / "small", CAPTIONS, {"train": 3, "val": 1})
    cfg, train_cfg = settings(tokenizer, steps=3)
    samples = Samples([pack], "train", tokenizer, cfg, train_cfg)
    seen = read(samples, training_micro_batches(samples, train_cfg, 0))
    stream = np.concatenate([numbers for _, _, numbers, _ in seen])
    assert sorted(stream) == sorted(list(range(3)) * 8)
    held_out = Samples([pack], "val", tokenizer, cfg, train_cfg)
    assert [len(n) for _, _, n, _ in read(held_out, validation_micro_batches(held_out, 99))] == [1]


def test_several_packs_are_one_stream(made, tmp_path):
    one, images, tokenizer = made
    two, more = write_pack(tmp_path / "two", CAPTIONS[::-1], {"train": 10, "val": 5}, seed=1)
    cfg, train_cfg = settings(tokenizer, steps=8)
    samples = Samples([one, two], "train", tokenizer, cfg, train_cfg)
    assert samples.n == 47
    wanted = normalise(torch.from_numpy(np.concatenate([images[:37], more[:10]])))
    for _, _, numbers, batch in read(samples, training_micro_batches(samples, train_cfg, 0)):
        assert torch.equal(batch["image"], wanted[numbers])
        for row, number in enumerate(numbers):
            text = (CAPTIONS[number] if number < 37 else CAPTIONS[::-1][number - 37])
            assert batch["text_ids"][row][1:1 + len(tokenizer.encode([text])[0][0])].tolist() == \
                tokenizer.encode([text])[0][0].tolist()

    with pytest.raises(UserError, match="--size"):
        big, _ = write_pack(tmp_path / "big", CAPTIONS, {"train": 4}, size=20)
        open_packs(f"{one.folder},{big.folder}", 16, crop=1)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_validation_counts_each_sample_once(made, world, tmp_path):
    _, _, tokenizer = made
    pack, _ = write_pack(tmp_path / "v", CAPTIONS * 2, {"train": 1, "val": 2 * VAL_MICRO_BATCH + 7})
    cfg, train_cfg = settings(tokenizer)
    samples = Samples([pack], "val", tokenizer, cfg, train_cfg)
    parts = [list(validation_micro_batches(samples, 10 ** 9, rank, world)) for rank in range(world)]
    numbers = np.concatenate([n for part in parts for _, _, n in part])
    assert sorted(numbers) == list(range(samples.n))
    limited = np.concatenate([n for _, _, n in validation_micro_batches(samples, 40)])
    assert len(set(limited)) == 40 and limited.max() > 60


@pytest.mark.release
def test_wrong_images_differ_in_image_and_caption(tmp_path, made):
    """Rows that share an image or a caption are never given to each other."""
    tokenizer = made[2]
    captions = ["small nodule.", "large nodule.", "small effusion.", "large effusion."] * 4
    paths = []
    for n in range(4):
        paths.append(tmp_path / f"{n}.png")
        Image.fromarray(np.full((16, 16), 50 * n, np.uint8)).save(paths[-1])
    rows = [Row("train", paths[n // 4], caption, group="even" if n // 4 % 2 else "odd")
            for n, caption in enumerate(captions)]
    prepare.write_pack(rows, out=tmp_path / "pack", name="x", task="pretrain", size=16, root=tmp_path,
                       workers=1)
    cfg, train_cfg = settings(tokenizer)
    samples = Samples([Pack(tmp_path / "pack")], "train", tokenizer, cfg, train_cfg)
    numbers = np.arange(16)
    for step in range(20):
        batch = samples.batch(numbers, 0, step, 0, np.empty((16, 3, 16, 16), np.uint8))
        assert (batch["itm_index"] != numbers).sum() == 8
        for name in ("itm_index", "random_negative_index", "hard_negative_index"):
            moved = batch[name] != numbers
            assert (batch[name][moved] // 4 != numbers[moved] // 4).all()     # another image
            assert (batch[name][moved] % 4 != numbers[moved] % 4).all()       # and another caption
        assert (batch["hard_negative_index"] // 4 % 2 == numbers // 4 % 2).all()        # of the same kind
        assert (batch["hard_negative_index"] != numbers).all() and (batch["random_negative_index"] != numbers).all()


def test_crops_equal_pillows(made, tmp_path):
    """A training crop is Pillow's own resize of a box that keeps 90-100 % of the area; validation sees the
    whole."""
    tokenizer = made[2]
    counts = {"train": 12, "val": 4}
    pack, images = write_pack(tmp_path / "margin", CAPTIONS, counts, size=24, colour_every=1)
    cfg, train_cfg = settings(tokenizer, min_crop_area=0.9, steps=40)
    samples = Samples([pack], "train", tokenizer, cfg, train_cfg)
    out = np.empty((12, 3, 16, 16), np.uint8)
    samples.batch(np.arange(12), 0, 0, 0, out, Settings(0.75, 0.15, 0.0, {}))
    numbers = masking.uniform(0, masking.CROP, 0, 0, (12, 8, 4))
    from m3ae_mini.loader import crop_box
    boxes = [crop_box(24, 0.9, n) for n in numbers]
    assert len(set(boxes)) > 1
    for row, box in enumerate(boxes):
        left, top, right, bottom = box
        assert 0 <= left < right <= 24 and 0 <= top < bottom <= 24
        assert 0.85 * 24 * 24 <= (right - left) * (bottom - top)              # rounding to whole pixels
        whole = Image.fromarray(images[row].transpose(1, 2, 0))
        wanted = np.asarray(whole.resize((16, 16), Image.Resampling.BICUBIC, box=box))
        assert (out[row].transpose(1, 2, 0) == wanted).all()

    with pytest.raises(UserError, match="--size 16"):
        open_packs(str(pack.folder), 16, crop=1)
    assert open_packs(str(pack.folder), 16, crop=0.9)[0].size == 24


def test_loader_stops_its_thread(made):
    pack, _, tokenizer = made
    cfg, train_cfg = settings(tokenizer, steps=10_000)
    samples = Samples([pack], "train", tokenizer, cfg, train_cfg)
    before = threading.active_count()
    batches = load(samples, training_micro_batches(samples, train_cfg, 0), 0, "cpu")
    next(batches)
    batches.close()
    assert threading.active_count() <= before


@pytest.mark.gpu
def test_cuda_batches_equal_cpu_batches(made):
    pack, _, tokenizer = made
    cfg, train_cfg = settings(tokenizer, steps=30)
    samples = Samples([pack], "train", tokenizer, cfg, train_cfg)
    ours = load(samples, training_micro_batches(samples, train_cfg, 0), 0, "cuda")
    for (_, _, _, there), (_, _, _, here) in zip(ours, read(samples, training_micro_batches(samples, train_cfg, 0))):
        torch.cuda._sleep(1_000_000)               # a slow consumer: a buffer refilled too early would show
        for name in here:
            assert torch.allclose(there[name].cpu(), here[name], atol=1e-6)


# -------------------------------------------------------------------------------- damaged packs

def copy_of(pack, folder):
    folder.mkdir()
    for file in pack.folder.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def test_damage_is_named(made, tmp_path):
    pack = made[0]
    with pytest.raises(UserError, match="no pack at"):
        Pack(tmp_path / "nowhere")
    (tmp_path / "table.csv").write_text("image,text\n")
    with pytest.raises(UserError, match="table.csv is a file: make a pack of a table with python -m data.prepare"):
        Pack(tmp_path / "table.csv")

    short = copy_of(pack, tmp_path / "short")
    images = short / "images.bin"
    images.write_bytes(images.read_bytes()[:-5])
    with pytest.raises(UserError, match="images.bin has .* bytes instead of"):
        Pack(short)

    flipped = copy_of(pack, tmp_path / "flipped")
    content = bytearray((flipped / "images.bin").read_bytes())
    content[100] ^= 255
    (flipped / "images.bin").write_bytes(content)
    Pack(pack.folder).verify()
    with pytest.raises(UserError, match="images.bin does not match its checksum"):
        Pack(flipped).verify()

    for change, words in (({"version": 99}, "version 99"), ({"size": None}, "damaged|instead"),
                          ({"samples": 3}, "damaged")):
        other = copy_of(pack, tmp_path / f"meta{len(words)}")
        meta = json.loads((other / "meta.json").read_text())
        (other / "meta.json").write_text(json.dumps(meta | change))
        with pytest.raises(UserError, match=words):
            Samples([Pack(other)], "train", made[2], *settings(made[2]))


def test_a_file_cut_while_reading_is_a_sentence(made, tmp_path):
    cut = Pack(copy_of(made[0], tmp_path / "cut"))
    with open(cut.folder / "images.bin", "r+b") as file:
        file.truncate(300)
    samples = Samples([cut], "train", made[2], *settings(made[2]))
    with pytest.raises(UserError, match="ends within image"):
        read(samples, training_micro_batches(samples, samples.train_cfg, 0))


def test_an_empty_split(made, tmp_path):
    pack, _ = write_pack(tmp_path / "e", CAPTIONS, {"train": 4})
    with pytest.raises(UserError, match="holds no val samples"):
        Samples([pack], "val", made[2], *settings(made[2]))


def test_tokens_of_another_pack_are_not_taken(made, tmp_path):
    """A new pack is copied over an old one, whose tokens stay there."""
    counts = {"train": 8, "val": 4, "test": 4}
    old, _ = write_pack(tmp_path / "old", CAPTIONS, counts)
    new, _ = write_pack(tmp_path / "new", CAPTIONS[::-1], counts)
    old.tokens(made[2])
    shutil.copytree(new.folder, old.folder, dirs_exist_ok=True)
    (offsets, tokens), (_, right) = Pack(old.folder).tokens(made[2]), new.tokens(made[2])
    assert len(tokens) == len(right) and (tokens == right).all() and len(offsets) == 17


def test_a_special_tokens_name_in_a_text_is_text(made):
    (ids, _), = made[2].encode(["a <mask> of <pad> </s>"])
    assert set(ids) <= set(made[2].non_special_ids)


def full_disk(file, _):
    file.write(b"half")
    raise OSError(28, "No space left on device")


def test_tokens_are_kept_beside_the_pack(made, tmp_path):
    pack, tokenizer = Pack(copy_of(made[0], tmp_path / "t")), made[2]
    for file in pack.folder.glob("tokens.*"):
        file.unlink()
    offsets, tokens = (np.array(a) for a in pack.tokens(tokenizer))
    assert len(list(pack.folder.glob("tokens.*.npy"))) == 1
    again = pack.tokens(tokenizer)
    assert (again[0] == offsets).all() and (again[1] == tokens).all()
    assert len(pack.tokens(Tokenizer.train(CAPTIONS, 262))[1]) > len(tokens)  # other tokenizer, other tokens
    file = pack.token_file(tokenizer)
    file.unlink()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(np, "save", full_disk)
        again = pack.tokens(tokenizer)                                        # kept in memory, nothing left
    assert (again[1] == tokens).all() and not file.exists()
    assert all(left.suffix == ".npy" for left in pack.folder.glob("tokens.*"))
    pack.tokens(tokenizer)
    file.write_bytes(file.read_bytes()[:-8])
    again = pack.tokens(tokenizer)                                            # damaged: made again
    assert (again[0] == offsets).all() and (again[1] == tokens).all()
    assert np.load(file).size == len(offsets) + len(tokens) + 1               # their check sum


def test_crops_by_several_threads_are_those_of_one(made, tmp_path, monkeypatch):
    from m3ae_mini import loader
    pack, _ = write_pack(tmp_path / "margin", CAPTIONS, {"train": 32}, size=24, colour_every=2)
    cfg, train_cfg = settings(made[2], min_crop_area=0.5)
    samples = Samples([pack], "train", made[2], cfg, train_cfg)
    results = []
    for threads in 1, 4:
        monkeypatch.setattr(loader, "CROP_THREADS", threads)
        out = np.empty((32, 3, 16, 16), np.uint8)
        samples.batch(np.arange(32), 0, 3, 1, out, Settings(0.75, 0.15, 0.0, {}))
        results.append(out)
    assert np.array_equal(*results) and len(np.unique(results[0])) > 100


@pytest.mark.parametrize("crop", [1.0, 0.5])
def test_augmented_images(made, tmp_path, crop):
    """In training alone; a pure function of the step; rotation, contrast, brightness and noise in bounds."""
    pack, images = write_pack(tmp_path / "p", CAPTIONS, {"train": 32}, size=16, colour_every=2)
    cfg, train_cfg = settings(made[2], min_crop_area=crop, augment=True)
    samples = Samples([pack], "train", made[2], cfg, train_cfg)

    def batch(step, settings):
        out = np.empty((32, 3, 16, 16), np.uint8)
        samples.batch(np.arange(32), 0, step, 1, out, settings)
        return out
    training = Settings(0.75, 0.15, 0.0, {})
    assert np.array_equal(batch(3, training), batch(3, training))
    assert not np.array_equal(batch(3, training), batch(4, training))
    assert np.array_equal(batch(3, None), images[:32])        # validation sees the image itself
    assert not (batch(3, training) == images[:32]).all((1, 2, 3)).any()


def test_perturbations_by_hand():
    from m3ae_mini.loader import perturb
    image = np.full((3, 4, 4), 100, np.uint8)
    image[:, 0] = 60                                          # mean 90
    middle = np.full(16, 0.5)                                 # no noise
    assert np.array_equal(perturb(image, np.concatenate([[0.5, 0.5, 1.0], middle])), image)
    contrast = perturb(image, np.concatenate([[1.0, 0.5, 0.0], middle]))
    assert contrast[0, 0, 0] == 90 - 39 and contrast[0, 1, 0] == 90 + 13       # 30 % more
    brighter = perturb(image, np.concatenate([[0.5, 1.0, 0.0], middle]))
    assert np.array_equal(brighter, image + 20)
    noisy = perturb(image, np.concatenate([[0.5, 0.5, 1.0], np.ones(16)])).astype(int)
    assert (noisy - image == 14).all()
    assert perturb(np.full((3, 4, 4), 255, np.uint8), np.concatenate([[0.5, 1.0, 0.0], middle])).max() == 255
