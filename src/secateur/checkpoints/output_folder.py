"""Whether a checkpoint may be written to a folder."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from secateur.errors import SecateurError
from secateur.pruning.report import METADATA
from secateur.resume.manifest import FOLDER, unfinished


def check_output_folder(out: Path, inputs: Sequence[Path], overwrite: bool, resume: bool = False) -> None:
    """Check that a checkpoint may be written to `out`. Leaves nothing behind.

    Args:
        out: an absolute path.
        inputs: files and folders that the run reads; `out` may hold none of them, since it is replaced whole.
        overwrite: an earlier model in `out`, or an unfinished run, may be replaced.
        resume: an unfinished run in `out` may be resumed, and a finished one may be there.

    Raises:
        SecateurError: it may not.
    """
    for kept in (*inputs, Path.cwd()):
        if out == kept.resolve() or out in kept.resolve().parents:
            raise SecateurError(f"{out} is or holds {kept}, which must stay: write to another folder")
    if out.is_file():
        raise SecateurError(f"{out} is a file: give a folder to write to")
    if out.is_dir() and any(out.iterdir()):
        _check_content(out, overwrite, resume)
    made = [parent for parent in (out.parent, *out.parent.parents) if not parent.exists()]
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryDirectory(dir=out if out.is_dir() else out.parent, prefix=f".{out.name}.").cleanup()
    except OSError as error:
        raise SecateurError(f"{out} can't be written: {error.strerror} ({error.filename})") from error
    finally:
        for parent in made:
            if parent.is_dir():
                parent.rmdir()


def _check_content(out: Path, overwrite: bool, resume: bool) -> None:
    """Check that what `out` holds may be replaced, or resumed."""
    kept, finished = unfinished(out), (out / METADATA).is_file()
    if kept and not overwrite and not resume:
        raise SecateurError(
            f"{out} holds an unfinished run ({kept.progress}): go on with ‹resume›, or start again with ‹overwrite›"
        )
    others = [path for path in out.iterdir() if path.name not in {FOLDER, *(kept.files if kept else ())}]
    if not others or (kept and not overwrite):
        return
    if not overwrite and not (resume and finished):
        raise SecateurError(f"{out} exists and is not empty: choose another folder, or pass ‹overwrite› to replace it")
    if not finished and not (out / "config.json").is_file():
        raise SecateurError(
            f"{out} holds neither {METADATA} nor config.json, so it is not a model, and is not overwritten"
        )
    if folders := sorted(path.name for path in others if path.is_dir()):
        raise SecateurError(
            f"{out} holds the folder {folders[0]}, as no checkpoint of ours does: it is not overwritten"
        )
