"""The verb `sss-jax launch`: print the commands that start a run on rented machines."""

import argparse
from typing import Any


def add(verbs: Any) -> None:
    """Add the verb to the parser."""
    text = "Print the commands that start a run on rented machines."
    launch = verbs.add_parser("launch", help=text, description=text)
    launch.set_defaults(run=_run, known=verbs.choices)
    launch.add_argument("--on", required=True, choices=("tpu-vm", "xpk", "slurm", "node"))
    launch.add_argument("--topology", required=True, help="as for estimate")
    launch.add_argument("--name", default="sss", help="of the job")
    launch.add_argument("--zone", default="", help="of Google Cloud, for tpu-vm")
    launch.add_argument("--setup", default="", help="installs sss-jax on a bare host, for tpu-vm")
    launch.add_argument("--cluster", default="", help="of GKE, for xpk")
    launch.add_argument("--image", default="", help="container with sss-jax, for xpk")
    launch.add_argument("train", nargs="+", metavar="-- TRAIN", help="words behind `sss-jax train`")


def _run(args: argparse.Namespace) -> int:
    from sss_jax import config

    training = args.known["train"].parse_args(args.train)
    options = config.load(training.config, args.overrides)
    from sss_jax.launch import Job, commands, refuse_misfits

    refuse_misfits(options, args.topology)
    words = args.train + [f"--config.{override}" for override in args.overrides]
    job = Job(words, args.name, args.zone, args.cluster, args.image, args.setup)
    print(commands(args.on, args.topology, job))
    return 0
