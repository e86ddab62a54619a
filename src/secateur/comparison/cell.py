"""One cell of a comparison: a recipe at a pattern with a seed, pruned and measured.

A cell runs a preset (`best`), a recipe file (`mine.yaml`), a solver alone (`sparsegpt`), or `llmcompressor-sparsegpt`
and `llmcompressor-wanda`, with settings behind plus signs: `admm+refit.epochs=2`.
"""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from secateur.api.models import evaluate
from secateur.api.pruning import prune
from secateur.calibration.batches import CalibrationBatches, calibration_batches
from secateur.calibration.documents import OWN_WORDS, has_fields, is_own_words, text_of, text_place
from secateur.checkpoints.load import Checkpoint, load
from secateur.comparison.peers import prune_by_llmcompressor
from secateur.comparison.results import DENSE
from secateur.errors import SecateurError, nearest
from secateur.evaluation.tasks import run_tasks
from secateur.recipe.patterns import parse_pattern
from secateur.recipe.presets import PRESETS
from secateur.recipe.recipe import CalibrationText
from secateur.recipe.settings import parse_settings
from secateur.recipe.solvers import solver_names
from secateur.resume.manifest import journal_of
from secateur.runtime.environment import default_device, environment
from secateur.runtime.memory import peak_resident_bytes
from secateur.runtime.progress import Progress, no_progress
from secateur.sources.other_files import model_files
from secateur.storage.file_records import sha256
from secateur.storage.paths import user_path

DEFAULT_SAMPLES = CalibrationText().samples
DIGEST = " sha256:"
RECIPE_SUFFIXES = (".yaml", ".yml", ".json")
PEERS = ("llmcompressor-sparsegpt", "llmcompressor-wanda")

Watched = Callable[[], AbstractContextManager[Progress]]


def unwatched() -> AbstractContextManager[Progress]:
    """Show nothing."""
    return nullcontext(no_progress)


@dataclass(frozen=True)
class ComparisonSettings:
    """What every cell of a table shares.

    Args:
        model: folder, GGUF file, hub name or `smollm2`.
        calibration: text source, or None for the shipped text.
        samples, seq_len: calibration sequences and their tokens.
        text_field: field or column of the texts that have fields; None = found by the form of the records.
        texts: evaluation texts, each a column; empty = the shipped one.
        eval_seq_len, max_tokens: tokens a window, and cap on the evaluated tokens.
        tasks: lm-evaluation-harness tasks, each a column.
        task_dir, task_limit: folder of local tasks, and documents of each.
        divergence: whether predictions are compared with the dense model's too, which is then loaded next to each cell.
        overwrite: whether a cell that was stopped begins again where it can't go on: with other versions or threads.
        device, trust_remote_code, allow_pickle: as for `prune`.
    """

    model: str
    calibration: str | None = None
    samples: int = DEFAULT_SAMPLES
    seq_len: int | None = None
    text_field: str | None = None
    texts: tuple[str, ...] = ()
    eval_seq_len: int | None = None
    max_tokens: int | None = None
    tasks: tuple[str, ...] = ()
    task_dir: str | None = None
    task_limit: int | None = None
    divergence: bool = False
    overwrite: bool = False
    device: str | None = None
    trust_remote_code: bool = False
    allow_pickle: bool = False

    def field_of(self, text: str | None) -> str | None:
        """The field to read of a text; None where it is plain."""
        return self.text_field if has_fields(text) else None

    def identity(self) -> dict[str, Any]:
        """What must agree for cells to stand in one table.

        Model and texts count by name and content digest. Tasks and divergence, whose figures are kept by name, the
        device, and how files may be read do not count; a limit of documents counts where there are tasks.
        """
        values = asdict(self) | {
            "model": _content_of_model(self.model),
            "calibration": _content(self.calibration),
            "texts": [_content(text) for text in self.texts],
        }
        apart = {"task_dir", "device", "tasks", "divergence", "overwrite", "trust_remote_code", "allow_pickle"}
        apart |= set() if self.tasks else {"task_limit"}
        return {name: values[name] for name in values if name not in apart}


@dataclass(frozen=True)
class Cell:
    """One run: a recipe at a pattern with a seed; the dense model has none of them.

    Args:
        recipe: as tables name it (`label_of`).
        pattern, seed: of the run.
        asked: the recipe as it was asked for; "" = as it is named.
    """

    recipe: str
    pattern: str | None = None
    seed: int | None = None
    asked: str = ""

    @property
    def key(self) -> str:
        """Name of the cell in the file of results."""
        return " ".join(str(part) for part in (self.recipe, self.pattern, self.seed) if part is not None)

    @property
    def is_ours(self) -> bool:
        """Whether secateur prunes the model, into a folder: not the dense model, nor a cell of llm-compressor."""
        return self.recipe not in (DENSE, *PEERS)


