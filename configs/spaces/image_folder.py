"""What to vary in configs/image_folder.py, for pictures of your own.

    python -m imgcls sweep --config=configs/image_folder.py --config.data.dir=PATH
        --workdir=sweeps/mine --space=configs/spaces/image_folder.py --trials=20 --rungs=5,10

Look at the augmented pictures of a run's report first. One that changes the right answer (a rotated
6) is a mistake, which no sweep needs to find. Then take its key out here.
"""


def get_space() -> dict:
    return {
        # First, and alone where there are fewer than ten trials:
        # --space="optim.learning_rate=log(0.0002, 0.02)" in place of this file. The config's is
        # 0.002, and the best one depends on the pictures.
        "optim.learning_rate": ("log", 0.0002, 0.02),
        # Then what keeps a network from learning few pictures by heart.
        "optim.weight_decay": ("log", 0.005, 0.5),
        "augment.zoom_fraction": ("linear", 0.0, 0.3),
        "augment.flip_probability": [0.0, 0.5],  # 0.0 if a mirrored picture means something else
        # The best architecture depends on how many pictures there are. resnet18 takes several times
        # as long as the cnn: leave it out if time matters more.
        "model.name": ["cnn", "resnet18"],
        # Not train.epochs: choose what you can wait for, because the best values of all else change
        # with it. Nor data.image_size: details need pixels, and time grows with its square.
    }
