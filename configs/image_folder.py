"""A folder of one's own pictures: PATH/<class>/* or PATH/{train,validation,test}/<class>/*.

    python main.py --config=configs/image_folder.py --config.data.dir=PATH --workdir=runs/mine
    python main.py --config=configs/image_folder.py:resnet18 ...   (or another model)

Tried on 3,000 digits and MNIST pictures written as JPEG, PNG, WebP, BMP, GIF, 16-bit, CMYK, with
alpha and rotated by EXIF, 20 to 90 pixels wide: top-1 99.00% (297/300; 95% interval of this one
seed, over examples: 97.10 to 99.66), 455 s on one core of an AMD EPYC (AVX-512 bfloat16, no AMX).
"""

from ml_collections import ConfigDict

from imgcls.config import default_config


def get_config(model: str = "cnn") -> ConfigDict:
    config = default_config(model=model, optimizer="adamw")
    config.data.name = "image_folder"
    config.data.validation = "validation"
    config.data.image_size = (64, 64)  # (height, width)

    config.augment.rotate_degrees = 10.0
    config.augment.zoom_fraction = 0.1
    config.augment.translate_pixels = 4
    config.augment.brightness = 0.2
    config.augment.contrast = 0.2
    config.augment.saturation = 0.2

    config.model.dropout_rate = 0.2
    if model == "cnn":
        config.model.widths = (32, 64, 128, 256)
    config.task.label_smoothing = 0.1
    config.optim.learning_rate = 0.002
    config.optim.schedule = "cosine"
    config.optim.warmup_epochs = 1.0
    config.optim.weight_decay = 0.05

    config.train.batch_size = 64
    config.train.epochs = 20

    config.eval.batch_size = 256
    return config
