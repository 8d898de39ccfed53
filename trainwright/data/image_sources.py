"""``data.source`` of images: which of the built-in ones, folders or files it is."""

from __future__ import annotations

from pathlib import Path

from trainwright.data import builtin_images, image_arrays, image_folders
from trainwright.data.image_arrays import Target
from trainwright.data.pictures import Source
from trainwright.recipe import InputError, nearest


def find(source: str, target: Target, key: str) -> Source:
    """The images of a built-in source, a folder or a .npz file; ``key`` of the recipe named it.

    Raises:
        InputError: there is no such source, or something is wrong with it.
    """
    built_in = source in builtin_images.NAMES
    path = Path(source).expanduser()
    if not built_in and not path.exists():
        known = ", ".join(builtin_images.NAMES)
        beside = [str(path.with_name(other.name)) for other in path.parent.iterdir()] if path.parent.is_dir() else []
        hint = nearest(source, [*builtin_images.NAMES, *beside])
        raise InputError(f"{key} {source!r}: there is no such file or folder, and it is none of {known}{hint}")
    if not built_in and path.is_file():
        if path.suffix.lower() != ".npz":
            raise InputError(f"{key} {source!r} is a file, but not a .npz one; give a folder or a .npz file")
        return image_arrays.read_npz(path, target)
    if target == "values":
        raise InputError(
            f"{key} {source!r} has classes or masks, but the loss is one for values; choose cross_entropy, "
            "or a .npz file whose labels are numbers"
        )
    return _built_in(source) if built_in else _folder(path)


def _built_in(source: str) -> Source:
    if source == "digits":
        return Source("scikit-learn's handwritten digits", {"train": builtin_images.digits()})
    if source == "digit-strokes":
        return Source("strokes of scikit-learn's digits, with noise", {"train": builtin_images.digit_strokes()})
    return image_arrays.read_idx(builtin_images.fashion_folder(), builtin_images.FASHION_LABELS)


def _folder(path: Path) -> Source:
    try:
        return image_arrays.read_idx(path) if image_arrays.is_idx_folder(path) else image_folders.read(path)
    except PermissionError as error:
        raise InputError(f"{error.filename} can't be read: {error.strerror}") from None
