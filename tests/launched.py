"""A worker for tests of the launcher: counts all-reduces, remembers its state in a shared folder, and fails on demand.

    python -m tests.launched STEPS FOLDER [--fail-RANK HOW] [--json]

Every rank adds rank + 1 at each step and the sum over ranks goes to FOLDER/state.json, from which a new start goes on. HOW is
``input``, ``run``, ``error``, ``pending`` (an error with an operation and a thread under way), ``exit``, ``sleep`` or a
signal's number.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
import traceback
from pathlib import Path

import torch
import torch.distributed as dist

from trainwright import launch
from trainwright.recipe import InputError, RunError

FAIL_AT = 3
SECONDS = float(os.environ.get("LAUNCHED_SECONDS", "0"))  # of each step


def main(arguments: list[str]) -> int:
    folder, as_json = Path(arguments[1]), "--json" in arguments
    try:
        with launch.processes(torch.device("cpu")):
            total = work(int(arguments[0]), folder, _fault(arguments))
    except KeyboardInterrupt as error:
        return _say(130, str(error) or "interrupted", as_json)
    except InputError as error:
        return _say(2, str(error), as_json)
    except RunError as error:
        return _say(3, str(error), as_json)
    except Exception as error:
        traceback.print_exception(error)
        return _say(3, f"{type(error).__name__}: {error}", as_json)
    if as_json and launch.rank() == 0:
        print(json.dumps({"total": total, "threads": os.environ["OMP_NUM_THREADS"], "arguments": arguments}))
    return 0


def _say(code: int, message: str, as_json: bool) -> int:
    if launch.tell(code, message):
        return code
    print(f"worker: {message}", file=sys.stderr)
    if as_json:
        print(json.dumps({"error": message}))
    return code


def _fault(arguments: list[str]) -> str | None:
    option = f"--fail-{launch.rank()}"
    return arguments[arguments.index(option) + 1] if option in arguments else None


def work(steps: int, folder: Path, fault: str | None) -> float:
    launch.log_to(folder)
    again = launch.restarted(folder)
    stop: list[int] = []
    signal.signal(signal.SIGINT, lambda number, frame: stop.append(number))
    file = folder / "state.json"
    assert again == file.exists(), "a job goes on if, and only if, it was started again"
    state = json.loads(file.read_text()) if file.exists() else {"step": 0, "total": 0.0}
    about = f"{os.environ['OMP_NUM_THREADS']} threads, restarted: {again}"
    print(f"rank {launch.rank()} says out, from step {state['step']}, {about}")
    print(f"rank {launch.rank()} says err", file=sys.stderr, flush=True)
    folder.joinpath(f"pid-{launch.rank()}").write_text(str(os.getpid()))
    for step in range(state["step"] + 1, steps + 1):
        launch.alive(step)
        time.sleep(SECONDS)
        if step == FAIL_AT and fault and not again:
            fail(fault)
        added = torch.tensor([launch.rank() + 1.0, float(len(stop))])
        dist.all_reduce(added)
        state = {"step": step, "total": state["total"] + added[0].item()}
        if launch.rank() == 0:
            file.with_suffix(".new").write_text(json.dumps(state))
            os.replace(file.with_suffix(".new"), file)
        if added[1]:
            raise KeyboardInterrupt(f"stopped after step {step}, signals here: {len(stop)}")
    dist.barrier()
    return state["total"]


def fail(how: str) -> None:
    if how == "input":
        raise InputError("no such file: corpus.txt; write it")
    if how == "run":
        raise RunError("the loss isn't finite")
    if how == "error":
        raise ValueError("seven is odd")
    if how == "pending":
        dist.all_reduce(torch.ones(1), async_op=True)
        threading.Thread(target=time.sleep, args=(1000,)).start()  # the interpreter's exit waits for it
        raise ValueError("something is pending")
    if how == "exit":
        os._exit(7)
    if how != "sleep":
        os.kill(os.getpid(), int(how))
    time.sleep(1000)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
