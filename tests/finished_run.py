"""Writes the files that a finished run leaves in its workdir, from logits and labels."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from imgcls.evaluation.scores import evaluate_logits


def random_logits(examples: int, classes: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """float32[N, K] that are right more often than not, and int32[N] with every class."""
    rng = np.random.default_rng(seed)
    labels = np.arange(examples, dtype=np.int32) % classes
    logits = rng.normal(size=(examples, classes)).astype(np.float32)
    logits[np.arange(examples), labels] += 2.5
    return logits, labels


def write_run(
    workdir: Path,
    logits: np.ndarray,
    labels: np.ndarray,
    class_names: Sequence[str] | None = None,
    *,
    temperature: float | None = None,
    ids: Sequence[str] | None = None,
    config: dict | None = None,
    **results,
) -> Path:
    names = class_names or [f"class {k}" for k in range(logits.shape[1])]
    workdir.mkdir(parents=True, exist_ok=True)
    scores = evaluate_logits(logits, labels, names, temperature=temperature)
    (workdir / "results.json").write_text(
        json.dumps({"class_names": list(names)} | scores | results, allow_nan=False)
    )
    (workdir / "config.json").write_text(json.dumps(config or {"seed": 0, "data": {"name": "toy"}}))
    np.savez(
        workdir / "predictions.npz",
        logits=logits,
        labels=labels,
        ids=np.array([f"test/{i}" for i in range(len(labels))] if ids is None else ids),
    )
    return workdir
