"""The launcher and its ranks: logs, exit codes, one message for a failure, restarts, and ranks that die or hang."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from trainwright import launch
from trainwright.launch import ranks as launch_ranks
from trainwright.launch import start as launch_start
from trainwright.launch import worker
from trainwright.launch.ranks import Beat, Failure
from trainwright.recipe import InputError, RunError

ROOT = Path(__file__).parents[1]
LAUNCH = (
    "import json, sys; from pathlib import Path; from trainwright import launch; a = json.loads(sys.argv[1]);"
    "sys.exit(launch.run(a['arguments'], a['nproc'], max_restarts=a['restarts'], folder=Path(a['run']), module=a['module']))"
)


def environment(**changes: str) -> dict[str, str]:
    """Ours without what would make a process one of another job's."""
    drop = {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK", "LOCAL_WORLD_SIZE"}
    return {**{name: value for name, value in os.environ.items() if name not in drop}, "OMP_NUM_THREADS": "1", **changes}


@dataclass
class Launched:
    """A launcher that was started, in a folder of its own: state/ is what the workers share, run/ the run's folder."""

    process: subprocess.Popen[str]
    folder: Path

    def ended(self) -> Launched:
        self.out, self.err = self.process.communicate(timeout=150)
        self.code = self.process.returncode
        return self

    def log(self, rank: int) -> str:
        return (self.folder / f"run/ranks/rank-{rank}.log").read_text()

    def state(self) -> dict[str, float]:
        return json.loads((self.folder / "state/state.json").read_text())

    def pid(self, rank: int) -> int:
        """Of a worker; waits until it works."""
        file = self.folder / f"state/pid-{rank}"
        while not (file.exists() and file.read_text() and (self.folder / "state/state.json").exists()):
            assert self.process.poll() is None, "the launcher has ended"
            time.sleep(0.05)
        return int(file.read_text())

    def messages(self) -> list[str]:
        """What the launcher itself told."""
        return [line for line in self.err.splitlines() if line.startswith("trainwright: ")]


def start(folder: Path, nproc: int, *arguments: str, steps: int = 5, restarts: int = 0, **changes: str) -> Launched:
    (folder / "state").mkdir()
    given = [str(steps), str(folder / "state"), *arguments]
    what = json.dumps(
        {"module": "tests.launched", "arguments": given, "nproc": nproc, "restarts": restarts, "run": str(folder / "run")}
    )
    command = [sys.executable, "-c", LAUNCH, what]
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment(**changes), text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    return Launched(process, folder)


# ---- logs


def test_logs_are_whole_when_they_are_closed_whoever_holds_the_pipes(tmp_path: Path) -> None:
    """Elastic keeps its end of each open; waiting for that made every run of several processes end many seconds late."""
    from trainwright.launch import agent

    job = agent.Job("tests.launched", [], 2, 0, tmp_path, 10.0, {}, print)
    logs = agent._Logs(job)
    places = logs.reify({local: {"RANK": str(local)} for local in range(2)})
    threads = list(logs.copies)
    with open(places.stdouts[1], "w") as out, open(places.stderrs[1], "w") as errors:
        for line in range(20_000):
            print(f"out {line}", file=out)
        print("the last words", file=errors)
        out.flush(), errors.flush()
        logs.close()
        assert not any(thread.is_alive() for thread in threads)
    lines = launch_ranks.log_of(tmp_path, 1).read_text().splitlines()
    assert [line for line in lines if line.startswith("out")] == [f"out {line}" for line in range(20_000)]
    assert "the last words" in lines


# ---- whole jobs


def test_ranks_work_together_and_only_the_first_speaks(tmp_path: Path) -> None:
    job = start(tmp_path, 2, "--json", "--nproc", "2", "--word=$HOME$$", "--max-restarts=0").ended()
    assert job.code == 0, job.err
    assert job.messages() == []
    said, document = job.out.split("\n", 1)
    assert said.startswith("rank 0 says out, from step 0")
    told = json.loads(document)
    assert told["total"] == 15.0
    assert told["threads"] == "1", "the user's own"
    assert told["arguments"] == ["5", str(tmp_path / "state"), "--json", "--word=$HOME$$"]
    assert "rank 0 says err" in job.err
    assert "rank 1" not in job.err + job.out
    for rank in range(2):
        assert job.log(rank).count(f"rank {rank} says out") == 1
        assert job.log(rank).count(f"rank {rank} says err") == 1
        assert (tmp_path / f"run/ranks/rank-{rank}.alive").read_text().strip() == "5"


def test_a_killed_rank_ends_the_job_and_is_named(tmp_path: Path) -> None:
    job = start(tmp_path, 3, "--fail-2", "9", "--json").ended()
    assert job.code == 3
    (message,) = job.messages()
    log = tmp_path / "run/ranks/rank-2.log"
    assert re.fullmatch(rf"trainwright: error: rank 2 failed: killed by SIGKILL \(.*\); its log: {log}", message)
    assert json.loads(job.out.split("\n", 1)[1]) == {"error": message.removeprefix("trainwright: error: ")}
    assert "closing signal" not in job.err, "elastic's own words are for the log"
    assert not any(psutil.pid_exists(int((tmp_path / f"state/pid-{rank}").read_text())) for rank in range(3))
    assert "rank 2 says err" in log.read_text()


def test_a_killed_job_starts_again_and_goes_on(tmp_path: Path) -> None:
    job = start(tmp_path, 2, "--fail-0", "9", restarts=1).ended()
    assert job.code == 0, job.err
    assert job.state() == {"step": 5, "total": 15.0}
    assert [re.sub(r"\(.*?\)", "()", line) for line in job.messages()] == [
        f"trainwright: rank 0 failed: killed by SIGKILL (); its log: {tmp_path / 'run/ranks/rank-0.log'}",
        "trainwright: starting again ()",
    ]
    assert re.findall(r"from step (\d)", job.log(0)) == ["0", "2"], "the log holds both attempts"


def test_wrong_input_is_told_once_and_not_tried_again(tmp_path: Path) -> None:
    job = start(tmp_path, 2, "--fail-0", "input", "--fail-1", "input", restarts=3).ended()
    assert job.code == 2
    assert job.messages() == ["trainwright: error: no such file: corpus.txt; write it"]
    assert "Traceback" not in job.err
    assert not (tmp_path / "run").exists(), "there was no run"


def test_a_failed_rank_waits_for_nobody(tmp_path: Path) -> None:
    job = start(tmp_path, 2, "--fail-1", "pending", TRAINWRIGHT_TIMEOUT="100000").ended()
    assert job.code == 3
    (message,) = job.messages()
    assert "rank 1 failed: ValueError: something is pending; its log:" in message
    assert 'raise ValueError("something is pending")' in job.log(1)


@pytest.mark.parametrize(
    ("nproc", "how", "says"),
    [
        (1, str(int(signal.SIGSTOP)), r"rank 0 failed: hung in step 3 for \d+ s, the process is stopped \(SIGSTOP\); its log"),
        (2, str(int(signal.SIGSTOP)), r"rank 1 failed: hung in step 3 for \d+ s, the process is stopped \(SIGSTOP\); its log"),
        (2, "sleep", r"rank 1 failed: hung, the others waited in vain \(.*[Tt]imed out.*\); its log"),
    ],
    ids=["alone", "stopped", "asleep"],
)
def test_a_rank_that_hangs_is_named(nproc: int, how: str, says: str, tmp_path: Path) -> None:
    job = start(tmp_path, nproc, f"--fail-{nproc - 1}", how, TRAINWRIGHT_TIMEOUT="5").ended()
    assert job.code == 3
    (message,) = job.messages()
    assert re.search(says, message), message


def test_ctrl_c_reaches_each_worker_once(tmp_path: Path) -> None:
    job = start(tmp_path, 2, "--json", steps=10_000, restarts=2, LAUNCHED_SECONDS="0.1")
    job.pid(1)
    job.process.send_signal(signal.SIGINT)
    assert job.ended().code == 130
    step = int(job.state()["step"])
    assert job.messages() == [f"trainwright: stopped after step {step}, signals here: 1"]
    assert json.loads(job.out.split("\n", 1)[1]) == {"error": f"stopped after step {step}, signals here: 1"}


def test_workers_end_with_their_launcher(tmp_path: Path) -> None:
    job = start(tmp_path, 2, steps=10_000, LAUNCHED_SECONDS="0.1")
    workers = [psutil.Process(job.pid(rank)) for rank in range(2)]
    job.process.kill()
    job.process.communicate()
    gone, alive = psutil.wait_procs(workers, timeout=60)
    assert len(gone) == 2, alive


@pytest.mark.parametrize(
    "launcher",
    [
        ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1"],
        ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--main_process_port=0", "--max_restarts=1"],
    ],
    ids=["torchrun", "accelerate"],
)
def test_other_launchers(launcher: list[str], tmp_path: Path) -> None:
    command = [sys.executable, *launcher, "-m", "tests.launched", "5", str(tmp_path), "--fail-1", "9"]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "state.json").read_text()) == {"step": 5, "total": 15.0}
    assert re.findall(r"rank 0 says out, from step (\d), .*restarted: (\w+)", done.stdout) == [("0", "False"), ("2", "True")]
    assert "rank 1 says" not in done.stdout
    log = (tmp_path / "ranks/rank-1.log").read_text()
    assert log.count("rank 1 says out") == log.count("rank 1 says err") == 2