def parse_recipe(recipe: str) -> dict[str, Any]:
    """`best+refit.epochs=4` -> the keyword arguments of `prune`.

    Raises:
        SecateurError: what follows a plus is not NAME=VALUE, or a misspelt preset.
    """
    head, *parts = _parts(recipe)
    if Path(head).suffix in RECIPE_SUFFIXES and not _is_file(head):
        raise SecateurError(f"there is no recipe file {head}")
    if head not in (*PRESETS, *solver_names()) and not _is_file(head) and (hint := nearest(head, [*PRESETS])):
        raise SecateurError(f"there is no recipe or solver {head!r}{hint}")
    arguments: dict[str, Any] = {"recipe" if head in PRESETS or _is_file(head) else "solver": head}
    return arguments | ({"settings": parse_settings(parts)} if parts else {})


def _parts(recipe: str) -> list[str]:
    """A recipe and its settings. A plus inside a number (`1e+0`) or a file's name starts no setting."""
    parts = re.split(r"\+(?=[A-Za-z_])", recipe)
    for count in range(len(parts), 0, -1):
        if _is_file(head := "+".join(parts[:count])):
            return [head, *parts[count:]]
    return parts


def label_of(recipe: str) -> str:
    """What tables call a recipe: a file by its name and content."""
    head, *parts = _parts(recipe)
    label = f"{Path(head).name}@{sha256(user_path(head))[:8]}" if _is_file(head) else head
    return "+".join([label, *parts])


def _is_file(head: str) -> bool:
    return Path(head).suffix in RECIPE_SUFFIXES and user_path(head).is_file()


def run_cell(
    settings: ComparisonSettings,
    cell: Cell,
    folder: Path,
    peer_python: Path | None = None,
    watched: Watched = unwatched,
) -> dict[str, Any]:
    """Prune the model into a folder, as far as an earlier process has not, and evaluate it.

    `watched` shows how far the cell is, in the process that runs it.

    Returns:
        `perplexity` by text, `divergence` (KL, nats a token) and `top1_agreement` by text where asked for, `tasks` by
        name and metric, and for pruned cells `layer_error`, `sparsity`, `seconds` (from the loaded model to the folder
        of the pruned one), `peak_memory` (bytes) of pruning and `eval_seconds`.
    """
    with watched() as progress:
        return _run_cell(settings, cell, folder, peer_python, progress)


def _run_cell(
    settings: ComparisonSettings, cell: Cell, folder: Path, peer_python: Path | None, progress: Progress
) -> dict[str, Any]:
    device = settings.device or default_device()
    reading = {"device": device, "trust_remote_code": settings.trust_remote_code, "allow_pickle": settings.allow_pickle}
    found = _pruned(folder, settings, cell, reading, progress) if cell.is_ours else {}
    checkpoint = load(str(folder) if cell.is_ours else settings.model, **reading)
    if cell.recipe == DENSE:
        _calibration(checkpoint, settings, 0)  # what is wrong with the text is said before hours of other cells
    if cell.recipe in PEERS:
        found = _pruned_by_peer(checkpoint, settings, cell, peer_python)
    compares = settings.divergence and cell.recipe != DENSE
    dense = load(settings.model, **reading).model if compares else None
    started = time.perf_counter()
    found["perplexity"] = {}
    for text in settings.texts or (None,):
        with _of_evaluation():
            figures = evaluate(
                checkpoint.model,
                text,
                seq_len=settings.eval_seq_len,
                max_tokens=settings.max_tokens,
                text_field=settings.field_of(text),
                against=dense,
                progress=progress,
                tokenizer=checkpoint.tokenizer,
            )
        column = _column(settings, text)
        found["perplexity"][column] = figures["perplexity"]
        if dense is not None:
            found.setdefault("divergence", {})[column] = figures["against"]["kl"]
            found.setdefault("top1_agreement", {})[column] = figures["against"]["top1_agreement"]
    if tasks := settings.tasks:
        by_name = run_tasks(checkpoint.model, checkpoint.tokenizer, tasks, settings.task_dir, settings.task_limit)
        found |= {"tasks": by_name, "tasks_asked": sorted(tasks)}
    return {"environment": environment()} | found | {"eval_seconds": time.perf_counter() - started}


