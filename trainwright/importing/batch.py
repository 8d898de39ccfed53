"""The batch: rows of a step = rows at once in a process x processes x accumulated micro-batches."""

from __future__ import annotations

from typing import NamedTuple

from trainwright.importing.findings import Finding, Said, shown
from trainwright.importing.settling import Together, differ


class Batch(NamedTuple):
    """rows: of a step, over all processes. micro: rows at once in a process. steps: accumulated. processes: that share data."""

    rows: int
    micro: int
    steps: int
    processes: int

    def __str__(self) -> str:
        return f"{self.rows} = {self.micro} x {self.processes} x {self.steps}"


def derive(rows: int | None, micro: int | None, steps: int | None, processes: int) -> tuple[Batch, bool] | None:
    """What DeepSpeed makes of the numbers that are given, and whether they multiply; None where rows and micro both lack.

    The rules, with their divisions that drop remainders, are those of DeepSpeedConfig._set_batch_related_parameters.
    """
    if rows is None and micro is None:
        return None
    if rows is None:
        assert micro is not None
        steps = 1 if steps is None else steps
        return Batch(micro * steps * processes, micro, steps, processes), True
    if micro is None:
        steps = 1 if steps is None else steps
        micro = rows // processes // steps
    elif steps is None:
        steps = rows // micro // processes
    batch = Batch(rows, micro, steps, processes)
    return batch, min(batch) > 0 and rows == micro * steps * processes


def processes_of(rows: int | None, micro: int | None, steps: int | None) -> int | None:
    """How many processes the three numbers together mean; None where one lacks or they don't divide."""
    if rows is None or micro is None or steps is None or rows % (micro * steps):
        return None
    return rows // (micro * steps)


def settle_batch(all_: Together) -> None:
    """Rows of a step, and the processes where no file names them."""
    processes = next(iter(all_.all_said("processes")), None)
    machines = next(iter(all_.all_said("machines")), None)
    all_.machines = machines.value if machines else 1
    rows, micro, steps = (_number(all_, f"batch.{name}") for name in ("rows", "micro", "steps"))
    split = next(iter(all_.all_said("batch.split")), None)
    if rows and rows.tool == "deepspeed" and micro and not micro.given:
        micro = None  # DeepSpeed divides the rows; the default of TrainingArguments isn't asked
    if split:
        each = Said(split.value * (steps.value if steps else 1), split.file, split.key, split.raw, split.tool)
        all_.tell("warning", split, f"{split.value} rows for all processes together: accelerator_config.split_batches is set")
        rows, micro = rows or each, None
    if rows is None and micro is None:
        _no_batch(all_)
        all_.processes = processes.value if processes else None
        return
    _multiply(all_, rows, micro, steps, processes)


def _number(all_: Together, path: str) -> Said | None:
    found = all_.all_said(path)
    for other in found[1:]:
        if other.raw != found[0].raw:
            differ(all_, path, found[0], other)
    return found[0] if found else None


def _no_batch(all_: Together) -> None:
    reading = all_.readings.get("deepspeed")
    for key in ("train_batch_size", "train_micro_batch_size_per_gpu"):
        if reading and reading.has(key):
            what = "auto, and no TrainingArguments among the files say what it is"
            finding = Finding("warning", reading.file, key, what, "set training.batch_size: rows of all processes", "training")
            all_.findings.append(finding)


def _multiply(all_: Together, rows: Said | None, micro: Said | None, steps: Said | None, processes: Said | None) -> None:
    """rows = micro x processes x steps, and which of them is missing follows."""
    numbers = [said.value if said else None for said in (rows, micro, steps)]
    if steps is None and ("accelerate" in all_.readings or "transformers" in all_.readings):
        numbers[2] = 1  # accelerate writes it into a DeepSpeed file that is silent
    copies = all_.recipe.get("parallel.tensor", 1) * all_.recipe.get("parallel.pipeline", 1)
    about = "training.batch_size"
    subject = rows or micro
    assert subject is not None
    count = processes.value // copies if processes else processes_of(*numbers) or 1
    made = derive(numbers[0], numbers[1], numbers[2], count)
    assert made is not None, "there are rows or a micro-batch"
    batch, right = made
    all_.recipe["training.batch_size"] = batch.rows
    if right or (batch.micro and batch.rows % (batch.micro * count) == 0):
        all_.recipe["training.micro_batch_size"] = batch.micro
    if processes:
        all_.processes = processes.value
    elif rows and micro and numbers[2] and right:
        all_.processes = count * copies
    _tell_of_batch(all_, subject, batch, right, said_processes=processes is not None, known=all_.processes is not None)
    for said in (rows, micro, steps):
        if said and not said.given and said.key != "gradient_accumulation_steps":
            all_.tell("note", said, f"not in the file: {shown(said.value)} is the default of {said.tool}", about=about)


def _tell_of_batch(all_: Together, subject: Said, batch: Batch, right: bool, *, said_processes: bool, known: bool) -> None:
    about, names = "training.batch_size", "rows a step = rows at once x processes x accumulated micro-batches"
    product = batch.micro * batch.processes * batch.steps
    if not right and said_processes:
        what = f"{batch.rows} isn't {batch.micro} x {batch.processes} x {batch.steps} = {product} ({names})"
        all_.tell("error", subject, what, f"set train_batch_size to {product}, or change the others", about)
    elif not right:
        what = f"{batch.rows} isn't a multiple of {batch.micro} x {batch.steps} ({names})"
        all_.tell("error", subject, what, "no number of processes can make it; change one of them", about)
    elif known and not said_processes:
        what = f"{batch} ({names}), so {batch.processes} processes are meant, though no file says so"
        all_.tell("note", subject, what, about=about)
    elif known:
        all_.tell("note", subject, f"{batch} ({names})", about=about)
    elif subject.key == "train_batch_size":
        all_.tell("note", subject, "no file says how many processes; the batch is the same on any number", about=about)
    else:
        what = f"rows of one process, and no file says how many processes: the batch is that of 1, {batch}"
        all_.tell("warning", subject, what, "for N processes multiply training.batch_size by N", about)
