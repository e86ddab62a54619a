"""Figures that were measured of a finished model, kept with it: in its report, its page and its card."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from secateur.checkpoints.model_card import model_card
from secateur.checkpoints.packing import packed_card
from secateur.errors import SecateurError
from secateur.packed.files import is_packed
from secateur.reporting.figures import MeasuredPerplexity, Speed
from secateur.reporting.page import run_page, two_runs_page
from secateur.reporting.report import Report, read_metadata
from secateur.runtime.messages import say
from secateur.storage.checkpoint_files import CARD, METADATA, REPORT_FILE
from secateur.storage.file_records import damage, record_of
from secateur.storage.held_folder import write_durably
from secateur.storage.paths import real_path


def record_perplexity(folder: Path, figures: dict[str, Any]) -> None:
    """Add perplexity and divergence; those of the same text, window and number of tokens are replaced.

    What an earlier measurement with the dense model found stays where the new one is without it.

    Args:
        folder: of the pruned model.
        figures: what `evaluate` returns.
    """
    report, against = read_metadata(folder), figures.get("against", {})
    own = {name: figures[name] for name in ("text", "perplexity", "targets", "seq_len")}
    new = MeasuredPerplexity(
        **own,
        dense=against.get("perplexity"),
        kl=against.get("kl"),
        top1_agreement=against.get("top1_agreement"),
    )
    for old in report.perplexities:
        if old.what == new.what and new.dense is None:
            new = replace(new, dense=old.dense, kl=old.kl, top1_agreement=old.top1_agreement)
    report.perplexities = [*(each for each in report.perplexities if each.what != new.what), new]
    _write(folder, report)


def record_speed(folder: Path, speeds: Sequence[Speed]) -> None:
    """Keep the figures of `bench`, in place of earlier ones. Models go by the last part of their name."""
    report = read_metadata(folder)
    report.speeds = [replace(speed, model=real_path(Path(speed.model)).name) for speed in speeds]
    _write(folder, report)


def write_page(folder: Path, other: Path | None, out: Path | None) -> Path:
    """Write the page of one run, or of two.

    Args:
        folder: of a pruned model.
        other: of a second one.
        out: the page; None = `report.html` in the folder, or `comparison.html` in the working folder.

    Returns:
        where it is.

    Raises:
        SecateurError: no report there, damaged files, or a place that can't be written.
    """
    report = report_in(folder)
    target = out or (folder / REPORT_FILE if other is None else Path("comparison.html"))
    try:
        if other is None:
            page = run_page(report, folder)
        else:
            page = two_runs_page(report, report_in(other), names_of(folder, other))
        write_durably(target, page)
    except SafetensorError as error:
        raise SecateurError(f"the weight files of {folder} are damaged ({error})") from error
    except OSError as error:
        raise SecateurError(f"{target} can't be written ({error.strerror or error})") from error
    return target


def report_in(folder: Path) -> Report:
    """The report of a folder.

    Raises:
        SecateurError: no folder, or no report there, or a damaged one.
    """
    if not folder.is_dir():
        raise SecateurError(f"there is no folder {folder}")
    if not (folder / METADATA).is_file():
        raise SecateurError(f"{folder} has no {METADATA}: it is not a model that secateur pruned")
    return read_metadata(folder)


def names_of(first: Path, second: Path) -> tuple[str, str]:
    """What to call two folders: their names, or their paths where the names are the same."""
    return (str(first), str(second)) if first.name == second.name else (first.name, second.name)


def _write(folder: Path, report: Report) -> None:
    """Write report and page, and the card where nobody has edited it; the records of all other files stay.

    Raises:
        SecateurError: the folder can't be written.
    """
    recorded = report.files.get(CARD)
    card = model_card(report, real_path(folder).name)
    card = packed_card(card) if is_packed(folder) else card
    try:
        if recorded is None or damage(folder, CARD, recorded) is None or _is_unfinished(folder / CARD, card):
            write_durably(folder / CARD, card)
            report.files = {**report.files, CARD: record_of(folder / CARD)}
        else:
            say(f"secateur: {CARD} was edited, so the figures are added to the report alone")
        write_durably(folder / METADATA, report.to_json())
        write_durably(folder / REPORT_FILE, run_page(report, folder))
    except OSError as error:
        raise SecateurError(
            f"the figures could not be added to {folder} ({error.strerror or error}): make room, and measure again"
        ) from error


def _is_unfinished(path: Path, card: str) -> bool:
    """Whether a card is missing, or is what a run wrote that was stopped before it recorded it."""
    return not path.exists() or path.read_bytes() == card.encode()
