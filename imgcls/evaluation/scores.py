"""What an evaluation computes from the logits and the labels of a split.

Everything is computed once an evaluation, on the host in float64, from each example once.
"""

from collections.abc import Sequence

import numpy as np
from scipy.special import log_softmax, softmax

from imgcls.task import Classification, Task

CALIBRATION_BINS = 15  # as in Guo et al. 2017
TEMPERATURE_BOUNDS = (0.05, 20.0)


def score(
    task: Task,
    logits: np.ndarray,
    labels: np.ndarray,
    class_names: Sequence[str],
    validation: tuple[np.ndarray, np.ndarray] | None = None,
) -> dict:
    """What results.json says of a split: of a classification `evaluate_logits`, else the means of
    the task's figures.

    Args:
        task: of the run.
        logits: float32[N, K].
        labels: int32[N], or float32[N, K] where the task has such.
        class_names: the K names.
        validation: logits and labels on which a classification's temperature is fitted.

    Raises:
        ValueError: as `evaluate_logits`.
    """
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
    """Scores a split, as a dict of plain Python values that `json` writes.

    Args:
        logits: float[N, K].
        labels: int[N], in [0, K).
        class_names: the K names.
        temperature: divides the logits for a second set of calibration figures; fitted on another
            split by `fit_temperature`.

    Returns:
        examples; top1, top5 (top min(5, K)) and their 95% intervals; loss (mean NLL in nats);
        brier (summed over classes, 0 to 2); per_class; macro and weighted averages over the classes
        that occur in the split; confusion_matrix (rows are the truth); calibration. Values that
        are undefined, such as the recall of a class that does not occur, are None.

    Raises:
        ValueError: shapes do not fit, a label is out of range or a logit is not finite.
    """
    logits, labels = _checked(logits, labels)
    if len(class_names) != logits.shape[1]:
        raise ValueError(f"{logits.shape[1]} logits an example, but {len(class_names)} class names")
    rank = _rank_of_truth(logits, labels)
    top1, top5, examples = int((rank < 1).sum()), int((rank < 5).sum()), len(labels)
    figures = _calibration_figures(logits, labels)
    calibration = {
        "bins": CALIBRATION_BINS,
        "ece": figures["ece"],
        "reliability": reliability(logits, labels),
        "temperature": temperature,
    }
    if temperature is not None:
        after = _calibration_figures(logits / temperature, labels)
        calibration |= {"before": figures, "after": after}
    return {
        "examples": examples,
        "top1": top1 / examples,
        "top1_interval": wilson_interval(top1, examples),
        "top5": top5 / examples,
        "top5_interval": wilson_interval(top5, examples),
        "loss": figures["loss"],
        "brier": figures["brier"],
        **_class_scores(logits, labels, class_names),
        "calibration": calibration,
    }


def wilson_interval(successes: int, n: int) -> list[float]:
    """The 95% score interval of a proportion (Wilson 1927): [low, high]."""
    from scipy.stats import binomtest

    interval = binomtest(successes, n).proportion_ci(confidence_level=0.95, method="wilson")
    return [float(interval.low), float(interval.high)]


def fit_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """The temperature T that minimises the NLL of `logits / T` (Guo et al. 2017, section 4.2).

    Where every prediction is right the NLL falls without end as T goes to 0, so T is kept within
    `TEMPERATURE_BOUNDS`. Raises ValueError as `evaluate_logits` does.
    """
    from scipy.optimize import minimize_scalar

    logits, labels = _checked(logits, labels)
    result = minimize_scalar(
        lambda log_t: _nll(logits * np.exp(-log_t), labels),
        bounds=np.log(TEMPERATURE_BOUNDS),
        method="bounded",
    )
    return float(np.exp(result.x))


