"""CIFAR-100: the network of cifar10.py.

    python main.py --config=configs/cifar100.py --workdir=runs/cifar100

Its data could not be had where this project is developed, so no result of it is published.
"""

from ml_collections import ConfigDict

from imgcls.config import default_config


def get_config() -> ConfigDict:
    config = default_config(model="cnn", optimizer="sgd")
    config.data.name = "cifar100"
    config.data.train = "train[:95%]"
    config.data.validation = "train[95%:]"
    config.data.image_size = (32, 32)  # (height, width)
    config.data.mean = (0.5071, 0.4865, 0.4409)
    config.data.std = (0.2673, 0.2564, 0.2762)

    config.augment.flip_probability = 0.5
    config.augment.translate_pixels = 2
    config.augment.cutout_pixels = 8

    config.model.dtype = "bfloat16"  # where the device has it
    config.model.dropout_rate = 0.1
    config.model.whiten = True  # a fixed first layer decorrelates 2x2 patches
    config.task.label_smoothing = 0.1
    config.optim.learning_rate = 0.2
    config.optim.schedule = "linear"
    config.optim.warmup_epochs = 2.0
    config.optim.ema_decay = 0.99
    config.optim.weight_decay = 0.0005

    config.train.batch_size = 512
    config.train.epochs = 30
    config.train.validate_every_epochs = 2
    return config
