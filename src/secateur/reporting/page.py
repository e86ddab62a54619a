"""The pages: a run's report, two runs side by side, and the short form for a notebook."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from secateur.recipe.files import to_yaml
from secateur.reporting.charts import Series, bars, chart
from secateur.reporting.figures import OUTPUT_ERROR, DepthReport, MatrixReport, MeasuredPerplexity, Speed
from secateur.reporting.heat_map import HeatMap, heat_map
from secateur.reporting.reasons import extremes, reason
from secateur.reporting.report import Report
from secateur.reporting.weight_files import WeightFiles, read_weight_files
from secateur.runtime.messages import duration, visible


def run_page(report: Report, folder: Path | None = None) -> str:
    """The report of a run, as one HTML file.

    Args:
        report: of the run.
        folder: where its model is, for sizes and pictures of masks; None = without them.

    Raises:
        SafetensorError, SecateurError: damaged weight files.

    Cost: about a second.
    """
    files = None if folder is None else read_weight_files(folder, report.matrices)
    return render(
        "run.html.j2",
        title=f"{report.model}, pruned to {report.recipe.pattern}",
        report=report,
        recipe=to_yaml(report.recipe),
        headline=headline(report, files),
        perplexity=_perplexity_rows(report),
        speed=_speed_rows(report),
        maps=[zeros_map(report), error_map(report)] if report.matrices else [],
        extremes=extremes(report),
        depth=depth_chart([("", report)]),
        refit=refit_chart(report),
        pictures=[] if files is None else files.pictures,
        stages=_stages_chart(report),
        calibration={name: value for name, value in report.calibration.items() if not name.endswith("sha256")},
        environment=report.environment,
        dense=_by_reason(report.dense),
    )


def two_runs_page(first: Report, second: Report, names: tuple[str, str]) -> str:
    """Two runs side by side, as one HTML file.

    Args:
        first: a run.
        second: the other.
        names: what to call them.
    """
    texts = [to_yaml(run.recipe).splitlines() for run in (first, second)]
    lines = difflib.unified_diff(texts[0], texts[1], names[0], names[1], lineterm="", n=1)
    errors = [(name, error_map(run)) for name, run in zip(names, (first, second), strict=True) if run.matrices]
    return render(
        "two_runs.html.j2",
        title=f"{names[0]} and {names[1]}",
        names=names,
        rows=_side_by_side(first, second),
        maps=[*_difference_map(first, second), *errors],
        depth=depth_chart([(names[0], first), (names[1], second)]),
        changes=[line for line in lines if not line.startswith("@@")],
    )


def notebook_form(report: Report) -> str:
    """Headline and heat map, for a notebook's output cell."""
    maps = [zeros_map(report)] if report.matrices else []
    return render("notebook.html.j2", report=report, headline=headline(report, None), maps=maps)


def headline(report: Report, files: WeightFiles | None) -> list[tuple[str, str, str]]:
    """What to see first: figure, what it is, and a line of detail."""
    share = report.pruned_parameters / max(1, report.model_parameters)
    detail = f"of the weights in {len(report.matrices)} matrices, which hold {share:.0%} of the model's"
    found = [(f"{report.sparsity:.1%}", "zeros", detail)]
    if files is not None:
        found.append(_size(files))
    if report.speeds:
        found.append(_speed(report.speeds))
    found.append(_perplexity(report.perplexities))
    refit = ", before the block refit" if report.blocks else ""
    found.append((f"{report.mean_relative_error:.4f}", "mean layer error", f"relative, squared{refit}"))
    found.append((duration(report.seconds), "of pruning", report.recipe.summary()))
    return found


def _size(files: WeightFiles) -> tuple[str, str, str]:
    if files.packed_bytes is None:
        return f"{files.bytes / 1e6:,.0f} MB", "weight files", "packed"
    share = files.packed_bytes / max(1, files.bytes)
    packed = f"packed about {files.packed_bytes / 1e6:,.0f} MB in memory ({share:.2f}x), less on disk"
    return f"{files.bytes / 1e6:,.0f} MB", "weight files", packed


