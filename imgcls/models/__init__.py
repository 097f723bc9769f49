"""The architectures, in plain Linen.

A model is built as `MODELS[name](num_classes=..., **fields)` and called as
`model(images, train=...)`: normalised images [B, H, W, C] -> logits float32 [B, K].

Its operations are fields, too, of conv, dense, norm, pool (2x2 maximum), act and
over_images (vmap) those it uses.
"""

from typing import Any

from imgcls.models.cnn import CNN, MLP
from imgcls.models.convnext import ConvNeXt
from imgcls.models.efficientnet import EfficientNetLite
from imgcls.models.resnet import ResNet, WideResNet
from imgcls.models.vit import ViT

MODELS: dict[str, Any] = {"cnn": CNN, "mlp": MLP, "resnet": ResNet, "wide_resnet": WideResNet}
MODELS |= {"vit": ViT, "convnext": ConvNeXt, "efficientnet_lite": EfficientNetLite}


def head_of(params: dict[str, Any]) -> str:
    """The name of the last layer: "head", or Linen's own, which keeps older cnn runs readable."""
    return "head" if "head" in params else f"Dense_{sum('Dense_' in name for name in params) - 1}"
