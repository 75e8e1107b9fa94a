"""Text to tokens: train a tokenizer on captions or load one, and learn from it where words start."""
import hashlib
import os

import numpy as np
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from .config import require, reading

# Special tokens by name: start, padding, end, unknown, mask.
SPECIAL = {"roberta": ("<s>", "<pad>", "</s>", "<unk>", "<mask>"),
           "bert": ("[CLS]", "[PAD]", "[SEP]", "[UNK]", "[MASK]")}
PAD_ID = {"roberta": 1, "bert": 0}


class Tokenizer:
    """A `tokenizers.Tokenizer` of RoBERTa's or BERT's kind, told apart by the names of the special tokens.

    ids: cls_id, pad_id, sep_id, mask_id; non_special_ids (n,): those of no special token; vocab_size; json, hash."""

    def __init__(self, backend, source="the tokenizer"):
        self.backend = backend
        self.backend.no_padding()         # many tokenizer.json files cut and pad; here the loader does both
        self.backend.no_truncation()
        self.backend.encode_special_tokens = True              # "<mask>" in somebody's text is text
        self.kind = next((kind for kind, names in SPECIAL.items()
                          if all(backend.token_to_id(name) is not None for name in names)), None)
        require(self.kind, f"{source} has neither RoBERTa's special tokens {' '.join(SPECIAL['roberta'])} "
                        f"nor BERT's {' '.join(SPECIAL['bert'])}: give another with --tokenizer")
        ids = [backend.token_to_id(name) for name in SPECIAL[self.kind]]
        self.cls_id, self.pad_id, self.sep_id, _, self.mask_id = ids
        require(self.pad_id == PAD_ID[self.kind], f"{source} has its padding token at {self.pad_id}, a model of "
             f"{self.kind}'s kind needs it at {PAD_ID[self.kind]}: give another with --tokenizer")

        vocab = backend.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocab.values()) + 1
        require(self.vocab_size <= 2 * len(vocab), f"{source} has large gaps in its ids: use another tokenizer")
        special = set(ids) | {i for i, token in backend.get_added_tokens_decoder().items() if token.special}
        self.non_special_ids = np.array(sorted(set(vocab.values()) - special))
        self.json = backend.to_str()
        self.hash = hashlib.sha256(self.json.encode()).hexdigest()[:16]

    @classmethod
    def load(cls, path):
        """path: a tokenizer.json, or a folder that holds one."""
        path = os.path.join(path, "tokenizer.json") if os.path.isdir(path) else str(path)
        require(os.path.isfile(path), f"no tokenizer at {path}: give a tokenizer.json, or a folder with one")
        with reading(path):
            return cls(tokenizers.Tokenizer.from_file(path), path)

    @classmethod
    def choose(cls, train_cfg, run_cfg, texts):
        """The tokenizer asked for, else this run's, else that of the weights, else one trained on `texts`."""
        start, text = "" if train_cfg.init == "none" else train_cfg.init, train_cfg.init_text
        folders = run_cfg.out, text, start, os.path.dirname(os.path.abspath(start)) if start else ""
        there = [folder for folder in folders if folder and os.path.isfile(f"{folder}/tokenizer.json")]
        asked = run_cfg.tokenizer or next(iter(there), None)
        require(asked or not (start or text),    # embeddings mean nothing under another tokenizer's ids
             f"{text or start} comes without a tokenizer.json: give the one of its training by --tokenizer")
        return cls.load(asked) if asked else cls.train(texts, train_cfg.tokenizer_vocab)

    @classmethod
    def train(cls, texts, vocab_size):
        """A byte-level BPE of at most `vocab_size` tokens on `texts`, lower case, with RoBERTa's special
        tokens where RoBERTa has them: four first, the mask token last."""
        *first, mask = SPECIAL["roberta"]
        backend = tokenizers.Tokenizer(models.BPE(unk_token="<unk>"))
        backend.normalizer = normalizers.Lowercase()
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(vocab_size=vocab_size - 1, special_tokens=first, show_progress=False,
                                      initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()))
        backend.train_from_iterator(texts, trainer)
        backend.add_special_tokens([mask])
        return cls(backend)

    @reading("the tokenizer")
    def encode(self, texts):
        """texts, a list -> a list of (ids (n,), starts (n,)), special tokens left out: starts is true where a
        word begins, as the tokenizer itself split them."""
        pairs = []
        for encoding in self.backend.encode_batch(list(texts), add_special_tokens=False):
            words = np.array([-1 if word is None else word for word in encoding.word_ids], dtype=np.int64)
            pairs.append((np.array(encoding.ids, dtype=np.int64), np.diff(words, prepend=-2) != 0))
        return pairs

    def words(self, ids):
        """ids -> the text of each token, for images: a leading blank where a word begins."""
        if self.kind == "bert":
            tokens = [self.backend.id_to_token(int(i)) or "" for i in ids]
            return [token[2:] if token.startswith("##") else " " + token for token in tokens]
        return [self.backend.decode([int(i)], skip_special_tokens=False) for i in ids]
