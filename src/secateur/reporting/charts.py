"""Charts as SVG, in colours that follow the page: ink and lines are CSS variables, so they suit light and dark."""

from __future__ import annotations

import base64
import io
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from markupsafe import Markup

from secateur.runtime.messages import visible

if TYPE_CHECKING:  # it takes most of a second to import, and most commands draw nothing
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which differ with and without colour blindness.
SERIES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
MARKERS = ("o", "s", "^", "D", "v", "P")
INK, GRID = "#010101", "#020202"  # stand-ins for the variables
VARIABLES = {INK: "var(--ink)", GRID: "var(--grid)"}
MAX_LABEL = 40
PIXELS_A_WEIGHT = 3  # of the picture of a mask, in each direction
WIDTH, HEIGHT = 4.3, 2.8  # inches: readable without zooming on a telephone
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "secateur",
    "font.family": "sans-serif",
    "font.size": 9.5,
    "text.parse_math": False,
    "text.color": INK,
    "axes.edgecolor": GRID,
    "axes.labelcolor": INK,
    "axes.grid": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": GRID,
    "grid.linewidth": 0.5,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
}


@dataclass(frozen=True)
class Series:
    """A line or cloud of points.

    Args:
        name: in the legend.
        x, y: of its points.
        labels: of its points; none where there are none.
        is_line: whether the points are joined.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    labels: Sequence[str] = ()
    is_line: bool = True


def chart(
    series: Sequence[Series],
    x_label: str,
    y_label: str,
    *,
    is_log: bool = False,
    is_log_x: bool = False,
    reference: float | None = None,
    alt: str,
) -> Markup:
    """Lines or points as SVG.

    Args:
        series: what to draw.
        x_label: of the x axis.
        y_label: of the y axis.
        is_log: whether the y axis is logarithmic.
        is_log_x: whether the x axis is.
        reference: of the dense model, as a dashed line.
        alt: what the chart shows, for who can't see it.
    """
    with _axes() as (figure, axes):
        lines = []
        for number, each in enumerate(series):
            colour, line = SERIES[number % len(SERIES)], "-" if each.is_line else ""
            lines += axes.plot(
                each.x,
                each.y,
                color=colour,
                marker=MARKERS[number % len(MARKERS)],
                linestyle=line,
                markersize=4,
                linewidth=1.4,
            )
            for x, y, label in zip(each.x, each.y, each.labels, strict=False):
                axes.annotate(_label(label), (x, y), textcoords="offset points", xytext=(5, 4), fontsize=8.5)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        if reference is not None:
            axes.axhline(reference, color=INK, linestyle="--", linewidth=1)
            axes.text(0.01, reference, "dense", transform=axes.get_yaxis_transform(), va="bottom", fontsize=8.5)
        axes.margins(0.13, 0.13)
        if is_log:
            axes.set_yscale("log")
            _show_plain_numbers(axes.yaxis)
        if is_log_x:
            axes.set_xscale("log")
            _show_plain_numbers(axes.xaxis)
        if len(series) > 1:
            axes.legend(lines, [_label(each.name) for each in series], loc="best")
        return _svg(figure, alt)


def bars(names: Sequence[str], values: Sequence[float], x_label: str, *, alt: str) -> Markup:
    """Horizontal bars, the first on top."""
    with _axes(height=max(1.4, 0.32 * len(names) + 0.8)) as (figure, axes):
        drawn = axes.barh(list(names), list(values), color=SERIES[0])
        axes.bar_label(drawn, fmt="{:,.1f}", padding=3)
        axes.margins(x=0.18)
        axes.invert_yaxis()
        axes.grid(visible=False, axis="y")
        axes.set_xlabel(x_label)
        return _svg(figure, alt)


def picture_of_mask(kept: np.ndarray) -> str:
    """A mask as a PNG in a data URI: kept weights dark, zeros light. `kept` is (R, C) of bool."""
    from PIL import Image

    pixels = np.where(kept, 40, 235).astype(np.uint8).repeat(PIXELS_A_WEIGHT, 0).repeat(PIXELS_A_WEIGHT, 1)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def _label(text: str) -> str:
    """A name as a chart can show it: without control characters, and not longer than the chart."""
    shown = visible(text)
    return shown if len(shown) <= MAX_LABEL else f"{shown[: MAX_LABEL - 3]}..."


def _show_plain_numbers(axis: Axis) -> None:
    """Plain numbers on a logarithmic axis: mathematical text is off, since names come from files."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_formatter(NullFormatter())


@contextmanager
def _axes(height: float = HEIGHT) -> Iterator[tuple[Figure, Axes]]:
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(STYLE):  # pyright: ignore[reportArgumentType] - keys that its stubs lack
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        figure.patch.set_alpha(0)
        axes = figure.add_subplot()
        axes.patch.set_alpha(0)
        axes.set_axisbelow(True)
        yield figure, axes


def _svg(figure: Figure, alt: str) -> Markup:
    import matplotlib as mpl

    text = io.StringIO()
    with mpl.rc_context(STYLE), warnings.catch_warnings():  # pyright: ignore[reportArgumentType]
        warnings.filterwarnings("ignore", "Glyph .* missing")  # the browser has its own fonts
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    for colour, variable in VARIABLES.items():
        svg = svg.replace(colour, variable)
    named = Markup('<svg role="img" aria-label="{}" ').format(alt)
    return Markup(svg.replace("<svg ", str(named), 1))
