"""The metrics file survives crashes and resumes; people see one line per report."""

import io
import json
import math
import sys
import types

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sss_jax.train import log
from sss_jax.train.log import MetricsLog, Progress, format_seconds, progress_line


def train_row(step: int) -> dict:
    return {"kind": "train", "step": step, "loss": 1.0 / step}


def lines(workdir) -> list[str]:
    return (workdir / "metrics.jsonl").read_text().splitlines()


def test_one_strict_json_object_per_line_on_disk_at_once(tmp_path):
    metrics = MetricsLog(tmp_path)
    metrics.write({"kind": "train", "step": np.int64(3), "loss": jnp.float32(0.5), "ok": True})
    assert lines(tmp_path) == ['{"kind": "train", "step": 3, "loss": 0.5, "ok": true}']
    metrics.write({"step": 4, "per_class": [np.float32(1), None], "case": 'a"\nb', "n": {"x": 1}})
    assert len(lines(tmp_path)) == 2
    assert metrics.rows()[1]["case"] == 'a"\nb'
    metrics.close()


def refuse(name):
    raise AssertionError(f"{name} is not JSON")


@settings(max_examples=50, deadline=None)
@given(st.lists(st.one_of(st.floats(), st.integers(), st.text(), st.booleans(), st.none())))
def test_rows_come_back_as_written(tmp_path_factory, values):
    workdir = tmp_path_factory.mktemp("log")
    with MetricsLog(workdir) as metrics:
        metrics.write({"step": 1, "values": values})
        (row,) = metrics.rows()
    (line,) = (workdir / "metrics.jsonl").read_text().split("\n")[:-1]
    json.loads(line, parse_constant=refuse)
    for read, value in zip(row["values"], values, strict=True):
        both_nan = isinstance(value, float) and math.isnan(value) and math.isnan(read)
        named = log._NONFINITE.get(value) if isinstance(value, str) else None
        assert both_nan or read == value or str(read) == str(named)


@pytest.mark.parametrize(
    ("value", "text"), [(math.nan, '"NaN"'), (math.inf, '"Infinity"'), (-math.inf, '"-Infinity"')]
)
def test_nonfinite_numbers_have_a_defined_form(tmp_path, value, text):
    with MetricsLog(tmp_path) as metrics:
        metrics.write({"step": 1, "a": value, "b": np.float32(value), "c": jnp.float32(value)})
        assert lines(tmp_path) == [f'{{"step": 1, "a": {text}, "b": {text}, "c": {text}}}']
        assert str(metrics.rows()[0]["b"]) == str(value)


