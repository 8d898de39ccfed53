"""What ``plan`` found out about a run: plain data, which ``show`` prints and ``page`` draws."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from trainwright.plan.timing import Timing
from trainwright.plan.work import Message, Work

PARTS = ("parameters", "gradients", "optimizer states", "activations", "temporary", "communication buffers")


@dataclass(frozen=True)
class Memory:
    """Bytes on one device at the peak of a step, and over the step."""

    peak: int
    parts: dict[str, int]  # of PARTS; their sum is the peak
    module: str  # that ran at the peak
    moment: str  # "forward", "backward", "optimizer" or "loss"
    timeline: list[tuple[str, int]]  # moments in order, with the bytes that are live: ("forward", 123), ...

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Plan:
    """All of it, for one device of the run."""

    memory: Memory
    works: list[Work]
    messages: list[Message]
    timing: Timing
    notes: list[str] = field(default_factory=list)
    unknown: dict[str, int] = field(default_factory=dict)  # operators whose cost isn't known, and their calls
    idle: list[str] = field(default_factory=list)  # options of the recipe that have no effect in this combination
    validated: list[str] = field(default_factory=list)  # how far earlier plans were from runs

    def as_json(self) -> dict[str, Any]:
        """Plain values. Works and messages are summed up; the memory's timeline is whole."""
        return {
            "memory": self.memory.as_json(),
            "timing": self.timing.as_json(),
            "flops": self.timing.flops,
            "bytes_moved": sum(work.bytes * work.calls for work in self.works),
            "bytes_sent": self.timing.sent,
            "operators": sum(work.calls for work in self.works),
            "messages": [asdict(message) for message in self.messages],
            "notes": self.notes,
            "unknown": self.unknown,
            "idle": self.idle,
            "validated": self.validated,
        }
