"""What a run is asked for: a model to load, a recipe, and texts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from secateur.calibration.batches import AUTO, BATCH_TOKENS, CalibrationBatches, CalibrationSource, calibration_batches
from secateur.calibration.documents import check_text, is_own_words
from secateur.checkpoints.load import Checkpoint, load
from secateur.errors import SecateurError
from secateur.models.placement import WeightPlacement
from secateur.recipe.recipe import OWN_BATCHES, Recipe
from secateur.reporting.stages import StageClock
from secateur.resume.kept import kept_windows
from secateur.resume.manifest import RunManifest
from secateur.runtime import distributed
from secateur.runtime.environment import default_device
from secateur.runtime.memory import MemoryBudget, memory_budget
from secateur.sources.other_files import check_links
from secateur.sources.resolve import resolve_dense

REFIT_TOKENS = 16_000  # a block refit of fewer overfits easily (docs/guides/choose.md)


@dataclass(frozen=True)
class ModelSource:
    """What to load, and how."""

    name: str
    device: str | None
    trust_remote_code: bool
    allow_pickle: bool

    def folder(self) -> Path:
        """Where the model is; rank 0 downloads or converts it where needed, and the others find it."""
        if not distributed.is_main():
            distributed.barrier()
        folder = resolve_dense(self.name, self.trust_remote_code, self.allow_pickle)
        if distributed.is_main():
            distributed.barrier()
        return folder

    def load(self, folder: Path, scratch: Path) -> Checkpoint:
        """The model in a folder, mapped from its files, and from files in `scratch` made for it; one GPU a rank.

        Raises:
            SecateurError: links in the folder that lead elsewhere, or what `checkpoints.load.load` raises.
        """
        links = check_links(folder)
        device = self.device or default_device()
        if device == "cuda" and distributed.world_size() > 1:
            device = f"cuda:{distributed.local_rank()}"
        converted = scratch / f"converted-{distributed.rank()}"
        found = load(str(folder), device, self.trust_remote_code, self.allow_pickle, converted)
        return replace(found, name=self.name, notices=[*links, *found.notices])


@dataclass(frozen=True)
class Request:
    """What a run is asked for.

    Args:
        recipe: what to do.
        texts: what to calibrate on: the recipe's source, or tensors.
        offload_dir: folder for hidden states.
        progress: called with the stage, what is done, and the total; it also times the stages.
    """

    recipe: Recipe
    texts: CalibrationSource
    offload_dir: str | Path | None
    progress: StageClock

    def check(self) -> None:
        """Check, before a model is loaded, that the text is there, and what may be held.

        Raises:
            SecateurError: no text of that name, no size, or no folder that can be written.
        """
        if isinstance(self.texts, str | Path) and self.texts != OWN_BATCHES:
            check_text(self.texts)
        self.memory()

    def calibration(self, tokenizer: Any, config: Any, why_silent: Callable[[], str | None]) -> CalibrationBatches:
        """Batches of the size that the recipe works best with.

        Args:
            tokenizer: of the model.
            config: of the model.
            why_silent: says why the model writes no text, None = it does; called where the recipe depends on it.
        """
        refit, text = self.recipe.refit, self.recipe.calibration
        size = BATCH_TOKENS if refit is None else refit.step_tokens
        named = self.texts if isinstance(self.texts, str | Path) else None
        asks = text.own_words == AUTO and (named is not None or self.texts is None) and not is_own_words(named)
        why = why_silent() if asks else None
        found = calibration_batches(
            self.texts,
            tokenizer,
            config,
            text,
            self.recipe.seed,
            size,
            can_write=asks and why is None,
            pattern=self.recipe.pattern,
        )
        if why is not None:
            without = f"the model writes no text to be calibrated on ({why})"
            found = replace(found, notices=[*found.notices, without])
        if refit is None or not 0 < found.num_tokens < REFIT_TOKENS:
            return found
        few = (
            f"{found.num_tokens:,} calibration tokens are few: a block refit should get {REFIT_TOKENS:,} or more, as "
            f"it can learn a short text by heart. Give more text, or take the recipe fast"
        )
        return replace(found, notices=[*found.notices, few])

    def written(
        self,
        data: CalibrationBatches,
        model: nn.Module,
        tokenizer: Any,
        placement: WeightPlacement,
        manifest: RunManifest | None = None,
    ) -> CalibrationBatches:
        """The batches with what the model has to write; a manifest keeps that for a resumed run."""
        to_write = data.to_write
        if to_write is None:
            return data

        def write() -> Tensor:
            return to_write.write(model, tokenizer, placement, self.progress)

        return data.with_written(
            distributed.broadcast_object(write()) if manifest is None else kept_windows(manifest, write)
        )

    def memory(self, journal: Path | None = None) -> MemoryBudget:
        """The memory budget; under a cap, hidden states go to the journal unless a folder is named."""
        found = memory_budget(self.recipe.max_memory, self.offload_dir)
        return replace(found, folder=journal) if found.limit is not None and found.folder is None else found


def texts_of(recipe: Recipe, calibration: CalibrationSource) -> tuple[Recipe, CalibrationSource]:
    """The recipe with what it is calibrated on, and the texts themselves.

    Raises:
        SecateurError: tensors, next to a recipe that names a text.
    """
    if calibration is None or isinstance(calibration, str | Path):
        return recipe, recipe.calibration.source
    if recipe.calibration.source not in (None, OWN_BATCHES):
        raise SecateurError(
            f"the recipe says calibration.source: {recipe.calibration.source}, and ‹calibration› holds tensors: leave "
            f"one out"
        )
    return replace(recipe, calibration=replace(recipe.calibration, source=OWN_BATCHES)), calibration
