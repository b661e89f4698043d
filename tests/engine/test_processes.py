"""Processes that ``torchrun`` starts train what one would, end together, and go on where they were."""

from __future__ import annotations

import fcntl
import json
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pytest
import torch
from _tolerances import FIT_OF_SEVERAL_PROCESSES
from engine import _together
from engine._together import CASES, MARK, STEPS

from scvi_ext.engine import processes
from scvi_ext.engine.processes import LostProcessError, device_of_rank, join

if TYPE_CHECKING:
    from collections.abc import Callable

cases = pytest.mark.parametrize("name", CASES)


@dataclass(frozen=True)
class Started:
    """What processes left behind: how they ended, what each of them found, and said in its last attempt."""

    code: int
    found: list[Any]
    said: list[str]
    folder: Path

    @property
    def all_said(self) -> str:
        return "\n".join(f"---- {rank}\n{text}" for rank, text in enumerate(self.said))


ENVIRONMENT = os.environ | {
    "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
    "OMP_NUM_THREADS": "1",
    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",  # or processes that are started again meet where the first ones did
}


def torchrun(folder: Path, task: str, *arguments: str, files: Path, attempt: int = 0) -> Started:
    """Run a task as two processes in ``folder``; ``attempt``: how often they are started again when one is lost."""
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    run += [f"--max-restarts={attempt}", "--redirects=3", f"--log-dir={folder / 'logs'}", "--no-python"]
    run += [sys.executable, "-W", "error", _together.__file__, task, str(files), *arguments]
    with subprocess.Popen(
        run,
        cwd=folder,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            process.communicate(timeout=300)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)
    paths = [folder / f"found{rank}" for rank in range(2)]
    logs = [next((folder / "logs").glob(f"*/attempt_{attempt}/{rank}/stderr.log")) for rank in range(2)]
    found = [pickle.loads(path.read_bytes()) if path.exists() else None for path in paths]
    return Started(process.returncode, found, [log.read_text() for log in logs], folder)


