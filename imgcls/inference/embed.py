"""Features of pictures, for search and clustering: what a trained model's last layer is given.

    python -m imgcls embed --workdir=runs/mine --output=features.npz [--checkpoint=latest|best|STEP]
                           IMAGE_OR_FOLDER...

The file has "ids", the paths, and "features", float32[N, D], in one order; .parquet, which needs
pyarrow, has them as columns. Folders are searched as `predict` does. A file that cannot be read is
named on stderr and left out, and the exit code is 2.
"""

import importlib.util
from pathlib import Path

import numpy as np
from absl import flags

from imgcls.arguments import define_harmless
from imgcls.errors import BadExampleError, UserError
from imgcls.inference.classifier import load
from imgcls.inference.predict import find_files, predict
from imgcls.run import cli
from imgcls.run.files import replacing
from imgcls.run.logs import complain, say

POSITIONAL = True  # arguments are not only flags


def define_flags() -> None:
    flags.DEFINE_string("output", "features.npz", "The file to write: .npz or .parquet.")
    define_harmless(checkpoint=True)


def main(arguments: list[str]) -> None:
    paths, output = find_files(arguments), Path(flags.FLAGS.output)
    if output.suffix not in (".npz", ".parquet"):
        raise UserError(f"--output={output} must end in .npz or .parquet")
    if output.suffix == ".parquet" and not importlib.util.find_spec("pyarrow"):
        raise UserError(f"--output={output} needs more: pip install pyarrow, or name an .npz file")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with replacing(output) as file:  # refused, if it is, before the work
            classifier = load(cli.required_workdir(), flags.FLAGS.checkpoint)
            found = {p: row for row, p in zip(predict(classifier, paths, features=True), paths)}
            good = {path: row for path, row in found.items() if isinstance(row, np.ndarray)}
            for error in (row for row in found.values() if isinstance(row, BadExampleError)):
                complain(f"error: {error}")
            if not good:
                raise UserError("there is nothing to write, because no file can be read: see above")
            features = np.stack([*good.values()])
            if output.suffix == ".npz":
                np.savez(file, ids=np.array([*good]), features=features)
            else:
                from pyarrow import FixedSizeListArray, parquet, table

                rows = FixedSizeListArray.from_arrays(features.ravel(), features.shape[1])
                ids = [path.encode(errors="backslashreplace").decode() for path in good]
                parquet.write_table(table({"ids": ids, "features": rows}), file)
    except OSError as error:
        raise UserError(f"--output={output} cannot be written ({error.strerror})") from None
    say(f"{output}: {len(features)} x {features.shape[1]} features")
    if bad := len(found) - len(good):
        raise UserError(f"{bad} of {len(found)} files cannot be read: see above")
