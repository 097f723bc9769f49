"""Images per second of a frozen network at 224 pixels, here and in PyTorch, with the same weights.

    python benchmarks/features.py [--network resnet18 ...] [--batch_size 32] [--repetitions 5]
        [--contenders imgcls-float32 torch-eager-float32 ...]

Needs timm, whose first weights every contender takes; their outputs have to agree. Contenders take
turns as in train_step.py. PyTorch's images are normalised beforehand; this project's are bytes.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import numpy as np
import train_step

OURS = {"resnet18": "resnet18", "resnet50": "resnet50"}  # by timm's names
OURS |= {"tf_efficientnet_lite0": "efficientnet_lite0", "vit_small_patch16_224": "vit"}
OURS |= {"convnext_tiny": "convnext"}
DTYPES, KINDS = ("float32", "bfloat16"), ("imgcls", "torch-eager", "torch-compile")
CONTENDERS = [f"{kind}-{dtype}" for dtype in DTYPES for kind in KINDS]
SIZE, CLASSES, BATCHES = 224, 10, 2  # a head this small costs nothing; batches in a turn
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
TOLERANCES = {"float32": 1e-3, "bfloat16": 0.3}  # of the outputs' deviation


def imgcls(network: str, weights: Path, dtype: str, images: np.ndarray) -> Callable[[], np.ndarray]:
    """`predict_step` of uint8 [B, 224, 224, 3]."""
    import jax
    from flax.traverse_util import flatten_dict, unflatten_dict
    from safetensors.numpy import load_file

    from imgcls import experiment
    from imgcls.config import default_config
    from imgcls.models import names
    from imgcls.run import machine

    machine.start()
    config = default_config(OURS[network])
    config.model.update({"stem": "imagenet"} if "stem" in config.model else {}, dtype=dtype)
    config.data.update(image_size=(SIZE, SIZE), mean=MEAN, std=STD)
    if experiment.compute_dtype(config) != dtype:  # as in train_step.py
        raise NotImplementedError(f"{dtype} is not fast on this CPU")
    exp = experiment.Experiment(config, class_names=range(CLASSES))
    state, arrays = exp.state_target(), names.from_torch(load_file(weights))
    flat = flatten_dict(state.eval_variables)
    found = unflatten_dict({p: arrays["_".join(p[1:])].reshape(x.shape) for p, x in flat.items()})
    state = jax.device_put(state.replace(step=0, opt_state=(), **found), exp.everywhere)
    predict = exp.jit_predict_step()
    return lambda: np.asarray(predict(state, images))


def pytorch(network, weights, dtype, images, *, compiled: bool) -> Callable[[], np.ndarray]:
    """timm's network of normalised images [B, 3, 224, 224] in channels_last."""
    import timm
    import torch
    from safetensors.torch import load_file

    memory = {"dtype": getattr(torch, dtype), "memory_format": torch.channels_last}
    model = timm.create_model(network, num_classes=CLASSES)
    model.load_state_dict(load_file(weights))
    model = model.eval().to(**memory)
    model = torch.compile(model) if compiled else model
    given = torch.from_numpy(((images / 255 - MEAN) / STD).transpose(0, 3, 1, 2)).to(**memory)
    return torch.inference_mode()(lambda: model(given).float().numpy())


def work(arguments: argparse.Namespace) -> tuple[dict[str, Any], Any]:
    """The contender, compiled and warm: its outputs, and what runs it and gives the seconds."""
    kind, dtype = arguments.serve.rsplit("-", 1)
    shape, rng = (arguments.batch_size, SIZE, SIZE, 3), np.random.default_rng(0)
    given = arguments.network[0], arguments.weights, dtype, rng.integers(0, 256, shape, np.uint8)
    predict = imgcls(*given) if kind == "imgcls" else pytorch(*given, compiled="compile" in kind)

    def run(count: int) -> dict[str, float]:
        started = time.perf_counter()
        [predict() for _ in range(count)]
        return {"seconds": time.perf_counter() - started}

    return {"outputs": predict()[:2].tolist()}, run


def measure(network: str, arguments: argparse.Namespace) -> dict[str, Any]:
    import timm
    from safetensors.torch import save_file

    print(f"\n{network}, batch size {arguments.batch_size}", flush=True)
    workers: dict[str, common.Worker] = {}
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder, "weights.safetensors")
        save_file(timm.create_model(network, num_classes=CLASSES).state_dict(), weights)
        given = [f"--network={network}", f"--weights={weights}"]
        given.append(f"--batch_size={arguments.batch_size}")
        for name in arguments.contenders:
            workers[name] = common.Worker(Path(__file__), [f"--serve={name}", *given])
            print(f"{name}: {workers[name].hello.get('error', 'ready')}", flush=True)
    absent = {n: w.hello["error"] for n, w in workers.items() if "error" in w.hello}
    ready = {name: worker for name, worker in workers.items() if name not in absent}
    outputs = {name: np.array(worker.hello["outputs"]) for name, worker in ready.items()}
    for name, found in outputs.items():
        first, tolerance = next(iter(outputs.values())), TOLERANCES[name.rsplit("-", 1)[1]]
        assert np.abs(found - first).max() < tolerance * first.std(), f"{name} is another network"
    seconds, idle = common.take_turns(ready, arguments.repetitions, count=BATCHES)
    images = BATCHES * arguments.batch_size
    rates = {name: images / statistics.median(s) for name, s in seconds.items()}
    ratios = train_step.ratios_of(rates)
    train_step.print_tables(rates, seconds, ratios, images)
    values = {"batch_size": arguments.batch_size, "images_per_second": rates, "ratios": ratios}
    return values | {"seconds": seconds, "absent": absent, "waiting_cpu_share": idle}


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--network", nargs="+", choices=OURS, default=list(OURS))
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=CONTENDERS)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    parser.add_argument("--weights", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        return common.serve(lambda: work(arguments))
    for network in arguments.network:
        common.write_result("features", network, measure(network, arguments))


if __name__ == "__main__":
    main()
