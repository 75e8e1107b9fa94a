"""Text to tokens: train a tokenizer on captions or load one, and find where words start."""
import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from .config import read_json, reading, require

# Special tokens: start, padding, end, unknown, mask.
SPECIAL = {"roberta": ("<s>", "<pad>", "</s>", "<unk>", "<mask>"),
           "bert": ("[CLS]", "[PAD]", "[SEP]", "[UNK]", "[MASK]")}
PAD_ID = {"roberta": 1, "bert": 0}
FILES = ("tokenizer.json", "vocab.txt", "vocab.json")     # that hold a tokenizer, in this order


class Tokenizer:
    """A `tokenizers.Tokenizer` of RoBERTa's or BERT's kind; the special tokens tell which.

    cls_id, pad_id, sep_id, mask_id: ids of the special tokens; non_special_ids (n,): all other ids;
    vocab_size: largest id + 1; json, hash: the tokenizer as text, and what tells it from
    another."""

    def __init__(self, backend: tokenizers.Tokenizer, source: str = "the tokenizer"):
        self.backend = backend
        self.backend.no_padding()           # many files pad and truncate; here the loader does both
        self.backend.no_truncation()
        self.backend.encode_special_tokens = True              # "<mask>" in somebody's text is text

        # The kind, and the special tokens that come with it.
        self.kind = next((kind for kind, names in SPECIAL.items()
                          if all(backend.token_to_id(name) is not None for name in names)), None)
        names = " nor ".join(" ".join(names) for names in SPECIAL.values())
        require(self.kind, f"{source} has neither the special tokens {names}: give another with "
                "--tokenizer")
        ids = [backend.token_to_id(name) for name in SPECIAL[self.kind]]
        self.cls_id, self.pad_id, self.sep_id, _, self.mask_id = ids
        require(self.pad_id == PAD_ID[self.kind],
                f"{source} has its padding token at {self.pad_id}, not at {PAD_ID[self.kind]}: "
                "give another with --tokenizer")

        # The vocabulary.
        vocab = backend.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocab.values()) + 1
        require(self.vocab_size <= 2 * len(vocab),
                f"{source} has large gaps in its ids: give another with --tokenizer")
        added = backend.get_added_tokens_decoder()
        special = set(ids) | {i for i, token in added.items() if token.special}
        self.non_special_ids = np.array(sorted(set(vocab.values()) - special))  # (n,)
        self.json = backend.to_str()
        self.hash = hashlib.sha256(self.json.encode()).hexdigest()[:16]

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Tokenizer":
        """path: one of FILES, or a folder that holds one. UserError if there is none.

        vocab.txt: BERT's WordPiece; vocab.json and merges.txt: RoBERTa's byte-level BPE."""
        files = [Path(path, name) for name in FILES if Path(path, name).is_file()]
        file = files[0] if files else Path(path)
        require(file.is_file(), f"no tokenizer at {path}: it needs {', '.join(FILES)} or a folder")
        make = {"vocab.txt": wordpiece, "vocab.json": byte_bpe}.get(file.name)
        with reading(file):
            return cls((make or tokenizers.Tokenizer.from_file)(str(file)), str(file))

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "Tokenizer":
        """A byte-level BPE of at most `vocab_size` tokens on `texts`, lower case.

        RoBERTa's special tokens stand where RoBERTa has them: four first, the mask token last."""
        *first, mask = SPECIAL["roberta"]
        backend = tokenizers.Tokenizer(models.BPE(unk_token="<unk>"))
        backend.normalizer = normalizers.Lowercase()
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(vocab_size=vocab_size - 1, special_tokens=first,
                                      show_progress=False,
                                      initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()))
        backend.train_from_iterator(texts, trainer)
        backend.add_special_tokens([mask])
        return cls(backend)

    @reading("the tokenizer")
    def encode(self, texts: Iterable[str]) -> list[tuple[np.ndarray, np.ndarray]]:
        """texts -> for each (ids (n,), starts (n,)), without special tokens

        starts: bool, True where a word begins, as the tokenizer itself splits the text."""
        encoded = []
        for encoding in self.backend.encode_batch(list(texts), add_special_tokens=False):
            words = [-1 if word is None else word for word in encoding.word_ids]
            starts = np.diff(np.array(words, dtype=np.int64), prepend=-2) != 0  # (n,)
            encoded.append((np.array(encoding.ids, dtype=np.int64), starts))
        return encoded

    def words(self, ids: Iterable[int]) -> list[str]:
        """ids -> the text of each token, for plots; a leading blank where a word begins"""
        if self.kind == "bert":
            tokens = [self.backend.id_to_token(int(i)) or "" for i in ids]
            return [token[2:] if token.startswith("##") else " " + token for token in tokens]
        return [self.backend.decode([int(i)], skip_special_tokens=False) for i in ids]


def wordpiece(file: str) -> tokenizers.Tokenizer:
    """The tokenizer of BERT's vocab.txt, with the settings of the folder's tokenizer_config.json.

    Where nothing tells the case, the vocabulary does: lower case if it has no capital letters."""
    settings = read_json(Path(file).with_name("tokenizer_config.json"))
    tokens = Path(file).read_text(encoding="utf-8").split("\n")
    capitals = any(token != token.lower() for token in tokens if not token.startswith("["))
    lower = settings.get("do_lower_case")
    return tokenizers.BertWordPieceTokenizer(
        file, lowercase=not capitals if lower is None else lower,
        strip_accents=settings.get("strip_accents"),
        handle_chinese_chars=settings.get("tokenize_chinese_chars", True))._tokenizer


def byte_bpe(file: str) -> tokenizers.Tokenizer:
    """The tokenizer of RoBERTa's vocab.json, with the folder's merges.txt."""
    settings = read_json(Path(file).with_name("tokenizer_config.json"))
    tokenizer = tokenizers.ByteLevelBPETokenizer(
        file, str(Path(file).with_name("merges.txt")),
        add_prefix_space=settings.get("add_prefix_space", False))
    tokenizer.add_special_tokens(list(SPECIAL["roberta"]))
    return tokenizer._tokenizer
