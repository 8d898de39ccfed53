"""One job on two "machines", network namespaces that see each other through a virtual cable: one is lost and comes back."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
STEPS = 10
ADDRESSES = ("10.213.77.1", "10.213.77.2")


def ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")


@pytest.fixture
def machines() -> Iterator[list[str]]:
    """The names of two namespaces with an address each; skips, with the reason, where none can be made."""
    if shutil.which("ip") is None:
        pytest.skip("two machines need network namespaces: there is no command ip (Debian: apt-get install iproute2)")
    mark = uuid.uuid4().hex[:6]
    names, cables = [f"tw{mark}{end}" for end in "ab"], [f"tv{mark}{end}" for end in "ab"]
    try:
        try:
            for name in names:
                ip("netns", "add", name)
            ip("link", "add", cables[0], "type", "veth", "peer", "name", cables[1])
            for name, cable, address in zip(names, cables, ADDRESSES, strict=True):
                ip("link", "set", cable, "netns", name)
                ip("-n", name, "addr", "add", f"{address}/24", "dev", cable)
                ip("-n", name, "link", "set", cable, "up")
                ip("-n", name, "link", "set", "lo", "up")
        except OSError as error:
            pytest.skip(f"two machines need network namespaces, which can't be made here: {error}")
        yield names
    finally:
        for name in names:  # a cable goes with its namespace
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


class Machine:
    """What runs on one of them: torchrun with one worker."""

    def __init__(self, number: int, name: str, folder: Path) -> None:
        self.number, self.name, self.folder = number, name, folder

    def start(self) -> None:
        """Begin, or begin again after ``lose``."""
        cable = self.name.replace("tw", "tv")
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "LAUNCHED_SECONDS": "0.2", "GLOO_SOCKET_IFNAME": cable}
        # docs/launching.md: else a machine that comes back waits for an address that is told only once.
        environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
        command = ["ip", "netns", "exec", self.name, sys.executable, "-m", "torch.distributed.run"]
        command += ["--nnodes=2", "--nproc-per-node=1", "--max-restarts=3", "--rdzv-id=two", "--rdzv-backend=c10d"]
        command += [f"--rdzv-endpoint={ADDRESSES[0]}:29400", f"--local-addr={ADDRESSES[self.number]}"]
        # The two share a host name, so the first can't tell that the endpoint is its own.
        command += [f"--rdzv-conf=is_host={int(self.number == 0)},keep_alive_interval=1,keep_alive_max_attempt=3"]
        command += ["-m", "tests.launched", str(STEPS), str(self.folder)]
        with self.folder.joinpath(f"machine-{self.number}.log").open("ab") as log:
            self.process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True)

    def lose(self) -> None:
        """As if the power went: all its processes are gone at once."""
        inside = subprocess.run(["ip", "netns", "pids", self.name], capture_output=True, text=True, check=True)
        for pid in inside.stdout.split():
            os.kill(int(pid), signal.SIGKILL)
        self.process.wait()


def state(folder: Path) -> dict[str, float]:
    file = folder / "state.json"
    return json.loads(file.read_text()) if file.exists() else {"step": 0}


def until(condition: str, ready: object, machines: list[Machine], folder: Path, seconds: float = 120) -> None:
    """Wait, and show what both wrote where it doesn't come."""
    end = time.monotonic() + seconds
    while not ready():  # type: ignore[operator]
        if time.monotonic() > end:
            logs = "\n".join(folder.joinpath(f"machine-{m.number}.log").read_text() for m in machines)
            pytest.fail(f"waited {seconds} s for: {condition}\n{logs}")
        time.sleep(0.1)


def test_a_lost_machine_comes_back_and_the_job_goes_on(machines: list[str], tmp_path: Path) -> None:
    both = [Machine(number, name, tmp_path) for number, name in enumerate(machines)]
    try:
        for machine in both:
            machine.start()
        until("both work", lambda: state(tmp_path)["step"] >= 3, both, tmp_path)
        both[1].lose()
        reached = state(tmp_path)["step"]
        assert reached < STEPS, "too late to show anything"
        both[1].start()
        until("both are done", lambda: all(m.process.poll() is not None for m in both), both, tmp_path)
        assert [machine.process.returncode for machine in both] == [0, 0]
        # Steps were neither lost nor done twice: each adds 1 + 2.
        assert state(tmp_path) == {"step": STEPS, "total": 3.0 * STEPS}
        logs = [*tmp_path.glob("machine-*.log"), *tmp_path.glob("ranks/rank-*.log")]
        text = "\n".join(log.read_text() for log in logs)
        assert "AssertionError" not in text, "the ranks found different answers to whether this is a restart"
        starts = re.findall(r"from step (\d+), .*restarted: (\w+)", text)
        assert sorted(starts)[:2] == [("0", "False")] * 2
        assert {again for step, again in starts if step != "0"} == {"True"}
    finally:
        for machine in both:
            if machine.process.poll() is None:
                machine.lose()
