"""The steps as TPUs and GPUs would run them: lowered anywhere, compiled where a compiler is.

Nothing runs on an accelerator here. Programs are read for what only an accelerator would show:
callbacks to the host, traffic between chips, dtypes and memory.
"""

import importlib.util
import re

import accelerators
import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from imgcls import pixels
from tests.helpers import ROOT

CONFIGS = sorted(path.stem for path in (ROOT / "configs").glob("*.py"))
BRIEFLY = ("digits",)  # the others are slow tests
STEPS = ("train", "small", "eval", "predict", "init")
# Of the compiler itself, for the eigenvectors of whitening on a GPU.
OWN_CALLS = {"Eigh", "cusolver_syevd_ffi"}


@pytest.mark.parametrize(
    "config", [c if c in BRIEFLY else pytest.param(c, marks=pytest.mark.slow) for c in CONFIGS]
)
def test_every_step_of_a_config_is_one_program_of_a_tpu_and_of_a_gpu(config):
    with accelerators.experiment_on(config, "tpu") as experiment:
        steps = [s for s in STEPS if s != "small" or experiment.config.train.small_epochs]
        for step in steps:
            traced = accelerators.traced(experiment, step)
            text = traced.lower(lowering_platforms=("tpu", "cuda")).as_text()
            assert set(re.findall(r"custom_call @(\w+)", text)) <= OWN_CALLS
            assert "callback" not in text
            if experiment.config.model.dtype == "bfloat16" and step == "train":
                assert re.search(r"stablehlo.convolution.*xbf16>", text)


def uniform(*shape):
    return np.random.default_rng(0).uniform(size=shape).astype(np.float32)


@pytest.mark.parametrize("apart", [True, False])
def test_products_of_matrices_move_pixels_as_gathers_do(apart):
    """What a TPU runs, on the CPU: whole positions exactly, others to float32's rounding."""
    images, shape = uniform(3, 9, 7, 2), ((3, 5, 1), (3, 1, 6)) if apart else ((3, 5, 6),) * 2
    rows, columns = (20 * uniform(*s) - 6 for s in shape)
    whole = [np.round(positions) for positions in (rows, columns)]
    expected = pixels.interpolate(images, *whole)
    np.testing.assert_array_equal(pixels.multiplied(images, *whole), expected)
    expected = pixels.interpolate(images, rows, columns)
    np.testing.assert_allclose(pixels.multiplied(images, rows, columns), expected, atol=2e-6)


@pytest.fixture(
    scope="module", params=["digits on v5e-256", "cifar10 on v5e-8", "ResNet-50 on v5e-8"]
)
def compiled(request):
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("pip install -r requirements-tpu-test.txt")
    return *accelerators.compile_train_step(request.param, quick=True), request.param


@pytest.mark.slow
def test_a_training_step_compiled_for_a_tpu_is_what_it_should_be(compiled):
    experiment, program, name = compiled
    text, memory = program.as_text(), program.memory_analysis()
    target = experiment.state_target()
    size = lambda tree: sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
    norms = {path[:-1] for path in flatten_dict(target.params) if "BatchNorm" in str(path)}

    # Between chips: the gradient, the sums of each BatchNorm in both directions, and nothing else.
    found = accelerators.collectives(text)
    assert {kind for kind, _ in found} == {"all-reduce"}
    assert len(found) <= 2 * len(norms) + 2
    moved = sum(size for _, arrays in found for _, size in arrays)
    assert moved <= 1.2 * size(target.params)

    # In bfloat16 where the config says so, but for the whitening and Muon's products.
    if experiment.config.model.dtype == "bfloat16":
        convolutions = re.findall(r"= (\w+)\[([\d,]+)\]\S* convolution\(.*/(?:Conv|conv)\w*/", text)
        assert len(convolutions) > 10
        assert {dtype for dtype, _ in convolutions} == {"bf16"}

    # The state is donated: no second copy of it.
    assert memory.alias_size_in_bytes >= 0.95 * size(target)
    chip = accelerators.CHIPS[accelerators.CASES[name][1].split("-")[0]]
    assert memory.peak_memory_in_bytes < chip[-1] * 2**30
    assert not re.search(r" gather\(", text)  # pixel by pixel
    calls = set(re.findall(r'custom_call_target="([^"]*)"', text))
    assert calls <= {"ConcatBitcast"}  # of the compiler itself
