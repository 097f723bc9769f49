"""The figures of the report: matplotlib's SVG, each in a light and a dark version.

Names never enter a figure: they stand in the HTML beside it, where they are escaped, keep their
direction and find their fonts.
"""

import base64
import io
import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
from markupsafe import Markup
from scipy.special import softmax

from imgcls.evaluation import scores
from imgcls.run.logs import figures_of

# Colours of the page and of its figures, by the names of the CSS variables.
LIGHT = {"paper": "#fdfcfa", "ink": "#1c1d20", "muted": "#66676d", "line": "#e4e1db"}
LIGHT |= {"good": "#0f6f86", "bad": "#c2470f"}
DARK = {"paper": "#15171a", "ink": "#e9e7e3", "muted": "#9a9ba1", "line": "#2e3136"}
DARK |= {"good": "#56bccf", "bad": "#f2905c"}
# Told apart from each other on either paper.
PALETTE = ["#cf4a1d", "#1684a0", "#8a63d2", "#b98512", "#4c8f3c", "#c2438f"]

# Titles of the curves. A figure of another task goes by its name.
TITLES = {"loss": "Loss", "top1": "Top-1 accuracy"}
TRAIN_TITLES = {
    "learning_rate": "Learning rate",
    "images_per_second": "Training images per second",
}

STYLE = {
    "font.size": 8.5,
    "text.color": LIGHT["ink"],
    "axes.labelcolor": LIGHT["muted"],
    "axes.edgecolor": LIGHT["line"],
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": LIGHT["muted"],
    "ytick.color": LIGHT["muted"],
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "grid.color": LIGHT["line"],
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "lines.linewidth": 1.4,
    "svg.fonttype": "none",  # text stays text, in the reader's own font
    "svg.hashsalt": "imgcls",  # the same figure gives the same bytes
}

Axes = Any  # matplotlib.axes.Axes: matplotlib is imported only where a figure is drawn


def figure(draw: Callable[[Axes], None], *, alt: str, size: tuple[int, int]) -> Markup:
    """A `<picture>` for light and dark pages, of what `draw` draws in the colours of LIGHT.

    Args:
        draw: fills the axes.
        alt: says in words what the figure shows.
        size: width and height in CSS pixels.
    """
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        drawing = Figure(figsize=(size[0] / 96, size[1] / 96), layout="constrained")
        draw(drawing.add_subplot())
        file = io.StringIO()
        drawing.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    light = re.sub(r"'DejaVu Sans'[^;\"]*", "system-ui, sans-serif", file.getvalue())
    dark = light
    for name, colour in LIGHT.items():
        dark = dark.replace(colour, DARK[name])
    light, dark = (data_uri("image/svg+xml", svg.encode()) for svg in (light, dark))
    return Markup(
        '<picture><source media="screen and (prefers-color-scheme: dark)" srcset="{}">'
        '<img src="{}" width="{}" height="{}" alt="{}"></picture>'
    ).format(dark, light, *size, alt)