def divided(task: str, folder: Path, files: Path, n: int) -> list[Any]:
    """What the first of the processes find that a task divides itself into."""
    run = [sys.executable, "-W", "error", _together.__file__, task, str(files)]
    done = subprocess.run(run, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return [pickle.loads((folder / f"found{rank}").read_bytes()) for rank in range(n)]


@pytest.fixture(scope="module")
def once(tmp_path_factory) -> Callable[[str, Callable[[Path], Any]], Any]:
    """``once(name, make)``: what ``make(folder)`` returns, made once for all workers of pytest-xdist."""
    of_all = tmp_path_factory.getbasetemp()
    of_all = of_all.parent if "PYTEST_XDIST_WORKER" in os.environ else of_all

    def get(name: str, make: Callable[[Path], Any]) -> Any:
        made = of_all / f"{name}.made"
        with (of_all / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not made.exists():
                made.write_bytes(pickle.dumps(make(Path(tempfile.mkdtemp(prefix=name, dir=of_all)))))
        return pickle.loads(made.read_bytes())

    return get


@pytest.fixture(scope="module")
def files(once) -> Path:
    """The cells on disk."""

    def write(folder: Path) -> Path:
        _together.write_files(folder)
        return folder

    return once("cells", write)


@pytest.fixture(scope="module")
def alone(once, files) -> dict[str, Any]:
    """What one process finds."""
    return once("alone", lambda folder: {name: _together.fitted(name, files) for name in CASES})


@pytest.fixture(scope="module")
def pair(once, files) -> Started:
    """Two processes that do all that leaves both of them alive."""

    def start(folder: Path) -> Started:
        started = torchrun(folder, "everything", files=files)
        assert started.code == 0, started.all_said
        return started

    return once("pair", start)


def assert_same_fit(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """To the bit."""
    assert found["state"].keys() == expected["state"].keys()
    for name, values in expected["state"].items():
        np.testing.assert_array_equal(found["state"][name], values, err_msg=name)
    pd.testing.assert_frame_equal(found["history"], expected["history"], check_exact=True)


def assert_close_fit(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Up to the order of sums."""
    assert found["state"].keys() == expected["state"].keys()
    for name, values in expected["state"].items():
        np.testing.assert_allclose(found["state"][name], values, **FIT_OF_SEVERAL_PROCESSES, err_msg=name)
    pd.testing.assert_frame_equal(found["history"], expected["history"], check_exact=False, **FIT_OF_SEVERAL_PROCESSES)


# ---- what they train -----------------------------------------------------------------------------------------------


@cases
def test_two_processes_train_what_one_does(name, pair, alone):
    assert_close_fit(pair.found[0][name], alone[name])
    for word in ("steps", "epochs", "stop_reason", "data"):
        assert pair.found[0][name]["status"][word] == alone[name]["status"][word]


@cases
def test_processes_end_with_the_same_weights_to_the_bit(name, pair):
    assert_same_fit(pair.found[1][name], pair.found[0][name])


def test_four_processes_train_what_one_does(tmp_path, files, alone):
    first, *others = divided("four", tmp_path, files, 4)
    assert_close_fit(first, alone["ldvae"])
    for other in others:
        assert_same_fit(other, first)


def test_the_cases_are_what_they_are_called(alone):
    assert len(alone["stops early"]["history"]) < CASES["stops early"].options["max_epochs"]
    assert alone["stops early"]["status"]["stop_reason"] == "early stopping"
    assert all(alone[name]["run"]["blocks"]["n_blocks"] > 2 for name in CASES if CASES[name].source in ("h5ad", "zarr"))
    assert alone["a cell that is infinite"]["status"]["non_finite_cells"] == ["cell17"]
    status = alone["a step that is not finite"]["status"]
    assert (status["non_finite_events"], "non_finite_cells" in status) == (1, False)


@pytest.mark.parametrize("name", ["a cell that is infinite", "a step that is not finite"])
def test_the_guard_sees_the_same_everywhere(name, pair, alone):
    for found in pair.found:
        for word in ("non_finite_events", "non_finite_suspects", "non_finite_genes", "non_finite_cells"):
            assert found[name]["status"].get(word) == alone[name]["status"].get(word)


# ---- who speaks ----------------------------------------------------------------------------------------------------


def test_only_the_first_process_warns(pair, alone):
    for name in CASES:
        assert pair.found[0][name]["warned"] == alone[name]["warned"]
        assert pair.found[1][name]["warned"] == []
    assert len(alone["a step that is not finite"]["warned"]) == 1


def test_only_the_first_process_logs_and_shows_a_bar(pair):
    first, second = (said.partition(MARK)[0] for said in pair.said)
    assert first.count("steps of 32 cells, shared by 2 processes") == len(CASES)
    assert "fit:" in first
    assert second == ""


# ---- who takes part ------------------------------------------------------------------------------------------------


def test_a_process_group_that_is_there_is_used_and_left(pair, alone):
    for found in pair.found:
        assert_same_fit(found["own group"], found["ldvae"])
        assert found["group remains"]


@pytest.mark.parametrize("world", ["alone", "alone in a world"])
def test_without_others_nothing_is_joined_and_nothing_changes(world, pair, alone):
    for found in pair.found:
        assert_same_fit(found[world], alone["ldvae"])
        assert found["joined nothing"]


def test_searches_and_mapped_queries_are_those_of_each_process(pair):
    first, second = pair.found
    assert_same_fit(first["mapped"], second["mapped"])
    assert_same_fit(first["tuned"], second["tuned"])
    assert first["tuned"]["best"] == second["tuned"]["best"]


@pytest.mark.parametrize(("n_devices", "local"), [(1, 1), (2, 3)])
def test_more_processes_than_devices_are_refused(monkeypatch, n_devices, local):
    monkeypatch.setenv("LOCAL_RANK", str(local))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: n_devices)
    message = rf"process {local} of its machine .* has {n_devices} CUDA devices.*--nproc-per-node {n_devices}, or give"
    with pytest.raises(ValueError, match=message):
        device_of_rank(torch.device("cuda", 0))


def test_each_process_of_a_machine_has_its_own_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert device_of_rank(torch.device("cuda", 0)) == torch.device("cuda", 0)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert device_of_rank(torch.device("cuda", 0)) == torch.device("cuda", 1)
    assert device_of_rank(torch.device("cpu")) == torch.device("cpu")


# ---- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["cells", "options"])
def test_processes_that_were_not_given_the_same_are_all_told_who_differs(what, pair):
    for found in pair.found:
        assert "The 2 processes of this run were not given the same: rank 1 came with other" in found["refused"][what]


@pytest.mark.parametrize(("what", "usable"), [("batch_size", 32), ("three cells", 4)])
def test_a_step_that_cannot_be_shared_is_refused_with_one_that_can(what, usable, pair):
    n = CASES["scvi"].options["batch_size"] + 1 if what == "batch_size" else 3
    message = f"ValueError: {n} cells of a step cannot be shared equally by 2 processes: give batch_size={usable}, or"
    for found in pair.found:
        assert found["refused"][what].startswith(message)


def test_a_process_that_has_ended_is_noticed_outside_of_training_too(tmp_path, files):
    (found,) = divided("left", tmp_path, files, 1)
    for call in ("set-up", "fit", "read-out"):
        assert found[call].startswith("LostProcessError: Another of the 2 processes of this run has ended, so that")


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"WORLD_SIZE": "two", "RANK": "0"}, "WORLD_SIZE is 'two', which is no number of processes"),
        ({"WORLD_SIZE": "2", "RANK": "1"}, "WORLD_SIZE=2 and RANK=1 in its environment.*no MASTER_ADDR and no MASTER"),
        ({"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "node0"}, "no MASTER_PORT: start the script by torchrun, or"),
    ],
)
def test_an_environment_that_is_half_torchruns_is_refused(monkeypatch, environment, message):
    for name in ("WORLD_SIZE", "RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        join(torch.device("cpu"))


@pytest.mark.parametrize("environment", [{"WORLD_SIZE": "", "RANK": ""}, {"WORLD_SIZE": "4"}, {"RANK": "0"}], ids=str)
def test_an_environment_of_somebody_else_is_that_of_one_process(monkeypatch, environment):
    for name in ("WORLD_SIZE", "RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert join(torch.device("cpu")).n == 1


def test_processes_that_do_not_find_each_other_are_told(monkeypatch):
    def alone(*arguments):
        raise torch.distributed.DistStoreError("Timed out after 1801 seconds waiting for clients. 1/2 clients joined.")

    monkeypatch.setattr(torch.distributed, "init_process_group", alone)
    found = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "node0", "MASTER_PORT": "29500"}
    for name, value in found.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(
        LostProcessError, match=r"did not find each other \(Timed out after 1801 seconds.*must run a script"
    ):
        join(torch.device("cpu"))


def test_a_process_that_waits_for_others_says_so(monkeypatch):
    said = threading.Event()
    monkeypatch.setattr(processes, "_PATIENCE", 0.01)
    monkeypatch.setattr(processes, "warn", lambda message: said.set() if "goes on waiting" in message else None)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda backend: said.wait(60))
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "node0", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)
    processes._meet(torch.device("cpu"))
    assert said.is_set()


# ---- what interrupts them ------------------------------------------------------------------------------------------


def test_one_process_that_is_asked_to_stop_stops_all_of_them_at_the_same_step(pair):
    for found in pair.found:
        assert found["Ctrl-C"] == "KeyboardInterrupt: "
        assert (found["stopped"]["stop_reason"], found["stopped"]["steps"]) == ("interrupted", STEPS + 2)
        assert_same_fit(found["went on"], found["scvi"])


def test_processes_leave_a_fit_together_when_it_is_in_its_file(pair):
    assert all(found["kept"] for found in pair.found)


def test_a_file_that_one_process_cannot_read_ends_all_of_them_and_the_fit_goes_on(pair):
    first, second = (found["damaged"] for found in pair.found)
    for when in ("first block", "later block"):
        assert first[when].startswith("UnreadableRowsError: Another process of this run could not read its cells")
        assert "own1" in second[when]
    for of_one in (first, second):
        assert of_one["status"] == first["status"]
        assert of_one["status"]["stop_reason"] == "interrupted"
        assert STEPS <= of_one["status"]["steps"] < 3 * STEPS
        assert_same_fit(of_one["went on"], pair.found[0]["scvi, zarr"])


def test_no_file_is_left_of_runs_that_are_over(pair):
    assert pair.found[0]["files left"] == pair.found[1]["files left"] == ["logs"]


def test_a_run_whose_processes_are_killed_and_stopped_goes_on_as_if_nothing_had_been(tmp_path, files, pair):
    def go_on(name: str, *plan: tuple | None, resume: str = "auto") -> Started:
        logs = tmp_path / "logs"
        if logs.exists():
            logs.rename(tmp_path / f"logs before {name}")
        return torchrun(tmp_path, "under_way", json.dumps(plan), resume, files=files, attempt=len(plan) - 1)

    file = tmp_path / "scvi.checkpoint"
    # The second process is lost in the second epoch; all are started again, and then the first one is lost.
    killed = go_on("kills", (STEPS + 2, "SIGKILL", 1), (STEPS + 3, "SIGKILL", 0))
    assert killed.code != 0
    (log,) = (tmp_path / "logs").glob("*/attempt_0/0/stderr.log")
    for step, survivor in ((STEPS, log.read_text()), (2 * STEPS, killed.said[1])):
        assert "LostProcessError: Another of the 2 processes of this run has ended" in survivor
        assert f"What was trained until step {step} is kept as 'scvi' and in 'scvi.checkpoint'" in survivor
    assert file.exists()

    # The second step of 14 and 15; all agree every 4 steps.
    terminated = go_on("SIGTERM", (2, "SIGTERM", None), resume="true")
    assert terminated.code != 0
    assert "interrupted at step 16; what was trained is kept as 'scvi' and in 'scvi.checkpoint'" in terminated.said[0]
    stopped = go_on("SIGINT", (1, "SIGINT", None))
    assert stopped.code != 0
    assert "interrupted at step 18; what was trained is kept" in stopped.said[0]  # they agree when an epoch ends, too
    assert all("KeyboardInterrupt" in said for said in stopped.said)
    assert file.exists()

    finished = go_on("nothing", None)
    assert finished.code == 0, finished.all_said
    for found in finished.found:
        assert_same_fit(found, pair.found[0]["scvi"])
    assert not [path.name for path in tmp_path.iterdir() if "checkpoint" in path.name]
