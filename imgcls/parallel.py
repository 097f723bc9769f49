"""The mesh, and where arrays live: batches split over `data`, everything else on every device."""

import json
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental.multihost_utils import process_allgather
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec


def is_main() -> bool:
    """Whether this process prints and writes; asks no device unless there are several processes."""
    return not jax.distributed.is_initialized() or jax.process_index() == 0


def of_all_processes(value: Any) -> list[Any]:
    """The JSON values that the processes give; all must call it."""
    if jax.process_count() == 1:
        return [value]
    text = json.dumps(value, default=repr).encode()
    length = int(np.max(process_allgather(np.int32(len(text)))))
    rows = process_allgather(np.frombuffer(text.ljust(length), np.uint8))
    return [json.loads(row.tobytes()) for row in rows]


def make_mesh() -> Mesh:
    """All devices of all processes in one axis `data`.

    Auto axes: Linen's dropout fails under the Explicit ones that JAX would choose.
    """
    return jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def split_by_example(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec("data"))


def put_batch(
    read: Callable[[np.ndarray], dict[str, np.ndarray]], indices: np.ndarray, mesh: Mesh
) -> dict[str, jax.Array]:
    """The global batch `read(indices)` on the devices; a process reads only the rows of its own."""
    sharding = split_by_example(mesh)
    local = sharding.addressable_devices_indices_map(indices.shape)
    rows = [slice(*index[0].indices(len(indices))) for index in local.values() if index]
    start, stop = min(r.start for r in rows), max(r.stop for r in rows)
    batch = read(indices[start:stop])
    return {
        key: jax.make_array_from_process_local_data(
            sharding, value, (len(indices), *value.shape[1:])
        )
        for key, value in batch.items()
    }
