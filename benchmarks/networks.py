"""The networks as a list of layers, and that list in each of the alternatives.

Layers are (kind, *arguments): whiten (width: frozen 2x2 filters, and a bias), conv (width, kernel,
stride), pool (2x2 maximum), norm (whether it has a scale), gelu, relu, block (layers,
shortcut), max and mean (over the image), dropout (rate), dense (width).
"""

from typing import Any

Layers = tuple[tuple[Any, ...], ...]


def layers_of(config: Any, num_classes: int) -> Layers:
    m = config.model
    if m.name == "resnet":
        layers, channels = [("conv", 64, 3, 1), ("norm", True), ("relu",)], 64
        for stage, width in enumerate((64, 128, 256, 512)):
            for i in range(2):
                stride = 2 if stage > 0 and i == 0 else 1
                body = (("conv", width, 3, stride), ("norm", True), ("relu",))
                body += (("conv", width, 3, 1), ("norm", True))
                projection = (("conv", width, 1, stride), ("norm", True))
                layers.append(("block", body, projection if width != channels else ()))
                channels = width
        return (*layers, ("mean",), ("dense", num_classes))
    layers = [("whiten", 8 * config.data.channels), ("gelu",)] if m.whiten else []
    for width in m.widths:
        for i in range(m.convs_per_block):
            layers += [("conv", width, 3, 1), *([("pool",)] if i == 0 else [])]
            layers += [("norm", False), ("gelu",)]
    layers.append(("max",))
    for width in m.dense_widths:
        layers += [("dropout", m.dropout_rate), ("dense", width), ("gelu",)]
    return (*layers, ("dropout", m.dropout_rate), ("dense", num_classes))


def linen(layers: Layers, dtype: str) -> Any:
    import flax.linen as nn
    import jax

    class Network(nn.Module):
        @nn.compact
        def __call__(self, x, *, train: bool):
            return self.follow(layers, x.astype(dtype), train).astype("float32")

        def follow(self, layers: Layers, x, train: bool):
            for kind, *a in layers:
                if kind == "whiten":
                    shape = (2, 2, x.shape[-1], *a)
                    kernel = self.variable("batch_stats", "whitening", jax.numpy.full, shape, 0.3)
                    kernel, layout = kernel.value.astype(dtype), ("NHWC", "HWIO", "NHWC")
                    x = jax.lax.conv_general_dilated(
                        x, kernel, (1, 1), "VALID", dimension_numbers=layout
                    )
                    bias = self.param("bias", nn.initializers.zeros, x.shape[-1:])
                    x += bias.astype(dtype)
                elif kind == "conv":
                    sizes = (a[0], (a[1], a[1]), (a[2], a[2]))
                    x = nn.Conv(*sizes, use_bias=False, dtype=dtype)(x)
                elif kind == "pool":
                    x = nn.max_pool(x, (2, 2), (2, 2))
                elif kind == "norm":
                    norm = nn.BatchNorm(not train, momentum=0.9, use_scale=a[0], dtype=dtype)
                    x = norm(x)
                elif kind == "block":
                    x = nn.relu(self.follow(a[0], x, train) + self.follow(a[1], x, train))
                elif kind == "dropout":
                    x = nn.Dropout(*a, deterministic=not train)(x)
                elif kind == "dense":
                    x = nn.Dense(*a, dtype=dtype)(x)
                else:
                    over = {"max": x.max, "mean": x.mean}
                    x = over[kind]((1, 2)) if kind in over else getattr(nn, kind)(x)
            return x

    return Network()


def keras_model(layers: Layers, image_shape: tuple[int, ...]) -> Any:
    import keras
    from keras import layers as k

    class Bias(k.Layer):
        def build(self, shape):
            self.bias = self.add_weight(shape=shape[-1:], initializer="zeros")

        def call(self, x):
            return x + self.bias

    build = {
        "conv": lambda width, size, stride: k.Conv2D(
            width, size, stride, padding="same", use_bias=False
        ),
        "pool": lambda: k.MaxPooling2D(2),
        "norm": lambda scale: k.BatchNormalization(momentum=0.9, epsilon=1e-5, scale=scale),
        "gelu": lambda: k.Activation(lambda x: keras.activations.gelu(x, approximate=True)),
        "relu": k.ReLU,
        "max": k.GlobalMaxPooling2D,
        "mean": k.GlobalAveragePooling2D,
        "dropout": k.Dropout,
        "dense": k.Dense,
    }

    def follow(layers: Layers, x):
        for kind, *a in layers:
            if kind == "whiten":
                x = Bias()(k.Conv2D(*a, 2, use_bias=False, trainable=False)(x))
            elif kind == "block":
                x = k.ReLU()(k.Add()([follow(a[0], x), follow(a[1], x)]))
            else:
                x = build[kind](*a)(x)
        return x

    inputs = keras.Input(image_shape)
    return keras.Model(inputs, k.Activation("linear", dtype="float32")(follow(layers, inputs)))


def torch_module(layers: Layers) -> Any:
    """Its sizes are those of the first images that it sees."""
    from torch import nn

    class Block(nn.Module):
        def __init__(self, body: Layers, shortcut: Layers):
            super().__init__()
            self.body, self.shortcut = follow(body), follow(shortcut)

        def forward(self, x):
            return nn.functional.relu(self.body(x) + self.shortcut(x))

    def whiten(width: int) -> nn.Module:
        filters = nn.Conv2d(width // 8, width, 2)
        filters.weight.requires_grad_(False)
        return filters

    def norm(scale: bool) -> nn.Module:
        norm = nn.LazyBatchNorm2d()
        norm.frozen = [] if scale else ["weight"]  # a name: the parameter is not there yet
        return norm

    build = {
        "whiten": whiten,
        "conv": lambda width, size, stride: nn.LazyConv2d(
            width, size, stride, size // 2, bias=False
        ),
        "pool": lambda: nn.MaxPool2d(2),
        "norm": norm,
        "gelu": lambda: nn.GELU("tanh"),
        "relu": lambda: nn.ReLU(inplace=True),
        "block": Block,
        "max": lambda: nn.Sequential(nn.AdaptiveMaxPool2d(1), nn.Flatten()),
        "mean": lambda: nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        "dropout": nn.Dropout,
        "dense": nn.LazyLinear,
    }

    def follow(layers: Layers) -> nn.Module:
        return nn.Sequential(*(build[kind](*arguments) for kind, *arguments in layers))

    return follow(layers)
