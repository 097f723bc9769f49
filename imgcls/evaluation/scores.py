"""What an evaluation computes from the logits and the labels of a split.

Everything is computed on the host in float64, from each example once.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.special import log_softmax, softmax

from imgcls.errors import DivergedError
from imgcls.task import Classification, Task

BINS = 15  # of confidence, as in Guo et al. 2017
TEMPERATURE_BOUNDS = (0.05, 20.0)


def score(
    task: Task,
    logits: np.ndarray,
    labels: np.ndarray,
    class_names: Sequence[str],
    validation: tuple[np.ndarray, np.ndarray] | None = None,
) -> dict:
    """What results.json says of logits float32[N, K] and the labels that the task has.

    Of a classification that is `evaluate_logits`, else the means of the task's figures. The
    temperature of a classification is fitted on the logits and labels of `validation`.

    Raises:
        DivergedError: a logit is not finite.
        ValueError: as `evaluate_logits`; or a figure is not finite.
    """
    _check_finite(logits)
    if isinstance(task, Classification) and labels.ndim == 1:
        temperature = fit_temperature(*validation) if validation else None
        return evaluate_logits(logits, labels, class_names, temperature=temperature)
    figures = task.figures(logits, task.targets(labels, len(class_names)), train=False)
    means = {name: float(np.asarray(x, np.float64).mean()) for name, x in figures.items()}
    if not np.isfinite(list(means.values())).all():
        raise ValueError(f"the figures are not finite: {means}")
    return {"examples": len(labels), "figures": list(means), **means}


def evaluate_logits(
    logits: np.ndarray,
    labels: np.ndarray,
    class_names: Sequence[str],
    *,
    temperature: float | None = None,
) -> dict:
    """Scores logits float[N, K] of labels int[N], as plain Python values that `json` writes.

    The temperature of `fit_temperature` on another split adds a second set of calibration figures.

    Returns:
        examples; top1, top5 (top min(5, K)) and their 95% intervals; loss (mean NLL in nats);
        brier (summed over classes, 0 to 2); per_class; macro and weighted averages over the classes
        that occur in the split; confusion_matrix (rows are the truth); calibration. Values that
        are undefined, such as the recall of a class that does not occur, are None.

    Raises:
        DivergedError: a logit is not finite.
        ValueError: shapes do not fit, or a label is out of range.
    """
    logits, labels = checked(logits, labels)
    if len(class_names) != logits.shape[1]:
        raise ValueError(f"{logits.shape[1]} logits an example, but {len(class_names)} class names")
    truth = np.take_along_axis(logits, labels[:, None], axis=1)
    lower = np.arange(logits.shape[1]) < labels[:, None]  # ties go to these, as in argmax
    rank = ((logits > truth) | ((logits == truth) & lower)).sum(axis=1)
    n, accuracy = len(labels), dict[str, Any]()
    for k in (1, 5):
        right = int((rank < k).sum())
        accuracy |= {f"top{k}": right / n, f"top{k}_interval": wilson_interval(right, n)}
    before, bins = _calibration(logits, labels), reliability(logits, labels)
    calibration = {"bins": BINS, "ece": before["ece"], "reliability": bins}
    calibration["temperature"] = temperature
    if temperature is not None:
        calibration |= {"before": before, "after": _calibration(logits / temperature, labels)}
    return {
        "examples": n,
        **accuracy,
        "loss": before["loss"],
        "brier": before["brier"],
        **_class_scores(logits, labels, class_names),
        "calibration": calibration,
    }


def wilson_interval(successes: int, n: int) -> list[float]:
    """The 95% score interval of a proportion (Wilson 1927): [low, high]."""
    from scipy.stats import binomtest

    return [float(x) for x in binomtest(successes, n).proportion_ci(method="wilson")]


def fit_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """The temperature T that minimises the NLL of `logits / T` (Guo et al. 2017, section 4.2).

    Where every prediction is right the NLL falls without end as T goes to 0. Its sum over the
    examples therefore includes log(T)^2 / 2, a prior that counts where there are few. Raises what
    `evaluate_logits` does.
    """
    from scipy.optimize import minimize_scalar

    logits, labels = checked(logits, labels)
    nll = lambda log_t: _nll(logits * np.exp(-log_t), labels) + log_t**2 / (2 * len(labels))
    result = minimize_scalar(nll, bounds=np.log(TEMPERATURE_BOUNDS), method="bounded")
    return float(np.exp(result.x))


def reliability(logits: np.ndarray, labels: np.ndarray) -> list[dict]:
    """Confidence against accuracy in equal-width bins (Guo et al. 2017, arXiv 1706.04599).

    Bin m of M holds the examples whose largest probability is in ((m - 1) / M, m / M].

    Returns:
        M dicts of lower, upper, count, and mean confidence and accuracy (None where count is 0).
    """
    confidence = softmax(np.asarray(logits, np.float64), axis=1).max(axis=1)
    correct = logits.argmax(axis=1) == labels
    bin_of = np.ceil(confidence * BINS).clip(1, BINS) - 1
    bins: list[dict[str, Any]] = []
    for m in range(BINS):
        inside = bin_of == m
        bins.append({"lower": m / BINS, "upper": (m + 1) / BINS, "count": int(inside.sum())})
        for key, values in (("confidence", confidence), ("accuracy", correct)):
            bins[m][key] = float(values[inside].mean()) if inside.any() else None
    return bins


def checked(logits: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    logits, labels = np.asarray(logits, np.float64), np.asarray(labels)
    if logits.ndim != 2 or labels.shape != logits.shape[:1] or not logits.size:
        shapes = f"{logits.shape} and {labels.shape}"
        raise ValueError(f"logits must be [N, K] and labels [N], not {shapes}")
    classes = logits.shape[1]
    for i in np.flatnonzero((labels < 0) | (labels >= classes))[:1]:
        raise ValueError(f"label {labels[i]} of example {i} is outside [0, {classes})")
    _check_finite(logits)
    return logits, labels


def _check_finite(logits: np.ndarray) -> None:
    broken = np.flatnonzero(~np.isfinite(logits).all(axis=1))
    if broken.size:
        count = f"{broken.size} of {len(logits)} examples"
        raise DivergedError(f"logits of {count} are not finite, first {broken[0]}")


def _nll(logits: np.ndarray, labels: np.ndarray) -> float:
    return float(-np.take_along_axis(log_softmax(logits, axis=1), labels[:, None], axis=1).mean())


def _calibration(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    error = softmax(logits, axis=1)
    error[np.arange(len(labels)), labels] -= 1
    bins = [b for b in reliability(logits, labels) if b["count"]]
    gaps = sum(b["count"] * abs(b["accuracy"] - b["confidence"]) for b in bins)
    brier = float((error**2).sum(axis=1).mean())
    return {"ece": gaps / len(labels), "loss": _nll(logits, labels), "brier": brier}


def _class_scores(logits: np.ndarray, labels: np.ndarray, class_names: Sequence[str]) -> dict:
    """Per-class scores, their averages and the confusion matrix.

    The averages take the precision of a class that is never predicted as 0: leaving it out would
    reward a model for giving up on a class.
    """
    from sklearn import metrics

    predicted, probs, classes = logits.argmax(1), softmax(logits, axis=1), range(len(class_names))
    precision, recall, f1, support = metrics.precision_recall_fscore_support(
        labels, predicted, labels=classes, zero_division=np.nan
    )
    average_precision = [
        metrics.average_precision_score(labels == k, probs[:, k]) if support[k] else np.nan
        for k in classes
    ]
    columns = {"precision": precision, "recall": recall, "f1": f1}
    columns["average_precision"] = np.array(average_precision)
    occurs = support > 0
    present = {key: np.nan_to_num(column[occurs]) for key, column in columns.items()}
    return {
        "per_class": [
            {"name": str(name), "support": int(support[k])}
            | {key: None if np.isnan(v[k]) else float(v[k]) for key, v in columns.items()}
            for k, name in enumerate(class_names)
        ],
        "macro": {key: float(v.mean()) for key, v in present.items()},
        "weighted": {k: float(np.average(v, weights=support[occurs])) for k, v in present.items()},
        "confusion_matrix": metrics.confusion_matrix(labels, predicted, labels=classes).tolist(),
    }
