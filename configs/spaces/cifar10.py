"""What to vary in configs/cifar10.py.

    python -m imgcls sweep --config=configs/cifar10.py --workdir=sweeps/cifar10
        --space=configs/spaces/cifar10.py --trials=20 --rungs=8

Until epoch 7 training is on smaller images than validation, which says little before: no --rungs
below 8. On two cores, try it on a smaller network first: --config.model.widths="(32, 128, 128)"
--config.train.epochs=5 --config.train.small_epochs=3 --config.train.validate_every_epochs=1.
"""


def get_space() -> dict:
    return {
        # First, and alone where there are fewer than ten trials:
        # --space="optim.learning_rate=log(0.04, 0.4)" in place of this file. It is Muon's, for the
        # convolutions. Vary it again whenever you change the network or the batch size.
        "optim.learning_rate": ("log", 0.04, 0.4),
        # Then the other two learning rates, if there are 20 trials or more.
        "optim.dense_learning_rate": ("log", 0.0015, 0.015),
        "optim.bias_learning_rate": ("log", 5.0, 100.0),
        # Then how much to hold back.
        "optim.weight_decay": ("log", 0.015, 0.25),
        "augment.translate_pixels": [2, 3, 4],
        # Not train.epochs and model.widths: choose what you can wait for, because the best values
        # of all else change with them. Not train.batch_size: it decides speed.
    }
