"""A file is the model: in every format, for every family of models, at any batch size."""

import copy
import json
import subprocess
import sys
from importlib.util import find_spec

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax.traverse_util import flatten_dict, unflatten_dict

from imgcls import experiment, load
from imgcls.config import to_json, validate
from imgcls.data.splits import Split
from imgcls.errors import ImgclsError, UserError
from imgcls.experiment import Experiment
from imgcls.inference import export as module
from imgcls.inference.classifier import Classifier
from imgcls.inference.export import FORMATS, FloatModel, export
from imgcls.models import efficientnet, resnet
from imgcls.models.names import from_torch
from tests.commands import run_command, run_fresh
from tests.helpers import ROOT, all_images, small_config, write_untrained_run

needs_onnx = pytest.mark.skipif(
    not (find_spec("onnx") and find_spec("onnxruntime")),
    reason="needs pip install -r requirements-onnx.txt",
)
NAMES = tuple("abcdefghij")
MODELS = {
    # An odd size, so that pooling leaves a row and a column out; the average of the parameters.
    "cnn": {
        "data__image_size": (9, 11),
        "data__channels": 3,
        "optim__ema_decay": 0.9,
        "model__whiten": True,
    },
    "mlp": {"model__dtype": "bfloat16", "model__dense_widths": (16,), "model__dropout_rate": 0.1},
    "resnet": {"model__dropout_rate": 0.1},
    "resnet of photographs": {
        "data__image_size": (33, 32),
        "data__channels": 3,
        "model__stem": "imagenet",
        "model__preactivation": True,
    },
    "vit": {"model__patch": 4, "model__width": 8, "model__depth": 1, "model__heads": 2},
    "vit of mean tokens": {
        **{"model__patch": 4, "model__width": 8, "model__depth": 1, "model__heads": 2},
        **{"model__class_token": False, "model__layer_scale": True},
    },
    "convnext": {"model__widths": (8,), "model__depths": (1,), "data__image_size": (9, 11)},
    "efficientnet_lite": {"data__image_size": (5, 3), "data__std": (0.05,)},
}


def model_config(name):
    channels = MODELS[name].get("data__channels", 1)
    statistics = {"data__mean": (0.3, 0.4, 0.5)[:channels], "data__std": (0.2, 0.3, 0.4)[:channels]}
    config = small_config(name.split()[0], **statistics | MODELS[name])
    validate(config)
    return config


def random_classifier(config):
    """A model whose every variable, running statistics included, is drawn at random."""
    exp = Experiment(config, class_names=NAMES)
    rng = np.random.default_rng(0)

    def draw(x):
        values = rng.uniform(0.5, 1.5, x.shape) if len(x.shape) < 2 else rng.normal(size=x.shape)
        return (values / max(1, np.prod(x.shape[:-1])) ** 0.5).astype(x.dtype)

    return Classifier(exp, jax.tree.map(draw, exp.state_target()), {"class_names": NAMES})


SLOW = ("vit of mean tokens",)
PARAMS = [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in MODELS]


@pytest.fixture(scope="module", params=PARAMS)
def classifier(request):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(resnet.STAGES, 18, ((1, 1), False))  # half of the stages: seconds to compile
        patch.setattr(efficientnet, "STAGES", ((3, 2, 2, 8, 2),))
        yield random_classifier(model_config(request.param))


@pytest.fixture(scope="module")
def mlp():
    return random_classifier(model_config("mlp"))


def random_images(config, examples, seed=0):
    shape = (examples, *config.data.image_size, config.data.channels)
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def random_split(config, examples=30):
    labels = np.arange(examples, dtype=np.int32) % len(NAMES)
    return Split("test", [random_images(config, examples)], labels, range(examples), NAMES)


@pytest.fixture(scope="module")
def expected(classifier):
    """What the classifier itself says, on as many images as no export was compared on."""
    return classifier(random_images(classifier.config, 3, seed=1))


@pytest.mark.parametrize(
    "file_format", [pytest.param(f, marks=needs_onnx if f == "onnx" else ()) for f in FORMATS]
)
def test_a_file_is_the_model_at_any_batch_size(classifier, expected, file_format, tmp_path):
    path = tmp_path / "model"
    line = export(classifier, random_split(classifier.config), path, file_format=file_format)
    assert "on 30 test images" in line
    probabilities = FORMATS[file_format][1](path, FloatModel(classifier))
    found = np.asarray(probabilities(random_images(classifier.config, 3, seed=1)))
    assert found.dtype == np.float32 and found.shape == (3, 10)
    in_bfloat16 = classifier.config.model.dtype == "bfloat16"
    np.testing.assert_allclose(found, expected, atol=0.02 if in_bfloat16 else 1e-5)
    assert expected.std(0).max() > 0.01, "every image gets the same: nothing was compared"


def test_a_file_has_the_temperature_of_its_classifier(mlp, tmp_path):
    plain, warm = tmp_path / "plain", copy.copy(mlp)
    warm.temperature = 2.0
    images, found = random_images(mlp.config, 3), []
    for classifier in (mlp, warm):
        path = tmp_path / "model"
        path.write_bytes(module.to_stablehlo(FloatModel(classifier)))
        found.append(np.asarray(jax.export.deserialize(bytearray(path.read_bytes())).call(images)))
    roots = np.sqrt(found[0])
    np.testing.assert_allclose(found[1], roots / roots.sum(1, keepdims=True), atol=1e-6)
    plain.write_bytes(module.to_safetensors(FloatModel(warm)))
    with safetensors.safe_open(plain, "numpy") as file:
        assert file.metadata()["temperature"] == "2.0"


