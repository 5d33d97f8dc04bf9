"""Commands for rented machines: whole, quoted, and refused before anything is rented."""

import shlex

import pytest

from sss_jax.cli import main
from sss_jax.errors import ConfigError
from sss_jax.launch import TARGETS, Job, commands

TRAIN = ("--config", "acdc:sss", "--data", "/mnt/my data", "--workdir", "/mnt/w")
JOB = Job(TRAIN, zone="us-west4-a", cluster="c", image="i", setup="pip install x")
MACHINES = {"tpu-vm": "v5e-16", "xpk": "v5e-16", "slurm": "h100-16", "node": "h100-8"}


@pytest.mark.parametrize("target", TARGETS)
def test_every_way_runs_the_same_training(target):
    text = commands(target, MACHINES[target], JOB)
    lines = [shlex.split(line, comments=True) for line in text.splitlines()]
    words = [word for line in lines for word in line]
    inner = [word.removeprefix("--command=") for word in words if "sss-jax train" in word]
    run = shlex.split(inner[0]) if inner else words[words.index("sss-jax") :][: 3 + len(TRAIN)]
    assert [word for word in run if word != "--distributed"][2:][: len(TRAIN)] == list(TRAIN)
    assert ("--distributed" in run) == (target != "node")


@pytest.mark.parametrize(
    ("topology", "expected"),
    [
        ("v5e-16", ["--accelerator-type=v5litepod-16", "--node-id=sss"]),
        ("v5p-64", ["--accelerator-type=v5p-64", "--runtime-version=v2-alpha-tpuv5"]),
        ("2xv5e-16", ["--accelerator-type=v5litepod-16", "--node-prefix=sss", "--node-count=2"]),
    ],
)
def test_machines_are_asked_for_by_their_names(topology, expected):
    ask = commands("tpu-vm", topology, JOB).splitlines()[1]
    assert set(expected) <= set(shlex.split(ask))


def test_two_slices_through_xpk():
    words = shlex.split(commands("xpk", "2xv6e-256", JOB), comments=True)
    assert {"--tpu-type=v6e-256", "--num-slices=2"} <= set(words)


def test_nodes_of_slurm():
    text = commands("slurm", "h100-16", JOB)
    assert "#SBATCH --nodes=2\n#SBATCH --ntasks-per-node=8\n" in text


@pytest.mark.parametrize(
    ("target", "topology", "job", "message"),
    [
        ("tpu-vm", "h100-8", JOB, "is for TPUs"),
        ("slurm", "v5e-16", JOB, "is for GPUs"),
        ("xpk", "v5e-16", Job(TRAIN), "needs --cluster, --image"),
        ("slurm", "h100-9", JOB, "whole hosts"),
        ("node", "h100-16", JOB, "--on slurm"),
    ],
)
def test_what_cannot_be_is_refused(target, topology, job, message):
    with pytest.raises(ConfigError, match=message):
        commands(target, topology, job)


def launch(*changes):
    words = ["launch", "--on", "slurm", "--topology", "h100-16", "--", *TRAIN, *changes]
    return main(words)


def test_the_verb_prints_settings_too(capsys):
    changes = ["--config.train.labelled_batch=32", "--config.train.unlabelled_batch=32"]
    assert launch(*changes) == 0
    assert changes[0] in capsys.readouterr().out


def test_the_verb_refuses_a_batch_that_does_not_fit(capsys):
    assert launch("--config.train.labelled_batch=3") == 2
    assert "labelled_batch=3 cannot be shared by 16 devices" in capsys.readouterr().err


def test_the_verb_refuses_words_that_train_does_not_know(capsys):
    with pytest.raises(SystemExit, match="2"):
        launch("--wordkir", "w")
