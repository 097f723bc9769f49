"""What to vary in configs/image_folder.py, for pictures of your own.

    python -m imgcls sweep --config=configs/image_folder.py --config.data.dir=PATH
        --workdir=sweeps/mine --space=configs/spaces/image_folder.py --trials=20
        --config.train.epochs=60 --rungs=15,30

Look at first_batch.png of a run first. An augmentation that changes the right answer (a mirrored
letter) is a mistake, which no sweep needs to find. Then take its key out here.
"""


def get_space() -> dict:
    return {
        # First, and alone where there are fewer than ten trials:
        # --space="optim.learning_rate=log(0.0002, 0.02)" in place of this file. The config's is
        # 0.002, and the best one depends on the pictures.
        "optim.learning_rate": ("log", 0.0002, 0.02),
        # Then what keeps a network from learning few pictures by heart.
        "optim.weight_decay": ("log", 0.005, 0.5),
        "augment.rand_augment_magnitude": ("linear", 0.0, 10.0),
        "augment.flip_probability": [0.0, 0.5],  # 0.0 if a mirrored picture means something else
        # The best architecture depends on how many pictures there are. resnet18 takes several times
        # as long as the cnn: leave it out if time matters more.
        "model": [{"model.name": "cnn"}, {"model.name": "resnet18", "model.stem": "imagenet"}],
        # Not train.epochs: choose what you can wait for, because the best values of all else change
        # with it. Nor data.image_size: details need pixels, and time grows with its square.
    }
