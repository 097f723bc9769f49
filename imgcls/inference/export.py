"""A trained model as one file for other programs, checked before it takes its name.

    python -m imgcls export --workdir=runs/cifar10 --format=stablehlo|onnx|safetensors
                            --output=PATH [--checkpoint=latest|best|STEP] [--raw]

stablehlo and onnx hold preprocessing, weights and softmax: uint8[N, H, W, C] of the model's input
size, for any N, to probabilities float32[N, K]; images of another type are refused.
    stablehlo    for cpu, cuda and tpu: jax.export.deserialize(bytearray of the file).call(images)
    onnx         input "images", output "probabilities", class names in the metadata as JSON;
                 needs pip install -r requirements-onnx.txt
    safetensors  the weights alone, for timm's load_state_dict where timm has the model, else named
                 as in params.Conv_0.kernel; config, class names and temperature in the metadata

Logits are divided by the temperature that `evaluate` fitted on validation, if it did; not with
--raw.
The file is read back and compared with the model on 256 test images, which does not count as an
evaluation; weights on noise, which needs no data. Where probabilities differ by more than 1e-4 it
is not kept, and the exit code is 1.
"""

import importlib.util
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.export
import numpy as np
import safetensors.numpy
from absl import flags
from flax.traverse_util import flatten_dict, unflatten_dict

from imgcls.arguments import define_harmless
from imgcls.config import to_json
from imgcls.data.splits import Split
from imgcls.errors import ImgclsError, UserError
from imgcls.experiment import build_model, open_splits
from imgcls.inference.classifier import Classifier, load
from imgcls.models.names import HEADS, from_torch, to_torch
from imgcls.run import cli
from imgcls.run.files import replacing
from imgcls.run.logs import say

PLATFORMS = ("cpu", "cuda", "tpu")
EXAMPLES, BATCH_SIZE = 256, 64  # of the comparison
TOLERANCE = 1e-4  # of a probability


class FloatModel:
    """A classifier's model with its weights on the host, in float32 and on plain XLA operations."""

    def __init__(self, classifier: Classifier):
        self.config, self.class_names = classifier.config, classifier.class_names
        self._experiment, self.temperature = classifier.experiment, classifier.temperature
        self._model = build_model(self.config, len(self.class_names)).clone(dtype=np.float32)
        self.variables = jax.device_get(classifier.state.eval_variables)
        shape = ("n", *self.config.data.image_size, self.config.data.channels)
        shape = jax.export.symbolic_shape(", ".join(map(str, shape)))
        self.images = jax.ShapeDtypeStruct(shape, np.uint8)

    def apply(self, variables: Any, images: jax.Array) -> jax.Array:
        """Probabilities float32[N, K] of images uint8[N, H, W, C]."""
        images = self._experiment.preprocess(images)
        logits: Any = self._model.apply(variables, images, train=False)
        return self._experiment.task.probabilities(logits / np.float32(self.temperature))

    def __call__(self, images: jax.Array) -> jax.Array:
        return self.apply(self.variables, images)


def to_stablehlo(model: FloatModel) -> bytes:
    return bytes(jax.export.export(jax.jit(model), platforms=PLATFORMS)(model.images).serialize())


def load_stablehlo(path: Path, model: FloatModel) -> Callable[[np.ndarray], Any]:
    return jax.export.deserialize(bytearray(path.read_bytes())).call


def to_onnx(model: FloatModel) -> bytes:
    from onnx import helper

    from imgcls.inference import onnx_graph

    proto = onnx_graph.to_onnx(model, model.images, ("images", "probabilities"))
    helper.set_model_props(proto, {"class_names": json.dumps(model.class_names)})
    return proto.SerializeToString()


def load_onnx(path: Path, model: FloatModel) -> Callable[[np.ndarray], Any]:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda images: session.run(["probabilities"], {"images": images})[0]


def to_safetensors(model: FloatModel) -> bytes:
    names = json.dumps(model.class_names)
    metadata = {"config": json.dumps(to_json(model.config)), "class_names": names}
    metadata["temperature"] = str(model.temperature)
    arrays, name = flatten_dict(model.variables), model.config.model.name
    named = {".".join(path): array for path, array in arrays.items()}
    return safetensors.numpy.save(to_torch(arrays, name) if name in HEADS else named, metadata)


def load_safetensors(path: Path, model: FloatModel) -> Callable[[np.ndarray], Any]:
    named = from_torch(safetensors.numpy.load_file(path))
    paths = flatten_dict(model.variables)
    return jax.jit(partial(model.apply, unflatten_dict({p: named["_".join(p[1:])] for p in paths})))


FORMATS = {
    "stablehlo": (to_stablehlo, load_stablehlo),
    "onnx": (to_onnx, load_onnx),
    "safetensors": (to_safetensors, load_safetensors),
}


def export(classifier: Classifier, test: Split | None, path: Path, *, file_format: str) -> str:
    """Writes the file, compares it with the model on the first 256 examples of `test`, or on noise,
    and returns what was found in a line. `file_format` is a key of `FORMATS`.

    Raises:
        OSError: the path cannot be written.
        UserError: the model has no ONNX form.
        ImgclsError: the file's probabilities differ from the model's.
    """
    write, read = FORMATS[file_format]
    model = FloatModel(classifier)
    shape = (EXAMPLES, *model.images.shape[1:])
    batch = {"image": np.random.default_rng(0).integers(0, 256, shape, np.uint8)}
    if test is not None:
        batch = test.read(np.arange(min(EXAMPLES, len(test))))
    batches = np.split(batch["image"], range(BATCH_SIZE, len(batch["image"]), BATCH_SIZE))
    # By default TPUs, and some GPUs, round the factors of float32 products to fewer bits.
    with jax.default_matmul_precision("float32"):
        path.write_bytes(write(model))
        functions = (read(path, model), jax.jit(model))
        theirs, ours = (np.concatenate([*map(function, batches)]) for function in functions)
    difference = np.abs(theirs - ours).max()
    found = f"largest difference of a probability {difference:.1e}"
    if test is not None:
        accuracy, expected = ((p.argmax(1) == batch["label"]).mean() for p in (theirs, ours))
        of = f"accuracy {accuracy:.4f}, the model's {expected:.4f}, on {len(ours)} test images"
        found = f"{of}; {found}"
    if not difference <= TOLERANCE:  # NaN is an error too
        raise ImgclsError(f"the {file_format} file is not kept, it is not the model: {found}")
    return found


def define_flags() -> None:
    flags.DEFINE_enum("format", None, list(FORMATS), "What to write.")
    flags.DEFINE_string("output", None, "The file to write.")
    define_harmless(checkpoint=True, raw=True)


def main(_: list[str]) -> None:
    workdir, file_format = cli.required_workdir(), flags.FLAGS.format
    if not file_format or not flags.FLAGS.output:
        raise UserError(f"name a --format ({', '.join(FORMATS)}) and the file, with --output=PATH")
    if file_format == "onnx" and not all(map(importlib.util.find_spec, ("onnx", "onnxruntime"))):
        raise UserError("--format=onnx needs more: pip install -r requirements-onnx.txt")
    path = Path(flags.FLAGS.output)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:  # refused, if it is, before the work
            classifier = load(workdir, flags.FLAGS.checkpoint, calibrated=not flags.FLAGS.raw)
            weights = file_format == "safetensors"
            test = None if weights else open_splits(classifier.config, "test")[0]
            found = export(classifier, test, Path(file.name), file_format=file_format)
    except OSError as error:
        raise UserError(
            f"--output={path} cannot be written ({error.strerror}): name a file that can be"
        ) from None
    say(f"{path}: {found}")
