"""The command line: verbs, exit codes, and what goes to stdout."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sss_jax import cli
from sss_jax.errors import CheckpointError, ConfigError, DataError, NonFiniteError, Preempted

VERBS = ("doctor", "data", "train", "predict", "evaluate", "report", "bench")


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help(verb, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main([verb, "-h"])
    assert end.value.code == 0
    assert verb in capsys.readouterr().out


def test_help_is_quick_and_loads_no_library():
    """Importing jax alone takes half a second."""
    code = "import sys; import sss_jax.cli as c; c.build_parser(); print('jax' in sys.modules)"
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
    assert time.monotonic() - began < 3


def test_wrong_usage_exits_2(capsys):
    for words in (["nothing"], ["train"], ["predict", "--checkpoint", "x"], []):
        with pytest.raises(SystemExit) as end:
            cli.main(words)
        assert end.value.code == 2
    assert "usage" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (DataError("d"), 1),
        (CheckpointError("c"), 1),
        (ConfigError("f"), 2),
        (NonFiniteError("n"), 3),
        (Preempted("p"), 75),
    ],
)
def test_errors_become_exit_codes(error, code, monkeypatch, capsys):
    def fail(_):
        raise error

    monkeypatch.setattr(cli, "_doctor", fail)
    assert cli.main(["doctor"]) == code
    assert capsys.readouterr().err == f"sss-jax: {error}\n"


def test_a_bug_keeps_its_traceback(monkeypatch):
    def fail(_):
        raise ZeroDivisionError

    monkeypatch.setattr(cli, "_doctor", fail)
    with pytest.raises(ZeroDivisionError):
        cli.main(["doctor"])


def test_a_configuration_error_touches_no_device():
    code = (
        "import sys; from sss_jax.cli import main; "
        "n = main(['train', '--config', 'demo:sss', '--data', 'x', '--workdir', 'y', "
        "'--config.train.stpes=1']); print(n, 'jax' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["2", "False"]
    assert "did you mean 'train.steps'" in done.stderr


def test_overrides_of_a_verb_without_configuration_are_refused(capsys):
    assert cli.main(["report", "x", "--config.train.steps=1"]) == 2
    assert "--config.train.steps=1" in capsys.readouterr().err


def test_phantoms_check_and_evaluate(tmp_path: Path, capsys, monkeypatch):
    from sss_jax.data import synthetic

    small = synthetic.SplitSizes(labelled=1, unlabelled=1, val=1, test=1)
    monkeypatch.setattr(
        synthetic.write_phantoms,
        "__kwdefaults__",
        {
            "subjects": small,
            "seed": 0,
            "all_labels": False,
        },
    )
    data = tmp_path / "data"
    assert cli.main(["data", "phantoms", str(data)]) == 0
    assert capsys.readouterr().out.strip() == str(data)
    assert cli.main(["data", "check", str(data), "--config", "demo", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["problems"] == []

    labels = data / "labels"
    assert (
        cli.main(
            ["evaluate", "--pred", str(labels), "--ref", str(labels), "-o", str(tmp_path / "e")]
        )
        == 0
    )
    assert "1.000" in capsys.readouterr().out
    assert (tmp_path / "e" / "metrics.csv").is_file()

    bad = next(labels.iterdir())
    bad.write_bytes(bad.read_bytes()[:-20])
    assert cli.main(["data", "check", str(data), "--config", "demo"]) == 1
    assert bad.name in capsys.readouterr().out


def test_an_empty_folder_is_refused(tmp_path: Path, capsys):
    assert cli.main(["data", "check", str(tmp_path)]) == 1
    assert str(tmp_path) in capsys.readouterr().err


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path, capsys):
    words = ["predict", "--checkpoint", str(tmp_path), "-i", str(tmp_path), "-o", str(tmp_path)]
    assert cli.main(words) == 1
    assert "no run folder" in capsys.readouterr().err
