"""Writes tests/fixtures/timm.json: names and shapes of public models, and logits of tiny ones.

    python tests/models/make_timm.py        where torch, timm 1.0.31 and torchvision 0.29.1 are

Arrays are not kept, because `random_arrays` draws them again.
"""

import json
import zlib
from functools import partial
from pathlib import Path

import numpy as np

FIXTURE = Path(__file__).parents[1] / "fixtures/timm.json"
CLASSES, SIZE = 5, 32


def random_arrays(shapes: dict[str, list[int]]) -> dict[str, np.ndarray]:
    """float32 arrays of these names and shapes: variances over 0, activations of about one."""
    arrays = {}
    for name, shape in shapes.items():
        draws = np.random.default_rng(zlib.crc32(name.encode())).normal(size=shape)
        if name.endswith("running_var"):
            draws = 0.5 + np.abs(draws)
        elif len(shape) > 1 and name.endswith("weight"):
            draws /= np.prod(shape[1:]) ** 0.5
        elif name.endswith(("weight", "gamma")):
            draws = 1 + 0.1 * draws
        else:
            draws *= 0.1
        arrays[name] = draws.astype(np.float32)
    return arrays


def random_images() -> np.ndarray:
    """float32[2, SIZE, SIZE, 3]"""
    return np.random.default_rng(0).normal(size=(2, SIZE, SIZE, 3)).astype(np.float32)


def main() -> None:
    import timm
    import torch
    import torchvision
    from timm.models import convnext, resnet, vision_transformer
    from timm.models._efficientnet_builder import decode_arch_def
    from timm.models.efficientnet import EfficientNet

    few = {"num_classes": CLASSES}
    stages = {"layers": (1, 1, 1, 1)}
    vit = {"img_size": SIZE, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
    lite = [["ds_r1_k3_s1_e1_c16"], ["ir_r2_k3_s2_e6_c24"]]
    tiny = {
        "resnet18": resnet.ResNet(resnet.BasicBlock, **stages, **few),
        "resnet50": resnet.ResNet(resnet.Bottleneck, **stages, **few),
        "vit": vision_transformer.VisionTransformer(**vit, **few),
        "dinov2": vision_transformer.VisionTransformer(**vit, **few, init_values=1e-5),
        "convnext": convnext.ConvNeXt(depths=(1, 1, 2, 1), dims=(8, 8, 16, 16), **few),
        "convnext of nano's form": convnext.ConvNeXt(
            depths=(1, 1, 2, 1), dims=(8, 8, 16, 16), conv_mlp=True, **few
        ),
        "lite": EfficientNet(
            decode_arch_def(lite),
            stem_size=32,
            fix_stem=True,
            num_features=1280,
            pad_type="same",
            act_layer=torch.nn.ReLU6,
            norm_layer=partial(torch.nn.BatchNorm2d, eps=1e-3),
            **few,
        ),
    }
    whole = [
        *("resnet18", "resnet34", "resnet50", "vit_small_patch16_224", "vit_small_patch14_dinov2"),
        *("convnext_tiny", "convnext_nano", "tf_efficientnet_lite0"),
    ]
    models = {f"timm/{name}": timm.create_model(name) for name in whole}
    for name in ("resnet18", "vit_b_16", "convnext_tiny"):
        models[f"torchvision/{name}"] = getattr(torchvision.models, name)()
    shapes = {name: shapes_of(model) for name, model in {**models, **tiny}.items()}
    logits = {}
    for name, model in tiny.items():
        arrays = random_arrays(shapes[name])
        model.load_state_dict({key: torch.from_numpy(a) for key, a in arrays.items()})
        with torch.no_grad():
            images = torch.from_numpy(random_images().transpose(0, 3, 1, 2))
            logits[name] = model.eval()(images).numpy().tolist()
    grid = np.random.default_rng(0).normal(size=(1, 1 + 49, 3)).astype(np.float32)
    resampled = timm.layers.resample_abs_pos_embed(torch.from_numpy(grid), new_size=[4, 5])
    fixture = {"shapes": shapes, "logits": logits, "positions": resampled.numpy().tolist()}
    lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in fixture.items()]
    FIXTURE.write_text("{" + ",\n".join(lines) + "}\n")


def shapes_of(model) -> dict[str, list[int]]:
    kept = {n: list(a.shape) for n, a in model.state_dict().items() if a.dtype.is_floating_point}
    return kept


if __name__ == "__main__":
    main()
