"""Figures of all matrices as a grid: a row for each block, a column for each kind of matrix."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from secateur.reporting.figures import MatrixReport

COLOURS = "cividis"  # made to look alike with and without colour blindness
_EXPERT = re.compile(r"\bexperts\.\d+|\[\d+\]")


@dataclass(frozen=True)
class Cell:
    """One cell: the matrices of one kind in one block.

    Args:
        text: what it shows.
        title: shown when the pointer rests on it.
        background, ink: colours.
    """

    text: str
    title: str
    background: str
    ink: str


@dataclass(frozen=True)
class HeatMap:
    """A grid of cells.

    Args:
        title: what it shows.
        kinds: names of the columns.
        rows: name of each block, with its cells; None where a block has no such matrix.
        low, high: figures at the ends of the colours.
        gradient: colours from low to high.
    """

    title: str
    kinds: list[str]
    rows: list[tuple[str, list[Cell | None]]]
    low: str
    high: str
    gradient: list[str]


def split_name(name: str) -> tuple[str, str]:
    """Block and kind of a matrix: `model.layers.3.mlp.up_proj` is `mlp.up_proj` of `model.layers.3`.

    Experts of a block are one kind.
    """
    kind = _EXPERT.sub(lambda found: "experts" if found[0].startswith("experts") else "", name)
    parts = kind.split(".")
    number = next((index for index, part in enumerate(parts) if part.isdigit()), None)
    if number is None:
        return "", kind
    return ".".join(parts[: number + 1]), ".".join(parts[number + 1 :])


def heat_map(
    title: str,
    matrices: Sequence[MatrixReport],
    figure: Callable[[MatrixReport], float],
    shown: Callable[[float], str],
    why: Callable[[MatrixReport], str],
) -> HeatMap:
    """A grid of a figure of all matrices; several matrices in a cell show their mean, by weights.

    Args:
        title: what it shows.
        matrices: of the run, in order.
        figure: of a matrix.
        shown: a figure as text.
        why: what to say of a matrix.
    """
    cells: dict[tuple[str, str], list[MatrixReport]] = {}
    for matrix in matrices:
        cells.setdefault(split_name(matrix.name), []).append(matrix)
    means = {place: _mean(members, figure) for place, members in cells.items()}
    low, high = min(means.values()), max(means.values())
    span = (high - low) or 1.0
    blocks, kinds = (list(dict.fromkeys(place[part] for place in cells)) for part in (0, 1))

    def cell(block: str, kind: str) -> Cell | None:
        members = cells.get((block, kind))
        if members is None:
            return None
        value = means[block, kind]
        text, first = shown(value), members[0]
        several = len(members) > 1
        number = f"mean of {len(members)} matrices like {first.name}" if several else first.name
        reason = f"Of this one: {why(first)}" if several else why(first)
        background = _colour((value - low) / span)
        return Cell(text, f"{number}: {text}. {reason}", background, _ink(background))

    short = _short_names(blocks)
    rows = [(short[block], [cell(block, kind) for kind in kinds]) for block in blocks]
    gradient = [_colour(step / 8) for step in range(9)]
    return HeatMap(title, kinds, rows, shown(low), shown(high), gradient)


def _mean(members: Sequence[MatrixReport], figure: Callable[[MatrixReport], float]) -> float:
    weights = [matrix.rows * matrix.columns for matrix in members]
    return sum(figure(each) * weight for each, weight in zip(members, weights, strict=True)) / sum(weights)


def _short_names(blocks: Sequence[str]) -> dict[str, str]:
    """Numbers alone where all blocks are of one list."""
    stems = {block.rpartition(".")[0] for block in blocks}
    return {block: block.rpartition(".")[2] if len(stems) == 1 else block for block in blocks}


def _colour(share: float) -> str:
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    return to_hex(colormaps[COLOURS](float(share)))


def _ink(background: str) -> str:
    """Black or white, whichever is easier to read on a colour."""
    red, green, blue = (int(background[start : start + 2], 16) for start in (1, 3, 5))
    return "#000000" if 0.299 * red + 0.587 * green + 0.114 * blue > 140 else "#ffffff"