@pytest.mark.parametrize("interrupted_at", [0, 1, 5, 9, 10])
def test_resumed_file_equals_an_uninterrupted_one(tmp_path, interrupted_at):
    """A run saved at a step, went on, was killed, and resumed from what it had saved."""

    def run(workdir, start, stop):
        with MetricsLog(workdir) as metrics:
            metrics.truncate(start)
            for step in range(start + 1, stop + 1):
                metrics.write(train_row(step))
                if step % 5 == 0:
                    metrics.write({"kind": "val", "step": step, "dice": step / 100})

    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    whole.mkdir(), resumed.mkdir()
    run(whole, 0, 12)
    run(resumed, 0, 10)
    with (resumed / "metrics.jsonl").open("a") as stream:
        stream.write('{"kind": "train", "step": 11, "lo')
    run(resumed, interrupted_at, 12)
    assert (resumed / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    assert [path.name for path in resumed.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize("cut", range(1, 30))
def test_torn_last_line_is_repaired_before_the_next_row(tmp_path, cut):
    with MetricsLog(tmp_path) as metrics:
        metrics.write(train_row(1))
        metrics.write(train_row(2))
    path = tmp_path / "metrics.jsonl"
    content = path.read_bytes()
    path.write_bytes(content[:-cut])
    with MetricsLog(tmp_path) as metrics:
        metrics.write(train_row(3))
        # Without its line end alone the row is still whole, and is kept.
        expected = [1, 2, 3] if cut == 1 else [1, 3]
        assert [row["step"] for row in metrics.rows()] == expected
    assert path.read_bytes().count(b"\n") == len(expected)


def test_damaged_lines_are_left_out_and_rows_without_a_step_stay(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"note": "start"}\n\xff\xfe{"step": 1\n[1, 2]\n\n{"step": 2}\n{"step": 9}\n')
    with MetricsLog(tmp_path) as metrics:
        metrics.truncate(2)
    assert lines(tmp_path) == ['{"note": "start"}', '{"step": 2}']


def test_nothing_is_written_before_the_first_row(tmp_path):
    with MetricsLog(tmp_path) as metrics:
        metrics.truncate(0)
        assert metrics.rows() == []
        assert metrics.best("dice") is None
    assert list(tmp_path.iterdir()) == []


def test_best_looks_at_finite_validation_scores_alone(tmp_path):
    with MetricsLog(tmp_path) as metrics:
        metrics.write({"kind": "train", "step": 1, "dice": 0.99})
        for step, dice in enumerate([0.3, math.nan, 0.7, 0.5, None]):
            metrics.write({"kind": "val", "step": step, "dice": dice})
        assert metrics.best("dice") == 0.7
        assert metrics.best("loss") is None


def test_unwritable_value_is_an_error_and_leaves_the_file_whole(tmp_path):
    with MetricsLog(tmp_path) as metrics:
        metrics.write(train_row(1))
        with pytest.raises((TypeError, ValueError)):
            metrics.write({"step": 2, "array": np.zeros(3)})
        metrics.write(train_row(3))
        assert [row["step"] for row in metrics.rows()] == [1, 3]


class FakeWriter:
    made: list = []

    def __init__(self, folder, purge_step=None):
        self.folder, self.purge_step, self.scalars, self.open = folder, purge_step, [], True
        FakeWriter.made.append(self)

    def add_scalar(self, *args):
        self.scalars.append(args)

    def close(self):
        self.open = False


def test_tensorboard_gets_the_numbers_and_forgets_what_is_redone(tmp_path, monkeypatch):
    module = types.ModuleType("tensorboardX")
    module.SummaryWriter = FakeWriter
    module.__spec__ = object()
    monkeypatch.setitem(sys.modules, "tensorboardX", module)
    FakeWriter.made.clear()
    with MetricsLog(tmp_path) as metrics:
        metrics.write({"kind": "train", "step": 6, "loss": 0.5, "note": "text"})
        metrics.truncate(5)
        metrics.write({"kind": "val", "step": 6, "dice": jnp.float32(0.25)})
    first, second = FakeWriter.made
    assert first.scalars == [("train/loss", 0.5, 6)]
    assert first.purge_step is None
    assert second.purge_step == 6
    assert second.scalars == [("val/dice", 0.25, 6)]
    assert not first.open
    assert not second.open
    assert first.folder == str(tmp_path / "tensorboard")


def test_without_tensorboard_there_is_no_word_about_it(tmp_path, monkeypatch, capfd, caplog):
    monkeypatch.setattr(log.importlib.util, "find_spec", lambda name: None)
    with MetricsLog(tmp_path) as metrics:
        metrics.write(train_row(1))
    assert capfd.readouterr() == ("", "")
    assert caplog.text == ""


# For people.

ROW = {
    "kind": "train",
    "step": 20,
    "loss": 0.123456,
    "coverage": 0.875,
    "pseudo_accuracy": 0.9,
    "slices_per_s": 12.5,
    "data_wait": 0.01,
    "cases": 3,
}
TEXT = (
    "step 20/100  loss 0.1235  coverage 0.875  pseudo_accuracy 0.9  slices_per_s 12.5  "
    "data_wait 0.01  cases 3"
)


def test_line_holds_every_number_of_the_row():
    assert progress_line(20, 100, ROW) == TEXT
    assert progress_line(1, 2, {"loss": math.nan}) == "step 1/2  loss nan"


def test_plain_lines_and_time_left_where_there_is_no_terminal():
    stream, clock = io.StringIO(), iter([0.0, 5.0, 20.0, 30.0])
    with Progress(100, 10, stream=stream, clock=lambda: next(clock)) as progress:
        progress.update(20, ROW)
        progress.message("validation: dice 0.5")
        progress.update(100, ROW)
    # 10 steps since the start took 15 s, 80 are left.
    first, second, third = stream.getvalue().splitlines()
    assert first == f"{TEXT}  left 2m00s"
    assert second == "validation: dice 0.5"
    assert third == TEXT.replace("20/100", "100/100")


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self):
        return True


def test_one_live_line_on_a_terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "60")
    stream = Terminal()
    with Progress(100, stream=stream) as progress:
        progress.update(20, ROW)
        progress.message("[dice] 0.5")
        progress.update(30, ROW)
    text = stream.getvalue()
    assert "\x1b[" in text
    assert "[dice] 0.5" in text
    assert "step 30/100" in text
    # A line that is too long is cut, never wrapped: a wrapped line could not be drawn over.
    assert "cases 3" not in text


def test_dumb_terminal_gets_plain_lines(monkeypatch):
    for term in ("dumb", None):
        if term is None:
            monkeypatch.delenv("TERM")
        else:
            monkeypatch.setenv("TERM", term)
        stream = Terminal()
        with Progress(100, stream=stream) as progress:
            progress.update(20, ROW)
        assert "\x1b" not in stream.getvalue()
        assert stream.getvalue().startswith(TEXT)


def test_nothing_goes_to_standard_output(capsys):
    with Progress(2) as progress:
        progress.update(1, ROW)
        progress.message("done")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "step 1/2" in captured.err


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (59.4, "59s"), (59.6, "1m00s"), (3599.6, "1h00m"), (7620, "2h07m")],
)
def test_format_seconds(seconds, text):
    assert format_seconds(seconds) == text
