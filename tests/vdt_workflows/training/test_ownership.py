from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import socket

import pytest
from monai.bundle import ConfigParser

from vdt_workflows.errors import root_cause
from vdt_workflows.locks import LOCK, hold, leave_folders
from vdt_workflows.training.checkpoints import ResumeRun
from vdt_workflows.training.ownership import RECORD, RunFolders

FORK = multiprocessing.get_context("fork")
SETTINGS = {"epochs": 30, "seed": 0}


@pytest.fixture(autouse=True)
def folders_are_left():
    yield
    leave_folders()


@pytest.fixture
def data(tmp_path):
    """Three cases of three bytes each, in a folder that may move."""
    (tmp_path / "data" / "images").mkdir(parents=True)
    for name in "abc":
        (tmp_path / "data" / "images" / f"{name}.nii").write_text(f"{name}12")
    return tmp_path / "data"


def cases(root, names="abc", label=0):
    return [{"image": str(root / "images" / f"{name}.nii"), "label": label} for name in names]


def make(tmp_path, data, settings=SETTINGS, **more):
    lists = more.pop("lists", None) or {"training": cases(data, "ab"), "validation": cases(data, "c")}
    return RunFolders(str(tmp_path / "models"), str(tmp_path / "eval"), settings, lists, **more)


def begin(tmp_path, data, epochs_done=1, **more):
    """A run that was killed after some epochs."""
    make(tmp_path, data, **more).take()
    if epochs_done:
        (tmp_path / "models" / "model.pt").write_text("weights")
        (tmp_path / "eval" / "resume.pt").write_text("state")


def end(tmp_path, data, **more):
    folders = make(tmp_path, data, **more)
    folders.take()
    (tmp_path / "models" / "model.pt").write_text("weights")
    folders.finish()
    (tmp_path / "eval" / "resume.pt").unlink(missing_ok=True)


def change(path, text, keep_times=True):
    times = path.stat()
    path.write_text(text)
    if keep_times:
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def test_the_same_run_goes_on_also_where_its_data_were_copied_and_touched(tmp_path, data):
    begin(tmp_path, data)
    begin(tmp_path, data)
    shutil.copytree(data, tmp_path / "scratch" / "job2", copy_function=shutil.copyfile)
    begin(tmp_path, tmp_path / "scratch" / "job2")
    (data / "images" / "a.nii").touch()
    begin(tmp_path, data)
    assert (tmp_path / "eval" / "resume.pt").read_text() == "state"


CHANGES = {
    "a file, its size and time kept": (
        lambda data: change(data / "images" / "a.nii", "x12"),
        {},
        "training data: a.nii changed",
    ),
    "a validation file": (lambda data: change(data / "images" / "c.nii", "x12"), {}, "validation data: c.nii changed"),
    "a case less": (lambda data: None, {"names": "a"}, "training data: .* no longer there"),
    "a case more": (lambda data: None, {"names": "abc"}, "training data: c.nii new"),
    "another order": (lambda data: None, {"names": "ba"}, "training data: another order, or other labels"),
    "another label": (lambda data: None, {"label": 1}, "training data: another order, or other labels"),
    "a setting": (lambda data: None, {"settings": {"epochs": 31, "seed": 0}}, "epochs was 30, is 31"),
    "a setting less": (lambda data: None, {"settings": {"epochs": 30}}, "seed was 0, is absent"),
}


@pytest.mark.parametrize("moved", [False, True], ids=["in place", "moved"])
@pytest.mark.parametrize("name", CHANGES)
def test_another_run_is_refused_naming_what_differs_unless_it_may_overwrite(tmp_path, data, name, moved):
    begin(tmp_path, data)
    alter, more, sentence = CHANGES[name]
    if moved:
        data = shutil.move(data, tmp_path / "elsewhere")
    alter(data)
    lists = {"training": cases(data, more.get("names", "ab"), more.get("label", 0)), "validation": cases(data, "c")}
    options = {"lists": lists, "settings": more.get("settings", SETTINGS)}
    with pytest.raises(ValueError, match=rf"there is a run that can go on, but .*{sentence}.*--overwrite true to") as e:
        make(tmp_path, data, **options).take()
    assert "\n" not in str(e.value)
    assert (tmp_path / "eval" / "resume.pt").exists()
    make(tmp_path, data, **options, overwrite="true").take()
    assert not (tmp_path / "eval" / "resume.pt").exists()  # anew


def test_a_finished_run_is_not_repeated_and_not_replaced_by_more_epochs(tmp_path, data, capsys):
    end(tmp_path, data)
    with pytest.raises(SystemExit) as ended:
        make(tmp_path, data).take()
    assert ended.value.code == 0
    assert "this run is finished; give --overwrite true" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"there is a finished run, but epochs was 30, is 31; name another --ckpt_dir"):
        make(tmp_path, data, settings={**SETTINGS, "epochs": 31}).take()
    make(tmp_path, data, overwrite=True).take()
    begin(tmp_path, data, overwrite=True)
    begin(tmp_path, data, overwrite=True)  # killed and begun again: goes on
    assert (tmp_path / "eval" / "resume.pt").exists()


def test_a_folder_of_which_nothing_would_be_lost_is_taken(tmp_path, data):
    begin(tmp_path, data, epochs_done=0)
    begin(tmp_path, data, epochs_done=0, settings={"epochs": 1})
    end(tmp_path, data, settings={"epochs": 1})
    (tmp_path / "models" / "model.pt").unlink()  # by a user, to start again
    make(tmp_path, data, settings={"epochs": 2}).take()


