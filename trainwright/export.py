"""A finished run's model in a format that other tools read: Hugging Face folder, PEFT adapter, delta."""

from __future__ import annotations

import shutil
from pathlib import Path

from trainwright import build, language, runfolder
from trainwright.models import pretrained
from trainwright.recipe import InputError, Lora, Memory
from trainwright.saving import plain_tensors, replacing

FORMATS = {"full": ["hf"], "partial": ["delta", "merged"], "lora": ["peft", "merged"]}


def export(run_folder: Path, to: str, out: Path | None = None) -> dict[str, str]:
    """Write a run's final model as ``hf``, ``peft``, ``delta`` or ``merged``; gives the format and the folder.

    Raises:
        InputError: the run's method has no such format, or the place is taken.
    """
    recipe = runfolder.finished(run_folder)
    allowed = FORMATS[recipe.adapt.method]
    if to not in allowed:
        raise InputError(f"--to {to}: a run with adapt.method {recipe.adapt.method} can be exported to {' or '.join(allowed)}")
    out = out or run_folder / f"export-{to}"
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} exists already; name another place")
    if to == "merged":
        shape = build.saved_shape(run_folder, recipe)
        # Sums are made before anything is rounded, on the base as it was.
        adapt = recipe.adapt.model_copy(update={"base": "plain"}) if isinstance(recipe.adapt, Lora) else recipe.adapt
        whole = recipe.model_copy(update={"precision": "fp32", "adapt": adapt, "memory": Memory()})
        built = build.load_model(whole, shape)
        tokenizer = language.find_tokenizer(recipe, built.source) if recipe.model.architecture == "decoder" else None
        pretrained.save_folder(out, plain_tensors(built.model), built.config, tokenizer)
    else:
        with replacing(out) as temporary:
            shutil.copytree(run_folder / runfolder.MODEL, temporary, dirs_exist_ok=True)
    return {"format": to, "folder": str(out)}
