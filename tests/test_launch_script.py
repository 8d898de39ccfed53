"""Scripts for clusters: bash accepts them, and run with stand-ins for torchrun and Slurm they call what they should."""

from __future__ import annotations

import os
import re
import shutil
import signal
import stat
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trainwright.launch import script as launch_script
from trainwright.recipe import InputError

SLURM = pytest.mark.parametrize("slurm", [True, False], ids=["slurm", "torchrun"])
# Each stand-in writes its arguments, one a line, into a file beside it.
STAND_INS = {
    "torchrun": '[ "$TORCH_DISABLE_SHARE_RDZV_TCP_STORE" = 1 ] || exit 9\n'
    'printf "%s\\n" "$@" "OMP_NUM_THREADS=$OMP_NUM_THREADS" > "$OUT/torchrun"\n'
    'trap "exit 130" INT; if [ -n "${SLEEP:-}" ]; then touch "$OUT/started"; while :; do sleep 0.05; done; fi',
    "srun": 'echo $$ > "$OUT/srun.pid"; printf "%s\\n" "$1" > "$OUT/srun"; shift; exec "$@"',
    "scontrol": 'printf "%s\\n" "$*" >> "$OUT/scontrol"; if [ "$1" = show ]; then printf "node7\\nnode9\\n"; fi',
    "scancel": 'printf "%s\\n" "$*" > "$OUT/scancel"; touch "$OUT/cancelled"; kill -TERM $(cat "$OUT/srun.pid")',
}


def written(recipe: str = "recipes/docstrings.yaml", overrides: tuple[str, ...] = (), **options: Any) -> str:
    return launch_script.script(Path(recipe), overrides, **{"slurm": True, "folder": Path("runs/docs"), **options})


def start(text: str, folder: Path, *arguments: str, **environment: str) -> subprocess.Popen[bytes]:
    """Run a script in ``folder`` with the stand-ins."""
    tools = folder / "bin"
    tools.mkdir()
    for name, body in STAND_INS.items():
        tool = tools / name
        tool.write_text(f"#!/bin/bash\n{body}\n")
        tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    (folder / "script").write_text(text)
    keep = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    slurm = {"SLURM_JOB_ID": "4711", "SLURM_JOB_NODELIST": "node[7,9]", "SLURM_CPUS_ON_NODE": "9"}
    env = {**keep, **slurm, "PATH": f"{tools}:{os.environ['PATH']}", "OUT": str(folder), **environment}
    return subprocess.Popen(["bash", "script", *arguments], cwd=folder, env=env)


def calls(text: str, folder: Path, *arguments: str, **environment: str) -> list[str]:
    """What the script gives to torchrun."""
    assert start(text, folder, *arguments, **environment).wait(30) == 0
    return (folder / "torchrun").read_text().removesuffix("\n").split("\n")


def header(text: str) -> dict[str, str]:
    """The options that sbatch reads: in lines before the first command."""
    options = {}
    for line in text.splitlines()[1:]:
        if line and not line.startswith("#"):
            break
        if line.startswith("#SBATCH "):
            name, _, value = line.removeprefix("#SBATCH --").partition("=")
            assert not re.search(r"\s", value)
            options[name] = value
    return options


def test_the_header_asks_slurm_for_machines_time_and_another_turn() -> None:
    options = header(written(nodes=2, nproc=4, time="12:00:00", gpus=True))
    assert options == {
        "job-name": "docstrings",
        "nodes": "2",
        "ntasks-per-node": "1",
        "exclusive": "",
        "gpus-per-node": "4",
        "time": "12:00:00",
        "output": "slurm-%x-%j.log",
        "open-mode": "append",
        "requeue": "",
        "signal": "B:USR1@120",
    }
    plain = header(written())
    assert "time" not in plain
    assert "gpus-per-node" not in plain


