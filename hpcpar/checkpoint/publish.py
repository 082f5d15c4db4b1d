"""Give a folder its name at once or not at all: what every writer of sets and exports ends with.

    begin       .NAME.tmp     empty; what a dead run left there is gone
    complete    .NAME.tmp     + model.h5, manifest.json; synced
    publish     NAME          the one before, if any, was .NAME.old until then
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from hpcpar.checkpoint.format import MANIFEST, Manifest
from hpcpar.checkpoint.index import index_image, write_index
from hpcpar.checkpoint.store import sync_folder, write_bytes


@contextmanager
def published(final: Path) -> Iterator[Path]:
    """Give the block a folder to fill; publish it as `final` when the block ends, delete it if the block raises."""
    folder = begin(final)
    try:
        yield folder
        sync_folder(folder)
        publish(folder, final)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def begin(final: Path) -> Path:
    """Make the empty folder that will become `final`, and return it. Raises: OSError."""
    folder, aside = final.with_name(f".{final.name}.tmp"), final.with_name(f".{final.name}.old")
    if aside.exists() and not final.exists():
        aside.rename(final)  # killed between the two renames of `take_name`
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def complete(folder: Path, manifest: Manifest) -> None:
    """Add the index and the manifest to a folder of shard files. Raises: OSError."""
    index = write_index(folder, index_image(manifest), manifest.step)
    seal(folder, replace(manifest, files=(*manifest.files, index)))


def seal(folder: Path, manifest: Manifest) -> None:
    """Add the manifest of all that is in a folder. Raises: OSError."""
    write_bytes(folder / MANIFEST, manifest.to_bytes())
    sync_folder(folder)


def publish(folder: Path, final: Path) -> None:
    """Give a complete folder its name for good, and delete what had that name. Raises: OSError."""
    aside = final.with_name(f".{final.name}.old")
    shutil.rmtree(aside, ignore_errors=True)
    take_name(folder, final)
    sync_folder(final.parent)
    shutil.rmtree(aside, ignore_errors=True)


def take_name(folder: Path, final: Path) -> None:
    """Rename `folder` to `final`; a kill at any point leaves the new folder or the one before under a name that counts.

    What had the name lies aside as `.NAME.old`; it counts until the new one has the name.
    """
    aside = final.with_name(f".{final.name}.old")
    if final.exists():
        final.rename(aside)
    try:
        folder.rename(final)
    except OSError:
        if aside.exists():
            aside.rename(final)
        raise
