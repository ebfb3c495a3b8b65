"""A user's own images in a folder, with a folder for each class (`docs/data.md` describes the layout).

The classes are numbered in natural order of their names: 2 before 10. If all images are gray the dataset has one
channel, otherwise three. Files that systems leave in folders are ignored. So are other files than images beside the
folders of the classes. Any other file is refused.
"""

import os
from collections.abc import Sequence
from pathlib import Path

from distdl.data.dataset import Dataset
from distdl.data.labels import natural_order
from distdl.data.sources.image_files import ListedFiles
from distdl.data.sources.images import UnusableImageError, has_image_name, not_an_image, pillow
from distdl.errors import UserError, listed, quoted
from distdl.image_options import ImageOptions

#: The folders of the parts of a dataset, in lower case.
PARTS = {
    "training": ("train", "training"),
    "validation": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing"),
}
PART_OF = {name: part for part, names in PARTS.items() for name in names}
#: Names that systems give to files and folders of their own, in lower case; also names that start with a dot.
JUNK = {
    *("thumbs.db", "ehthumbs.db", "desktop.ini", "$recycle.bin", "system volume information"),
    *("__macosx", "icon\r", "@eadir", "lost+found", "__pycache__"),
}
MOST_NAMES = 10


def load_folder(path: Path, options: ImageOptions | None = None) -> Dataset:
    """Return the images in a folder, in the order of their names. So the same files give the same dataset anywhere.

    Raises `UserError` if Pillow or an image is missing or an image does not fit, `DamagedFileError` if one is damaged.
    """
    pillow()
    notes: list[str] = []
    options = options or ImageOptions()
    parts = _parts(path, notes, options.least_classes)
    names = [folder.name for folder in parts["training"]]
    listed = ListedFiles(f"folder:{path}", quoted(path), tuple(names), notes=notes)
    for part, folders in parts.items():
        for folder in folders:
            images = _images_in(folder, listed.unusable)
            if not images and part == "training":
                raise UserError(f"{quoted(folder)} has no images: every folder is a class, and a class needs images")
            listed.add(part, images, names.index(folder.name))
    return listed.read(options)


def _parts(path: Path, notes: list[str], least: int) -> dict[str, list[Path]]:
    """Return the folders of the classes for each part; without folders of parts, all are for training."""
    folders = _folders(path, notes)
    by_part: dict[str, list[Path]] = {}
    for folder in folders:
        by_part.setdefault(PART_OF.get(folder.name.lower(), ""), []).append(folder)
    others = by_part.pop("", [])
    if len(by_part) < 2:
        return {"training": _classes(path, folders, least)}
    given = ", ".join(folder.name for one in by_part.values() for folder in one)
    if "training" not in by_part:
        raise UserError(f"{quoted(path)} has the parts {given}, but none for training: expected a folder train")
    for part, found in by_part.items():
        if len(found) > 1:
            raise UserError(f"{quoted(path)} has {given}: expected one folder for the {part} part; join or move them")
    if others:
        raise UserError(
            f"{quoted(path)} has the parts {given}, and also {_list(others)}: expected only train, val and test; move "
            "the others elsewhere"
        )
    [training] = by_part.pop("training")
    classes = _classes(training, _folders(training, notes), least)
    others_of = {part: _classes_of_part(root, training, classes, notes) for part, [root] in by_part.items()}
    return {"training": classes} | {part: others_of[part] for part in PARTS if part in others_of}


def _classes_of_part(root: Path, training: Path, classes: list[Path], notes: list[str]) -> list[Path]:
    """Return the folders of the classes of the validation or test part."""
    found = _folders(root, notes)
    if not found and _images_beside(root):
        raise UserError(
            f"{quoted(root)} has images but no folders of classes: expected the classes of {training.name}; to train "
            f"without it give --dataset folder:{training}, and then predict its images by python -m distdl.predict"
        )
    names = {folder.name for folder in classes}
    if unknown := [folder for folder in found if folder.name not in names]:
        raise UserError(
            f"{quoted(root)} has {_list(unknown)}, which {training.name} has not: expected the same classes; correct "
            "the names"
        )
    return found


def _classes(path: Path, folders: list[Path], least: int) -> list[Path]:
    """Return the folders of the classes in a folder, at least as many as `least`."""
    inner = _folders(folders[0], []) if len(folders) == 1 else []
    if len(folders) >= least and not inner:
        return folders
    hint = ""
    if len(inner) >= least:
        hint = f"; did you mean folder:{folders[0]}, which has {_list(inner)}?"
    elif beside := _images_beside(path):
        hint = f"; it has {len(beside)} images itself: move each into a folder with the name of its class"
    raise UserError(
        f"{quoted(path)} has {'1 folder' if folders else 'no folders'} with images: expected one for each class, "
        f"{'two' if least > 1 else 'one'} or more, with the images in them{hint}"
    )


def _list(paths: Sequence[Path]) -> str:
    return listed([repr(path.name) for path in paths], MOST_NAMES)


def _entries(folder: Path) -> dict[Path, bool]:
    """Return the entries of a folder in the order of their names, without those of systems; True for a folder."""
    try:
        with os.scandir(folder) as found:
            entries = sorted((entry for entry in found if not is_junk(entry.name)), key=lambda entry: entry.name)
    except OSError as error:
        raise UserError(
            f"the folder of images {quoted(folder)} cannot be read ({error.strerror or error}): expected a folder for "
            "each class, with the images in them"
        ) from error
    return {folder / entry.name: _is_folder(entry) for entry in entries}


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads nowhere
        return False


def is_junk(name: str) -> bool:
    """Return whether systems give this name to files and folders of their own."""
    return name.startswith(".") or name.lower() in JUNK


def _folders(folder: Path, notes: list[str]) -> list[Path]:
    """Return the folders in a folder, in natural order; note images beside them."""
    entries = _entries(folder)
    folders = [entry for entry, is_folder in entries.items() if is_folder]
    beside = [entry for entry, is_folder in entries.items() if has_image_name(entry) and not is_folder]
    if folders and beside:
        notes.append(f"{quoted(folder)} has images beside its folders, which are not used: {_list(beside)}")
    return sorted(folders, key=lambda entry: natural_order(entry.name))


def _images_beside(folder: Path) -> list[Path]:
    return [entry for entry, is_folder in _entries(folder).items() if has_image_name(entry) and not is_folder]


def _images_in(folder: Path, unusable: dict[Path, UnusableImageError]) -> list[Path]:
    """Return the images in the folder of a class; add the other files to `unusable`."""
    images = []
    for entry, is_folder in _entries(folder).items():
        if is_folder:
            raise UserError(
                f"{quoted(entry)} is a folder in the folder of a class: expected only images; every folder in "
                f"{quoted(folder.parent)} is a class, except train, val and test together. If the folders in "
                f"{folder.name!r} are the classes, give folder:{folder}"
            )
        if has_image_name(entry):
            images.append(entry)
        else:
            unusable[entry] = not_an_image()
    return images
