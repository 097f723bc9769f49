import numpy as np
import pytest
from ml_collections import ConfigDict

from imgcls.config import flatten
from imgcls.errors import UserError
from imgcls.tuning.space import canonical, config_at, coordinates, halton_points, read_space
from tests.helpers import small_config

SPACE = {
    "optim.learning_rate": ("log", 0.001, 0.1),
    "optim.ema_decay": ("reverse_log", 0.9, 0.999),
    "model.dropout_rate": ("linear", 0.0, 0.5),
    "train.batch_size": ("log", 8, 40),
    "augment.flip_probability": [0.0, 0.5],
    "data.follow_links": [True, False],
    "model": [
        {"model.name": "mlp"},
        {
            "model.name": "cnn",
            "model.widths": [(8,), (4, 8)],
            "model.norm_momentum": ("linear", 0, 0.9),
        },
    ],
}


NEAR_ONE = ("reverse_log", 0.9, 0.99999)


def points(space=SPACE, trials=40, seed=0, config: ConfigDict | None = None):
    return halton_points(canonical(space), config or small_config(), trials, seed)[0]


def test_more_trials_begin_with_the_same_points_and_another_seed_has_others():
    assert points(trials=40)[:15] == points(trials=15)
    assert points(seed=1) != points()


def test_trial_0_is_the_config_and_all_points_are_distinct():
    config = small_config(train__batch_size=40)
    found = points({"train.batch_size": [10, 20, 40], "optim.clip_norm": [0.0, 1.0]}, config=config)
    assert found[0] == {}
    tried = {tuple(sorted(p.items())) for p in found[1:]}
    # All other combinations, and no end: the space has no more.
    assert len(tried) == len(found) - 1 == 5


def test_values_are_of_their_kind_and_within_their_bounds():
    found = points(trials=200)[1:]
    rates = np.array([p["optim.learning_rate"] for p in found])
    assert rates.min() >= 0.001 and rates.max() <= 0.1
    # As many below the geometric middle as above: so evenly spread is a Halton sequence.
    assert abs((rates < 0.01).mean() - 0.5) < 0.02
    decays = np.array([p["optim.ema_decay"] for p in found])
    assert abs((decays < 0.99).mean() - 0.5) < 0.02
    sizes = [p["train.batch_size"] for p in found]
    assert all(type(size) is int for size in sizes) and (min(sizes), max(sizes)) == (8, 40)
    assert {p["data.follow_links"] for p in found} == {True, False}


def test_a_choice_that_is_a_space_sets_its_keys_alone():
    for p in points()[1:]:
        assert ("model.widths" in p) == ("model.norm_momentum" in p) == (p["model.name"] == "cnn")
    names = coordinates(canonical(SPACE))
    assert "model[1].model.widths" in names and "model[0].model.name" not in names


def test_every_point_makes_a_config_with_its_values_and_keeps_the_rest():
    config = small_config(optim__learning_rate=0.007)
    for p in points(trials=20):
        found = flatten(config_at(config, p))
        assert {key: found[key] for key in p} == {
            key: tuple(value) if type(value) is list else value for key, value in p.items()
        }
        assert found["data.train"] == config.data.train
    assert flatten(config_at(config, {})) == flatten(config)


def test_another_model_brings_its_own_keys_and_leaves_those_of_the_old_one():
    config = small_config(model__dropout_rate=0.3)
    found = config_at(config, {"model.name": "resnet18", "optim.name": "adamw"})
    assert (found.model.name, found.model.depth, found.optim.name) == ("resnet", 18, "adamw")
    assert "widths" not in found.model
    assert config_at(config, {"optim.learning_rate": 0.5}).model.dropout_rate == 0.3


def test_a_space_is_read_from_files_and_from_words(tmp_path):
    file = tmp_path / "space.py"
    file.write_text("def get_space():\n    return {'train.batch_size': [8, 16]}\n")
    space = read_space(
        [str(file), "optim.learning_rate=log(0.01, 1)", "model.widths=[(8,), (4, 8)]"]
    )
    assert space == {
        "train.batch_size": [8, 16],
        "optim.learning_rate": {"log": [0.01, 1]},
        "model.widths": [[8], [4, 8]],
    }


@pytest.mark.parametrize(
    "spec, told",
    [
        ("optim.learning_rate=log(0, 1)", "log(low, high) over 0"),
        ("optim.learning_rate=log(1, 0.1)", "log(low, high)"),
        ("optim.learning_rate=lgo(0.1, 1)", "linear(low, high)"),
        ("optim.ema_decay=reverse_log(0.9, 1.0)", "under 1"),
        ("optim.learning_rate", "KEY=VALUES"),
        ("optim.learning_rate=os.remove('x')", "KEY=VALUES"),
        ("train.batch_size=[]", "must be a list of values"),
        ("train.batch_size={8, 16}", "must be a list of values"),
        ("optim.learning_rate=1j", "must be a list of values"),
        ("train.epochs=[1, 2]", "must be the same in all trials"),
        ("nowhere.py", "No such file"),
    ],
)
def test_what_is_no_space_is_refused_in_a_sentence(spec, told):
    with pytest.raises(UserError) as error:
        read_space([spec])
    assert told in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("source", ["", "1 / 0", "def get_space(): pass", "get_space = 5", "("])
def test_a_file_that_gives_no_space_is_named(tmp_path, source):
    (tmp_path / "mine.py").write_text(source)
    with pytest.raises(UserError, match=r"mine\.py cannot be read .*: name a file with get_space"):
        read_space([f"{tmp_path}/mine.py"])


def test_rounding_leaves_no_range():
    decays = [p["optim.ema_decay"] for p in points({"optim.ema_decay": NEAR_ONE})[1:]]
    assert all(0.9 <= decay <= 0.99999 for decay in decays)
    assert read_space(["optim.ema_decay=reverse_log(-3, 0)"])
    points({"optim.ema_decay": ("reverse_log", -3, 0)})


def test_one_choice_may_be_a_space():
    space = read_space(['model={"model.name": "mlp", "model.dropout_rate": [0.0, 0.1]}'])
    assert all(p["model.name"] == "mlp" for p in points({"model": {"model.name": "mlp"}})[1:])
    assert list(coordinates(space)) == ["model[0].model.dropout_rate"]


@pytest.mark.parametrize(
    "point, told",
    [
        ({"optim.learning_rat": 0.1}, "optim.learning_rat"),
        ({"optim.learning_rate": -1.0}, "must be a number over 0"),
        ({"model.name": "mlp", "model.widths": [8]}, "config.model.widths is not a key"),
        ({"optim.name": "sgd", "optim.adam_learning_rate": 0.1}, "adam_learning_rate is not a key"),
    ],
)
def test_a_point_that_is_no_config_is_refused(point, told):
    with pytest.raises(UserError, match=told):
        config_at(small_config(), point)
