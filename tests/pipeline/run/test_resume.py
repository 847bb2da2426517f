"""Runs that are interrupted or spread over processes end in the results of the unbroken one."""

import contextlib
import multiprocessing
import multiprocessing.forkserver
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import pytest
import torch

from tests.helpers import ROOT
from tests.helpers.runs import COLUMNS, read_json
from trm_losses import TRMHead
from trm_pipeline import files as checkpoint
from trm_pipeline import methods
from trm_pipeline.data.voc import class_prompt_names
from trm_pipeline.run import cells, experiment, prepared, results

SMALL = ("--methods", "trm", "trm-rule-teacher", "linear", "--known", "0.5", "single", "--epochs", "3", "--set", "batch_size=16")


def die_at(moment, arguments):
    """The command, in a process of its own that is killed in the middle of something."""
    calls = 0

    def after(calls_before, original, last_words=lambda *a: None):
        def wrapped(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls > calls_before:
                last_words(*args)
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)

        return wrapped

    if moment == "in an epoch":
        methods.TRM.after_step = after(4, methods.TRM.after_step)
    elif moment == "between a cell and its row":
        results.Results.add = after(1, results.Results.add)
    elif moment == "between two cells":
        results.checkpoint_path = after(0, results.checkpoint_path)
    elif moment == "writing a checkpoint":
        Path.write_bytes = after(2, Path.write_bytes, lambda path, content: path.write_text("half", encoding="utf-8"))
    elif moment == "writing the results":
        replace, writing = os.replace, after(1, os.replace)
        os.replace = lambda source, path: (writing if str(path).endswith("results.json") else replace)(source, path)
    experiment.main(arguments)


