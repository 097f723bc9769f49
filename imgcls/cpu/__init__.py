"""Operations that are faster on x86 CPUs than XLA's own. `ops` is the one door to them."""

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax

from imgcls.cpu.conv import conv_general_dilated, dot_general, why_unavailable
from imgcls.cpu.layers import BatchNorm, gelu, max_pool, one_by_one
from imgcls.cpu.onednn import has_bfloat16, identity, use_threads

__all__ = ["has_bfloat16", "identity", "ops", "use_threads"]


def ops(dtype: str) -> dict[str, Callable[..., Any]]:
    """The operations that a model computing in `dtype` should take in the place of Linen's.

    Keys are fields of a model: "norm", "pool", "act", "over_images", and where oneDNN works "conv"
    and "dense". Empty unless this process runs on one CPU device. The log says why convolutions are
    XLA's.
    """
    found: dict[str, Any] = {"norm": BatchNorm, "pool": max_pool, "act": gelu}
    found["over_images"] = one_by_one
    if (platform := jax.default_backend()) != "cpu":
        found, reason = {}, f"oneDNN is for CPUs, not for {platform}"
    elif (devices := jax.device_count()) > 1:
        found, reason = {}, f"oneDNN is for one device, not for {devices}"
    elif not (reason := why_unavailable(dtype)):
        found["conv"] = partial(nn.Conv, conv_general_dilated=conv_general_dilated)
        found["dense"] = partial(nn.Dense, dot_general=dot_general)
    if reason:
        logging.info("convolutions run on plain XLA: %s", reason)
    return found
