"""The flags, declared once. Those of recipe options take their help text from the recipe's declarations."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from secateur.errors import SecateurError
from secateur.recipe.declare import fields_of
from secateur.recipe.recipe import CalibrationText, Recipe

WHAT, CALIBRATION, OUTPUT, MACHINE, EVALUATION = "What to prune", "Calibration", "Output", "Machine", "Evaluation"


def help_of(option: str) -> str:
    """First sentence of a recipe option's help text, with its default."""
    section, dot, name = option.partition(".")
    field = fields_of(CalibrationText if dot else Recipe)[name if dot else section]
    shown = "" if field.default is None or option == "solver" else f" (default: {field.default})"
    short = str(field.description).partition(". ")[0].partition(";")[0].rstrip(".")
    return f"{short}{shown}."


def recipe_flag(option: str, panel: str, metavar: str) -> Any:
    """The flag of a recipe option."""
    return typer.Option(help=help_of(option), rich_help_panel=panel, metavar=metavar)


def flag(text: str, panel: str, metavar: str | None = None, name: str | None = None) -> Any:
    """A flag with a help text, in a group."""
    names = () if name is None else (name,)
    return typer.Option(*names, help=text, rich_help_panel=panel, metavar=metavar)


Model = Annotated[str, typer.Argument(metavar="MODEL", help="Folder, GGUF file, hub name or smollm2.")]
Out = Annotated[Path, typer.Argument(metavar="OUT", help="Folder for the pruned model.")]

NewFolder = Annotated[Path, typer.Argument(metavar="OUT", help="A new or empty folder.")]

RecipeName = Annotated[str | None, flag("fast, balanced (default), best, or a file.", WHAT, "NAME|FILE", "--recipe")]
PatternText = Annotated[str | None, recipe_flag("pattern", WHAT, "50%|2:4")]
SolverName = Annotated[
    str | None,
    flag(f"Or one: {help_of('solver')}", WHAT, "NAME", "--solver"),
]
Settings = Annotated[list[str] | None, flag("Any option, such as refit.rate=0.01.", WHAT, "NAME=VALUE", "--set")]
Include = Annotated[list[str] | None, flag("Prune only these: '*.mlp.*' (repeatable).", WHAT, "GLOB")]
Exclude = Annotated[list[str] | None, flag("Leave these dense (repeatable).", WHAT, "GLOB")]

Calibration = Annotated[
    str | None,
    flag(
        "File, folder, data set (default: shipped text), or self[:PROMPTS]: the model writes it.",
        CALIBRATION,
        "TEXT",
    ),
]
TextField = Annotated[str | None, recipe_flag("calibration.text_field", CALIBRATION, "NAME")]
Samples = Annotated[int | None, recipe_flag("calibration.samples", CALIBRATION, "N")]
SeqLen = Annotated[int | None, flag("Tokens per sequence (default: 2048, or fewer).", CALIBRATION, "N")]
Seed = Annotated[int | None, recipe_flag("seed", CALIBRATION, "N")]

Overwrite = Annotated[bool, flag("Replace an earlier model in OUT.", OUTPUT, name="--overwrite")]
Resume = Annotated[bool, flag("Resume the unfinished run in OUT.", OUTPUT, name="--resume")]
DryRun = Annotated[bool, flag("Say what a run would do; prune nothing.", OUTPUT, name="--dry-run")]
ShardSize = Annotated[str, flag("Largest weight file.", OUTPUT, "SIZE")]
PushToHub = Annotated[bool, flag("Then upload OUT to the hub, private if new.", OUTPUT, name="--push-to-hub")]
Json = Annotated[bool, flag("Print JSON alone on stdout.", OUTPUT, name="--json")]
Quiet = Annotated[bool, flag("No progress, notes or table.", OUTPUT, name="--quiet")]

Device = Annotated[str | None, flag("cpu, cuda:1, mps (default: CUDA if any).", MACHINE, "NAME")]
Threads = Annotated[int | None, flag("CPU threads (default: all cores).", MACHINE, "N")]
MaxMemory = Annotated[str | None, recipe_flag("max_memory", MACHINE, "SIZE")]
OffloadDir = Annotated[Path | None, flag("Folder for hidden states.", MACHINE, "DIR")]
RemoteCode = Annotated[bool, flag("Run the checkpoint's Python code.", MACHINE, name="--trust-remote-code")]
Pickle = Annotated[bool, flag("Read .bin files, which can run code.", MACHINE, name="--allow-pickle")]

Text = Annotated[str | None, flag("Text file or data set name (default: the shipped text).", EVALUATION, "TEXT")]
Texts = Annotated[list[str] | None, flag("Evaluation text; may be repeated.", EVALUATION, "TEXT", "--text")]
EvalTextField = Annotated[str | None, flag("Field or column that holds the text.", EVALUATION, "NAME", "--text-field")]
FieldOfTexts = Annotated[
    str | None,
    flag("Field or column of all texts that have fields, --calibration included.", EVALUATION, "NAME", "--text-field"),
]
EvalSeqLen = Annotated[int | None, flag("Tokens per window (default: 1024, or fewer).", EVALUATION, "N")]
MaxTokens = Annotated[int | None, flag("Cap on evaluated tokens, in whole windows, at least one.", EVALUATION, "N")]
Tasks = Annotated[str | None, flag("lm-evaluation-harness tasks, with commas.", EVALUATION, "NAMES")]
TaskDir = Annotated[Path | None, flag("Folder of local YAML tasks.", EVALUATION, "DIR")]
TaskLimit = Annotated[int | None, flag("Documents of each task.", EVALUATION, "N")]
Against = Annotated[str | None, flag("The dense model: adds its perplexity, KL and agreement.", EVALUATION, "DENSE")]
Divergence = Annotated[
    bool, flag("Compare predictions with the dense model's (KL, agreement).", EVALUATION, name="--divergence")
]
Record = Annotated[bool, flag("Add the figures to the pruned model's report and card.", EVALUATION, name="--record")]


def split_list(text: str | None) -> tuple[str, ...]:
    """Parts of a list with commas; those in brackets belong to a part."""
    parts, depth = [""], 0
    for letter in text or "":
        depth += (letter in "[{") - (letter in "]}")
        if letter == "," and depth <= 0:
            parts.append("")
        else:
            parts[-1] += letter
    return tuple(part.strip() for part in parts if part.strip())


def some(text: str, name: str) -> tuple[str, ...]:
    """Parts of a list that must not be empty.

    Raises:
        SecateurError: it is.
    """
    if not (found := split_list(text)):
        raise SecateurError(f"‹{name}› is empty: name at least one")
    return found


def numbers(text: str, name: str) -> list[int]:
    """Whole numbers of a list with commas.

    Raises:
        SecateurError: the list is empty, or holds something else.
    """
    parts = some(text, name)
    try:
        return [int(part) for part in parts]
    except ValueError:
        raise SecateurError(f"‹{name}› is {text!r}; write whole numbers with commas, such as 0,1,2") from None
