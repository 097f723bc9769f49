"""Targets, figures and class weights of a task."""

import jax.numpy as jnp
import numpy as np
import pytest

from imgcls.errors import DivergedError
from imgcls.evaluation.scores import score
from imgcls.task import Classification, balanced_weights

LOGITS = jnp.array([[2.0, 0.0, -1.0], [0.0, 1.0, 3.0]])


def test_labels_become_one_hot_and_distributions_pass():
    task, soft = Classification(), jnp.array([[0.2, 0.8, 0.0]])
    np.testing.assert_array_equal(task.targets(jnp.array([2, 0]), 3), [[0, 0, 1], [1, 0, 0]])
    assert task.targets(soft, 3) is soft


def test_smoothing_and_weights_are_for_training_alone():
    targets = Classification().targets(jnp.array([0, 1]), 3)
    plain = Classification().figures(LOGITS, targets, train=False)
    task = Classification(0.1, "balanced", (6, 2, 0))
    np.testing.assert_array_equal(task.figures(LOGITS, targets, train=False)["loss"], plain["loss"])
    np.testing.assert_array_equal(plain["top1"], [True, False])
    log_probabilities = LOGITS - jnp.log(jnp.exp(LOGITS).sum(1, keepdims=True))
    smoothed = 0.9 * targets + 0.1 / 3
    expected = -(smoothed * log_probabilities).sum(1) * jnp.array([8 / 12, 2.0])
    np.testing.assert_allclose(task.figures(LOGITS, targets, train=True)["loss"], expected, 1e-6)


def test_a_class_without_examples_weighs_nothing_and_changes_no_other():
    weights = balanced_weights((6, 2, 0))
    np.testing.assert_allclose(weights, [8 / 12, 2, 0], rtol=1e-6)
    np.testing.assert_allclose(weights[:2], balanced_weights((6, 2)), rtol=1e-6)
    np.testing.assert_allclose(balanced_weights((3, 1)), [4 / 6, 2], rtol=1e-6)


class Halves:
    """Scores differ by example, so that their mean tells that none is left out."""

    def targets(self, labels, num_classes):
        return labels

    def figures(self, logits, targets, *, train):
        assert not train
        return {"loss": (logits - targets).sum(1), "right": targets[:, 0] > 0}


def test_of_another_task_the_means_of_its_figures_are_the_scores():
    labels = np.array([[1.0, 0, 0], [0.0, 0, 0]], np.float32)
    found = score(Halves(), np.asarray(LOGITS), labels, "abc")
    assert found == {"examples": 2, "figures": ["loss", "right"], "loss": 2.0, "right": 0.5}
    assert score(Classification(), np.asarray(LOGITS), labels, "abc")["figures"] == ["loss", "top1"]
    with pytest.raises(DivergedError, match="not finite"):
        score(Halves(), np.full_like(LOGITS, np.inf), labels, "abc")