def in_a_group(arguments, said):
    """The command as a shell starts it: head of a group of processes, ended by Ctrl-C; its errors go into a file."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which one started in the background lacks
    os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT), 2)
    experiment.main(arguments)


@pytest.fixture(scope="module")
def command(devkit, cache):
    """Arguments of the small run for a process of its own; all of them, and this one, have one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield ["--data-root", str(devkit), "--preset", "embedded", "--cache", str(cache), "--device", "cpu", *SMALL]
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def forked():
    """Starts a function in a process that has imported all there is: a fork of a server without threads."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["open_clip", __name__])
    with pytest.MonkeyPatch.context() as patch:  # for the server, which lives on
        for name, value in {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}.items():
            patch.setenv(name, value)
        multiprocessing.forkserver.ensure_running()

    def start(function, *arguments):
        process = context.Process(target=function, args=arguments)
        process.start()
        return process

    return start


@pytest.fixture(scope="module")
def unbroken(command, tmp_path_factory):
    """The folder of the small run that nothing interrupts."""
    output = tmp_path_factory.mktemp("unbroken")
    experiment.main([*command, "--output", str(output)])
    return output


def assert_same_run(first, second):
    assert (first / "results.json").read_bytes() == (second / "results.json").read_bytes()
    assert not list((first / "checkpoints").glob("*.pt"))
    for path in (second / "pseudo").iterdir():
        assert (first / "pseudo" / path.name).read_bytes() == path.read_bytes()
    for path in second.glob("*.pt"):
        heads = [TRMHead.load(folder / path.name).state_dict() for folder in (first, second)]
        assert all(torch.equal(value, heads[1][key]) for key, value in heads[0].items())


@pytest.mark.parametrize(
    "moment", ["in an epoch", "between a cell and its row", "between two cells", "writing a checkpoint", "writing the results"]
)
def test_a_killed_run_goes_on_to_the_same_results(moment, command, forked, unbroken, tmp_path):
    arguments = [*command, "--output", str(tmp_path / "out")]
    killed = forked(die_at, moment, arguments)
    killed.join()
    assert killed.exitcode == -signal.SIGKILL
    finished = tmp_path / "out" / "results.json"
    assert not finished.exists() or len(read_json(finished)) < 4
    experiment.main([*arguments, "--resume"])
    assert_same_run(tmp_path / "out", unbroken)


def test_a_checkpoint_is_gone_on_from_at_its_epoch(command, unbroken, tmp_path, monkeypatch):
    arguments = [*command, "--output", str(tmp_path)]
    original, epochs = checkpoint.Checkpoint.save, []

    def interrupted(self, state):
        epochs.append(state["epoch"])
        original(self, state)
        if len(epochs) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint.Checkpoint, "save", interrupted)
    with pytest.raises(SystemExit, match="--resume goes on"):
        experiment.main(arguments)
    experiment.main([*arguments, "--resume"])
    assert epochs == 6 * [1, 2, 3]
    assert_same_run(tmp_path, unbroken)


def test_a_finished_run_has_nothing_to_resume(command, unbroken, monkeypatch, capsys):
    before = (unbroken / "results.json").read_bytes(), (unbroken / "times.json").read_bytes()
    monkeypatch.setattr(prepared, "train", None)
    experiment.main([*command, "--output", str(unbroken), "--resume"])
    assert before == ((unbroken / "results.json").read_bytes(), (unbroken / "times.json").read_bytes())
    assert "6 of 6 rows are there already" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--set", "lr=1"], "lr was 0.0003, now 1.0"),
        (["--seeds", "2"], r"seeds was \[1\], now \[2\]"),
        (["--amp"], "amp was false, now true"),
    ],
)
def test_resume_refuses_other_settings_by_name(command, unbroken, change, message):
    before = (unbroken / "results.json").read_bytes()
    with pytest.raises(SystemExit, match=message):
        experiment.main([*command, "--output", str(unbroken), "--resume", *change])
    assert before == (unbroken / "results.json").read_bytes()


def test_resume_refuses_other_names_of_the_classes(command, unbroken, tmp_path):
    """Also where a file spells them as the data do, which prompts spell in another way."""
    names = tmp_path / "names.txt"
    for given in (class_prompt_names(), class_prompt_names()[::-1]):
        names.write_text("\n".join(given), encoding="utf-8")
        with pytest.raises(SystemExit, match="class_names was null, now "):
            experiment.main([*command, "--output", str(unbroken), "--resume", "--class-names", str(names)])


def test_a_checkpoint_of_other_labels_is_refused(tmp_path):
    path = tmp_path / "cell.pt"
    checkpoint.Checkpoint(path, {"labels": "a"}).save({"epoch": 1})
    assert checkpoint.Checkpoint(path, {"labels": "a"}).load() == {"epoch": 1}
    with pytest.raises(ValueError, match='labels was "a", now "b"'):
        checkpoint.Checkpoint(path, {"labels": "b"}).load()


def test_without_resume_a_folder_is_begun_afresh(run, tmp_path):
    run("--methods", "trm-rule-teacher", "linear")
    (tmp_path / "out" / "checkpoints").mkdir(exist_ok=True)
    (tmp_path / "out" / "checkpoints" / "linear-known0.5-seed1.pt").write_bytes(b"of another run")
    old = ("trm-known0.5-seed1.pt", "map_against_known-linear.png", "saliency-trm.png", "pseudo_labels-trm.png")
    for name in old:
        (tmp_path / "out" / name).write_bytes(b"of another run")
    rows = run("--methods", "linear")
    assert [row["method"] for row in rows] == ["linear"]
    assert run("--methods", "linear", "--resume", output=tmp_path / "nothing yet") == rows
    assert not list((tmp_path / "out" / "pseudo").iterdir()) and not any((tmp_path / "out" / name).exists() for name in old)
    assert read_json(tmp_path / "out" / "run.json")["methods"] == ["linear"]


def test_a_folder_is_held_by_one_process_until_it_is_killed(run, tmp_path):
    pytest.importorskip("fcntl")
    (head := tmp_path / "out" / "trm-known0.5-seed1.pt").parent.mkdir()
    head.write_bytes(b"of the run that goes on")
    holding = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX); print(flush=True); input()"
    typed = [sys.executable, "-c", holding, str(tmp_path / "out" / ".lock")]
    with subprocess.Popen(typed, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        with pytest.raises(SystemExit, match="^error: --output: .* no other run writes into"):
            run("--methods", "zero-shot-global")
        other.kill()
    assert head.exists()
    assert run("--methods", "zero-shot-global")


def test_seconds_stand_beside_the_results(unbroken):
    rows, times = (read_json(unbroken / name) for name in ("results.json", "times.json"))
    keys = ("method", "known", "seed")
    assert [[row[key] for key in keys] for row in rows] == [[row[key] for key in keys] for row in times]
    assert all(set(row) == COLUMNS for row in rows)
    assert all(set(row) == {*keys, "seconds", "peak_mib", "parameters"} for row in times)
    assert all(row["seconds"] > 0 and row["parameters"] > 0 for row in times)


# Several processes


def test_jobs_change_nothing_but_the_time(command, unbroken, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    experiment.main([*command, "--output", str(tmp_path), "--jobs", "2"])
    assert_same_run(tmp_path, unbroken)
    out = capfd.readouterr().out
    assert sum(line.startswith(("trm, ", "linear, ")) for line in out.splitlines()) == 4


def workers_of(pid):
    """Processes below one, by id."""
    found = subprocess.run(["ps", "-eo", "pid=,ppid=,stat="], capture_output=True, text=True, check=True).stdout
    below = {pid}
    for _ in range(3):
        rows = (line.split() for line in found.splitlines())
        below |= {int(child) for child, parent, stat in rows if int(parent) in below and not stat.startswith("Z")}
    return below - {pid}


def alive(pids):
    found = subprocess.run(["ps", "-eo", "pid=,stat="], capture_output=True, text=True, check=True).stdout
    running = {int(line.split()[0]) for line in found.splitlines() if not line.split()[1].startswith("Z")}
    return running & set(pids)


@pytest.mark.skipif(shutil.which("ps") is None, reason="looks for processes with ps")
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_the_end_of_a_run_is_the_end_of_its_processes(how, command, forked, tmp_path):
    said = tmp_path / "said.txt"
    process = forked(in_a_group, [*command, "--output", str(tmp_path / "out"), "--jobs", "2", "--epochs", "1000"], said)
    try:
        limit = time.monotonic() + 120
        while len(list((tmp_path / "out").glob("checkpoints/*.pt"))) < 2:
            assert process.is_alive() and time.monotonic() < limit
            time.sleep(0.1)
        workers = workers_of(process.pid)
        assert len(workers) >= 2
        if how == signal.SIGINT:
            os.killpg(process.pid, how)  # as a terminal does: to all of them
            process.join(60)
            assert "--resume goes on from here" in said.read_text(encoding="utf-8").splitlines()[-1]
        else:
            process.kill()
            process.join()
        limit = time.monotonic() + 20
        while alive(workers) and time.monotonic() < limit:
            time.sleep(0.1)
        assert not alive(workers)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def test_a_killed_process_ends_the_run_with_one_clear_line(run, monkeypatch):
    def broken(*_):
        raise BrokenProcessPool("abruptly")
        yield

    monkeypatch.setattr(cells, "_in_processes", broken)
    with pytest.raises(SystemExit, match="--resume and fewer jobs"):
        run("--methods", "linear", "--jobs", "2")
