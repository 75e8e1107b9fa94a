"""Damaged and hostile files: a reader reads them cleanly or ends in the project's own error. It does
not crash, hang, swallow memory, run code or write where it should not; and damage that a check sum covers
is never taken silently. 504 mutations, 10,002 with `--long`; each follows from its kind and number alone."""
import ast
import contextlib
import copy
import hashlib
import io
import json
import os
import pickle
import random
import re
import resource
import shutil
import signal
import struct
import sys
import traceback
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import finetune
import train
from data import Row, medicat, prepare
from data.pack import Pack
from data.write_pack import write_pack
from m3ae_mini import M3AE, checkpoint, optim, weights
from m3ae_mini.config import ModelConfig, RunConfig, TrainConfig, UserError, make_parser, parse
from m3ae_mini.loader import Samples, load, validation_micro_batches
from m3ae_mini.tokenizer import Tokenizer
from test_loader import CAPTIONS, bert_tokenizer
from test_prepare import medpix_entry, roco_miniature, write_lines
from test_chest_readers import mimic_miniature, nih_miniature
from test_readers import (MELINDA, med_miniature, openi_miniature, published_miniature, rad_miniature,
                          rocov2_miniature, slake_entry, write_csv)
from test_train import SMALL
from test_weights import hugging_face, released, saved

SECONDS = 20                           # of work for one mutation, a hundred times what a whole file takes
MEMORY = 2 ** 30                       # bytes of address space beyond what the process has before
GROWTH = 400_000                       # kB of memory in use beyond that


# -------------------------------------------------------------------------------- mutations

def deep(bracket):
    return {"[": "[" * 100_000 + "]" * 100_000, "{": '{"a":' * 100_000 + "1" + "}" * 100_000}[bracket]


NESTED = "@nested@"                    # stands for brackets too deep to be made as objects
VALUES = [None, True, False, 0, -1, 3, 2 ** 31, 2 ** 63, 10 ** 5000, -2 ** 70, 0.5, 1e308, float("nan"),
          float("inf"), "", " ", "a", "..", "../../../../etc/passwd", "/etc/passwd", "~", "a\0b", "\ud800",
          "x" * 5000, "1" * 5000, "\u202e\u0000", [], {}, [[]], [None], ["a", "b"], {"a": {}}, {"": None},
          [1] * 999, NESTED + "[", NESTED + "{"]


def bytes_mutated(data, draw):
    """One to four of: cut off, bits turned, a span put in, left out, repeated or overwritten, a number made
    another one."""
    data = bytearray(data)
    for _ in range(draw.randint(1, 4)):
        place, length = draw.randrange(len(data) + 1), draw.choice([1, 2, 4, 8, 64, 1000])
        span = data[place:place + length]
        way = draw.randrange(9)
        if way == 0:
            del data[place:]
        elif way == 1 and data:
            for _ in range(draw.randint(1, 8)):
                data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        elif way == 2:
            data[place:place] = draw.randbytes(length)
        elif way == 3:
            del data[place:place + length]
        elif way == 4:
            data[place:place] = span * draw.choice([1, 2, 50])
        elif way == 5:
            other = draw.randrange(len(data) + 1)
            data[other:other + length] = span
        elif way == 6:
            filler = draw.choice([b"\0", b"\xff", b"\xed\xa0\x80", b"\x80", b"../", b"\n", b'"', b"["])
            data[place:place + length] = filler * length
        elif way == 7:
            number = draw.choice([0, 1, -1, 255, 2 ** 15, 2 ** 31 - 1, 2 ** 31, 2 ** 32 - 1, 2 ** 62])
            raw = (number % 2 ** 64).to_bytes(8, draw.choice(["little", "big"]))
            data[place:place + 8] = raw[:draw.choice([2, 4, 8])]
        elif runs := list(re.finditer(rb"\d+", data)):
            start, end = draw.choice(runs).span()
            data[start:end] = draw.choice([b"0", b"-1", b"9" * 18, b"9" * 5000, b"1e999", b"0x10", b"65536"])
    return bytes(data)


