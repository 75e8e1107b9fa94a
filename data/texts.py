"""The tokenizer of a run, and what becomes of its texts."""
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from data.progress import progress
from m3ae_mini.config import RunConfig, TrainConfig, require
from m3ae_mini.loader import Samples
from m3ae_mini.tokenizer import FILES, SPECIAL, Tokenizer

MANY_UNKNOWN = 0.05                    # a warning is printed above this share of unknown tokens


def choose_tokenizer(train_cfg: TrainConfig, run_cfg: RunConfig,
                     texts: Iterable[str]) -> Tokenizer:
    """--tokenizer's, else the run's, else the weights', else one trained on `texts`.

    UserError if weights bring a tokenizer that numbers tokens otherwise, or none at all."""
    init = "" if train_cfg.init == "none" else train_cfg.init
    init_folder = Path(init).absolute().parent if init else ""
    folders = [run_cfg.out, train_cfg.init_text, init, init_folder]
    folders = [folder for folder in folders
               if folder and any(Path(folder, name).is_file() for name in FILES)]
    path = run_cfg.tokenizer or next(iter(folders), None)
    if path:
        tokenizer = Tokenizer.load(path)
        for folder in folders:
            known = Tokenizer.load(folder).backend.get_vocab().items()
            require(known <= tokenizer.backend.get_vocab().items(),
                    f"{path} numbers tokens otherwise than {folder}, which the weights were "
                    "trained with: leave --tokenizer out")
        return tokenizer

    # Embeddings mean nothing under another tokenizer's ids.
    require(not (init or train_cfg.init_text),
            f"{train_cfg.init_text or init} has no tokenizer (it would be {' or '.join(FILES)}): "
            "give one with --tokenizer")
    shown = progress(texts, "training the tokenizer", "texts")
    return Tokenizer.train(shown, train_cfg.tokenizer_vocab)


def text_notes(tokenizer: Tokenizer, *parts: Samples) -> list[str]:
    """How the texts of these samples are tokenised: lower case, truncated, unknown tokens."""
    num_truncated = num_unknown = num_tokens = 0
    unknown_id = tokenizer.backend.token_to_id(SPECIAL[tokenizer.kind][3])
    for samples in parts:
        longest = samples.cfg.max_text_len - 2
        for index, (offsets, tokens) in enumerate(samples.tokens):
            rows = samples.location[samples.location[:, 0] == index, 1]
            starts, ends = offsets[rows].astype(np.int64), offsets[rows + 1].astype(np.int64)
            # How many of the first k tokens are unknown, for every k.
            unknown = np.concatenate([[0], np.cumsum(tokens >> 1 == unknown_id)])
            num_truncated += int((ends - starts > longest).sum())
            num_unknown += int((unknown[ends] - unknown[starts]).sum())
            num_tokens += int((ends - starts).sum())

    lower = '"lowercase":true' in tokenizer.json or '"type":"Lowercase"' in tokenizer.json
    share = num_unknown / max(1, num_tokens)
    warning = "warning: " if share > MANY_UNKNOWN else ""
    return [
        f"{warning}texts: {'lower case, ' if lower else ''}{share:.1%} of the tokens are unknown",
        f"{num_truncated:,} texts of more than {parts[0].cfg.max_text_len} tokens are truncated"]
