"""Models of the Hugging Face hub: their safe files, from the cache where the hub can't be reached."""

from __future__ import annotations

import re
from pathlib import Path

from trainwright.recipe import InputError

# Nothing that could run code: no pickles (*.bin, *.pt) and no Python.
TOKENIZER_FILES = ("*.json", "*.model", "*.jinja", "merges.txt", "vocab.txt")
MODEL_FILES = ("*.safetensors", *TOKENIZER_FILES)
# Subfolders and other formats repeat the weights. (fnmatch's * crosses slashes.)
SKIPPED = ("*/*", "consolidated*", "*.py", "*.bin")
TIMEOUT = 5.0  # seconds until a hub that doesn't answer counts as unreachable


def is_hub_name(name: str) -> bool:
    """Whether a name has the form organisation/model."""
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name) is not None and not name.endswith(".gguf")


def snapshot(name: str, files: tuple[str, ...] = MODEL_FILES) -> Path:
    """The folder with the hub's newest files of a model, or those in the cache if the hub can't be reached.

    HF_HUB_OFFLINE, HF_TOKEN, HF_HOME and HF_ENDPOINT mean what they mean to huggingface_hub.

    Raises:
        InputError: neither the hub nor the cache has it; says what was tried and how to do without the hub.
    """
    try:
        return downloaded(name, files)
    except Exception as error:  # no network, no such model, no access, an interrupted download: the cache may still do
        reason = f"{type(error).__name__}: {first_line(error)}"
    try:
        return cached(name, files)
    except Exception:  # nothing or only a part of it is cached; the hub's answer above is what tells why
        raise InputError(
            f"{name!r} is no folder here, it isn't complete in the Hugging Face cache, and the hub gave {reason}; "
            f"offline: run `hf download {name}` on a connected machine, copy that folder here and give its path"
        ) from None


def downloaded(name: str, files: tuple[str, ...]) -> Path:
    from huggingface_hub import HfApi, snapshot_download

    # snapshot_download would wait and retry for long; a single question shows whether anyone answers.
    HfApi().model_info(name, timeout=TIMEOUT)
    return Path(snapshot_download(name, allow_patterns=list(files), ignore_patterns=list(SKIPPED)))


def cached(name: str, files: tuple[str, ...]) -> Path:
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(name, allow_patterns=list(files), ignore_patterns=list(SKIPPED), local_files_only=True))


def first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].strip().rstrip(".") if lines else "no details"
