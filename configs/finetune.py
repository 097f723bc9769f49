"""One's own pictures, from a network that learned from others: 100 to 20,000 on a CPU in minutes.

    python main.py --config=configs/finetune.py:resnet18 --config.data.dir=PATH \\
        --config.model.init_from=timm/resnet18.a1_in1k --workdir=runs/mine

Folders are as for configs/image_folder.py. The weights are a .safetensors file, a model of
huggingface.co, or the workdir of an own run. The last layer learns alone for `train.probe_epochs`,
from features that are computed once, then everything does from there (arXiv 2202.10054). Under
1,000 training pictures the last layer alone learns.
"""

from ml_collections import ConfigDict

from imgcls.config import default_config


def get_config(model: str = "resnet18") -> ConfigDict:
    config = default_config(model=model, optimizer="adamw")
    config.data.name = "image_folder"
    config.data.validation = "validation"
    config.data.image_size = (224, 224)  # (height, width)
    config.data.mean = config.data.std = ()  # those of the weights
    config.data.resize = ""

    config.augment.flip_probability = 0.5
    config.augment.zoom_fraction = 0.2
    config.augment.translate_pixels = 12
    config.augment.brightness = 0.1
    config.augment.contrast = 0.1

    if config.model.name == "resnet":
        config.model.stem = "imagenet"
    config.task.label_smoothing = 0.1
    config.optim.learning_rate = 0.0003
    config.optim.probe_learning_rate = 0.001
    config.optim.backbone_ratio = -1.0  # 0 under 1,000 training pictures, else 1
    config.optim.warmup_epochs = 0.5
    config.optim.weight_decay = 0.01
    config.optim.clip_norm = 1.0

    config.train.batch_size = 32
    config.train.epochs = 10
    config.train.probe_epochs = 5.0
    config.train.validate_every_epochs = 5

    config.eval.batch_size = 64
    return config