def reliability(logits: np.ndarray, labels: np.ndarray) -> list[dict]:
    """Confidence against accuracy in equal-width bins (Guo et al. 2017, arXiv 1706.04599).

    Bin m of M holds the examples whose largest probability is in ((m - 1) / M, m / M].

    Returns:
        M dicts of lower, upper, count, and mean confidence and accuracy (None where count is 0).
    """
    confidence = softmax(np.asarray(logits, np.float64), axis=1).max(axis=1)
    correct = logits.argmax(axis=1) == labels
    bin_of = np.ceil(confidence * CALIBRATION_BINS).astype(int).clip(1, CALIBRATION_BINS) - 1
    bins = []
    for index in range(CALIBRATION_BINS):
        inside = bin_of == index
        bins.append(
            {
                "lower": index / CALIBRATION_BINS,
                "upper": (index + 1) / CALIBRATION_BINS,
                "count": int(inside.sum()),
                "confidence": float(confidence[inside].mean()) if inside.any() else None,
                "accuracy": float(correct[inside].mean()) if inside.any() else None,
            }
        )
    return bins


def _checked(logits: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    logits, labels = np.asarray(logits, np.float64), np.asarray(labels)
    if logits.ndim != 2 or labels.shape != logits.shape[:1] or not logits.size:
        raise ValueError(
            f"logits must be [N, K] and labels [N], not {logits.shape} and {labels.shape}"
        )
    outside = np.flatnonzero((labels < 0) | (labels >= logits.shape[1]))
    if outside.size:
        raise ValueError(
            f"label {labels[outside[0]]} of example {outside[0]} is outside [0, {logits.shape[1]})"
        )
    broken = np.flatnonzero(~np.isfinite(logits).all(axis=1))
    if broken.size:
        raise ValueError(
            f"logits of {broken.size} of {len(logits)} examples are not finite, first {broken[0]}"
        )
    return logits, labels


def _rank_of_truth(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """int[N], how many classes precede the true one; ties go to the lower index, as in argmax."""
    truth = np.take_along_axis(logits, labels[:, None], axis=1)
    lower_index = np.arange(logits.shape[1]) < labels[:, None]
    return ((logits > truth) | ((logits == truth) & lower_index)).sum(axis=1)


def _nll(logits: np.ndarray, labels: np.ndarray) -> float:
    return float(-np.take_along_axis(log_softmax(logits, axis=1), labels[:, None], axis=1).mean())


def _calibration_figures(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    error = softmax(logits, axis=1)
    error[np.arange(len(labels)), labels] -= 1
    bins = [bin_ for bin_ in reliability(logits, labels) if bin_["count"]]
    gaps = sum(bin_["count"] * abs(bin_["accuracy"] - bin_["confidence"]) for bin_ in bins)
    return {
        "ece": gaps / len(labels),
        "loss": _nll(logits, labels),
        "brier": float((error**2).sum(axis=1).mean()),
    }


def _class_scores(logits: np.ndarray, labels: np.ndarray, class_names: Sequence[str]) -> dict:
    """Per-class scores, their averages and the confusion matrix.

    The averages take the precision of a class that is never predicted as 0: leaving it out would
    reward a model for giving up on a class.
    """
    from sklearn import metrics

    predicted, classes = logits.argmax(axis=1), np.arange(len(class_names))
    precision, recall, f1, support = metrics.precision_recall_fscore_support(
        labels, predicted, labels=classes, zero_division=np.nan
    )
    probs = softmax(logits, axis=1)
    average_precision = [
        metrics.average_precision_score(labels == k, probs[:, k]) if support[k] else np.nan
        for k in classes
    ]
    columns = {
        "precision": precision,
        "recall": recall,
        "f1": f1,
        "average_precision": np.asarray(average_precision),
    }
    present = {key: np.nan_to_num(column[support > 0]) for key, column in columns.items()}
    weights = support[support > 0]
    return {
        "per_class": [
            {"name": str(name), "support": int(support[k])}
            | {key: None if np.isnan(v[k]) else float(v[k]) for key, v in columns.items()}
            for k, name in enumerate(class_names)
        ],
        "macro": {key: float(v.mean()) for key, v in present.items()},
        "weighted": {key: float(np.average(v, weights=weights)) for key, v in present.items()},
        "confusion_matrix": metrics.confusion_matrix(labels, predicted, labels=classes).tolist(),
    }
