"""The default for a folder of photographs, and the same network in PyTorch in the same time.

    python benchmarks/photographs.py --data_dir=PATH [--seed=0] [--workdir=runs/photographs]
        [--quick] [--config.key=value ...]

This project trains as its users would, by main.py. PyTorch then gets the seconds that this took,
the same decoded pictures, network, batch size, AdamW, cosine (over the seconds) and smoothing, and
torchvision's flip, random-resized-crop and RandAugment. Each opens the test split once. Results go
to results/photographs.json.
"""

import math
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import common
import networks
import numpy as np
from ml_collections import ConfigDict

from imgcls.data.splits import Split
from imgcls.experiment import load_config, open_splits
from imgcls.run import machine
from imgcls.run.workdir import read_json

CONFIG = "configs/image_folder.py"
QUICK = ("train.steps=4", "data.image_size=(32,32)", "model.widths=(8,8)")


def ours(workdir: Path, *flags: str) -> dict[str, Any]:
    """Trains and tests by the command, unless the workdir has it."""
    command = [sys.executable, str(common.ROOT / "main.py"), f"--config={common.ROOT / CONFIG}"]
    subprocess.run([*command, f"--workdir={workdir}", *flags], check=True)
    results = read_json(workdir / "results.json")
    return {key: results[key] for key in ("top1", "seconds", "step", "parameters")}


def torch_in(seconds: float, config: ConfigDict, train: Split, test: Split) -> dict[str, Any]:
    """Trains the config's network in PyTorch for so many seconds, augmentation and all."""
    import torch
    from torchvision.transforms import v2

    torch.manual_seed(config.seed)
    torch.set_num_threads(machine.cpu_cores())
    d, a, o, batch = config.data, config.augment, config.optim, config.train.batch_size
    augment = v2.Compose(
        [
            v2.RandomHorizontalFlip(a.flip_probability),
            v2.RandomResizedCrop(d.image_size, (1 - a.crop_fraction, 1.0), antialias=True),
            v2.RandAugment(a.rand_augment_layers, round(3 * a.rand_augment_magnitude)),  # of 30
        ]
    )
    normalize = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(d.mean, d.std)])
    model = networks.torch_module(networks.layers_of(config, len(train.class_names)))
    memory: Any = {"memory_format": torch.channels_last}

    read = lambda split, rows: torch.from_numpy(split.read(rows)["image"]).permute(0, 3, 1, 2)
    model(normalize(read(train, np.arange(2))))  # its layers learn their sizes
    model.to(**memory)
    for layer in model.modules():
        for name in getattr(layer, "frozen", []):
            getattr(layer, name).requires_grad_(False)
    trained = [p for p in model.parameters() if p.requires_grad]
    decay = {True: o.weight_decay, False: 0.0}  # kernels and matrices, and the others
    parts = [[p for p in trained if (p.ndim > 1) == kernels] for kernels in decay]
    groups = [{"params": p, "weight_decay": w} for p, w in zip(parts, decay.values())]
    optimizer = torch.optim.AdamW(groups, lr=o.learning_rate)
    loss_of = torch.nn.CrossEntropyLoss(label_smoothing=config.task.label_smoothing)
    rng, step, order = np.random.default_rng(config.seed), 0, np.empty(0, int)
    started = time.perf_counter()
    while (passed := (time.perf_counter() - started) / seconds) < 1:
        for group in optimizer.param_groups:
            group["lr"] = o.learning_rate * (1 + math.cos(math.pi * passed)) / 2
        if len(order) < batch:
            order = rng.permutation(len(train))
        rows, order = order[:batch], order[batch:]
        images = torch.stack([augment(image) for image in read(train, rows)])
        optimizer.zero_grad(set_to_none=True)
        logits = model(normalize(images).to(**memory))
        loss_of(logits, torch.from_numpy(train.labels[rows]).long()).backward()
        optimizer.step()
        step += 1
    spent = time.perf_counter() - started
    model.eval()
    with torch.inference_mode():
        parts = np.array_split(np.arange(len(test)), len(test) // 64 + 1)
        answers = [model(normalize(read(test, rows)).to(**memory)).argmax(1) for rows in parts]
    top1 = float((torch.cat(answers).numpy() == test.labels).mean())
    found: dict[str, Any] = {"top1": top1, "seconds": round(spent, 1), "step": step}
    return found | {"parameters": sum(p.numel() for p in trained)}


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = common.parser(__doc__)
    parser.add_argument("--data_dir", required=True)
    parser.add_argument("--workdir", default="runs/photographs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true")
    arguments, flags = parser.parse_known_args(argv)
    workdir, name = Path(arguments.workdir), Path(arguments.data_dir).name
    flags += [f"--config.data.dir={arguments.data_dir}", f"--config.seed={arguments.seed}"]
    found = {"imgcls": ours(workdir, *flags, *(f"--config.{q}" for q in QUICK if arguments.quick))}
    config = load_config(workdir)
    try:
        seconds = found["imgcls"]["seconds"]
        found["torch"] = torch_in(seconds, config, *open_splits(config, "train", "test"))
    except ModuleNotFoundError as error:
        found["torch"] = {"error": f"{error.name} is not installed"}
    if not arguments.quick:
        size = "x".join(map(str, config.data.image_size))
        common.write_result("photographs", f"{name} at {size}, seed {arguments.seed}", found)
    print(common.table([["", *found["imgcls"]], *([k, *v.values()] for k, v in found.items())]))
    return found


if __name__ == "__main__":
    main()
