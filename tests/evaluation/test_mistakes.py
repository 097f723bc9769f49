"""Which examples an evaluation points at, and where the network looked in them."""

import csv

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import pytest

from imgcls.data.splits import Split
from imgcls.evaluation.mistakes import contradicted, looked_at, write_issues
from imgcls.experiment import Experiment
from imgcls.inference.classifier import Classifier
from imgcls.models import MODELS
from tests.helpers import small_config


def test_labels_are_contradicted_by_hand():
    """Thresholds are (0.9 + 0.5 + 0.1) / 3 = 0.5 and (0.8 + 0.3) / 2 = 0.55; class 2 has none."""
    probabilities = np.array(
        [
            [0.9, 0.1, 0.0],  # 0, as it is labelled
            [0.5, 0.2, 0.3],
            [0.1, 0.55, 0.35],  # labelled 0, reaches the threshold of 1
            [0.2, 0.8, 0.0],
            [0.65, 0.3, 0.05],  # labelled 1, reaches the threshold of 0
        ]
    )
    assert contradicted(probabilities, np.array([0, 0, 0, 1, 1])) == {2: 1, 4: 0}


def test_the_largest_difference_comes_first_and_below_the_thresholds_nothing_is_said():
    probabilities = np.array(
        [[0.9, 0.1], [0.9, 0.1], [0.3, 0.7], [0.8, 0.2], [0.9, 0.1], [0.2, 0.8]]
    )
    # Thresholds are 0.7 of class 0 (rows 0, 1, 2) and 0.4 (rows 3, 4, 5) of class 1.
    assert [*contradicted(probabilities, np.array([0, 0, 0, 1, 1, 1]))] == [4, 3, 2]
    unsure = np.array([[0.9, 0.1], [0.45, 0.55], [0.1, 0.9], [0.4, 0.6]])
    assert contradicted(unsure, np.array([0, 0, 1, 1])) == {}  # 0.55 is below 0.75


def test_a_label_that_is_likelier_than_all_that_reach_their_threshold_stands():
    probabilities = np.array([[0.95, 0.05], [0.6, 0.4], [0.9, 0.1], [0.55, 0.45]])
    # Of row 1 only class 1 reaches its threshold, 0.275; it is less likely than the label.
    assert 1 not in contradicted(probabilities, np.array([0, 0, 1, 1]))


def toy_split(labels, images=None):
    images = np.zeros((len(labels), 8, 8, 1), np.uint8) if images is None else images
    ids = [f'train:=a, "b"/{i}.png' for i in range(len(labels))]
    return Split("toy", [images], np.array(labels, np.int32), ids, ("cat", "dog"))


def test_issues_of_several_splits_are_a_table(tmp_path, capsys):
    splits = {"test": toy_split([0, 1]), "validation": toy_split([0, 1, 0])}
    sure = np.array([[9.0, 0.0], [0.0, 9.0]], np.float32)
    logits = {"test": sure, "validation": sure[[0, 1, 1]]}
    found = write_issues(tmp_path / "issues.csv", splits, logits, 3.0)
    expected = {"split": "validation", "row": 2, "id": splits["validation"].ids[2], "given": "cat"}
    expected |= {"p_given": 0.0474, "suggested": "dog", "p_suggested": 0.9526}
    assert found == {"examples": 1, "first": [expected]}
    with open(tmp_path / "issues.csv", newline="") as file:
        assert [*csv.DictReader(file)] == [{key: str(value) for key, value in expected.items()}]
    assert "labels of test and validation that the model contradicts: 1 " in capsys.readouterr().out


class Averaged(nn.Module):
    """A convolution, whose outputs are averaged over the image: there Grad-CAM is the CAM."""

    num_classes: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x, *, train):
        return nn.Dense(self.num_classes)(nn.Conv(4, (3, 3))(x).mean((1, 2)))


class Tokens(nn.Module):
    """What comes after the convolution has no places any more."""

    num_classes: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x, *, train):
        x = nn.Conv(4, (2, 2), (2, 2))(x)
        x = nn.LayerNorm()(x.reshape(len(x), -1, 4))
        return nn.Dense(self.num_classes)(x[:, 0])


class Body(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return nn.Conv(4, (3, 3))(x), None


class Scanned(nn.Module):
    """Its maps are inside a loop, from which JAX lets nothing out."""

    num_classes: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x, *, train):
        x = nn.Conv(4, (3, 3))(x)
        loop = nn.scan(Body, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
        return nn.Dense(self.num_classes)(loop()(x, None)[0].mean((1, 2)))


@pytest.fixture
def classifier(request, monkeypatch):
    monkeypatch.setitem(MODELS, "toy", request.param)
    config = small_config("toy", train__batch_size=8)
    images = np.random.default_rng(0).integers(0, 256, (8, 8, 8, 1), np.uint8)
    train = toy_split([0, 1] * 4, images)
    experiment = Experiment(config, splits={"train": train})
    return Classifier(experiment, experiment.compile_init()(), {})


@pytest.mark.parametrize("classifier", [Averaged], indirect=True)
def test_where_it_looked_is_the_weighted_sum_of_the_last_maps(classifier):
    exp, state = classifier.experiment, classifier.state
    train = exp.splits["train"]
    logits = classifier.logits(train, quiet=True)
    found = looked_at(classifier, train, logits, None)
    rows, likeliest = found["mistakes"], logits.argmax(1)
    assert sorted(rows) == [i for i in range(8) if likeliest[i] != train.labels[i]]
    conv, dense = (state.eval_variables["params"][name] for name in ("Conv_0", "Dense_0"))
    maps = nn.Conv(4, (3, 3)).apply({"params": conv}, exp.preprocess(train.read(rows)["image"]))
    cam = np.einsum("bhwc,cb->bhw", maps, dense["kernel"][:, likeliest[rows]]).clip(0)
    expected = 255 * cam / cam.max((1, 2), keepdims=True).clip(1e-12)
    np.testing.assert_allclose(found["looked_at"].astype(float), expected, atol=1)
    assert found["looked_at"].shape == (len(rows), 8, 8) and len(rows) > 1


@pytest.mark.parametrize("classifier", [Tokens], indirect=True)
def test_without_places_at_the_end_nothing_is_shown(classifier, caplog):
    train = classifier.experiment.splits["train"]
    assert looked_at(classifier, train, -classifier.logits(train, quiet=True), None) == {}
    assert not caplog.records


@pytest.mark.parametrize("classifier", [Scanned], indirect=True)
def test_a_model_that_cannot_be_looked_into_ends_no_evaluation(classifier, caplog):
    train = classifier.experiment.splits["train"]
    logits = classifier.logits(train, quiet=True)
    wrong = np.where((logits.argmax(1) == train.labels)[:, None], -logits, logits)
    assert looked_at(classifier, train, wrong, None) == {}
    (warning,) = caplog.messages
    assert warning.startswith("the report cannot show where it looked: ") and "\n" not in warning
