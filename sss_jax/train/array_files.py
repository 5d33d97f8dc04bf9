"""The files of one checkpoint step: arrays by Orbax, manifests by us, one transaction."""

import concurrent.futures
import dataclasses
import functools
import logging
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from sss_jax import atomic
from sss_jax.train import manifest as mf

COMMIT_FILE = "commit_success.txt"


class Handler(ocp.AsyncCheckpointHandler):
    """Saves nested dicts of arrays through Orbax together with the manifests that guard them."""

    def __init__(self) -> None:
        self._arrays = ocp.PyTreeCheckpointHandler()
        self._pool = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="manifest")

    async def async_save(self, directory: epath.Path, args: "Save") -> list[Any]:
        """Copy the arrays to the host, then write and checksum them in the background."""
        copies = mf.host_copies(args.leaves)
        arrays = ocp.args.PyTreeSave(mf.nest(args.leaves))
        futures = await self._arrays.async_save(directory, args=arrays) or []
        shapes = {path: (leaf.shape, leaf.dtype) for path, leaf in args.leaves.items()}
        write = functools.partial(_write_manifest, directory, args.body, shapes, copies)
        return [*futures, self._pool.submit(write)]

    def save(self, directory: epath.Path, args: "Save") -> None:
        """Not offered: every save is asynchronous."""
        raise NotImplementedError("saves are asynchronous")

    def restore(self, directory: epath.Path, args: "Restore") -> dict[mf.Path, np.ndarray]:
        """Read the wanted leaves to the host."""
        item = mf.nest(args.wanted)
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), item)
        request = ocp.args.PyTreeRestore(item=item, restore_args=as_numpy, partial_restore=True)
        return mf.flatten(self._arrays.restore(directory, args=request))

    def finalize(self, directory: epath.Path) -> None:
        """Merge the files of the processes and list them; the commit file follows."""
        self._arrays.finalize(directory)
        listing = {"format": mf.FORMAT, "files": mf.list_files(directory)}
        write_text(directory / mf.FILES, mf.seal(listing))

    def close(self) -> None:
        """Release threads."""
        self._arrays.close()
        self._pool.shutdown()


@ocp.args.register_with_handler(Handler, for_save=True)
@dataclasses.dataclass
class Save(ocp.args.CheckpointArgs):
    """Leaves to save and the body of the manifest."""

    leaves: dict[mf.Path, Any]
    body: dict[str, Any]


@ocp.args.register_with_handler(Handler, for_restore=True)
@dataclasses.dataclass
class Restore(ocp.args.CheckpointArgs):
    """Leaves to read."""

    wanted: dict[mf.Path, jax.ShapeDtypeStruct]


def open_writer(handler: Handler, timeout: int) -> ocp.AsyncCheckpointer:
    """Asynchronous writer whose steps end with a commit file.

    Folders are made at once: a folder that cannot be made is then an error of the call, where a
    background one would leave the writing threads waiting for it.
    """
    return ocp.AsyncCheckpointer(
        handler,
        async_options=ocp.options.AsyncOptions(
            timeout_secs=timeout, create_directories_asynchronously=False
        ),
        atomicity_options=ocp.options.AtomicityOptions(mode=ocp.options.AtomicityMode.COMMIT_FILE),
    )


def is_local(path: epath.Path) -> bool:
    """Whether a path lies on a file system rather than in object storage."""
    return "://" not in str(path)


def write_text(path: epath.Path, text: str) -> None:
    """Write a small file atomically; object storage does so by itself."""
    if is_local(path):
        atomic.write_text(path, text)
    else:
        path.write_text(text)


def _write_manifest(
    directory: epath.Path,
    body: dict[str, Any],
    shapes: dict[mf.Path, tuple[tuple[int, ...], Any]],
    copies: dict[mf.Path, list[tuple[tuple[int, ...], np.ndarray]]],
) -> None:
    rows = [
        {"path": list(path), **mf.describe(shape, dtype, copies[path])}
        for path, (shape, dtype) in shapes.items()
    ]
    write_text(directory / mf.file_name(body["process"]), mf.seal({**body, "leaves": rows}))


class _OrbaxFilter(logging.Filter):
    """Drops the library's log records, whose pages of text hide our one line."""

    def filter(self, record: logging.LogRecord) -> bool:
        return "orbax" not in record.pathname


_FILTER = _OrbaxFilter()


def quiet(on: bool) -> None:
    """Silence or release the array library's own logging."""
    logger = logging.getLogger("absl")
    if on:
        logger.addFilter(_FILTER)
    else:
        logger.removeFilter(_FILTER)