@contextmanager
def _of_evaluation() -> Iterator[None]:
    """Name the length of evaluation windows as `compare` does, where `seq_len` is that of the calibration text."""
    try:
        yield
    except SecateurError as error:
        raise SecateurError(error.raw.replace("‹seq_len›", "‹eval_seq_len›")) from error


def _pruned(
    folder: Path, settings: ComparisonSettings, cell: Cell, reading: dict[str, Any], progress: Progress
) -> dict[str, Any]:
    """Prune the model into a folder; returns its figures, without peak memory where a process was stopped."""
    recipe = cell.asked or cell.recipe
    if label_of(recipe) != cell.recipe:
        raise SecateurError(f"{recipe} was changed while its cell {cell.recipe} was to run: run the comparison again")
    is_new = not folder.exists() and not journal_of(folder).exists()
    report = prune(
        settings.model,
        folder,
        pattern=str(cell.pattern),
        calibration=settings.calibration,
        samples=settings.samples,
        seq_len=settings.seq_len,
        text_field=settings.field_of(settings.calibration),
        seed=cell.seed or 0,
        resume=True,
        overwrite=settings.overwrite,
        progress=progress,
        **reading,
        **parse_recipe(recipe),
    )
    peak = {"peak_memory": _peak_memory(reading["device"])} if is_new else {}
    return {
        "recipe": report.recipe.to_dict(),
        "layer_error": report.mean_relative_error,
        "sparsity": report.sparsity,
        "seconds": report.seconds,
        "environment": report.environment,
    } | peak


def _pruned_by_peer(
    checkpoint: Checkpoint, settings: ComparisonSettings, cell: Cell, peer_python: Path | None
) -> dict[str, Any]:
    """Let llm-compressor prune a loaded model; returns the figures of it."""
    assert peer_python is not None
    data = _calibration(checkpoint, settings, cell.seed or 0)
    if data.to_write is not None:
        raise SecateurError(f"{cell.recipe} can't be calibrated on text that the model writes: name a text")
    method = cell.recipe.removeprefix("llmcompressor-")
    return prune_by_llmcompressor(checkpoint, data.batches, method, parse_pattern(str(cell.pattern)), peer_python)


def _calibration(checkpoint: Checkpoint, settings: ComparisonSettings, seed: int) -> CalibrationBatches:
    """The text that all cells of a seed are calibrated on."""
    text = CalibrationText(
        source=settings.calibration,
        samples=settings.samples,
        seq_len=settings.seq_len,
        text_field=settings.field_of(settings.calibration),
    )
    return calibration_batches(settings.calibration, checkpoint.tokenizer, checkpoint.model.config, text, seed)


def _peak_memory(device: str) -> int:
    """Bytes: of the GPU where that is the device, else of this process."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device)
    return peak_resident_bytes()


def _column(settings: ComparisonSettings, text: str | None) -> str:
    """What a text's column is called: its file name, or its path where another text has the same name."""
    if text is None:
        return "shipped text"
    name = Path(text).name
    return name if [Path(each).name for each in settings.texts].count(name) < 2 else str(text)


def _content(text: str | None) -> str:
    """Name of a text, with the digest of a file's content; of prompts too, where the model writes the text."""
    if is_own_words(text) and (prompts := text_of(text)) is not None:
        return f"{OWN_WORDS}:{_content(str(prompts))}"
    place = None if text is None else text_place(text)
    if place is None:
        return "shipped text" if text is None else text
    if place.is_file():
        return f"{place.name}{DIGEST}{sha256(place)[:16]}"
    return f"{place.name}{DIGEST}{_digest(_as_now([each for each in sorted(place.iterdir()) if each.is_file()]))}"


def _content_of_model(name: str) -> str:
    """Name of a model, with the digest of what is in its folder or file."""
    place = user_path(name)
    if place.is_file():
        return f"{name}{DIGEST}{_digest(_as_now([place]))}"
    if not place.is_dir():
        return name
    return f"{name}{DIGEST}{_digest(_as_now(model_files(place)))}"


def _as_now(files: list[Path]) -> tuple[tuple[Path, int, int], ...]:
    return tuple((each, each.stat().st_size, each.stat().st_mtime_ns) for each in files)


@lru_cache(maxsize=4)  # each cell asks for it
def _digest(files: tuple[tuple[Path, int, int], ...]) -> str:
    parts = "".join(f"{path.name} {sha256(path)}\n" for path, _, _ in files)
    return hashlib.sha256(parts.encode()).hexdigest()[:16]