def json_mutated(document, draw):
    """One to three places of a JSON document with another value, without it, or with two of them swapped.
    -> its text"""
    box = [copy.deepcopy(document)]
    for _ in range(draw.randint(1, 3)):
        places = list(inner(box))
        node, key = draw.choice(places)
        way = draw.randrange(4)
        if way < 2:
            node[key] = copy.deepcopy(draw.choice(VALUES))
        elif way == 2 and node is not box:
            del node[key]
        else:
            other, name = draw.choice(places)
            node[key], other[name] = copy.deepcopy(other[name]), copy.deepcopy(node[key])
    sys.set_int_max_str_digits(0)
    text = json.dumps(box[0])
    sys.set_int_max_str_digits(4300)
    return re.sub(rf'"{NESTED}([\[{{])"', lambda found: deep(found[1]), text).encode()


def inner(node):
    """Every (container, key) below a list or dict."""
    for key, value in list(node.items() if isinstance(node, dict) else enumerate(node)):
        yield node, key
        if isinstance(value, (dict, list)):
            yield from inner(value)


def text_mutated(data, draw):
    """JSON, JSON lines: as values in half of the cases; else, and everything else, as bytes."""
    if draw.random() < 0.5:
        with contextlib.suppress(ValueError):
            return json_mutated(json.loads(data), draw)
        with contextlib.suppress(ValueError, IndexError):
            lines = data.splitlines()
            number = draw.randrange(len(lines))
            lines[number] = json_mutated(json.loads(lines[number]), draw)
            return b"\n".join(lines) + b"\n"
    return bytes_mutated(data, draw)


def signed(archive, draw):
    """A zip of torch.save with one entry mutated, or compressed, and right check sums."""
    old, new = zipfile.ZipFile(io.BytesIO(archive)), io.BytesIO()
    names = old.namelist()
    chosen = draw.choice([*names, *[name for name in names if name.endswith("data.pkl")] * len(names)])
    kind = draw.choice([zipfile.ZIP_STORED] * 4 + [zipfile.ZIP_DEFLATED])
    with zipfile.ZipFile(new, "w", kind) as file:
        for name in names:
            data = old.read(name)
            file.writestr(name, bytes_mutated(data, draw) if name == chosen else data)
    return new.getvalue()


class Evil:
    """What runs a command where it is unpickled."""
    def __reduce__(self):
        return os.system, ("true",)


def evil_pickle():
    return pickle.dumps({"model": Evil(), "step": 1})


def evil_array():
    file = io.BytesIO()
    np.save(file, np.array([Evil(), Evil()], dtype=object), allow_pickle=True)
    return file.getvalue()


def evil_archive():
    file = io.BytesIO()
    torch.save({"model": Evil(), "state_dict": {"a": Evil()}, "step": 1}, file)
    return file.getvalue()


# -------------------------------------------------------------------------------- files, and who reads them

def configs(flags):
    """The three configurations that train.py makes of its flags."""
    classes = ModelConfig, TrainConfig, RunConfig
    *made, _ = parse(make_parser("", classes), classes, flags)
    return made


class Target:
    """Files in a folder, whole, and a way to read them: `read(name, changed)` after file `name` was mutated,
    where changed is {file: its bytes}. It raises UserError or returns False where it takes nothing of it."""

    def __init__(self, folder, names=None):
        self.folder = Path(folder)
        paths = [path for path in sorted(self.folder.rglob("*")) if path.is_file()]
        names = names or [str(path.relative_to(folder)) for path in paths]
        self.whole = {name: (self.folder / name).read_bytes() for name in names}

    def mutated(self, name, data, draw):
        """-> {file: its bytes}: the mutated one, and what follows from it."""
        return {name: text_mutated(data, draw)}

    def attempt(self, turn):
        draw = random.Random(f"{type(self).__name__} {turn}")
        name = draw.choice(sorted(self.whole))
        changed = self.mutated(name, self.whole[name], draw)
        try:
            for file, data in changed.items():
                self.put(file, data)
            return self.read(name, changed)
        finally:
            for file in changed:
                self.put(file, self.whole[file])

    def put(self, file, data):
        """Replace a file, unlinked first: the old one may still be mapped."""
        (self.folder / file).unlink(missing_ok=True)
        (self.folder / file).write_bytes(data)