def test_a_program_runs_everywhere_on_bytes_of_the_right_size_alone(mlp, tmp_path):
    path = tmp_path / "model"
    path.write_bytes(module.to_stablehlo(FloatModel(mlp)))
    exported = jax.export.deserialize(bytearray(path.read_bytes()))
    assert exported.platforms == ("cpu", "cuda", "tpu")
    assert "bf16" not in exported.mlir_module()
    for wrong in (np.zeros((2, 8, 8, 1), np.float32), np.zeros((2, 8, 9, 1), np.uint8)):
        with pytest.raises(ValueError):
            exported.call(wrong)


@needs_onnx
def test_an_onnx_file_takes_bytes_of_the_right_size_alone(mlp, tmp_path):
    import onnxruntime

    path = tmp_path / "model"
    path.write_bytes(module.to_onnx(FloatModel(mlp)))
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert session.get_modelmeta().custom_metadata_map == {"class_names": json.dumps(NAMES)}
    for wrong in (np.zeros((2, 8, 8, 1), np.float32), np.zeros((2, 8, 9, 1), np.uint8)):
        with pytest.raises(Exception, match="INVALID_ARGUMENT"):
            session.run(None, {"images": wrong})


@needs_onnx
def test_what_has_no_onnx_form_is_named():
    from imgcls.inference.onnx_graph import to_onnx

    spec = jax.ShapeDtypeStruct((2, 3), np.float32)
    for function, name in (
        (jnp.sort, "sort"),
        (lambda x: jnp.cumsum(x, 0), "cumsum"),
    ):
        with pytest.raises(UserError, match=rf"the model uses {name}\b.*--format=stablehlo"):
            to_onnx(function, spec, ("x", "y"))


def test_weights_keep_their_names_with_the_config_and_the_classes(classifier, tmp_path):
    path = tmp_path / "weights"
    path.write_bytes(module.to_safetensors(FloatModel(classifier)))
    with safetensors.safe_open(path, "numpy") as file:
        metadata = file.metadata()
        arrays = from_torch({name: file.get_tensor(name) for name in file.offset_keys()})
    config = to_json(classifier.config)
    assert json.loads(metadata["config"]) == config
    assert tuple(json.loads(metadata["class_names"])) == NAMES
    expected = flatten_dict(classifier.state.eval_variables)
    assert arrays.keys() == {"_".join(path[1:]) for path in expected}
    for path, array in expected.items():
        np.testing.assert_array_equal(arrays["_".join(path[1:])], array)


@pytest.mark.parametrize("factor", [1.1, np.nan])
def test_a_file_that_is_not_the_model_is_an_error(mlp, tmp_path, monkeypatch, factor):
    def spoilt(model):
        other = copy.copy(model)
        other.variables = jax.tree.map(lambda x: x * np.float32(factor), model.variables)
        return module.to_safetensors(other)

    monkeypatch.setitem(FORMATS, "safetensors", (spoilt, module.load_safetensors))
    with pytest.raises(ImgclsError, match="the safetensors file is not kept") as error:
        export(mlp, random_split(mlp.config), tmp_path / "model", file_format="safetensors")
    assert error.value.exit_code == 1


def test_a_place_that_cannot_be_written_is_refused_before_the_work(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path, tmp_path / "file/model"):
        result = run_command(
            "imgcls", "export", "--workdir=nowhere", "--format=stablehlo", f"--output={path}"
        )
        assert result.returncode == 2
        assert result.stderr.startswith(f"error: --output={path} cannot be written")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_without_onnx_a_line_says_what_to_install(tmp_path):
    code = "import sys; sys.modules['onnxruntime'] = None; from imgcls.__main__ import main; main()"
    command = [sys.executable, "-c", code, "export"]
    command += ["--workdir=nowhere", "--format=onnx", "--output=x"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr == (
        "error: --format=onnx needs more: pip install -r requirements-onnx.txt\n"
    )


def test_weights_need_no_pictures(tmp_path):
    path, config = tmp_path / "model", small_config(data__name="image_folder", data__dir="gone")
    write_untrained_run(tmp_path / "run", config, NAMES)
    arguments = (f"--workdir={tmp_path / 'run'}", "--format=safetensors", f"--output={path}")
    result = run_command("imgcls", "export", *arguments)
    assert result.returncode == 0, result.stderr
    variables = unflatten_dict(safetensors.numpy.load_file(path), sep=".")
    jax.tree.map(
        np.testing.assert_array_equal, variables["params"], load(tmp_path / "run").state.params
    )


def test_the_command(tmp_path):
    workdir, path = tmp_path / "run", tmp_path / "model"
    write_untrained_run(workdir, small_config(), NAMES)
    arguments = (f"--workdir={workdir}", "--format=stablehlo", f"--output={path}")
    result = run_fresh("imgcls", "export", *arguments)
    assert result.returncode == 0, result.stderr
    line = result.stdout.splitlines()[-1]
    assert not (workdir / "test_evaluations.jsonl").exists()
    classifier = load(workdir)
    (test,) = experiment.open_splits(classifier.config, "test")
    images = all_images(test)
    found = np.asarray(jax.export.deserialize(bytearray(path.read_bytes())).call(images))
    np.testing.assert_allclose(found, classifier(images), atol=1e-6)
    accuracy = (found.argmax(1) == test.labels).mean()
    assert line.startswith(f"{path}: accuracy {accuracy:.4f}, the model's {accuracy:.4f}, on 50 ")
