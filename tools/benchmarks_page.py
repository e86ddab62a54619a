"""docs/benchmarks.md, docs/ablations.md, their pictures, and the README's table, from what `secateur compare` wrote."""

from __future__ import annotations

import re
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

from comparisons import COLOURS, cells, gap_closed, names, patterns_of, read, recipes_of, spread
from packed_page import models_table, short_line
from pages import DOCS, ROOT, Picture, table
from scale_page import scale_table
from tokens_part import tokens_part, tokens_picture

from secateur.comparison.results import Comparison
from secateur.comparison.table import members, tables
from secateur.evaluation.tasks import headline

README = ROOT / "README.md"
NOTES, OLDER_NOTES = (Path(__file__).with_name(f"{page}-notes.md") for page in ("benchmarks", "ablations"))
BEGIN, END = "<!-- results: written by tools/make_pages.py -->", "<!-- end of results -->"
BEGIN_SIZES, END_SIZES = "<!-- sizes: written by tools/make_pages.py -->", "<!-- end of sizes -->"
BEGIN_SCALE, END_SCALE = "<!-- scale: written by tools/make_pages.py -->", "<!-- end of scale -->"
TEXT = "wikitext2-test.txt"
MODELS = {
    "smollm2": "SmolLM2-135M-Instruct (dequantised from Q4_1)",
    "mamba": "mamba-tiny (3M parameters, a trained Mamba)",
    "gemma3": "Gemma 3 270M (dequantised from Q4_K_M)",
    "qwen.gguf": "Qwen2.5-Coder-1.5B-Instruct (dequantised from Q4_K_M)",
}
PAPER = "paper-"  # folders with single methods
VARIANTS = {
    "magnitude": "magnitude",
    "wanda": "Wanda",
    "sparsegpt": "SS (SparseGPT)",
    "mrp+solver.mask=S+solver.compensation=M": "SM",
    "mrp+solver.mask=M+solver.compensation=S": "MS",
    "mrp+solver.mask=M+solver.compensation=M": "MM",
}
TIMING = "timing"  # the same runs at 50%, one at a time on a quiet machine
ROWS = {
    "sparsegpt": "--solver sparsegpt",
    "fast": "--recipe fast",
    "balanced": "--recipe balanced (default)",
    "best": "--recipe best",
}
PRESETS = "tokens-16k"  # cells of today's presets
PROTOCOL = "protocol"  # the field's: sixteen times the text
TITLES = {  # of the comparisons whose presets are on the page of benchmarks, in its order
    PRESETS: "16k tokens",
    PROTOCOL: "128 x 2048 tokens",
    "qwen": "A larger model",
    "code": "Prose and code",
    TIMING: "Time",
    "timing-again": "Time on another day",
    "peers": "Other libraries",
}
TIMED = (TIMING, "timing-again", "peers")  # one run at a time, on a quiet machine


def gap_table(comparison: Comparison) -> str:
    texts = list(comparison.cells["dense"]["perplexity"])
    patterns = patterns_of(comparison)
    rows = [["gap closed", *(f"{pattern}, {text}" for pattern in patterns for text in texts)]]
    for recipe in recipes_of(comparison):
        if recipe != "sparsegpt":
            shares = (gap_closed(comparison, recipe, pattern, text) for pattern in patterns for text in texts)
            rows.append([recipe, *(spread(values) for values in shares)])
    return table(rows[0], rows[1:])


def task_table(comparison: Comparison) -> str:
    """Accuracy on each task minus sparsegpt's."""
    head: list[str] = []
    rows: list[list[str]] = []
    hidden = members(comparison)
    for pattern in patterns_of(comparison):
        base = next((cell for cell in cells(comparison, "sparsegpt", pattern).values() if "tasks" in cell), None)
        for recipe in recipes_of(comparison):
            mine = next((cell for cell in cells(comparison, recipe, pattern).values() if "tasks" in cell), None)
            if mine is not None and base is not None and recipe != "sparsegpt":
                tasks = {
                    name: headline(mine["tasks"][name]) - headline(base["tasks"][name])
                    for name in mine["tasks"]
                    if name not in hidden
                }
                rows.append([f"{recipe}, {pattern}", *(f"{value:+.4f}" for value in tasks.values())])
                head = ["accuracy minus sparsegpt's", *tasks]
    return table(head, rows) if rows else ""


