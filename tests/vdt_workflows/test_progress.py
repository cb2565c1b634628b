"""The bar on a terminal, the lines elsewhere, the log, and what of messages and warnings is shown."""

import logging
import os
import re
import time
import warnings
from contextlib import suppress
from types import SimpleNamespace

import pytest
import torch
from ignite.engine import Engine

from vdt_workflows import ShowProgress, SlabInferer, progress


@pytest.fixture(autouse=True)
def no_bars(monkeypatch):
    monkeypatch.setattr(progress, "_open", [])  # an interrupt in another test leaves one


@pytest.fixture
def terminal(monkeypatch):
    """A terminal of 80 columns as the standard error; calling it gives what was written since."""
    pty = pytest.importorskip("pty")
    ours, theirs = pty.openpty()
    os.set_blocking(ours, False)
    monkeypatch.setenv("COLUMNS", "80")
    with open(theirs, "w") as stream:
        monkeypatch.setattr(progress, "sys", SimpleNamespace(stderr=stream))  # pytest replaces sys.stderr later

        def read():
            try:
                return os.read(ours, 1 << 16).decode()
            except BlockingIOError:
                return ""

        yield read
    os.close(ours)


@pytest.fixture
def at_once(monkeypatch):
    monkeypatch.setattr(progress, "FIRST", 0.0)
    monkeypatch.setattr(progress, "EVERY", 0.0)
    monkeypatch.setattr(progress, "REDRAW", 0.01)


def wait_for(read, pattern):
    seen, end = "", time.monotonic() + 20
    while not re.search(pattern, seen) and time.monotonic() < end:
        seen += read()
        time.sleep(0.01)
    assert re.search(pattern, seen), seen
    return seen


@pytest.mark.parametrize(
    ("bar", "line"),
    [
        (progress.Bar("cases", 4, done=1, note="loss 2"), "cases 1 of 4  25%, 00:30 gone, 01:30 left, loss 2"),
        (progress.Bar("cases", 4, done=1, share=0.5), "cases 1 of 4  38%, 00:30 gone, 00:50 left"),
        (progress.Bar("cases", 10, done=6, first=5), "cases 6 of 10  60%, 00:30 gone, 02:00 left"),
        (progress.Bar("cases", 4), "cases 0 of 4   0%, 00:30 gone, ? left"),
        (progress.Bar("starting"), "starting [00:30]"),
    ],
)
def test_a_bar_tells_the_share_that_is_done_and_the_time_left(bar, line):
    bar.began = time.monotonic() - 30.2
    assert bar.show(0) == line
    assert len(bar.show(60)) <= 60


def test_a_bar_is_drawn_on_a_terminal_and_leaves_no_trace_when_it_was_quick(terminal, monkeypatch):
    monkeypatch.setattr(progress, "REDRAW", 0.0)
    assert list(progress.track("abc", 3, "letters")) == ["a", "b", "c"]
    seen = wait_for(terminal, r"letters 3 of 3 100%.*\r\x1b\[K$")
    assert [f"letters {number} of 3" in seen for number in range(4)] == [True] * 4
    assert max(map(len, re.split(r"\r|\x1b\[K", seen))) == 79


def test_a_full_bar_stays_on_the_terminal_if_it_took_long(terminal, monkeypatch):
    monkeypatch.setattr(progress, "KEPT", 0.0)
    list(progress.track("abc", 3, "letters"))
    wait_for(terminal, r"letters 3 of 3 100%.*\x1b\[K\r?\n$")


def test_there_is_no_bar_without_a_terminal_or_a_label(capsys, terminal):
    list(progress.track("abc", 3, ""))
    assert terminal() == ""


def test_without_a_terminal_lines_are_written_and_kept_in_the_log_of_a_claimed_folder(capsys, at_once, tmp_path):
    (tmp_path / "settings.json").touch()
    with progress.signs("vdt count", folder=tmp_path):
        bar = progress.open_bar("cells", 4)
        bar.step()
        wait_for(lambda: capsys.readouterr().err, r"\nvdt count: cells 1 of 4  25%, 00:0\d gone, \S+ left\n")
    assert re.search(r"\n20\d\d-\S+ \S+ vdt count: cells 1 of 4  25%", (tmp_path / "log.txt").read_text())


