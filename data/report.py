"""The report of a pre-training: each metric on the test split, its interval, a trivial baseline."""
import math
from pathlib import Path

from data.baselines import trivial_baselines
from data.scores import intervals
from data.task_metrics import clusters
from m3ae_mini import M3AE, checkpoint, evaluate
from m3ae_mini.distributed import DistEnv
from m3ae_mini.loader import Samples
from m3ae_mini.objectives import loss_weights


def report_pretraining(model: M3AE, train: Samples, out: Path, limit: int,
                       dist_env: DistEnv) -> None:
    """Test the best checkpoint of the run `out` on at most `limit` samples; log and print it."""
    best = checkpoint.load_best(out, dist_env)
    model.load_state_dict(best["model"])
    test = Samples(train.packs, "test", train.tokenizer, train.cfg, train.train_cfg)
    indices, table = evaluate.pretraining_rows(model, test, dist_env, limit)
    if not dist_env.is_main:
        return

    metrics = evaluate.means(table)
    metrics["score"] = evaluate.score(metrics, loss_weights(model.cfg))
    ranges = intervals(lambda weights: evaluate.means(table, weights), clusters(test, indices))
    metrics |= trivial_baselines(train, test, limit, dist_env.device)
    checkpoint.Log(out, math.inf).write(best["step"], "test", **metrics, **log_names(ranges))
    print(f"\nOn {len(indices):,} test samples (step {best['step']:,}), with 95 % intervals:")
    print(pretraining_table(metrics, ranges))
    print(f"Plots: {out / 'plots'}")


def log_names(ranges: dict[str, tuple[float, float]]) -> dict[str, float]:
    """Intervals as the log has them: {"low_acc": …, "high_acc": …}."""
    return {f"{end}_{name}": values[i] for i, end in enumerate(("low", "high"))
            for name, values in ranges.items()}


# One line per metric: its name, how it is printed, its title, and what stands beside it.
POINTS, SHARE, ERROR = "{:+.1f}", "{:.1%}", "{:.3f}"
LINES = (
    ("mlm_acc", SHARE, "masked tokens, accuracy",
     "most frequent token: {most_frequent_token:.1%}"),
    ("mlm_gain_random", POINTS, "  gain over a random image", "points"),
    ("mlm_gain_hard", POINTS, "  gain over a hard negative", "points"),
    ("itm_acc_random", SHARE, "matching, random negatives",
     "chance: 50.0%; by the group alone: {group_only:.1%}"),
    ("itm_acc_hard", SHARE, "  hard negatives", "chance, and by the group alone: 50.0%"),
    ("mim_loss", ERROR, "reconstruction error",
     "mean patch: {mean_patch:.3f} ({error_below:+.0%})"),
    ("mim_gain_random", "{:+.3f}", "  gain over a random text", ""),
    ("noise_floor", ERROR, "  noise floor", "the same image without noise"),
    ("itc_acc", SHARE, "ITC, image of a text", "chance: {itc_chance:.1%}"))


def pretraining_table(metrics: dict[str, float], ranges: dict[str, tuple[float, float]]) -> str:
    """A line for each metric that was measured. ranges: {name: its interval}."""
    notes, hidden = dict(metrics), set()
    if "mim_loss" in metrics:
        notes["error_below"] = metrics["mim_loss"] / metrics["mean_patch"] - 1
    else:
        hidden.add("noise_floor")      # nothing to compare it with
    lines = [table_line(title, number, metrics[name], ranges.get(name), note.format(**notes))
             for name, number, title, note in LINES if name in metrics and name not in hidden]

    # What is not there needs a reason; losses of your own have their value alone.
    if "mlm_loss" in metrics or "itm_loss" in metrics:
        if not metrics.keys() & {"mlm_gain_random", "itm_acc_random"}:
            lines.append("  no negatives: all pairs share an image or a text")
        elif not metrics.keys() & {"mlm_gain_hard", "itm_acc_hard"}:
            lines.append("  no hard negatives: the data have no groups, or no group has two pairs")
    lines += [table_line(name, ERROR, value, ranges.get(name), "")
              for name, value in metrics.items() if name.endswith("_loss")
              and not name.startswith(("low_", "high_"))
              and name.removesuffix("_loss") not in evaluate.METRICS]
    return "\n".join(lines)


def table_line(title: str, number: str, value: float, interval: tuple[float, float] | None,
               note: str) -> str:
    """A line of the table: title, value, interval, note."""
    scale = 100 if number == POINTS else 1
    shown = number.format(scale * value)
    low_to_high = ""
    if interval is not None:
        low, high = (number.format(scale * end).rstrip("%") for end in interval)
        low_to_high = f"({low} to {high})"
    return f"  {title:27}{shown:>7}  {low_to_high:19}{note}".rstrip()
