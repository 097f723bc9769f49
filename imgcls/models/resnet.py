"""Residual networks (arXiv 1512.03385, 1603.05027; wide ones 1605.07146), named as in timm."""

from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

# Blocks a stage, and whether blocks have a bottleneck.
STAGES = {18: ((2, 2, 2, 2), False), 34: ((3, 4, 6, 3), False)}
STAGES |= {50: ((3, 4, 6, 3), True), 101: ((3, 4, 23, 3), True)}
he_normal = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


class Block(nn.Module):
    """One residual block: [B, H, W, C] -> [B, H / stride, W / stride, width (* 4)]."""

    width: int
    stride: int
    bottleneck: bool
    preactivation: bool
    conv: Callable
    norm: Callable
    dropout_rate: float = 0.0
    symmetric: bool = False  # pads 3x3 convolutions alike on both sides, whatever their stride

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        stride = (self.stride, self.stride)
        if self.bottleneck:
            shape = [(self.width, 1, (1, 1)), (self.width, 3, stride), (4 * self.width, 1, (1, 1))]
        else:
            shape = [(self.width, 3, stride), (self.width, 3, (1, 1))]
        residual = x
        if self.preactivation:
            x = nn.relu(self.norm(name="bn1")(x))
        if residual.shape[-1] != shape[-1][0] or self.stride > 1:
            # The shortcut is projected from what the first convolution sees.
            project = self.conv(shape[-1][0], (1, 1), stride, name="downsample_0")
            residual = project(x if self.preactivation else residual)
            if not self.preactivation:
                residual = self.norm(name="downsample_1")(residual)
        for i, (width, kernel, strides) in enumerate(shape, start=1):
            last = i == len(shape)
            pads = kernel // 2 if self.symmetric else "SAME"
            x = self.conv(width, (kernel, kernel), strides, padding=pads, name=f"conv{i}")(x)
            if not self.preactivation:
                # With its last scale at zero a block starts as the identity (arXiv 1706.02677).
                init = nn.initializers.zeros if last else nn.initializers.ones
                x = self.norm(scale_init=init, name=f"bn{i}")(x)
            if not last:
                x = nn.relu(self.norm(name=f"bn{i + 1}")(x) if self.preactivation else x)
                x = nn.Dropout(self.dropout_rate, deterministic=not train)(x)
        return residual + x if self.preactivation else nn.relu(residual + x)


class ResNet(nn.Module):
    """ResNet-18, 34, 50 or 101: normalised [B, H, W, C] -> logits float32 [B, num_classes].

    The imagenet stem makes strided windows pad both sides alike, as in the paper and in torch. The
    cifar stem keeps the padding of the published results, which is Linen's "SAME".

    Args:
        depth: 18, 34, 50 or 101 layers
        stem: cifar (3x3, no pooling), for small images; imagenet (7x7, stride 2, max-pooling)
        preactivation: normalise and activate before each convolution (arXiv 1603.05027)
        dropout_rate: before the fully connected layer
    """

    num_classes: int
    depth: int = 18
    stem: str = "cifar"
    preactivation: bool = False
    dropout_rate: float = 0.0
    dtype: jnp.dtype = jnp.float32
    conv: Callable = nn.Conv
    norm: Callable = nn.BatchNorm

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        conv, norm = _bound(self, train)
        x = x.astype(self.dtype)
        large = self.stem == "imagenet"
        kernel, stride = ((7, 7), (2, 2)) if large else ((3, 3), (1, 1))
        x = conv(64, kernel, stride, padding=kernel[0] // 2, name="conv1")(x)
        if not self.preactivation:
            x = nn.relu(norm(name="bn1")(x))
        if large:
            x = nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))
        blocks, bottleneck = STAGES[self.depth]
        fields = bottleneck, self.preactivation, conv, norm, 0.0, large
        x = _stages(x, blocks, 64, *fields, train=train)
        norm = norm if self.preactivation else None
        return _pool_and_classify(self, x, norm, self.dropout_rate, train=train)


class WideResNet(nn.Module):
    """Wide ResNet for small images (WRN-depth-factor): as `ResNet`.

    Args:
        depth: 6 n + 4 layers
        width_factor: times 16, 32 and 64 channels
        dropout_rate: between the convolutions of a block
    """

    num_classes: int
    depth: int = 28
    width_factor: int = 10
    dropout_rate: float = 0.0
    dtype: jnp.dtype = jnp.float32
    conv: Callable = nn.Conv
    norm: Callable = nn.BatchNorm

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        conv, norm = _bound(self, train)
        x = conv(16, (3, 3), name="conv1")(x.astype(self.dtype))
        blocks, width = 3 * ((self.depth - 4) // 6,), 16 * self.width_factor
        x = _stages(x, blocks, width, False, True, conv, norm, self.dropout_rate, train=train)
        return _pool_and_classify(self, x, norm, 0.0, train=train)


def _bound(model: ResNet | WideResNet, train: bool) -> tuple[Callable, Callable]:
    conv = partial(model.conv, use_bias=False, kernel_init=he_normal, dtype=model.dtype)
    norm = partial(model.norm, use_running_average=not train, momentum=0.9, dtype=model.dtype)
    return conv, norm


def _stages(x, blocks, width, *fields, train) -> jax.Array:
    for stage, count in enumerate(blocks):
        for i in range(count):
            stride, name = 2 if stage > 0 and i == 0 else 1, f"layer{stage + 1}_{i}"
            block = Block(width * 2**stage, stride, *fields, name=name)
            x = block(x, train=train)
    return x


def _pool_and_classify(model, x, norm, dropout_rate, *, train) -> jax.Array:
    if norm is not None:  # pre-activation networks end with the activation
        x = nn.relu(norm(name="norm")(x))
    x = x.mean((1, 2))
    x = nn.Dropout(dropout_rate, deterministic=not train)(x.astype(jnp.float32))
    return nn.Dense(model.num_classes, name="head")(x)