def test_a_folder_that_is_not_claimed_gets_no_log(capsys, at_once, tmp_path):
    with progress.signs("vdt count", folder=tmp_path):
        wait_for(lambda: capsys.readouterr().err, "vdt count: starting")
    assert not list(tmp_path.iterdir())


def test_on_a_terminal_messages_stand_above_the_innermost_bar_which_is_redrawn(terminal, at_once):
    with progress.signs("vdt count"):
        wait_for(terminal, r"starting \[00:00\]")
        bar = progress.open_bar("cells", 2)
        wait_for(terminal, r"cells 0 of 2")
        logging.getLogger("vdt_workflows.x").info("ours")
        logging.getLogger("monai").info("theirs")
        logging.getLogger("monai").warning("a warning of theirs")
        warnings.warn("mind", UserWarning, stacklevel=1)
        seen = wait_for(terminal, r"UserWarning: mind\r?\n[^\n]*cells 0 of 2")
        bar.close()
        seen += wait_for(terminal, r"working \[00:00\]")
    assert "\r\x1b[Kours" in seen
    assert "a warning of theirs" in seen
    assert not re.search("[^f] theirs|Ktheirs", seen)
    wait_for(terminal, r"\r\x1b\[K$")


def test_verbose_shows_the_messages_of_libraries_and_no_bar(terminal, at_once):
    with progress.signs("vdt count", verbose=True):
        logging.getLogger("monai").info("theirs")
        seen = wait_for(terminal, "vdt count: starting")
    assert "theirs" in seen
    assert "\r\x1b" not in seen + terminal()


def test_signs_leave_loggers_and_warnings_as_they_were():
    root, ours, shown = logging.getLogger(), logging.getLogger("networks"), warnings.showwarning
    before = root.level, ours.level, [*root.handlers]
    with suppress(KeyError), progress.signs("vdt count"):
        raise KeyError(progress.open_bar("left by an error", 3))
    assert (root.level, ours.level, [*root.handlers]) == before
    assert warnings.showwarning is shown
    assert not progress._open


def test_a_paused_bar_is_not_drawn_until_the_other_process_ended(terminal, at_once):
    with progress.signs("vdt count"):
        with progress.paused() as shown:
            wait_for(terminal, r"\r\x1b\[K$")
            time.sleep(0.05)
            assert terminal() == ""
        wait_for(terminal, "starting")
    assert shown == ("vdt count", False)


def test_inference_moves_the_bar_within_a_volume():
    bar, shares = progress.open_bar("segmented", 1), []

    def network(windows):
        shares.append(bar.share)
        return torch.zeros(len(windows), 2, *windows.shape[2:])

    SlabInferer([4, 4, 4], overlap=0)(torch.zeros(1, 1, 8, 8, 4), network)
    assert (shares, bar.share) == ([0, 0.25, 0.5, 0.75], 1)
    bar.close()


def test_a_training_shows_epoch_step_loss_and_the_last_score_and_begins_where_it_resumed():
    notes = []
    trainer, validator = Engine(lambda *_: {"loss": torch.tensor(0.5)}), Engine(lambda *_: {})
    validator.state.key_metric_name = "val_mean_dice"
    validator.state.metrics["val_mean_dice"] = 0.8125
    handler = ShowProgress(validator=validator)
    handler._read = -1.0
    handler.attach(trainer)

    @trainer.on("EPOCH_COMPLETED")
    def _(engine):
        bar = progress._open[-1]
        notes.append((bar.label, bar.done, bar.total, bar.note))
        validator.run([0, 1])
        notes.append(bar.note)
        handler._read = -1.0

    trainer.load_state_dict({"epoch": 1, "max_epochs": 3, "epoch_length": 2})
    trainer.run([0, 1], max_epochs=3)
    assert notes[0] == ("epoch 2 of 3, step", 4, 6, "loss 0.5")
    assert notes[1:3] == ["loss 0.5, mean dice 0.812", ("epoch 3 of 3, step", 6, 6, "loss 0.5, mean dice 0.812")]
    assert not progress._open


def test_a_training_that_fails_takes_its_bar_away_and_says_why():
    trainer = Engine(lambda *_: {"loss": 1 / 0})
    ShowProgress(validator=Engine(lambda *_: {})).attach(trainer)
    with pytest.raises(ZeroDivisionError):
        trainer.run([0, 1], max_epochs=1)
    assert not progress._open
