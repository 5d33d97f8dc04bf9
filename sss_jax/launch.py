"""The commands that start a run on rented machines; printed, never executed.

Sources: the documentation of gcloud (queued resources), xpk and Slurm. They were not run here.
"""

import shlex
from collections.abc import Callable, Sequence
from typing import NamedTuple

from sss_jax.errors import ConfigError
from sss_jax.options import Options
from sss_jax.topology import GPUS_OF_A_HOST, Topology, parse
from sss_jax.train import sharding

# Accelerator type and runtime of Google Cloud, by chip.
_TPUS = {
    "v5e": ("v5litepod", "v2-alpha-tpuv5-lite"),
    "v5p": ("v5p", "v2-alpha-tpuv5"),
    "v6e": ("v6e", "v2-alpha-tpuv6e"),
}


class Job(NamedTuple):
    """What to run and where.

    Attributes:
        train: words behind `sss-jax train`.
        name: of the job and of what is rented for it.
        zone: of Google Cloud.
        cluster: of GKE.
        image: container with sss-jax.
        setup: command that installs sss-jax on a bare machine.
    """

    train: Sequence[str]
    name: str = "sss"
    zone: str = ""
    cluster: str = ""
    image: str = ""
    setup: str = ""

    def command(self, *, distributed: bool) -> str:
        """Return the line that every process runs."""
        return shlex.join(
            ["sss-jax", "train", *(["--distributed"] if distributed else []), *self.train]
        )


def commands(target: str, topology: str, job: Job) -> str:
    """Return the shell commands that run `job`, with comments.

    Args:
        target: one of `TARGETS`.
        topology: name of the machines, such as `v5e-16`, `2xv5e-16`, `h100-16`.
        job: what they run.

    Raises:
        ConfigError: machines that the target does not have, or something left out that it needs.
    """
    machines = parse(topology)
    make, needed, tpus = TARGETS[target]
    if machines.is_tpu != tpus:
        kind = "TPUs" if tpus else "GPUs"
        raise ConfigError(f"launch: {target} is for {kind}, and {topology} has none")
    missing = [f"--{name}" for name in needed if not getattr(job, name)]
    if missing:
        raise ConfigError(f"launch: {target} needs {', '.join(missing)}")
    return make(job, machines)


def refuse_misfits(options: Options, topology: str) -> None:
    """Refuse settings that the machines cannot run, before anything is rented.

    Raises:
        ConfigError: a mesh or a batch that does not fit the number of devices.
    """
    devices = parse(topology).devices
    sharding.axis_sizes(options.mesh, devices)
    shards = devices // options.mesh.context
    sharding.check_batches(options.train, shards, semi=options.semi.enabled)


def _accelerator(topology: Topology) -> str:
    kind, _ = _TPUS[topology.chip.name]
    return f"{kind}-{topology.chips * topology.chip.cores}"


def _tpu_vm(job: Job, machines: Topology) -> str:
    """Google Cloud's queued resources: ask, wait, install, run, give back."""
    _, runtime = _TPUS[machines.chip.name]
    zone, slices = f"--zone={job.zone}", machines.slices
    node = [f"--node-prefix={job.name}", f"--node-count={slices}"]
    ask = ["gcloud", "compute", "tpus", "queued-resources", "create", job.name, zone]
    ask += node if slices > 1 else [f"--node-id={job.name}"]
    ask += [f"--accelerator-type={_accelerator(machines)}", f"--runtime-version={runtime}"]
    reach = ["gcloud", "compute", "tpus", "queued-resources", "ssh", job.name, zone]
    reach += ["--worker=all", "--node=all"]
    return "\n".join(
        [
            "# Ask, and wait until `describe` says ACTIVE.",
            shlex.join(ask),
            shlex.join([*ask[:4], "describe", job.name, zone]),
            "# On every host: install, then start; the same line goes on after a preemption.",
            shlex.join([*reach, f"--command={job.setup}"]),
            shlex.join([*reach, f"--command={job.command(distributed=True)}"]),
            "# Give back.",
            shlex.join([*ask[:4], "delete", job.name, zone, "--force"]),
        ]
    )


def _xpk(job: Job, machines: Topology) -> str:
    """Google Kubernetes Engine through xpk."""
    words = ["xpk", "workload", "create", f"--cluster={job.cluster}", f"--workload={job.name}"]
    words += [f"--tpu-type={_accelerator(machines)}", f"--num-slices={machines.slices}"]
    words += [f"--docker-image={job.image}", f"--command={job.command(distributed=True)}"]
    return "# The workdir must be storage that all pods see.\n" + shlex.join(words)


def _slurm(job: Job, machines: Topology) -> str:
    """A batch script: one process per GPU, a signal before the time ends, then queued again."""
    gpus = machines.devices
    nodes = -(-gpus // GPUS_OF_A_HOST)
    return "\n".join(
        [
            "#!/bin/bash",
            "# Save as FILE, then: sbatch FILE",
            f"#SBATCH --job-name={job.name}",
            f"#SBATCH --nodes={nodes}",
            f"#SBATCH --ntasks-per-node={gpus // nodes}",
            "#SBATCH --gpus-per-task=1",
            "#SBATCH --signal=TERM@120",
            "#SBATCH --requeue",
            f"srun {job.command(distributed=True)}",
            "# 75: stopped in good order with its state saved; the next turn goes on.",
            'code=$?; [ $code -eq 75 ] && scontrol requeue "$SLURM_JOB_ID"; exit $code',
        ]
    )


def _node(job: Job, machines: Topology) -> str:
    """One machine: one process drives all its GPUs."""
    if machines.devices > GPUS_OF_A_HOST:
        raise ConfigError(f"launch: one node has {GPUS_OF_A_HOST} GPUs; use --on slurm")
    return job.command(distributed=False)


TARGETS: dict[str, tuple[Callable[[Job, Topology], str], tuple[str, ...], bool]] = {
    "tpu-vm": (_tpu_vm, ("zone", "setup"), True),
    "xpk": (_xpk, ("cluster", "image"), True),
    "slurm": (_slurm, (), False),
    "node": (_node, (), False),
}
"""How to write the commands, what they need, and whether they are for TPUs."""
