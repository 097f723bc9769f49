"""EfficientNet (arXiv 1905.11946) in its Lite form; modules are named as in timm."""

import math
from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

# Side of the kernels, stride, expansion, width and blocks of each stage of Lite0.
STAGES = (
    *((3, 1, 1, 16, 1), (3, 2, 6, 24, 2), (5, 2, 6, 40, 2), (3, 2, 6, 80, 3)),
    *((5, 1, 6, 112, 3), (5, 2, 6, 192, 4), (3, 1, 6, 320, 1)),
)
# What multiplies the widths and the numbers of blocks in Lite0 to Lite4.
FACTORS = {0: (1.0, 1.0), 1: (1.0, 1.1), 2: (1.1, 1.2), 3: (1.2, 1.4), 4: (1.4, 1.8)}


class EfficientNetLite(nn.Module):
    """EfficientNet-Lite0 to 4: normalised [B, H, W, C] -> logits float32 [B, num_classes].

    It has ReLU6, no squeeze-and-excitation, and the padding of timm's tf_efficientnet_lite0.

    Args:
        depth: the number behind "Lite", 0 to 4
        dropout_rate: before the fully connected layer
    """

    num_classes: int
    depth: int = 0
    dropout_rate: float = 0.2
    dtype: jnp.dtype = jnp.float32
    conv: Callable = nn.Conv
    norm: Callable = nn.BatchNorm

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        norm = partial(self.norm, not train, momentum=0.9, epsilon=1e-3, dtype=self.dtype)

        def layer(x, width, kernel, name, bn, stride=1, groups=1):
            fan = "fan_out" if groups == 1 else "fan_in"
            how = {"kernel_init": nn.initializers.variance_scaling(2.0, fan, "normal")}
            how |= {"feature_group_count": groups, "use_bias": False, "dtype": self.dtype}
            return norm(name=bn)(self.conv(width, (kernel, kernel), stride, **how, name=name)(x))

        wider, deeper = FACTORS[self.depth]
        x = nn.relu6(layer(x, 32, 3, "conv_stem", "bn1", stride=2))
        for stage, (kernel, stride, expansion, width, count) in enumerate(STAGES):
            if 0 < stage < len(STAGES) - 1:
                count = math.ceil(count * deeper)
            nearest = int(width * wider + 4) // 8 * 8
            width = nearest + 8 * (nearest < 0.9 * width * wider)
            for i in range(count):
                block, inner, y = f"blocks_{stage}_{i}", expansion * x.shape[-1], x
                if widens := int(expansion > 1):
                    y = nn.relu6(layer(y, inner, 1, f"{block}_conv_pw", f"{block}_bn1"))
                names = f"{block}_conv_dw", f"{block}_bn{1 + widens}"
                y = nn.relu6(layer(y, inner, kernel, *names, 1 if i else stride, inner))
                y = layer(y, width, 1, f"{block}_conv_pw{'l' * widens}", f"{block}_bn{2 + widens}")
                x = x + y if i else y
        x = nn.relu6(layer(x, 1280, 1, "conv_head", "bn2")).mean((1, 2))
        x = nn.Dropout(self.dropout_rate, deterministic=not train)(x.astype(jnp.float32))
        return nn.Dense(self.num_classes, name="head")(x)
