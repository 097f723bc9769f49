"""imgcls: a small image-classification baseline in JAX and Flax.

from imgcls import load
classifier = load("runs/cifar10")
probabilities = classifier(images)  # uint8[N, h, w, C] -> float32[N, K]
"""

import importlib
import sys

if sys.platform == "win32":  # locks need fcntl, and array_record has no wheels
    print("error: imgcls runs on Linux and macOS; on Windows, run it in WSL", file=sys.stderr)
    sys.exit(2)


def __getattr__(name: str):
    places = {"load": "inference.classifier", "sweep": "tuning.sweep"}
    if name in places:  # imported when asked for: the commands' --help need not wait for JAX
        return getattr(importlib.import_module(f"imgcls.{places[name]}"), name)
    raise AttributeError(f"module 'imgcls' has no attribute {name!r}")
