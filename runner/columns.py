"""Columns of the CSV files of a run: the interface between whoever writes them and whoever reads them."""

METRICS = (
    "epoch", "step", "phase", "lr", "batch_size", "input_size",
    "train_loss", "train_top1", "val_loss", "val_top1", "val_top5", "best_val_top1", "skipped_steps",
)  # fmt: skip
TIMING = (
    "epoch", "step", "seconds", "images_per_s", "eval_seconds", "peak_memory_bytes", "saved_bytes_per_sample",
)  # fmt: skip
LAYERS = ("layer", "kind", "becomes", "weight_bits", "act_bits", "grad_bits", "parameters", "macs", "why")
EXPECTED = ("epoch", "val_top1", "low", "high", "n")  # of runs of a recipe, epoch by epoch: mean, band, how many
HEALTH = (
    "epoch", "layer", "clip_ratio", "step_size", "dead_steps", "flip_rate", "code_entropy", "grad_norm", "near_threshold",
)  # fmt: skip
SCAN = (
    "quant",
    "figure",
    "title",
    "x_label",
    "y_label",
    "logarithmic",
    "level",
    "series",
    "x",
    "y",
)  # a point of a figure
