"""What a checkpoint should hold, written beside its arrays and checked against them.

Array files carry no checksum of their content, so a flipped bit would be restored in silence. A
manifest lists every leaf with shape, dtype and the CRC-32 of its bytes, and is itself sealed with
a CRC-32. Each process lists the regions it saved; together they cover every leaf.
"""

import dataclasses
import json
import math
import zlib
from collections.abc import Iterable, Mapping
from importlib import metadata
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sss_jax.axes import PyTree

FORMAT = 1
PREFIX = "manifest-"

Path = tuple[str, ...]
"""Keys that lead to a leaf, from the root."""


class Damage(Exception):
    """A step cannot be trusted; the message names the file or the leaf."""


@dataclasses.dataclass(frozen=True)
class Region:
    """A box of a leaf: its first index, its shape and the CRC-32 of its bytes in C order."""

    start: tuple[int, ...]
    shape: tuple[int, ...]
    crc32: int

    @property
    def index(self) -> tuple[slice, ...]:
        """The region as an index of the whole leaf."""
        return tuple(slice(a, a + n) for a, n in zip(self.start, self.shape, strict=True))


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One array of the state."""

    shape: tuple[int, ...]
    dtype: str
    regions: tuple[Region, ...]

    @property
    def nbytes(self) -> int:
        """Size of the whole leaf, bytes."""
        return math.prod(self.shape) * jnp.dtype(self.dtype).itemsize


@dataclasses.dataclass(frozen=True)
class Manifest:
    """The content of one step."""

    step: int
    leaves: dict[Path, Leaf]
    meta: dict[str, Any]
    metrics: dict[str, Any]


def name(path: Path) -> str:
    """Readable name of a leaf."""
    return "/".join(path)


def flatten(tree: PyTree) -> dict[Path, Any]:
    """Leaves of a pytree by path; keys, indices and field names become strings."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {tuple(_component(key) for key in path): leaf for path, leaf in leaves}


def nest(leaves: Mapping[Path, Any]) -> Any:
    """Nested dict with the given leaves, the inverse of `flatten` for dicts and single leaves."""
    if () in leaves:
        return leaves[()]
    root: dict[str, Any] = {}
    for path, leaf in leaves.items():
        node = root
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = leaf
    return root


def _component(key: Any) -> str:
    return jax.tree_util.keystr((key,), simple=True)


def host_copies(
    leaves: Mapping[Path, Any],
) -> dict[Path, list[tuple[tuple[int, ...], np.ndarray]]]:
    """Private host copies of the regions that this process saves, each with its first index.

    A copy is forced, since a view of a CPU buffer would change when the buffer is donated.
    """
    for leaf in leaves.values():
        for shard in _saved_shards(leaf):
            shard.data.copy_to_host_async()
    return {path: _regions(leaf) for path, leaf in leaves.items()}


def _saved_shards(leaf: Any) -> list[Any]:
    """Shards of a jax array that this process saves: one replica of each."""
    if not isinstance(leaf, jax.Array):
        return []
    return [shard for shard in leaf.addressable_shards if shard.replica_id == 0]


def _regions(leaf: Any) -> list[tuple[tuple[int, ...], np.ndarray]]:
    if not isinstance(leaf, jax.Array):
        first = jax.process_index() == 0
        return [((0,) * leaf.ndim, np.array(leaf))] if first else []
    return [
        (tuple(axis.start or 0 for axis in shard.index), np.array(jax.device_get(shard.data)))
        for shard in _saved_shards(leaf)
    ]


def checksum(array: np.ndarray) -> int:
    """CRC-32 of the bytes of an array in C order."""
    return zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)


def describe(shape: Iterable[int], dtype: Any, copies: list[Any]) -> dict[str, Any]:
    """JSON form of one leaf, from the host copies of its regions."""
    regions = [
        {"start": list(start), "shape": list(part.shape), "crc32": checksum(part)}
        for start, part in copies
    ]
    return {"shape": list(shape), "dtype": jnp.dtype(dtype).name, "regions": regions}