class Packs(Target):
    """A pack through both scripts' preparation and the loader. Half of the changed files are signed: sizes
    and check sums in meta.json follow the damage, as from somebody who hands out a made-up pack."""

    def __init__(self, tmp):
        rows = [Row(split, tmp / "0.png", f"{caption} {split}", answer=caption.split()[1], closed=n % 2 == 0,
                    label="ab"[n % 2], group=f"group {n % 2}")
                for split in ("train", "val", "test") for n, caption in enumerate(CAPTIONS[:8])]
        for n in range(4):
            shape = (16, 16) if n else (16, 16, 3)
            pixels = np.random.default_rng(n).integers(0, 256, shape, dtype=np.uint8)
            Image.fromarray(pixels).save(tmp / f"{n}.png")
        rows = [row._replace(image=tmp / f"{n % 4}.png") for n, row in enumerate(rows)]
        write_pack(rows, tmp / "pack", "test", "vqa", 16, root=tmp, workers=1)
        Tokenizer.train(CAPTIONS, 300).backend.save(str(tmp / "tokenizer.json"))
        self.folder = tmp / "pack"
        self.text = self.everything()
        super().__init__(self.folder)

    def mutated(self, name, data, draw):
        if name.endswith(".npy") and draw.random() < 0.05:
            data = evil_array()
        elif name.endswith(".npy") and draw.random() < 0.4:               # a good header, other numbers
            array = np.load(io.BytesIO(data))
            array = np.frombuffer(bytearray(array.tobytes()), np.uint8)
            for _ in range(draw.randint(1, 4)):
                number = draw.choice([-1, 0, 2 ** 31 - 1, 2 ** 62, draw.randrange(1000)]) % 2 ** 64
                place, size = draw.randrange(len(array)), draw.choice([1, 4, 8])
                raw = np.frombuffer(number.to_bytes(8, "little")[:size], np.uint8)
                array[place:place + size] = raw[:len(array) - place]
            data = data[:len(data) - len(array)] + array.tobytes()
        else:
            data = text_mutated(data, draw)
        changed = {name: data}
        if name in json.loads(self.whole["meta.json"])["files"] and draw.random() < 0.5:
            meta = json.loads(self.whole["meta.json"])
            meta["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            changed["meta.json"] = json.dumps(meta).encode()
        return changed

    def everything(self):
        """All that training, fine-tuning and the sheet of --show take from the pack."""
        flags = [*SMALL, "--data", str(self.folder), "--tokenizer", str(self.folder.parent),
                 "--min_crop_area", "0.9"]
        cfg, train_cfg, run_cfg = configs(flags)
        data = train.load_data(cfg, train_cfg, run_cfg, {})
        packs, texts = data.train.packs, []
        for split in ("train", "val", "test"):
            samples = Samples(packs, split, data.tokenizer, data.cfg, train_cfg)
            micro_batches = validation_micro_batches(samples, 64)
            for loaded in load(samples, micro_batches, 0, "cpu", lambda step: train.settings_at(
                    step, data.cfg, train_cfg)):
                ids = loaded.batch["text_ids"]
                assert 0 <= ids.min() and ids.max() < data.cfg.vocab_size
                texts += [samples.line(n)["text"] for n in loaded.indices] + ids.tolist()
        for task in ("vqa", "cls"):
            task_cfg, (cfg, train_cfg, run_cfg) = finetune.TaskConfig(), configs(flags)
            cfg.task = task
            data = finetune.load_data(cfg, train_cfg, run_cfg, task_cfg, {})
            next(load(data.train, validation_micro_batches(data.train, 64), 0, "cpu"))
            texts.append(data.labels)
        print(texts, packs[0].fingerprint())
        prepare.contact_sheet(packs[0])
        return texts

    def read(self, name, changed):
        try:
            texts = self.everything()
        finally:
            for file in self.folder.iterdir():                            # tokens of another pack
                if file.name not in self.whole:
                    file.unlink()
        if name.startswith("tokens"):
            assert texts == self.text
        elif len(changed) == 1 and name != "meta.json" and changed[name] != self.whole[name]:
            with pytest.raises(UserError, match=re.escape(f"/{name} does not match its checksum")):
                Pack(self.folder).verify()
        else:
            Pack(self.folder).verify()


class Resumed(Target):
    """--resume: the configuration, the log and the checkpoints of a run. Damage to the archive gives an error
    or one of the two checkpoints as it was."""

    archive_only = False

    def __init__(self, tmp):
        flags = [*SMALL, "--vit_width", "8", "--text_width", "8", "--fusion_width", "8",
                 "--decoder_width", "8", "--steps", "9"]
        self.cfg, self.train_cfg, _ = configs(flags)
        self.cfg.vocab_size = 50
        self.settings = {"model": vars(self.cfg), "train": vars(self.train_cfg), "data": {}}
        checkpoint.open_run_dir(tmp / "run", resume=True)
        checkpoint.LOCKS.pop().close()
        checkpoint.save_settings(tmp / "run", self.settings, Tokenizer.train(CAPTIONS, 300))
        model = M3AE(self.cfg)
        optimizer = torch.optim.AdamW(optim.param_groups(model, self.train_cfg), lr=1.0, foreach=False)
        scaler = torch.amp.GradScaler("cpu", enabled=False)
        for step in 1, 2:
            for parameter in model.parameters():
                parameter.grad = torch.randn_like(parameter)
            optimizer.step()
            checkpoint.save_checkpoint(tmp / "run", model, optimizer, scaler, step, 0.5)
            checkpoint.Log(tmp / "run", step).write(step, "train", loss=1.0)
        self.known = [checkpoint.load_checkpoint(tmp / "run" / name) for name in ("prev.pt", "last.pt")]
        for name in "lock", "tokenizer.json":                # no part of this target
            (tmp / "run" / name).unlink()
        super().__init__(tmp / "run")

    def mutated(self, name, data, draw):
        self.archive_only = name.endswith(".pt") and draw.random() < 0.4
        if not name.endswith(".pt"):
            return super().mutated(name, data, draw)
        if draw.random() < 0.03:
            return {name: draw.choice([evil_pickle, evil_archive])()}
        return {name: bytes_mutated(data, draw) if self.archive_only else signed(data, draw)}

    def read(self, name, changed):
        path = checkpoint.open_run_dir(self.folder, resume=True)
        checkpoint.LOCKS.pop().close()
        checkpoint.check_same_settings(self.folder, self.settings)
        checkpoint.Log(self.folder, 1)
        checkpoint.read_log(self.folder)
        model = M3AE(self.cfg)
        optimizer = torch.optim.AdamW(optim.param_groups(model, self.train_cfg), lr=1.0)
        scaler = torch.amp.GradScaler("cpu", enabled=False)
        step, best = checkpoint.load_training_state(path, model, optimizer, scaler)
        assert 0 <= step
        if self.archive_only:
            state, (known,) = model.state_dict(), [known for known in self.known if known["step"] == step]
            assert all(torch.equal(state[key], known["model"][key]) for key in known["model"])


class Weights(Target):
    """--init, --init_image and --init_text, in every kind of file they may name."""

    def __init__(self, tmp):
        saved(tmp / "m3ae.ckpt", {"state_dict": released(), "hyper_parameters": {"config": {"num_heads": 2}}})
        vit = {name.removeprefix("vision_encoder."): tensor for name, tensor in released().items()
               if name.startswith("vision_encoder.")}
        saved(tmp / "clip.pt", vit)
        for kind, form in ("roberta", "safetensors"), ("bert", "bin"):
            (tmp / kind).mkdir()
            hugging_face(tmp / kind, kind, form=form)
        super().__init__(tmp)

    def mutated(self, name, data, draw):
        if name.endswith((".ckpt", ".pt", ".bin")):
            if draw.random() < 0.03:
                return {name: draw.choice([evil_pickle, evil_archive])()}
            return {name: draw.choice([bytes_mutated, signed, signed])(data, draw)}
        if name.endswith(".safetensors") and draw.random() < 0.8:
            length = struct.unpack("<Q", data[:8])[0]
            head = text_mutated(data[8:8 + length], draw)
            return {name: struct.pack("<Q", len(head)) + head + data[8 + length:]}
        return super().mutated(name, data, draw)

    def read(self, name, changed):
        given = dict(mim_layer=1, max_text_len=14)
        if name == "m3ae.ckpt":
            cfg, state = weights.load_m3ae(self.folder / name, **given)
            M3AE(cfg).load_state_dict(state, strict=False)
        else:
            path = self.folder / Path(name).parts[0]
            found, state = (weights.load_clip if name == "clip.pt" else weights.load_text)(path, vit_heads=2)
            cfg = ModelConfig(**{"image_size": 32, "vocab_size": 50, "max_text_len": 14} | found)
            weights.check(cfg, {path: state})


class Tokenizers(Target):
    """A tokenizer.json of each kind: loaded, and texts encoded with it."""

    def __init__(self, tmp):
        Tokenizer.train(CAPTIONS, 270).backend.save(str(tmp / "roberta.json"))
        bert_tokenizer(CAPTIONS, tmp / "bert.json")
        super().__init__(tmp)

    def read(self, name, changed):
        tokenizer = Tokenizer.load(self.folder / name)
        assert tokenizer.vocab_size < 100_000
        odd = "", "ÄÖ \u202e 漢字 \0 x", "<mask>[MASK]", "a" * 3000
        for ids, starts in tokenizer.encode([*CAPTIONS[:3], *odd]):
            assert len(ids) == len(starts) and all(0 <= ids) and all(ids < tokenizer.vocab_size)
        tokenizer.words(range(tokenizer.vocab_size))


class Annotations(Target):
    """The annotations of every data set, through the command line of data.prepare: status 0 or 2."""
    READERS = {"medicat": "pretrain", "medpix": "cls", "melinda": "cls", "roco": "pretrain", "slake": "vqa",
               "table": "vqa", "csv": "cls", "vqa_med_2019": "vqa", "released": "vqa", "vqa_rad": "vqa",
               "published": "vqa", "openi": "cls", "r2gen": "irtr", "rocov2": "pretrain", "kaggle": "pretrain",
               "nih": "cls", "mimic_cxr": "cls"}
    NAMES = {"csv": "table", "released": "vqa_med_2019", "published": "vqa_rad", "r2gen": "openi",
             "kaggle": "roco"}                                   # of the readers that read a second layout

    def __init__(self, tmp):
        root, medicat.HELD_OUT = tmp / "in", 1
        figures = [{"radiology": True, "pdf_hash": f"p{i}", "fig_uri": f"{i}.png", "s2_caption": "A CT here.",
                    "s2orc_references": [f"Figure {i} shows it."] if i % 2 else None} for i in range(4)]
        write_lines(root / "medicat" / "release" / medicat.ANNOTATIONS, *figures)
        for split in "train", "dev", "test":
            write_lines(root / "medpix" / "splitted_dataset" / f"descriptions_{split}.jsonl",
                        medpix_entry(f"{split}1", "A mass."), medpix_entry(f"{split}2", "A cyst.", "MR"))
            write_csv(root / "melinda" / f"{split}.csv", MELINDA, ("1.png", "A blot", *"abc", "blot"),
                      ("2.png", "A gel", *"abc", "gel"))
        for split in "train", "validate", "test":
            write_lines(root / "slake" / f"{split}.json", json.dumps(
                [slake_entry("a/1.jpg", "Is it so?"), slake_entry("a/2.jpg", "What?", "Lung", "OPEN")]))
        roco_miniature(root / "roco")
        write_lines(root / "roco" / "roco_files" / "roco_train_references.jsonl",
                    {"roco_image_id": "PMC2_fig 2.jpg", "gorc_references": ["Figure 2 shows this."]})
        (root / "table").mkdir()
        write_lines(root / "table" / "table.jsonl", *[
            {"image": f"{i}.png", "text": f"What is {i}?", "answer": i, "closed": True, "group": "CT",
             "label": "a", "split": ["train", "val", "test"][i % 3]} for i in range(6)])
        columns = "image", "text", "label", "split"
        write_csv(root / "csv" / "table.csv", columns, *[(f"{i}.png", f"No, {i}", "ab"[i % 2], "train")
                                                         for i in range(4)])
        med_miniature(root / "vqa_med_2019")
        for split in "train", "val", "test":
            for category in "Modality", "Organ", "Plane":
                write_lines(root / "released" / split / "QA" / f"{category}.csv", "synpic3|what is it?|CT")
        rad_miniature(root / "vqa_rad")
        published_miniature(root / "published")
        openi_miniature(root / "openi")
        rocov2_miniature(root / "rocov2", ("train", "valid", "test"))
        nih_miniature(root / "nih")
        (root / "mimic_cxr").mkdir()
        mimic_miniature(root / "mimic_cxr")
        study = {"id": "CXR1", "report": "The XXXX is clear.", "image_path": ["0.png", "1.png"], "split": "train"}
        write_lines(root / "r2gen" / "annotation.json", json.dumps(dict.fromkeys(("train", "val", "test"), [study])))
        for name, split in ("train", "train"), ("validation", "val"), ("test", "test"):
            write_csv(root / "kaggle" / name / "radiology" / f"radiology{split}data.csv", ("id", "name", "caption"),
                      ("ROCO_1", "PMC1_a.jpg", "A CT here."), ("ROCO_2", "PMC2_b.jpg", "An, MR there."))
        self.names = [str(path.relative_to(root)) for path in sorted(root.rglob("*"))
                      if path.suffix in (".jsonl", ".json", ".csv", ".txt", ".gz")]
        self.out = tmp / "pack"
        self.plant(root)
        super().__init__(root, self.names)
        for reader in self.READERS:
            assert self.prepared(reader) == 0, reader

    def plant(self, root):
        """The images, one pixel each, wherever the readers look for them."""
        images = [f"medicat/release/figures/p{i}_{i}.png" for i in range(4)]
        images += [f"medpix/images/{split}{i}.png" for split in ("train", "dev", "test") for i in (1, 2)]
        images += [f"melinda/melinda_images/{i}.png" for i in (1, 2)]
        images += [f"slake/imgs/a/{i}.jpg" for i in (1, 2)]
        images += [f"table/{i}.png" for i in range(6)] + [f"csv/{i}.png" for i in range(4)]
        images += [f"released/{split}/images/synpic3.jpg" for split in ("train", "val", "test")]
        images += ["r2gen/images/0.png", "r2gen/images/1.png"]
        images += [f"kaggle/{name}/radiology/images/PMC{i}.jpg" for i in ("1_a", "2_b")
                   for name in ("train", "validation", "test")]
        for name in images:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            Image.new("L", (9, 9), 7).save(root / name)
        Image.new("L", (9, 9), 7).save(root.parent / "secret.png")

    def prepared(self, reader):
        name = self.NAMES.get(reader, reader)
        return prepare.main([
            name, "--root", str(self.folder / reader), "--out", str(self.out), "--task", self.READERS[reader],
            "--size", "8", "--allow_missing", "--overwrite", "--workers", "1"])

    def read(self, name, changed):
        shutil.rmtree(self.out, ignore_errors=True)
        status = self.prepared(Path(name).parts[0])
        assert status in (0, 2) and self.out.exists() == (status == 0)
        assert not list(self.out.parent.glob("pack.*"))
        if status == 0:
            pack = Pack(self.out)
            pack.verify()
            assert all(not line["source"].startswith(("..", "/")) for line in pack.lines())
            tokens = Tokenizer.train(["a"], 260)
            assert len(pack.tokens(tokens)[0]) == len(pack.samples) + 1
        return status == 0


class Images(Target):
    """Images through data.prepare: packed, or a row of skipped.jsonl."""
    KINDS = {"png": "L", "jpg": "RGB", "bmp": "RGB", "tiff": "I;16", "gif": "P", "webp": "RGB", "ppm": "RGB",
             "jp2": "L"}

    def __init__(self, tmp):
        rng = np.random.default_rng(0)
        grey = rng.integers(0, 256, (24, 20), dtype=np.uint8)
        for kind, mode in self.KINDS.items():
            deep = mode == "I;16"
            image = Image.fromarray(grey.astype(np.uint16) * 99 if deep else grey)
            path = tmp / "in" / f"0.{kind}"
            path.parent.mkdir(exist_ok=True)
            (image if deep else image.convert(mode)).save(path)
        for compression in "tiff_lzw", "tiff_deflate", "jpeg", "group4", "packbits":
            image = Image.fromarray(grey).convert("1" if compression == "group4" else "L")
            image.save(tmp / "in" / f"{compression}.tiff", compression=compression)
        Image.fromarray(grey).convert("RGBA").save(tmp / "in" / "alpha.png")
        exif = Image.Exif()
        exif[0x0112] = 6
        Image.fromarray(grey).save(tmp / "in" / "turned.jpg", exif=exif, progressive=True)
        super().__init__(tmp / "in")
        Image.new("L", (9, 9), 7).save(tmp / "in" / "whole.png")
        lines = [f"{name},An image,train" for name in ("whole.png", *self.whole)]
        (tmp / "in" / "table.csv").write_text("\n".join(["image,text,split", *lines]))
        self.out = tmp / "pack"

    def mutated(self, name, data, draw):
        if name.endswith(".png") and draw.random() < 0.3:                # another size, with its check sum
            head, place = bytearray(data[12:29]), draw.choice([4, 8])
            side = draw.choice([0, 1, 25, 40_000, 2 ** 31 - 1, 2 ** 32 - 1])
            head[place:place + 4] = side.to_bytes(4, "big")
            return {name: data[:12] + head + zlib.crc32(head).to_bytes(4, "big") + data[33:]}
        if draw.random() < 0.5:                                          # in its head
            return {name: bytes_mutated(data[:100], draw) + data[100:]}
        return {name: bytes_mutated(data, draw)}

    def read(self, name, changed):
        shutil.rmtree(self.out, ignore_errors=True)
        assert prepare.main(["table", "--root", str(self.folder), "--out", str(self.out), "--size", "8",
                             "--allow_missing", "--workers", "1"]) == 0
        pack, skipped = Pack(self.out), (self.out / "skipped.jsonl").read_text().splitlines()
        assert len(pack.samples) + len(skipped) == len(self.whole) + 1 and len(skipped) <= 1
        assert all(json.loads(line)["reason"] == "unreadable image" for line in skipped)
        return not skipped


TARGETS = {"packs": Packs, "resume": Resumed, "weights": Weights, "tokenizers": Tokenizers,
           "annotations": Annotations, "images": Images}


# -------------------------------------------------------------------------------- what must not happen

FORBIDDEN = ("os.system", "os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "os.spawn",
             "subprocess.Popen", "socket.connect", "ctypes.dlopen", "pty.spawn")
SEEN = []


def watch(folder):
    """Note in SEEN what runs a program, connects, or opens a file for writing outside of `folder`."""
    def hook(event, arguments):
        if event in FORBIDDEN:
            SEEN.append((event, str(arguments)[:200]))
        elif event == "open" and not isinstance(arguments[0], int):
            path, written = os.fsdecode(arguments[0]), (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR)
            if written and not os.path.realpath(path).startswith((str(folder), "/dev/")):
                SEEN.append((event, path))
    sys.addaudithook(hook)


def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def attempts(make, folder, turns, report):
    """In a process of its own: every mutation, under limits; what goes wrong is written to `report`."""
    sys.stdout = sys.stderr = open(os.devnull, "w")
    os.fsync = lambda _: None                                # durability is shown elsewhere
    target = make(folder)
    target.read(next(iter(target.whole)), {})                # whole: no error, and everything is imported
    watch(folder)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    ends = {"read": 0, "refused": 0}
    for turn in turns:
        report.seek(0)
        report.write(f"{turn}\n".ljust(20))
        report.flush()
        before, problem = peak(), ""
        signal.setitimer(signal.ITIMER_PROF, SECONDS)        # either ends the process
        signal.alarm(20 * SECONDS)
        try:
            ends["refused" if target.attempt(turn) is False else "read"] += 1
        except UserError as error:
            ends["refused"] += 1
            problem = f"more than a sentence: {error}" if len(str(error)) > 2000 or "\n" in str(error) else ""
        except BaseException:
            problem = traceback.format_exc()
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.alarm(0)
        if SEEN:
            problem += f"\nit did {SEEN}"
            SEEN.clear()
        if peak() - before > GROWTH:
            problem += f"\nit took {(peak() - before) // 1000} MB"
        if problem:
            report.seek(0, os.SEEK_END)
            report.write(f"\n--- mutation {turn}\n{problem}\n")
            report.flush()
    report.seek(0, os.SEEK_END)
    report.write(f"\nends {ends}\n")
    report.flush()


@pytest.mark.parametrize("kind", TARGETS)
def test_mutations(kind, tmp_path, request):
    count = 10_000 if request.config.getoption("--long") else 504
    turns = range(-(-count // len(TARGETS)))
    with open(tmp_path / "report", "w+") as report:
        if (pid := os.fork()) == 0:
            try:
                (tmp_path / "work").mkdir()
                attempts(TARGETS[kind], tmp_path / "work", turns, report)
                os._exit(0)
            except BaseException:
                report.seek(0, os.SEEK_END)
                report.write(traceback.format_exc())
                report.flush()
            finally:
                os._exit(1)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    said = (tmp_path / "report").read_text()
    assert status == 0, f"ended by {status} at mutation {said[:4000]}"
    assert "---" not in said, said[:20000]
    ends = ast.literal_eval(re.search(r"ends (.*)", said)[1])
    assert sum(ends.values()) == len(turns) and min(ends.values()) > 0   # both happen, or it is no test
    print(kind, ends)
