"""The model card of a finished run: card.md in its folder says what it is and what it is not."""
from dataclasses import fields
from pathlib import Path

from data.pair_metrics import PAIR_METRICS
from data.task_metrics import METRIC_NAMES
from m3ae_mini.checkpoint import read_log, saved_settings, write_atomic
from m3ae_mini.config import DERIVED, ModelConfig, TrainConfig

# Lines of a pack's summary that a reader of the card needs.
SUMMARY_LINES = ("samples:", "in several splits:", "groups", "classes", "labels", "skipped rows:",
                 "warning:")
BASELINES = {"mlm_acc": "most_frequent_token", "itm_acc_random": "group_only",
             "mim_loss": "mean_patch", "itc_acc": "itc_chance", "acc": "most_frequent_label"}
LIMITS = """- This is not a medical device. No one has checked it for use on patients.
- The figures hold for these test samples. Other scanners, hospitals and patients may differ.
- An interval covers the choice of test samples, not that of the seed: train with three seeds."""


def write_card(out: Path, packs: list) -> None:
    """Write card.md from the run's config.json, its log, and the summaries of its packs."""
    settings = saved_settings(out) or {}
    tests = [line for line in read_log(out) if line["split"] == "test"]
    sections = {
        f"Model card of {out.name}": _about_model(settings),
        "Data": [line for pack in packs for line in _about_pack(pack)],
        "Training": _about_training(settings),
        "Test": _about_test(tests[-1]) if tests else ["Not tested."],
        "Limits": LIMITS.splitlines() + _about_phantoms(packs)}
    text = "\n\n".join("\n".join([f"{'#' if i == 0 else '##'} {title}", "", *lines])
                       for i, (title, lines) in enumerate(sections.items()))
    data = f"{text}\n".encode("utf-8", "replace")
    write_atomic(out / "card.md", lambda file: file.write(data))


def _about_model(settings: dict) -> list[str]:
    """What the model is for, and its size."""
    cfg, labels = settings.get("model", {}), settings.get("data", {}).get("labels")
    lines = [f"M³AE (Chen et al., MICCAI 2022) of m3ae_mini. Task: {cfg.get('task')}. Images of "
             f"{cfg.get('image_size')} × {cfg.get('image_size')} pixels, texts of at most "
             f"{cfg.get('max_text_len')} tokens."]
    if labels:
        lines += ["", f"It knows {len(labels):,} labels and no others."]
    return lines


def _about_pack(pack) -> list[str]:
    """A pack: its name, its fingerprint, and what its summary says of splits and leaks."""
    lines = [f"**{pack.folder}** ({pack.meta['name']}, fingerprint {pack.fingerprint()})", ""]
    summary = pack.folder / "summary.txt"
    text = summary.read_text(errors="replace") if summary.is_file() else ""
    return lines + [f"- {line}" for line in text.splitlines()
                    if line.startswith(SUMMARY_LINES)] + [""]


def _about_training(settings: dict) -> list[str]:
    """Every setting that is not the default of the paper's model."""
    defaults = {field.name: field.default for config in (ModelConfig, TrainConfig)
                for field in fields(config)}
    lines = []
    for part in "model", "train", "task":
        for name, value in settings.get(part, {}).items():
            # What the data tell is no flag; the task's own settings are all listed.
            if name in DERIVED or value == defaults.get(name, ""):
                continue
            flag = f"--{name} {value}"
            if isinstance(value, bool):
                flag = f"--{name}" if value else f"--no-{name}"
            lines.append(f"- `{flag}`")
    own = settings.get("model", {}).get("loss_weights", {})
    lines += [f"- `--{name} {weight}`" for name, weight in own.items()]
    return ["Settings that are not the defaults of `base`, and all of the task:", "", *lines]


def _about_test(test: dict) -> list[str]:
    """A table: each figure of the test, its interval, and a trivial baseline."""
    lines = [f"Step {test['step']:,}. Shares are between 0 and 1.", "",
             "| metric | value | 95 % interval | trivial baseline |", "|---|---|---|---|"]
    for name, value in test.items():
        if name in ("step", "split", "score") or value is None or name in BASELINES.values() \
                or name.startswith(("low_", "high_")):
            continue
        low, high = test.get(f"low_{name}"), test.get(f"high_{name}")
        interval = "" if low is None else f"{low:.3g} to {high:.3g}"
        baseline = test.get(BASELINES.get(name, ""))
        shown = "" if baseline is None else f"{baseline:.3g}"
        titles = PAIR_METRICS if "above" in test else METRIC_NAMES
        title = titles.get(name, name)
        lines.append(f"| {title} | {value:.3g} | {interval} | {shown} |")
    return lines


def _about_phantoms(packs: list) -> list[str]:
    """One more limit, if the images were drawn."""
    drawn = all(pack.meta["name"] == "phantoms" for pack in packs)
    return ["- Trained on phantoms, drawn images: it knows nothing of real ones."] if drawn else []
