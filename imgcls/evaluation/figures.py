"""The figures of the report: matplotlib's SVG, each in a light and a dark version.

Names never enter a figure: they stand in the HTML beside it, where they are escaped, keep their
direction and find their fonts.
"""

import base64
import io
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from markupsafe import Markup
from scipy.special import softmax

from imgcls.run.logs import figures_of

# Colours of the page and of its figures, by the names of the CSS variables.
LIGHT = {"paper": "#fdfcfa", "ink": "#1c1d20", "muted": "#66676d", "line": "#e4e1db"}
LIGHT |= {"good": "#0f6f86", "bad": "#c2470f"}
DARK = {"paper": "#15171a", "ink": "#e9e7e3", "muted": "#9a9ba1", "line": "#2e3136"}
DARK |= {"good": "#56bccf", "bad": "#f2905c"}
# Told apart from each other on either paper.
PALETTE = ["#cf4a1d", "#1684a0", "#8a63d2", "#b98512", "#4c8f3c", "#c2438f"]

# Titles of the curves. A figure of another task goes by its name.
TITLES = {"loss": "Loss", "top1": "Top-1 accuracy", "learning_rate": "Learning rate"}
TITLES |= {"images_per_second": "Training images per second"}
OF_TRAINING = ("learning_rate", "images_per_second")

STYLE: Any = {"font.size": 8.5, "grid.linewidth": 0.6, "lines.linewidth": 1.4}
STYLE |= dict.fromkeys(("axes.spines.top", "axes.spines.right", "legend.frameon"), False)
STYLE |= dict.fromkeys(("xtick.major.size", "ytick.major.size"), 0) | {"axes.axisbelow": True}
STYLE |= dict.fromkeys(("axes.labelcolor", "xtick.color", "ytick.color"), LIGHT["muted"])
STYLE |= dict.fromkeys(("axes.edgecolor", "grid.color"), LIGHT["line"])
STYLE |= {"text.color": LIGHT["ink"], "svg.fonttype": "none"}  # text in the reader's own font
STYLE |= {"svg.hashsalt": "imgcls"}  # the same figure gives the same bytes
Axes = Any  # matplotlib.axes.Axes: matplotlib is imported only where a figure is drawn


def figure(draw: Callable[..., str], *data: Any, size: tuple[int, int] = (440, 330)) -> Markup:
    """A `<picture>` for light and dark pages, of width and height `size` in CSS pixels.

    `draw(axes, *data)` draws in the colours of LIGHT and says in words what the figure shows.
    """
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        drawing = Figure(figsize=(size[0] / 96, size[1] / 96), layout="constrained")
        alt = draw(drawing.add_subplot(), *data)
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
    names = ["loss", "top1", *(name for row in history for name in figures_of(row)), *OF_TRAINING]
    curves = {}
    for key in dict.fromkeys(names):
        series = {}
        for split in ("train",) if key in OF_TRAINING else ("train", "validation"):
            rows = [(row["epoch"], row.get(key)) for row in history if row["split"] == split]
            points = np.array(rows, np.float64).reshape(-1, 2)  # null becomes NaN, a gap
            if np.isfinite(points[:, 1]).any():
                series[split] = points
        if series:
            title = TITLES.get(key, key)
            curves[title] = figure(_curve, title, series, key in OF_TRAINING, size=(440, 230))
    return curves


def _curve(axes: Axes, title: str, series: dict[str, np.ndarray], from_zero: bool) -> str:
    for split, points in series.items():
        colour = LIGHT["muted" if split == "train" and len(series) > 1 else "good"]
        marker = {"marker": "o", "markersize": 2.5} if len(points) < 40 else {}
        axes.plot(*points.T, color=colour, label=split, clip_on=False, **marker)
    axes.grid(axis="y")
    axes.set(xlabel="epoch", ylim=(0 if from_zero else None, None))
    axes.xaxis.get_major_locator().set_params(integer=True)
    if len(series) > 1:
        axes.legend()
    ends = ", ".join(f"{split} ends at {points[-1, 1]:.4g}" for split, points in series.items())
    return f"{title} by epoch: {ends}"


def precision_recall(
    axes: Axes, logits: np.ndarray, labels: np.ndarray, classes: Sequence[int]
) -> str:
    """One-vs-rest curves of `classes`, the first of them in the colours of PALETTE.

    Precision is that of the highest threshold that reaches a recall, at 101 recalls.
    """
    from sklearn.metrics import precision_recall_curve

    probs, grid = softmax(logits.astype(np.float64), axis=1), np.linspace(0, 1, 101)
    gray = {"color": LIGHT["muted"], "linewidth": 0.5, "alpha": 0.6}
    for i, k in reversed(list(enumerate(classes))):  # the first on top
        precision, recall, _ = precision_recall_curve(labels == k, probs[:, k])
        curve = precision[::-1][np.searchsorted(recall[::-1], grid)]
        axes.plot(grid, curve, **({"color": PALETTE[i]} if i < len(PALETTE) else gray))
    axes.set(xlabel="recall", ylabel="precision", xlim=(0, 1.01), ylim=(0, 1.02))
    axes.grid()
    return f"Precision by recall of {len(classes)} classes"


def reliability(axes: Axes, series: dict[str, list[dict[str, Any]]]) -> str:
    """Accuracy against confidence, of one or two results of `scores.reliability` by their names."""
    axes.plot([0, 1], [0, 1], color=LIGHT["muted"], linewidth=0.8, linestyle=(0, (4, 3)))
    for (label, bins), colour in zip(series.items(), (LIGHT["good"], LIGHT["bad"])):
        filled = [(b["confidence"], b["accuracy"], b["count"]) for b in bins if b["count"]]
        x, y, count = np.array(filled).T
        axes.plot(x, y, color=colour, linewidth=0.7, alpha=0.6)
        axes.scatter(x, y, 4 + 150 * count / count.sum(), color=colour, linewidth=0, label=label)
    axes.set(xlabel="confidence", ylabel="accuracy", xlim=(0, 1.01), ylim=(0, 1.02))
    axes.grid()
    axes.legend(loc="upper left")
    return "Accuracy by confidence"


def confidence_counts(axes: Axes, bins: Sequence[dict[str, Any]]) -> str:
    """How many examples each bin of `scores.reliability` holds."""
    edges, counts = [b["lower"] for b in bins], [b["count"] for b in bins]
    axes.bar(edges, counts, 0.92 / len(bins), align="edge", color=LIGHT["good"])
    axes.set(xlabel="confidence", ylabel="examples", xlim=(0, 1.01))
    axes.grid(axis="y")
    return "Number of examples by confidence"


def intervals(axes: Axes, runs: Sequence[dict[str, Any]]) -> str:
    """The top1 and top1_interval of each of the "runs" of `compare`, in percent, from the top."""
    texts = []
    for row, run in enumerate(runs):
        value, low, high = (100 * x for x in (run["top1"], *run["top1_interval"]))
        axes.plot([low, high], [row, row], color=LIGHT["good"], linewidth=2)
        axes.plot(value, row, "o", color=LIGHT["good"], markersize=6)
        texts.append(f"{run['letter']} {value:.2f}% ({low:.2f} to {high:.2f})")
    axes.set_yticks(range(len(runs)), [run["letter"] for run in runs])
    axes.set(ylim=(len(runs) - 0.5, -0.5), xlabel="top-1 accuracy, %")
    axes.grid(axis="x")
    return "; ".join(texts)