def settings_line(comparison: Comparison) -> str:
    s, where = comparison.settings, comparison.environment
    return (
        f"{MODELS.get(Path(s['model']).name, Path(s['model']).name)}, calibrated on {s['samples']} x {s['seq_len']} tokens of {s['calibration']}, evaluated on "
        f"{s['max_tokens']} tokens of each text in windows of {s['eval_seq_len'] or 1024}; torch {where['torch']}, transformers "
        f"{where['transformers']}."
    )


def presets_of(comparison: Comparison) -> Comparison:
    """The cells of presets and solvers as they are, dense first, then in the order of the README's rows."""
    order = ["dense", *ROWS]
    cells = {key: cell for key, cell in comparison.cells.items() if "+" not in key}
    found = sorted(cells, key=lambda key: order.index(key.split()[0]) if key.split()[0] in order else len(order))
    return replace(comparison, cells={key: cells[key] for key in found})


def has_variants(name: str) -> bool:
    """Whether a comparison has cells that the page of benchmarks leaves out."""
    return name not in TITLES or presets_of(read(name)).cells.keys() != read(name).cells.keys()


def machines_line(comparison: Comparison) -> str:
    """What each cell ran on, where that is recorded: the CPU's instructions, and the dtype of forward passes."""
    on: dict[tuple[str, str], list[str]] = {}
    for key, cell in comparison.cells.items():
        where = cell["environment"]
        if key != "dense" and where.get("processor"):
            recipe, pattern, _ = key.rsplit(" ", 2)
            place = (where["processor"], where["forward_dtype"])
            if (name := f"`{recipe}` {pattern}") not in on.setdefault(place, []):
                on[place].append(name)
    usual = max(on, key=lambda place: len(on[place]), default=None)
    if usual is None:
        return ""
    others = [f"; {', '.join(of)} in {place[1]} with {place[0]}" for place, of in on.items() if place != usual]
    return f"Forward passes in {usual[1]} on a CPU with {usual[0]}{''.join(others)}."


def preset_section(name: str) -> str:
    """A comparison's presets alone, without seconds where the machine had other work."""
    found = presets_of(read(name))
    if name not in TIMED:
        cells = {
            key: {part: value for part, value in cell.items() if part != "seconds"} for key, cell in found.cells.items()
        }
        found = replace(found, cells=cells)
    return section(TITLES[name], name, found)


def older_section(name: str) -> str:
    """All of a comparison."""
    return section(name, name, read(name))


def section(title: str, name: str, comparison: Comparison) -> str:
    parts = [f"## {title}", f"{settings_line(comparison)} {machines_line(comparison)}".rstrip()]
    parts += [f"### {pattern}\n\n{table(rows[0], rows[1:])}" for pattern, rows in tables(comparison).items()]
    if "sparsegpt" in recipes_of(comparison) and len(recipes_of(comparison)) > 1:
        parts.append(gap_table(comparison))
    if task_text := task_table(comparison):
        parts.append(task_text)
    parts.append(commands(name, comparison))
    return "\n\n".join(parts)


def paper_section(name: str) -> str:
    """Single methods, a row each, against patterns: the layout of the paper's tables."""
    comparison = read(name)
    parts = [f"### {MODELS[name.removeprefix(PAPER)]}", settings_line(comparison)]
    patterns = patterns_of(comparison)
    for text, dense in comparison.cells["dense"]["perplexity"].items():
        rows = [["dense", *[f"{dense:.2f}"] * len(patterns)]]
        for recipe, label in VARIANTS.items():
            found = [[c["perplexity"][text] for c in cells(comparison, recipe, p).values()] for p in patterns]
            if any(found):
                rows.append([label, *(spread(values) for values in found)])
        parts.append(table([f"perplexity on {text}", *patterns], rows))
    parts.append(commands(name, comparison))
    return "\n\n".join(parts)


def paper_part() -> str:
    if not (papers := [name for name in names() if name.startswith(PAPER)]):
        return ""
    return (
        """## Single methods, in the paper's layout

Two letters name a variant of the paper: how the mask is chosen and how the rest compensates, each by single (S) or multiple (M)
removal; SS is SparseGPT. Joint choice of a mask (M) enumerates the patterns of a group, so it is for n:m. No refit of blocks, no
allocation. The paper's own tables are of other models and of raw WikiText-2: nothing here compares with them.

"""
        + "\n\n".join(paper_section(name) for name in papers)
        + "\n\n"
    )


