"""Finished blocks on disk: written before the next begins, mapped from their files from then on."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from secateur.errors import SecateurError
from secateur.models.blocks import Block
from secateur.models.placement import WeightPlacement
from secateur.permutation.channels import ChannelOrder
from secateur.pruning.context import LayerPatterns, StorageOf
from secateur.reporting.figures import BlockFigures, BlockReport, MatrixReport
from secateur.resume.block_files import check_digest, map_from_file, open_block
from secateur.resume.kept import keep_order, kept_order, kept_patterns
from secateur.resume.manifest import RunManifest
from secateur.runtime import distributed
from secateur.storage.json_files import parse_json


class JournalledBlocks:
    """The store of a run from files: blocks are durable once they are finished. Rank 0 alone writes.

    Attributes:
        passed: blocks that this process is past; their weights are mapped from their files.
    """

    def __init__(
        self,
        manifest: RunManifest,
        placement: WeightPlacement,
        storage_of: StorageOf,
        apply_order: Callable[[ChannelOrder], None],
    ) -> None:
        """Write to the manifest's journal; channels that an earlier process reordered are in that order from now on.

        Args:
            manifest: of the run.
            placement: where the other weights are.
            storage_of: dtype that each parameter is saved in.
            apply_order: puts the model's weights in another order of channels, in files.
        """
        self.manifest, self.placement, self.storage_of = manifest, placement, storage_of
        self.passed: set[str] = set()
        self._apply_order = apply_order
        if (order := kept_order(manifest)) is not None:
            apply_order(order)

    @property
    def is_reordered(self) -> bool:
        """Whether the channels are in another order than in the source."""
        return bool(self.manifest.state.channel_order)

    def reorder(self, _model: nn.Module, order: ChannelOrder) -> None:
        """Keep an order of channels, and apply it.

        Raises:
            SecateurError: the journal can't be written.
        """
        keep_order(self.manifest, order)
        self._apply_order(order)

    def patterns_of(self, chain: str, find: Callable[[], LayerPatterns]) -> LayerPatterns:
        """The allocation of a chain, kept for a resumed run.

        Raises:
            SecateurError: a damaged file, or a journal that can't be written.
        """
        return kept_patterns(self.manifest, chain, find)

    @contextmanager
    def onload_block(self, block: Block) -> Iterator[None]:
        """Onload the block; once the run is past it, its weights are those of its file."""
        with self.placement.onload_block(block):
            yield
        if block.name in self.passed:
            map_from_file(self.path_of(block.name), block.parameters)

    def onload_model(self, model: nn.Module, stubbed: Sequence[Block] = ()) -> AbstractContextManager[None]:
        """Onload as the placement does."""
        return self.placement.onload_model(model, stubbed)

    def reuse(self, block: Block) -> BlockFigures | None:
        """Take a block that an earlier process finished: its figures, or None where it has to be pruned.

        Raises:
            SecateurError: a damaged file.
        """
        digest = self.manifest.state.blocks.get(block.name)
        if digest is None:
            return None
        path = self.path_of(block.name)
        check_digest(path, digest)
        with open_block(path) as file:
            figures = parse_json(file.metadata()["figures"])
            refit = figures["refit"]
            matrices = [MatrixReport(**matrix) for matrix in figures["matrices"]]
            self.passed.add(block.name)
            return BlockFigures(matrices, None if refit is None else BlockReport(**refit), figures["chunk"])

    def path_of(self, block: str) -> Path:
        """The file of a block that the manifest names."""
        return self._path(list(self.manifest.state.blocks).index(block))

    def _path(self, number: int) -> Path:
        return self.manifest.folder / f"block-{number:05d}.safetensors"

    def commit(self, block: Block, figures: BlockFigures) -> None:
        """Make a finished block durable.

        Raises:
            SecateurError: the disk is full or not writable; the blocks before it are kept.
        """
        if distributed.is_main():
            self._write(block, figures)
        self.manifest.take_state_of_main()
        self.passed.add(block.name)

    def _write(self, block: Block, figures: BlockFigures) -> None:
        journal, blocks = self.manifest.held, self.manifest.state.blocks
        name, partial = self._path(len(blocks)).name, journal.new_name()
        try:
            try:
                save_file(
                    self._tensors(block), journal.path / partial, metadata={"figures": json.dumps(asdict(figures))}
                )
                journal.flush_file(partial)
                digest = journal.record(partial).sha256
                journal.rename(partial, name)
                journal.flush()
            finally:
                journal.remove(partial)
            self.manifest.update(blocks=blocks | {block.name: digest})
        except (OSError, SafetensorError) as error:
            raise SecateurError(f"{block.name} could not be written to {self.manifest.folder} ({error})") from error

    def _tensors(self, block: Block) -> dict[str, Tensor]:
        """The block's pruned parameters, in the narrower of the dtypes that they are held and saved in."""
        tensors = {}
        for name, parameter in block.parameters.items():
            own, saved = parameter.dtype, self.storage_of(name, parameter.dtype)
            dtype = saved if torch.finfo(saved).bits < torch.finfo(own).bits else own
            tensors[name] = parameter.data.to(device="cpu", dtype=dtype).contiguous()
        return tensors
