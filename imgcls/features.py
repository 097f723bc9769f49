"""What the last layer is given, computed once for all epochs in which it alone learns."""

import contextlib
import hashlib
import json
import logging
from functools import partial
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from imgcls.config import chosen
from imgcls.data.cache import make_room
from imgcls.experiment import Experiment
from imgcls.models import head_of
from imgcls.parallel import put_batch
from imgcls.pretrained import digest
from imgcls.probe import features_step
from imgcls.run import files, signals
from imgcls.run.logs import progress, say
from imgcls.state import TrainState
from imgcls.steps import augment_batch, step_keys

FORMAT = 1  # raise when the features of the same weights and images would differ


def kept_features(exp: Experiment, state: TrainState) -> dict[str, Any]:
    """{"image": float32[V, N, D], "targets": float32[V, N, K]} of V views of N training images.

    They are computed, or read from the cache. An entry is for the arrays below the last layer, the
    images, the config of model, augmentation and views, and what decides bits.
    """
    c, head, arrays = exp.config, head_of(state.params), flatten_dict(state.eval_variables)
    say(f"the last layer learns alone, optim.probe_learning_rate={c.optim.probe_learning_rate}")
    if jax.process_count() > 1:  # one could find what another does not
        return _compute(exp, state)
    what = {k: v for k, v in chosen(c).items() if k.startswith(("model.", "augment.", "task."))}
    what |= {"model.init_from": FORMAT, "seed": c.seed if c.train.probe_views > 1 else 0}
    what |= {"views": c.train.probe_views, "batch": c.train.batch_size, **exp.preprocess.keywords}
    what |= {"below": digest({p: np.asarray(a) for p, a in arrays.items() if p[1] != head})}
    what |= {"data": exp.splits["train"].fingerprint, "bits": exp.reproducibility_facts()}
    folder = files.cache_folder("datasets")
    path = folder / f"features-{hashlib.sha256(json.dumps(what).encode()).hexdigest()[:24]}.npz"
    with contextlib.suppress(Exception), np.load(path, allow_pickle=False) as kept:
        return {name: kept[name] for name in ("image", "targets")}  # with checksums
    found = _compute(exp, state)
    try:
        make_room(folder, found["image"].nbytes)
        with files.replacing(path) as file:
            np.savez(file, **found)
    except OSError as error:
        logging.warning("cannot cache features in %s (%s)", folder, error)
    return found


def _compute(exp: Experiment, state: TrainState) -> dict[str, Any]:
    """The first view is the image as it is; the draws of others are of the seed and the view."""
    split, classes, views = exp.splits["train"], len(exp.class_names), exp.config.train.probe_views
    examples, size = len(split), exp.config.train.batch_size

    def view(state, rng, batch, *, augment):
        found = augment_batch(rng, batch, augment=augment, task=exp.task, num_classes=classes)
        return features_step(state, found[0], model=exp.model, preprocess=exp.preprocess), found[1]

    augments = (lambda rng, images, targets: (images, targets), exp.augmentation(small=False))
    programs = [exp.jit(partial(view, augment=augment)) for augment in augments]
    parts = []
    with progress(views * examples, "computing features", "images") as bar:
        # The last batch is filled up with the first images, so that one program is enough.
        for n, (v, start) in enumerate(np.ndindex(views, -(-examples // size))):
            signals.poll()
            indices, rng = np.arange(size) + start * size, step_keys(exp.rng, n)[0]
            batch = put_batch(split.read, indices % examples, exp.mesh)
            found = programs[v > 0](state, rng, batch)
            parts.append([np.asarray(x)[indices < examples] for x in found])
            bar.update(len(parts[-1][0]))
    both = (np.concatenate(x).reshape(views, examples, -1) for x in zip(*parts))
    return dict(zip(("image", "targets"), both))