def commands(name: str, comparison: Comparison) -> str:
    """The commands that make every cell of a comparison: one for each set of recipes that some patterns share."""
    alike: dict[tuple[str, ...], list[str]] = {}
    for pattern in patterns_of(comparison):
        recipes = tuple(recipe for recipe in recipes_of(comparison) if cells(comparison, recipe, pattern))
        alike.setdefault(recipes, []).append(pattern)
    return "\n".join(f"    {command(name, comparison, recipes, patterns)}" for recipes, patterns in alike.items())


def command(name: str, comparison: Comparison, recipes: tuple[str, ...], patterns: list[str]) -> str:
    """One command that makes the cells of these recipes at these patterns."""
    s = comparison.settings
    model = s["model"] if s["model"] in MODELS else f"MODELS/{Path(s['model']).name}"
    mine = {
        f"{recipe} {pattern} {seed}": cell
        for recipe in recipes
        for pattern in patterns
        for seed, cell in cells(comparison, recipe, pattern).items()
    }
    seeds = sorted({key.rsplit(" ", 1)[1] for key in mine})
    tasks = sorted({task for cell in mine.values() for task in cell.get("tasks_asked", ())})
    parts = [
        f"secateur compare {model} --recipes {','.join(recipes)}",
        f"--patterns {','.join(patterns)} --seeds {','.join(seeds)} --calibration {calibration(s['calibration'])}",
        f"--samples {s['samples']} --seq-len {s['seq_len']} {' '.join(f'--text TEXTS/{text}' for text in s['texts'])}",
        f"--max-tokens {s['max_tokens']}",
    ]
    if s["eval_seq_len"]:
        parts.append(f"--eval-seq-len {s['eval_seq_len']}")
    if tasks:
        limit = f" --task-limit {s['task_limit']}" if s.get("task_limit") else ""
        with_tasks = sorted({key.rsplit(" ", 1)[1] for key, cell in mine.items() if "tasks" in cell})
        parts.append(f"--tasks {','.join(tasks)} --task-dir TASKS{limit} --task-seeds {','.join(with_tasks)}")
    if any(recipe.startswith("llmcompressor-") for recipe in recipes):
        parts.append("--peer-python PEER/bin/python")
    return " ".join([*parts, f"--out benchmarks/results/compare/{name}"])


def calibration(text: str) -> str:
    """A text as the command names it."""
    own, colon, prompts = text.partition(":")
    return f"{own}:TEXTS/{prompts}" if colon else f"TEXTS/{text}"


def page() -> str:
    """docs/benchmarks.md."""
    return (
        """# Benchmarks

What today's presets give. Earlier versions, and single steps with and without, are in [Ablations](ablations.md).

Means over seeds, with the sample standard deviation where there are several. *Gap closed* is
(ppl of sparsegpt - ppl) / (ppl of sparsegpt - ppl of the dense model), seed by seed. Seconds are those of pruning alone.
*Layer error* is the mean relative error of single matrices before the refit of blocks, so a lower one need not mean a better model. *KL* is the
divergence of the predictions from the dense model's, in nats a token, and *top-1* how often both find the same token likeliest. *Memory* is
the peak of the process.

![perplexity](perplexity.svg)

"""
        + "\n\n".join(map(preset_section, TITLES))
        + "\n\n"
        + tokens_part()
        + paper_part()
        + NOTES.read_text(encoding="utf-8")
    )


def older_page() -> str:
    """docs/ablations.md."""
    return (
        """# Ablations

Every cell that was measured: earlier versions of the presets, and single steps with and without. [Benchmarks](benchmarks.md)
has what today's presets give, and explains the columns. [Decisions](decisions.md) says what was learned. [Where the cells come
from](#where-the-cells-come-from) says which version each one is.

"""
        + "\n\n".join(older_section(name) for name in names() if not name.startswith(PAPER) and has_variants(name))
        + "\n\n"
        + OLDER_NOTES.read_text(encoding="utf-8")
    )


def readme_table() -> str:
    comparison = read(PRESETS)
    patterns = patterns_of(comparison)
    dense = comparison.cells["dense"]["perplexity"][TEXT]
    timing = read(TIMING) if TIMING in names() else comparison
    rows = [["perplexity", *patterns, "seconds"], ["dense", *[f"{dense:.2f}"] * len(patterns), ""]]
    for recipe, label in ROWS.items():
        if any(values := perplexities(comparison, recipe, patterns)):
            seconds = [cell["seconds"] for cell in cells(timing, recipe, "50%").values()]
            rows.append([label, *map(spread, values), f"{statistics.mean(seconds):.0f}" if seconds else ""])
    more = read(PROTOCOL)
    for recipe in ("sparsegpt", "best"):
        label = f"{ROWS[recipe]}, [{tokens_of(more.settings)}](docs/benchmarks.md#{anchor(PROTOCOL)})"
        rows.append([label, *map(spread, perplexities(more, recipe, patterns)), ""])
    return table(rows[0], rows[1:])


