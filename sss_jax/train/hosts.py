"""Several processes in one run: how they meet, what they agree on, and how they part.

With one process everything here is the identity.
"""

import contextlib
import hashlib
import json
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding

from sss_jax.errors import CheckpointError, ConfigError, PeerLost, SSSError

_PARTNER = re.compile(r"(?i)gloo|nccl|peer|barrier|heartbeat|coordination|unavailable|deadline")
"""Words of the libraries' errors where a partner is the reason."""
HEARTBEAT_SECONDS = 30
"""Silence after which a process counts as gone; the others then stop."""


class Meeting(NamedTuple):
    """Where the processes of a run meet; all None: what Slurm, GKE, TPU or MPI tell.

    Attributes:
        coordinator: HOST:PORT of process 0.
        processes: number of processes.
        process: number of this one, from 0.
    """

    coordinator: str | None = None
    processes: int | None = None
    process: int | None = None


def join(meeting: Meeting, timeout: int = 300) -> None:
    """Meet the other processes; before anything else asks for a device.

    Args:
        meeting: where.
        timeout: seconds to wait for the others.

    Raises:
        ConfigError: half an address, or the others did not come in time.
    """
    given = [value is not None for value in meeting]
    if any(given) and not all(given):
        raise ConfigError(
            "--coordinator, --processes and --process go together; give all three, or "
            "--distributed alone where Slurm, GKE, TPU or MPI started the processes"
        )
    try:
        jax.distributed.initialize(
            *meeting,
            initialization_timeout=timeout,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=HEARTBEAT_SECONDS,
        )
    except (RuntimeError, ValueError) as error:
        raise ConfigError(
            f"the processes of the run did not meet ({str(error).splitlines()[0][:200]}); start "
            "all with the same --coordinator and --processes, each with its own --process"
        ) from None


def is_lead() -> bool:
    """Whether this process writes logs and run files."""
    return jax.process_index() == 0


def decided_by_lead(answer: bool) -> bool:
    """Return the answer of process 0 in every process; all of them must ask."""
    if jax.process_count() == 1:
        return answer
    from jax.experimental import multihost_utils

    return bool(multihost_utils.broadcast_one_to_all(np.asarray(answer)))


def gathered(found: Any) -> list[Any]:
    """Return what every process found, as plain JSON types; all of them must ask."""
    if jax.process_count() == 1:
        return [found]
    from jax.experimental import multihost_utils

    own = np.frombuffer(json.dumps(found).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.array(own.size))
    padded = np.pad(own, (0, int(max(sizes)) - own.size))
    rows = multihost_utils.process_allgather(padded)
    return [json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]


def refuse_differing(facts: Any) -> None:
    """Refuse to go on where processes were started with other settings or other data.

    Raises:
        ConfigError: in every process.
    """
    said = json.dumps(facts, sort_keys=True, default=str).encode()
    digests = gathered(hashlib.sha256(said).hexdigest())
    differing = [i for i, digest in enumerate(digests) if digest != digests[0]]
    if differing:
        raise ConfigError(
            f"processes {differing} were started with other settings, another split or other "
            "versions than process 0; start all with the same command and the same code"
        )


def led(act: Callable[[], None]) -> None:
    """Let process 0 act; if it cannot, all processes stop.

    Raises:
        SSSError: the one that process 0 raised there, and one that says so elsewhere.
    """
    failed: SSSError | None = None
    if is_lead():
        try:
            act()
        except SSSError as error:
            failed = error
    ok = decided_by_lead(failed is None)
    if failed is not None:
        raise failed
    if not ok:
        raise ConfigError("process 0 could not begin; its own message says why")


@contextlib.contextmanager
def losses_of_peers() -> Iterator[None]:
    """Turn the error of an exchange whose partner is gone into an orderly stop.

    Raises:
        PeerLost: another process of the run is gone; the last checkpoint stands.
    """
    try:
        yield
    except (jax.errors.JaxRuntimeError, CheckpointError) as error:
        said = str(error).splitlines()[0]
        if jax.process_count() == 1 or not _PARTNER.search(said):
            raise
        raise PeerLost(
            f"process {jax.process_index()}: an exchange with the others failed ({said[-300:]}); "
            "one of them is probably gone. Restart all with the same command: the run goes on from "
            "its last checkpoint"
        ) from error


def part_of_batch(sharding: NamedSharding, clips: int) -> tuple[int, int]:
    """Say which part of a global batch this process reads.

    Args:
        sharding: of an array whose first axis is the clips.
        clips: size of that axis.

    Returns:
        (i, n): part i of n equal ones, in order. Processes that share the rows of images read the
        same part.

    Raises:
        ConfigError: the clips of this process do not lie together.
    """
    indices = sharding.addressable_devices_indices_map((clips,)).values()
    starts = {
        (index[0].start or 0, clips if index[0].stop is None else index[0].stop)
        for index in indices
        if index
    }
    first, last = min(a for a, _ in starts), max(b for _, b in starts)
    held = sum(b - a for a, b in starts)
    if held != last - first or clips % held or first % held:
        raise ConfigError(
            "the devices of a process hold clips that do not lie together; let mesh.fsdp x "
            "mesh.context divide the devices of a process, or be a multiple of them"
        )
    return first // held, clips // held
