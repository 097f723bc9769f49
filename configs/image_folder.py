"""A folder of one's own photographs: PATH/<class>/* or PATH/{train,validation,test}/<class>/*.

    python main.py --config=configs/image_folder.py --config.data.dir=PATH --workdir=runs/mine
    python main.py --config=configs/image_folder.py:resnet18 ...   (or another model)

What is empty or 0 here is chosen by the training pictures, said, and saved in config.json. Any
--config.KEY=VALUE chooses otherwise: data.image_size=(128,128), or train.epochs in place of
train.steps. Where a mirrored picture means something else, set augment.flip_probability=0.

Tried on 480 photographs of six classes, beside 60 to validate and 60 to test on: at 224x224, which
they choose, 2,002 steps reach 71.67% on test (43/60; 95% interval of this one seed, over examples:
59.2 to 81.5), in 40 minutes on 2 cores of an AMD EPYC (AVX-512 bfloat16) that other work shared.
With --config.data.image_size=(64,64) 76.67% (46/60; 64.6 to 85.6) in 8 minutes: no worse.
"""

from ml_collections import ConfigDict

from imgcls.config import default_config


def get_config(model: str = "cnn") -> ConfigDict:
    config = default_config(model=model, optimizer="adamw")
    config.data.name = "image_folder"
    config.data.validation = "validation"
    config.data.image_size = ()  # 64, 128 or 224 pixels a side, by the median picture
    config.data.mean = ()  # of the training split
    config.data.std = ()

    config.augment.flip_probability = 0.5
    config.augment.crop_fraction = 0.65
    config.augment.rand_augment_magnitude = 5.0

    config.model.dropout_rate = 0.2
    if model == "cnn":
        config.model.widths = ()  # blocks that halve the image until it is about 4x4
    if config.model.name == "resnet":
        config.model.stem = "imagenet"
    config.task.label_smoothing = 0.1
    config.optim.learning_rate = 0.002
    config.optim.schedule = "cosine"
    config.optim.weight_decay = 0.05

    config.train.batch_size = 0  # 64, or what few pictures allow
    config.train.steps = 2000  # so that few pictures get as much training as they need
    config.train.epochs = 0  # as many as make up these steps
    config.train.validate_every_epochs = 0  # 20 times in all
    config.train.checkpoint_every_epochs = 0  # with each validation

    config.eval.batch_size = 256
    return config
