"""Which examples deserve a look, and where in them a network found the class that it answers."""

import csv
import io
import logging
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from scipy.special import softmax

from imgcls.data.splits import Split
from imgcls.errors import first_line
from imgcls.inference.classifier import Classifier
from imgcls.run.files import write_bytes
from imgcls.run.logs import say
from imgcls.steps import predict_step

MOST = 24  # of each kind that a report shows
COLUMNS = ("split", "row", "id", "given", "p_given", "suggested", "p_suggested")


def by_confidence(logits: np.ndarray, labels: np.ndarray, temperature: float | None) -> tuple:
    """Probabilities float64[N] of the answers; rows of the surest mistakes, of the least sure."""
    confidence = softmax(logits / np.float64(temperature or 1), axis=1).max(axis=1)
    order = np.argsort(-confidence, kind="stable")
    mistakes = order[logits.argmax(axis=1)[order] != labels[order]]
    return confidence, mistakes[:MOST], np.argsort(confidence, kind="stable")[:MOST]


def contradicted(probabilities: np.ndarray, labels: np.ndarray) -> dict[int, int]:
    """Row -> likelier class, by confident learning (arXiv 1911.00068, section 3.1).

    The threshold of a class is its mean probability over the examples that are labelled with it.
    A label is contradicted if, of the classes that reach their threshold, the most probable is
    another one, and more probable than the label. The largest difference comes first.
    Probabilities float[N, K] must come from a model that was not trained on these examples.
    """
    own = [probabilities[labels == k, k] for k in range(probabilities.shape[1])]
    thresholds = [p.mean() if len(p) else np.inf for p in own]  # no label, no suggestion
    reached = np.where(probabilities >= thresholds, probabilities, -1)
    margin = reached.max(axis=1) - probabilities[np.arange(len(labels)), labels]
    order = np.argsort(-margin, kind="stable")
    return {int(i): int(reached[i].argmax()) for i in order if margin[i] > 0}


def write_issues(
    path: Path, splits: dict[str, Split], logits: dict[str, np.ndarray], temperature: float | None
) -> dict[str, Any]:
    """Writes examples whose label is `contradicted`, and says how many there are, if any.

    Returns "examples", their number, and "first": MOST of them or fewer, by COLUMNS.
    """
    probabilities = softmax(np.concatenate([*logits.values()]) / (temperature or 1), axis=1)
    labels, issues = np.concatenate([splits[name].labels for name in logits]), []
    places = [(name, row) for name in logits for row in range(len(splits[name]))]
    for i, likelier in contradicted(probabilities, labels).items():
        name, row = places[i]
        found: list[Any] = [name, row, str(splits[name].ids[row])]
        for k in (labels[i], likelier):
            found += [splits[name].class_names[k], round(float(probabilities[i, k]), 4)]
        issues.append(found)
    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerows([COLUMNS, *issues])
    write_bytes(path, file.getvalue().encode(errors="replace"))
    if issues:
        say(f"labels of {' and '.join(logits)} that the model contradicts: {len(issues)}  {path}")
    return {"examples": len(issues), "first": [dict(zip(COLUMNS, x)) for x in issues[:MOST]]}


def looked_at(
    classifier: Classifier, split: Split, logits: np.ndarray, temperature: float | None
) -> dict[str, np.ndarray]:
    """Grad-CAM (arXiv 1610.02391) of the surest mistakes, of which there are some.

    Sums the channels of the last module output of more than two axes, weighted by their mean
    gradient of the likeliest class's logit. Returns "mistakes", rows int64[n], and "looked_at",
    uint8[n, h, w]; nothing where no places are left, as in a perceptron or a transformer.
    """
    exp, shapes = classifier.experiment, list[tuple[int, ...]]()
    rows = by_confidence(logits, split.labels, temperature)[1]

    def logit(last, change, *given):
        def call(method, arguments, keywords, context):
            output = method(*arguments, **keywords)
            if context.method_name == "__call__" and getattr(output, "ndim", 0) > 2:
                shapes.append(output.shape)
                if len(shapes) == last:
                    maps.append(output)
                    return output + change.astype(output.dtype)
            return output

        maps = []
        shapes.clear()
        with nn.intercept_methods(call):
            logits = predict_step(*given, model=exp.model, preprocess=exp.preprocess)
        return logits.max(-1).sum(), maps

    def heat(*arguments):
        gradient, (maps,) = jax.grad(partial(logit, len(shapes)), has_aux=True)(*arguments)
        found = nn.relu((gradient.mean((1, 2), keepdims=True) * maps).sum(-1))
        return jnp.round(255 * found / found.max((1, 2), keepdims=True).clip(1e-12)).astype("u1")

    try:
        given = classifier.state, split.read(rows)["image"]
        jax.eval_shape(partial(logit, 0, 0), *given)  # which tells the shapes
        shape = shapes[-1] if shapes else ()
        if len(shape) == 4 and shape[1:3] != (1, 1):
            maps = exp.jit(heat, once=True)(np.zeros(shape, np.float32), *given)
            return {"mistakes": rows, "looked_at": np.asarray(maps)}
    except Exception as error:  # of a model that nobody here knows: no reason to end an evaluation
        logging.warning("the report cannot show where it looked: %s", first_line(error))
    return {}
