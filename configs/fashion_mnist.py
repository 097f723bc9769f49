"""Fashion-MNIST, with a CNN like that of mnist.py.

    python main.py --config=configs/fashion_mnist.py --workdir=runs/fashion_mnist

Its data could not be had where this project is developed, so no result of it is published.
"""

from ml_collections import ConfigDict

from imgcls.config import default_config


def get_config() -> ConfigDict:
    config = default_config(model="cnn", optimizer="adamw")
    config.data.name = "fashion_mnist"
    config.data.train = "train[:95%]"
    config.data.validation = "train[95%:]"
    config.data.image_size = (28, 28)  # (height, width)
    config.data.channels = 1
    config.data.mean = (0.286,)
    config.data.std = (0.353,)

    config.augment.flip_probability = 0.5
    config.augment.translate_pixels = 2

    config.model.widths = (32, 64, 128)
    config.model.dense_widths = (128,)
    config.model.dropout_rate = 0.3

    config.optim.learning_rate = 0.003
    config.optim.schedule = "linear"
    config.optim.warmup_epochs = 1.0
    config.optim.ema_decay = 0.99
    config.optim.weight_decay = 0.05

    config.train.batch_size = 256
    config.train.epochs = 20
    return config