def test_slurm_starts_one_torchrun_a_machine_that_meet_at_the_first(tmp_path: Path) -> None:
    given_ = calls(written(overrides=("training.steps=7",), nodes=2, nproc=4), tmp_path)
    assert given_ == [
        "--nnodes=2",
        "--nproc-per-node=4",
        "--max-restarts=3",
        "--rdzv-id=4711",
        "--rdzv-backend=c10d",
        "--rdzv-endpoint=node7:24711",
        "--shutdown-timeout=110",
        *("-m", "trainwright", "train", "recipes/docstrings.yaml", "training.steps=7"),
        "OMP_NUM_THREADS=2",
    ]
    assert (tmp_path / "srun").read_text() == "--kill-on-bad-exit=1\n"


def test_slurm_puts_a_job_whose_time_is_up_back_into_the_queue(tmp_path: Path) -> None:
    process = start(written(), tmp_path, SLEEP="1")
    while not (tmp_path / "started").exists():
        time.sleep(0.02)
        assert process.poll() is None
    process.send_signal(signal.SIGUSR1)
    assert process.wait(30) != 0
    assert (tmp_path / "scancel").read_text() == "--signal=INT 4711\n"
    assert (tmp_path / "scontrol").read_text().splitlines() == ["show hostnames node[7,9]", "requeue 4711"]


def test_torchrun_lines_are_the_same_on_each_machine(tmp_path: Path) -> None:
    text = written(slurm=False, nodes=3, nproc=2, max_restarts=0)
    given_ = calls(text, tmp_path, "10.0.0.1", OMP_NUM_THREADS="5")
    assert given_[:6] == [
        "--nnodes=3",
        "--nproc-per-node=2",
        "--max-restarts=0",
        "--rdzv-id=docstrings",
        "--rdzv-backend=c10d",
        "--rdzv-endpoint=10.0.0.1:29500",
    ]
    assert given_[-1] == "OMP_NUM_THREADS=5"
    assert "#SBATCH" not in text


def test_the_first_machine_must_be_named_where_there_are_several(tmp_path: Path) -> None:
    assert start(written(slurm=False, nodes=2), tmp_path).wait(30) != 0
    assert not (tmp_path / "torchrun").exists()


def test_one_machine_needs_no_name(tmp_path: Path) -> None:
    assert "--rdzv-endpoint=localhost:31000" in calls(written(slurm=False), tmp_path, "", "31000")


@SLURM
@pytest.mark.parametrize("name", ["run", "a run [1] $HOME's"])
def test_it_resumes_where_there_is_a_checkpoint(slurm: bool, name: str, tmp_path: Path) -> None:
    text = written(slurm=slurm, folder=tmp_path / name)
    assert "--resume" not in calls(text, tmp_path)
    (tmp_path / name / "checkpoints" / "step-00000100").mkdir(parents=True)
    shutil.rmtree(tmp_path / "bin")
    assert calls(text, tmp_path)[-2:-1] == ["--resume"]


@SLURM
@given(
    recipe=st.text(st.characters(codec="utf-8", exclude_characters="\0/\n\r", exclude_categories=["Cs"]), min_size=1),
    override=st.text(st.characters(codec="utf-8", exclude_characters="\0\n\r", exclude_categories=["Cs"])),
)
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_name_and_value_is_quoted(
    slurm: bool, recipe: str, override: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("quoted")
    text = written(f"x/{recipe}", (f"data.source={override}", "$(touch gone)"), slurm=slurm)
    (folder / "script").write_text(text)
    assert subprocess.run(["bash", "-n", "script"], cwd=folder).returncode == 0
    given_ = calls(text, folder)
    assert given_[-4:-1] == [str(Path(f"x/{recipe}")), f"data.source={override}", "$(touch gone)"]
    assert not (folder / "gone").exists()
    assert not slurm or header(text)["nodes"] == "1"


@pytest.mark.parametrize("asked", ["5", "12:30", "12:00:00", "2-00", "1-12:30:00"])
def test_times_of_sbatch(asked: str) -> None:
    assert header(written(time=asked))["time"] == asked


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"nodes": 0}, "--nodes 0 --nproc 1: at least 1"),
        ({"nproc": -2}, "--nproc -2: at least 1"),
        ({"time": "soon"}, "--time soon is none: give minutes"),
        ({"time": "1\n#SBATCH --uid=0"}, "is none"),
        ({"slurm": False, "time": "5"}, "--time is for --slurm"),
    ],
)
def test_wrong_input(options: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=re.escape(says)):
        written(**options)
