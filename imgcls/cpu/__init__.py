"""Faster operations for CPUs. Who builds a model asks `unavailable`; the model cannot tell."""

from imgcls.cpu.conv import conv_general_dilated, unavailable
from imgcls.cpu.onednn import has_bfloat16, identity, use_threads

__all__ = ["conv_general_dilated", "has_bfloat16", "identity", "unavailable", "use_threads"]