def perplexities(comparison: Comparison, recipe: str, patterns: list[str]) -> list[list[float]]:
    """Of all seeds, for each pattern."""
    return [[cell["perplexity"][TEXT] for cell in cells(comparison, recipe, pattern).values()] for pattern in patterns]


def anchor(name: str) -> str:
    """The anchor of a comparison's section."""
    return TITLES[name].lower().replace(" ", "-")


def tokens_of(settings: dict[str, Any]) -> str:
    """How much text a comparison is calibrated on."""
    return f"{settings['samples']} x {settings['seq_len']} tokens"


def readme_line() -> str:
    """What the README says of its table; the page says the rest."""
    s = read(PRESETS).settings
    return (
        f"{MODELS[s['model']]}, calibrated on {tokens_of(s)} of wikitext2-valid.txt; perplexity on {TEXT}, "
        f"one seed, or two where a spread is given; "
        f"seconds at 50%, on 2 threads. 2:4: two of every four neighbouring weights in a row are zero. Differences of a few tenths mean nothing: "
        f"seeds and machines make as much. `best` is also calibrated on text that the model [writes itself](docs/guides/data.md#text-that-the-model-writes). "
        f"On other text a pruned model loses more: [all texts, and how they were measured](docs/benchmarks.md#{anchor(PRESETS)})."
    )


def readme() -> str:
    """The README with its table renewed."""
    block = f"{BEGIN}\n{readme_table()}\n\n{readme_line()}\n{END}"
    text = re.sub(f"{BEGIN}.*?{END}", lambda _: block, README.read_text(encoding="utf-8"), flags=re.DOTALL)
    sizes = f"{BEGIN_SIZES}\n{models_table(('50%',))}\n\n{short_line()}\n{END_SIZES}"
    text = re.sub(f"{BEGIN_SIZES}.*?{END_SIZES}", lambda _: sizes, text, flags=re.DOTALL)
    scale = f"{BEGIN_SCALE}\n{scale_table()}\n{END_SCALE}"
    return re.sub(f"{BEGIN_SCALE}.*?{END_SCALE}", lambda _: scale, text, flags=re.DOTALL)


def pages() -> dict[Path, str]:
    """The two pages, and the README with its tables renewed."""
    return {DOCS / "benchmarks.md": page(), DOCS / "ablations.md": older_page(), README: readme()}


def pictures() -> list[Picture]:
    """Perplexity by recipe."""
    comparison = read(PRESETS)
    means = {
        recipe: {
            pattern: statistics.mean(cell["perplexity"][TEXT] for cell in found.values())
            for pattern in patterns_of(comparison)
            if (found := cells(comparison, recipe, pattern))
        }
        for recipe in COLOURS
    }
    data = {"dense": comparison.cells["dense"]["perplexity"][TEXT], "means": means}
    return [Picture(DOCS / "perplexity.svg", data, draw), tokens_picture()]


def draw(axes: Any, data: dict[str, Any]) -> None:
    """Perplexity by recipe, one group of bars a pattern."""
    patterns = list(data["means"]["sparsegpt"])
    for offset, (recipe, colour) in enumerate(COLOURS.items()):
        heights = [data["means"][recipe].get(pattern, 0.0) for pattern in patterns]
        places = [index + (offset - 1.5) * 0.2 for index in range(len(patterns))]
        axes.bar(places, heights, 0.19, color=colour, label=recipe)
        for place, height in zip(places, heights, strict=True):
            if height:
                axes.text(place, height + 1, f"{height:.1f}", ha="center", va="bottom", fontsize=6.5)
    axes.axhline(data["dense"], color="black", linewidth=0.8, linestyle="--", label="dense")
    axes.set(ylabel="perplexity", ylim=(0, None), xticks=range(len(patterns)))
    axes.set_xticklabels(patterns)
    axes.set_title("SmolLM2-135M after pruning, WikiText-2 test: lower is better", fontsize=9)
    axes.legend(fontsize=7, ncols=5, loc="upper center", bbox_to_anchor=(0.5, -0.1), frameon=False)
