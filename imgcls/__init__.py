"""imgcls: a small image-classification baseline in JAX and Flax.

from imgcls import load
classifier = load("runs/cifar10")
probabilities = classifier(images)  # uint8[N, h, w, C] -> float32[N, K]
"""


def __getattr__(name: str):
    if name == "load":  # imported when asked for: the commands' --help need not wait for JAX
        from imgcls.inference.classifier import load

        return load
    if name == "sweep":
        from imgcls.tuning.sweep import sweep

        return sweep
    raise AttributeError(f"module 'imgcls' has no attribute {name!r}")
