"""Where examples come from, in which order, and decoded once."""

import os

# Colab's tensorflow-metadata is generated for a newer protobuf than Colab has; it works with both.
os.environ.setdefault("TEMPORARILY_DISABLE_PROTOBUF_VERSION_CHECK", "true")