def test_a_port_in_use_is_named(tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = str(other.getsockname()[1])
        joined = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        command = [sys.executable, "-m", "tests.launched", "5", str(tmp_path)]
        done = subprocess.run(command, cwd=ROOT, env=environment(**joined), capture_output=True, text=True, timeout=60)
    assert done.returncode == 2, done.stderr
    assert f"worker: port {port} is in use" in done.stderr
    assert "--master-port" in done.stderr


def test_a_first_process_that_never_comes_is_named(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    joined = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TRAINWRIGHT_TIMEOUT": "2"}
    command = [sys.executable, "-m", "tests.launched", "5", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environment(**joined), capture_output=True, text=True, timeout=100)
    assert done.returncode == 3, done.stderr
    assert f"the first process can't be reached at 127.0.0.1:{port} within 2 s" in done.stderr


# ---- parts


@pytest.mark.parametrize(
    ("cores", "usable", "nproc", "threads"), [(8, 8, 2, 4), (8, 8, 3, 2), (2, 2, 4, 1), (None, 6, 2, 3), (64, 4, 2, 2)]
)
def test_threads(cores: int | None, usable: int, nproc: int, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "cpu_count", lambda logical=True: cores)
    monkeypatch.setattr(psutil.Process, "cpu_affinity", lambda self: list(range(usable)))
    assert launch_start.threads(nproc) == threads


def test_threads_are_the_users_if_they_say(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert "OMP_NUM_THREADS" not in launch_start._environment(2, tmp_path)
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert launch_start._environment(2, tmp_path)["OMP_NUM_THREADS"] == str(launch_start.threads(2))


@pytest.mark.parametrize(("nproc", "restarts"), [(0, 0), (-1, 0), (2, -1)])
def test_impossible_numbers_are_refused(nproc: int, restarts: int) -> None:
    with pytest.raises(InputError, match=f"--nproc {nproc} --max-restarts {restarts}"):
        launch.run([], nproc, max_restarts=restarts)


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"file/run/ranks can't be made .*run\.folder"):
        launch.run([], 1, folder=tmp_path / "file/run")


def test_only_what_was_made_is_taken_away(tmp_path: Path) -> None:
    made, place = launch_start._make(tmp_path / "a/run")
    (place / "rank-0.log").touch()
    (tmp_path / "a/run/recipe.yaml").touch()
    launch_start._unmake(place, made)
    assert [path.name for path in (tmp_path / "a/run").iterdir()] == ["recipe.yaml"]
    place.mkdir()
    (place / "rank-0.log").touch()
    made, place = launch_start._make(tmp_path / "a/run")
    launch_start._unmake(place, made)
    assert (place / "rank-0.log").exists(), "of an earlier run"


@pytest.mark.parametrize("value", ["soon", "0", "-3", "nan", "inf"])
def test_a_timeout_must_be_seconds(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRAINWRIGHT_TIMEOUT", value)
    with pytest.raises(InputError, match=f"TRAINWRIGHT_TIMEOUT={value} isn't a number of seconds"):
        launch_ranks.timeout()


def test_the_timeout_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRAINWRIGHT_TIMEOUT", raising=False)
    assert launch_ranks.timeout() == 600


def test_alone_nothing_is_joined(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import torch
    import torch.distributed as dist

    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    assert not launch.joined()
    assert launch.rank() == 0
    assert not launch.restarted(tmp_path)
    assert not launch.tell(2, "x")
    launch.alive(3)
    launch.log_to(tmp_path)
    with launch.processes(torch.device("cpu")):
        assert not dist.is_initialized()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("rank", "world"), [("two", "2"), ("2", "2"), ("0", "-1")])
def test_an_environment_that_makes_no_sense(rank: str, world: str, tmp_path: Path) -> None:
    joined = {"RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    code = "import torch; from trainwright import launch\nwith launch.processes(torch.device('cpu')): pass"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment(**joined), capture_output=True, text=True)
    last = done.stderr.strip().splitlines()[-1]
    assert re.search(r"InputError: the environment's (RANK|WORLD_SIZE)=", last), done.stderr


def test_gpus_must_suffice(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    for name, value in {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "3"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(InputError, match="process 3 of this machine has no GPU of its own, there are 2: --nproc 2"):
        worker._initialise(torch.device("cuda"))


def test_failures_are_written_so_that_elastic_reads_them_too(tmp_path: Path) -> None:
    file = tmp_path / "error.json"
    launch_ranks.write_failure(file, Failure(3, 'a "word"\nmore', trace="here", lost="timeout"))
    read = launch_ranks.read_failure(file)
    assert read
    assert (read.code, read.message, read.trace, read.lost) == (3, 'a "word"\nmore', "here", "timeout")
    assert abs(read.time - time.time()) < 60
    theirs = ProcessFailure(local_rank=1, pid=1, exitcode=3, error_file=str(file))
    assert theirs.message["message"] == 'a "word"\nmore'  # type: ignore[index]
    assert abs(theirs.timestamp - time.time()) < 60
    assert list(tmp_path.iterdir()) == [file]
    file.write_text(file.read_text()[:50])
    assert launch_ranks.read_failure(file) is None
    assert launch_ranks.read_failure(tmp_path / "none") is None


def wrapped(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "code", "message", "lost"),
    [
        (InputError("x"), 2, "x", ""),
        (RunError("y"), 3, "y", ""),
        (KeyboardInterrupt(), 130, "interrupted", ""),
        (KeyboardInterrupt("saved"), 130, "saved", ""),
        (ValueError("connection closed by peer"), 3, "ValueError: connection closed by peer", ""),
        (RuntimeError("[tcp/pair.cc] Connection closed by peer [::1]:5"), 3, None, "connection"),
        (RuntimeError("Read error [::1]:5: Connection reset by peer"), 3, None, "connection"),
        (RuntimeError("Timed out waiting 5000ms for recv operation"), 3, None, "timeout"),
        (wrapped(RunError("z"), RuntimeError("Timed out waiting 5ms")), 3, "z", "timeout"),
    ],
)
def test_what_an_exception_means(error: BaseException, code: int, message: str | None, lost: str) -> None:
    judged = launch_ranks.judge(error)
    assert (judged.code, judged.lost) == (code, lost)
    assert message is None or judged.message == message


@pytest.mark.parametrize(
    ("beats", "hung"),
    [
        ({}, set()),
        ({0: Beat(5, 11), 1: Beat(5, 11)}, set()),  # a long evaluation
        ({0: Beat(5, 11), 1: Beat(4, 12)}, {1}),
        ({0: Beat(5, 9), 1: Beat(4, 100)}, set()),  # one moves
        ({0: Beat(5, 11), 1: Beat(4, 12), 2: Beat(4, 13), 3: Beat(6, 11)}, {1, 2}),
        ({0: Beat(5, 11), 1: Beat(5, 12, stopped=True)}, {1}),
        ({0: Beat(4, 11), 1: Beat(5, 12, stopped=True)}, {1}),
        ({0: Beat(5, 3), 1: Beat(5, 12, stopped=True)}, set()),
        ({0: Beat(1, 11), 1: Beat(None, 12)}, {1}),
        ({0: Beat(None, 11), 1: Beat(None, 12)}, set()),
    ],
)
def test_who_holds_up_the_others(beats: Mapping[int, Beat], hung: set[int]) -> None:
    assert set(launch_ranks.holding_up(beats, 10)) == hung


def test_heartbeats(tmp_path: Path) -> None:
    code = "from trainwright import launch\nfor step in (7, 100000, 3): launch.alive(step)"
    joined = {"RANK": "2", "WORLD_SIZE": "4", "MASTER_ADDR": "x", "MASTER_PORT": "1", "TRAINWRIGHT_RANKS": str(tmp_path)}
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment(**joined), check=True)
    now = time.time()
    beat = launch_ranks.read_beat(tmp_path, 2, now + 50)
    assert beat.step == 3
    assert 49 < beat.age < 110
    assert launch_ranks.read_beat(tmp_path, 1, now, started=now - 7, stopped=True) == Beat(None, 7, True)


def lost(kind: str) -> Failure:
    return Failure(3, "Timed out" if kind == "timeout" else "closed by peer", lost=kind)  # type: ignore[arg-type]


def own(message: str, at: float = 1.0, code: int = 3) -> Failure:
    return Failure(code, message, time=at)


@pytest.mark.parametrize(
    ("exits", "told", "hung", "rank", "says"),
    [
        # killed, and the others lost it
        ({1: -9, 0: 3}, {0: lost("connection"), 1: None}, {}, 1, "killed by SIGKILL"),
        ({0: 3, 2: -11, 1: -15}, {0: lost("connection"), 1: None, 2: None}, {}, 2, "killed by SIGSEGV"),
        ({1: -15, 0: -15}, {0: lost("connection"), 1: None}, {}, 1, "killed by SIGTERM"),
        # said why: the first who did, whoever was seen first
        ({0: 3, 1: 3}, {0: own("late", 2.0), 1: own("early", 1.0)}, {}, 1, "early"),
        ({0: 3, 1: 3}, {0: lost("connection"), 1: own("mine")}, {}, 1, "mine"),
        ({0: -6, 1: -15}, {0: own("told before it aborted"), 1: None}, {}, 0, "told before"),
        # hung
        ({1: -9, 0: -15}, {0: None, 1: None}, {1: "hung in step 3"}, 1, "hung in step 3"),
        ({0: 3, 1: -15, 2: 3}, {0: lost("timeout"), 1: None, 2: lost("timeout")}, {}, 1, "hung, the others waited in vain"),
        # no word
        ({2: 7, 0: -15}, {0: None, 2: None}, {}, 2, "ended with exit code 7"),
        ({0: 3, 1: 3}, {0: lost("connection"), 1: lost("connection")}, {}, 0, "closed by peer"),
        ({0: -70}, {0: None}, {}, 0, "killed by signal 70"),
    ],
)
def test_the_cause_of_a_failure(
    exits: dict[int, int], told: dict[int, Failure | None], hung: dict[int, str], rank: int, says: str
) -> None:
    named, failure = launch_ranks.cause(exits, told, hung)
    assert named == rank
    assert says in failure.message


def test_ranks_that_agree() -> None:
    assert launch.disagreement([{"recipe": "a", "data": "b"}] * 3) is None
    assert launch.disagreement([{}]) is None


@pytest.mark.parametrize(
    ("values", "says"),
    [
        (["a", "a", "b", "a"], "don't agree on the recipe: rank 2 differs from ranks 0, 1, 3"),
        (["a", "b"], "rank 1 differs from rank 0"),
        (["b", "a", "a", "c"], "ranks 0, 3 differ from ranks 1, 2"),
        (["a"] * 20 + ["b"], "rank 20 differs from ranks 0, 1, 2, 3, 4, 5, 6, 7 and 12 more"),
    ],
)
def test_ranks_that_disagree(values: list[str], says: str) -> None:
    found = launch.disagreement([{"data": "same", "recipe": value} for value in values])
    assert found
    assert says in found


def test_a_value_that_a_rank_does_not_have() -> None:
    found = launch.disagreement([{"recipe": "a", "data": "b"}, {"recipe": "a"}, {"recipe": "a", "data": "b"}])
    assert found
    assert "on the data: rank 1 differs" in found


def test_launching_needs_no_torch() -> None:
    code = (
        "import sys; from trainwright import launch; from trainwright.launch import script; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