@pytest.mark.parametrize("name", ["models/model.pt", "eval/resume.pt"])
def test_weights_or_a_state_without_a_record_are_not_replaced(tmp_path, data, name):
    for folder in ("models", "eval"):
        (tmp_path / folder).mkdir()
    (tmp_path / name).write_text("kept")
    with pytest.raises(ValueError, match=rf"{name}: of a run that left no record"):
        make(tmp_path, data).take()


def test_a_damaged_record_is_refused_by_name(tmp_path, data):
    begin(tmp_path, data)
    (tmp_path / "models" / RECORD).write_text("{")
    with pytest.raises(ValueError, match=r"models/\.vdt_run\.json: not the whole record of a run; delete it"):
        make(tmp_path, data).take()


def test_first_weights_count_by_their_content(tmp_path, data):
    for name, text in (("a.pt", "same"), ("b.pt", "same"), ("c.pt", "other")):
        (tmp_path / name).write_text(text)
    begin(tmp_path, data, pretrained=tmp_path / "a.pt")
    begin(tmp_path, data, pretrained=tmp_path / "b.pt")
    with pytest.raises(ValueError, match="but pretrained was"):
        begin(tmp_path, data, pretrained=tmp_path / "c.pt")


def test_of_many_files_sizes_count_and_change_times_where_they_were_not_moved(tmp_path, data, monkeypatch):
    monkeypatch.setattr("vdt_workflows.data.fingerprint.MOST_FILES", 0)
    monkeypatch.setattr("vdt_workflows.data.fingerprint.hash_file", lambda file: pytest.fail("read"))
    begin(tmp_path, data)
    begin(tmp_path, data)
    moved = shutil.copytree(data, tmp_path / "moved", copy_function=shutil.copyfile)
    begin(tmp_path, moved)
    change(moved / "images" / "a.nii", "x12")
    with pytest.raises(ValueError, match="training data: files changed since"):
        begin(tmp_path, moved)
    change(moved / "images" / "a.nii", "x1")
    with pytest.raises(ValueError, match="training data: files of another size"):
        begin(tmp_path, shutil.copytree(moved, tmp_path / "again"))


def test_every_value_of_a_config_counts_but_paths_and_workers(tmp_path, data):
    config = {
        "training": cases(data),
        "loss": {"smooth": 1.0},
        "num_workers": 2,
        "began": 1.0,  # when the time of `vdt train --minutes` began
        "epochs": 3,
        "train": {"loader": {"num_workers": 1, "size": 4}},
        "folders": {
            "_target_": "vdt_workflows.RunFolders",
            "ckpt_dir": str(tmp_path / "models"),
            "output_dir": str(tmp_path / "eval"),
            "settings": {"epochs": "@epochs"},
            "data": {"training": "@training"},
        },
        "taken": "$@folders.take()",
    }

    def run(**changes):
        parser = ConfigParser({**config, **{name: value for name, value in changes.items() if "_" not in name}})
        parser.update({name.replace("__", "::"): value for name, value in changes.items() if "__" in name})
        parser.get_parsed_content("taken")
        (tmp_path / "eval" / "resume.pt").touch()

    run()
    run(num_workers=5, began=2.0, train__loader__num_workers=0)
    for change_, sentence in (({"loss__smooth": 2.0}, "loss::smooth was 1.0, is 2.0"), ({"epochs": 4}, "epochs was 3")):
        with pytest.raises(RuntimeError) as error:
            run(**change_)
        assert sentence in str(root_cause(error.value))


def test_who_calls_the_trainer_itself_does_not_go_on_with_the_state_of_another_run(tmp_path, data):
    begin(tmp_path, data)
    other = make(tmp_path, data, {**SETTINGS, "epochs": 7})
    with pytest.raises(ValueError, match=r"there is a run that can go on, but epochs was 30, is 7"):
        ResumeRun(tmp_path / "eval" / "resume.pt", {}, folders=other).load(None)


def test_a_missing_pretrained_file_is_named(tmp_path, data):
    with pytest.raises(FileNotFoundError, match=r"none\.pt: no such checkpoint file"):
        make(tmp_path, data, pretrained=tmp_path / "none.pt").take()


# Locks


def hold_and_wait(folder, pipe):
    hold(folder)
    if os.fork() == 0:  # a child, such as a loader process, that lives on when its parent is killed
        os.setsid()
        pipe.recv()
        os._exit(0)
    pipe.send("held")
    pipe.recv()


def test_a_second_process_is_refused_with_the_first_ones_number_until_that_is_killed(tmp_path):
    ours, theirs = FORK.Pipe()
    process = FORK.Process(target=hold_and_wait, args=(tmp_path, theirs))
    process.start()
    ours.recv()
    with pytest.raises(BlockingIOError) as refused:
        hold(tmp_path)
    holder = f"process {process.pid} on {socket.gethostname()}"
    assert str(refused.value) == f"{tmp_path}: in use by {holder}; wait for its end, end it, or name another folder"
    process.kill()
    process.join()
    hold(tmp_path, tmp_path)  # also twice
    ours.send("end")
    assert sorted(os.listdir(tmp_path)) == [LOCK]


def test_a_start_removes_what_a_killed_run_left_half_written(tmp_path, data):
    begin(tmp_path, data)
    (tmp_path / "models" / ".abc.part").touch()
    (tmp_path / "models" / ".DS_Store").touch()
    begin(tmp_path, data)
    assert sorted(os.listdir(tmp_path / "models")) == [".DS_Store", LOCK, RECORD, "model.pt"]
    assert json.loads((tmp_path / "models" / RECORD).read_text())["finished"] is False
