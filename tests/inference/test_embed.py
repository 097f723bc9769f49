"""Features of pictures are what the last layer is given, in a file with their paths."""

from importlib.util import find_spec

import jax
import numpy as np
import pytest
from PIL import Image

from imgcls import load
from tests.commands import run_fresh
from tests.helpers import small_config, write_untrained_run


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("embed") / "run"
    write_untrained_run(folder, small_config(), tuple("0123456789"))
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Three pictures, and a file that is none."""
    folder = tmp_path_factory.mktemp("pictures")
    for i, pixels in enumerate(np.random.default_rng(0).integers(0, 256, (3, 8, 8), np.uint8)):
        Image.fromarray(pixels).save(folder / f"{i}.png")
    (folder / "broken.png").write_bytes(b"broken")
    return folder


def test_the_last_layer_makes_the_probabilities_of_the_features(workdir, pictures):
    classifier = load(workdir, calibrated=False)
    images = [np.asarray(Image.open(pictures / f"{i}.png"))[..., None] for i in range(3)]
    features = classifier(images, features=True)
    head = classifier.state.eval_variables["params"]["Dense_1"]
    expected = jax.nn.softmax(features @ head["kernel"] + head["bias"])
    np.testing.assert_allclose(classifier(images), expected, atol=1e-5)


def embed(workdir, output, *arguments):
    return run_fresh("imgcls", "embed", f"--workdir={workdir}", f"--output={output}", *arguments)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["npz", "parquet"])
def test_the_command_writes_ids_and_features_and_names_what_it_cannot_read(
    workdir, pictures, tmp_path, kind
):
    if kind == "parquet" and not find_spec("pyarrow"):
        pytest.skip("needs pip install pyarrow")
    output = tmp_path / "new" / f"features.{kind}"
    result = embed(workdir, output, pictures)
    assert result.returncode == 2 and "1 of 4 files cannot be read" in result.stderr
    if kind == "npz":
        with np.load(output, allow_pickle=False) as saved:
            ids, features = saved["ids"].tolist(), saved["features"]
    else:
        import pyarrow.parquet

        table = pyarrow.parquet.read_table(output)
        ids, features = table["ids"].to_pylist(), np.array(table["features"].to_pylist())
    assert ids == [str(pictures / f"{i}.png") for i in range(3)]
    paths = [pictures / f"{i}.png" for i in range(3)]
    np.testing.assert_allclose(features, load(workdir)(paths, features=True), atol=1e-5)


@pytest.mark.slow
def test_names_that_are_no_text_are_escaped_in_a_table(workdir, pictures, tmp_path):
    pytest.importorskip("pyarrow", reason="needs pip install pyarrow")
    import pyarrow.parquet

    (tmp_path / "\udcff.png").write_bytes((pictures / "0.png").read_bytes())
    result = embed(workdir, tmp_path / "f.parquet", tmp_path)
    assert result.returncode == 0, result.stderr
    ids = pyarrow.parquet.read_table(tmp_path / "f.parquet")["ids"].to_pylist()
    assert ids == [f"{tmp_path}/\\udcff.png"]


@pytest.mark.slow
def test_another_ending_is_refused_before_the_work(tmp_path, pictures):
    result = embed(tmp_path / "no run", tmp_path / "features.csv", pictures)
    assert result.returncode == 2
    assert (
        result.stderr == f"error: --output={tmp_path}/features.csv must end in .npz or .parquet\n"
    )
