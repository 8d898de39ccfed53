"""Checkpoints that a killed run can go on from, in any layout: atomic, hashed, and free of pickle.

    RUN/checkpoints/step-00000100/
        tensors-00001-of-00004.safetensors   what process 1 of 4 held (of one process: tensors.safetensors)
        pieces.json                          every tensor: dtype, shape, which file holds which box of it
        state.json                           everything else
        manifest.json                        size and SHA-256 of the others, and a digest of itself

A checkpoint is written under a hidden name beside its place, brought to the disk, and renamed when every process's part is
there: whenever a writer was killed, a folder called ``step-...`` is whole. What happens to it later (bad sectors, cut
copies) its hashes show. One job at a time writes to a run folder; ``write`` removes what killed writes left behind.
"""

from trainwright.checkpoint.folders import CheckpointError, latest, path_of, prune, step_of, whole
from trainwright.checkpoint.manifest import MANIFEST, PIECES, STATE, TENSORS
from trainwright.checkpoint.reading import Loaded, Reader, newest_reader, newest_valid, read
from trainwright.checkpoint.team import Team
from trainwright.checkpoint.writing import Writer, write, write_held

__all__ = [
    "MANIFEST",
    "PIECES",
    "STATE",
    "TENSORS",
    "CheckpointError",
    "Loaded",
    "Reader",
    "Team",
    "Writer",
    "latest",
    "newest_reader",
    "newest_valid",
    "path_of",
    "prune",
    "read",
    "step_of",
    "whole",
    "write",
    "write_held",
]