def versions() -> dict[str, str]:
    """Versions of the packages that shape a checkpoint."""
    found = {}
    for package in ("sss-jax", "jax", "flax", "optax", "orbax-checkpoint", "numpy"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "unknown"
    return found


def new_body(step: int, meta: Mapping[str, Any], metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Manifest of this process before the leaves are known; the first one holds the meta."""
    first = jax.process_index() == 0
    return {
        "format": FORMAT,
        "step": step,
        "process": jax.process_index(),
        "processes": jax.process_count(),
        "versions": versions(),
        "meta": meta if first else {},
        "metrics": metrics if first else {},
    }


def finite_or_none(metrics: Mapping[str, Any] | None) -> dict[str, Any]:
    """Metrics as JSON numbers; NaN and infinity become null."""
    numbers = {key: float(value) for key, value in (metrics or {}).items()}
    return {key: value if math.isfinite(value) else None for key, value in numbers.items()}


def seal(body: Mapping[str, Any]) -> str:
    """Text of a manifest file: the body and the CRC-32 of its canonical form."""
    text = json.dumps(body, sort_keys=True, allow_nan=False, separators=(",", ":"))
    return f'{{"crc32":{zlib.crc32(text.encode())},"body":{text}}}\n'


def unseal(text: bytes) -> dict[str, Any]:
    """Body of a manifest file; raises `Damage` where one bit of it differs from what was written.

    The text is compared with its own canonical form, so that no byte of the file is unguarded.
    """
    try:
        body = json.loads(text)["body"]
        intact = seal(body).encode() == text
    except (ValueError, KeyError, TypeError, RecursionError):
        intact = False
    if not intact:
        raise Damage("its checksum does not match")
    if body["format"] != FORMAT:
        raise Damage(f"format {body['format']}, this version reads format {FORMAT}")
    return body


def file_name(process: int) -> str:
    """Name of the manifest file of a process."""
    return f"{PREFIX}{process}.json"


def read(folder: Any) -> Manifest:
    """Read and merge the manifests of a step folder (an `epath.Path`)."""
    first = _read_file(folder / file_name(0))
    bodies = [first] + [_read_file(folder / file_name(i)) for i in range(1, first["processes"])]
    leaves = {}
    for rows in zip(*(body["leaves"] for body in bodies), strict=True):
        path = tuple(rows[0]["path"])
        leaves[path] = Leaf(
            shape=tuple(rows[0]["shape"]),
            dtype=rows[0]["dtype"],
            regions=tuple(_region(region) for row in rows for region in row["regions"]),
        )
    _check_cover(leaves)
    return Manifest(first["step"], leaves, first["meta"], first["metrics"])


def _read_file(path: Any) -> dict[str, Any]:
    try:
        return unseal(path.read_bytes())
    except OSError as error:
        raise Damage(f"{path.name}: cannot be read ({error.strerror or error})") from None
    except Damage as error:
        raise Damage(f"{path.name}: {error}") from None


def _region(row: Mapping[str, Any]) -> Region:
    return Region(tuple(row["start"]), tuple(row["shape"]), row["crc32"])


def _check_cover(leaves: Mapping[Path, Leaf]) -> None:
    """Refuse a manifest whose regions leave a part of a leaf without a checksum."""
    for path, leaf in leaves.items():
        if sum(math.prod(region.shape) for region in leaf.regions) != math.prod(leaf.shape):
            raise Damage(f"{name(path)}: its checksums do not cover it")


def verify(manifest: Manifest, arrays: Mapping[Path, np.ndarray]) -> None:
    """Raise `Damage` naming the first array that differs from the manifest."""
    for path, array in arrays.items():
        leaf = manifest.leaves[path]
        if array.shape != leaf.shape or array.dtype != jnp.dtype(leaf.dtype):
            found = f"{array.dtype}{list(array.shape)}"
            raise Damage(f"{name(path)}: {found}, saved as {leaf.dtype}{list(leaf.shape)}")
        if any(checksum(array[region.index]) != region.crc32 for region in leaf.regions):
            raise Damage(f"{name(path)}: its bytes do not match their checksum")


FILES = "files.json"
_UNGUARDED = ("_CHECKPOINT_METADATA", "commit_success.txt", FILES)
"""Written after the list, and never read when a state is restored."""


def list_files(folder: Any) -> dict[str, list[int]]:
    """Size and CRC-32 of every array file below a step folder, by relative name."""
    rows = {}
    for path in sorted(_walk(folder), key=str):
        relative = path.relative_to(folder).as_posix()
        if relative not in _UNGUARDED and not relative.startswith(PREFIX):
            rows[relative] = _fingerprint(path)
    return rows


def check_files(folder: Any) -> None:
    """Raise `Damage` naming the first file that is missing, cut short or changed."""
    for relative, expected in _read_file(folder / FILES)["files"].items():
        try:
            found = _fingerprint(folder / relative)
        except FileNotFoundError:
            raise Damage(f"{relative}: is missing") from None
        except OSError as error:
            raise Damage(f"{relative}: cannot be read ({error.strerror or error})") from None
        if found[0] != expected[0]:
            raise Damage(f"{relative}: {found[0]} bytes, saved with {expected[0]}")
        if found != expected:
            raise Damage(f"{relative}: its bytes do not match their checksum")


def _walk(folder: Any) -> Iterable[Any]:
    for path in folder.iterdir():
        if path.is_dir():
            yield from _walk(path)
        else:
            yield path


def _fingerprint(path: Any, chunk: int = 2**24) -> list[int]:
    size = crc = 0
    with path.open("rb") as stream:
        while block := stream.read(chunk):
            size += len(block)
            crc = zlib.crc32(block, crc)
    return [size, crc]
