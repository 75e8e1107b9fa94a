"""What the tests share: the project on the path, one thread, and small models with batches to match."""
import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
torch.set_num_threads(1)         # on tensors this small a second thread only waits for a busy core


# These files hold the unchanged model: a right edit may fail them. Elsewhere single tests are marked.
RELEASE = ("test_golden", "test_model", "test_masking", "test_weights", "test_itc", "test_edits",
           "test_readme", "test_ablate", "test_bench")


def pytest_addoption(parser):
    parser.addoption("--long", action="store_true", help="10 times the kills, 20 times the mutations, "
                     "every invariant of edited models")
    parser.addoption("--flags", default="", help="flags of train.py that an edit needs, for -m invariants")


def pytest_configure(config):
    config.addinivalue_line("markers", "invariants: holds for any model; run it after an edit")
    config.addinivalue_line("markers", "release: holds the unchanged model; a right edit may fail it")
    config.addinivalue_line("markers", "gpu: needs a GPU; run with -m gpu")
    if config.option.markexpr != "gpu":          # others compare bits, and fork, which CUDA does not survive
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_collection_modifyitems(items):
    no_gpu = pytest.mark.skip(reason="needs a GPU, and -m gpu")
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(no_gpu)
        if item.path.stem in RELEASE:
            item.add_marker("release")


@pytest.fixture
def small_config():
    """A function: changes -> the ModelConfig of a model that runs in milliseconds, its widths all unequal."""
    from m3ae_mini import ModelConfig

    def make(**changes):
        return ModelConfig(**{**dict(
            image_size=32, patch_size=8, vocab_size=50, max_text_len=12, text_max_positions=24,
            vit_width=48, vit_blocks=2, vit_heads=3, text_width=40, text_layers=2, text_heads=2,
            fusion_width=64, fusion_layers=3, fusion_heads=2, mim_layer=2,
            decoder_width=24, decoder_layers=2, decoder_heads=2, num_answers=9, num_classes=5,
            dropout=0.0, attn_dropout=0.0), **changes})
    return make


@pytest.fixture
def random_batch():
    """A function: (cfg, rows, seed) -> a batch for every task, its texts of unequal length."""
    def make(cfg, rows=4, seed=0):
        draw = torch.Generator().manual_seed(seed)
        start, pad, end, non_special_ids = (0, 1, 2, 5) if cfg.text_kind == "roberta" else (2, 0, 3, 5)
        row = torch.arange(rows)                                                       # (B,)
        length = cfg.max_text_len - row[:, None] % 7                                   # (B, 1)
        column = torch.arange(cfg.max_text_len)                                        # (T,)

        ids = torch.randint(non_special_ids, cfg.vocab_size, (rows, cfg.max_text_len), generator=draw)
        ids[:, 0] = start
        ids = torch.where(column == length - 1, end, ids).where(column < length, pad)
        hidden = (column == 1) | (column == 3)                                         # (T,)
        noise = torch.rand(rows, (cfg.image_size // cfg.patch_size) ** 2, generator=draw)
        return {
            "image": torch.randn(rows, 3, cfg.image_size, cfg.image_size, generator=draw),
            "text_ids": ids, "text_mask": (column < length).long(),
            "mlm_ids": torch.where(hidden, 4, ids), "mlm_labels": torch.where(hidden, ids, -100),
            "mim_noise": noise, "itm_index": torch.where(row < rows // 2, row.roll(1), row),
            "vqa_labels": row * 2 - 1,                                                 # -1: none of the list
            "cls_labels": row % cfg.num_classes,
            "false_text_index": (row[:, None] + torch.tensor([1, 2])) % rows}
    return make
