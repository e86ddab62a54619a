"""The recipe: everything that decides which weights a run removes and what the others become."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge, Lt
from pydantic import BeforeValidator, PlainSerializer, PlainValidator, TypeAdapter, WithJsonSchema

from secateur.recipe.declare import Field, Number, RecipeError, Switch, Whole, options, plain, validated
from secateur.recipe.patterns import NM, Pattern, Unstructured, parse_pattern
from secateur.recipe.sizes import parse_size
from secateur.recipe.solvers import MRP, Solver
from secateur.recipe.steps import Allocation, BlockRefit, ChannelPermutation, DenseTarget, SwapRefinement
from secateur.storage.paths import user_path

VERSION = 1
MAX_SEED = 2**63 - 1  # torch's
MOST_OWN_TOKENS = 1 << 15  # that a model writes on top of a text, where their number is chosen for it
OWN_BATCHES = "batches"  # the calibration source of a run on the caller's own tensors

PatternField = Annotated[
    Pattern,
    PlainValidator(parse_pattern),
    PlainSerializer(str),
    WithJsonSchema({"type": ["string", "number"], "examples": ["50%", 0.5, "2:4"]}),
]


def _several(value: Any) -> Any:
    """A tuple of globs from one glob or a list."""
    return (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else value


Globs = Annotated[
    tuple[Annotated[str, Field(min_length=1)], ...],
    BeforeValidator(_several, json_schema_input_type=str | list[str]),
    PlainSerializer(lambda globs: globs[0] if len(globs) == 1 else list(globs)),
]


def _checked_size(size: Any) -> str | int:
    """A size as it is written, once it is known to be one."""
    parse_size(size)
    return size


Size = Annotated[
    str | int,
    PlainValidator(_checked_size),
    WithJsonSchema({"type": ["string", "integer"]}),
]


@options
class Rule:
    """What holds for the matrices that `match` names. The last rule that matches a matrix decides."""

    match: Globs = Field(min_length=1, description="Globs on matrix names, such as `*.mlp.*`.")
    pattern: PatternField | None = Field(default=None, description="Pattern of these matrices; empty = the recipe's.")
    solver: Solver | None = Field(default=None, description="Solver of these matrices; empty = the recipe's.")
    dense: Switch | Literal["auto"] | None = Field(
        default=None,
        description="true leaves them dense; false prunes all, also those that are dense by default, such as routers; "
        "auto prunes all but those.",
    )

    def __post_init__(self) -> None:
        if self.pattern is None and self.solver is None and self.dense is None:
            raise RecipeError("a rule needs a pattern, a solver or dense")
        if self.dense is True and (self.pattern is not None or self.solver is not None):
            raise RecipeError("a rule with dense: true can't have a pattern or a solver", ("dense",))


@options
class CalibrationText:
    """The text that a run looks at."""

    source: str | None = Field(
        default=None,
        description="Text, JSON, JSONL, CSV or Parquet file, folder, data set, or self (the model writes the text); "
        "empty = the shipped text. Data sets: c4, wikitext2, ptb, or any on the hub. self:PROMPTS = the model answers "
        "the chats of a file, or goes on from its text.",
    )
    own_words: Annotated[Whole, Ge(0)] | Literal["auto"] | None = Field(
        default=None,
        description="Sequences that the model writes on top of `samples`, going on from the text; empty = none. auto = "
        f"as many, or twice as many at n:m and from 60% on, at most {MOST_OWN_TOKENS:,} tokens, where the model writes "
        "text and takes at most half of memory.",
    )
    text_field: str | None = Field(
        default=None, description="Field or column that holds the text; empty = found by the form of the records."
    )
    samples: Whole = Field(default=128, ge=1, description="Calibration sequences.")
    seq_len: Whole | None = Field(
        default=None,
        ge=2,
        description="Tokens per sequence; empty = 2048, or fewer where the model has fewer positions.",
    )


@options
class Recipe:
    """A whole recipe. Sections that are empty (None) are off.

    Raises, when it is made:
        RecipeError: an unknown option, a wrong type, a value out of range, or options that do not go together.
    """

    version: Literal[1] = Field(default=VERSION, description="Version of the recipe format.")
    pattern: PatternField = Field(
        default=Unstructured(0.5),
        description="Zeros, or n:m (n of m stay). Groups of m weights run along the input.",
    )
    solver: Solver = Field(default=MRP(), description="mrp, admm, sparsegpt, wanda, magnitude. Or a plug-in's.")
    damping: Number = Field(default=0.01, gt=0, description="Damping of Hessians, relative to their mean diagonal.")
    shrinkage: Annotated[Number, Ge(0), Lt(1)] | Literal["auto"] = Field(
        default=0.0,
        description="Share that entries of Hessians off the diagonal lose, below 1. auto = C / (C + T / 2) for C "
        "inputs and T tokens: correlations between many inputs are mostly chance when tokens are few.",
    )
    target: DenseTarget | None = Field(default=None, description="Fit to the dense model's outputs; empty = off.")
    refine: SwapRefinement | None = Field(default=None, description="Exchanges to a 1-swap optimum after the solver.")
    refit: BlockRefit | None = Field(default=None, description="Refit of each block's kept weights.")
    allocation: Allocation | None = Field(default=None, description="Spread of zeros over matrices; empty = even.")
    permutation: ChannelPermutation | None = Field(
        default=None, description="Another order of channels before an n:m pattern; empty = as they are."
    )
    true_sequential: Switch = Field(default=False, description="Observe a block again after each group of matrices.")
    rules: Annotated[
        tuple[Rule, ...], BeforeValidator(lambda found: tuple(found) if isinstance(found, list) else found)
    ] = Field(
        default=(),
        description="Exceptions for matrices by name, as {match: '*.mlp.*', pattern: '2:4'}; the last match wins.",
    )
    calibration: CalibrationText = Field(default=CalibrationText(), description="The text that the run looks at.")
    seed: Whole = Field(default=0, ge=0, le=MAX_SEED, description="Seed of sampling and refit.")
    format: Literal["dense", "packed"] = Field(
        default="dense",
        description="Weight files: dense, which everything loads. packed = smaller, and faster with secateur.",
    )
    values: Literal["same", "int8"] = Field(
        default="same",
        description="Kept weights: same = in the model's dtype; int8 = rounded to 8 bits, where errors of some weights "
        "make up for those of others. `pack --values int8` then rounds no matrix of the run again.",
    )
    max_memory: Size | None = Field(
        default=None,
        description="Limit without weights and refit: 8GB. For Hessians, hidden states and temporaries; a "
        "solver's own matrices come on top.",
    )

    def __post_init__(self) -> None:
        _check_together(self.pattern, self.solver, ("solver", "mask"))
        if isinstance(self.pattern, NM) and self.allocation is not None and self.allocation.rule == "owl":
            raise RecipeError(
                f"allocation owl has no form for {self.pattern}: use curve, which mixes patterns of one m",
                ("allocation", "rule"),
            )
        if self.permutation is not None and not isinstance(self.pattern, NM):
            raise RecipeError(
                f"a permutation of channels is for n:m patterns, and gains nothing for the unstructured {self.pattern}",
                ("permutation",),
            )
        for number, rule in enumerate(self.rules):
            if rule.dense is not True:
                _check_together(rule.pattern or self.pattern, rule.solver or self.solver, ("rules", number))

    def to_dict(self) -> dict[str, Any]:
        """The whole recipe as plain data, as its file holds it."""
        return plain(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Recipe:
        """A recipe from plain data.

        Raises:
            RecipeError: as `Recipe` says, or data of a newer version.
        """
        version = data.get("version", VERSION)
        if isinstance(version, int) and not isinstance(version, bool) and version > VERSION:
            raise RecipeError(
                f"version is {version}: this secateur reads recipes up to version {VERSION}; upgrade it", ("version",)
            )
        return validated(cls, data)

    @classmethod
    def preset(cls, name: str, pattern: str | float | Pattern = "50%") -> Recipe:
        """`fast`, `balanced` or `best`, at a pattern."""
        from secateur.recipe.presets import preset

        return preset(name, pattern)

    @classmethod
    def load(cls, path: str | Path) -> Recipe:
        """A recipe from a YAML or JSON file, or from a `secateur.json`.

        Raises:
            RecipeError: a file that is not a recipe; the message names file, line and option.
        """
        from secateur.recipe.files import read_recipe

        return read_recipe(user_path(path)).recipe()

    def save(self, path: str | Path) -> None:
        """Write the whole recipe as YAML, with the help text of each option."""
        from secateur.recipe.files import to_yaml

        user_path(path).write_text(to_yaml(self), encoding="utf-8")

    def changed(self, settings: Mapping[str, Any]) -> Recipe:
        """The recipe with some options changed, by dotted name: `{"refit.rate": 0.01}`.

        An option of a section that is off turns the section on.

        Raises:
            RecipeError: an unknown name, a wrong value, or another kind of pattern with the allocation or refit kept.
        """
        from secateur.recipe.settings import apply_settings, check_kind_of_pattern

        found = Recipe.from_dict(apply_settings(self.to_dict(), settings))
        check_kind_of_pattern(self.pattern, found, {name.partition(".")[0] for name in settings})
        return found

    def without_calibration(self) -> Recipe:
        """The recipe with the default text: what is said of the weights apart from the text."""
        return replace(self, calibration=CalibrationText())

    def summary(self) -> str:
        """Solver and steps in a line: `admm, curve allocation, block refit of 4 epochs`."""
        parts = [self.solver.name]
        if self.target is not None:
            parts.append(f"{self.target.kind} target of strength {self.target.strength:g}")
        if self.permutation is not None:
            parts.append("channels reordered")
        if self.allocation is not None:
            parts.append(f"{self.allocation.rule} allocation")
        if self.refine is not None:
            parts.append("refined by swaps")
        if self.refit is not None:
            parts.append(f"block refit of {self.refit.epochs} epoch{'s' * (self.refit.epochs != 1)}")
        if self.values != "same":
            parts.append(f"{self.values} values")
        if self.rules:
            parts.append(f"{len(self.rules)} rule{'s' * (len(self.rules) != 1)}")
        return ", ".join(parts)


def _check_together(pattern: Pattern, solver: Any, location: tuple[str | int, ...]) -> None:
    if isinstance(solver, MRP) and solver.mask == "M" and not isinstance(pattern, NM):
        raise RecipeError(
            f"mask M enumerates the patterns of n:m groups and has no form for the unstructured {pattern}: use mask S, "
            f"or a pattern such as 2:4",
            location,
        )


def recipe_schema() -> dict[str, Any]:
    """JSON schema of a recipe file."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema"} | TypeAdapter(Recipe).json_schema()