def _speed(speeds: Sequence[Speed]) -> tuple[str, str, str]:
    """The fastest model against the first one; alone, a model has no ratio."""
    reference, *others = speeds
    best = max(others or speeds, key=lambda speed: speed.decode_tokens_per_second)
    rate = best.decode_tokens_per_second
    if not others:
        return f"{rate:.1f}", "tokens/s of decoding", f"{best.model}, on {best.threads} threads"
    detail = f"{best.model}: {rate:.1f} tokens/s on {best.threads} threads"
    return _ratio(rate, reference.decode_tokens_per_second), "decoding speed", detail


def _perplexity(measured: Sequence[MeasuredPerplexity]) -> tuple[str, str, str]:
    if not measured:
        return "?", "perplexity", "not measured: secateur eval OUT --against MODEL --record"
    last = measured[-1]
    dense = "" if last.dense is None else f", dense {last.dense:.2f}"
    return f"{last.perplexity:.2f}", "perplexity", f"on {file_name(last.text)}{dense}"


def _ratio(value: float, reference: float) -> str:
    return f"{value / reference:.2f}x" if reference else ""


def zeros_map(report: Report) -> HeatMap:
    """Share of zeros by block and kind of matrix, with its reason."""
    return heat_map(
        "Zeros",
        report.matrices,
        lambda each: each.sparsity,
        lambda value: f"{value:.0%}",
        partial(reason, report.recipe, report.prices),
    )


def error_map(report: Report) -> HeatMap:
    """Layer error by block and kind of matrix."""
    return heat_map(
        "Layer error", report.matrices, lambda each: each.relative_error, _short,
        lambda each: f"{each.sparsity:.1%} zeros",
    )  # fmt: skip


def _difference_map(first: Report, second: Report) -> list[tuple[str, HeatMap]]:
    """Change of the zeros of the matrices that both runs pruned; nothing where there are none."""
    other = {matrix.name: matrix for matrix in first.matrices}

    def change(matrix: MatrixReport) -> float:
        return matrix.sparsity - other[matrix.name].sparsity

    both = [matrix for matrix in second.matrices if matrix.name in other]
    if not both:
        return []
    title = "Change of zeros"
    return [("", heat_map(title, both, change, lambda value: f"{value:+.0%}", lambda each: f"{each.sparsity:.1%} now"))]


def depth_chart(runs: Sequence[tuple[str, Report]]) -> Markup | None:
    """Distance from the dense model behind each block, a line for each list of blocks and run."""
    series = []
    for run_name, run in runs:
        chains: dict[str, list[DepthReport]] = {}
        for each in run.depth:
            chains.setdefault(each.block.rpartition(".")[0], []).append(each)
        for stem, found in chains.items():
            prefix = "".join(f"{name}: " for name in (run_name, stem if len(chains) > 1 else "") if name)
            blocks = list(range(1, len(found) + 1))
            series += [
                Series(f"{prefix}relative error", blocks, [each.relative_error for each in found]),
                Series(f"{prefix}1 - cosine", blocks, [1 - each.cosine for each in found]),
            ]
    if not series:
        return None
    return chart(series, "block", "distance from the dense model", alt="Distance from the dense model by block")


def refit_chart(report: Report) -> Markup | None:
    """Validation loss of each block before and after its refit."""
    if not report.blocks:
        return None
    # The last blocks may minimise something else, in another unit.
    blocks = [(number, block) for number, block in enumerate(report.blocks, 1) if block.objective == OUTPUT_ERROR]
    if not blocks:
        return None
    numbers = [number for number, _ in blocks]
    series = [
        Series("as solved", numbers, [block.val_loss_before for _, block in blocks]),
        Series("after the refit", numbers, [block.val_loss_after for _, block in blocks]),
    ]
    return chart(series, "block", "validation loss", is_log=True, alt="Validation loss by block")


