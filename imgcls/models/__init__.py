"""The architectures.

A model is built as `MODELS[name](num_classes=..., conv=..., norm=..., **fields)` and called as
`model(images, train=...)`: normalised images [B, H, W, C] -> logits float32 [B, K].
"""

from imgcls.models.cnn import CNN, MLP
from imgcls.models.resnet import ResNet, WideResNet

MODELS = {"cnn": CNN, "mlp": MLP, "resnet": ResNet, "wide_resnet": WideResNet}
