"""Processes that write one checkpoint together, and tell each other so by files: also in a thread, beside training.

No collectives here: those of a thread would mix with those of training. Each common write has a hidden folder of notes
beside the checkpoints. The lead (process 0) opens it; each other one answers what it wrote, or why it couldn't; the lead
gives the verdict. A killed process gives no answer, and the others stop waiting after ``timeout``.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainwright.checkpoint.folders import TEAM

OPEN, VERDICT = "open", "verdict"


@dataclass
class Team:
    """This process among those that write checkpoints together, in the same order.

    Args:
        token: the same at all processes of a job, and of no other job; a name of a file. One process alone needs none.
        timeout: seconds that others may write longer than this one.
    """

    index: int = 0
    size: int = 1
    token: str = ""
    timeout: float = 600.0
    meetings: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        assert 0 <= self.index < self.size, self
        assert self.size == 1 or self.token, "processes of a job need a token, to know their own notes"

    @property
    def lead(self) -> bool:
        return self.index == 0

    @property
    def prefix(self) -> str:
        """How the names of its folders begin."""
        return f"{TEAM}{self.token}-"


class Meeting:
    """One common write. Alone, nothing is said."""

    def __init__(self, home: Path, team: Team) -> None:
        team.meetings += 1
        self.team = team
        self.folder = home / f"{team.prefix}{team.meetings}"

    def say(self, topic: str, note: Any) -> None:
        """Leave a note, at once: who reads it reads all of it."""
        if self.team.size == 1:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        temporary = self.folder / f".{topic}"
        temporary.write_text(json.dumps(note), encoding="utf-8")
        os.replace(temporary, self.folder / topic)

    def answers(self) -> list[Any]:
        """What the others answered, in their order; for the lead. TimeoutError if one didn't in time."""
        topics = [told(index) for index in range(1, self.team.size)]
        self._wait(lambda: [topic for topic in topics if not self._has(topic)], self.team.timeout)
        return [self._note(topic) for topic in topics]

    def opened(self) -> bool:
        """Wait until the lead has made the checkpoint's folder; False if it gave up before."""
        self._wait(lambda: [] if self._has(OPEN) or self._has(VERDICT) else [told(0)], self.team.timeout)
        return self._has(OPEN)

    def verdict(self) -> str | None:
        """What the lead says of the whole: the fault, or None. It waits for others itself, so it may take twice as long."""
        self._wait(lambda: [] if self._has(VERDICT) else [told(0)], 2 * self.team.timeout)
        fault: str | None = self._note(VERDICT)
        return fault

    def leave(self) -> None:
        """Note that this process needs no more; the last of the others to leave removes the notes."""
        with suppress(OSError):
            self.say(f"left {self.team.index}", None)
            if len(list(self.folder.glob("left *"))) == self.team.size - 1:
                shutil.rmtree(self.folder)

    def _has(self, topic: str) -> bool:
        return (self.folder / topic).exists()

    def _note(self, topic: str) -> Any:
        return json.loads((self.folder / topic).read_text(encoding="utf-8"))

    def _wait(self, missing: Callable[[], list[str]], timeout: float) -> None:
        """Return once nobody is missing."""
        started, pause = time.monotonic(), 0.001
        while absent := missing():
            if time.monotonic() - started > timeout:
                raise TimeoutError(f"nothing from {', '.join(absent)} in {timeout:g} seconds")
            time.sleep(pause)
            pause = min(2 * pause, 0.1)


def told(index: int) -> str:
    """What a process's answer is called, and the process itself."""
    return f"process {index}"