def _stages_chart(report: Report) -> Markup | None:
    if not report.stages:
        return None
    solving = sum(matrix.seconds for matrix in report.matrices)
    refit = sum(block.seconds for block in report.blocks)
    rows = []
    # Several processes solve at the same time, and a resumed run's figures are of several runs.
    is_whole = report.environment.get("processes", 1) == 1 and all(each.name != "replay" for each in report.stages)
    for stage in report.stages:
        if stage.name == "prune" and is_whole and solving + refit < stage.seconds:
            rows += [("solve", solving), ("refit", refit), ("Hessians, replay", stage.seconds - solving - refit)]
        else:
            rows.append((stage.name, stage.seconds))
    rows = [(name, seconds) for name, seconds in rows if seconds]
    return bars([name for name, _ in rows], [seconds for _, seconds in rows], "seconds", alt="Seconds of each stage")


def _perplexity_rows(report: Report) -> list[list[str]]:
    return [
        [
            file_name(each.text),
            f"{each.targets:,}",
            _shown(each.dense, ".2f"),
            f"{each.perplexity:.2f}",
            _shown(each.kl, ".3f"),
            _shown(each.top1_agreement, ".1%"),
        ]
        for each in report.perplexities
    ]


def _speed_rows(report: Report) -> list[list[str]]:
    rows = []
    for each in report.speeds:
        first, decoding = report.speeds[0], each.decode_tokens_per_second
        rows.append([
            each.model,
            f"{each.file_bytes / 1e6:,.0f} ({_ratio(each.file_bytes, first.file_bytes)})",
            f"{each.memory_bytes / 1e6:,.0f} ({_ratio(each.memory_bytes, first.memory_bytes)})",
            f"{each.prefill_tokens_per_second:,.0f}",
            f"{decoding:.1f} ({_ratio(decoding, first.decode_tokens_per_second)})",
        ])  # fmt: skip
    return rows


def _side_by_side(first: Report, second: Report) -> list[tuple[str, str, str, str]]:
    """Figure, both values, and the change in words."""
    rows: list[tuple[str, float | None, float | None, str]] = [
        ("zeros", first.sparsity, second.sparsity, ".2%"),
        ("mean layer error", first.mean_relative_error, second.mean_relative_error, ".4f"),
        ("seconds", first.seconds, second.seconds, ",.0f"),
    ]
    for name in ("relative_error", "cosine"):
        last = [getattr(run.depth[-1], name) if run.depth else None for run in (first, second)]
        rows.append((f"{name.replace('_', ' ')} after the last block", last[0], last[1], ".4f"))
    measured = [{each.what: each.perplexity for each in run.perplexities} for run in (first, second)]
    for what in sorted(measured[0].keys() | measured[1].keys()):
        name = f"perplexity on {file_name(what[0])} ({what[2]:,} tokens in windows of {what[1]:,})"
        rows.append((name, measured[0].get(what), measured[1].get(what), ".2f"))
    return [(name, _shown(a, form), _shown(b, form), _change(a, b)) for name, a, b, form in rows]


def _shown(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _change(first: float | None, second: float | None) -> str:
    return "" if first is None or second is None or not first else f"{second / first - 1:+.1%}"


def _short(value: float) -> str:
    if value < 1e-4:
        return "<.01%"
    return f"{100 * value:.2g}%" if value < 0.1 else f"{100 * value:.0f}%"


def _by_reason(dense: dict[str, str]) -> list[tuple[str, int, str]]:
    """Reason, number of matrices, and the first of them."""
    names: dict[str, list[str]] = {}
    for name, why in dense.items():
        names.setdefault(why, []).append(name)
    return [(why, len(members), members[0]) for why, members in names.items()]


def file_name(source: str) -> str:
    """A text's name without the folders that it was in on this machine. Names of data sets stay."""
    is_path = source.startswith(("/", ".", "~")) or Path(source).suffix
    return Path(source).name if is_path else source


@cache
def _templates() -> Environment:
    environment = Environment(
        loader=PackageLoader("secateur.reporting"), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True, finalize=_clean,
    )  # fmt: skip
    environment.filters["duration"] = duration
    return environment


def _clean(value: Any) -> Any:
    """Text without control characters, which a page can't hold."""
    return visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def render(template: str, **values: Any) -> str:
    """Fill a template of this package; every value is escaped."""
    return _templates().get_template(template).render(**values)
