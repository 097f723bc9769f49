"""What to vary in configs/digits.py: a first sweep, in a few minutes.

    python -m imgcls sweep --config=configs/digits.py --workdir=sweeps/digits
        --space=configs/spaces/digits.py --trials=30 --config.train.epochs=10 --workers=2

Validation has 144 pictures here. A difference of a point is one or two of them, and may be luck.
"""


def get_space() -> dict:
    return {
        # First, and alone where there are fewer than ten trials: nothing else matters as much. On a
        # logarithmic scale, a factor of ten to either side of the config's 0.003.
        "optim.learning_rate": ("log", 0.0003, 0.03),
        # Small batches take more steps per epoch and want a lower learning rate: vary both at once.
        "train.batch_size": [32, 64, 128],
        # How much to hold back. It pays once training accuracy is above that of validation.
        "optim.weight_decay": ("log", 0.005, 0.5),
        # Each architecture brings its own keys. Larger is not better where images are few.
        "model": [
            {"model.name": "mlp", "model.dense_widths": [(128,), (512, 512)]},
            {"model.name": "cnn", "model.widths": [(16, 32), (32, 64), (64, 128)]},
        ],
        # Not train.epochs: choose what you can wait for, because the best values of all else change
        # with it. Nor what decides speed and not accuracy, such as model.dtype.
    }
