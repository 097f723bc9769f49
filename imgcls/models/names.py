"""timm's and torchvision's names of arrays, and those of the models here.

Modules are named as timm's are, so that one rule is enough: "layer1.0.bn1.weight" there is
"layer1_0_bn1_scale" here. `RENAMED` has what torchvision calls otherwise.
"""

import re
from typing import Any

import numpy as np

# Patterns of names and what replaces them, one after the other.
RENAMED: tuple[tuple[str, Any], ...] = (
    # An export of a model that timm lacks; a model within another.
    (r"^((params|batch_stats|module|model|_orig_mod|backbone)\.)+", ""),
    # The last layer: of timm's ResNet, ConvNeXt and EfficientNet; of torchvision's models.
    (r"^(fc|head\.fc|classifier|heads\.head|classifier\.2)\.(weight|bias)$", r"head.\2"),
    # torchvision's ViT
    *((r"^class_token$", "cls_token"), (r"^conv_proj\.", "patch_embed.proj.")),
    *((r"^encoder\.pos_embedding$", "pos_embed"), (r"^encoder\.ln\.", "norm.")),
    *((r"^encoder\.layers\.encoder_layer_", "blocks."), (r"\.ln_([12])\.", r".norm\1.")),
    *((r"\.self_attention\.in_proj_", ".attn.qkv."), (r"\.self_attention\.out", ".attn")),
    *((r"\.mlp\.(0|linear_1)\.", ".mlp.fc1."), (r"\.mlp\.(3|linear_2)\.", ".mlp.fc2.")),
    # torchvision's ConvNeXt
    *((r"^classifier\.0\.", "head.norm."), (r"^features\.0\.", "stem.")),
    (r"^features\.([246])\.", lambda m: f"stages.{int(m[1]) // 2}.downsample."),
    (r"^features\.([1357])\.", lambda m: f"stages.{int(m[1]) // 2}.blocks."),
    *((r"\.block\.0\.", ".conv_dw."), (r"\.block\.2\.", ".norm.")),
    *((r"\.block\.3\.", ".mlp.fc1."), (r"\.block\.5\.", ".mlp.fc2."), (r"\.layer_sc.*", ".gamma")),
)
UNUSED = re.compile(r"num_batches_tracked$|mask_token$")  # what no model here has a use for
# What timm calls the last layer of the models that it has.
HEADS = {"resnet": "fc", "vit": "head", "convnext": "head.fc", "efficientnet_lite": "classifier"}


def from_torch(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """timm's or torchvision's arrays under the names of the models here, with their axes."""
    converted = {}
    for name, array in arrays.items():
        for pattern, replacement in RENAMED:
            name = re.sub(pattern, replacement, name)
        if name.endswith("weight"):  # OIHW to HWIO, OI to IO
            name = name.removesuffix("weight") + ("kernel" if array.ndim > 1 else "scale")
            array = array.transpose({4: (2, 3, 1, 0), 2: (1, 0)}.get(array.ndim))
        converted[name.replace(".", "_").replace("running_", "")] = array
    return converted


def to_torch(arrays: dict[tuple[str, ...], np.ndarray], model: str) -> dict[str, np.ndarray]:
    """The reverse, with timm's names: of arrays by their paths, of a model that `HEADS` has."""
    converted = {}
    for (collection, *path, leaf), array in arrays.items():
        if leaf in ("kernel", "scale"):
            array = array.transpose({4: (3, 2, 0, 1), 2: (1, 0)}.get(array.ndim))
            leaf = "weight"
        leaf = f"running_{leaf}" if collection == "batch_stats" else leaf
        name = ".".join([*([HEADS[model]] if path == ["head"] else path), leaf])
        # The underscores of conv_dw and patch_embed are timm's own.
        name = re.sub(r"_(?=\d)|(?<=\d)_|(?<=attn|head)_|(?<=mlp)_|(?<=patch_embed)_", ".", name)
        converted[name] = np.ascontiguousarray(array)
    return converted


def fitting(arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    """Keys of a config with the values that fit arrays, as far as their names and shapes tell."""

    def blocks(stage: str) -> int:
        return len({m[0] for name in arrays if (m := re.match(rf"{stage}_\d+_", name))})

    found: dict[str, Any] = {}
    if (stem := arrays.get("conv1_kernel")) is not None:
        depths = {(2, False): 18, (6, False): 34, (6, True): 50, (23, True): 101}
        depth = depths.get((blocks("layer3"), "layer1_0_conv3_kernel" in arrays))
        found = {"name": "resnet", "stem": "imagenet" if len(stem) > 3 else "cifar", "depth": depth}
    elif (stem := arrays.get("patch_embed_proj_kernel")) is not None:
        found = {"name": "vit", "patch": len(stem), "width": stem.shape[3]}
        found |= {"heads": max(min(stem.shape[3] // 64, 16), 1), "depth": blocks("blocks")}
        found |= {
            "class_token": "cls_token" in arrays,
            "layer_scale": "blocks_0_ls1_gamma" in arrays,
        }
    elif (stem := arrays.get("stem_0_kernel")) is not None:
        stages = [f"stages_{i}_blocks" for i in range(4)]
        found = {"name": "convnext", "depths": tuple(map(blocks, stages))}
        found["widths"] = tuple(len(arrays.get(f"{name}_0_norm_bias", ())) for name in stages)
    elif (stem := arrays.get("conv_stem_kernel")) is not None:
        depths = {(3, 40): 0, (4, 40): 1, (4, 48): 2, (5, 48): 3, (6, 56): 4}
        depth = depths.get((blocks("blocks_4"), len(arrays.get("blocks_2_0_bn3_bias", ()))))
        found = {"name": "efficientnet_lite", "depth": depth}
    channels = {} if stem is None else {"data.channels": stem.shape[2]}
    return channels | {f"model.{key}": value for key, value in found.items() if value is not None}