def data_uri(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def learning_curves(history: Sequence[dict[str, Any]]) -> dict[str, Markup]:
    """Title -> figure, of the quantities that the rows of a metrics.jsonl have."""
    names = dict.fromkeys(name for row in history for name in figures_of(row))
    both, train = TITLES | {n: n for n in names if n not in TITLES}, ("train",)
    panels = [(title, key, (*train, "validation")) for key, title in both.items()]
    panels += [(title, key, train) for key, title in TRAIN_TITLES.items()]
    curves = {}
    for title, key, splits in panels:
        series = {}
        for split in splits:
            rows = [(row["epoch"], row.get(key)) for row in history if row["split"] == split]
            points = np.array(rows, np.float64).reshape(-1, 2)  # null becomes NaN, a gap
            if np.isfinite(points[:, 1]).any():
                series[split] = points
        if series:
            ends = ", ".join(f"{split} ends at {y[-1, 1]:.4g}" for split, y in series.items())
            draw = partial(_draw_history, series, from_zero=len(splits) == 1)
            curves[title] = figure(draw, alt=f"{title} by epoch: {ends}", size=(440, 230))
    return curves


def _draw_history(series: dict[str, np.ndarray], axes: Axes, *, from_zero: bool) -> None:
    for split, points in series.items():
        colour = LIGHT["muted" if split == "train" and len(series) > 1 else "good"]
        (line,) = axes.plot(*points.T, color=colour, label=split, clip_on=False)
        if len(points) < 40:
            line.set(marker="o", markersize=2.5)
    axes.grid(axis="y")
    axes.set_xlabel("epoch")
    if from_zero:
        axes.set_ylim(bottom=0)
    axes.xaxis.get_major_locator().set_params(integer=True)
    if len(series) > 1:
        axes.legend()


def precision_recall(
    logits: np.ndarray, labels: np.ndarray, *, classes: Sequence[int], highlighted: int
) -> Markup:
    """One-vs-rest curves of `classes`, the first `highlighted` of them in the PALETTE's colours.

    Precision is that of the highest threshold that reaches a recall, at 101 recalls.
    """
    from sklearn.metrics import precision_recall_curve

    probs, grid = softmax(logits.astype(np.float64), axis=1), np.linspace(0, 1, 101)
    curves = {}
    for k in classes:
        precision, recall, _ = precision_recall_curve(labels == k, probs[:, k])
        curves[k] = precision[::-1][np.searchsorted(recall[::-1], grid)]

    def draw(axes: Axes) -> None:
        for k in classes[highlighted:]:
            axes.plot(grid, curves[k], color=LIGHT["muted"], linewidth=0.5, alpha=0.6)
        for k, colour in zip(classes[:highlighted], PALETTE):
            axes.plot(grid, curves[k], color=colour)
        axes.set(xlabel="recall", ylabel="precision", xlim=(0, 1.01), ylim=(0, 1.02))
        axes.grid()

    return figure(draw, alt=f"Precision by recall of {len(classes)} classes", size=(480, 330))


def reliability(logits: np.ndarray, labels: np.ndarray, *, temperature: float | None) -> Markup:
    """Accuracy against confidence, before and after division by the temperature."""
    series = [("as trained", "good", scores.reliability(logits, labels))]
    if temperature is not None:
        cooled = scores.reliability(logits / temperature, labels)
        series.append((f"at temperature {temperature:.2f}", "bad", cooled))

    def draw(axes: Axes) -> None:
        axes.plot([0, 1], [0, 1], color=LIGHT["muted"], linewidth=0.8, linestyle=(0, (4, 3)))
        for label, colour, bins in series:
            filled = [b for b in bins if b["count"]]
            x, y = [b["confidence"] for b in filled], [b["accuracy"] for b in filled]
            area = [4 + 150 * b["count"] / len(labels) for b in filled]
            axes.plot(x, y, color=LIGHT[colour], linewidth=0.7, alpha=0.6)
            axes.scatter(x, y, area, color=LIGHT[colour], linewidth=0, label=label)
        axes.set(xlabel="confidence", ylabel="accuracy", xlim=(0, 1.01), ylim=(0, 1.02))
        axes.grid()
        axes.legend(loc="upper left")

    return figure(draw, alt="Accuracy by confidence", size=(440, 330))


def confidence_counts(bins: Sequence[dict[str, Any]]) -> Markup:
    """How many examples each bin of `scores.reliability` holds."""

    def draw(axes: Axes) -> None:
        edges = [b["lower"] for b in bins]
        width = 0.92 / len(bins)
        axes.bar(edges, [b["count"] for b in bins], width, align="edge", color=LIGHT["good"])
        axes.set(xlabel="confidence", ylabel="examples", xlim=(0, 1.01))
        axes.grid(axis="y")

    return figure(draw, alt="Number of examples by confidence", size=(440, 330))


def intervals(values: Sequence[tuple[float, float, float]]) -> Markup:
    """Accuracies as (value, low, high), one row each from the top down, named A, B, C..."""

    def draw(axes: Axes) -> None:
        for row, (value, low, high) in enumerate(values):
            axes.plot([100 * low, 100 * high], [row, row], color=LIGHT["good"], linewidth=2)
            axes.plot(100 * value, row, "o", color=LIGHT["good"], markersize=6)
        axes.set_yticks(range(len(values)), [run_letter(row) for row in range(len(values))])
        axes.set_ylim(len(values) - 0.5, -0.5)
        axes.set_xlabel("top-1 accuracy, %")
        axes.grid(axis="x")

    alt = "; ".join(
        f"{run_letter(row)} {100 * value:.2f}% ({100 * low:.2f} to {100 * high:.2f})"
        for row, (value, low, high) in enumerate(values)
    )
    return figure(draw, alt=alt, size=(512, 56 + 32 * len(values)))


def run_letter(index: int) -> str:
    """A, B, ... Z, A2, B2...: what a figure and a table call the run at a position."""
    return chr(ord("A") + index % 26) + (str(index // 26 + 1) if index >= 26 else "")
