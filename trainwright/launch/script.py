"""Scripts that start a run on several machines: for Slurm, or plain torchrun."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from trainwright.recipe import InputError

_TIME = re.compile(r"\d+|\d+:\d\d(:\d\d)?|\d+-\d+(:\d\d){0,2}")  # those of sbatch's manual
_STOP = 120  # seconds before the end of a Slurm job's time at which the run is asked to stop

# NOTE: an interrupt sent to srun itself would only make it ask for a second one; scancel signals the tasks, not this script.
_SLURM = """\
#!/bin/bash
#SBATCH --job-name={name}
#SBATCH --nodes={nodes}
#SBATCH --ntasks-per-node=1
{resources}#SBATCH --output=slurm-%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@{stop}
# Submit it with sbatch, in the folder in which the run's paths hold; it must be shared by the machines.
set -euo pipefail

mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=${{hosts[0]}}
port=$((20000 + SLURM_JOB_ID % 20000))
job=$SLURM_JOB_ID
{common}
# When the time is nearly up, each rank finishes its step and writes a checkpoint; then the job goes back into the queue.
stop() {{
    scancel --signal=INT "$SLURM_JOB_ID"
    if wait "$step"; then exit 0; fi
    scontrol requeue "$SLURM_JOB_ID"
}}
trap stop USR1

srun --kill-on-bad-exit=1 {command} &
step=$!
wait "$step"
"""

_TORCHRUN = """\
#!/bin/bash
# Run it on each of the {nodes} machine{s}, in the same shared folder: bash SCRIPT FIRST-MACHINE [PORT]
# FIRST-MACHINE is the name or address of one of them that all can reach; it is the same on all.
set -euo pipefail

head=${{1:{default}}}
port=${{2:-29500}}
job={name}
{common}
exec {command}
"""

_COMMON = """\
run={run}
{threads}
# Else a machine that was lost and comes back waits for an address that torchrun tells only once.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
resume=()
checkpoints=("$run"/checkpoints/step-*)
if [ -e "${{checkpoints[0]}}" ]; then resume=(--resume); fi
"""


def script(
    recipe: Path,
    overrides: Sequence[str],
    *,
    slurm: bool,
    folder: Path,
    nodes: int = 1,
    nproc: int = 1,
    time: str | None = None,
    gpus: bool = False,
    max_restarts: int = 3,
) -> str:
    """The text of a bash script that trains a recipe on ``nodes`` machines with ``nproc`` processes each.

    It goes on from the run's newest checkpoint where there is one, after a failure up to ``max_restarts`` times by itself,
    and under Slurm once more whenever the job's time is up.

    Args:
        slurm: a batch script for sbatch; else the torchrun command, the same for each machine.
        folder: of the run, as the recipe says.
        time: for Slurm, such as 30 (minutes), 12:00:00 or 2-00; None leaves it to the cluster.
        gpus: ask Slurm for one for each process.

    Raises:
        InputError: a number below 1, or a time that sbatch would not take.
    """
    if nodes < 1 or nproc < 1 or max_restarts < 0:
        raise InputError(f"--nodes {nodes} --nproc {nproc}: at least 1 machine with 1 process, please")
    if time is not None and not slurm:
        raise InputError("--time is for --slurm: nobody limits what torchrun starts")
    if time is not None and not _TIME.fullmatch(time):
        raise InputError(f"--time {time} is none: give minutes (30), hours (12:00:00) or days and hours (2-00)")
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", recipe.stem).strip("-.") or "run"
    template = _SLURM if slurm else _TORCHRUN
    return template.format(
        name=name,
        nodes=nodes,
        s="s" * (nodes > 1),
        stop=_STOP,
        default="-localhost" if nodes == 1 else "?give the name or address of the first machine",
        resources=_resources(nproc, time, gpus),
        common=_COMMON.format(run=shlex.quote(str(folder)), threads=_threads(slurm, nproc)),
        command=_command(recipe, overrides, nodes, nproc, max_restarts),
    )


def _resources(nproc: int, time: str | None, gpus: bool) -> str:
    lines = ["#SBATCH --exclusive"]
    lines += [f"#SBATCH --gpus-per-node={nproc}"] * gpus
    lines += [f"#SBATCH --time={time}"] * (time is not None)
    return "\n".join(lines) + "\n"


def _threads(slurm: bool, nproc: int) -> str:
    cores = '"${SLURM_CPUS_ON_NODE:-$(nproc)}"' if slurm else '"$(nproc)"'
    return f"cores={cores}\nexport OMP_NUM_THREADS=${{OMP_NUM_THREADS:-$((cores / {nproc} > 0 ? cores / {nproc} : 1))}}"


def _command(recipe: Path, overrides: Sequence[str], nodes: int, nproc: int, max_restarts: int) -> str:
    words = [f"torchrun --nnodes={nodes} --nproc-per-node={nproc} --max-restarts={max_restarts}"]
    words += ['--rdzv-id="$job" --rdzv-backend=c10d --rdzv-endpoint="$head:$port"']
    words += [f"--shutdown-timeout={_STOP - 10}"]  # its time to write a checkpoint
    words += ["-m trainwright train", shlex.join([str(recipe), *overrides]), '"${resume[@]}"']
    return " \\\n    ".join(words)
