"""A model as the engine sees it: blocks, the prunable matrices in each, and how each block is called.

Families are found by introspection. Exceptions are rows of a table, never a class or a branch per family.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from secateur.observe import Matrix

# What stays dense inside a block, and why: patterns on the matrix's path. The field's habit, not a law: --include wins.
DENSE_RULES: tuple[tuple[str, str], ...] = (
    (r"(^|\.)(\w*router|gate|shared_expert_gate)(\.(weight|wg|proj|classifier|linear|layer))*$", "router"),
    (r"(^|\.)(\w*_?norm|ln_\w+|layernorm\w*)(\.|$)", "norm"),
    (r"(^|\.)attention_input\.query(\[|$)", "learned queries"),
)
WEIGHTS_AT_ONCE = 1 << 24  # that are checked for NaN at a time


class UnsupportedModelError(ValueError):
    """The model can't be pruned as it is; the message says what was found and what to do."""


@dataclass(eq=False)
class Block:
    """One block: its path, module, prunable matrices, and the matrices left dense with the reason.

    `input_name` is the keyword of its hidden states, where they come by keyword.
    """

    name: str
    module: nn.Module
    matrices: list[Matrix] = field(default_factory=list)
    dense: dict[str, str] = field(default_factory=dict)
    input_name: str = "hidden_states"


@dataclass(frozen=True, eq=False)
class Call:
    """How a block was called on one batch, but for its hidden states, which each replay supplies."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    hidden_name: str | None

    @classmethod
    def split(cls, block: Block, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Call]:
        """Separate the hidden states (first positional, or by name) from the rest of a call."""
        if args and isinstance(args[0], Tensor):
            return args[0], cls(args[1:], dict(kwargs), None)
        name = block.input_name
        if not isinstance(kwargs.get(name), Tensor):
            raise UnsupportedModelError(f"{block.name} is not called with a tensor of hidden states")
        return kwargs[name], cls(args, {key: value for key, value in kwargs.items() if key != name}, name)

    def replay(self, block: Block, hidden: Tensor) -> Tensor:
        """Run the block; returns its new hidden states, whether it gives a tensor or a tuple."""
        args, kwargs = self.with_hidden(hidden)
        return hidden_of(block.module(*args, **kwargs), block)

    def with_hidden(self, hidden: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of a call with these hidden states."""
        if self.hidden_name is None:
            return (hidden, *self.args), self.kwargs
        return self.args, self.kwargs | {self.hidden_name: hidden}


def hidden_of(output: Any, block: Block) -> Tensor:
    """The hidden states in a block's output. A tensor is taken whole: indexing it would take batch item 0."""
    first = output if isinstance(output, Tensor) else output[0]
    if not isinstance(first, Tensor):
        raise UnsupportedModelError(f"block {block.name} returns {type(first).__name__}, not a tensor of hidden states")
    return first


def run_without_cache(model: Any, part: nn.Module, **inputs: Any) -> Any:
    """Call the model or a part of it, and keep no cache of keys, values or states, which would outlive the call.

    Some take `use_cache` as an argument that defaults to True, others read it from a configuration.
    """
    extra = {"use_cache": False} if "use_cache" in signature(part.forward).parameters else {}
    with without_cache(model):
        return part(**inputs, **extra)


@contextmanager
def without_cache(model: Any) -> Iterator[None]:
    """Meanwhile no configuration of the model or its parts asks for a cache."""
    configs = {id(module.config): module.config for module in model.modules() if hasattr(module, "config")}
    caching = [config for config in configs.values() if getattr(config, "use_cache", False)]
    for config in caching:
        config.use_cache = False
    try:
        yield
    finally:
        for config in caching:
            config.use_cache = True


def body_of(model: Any) -> nn.Module:
    """The model without its head, where transformers keeps that apart."""
    return getattr(model, "base_model", model)


def parameters_of(model: nn.Module) -> int:
    """Number of weights, tied ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


@dataclass(eq=False)
class Choice:
    """Which matrices of a block are pruned: those that no rule leaves dense, by globs on their paths.

    Args:
        include: where given, only these are pruned, rules for dense ones or not.
        exclude: left dense.
    """

    include: Sequence[str] = ()
    exclude: Sequence[str] = ()
    seen: list[str] = field(default_factory=list)

    def fill(self, block: Block, matrices: Iterable[Matrix]) -> Block:
        """Sort matrices into those of the block that are pruned and those that stay dense."""
        for matrix in matrices:
            self.seen.append(matrix.name)
            if reason := self._why_dense(matrix.name):
                block.dense[matrix.name] = reason
            else:
                block.matrices.append(matrix)
        return block

    def check_all_matched(self) -> None:
        """Raise ValueError for a glob that no matrix matched."""
        globs = {*self.include, *self.exclude}
        unmatched = {glob for glob in globs if not any(_matches(path, glob) for path in self.seen)}
        if unmatched:
            raise ValueError(
                f"no matrix matches {', '.join(sorted(map(repr, unmatched)))}: patterns are globs on paths such as "
                f"{', '.join(self.seen[:8])}"
            )

    def _why_dense(self, path: str) -> str | None:
        if any(_matches(path, glob) for glob in self.exclude):
            return "excluded"
        if self.include:
            return None if any(_matches(path, glob) for glob in self.include) else "not included"
        inside = re.split(r"\.\d+\.", path, maxsplit=1)[-1]  # rules are about the path inside a layer
        return next((reason for rule, reason in DENSE_RULES if re.search(rule, inside)), None)


def check_runnable(model: nn.Module) -> None:
    """Raise UnsupportedModelError for models whose forward can't be watched, naming the remedy."""
    if torch.is_inference_mode_enabled():
        raise UnsupportedModelError("weights can't be changed inside torch.inference_mode(): call secateur outside it")
    for name, module in model.named_modules():
        if hasattr(module, "_hf_hook"):
            raise UnsupportedModelError(
                f"{name or 'the model'} carries an accelerate offload hook, which moves weights while they are "
                f"watched: load the model without device_map, or call "
                f"accelerate.hooks.remove_hook_from_module(model, recurse=True)"
            )
        if hasattr(module, "_orig_mod") or _is_compiled(module):
            raise UnsupportedModelError(
                f"{name or 'the model'} is compiled, which hides the use of its weights: pass the model as it was "
                f"before torch.compile"
            )
    if any(parameter.is_inference() for parameter in model.parameters()):
        raise UnsupportedModelError(
            "the model was made inside torch.inference_mode(), so that nothing can be fitted to it: load it outside"
        )
    if getattr(model, "peft_config", None):
        raise UnsupportedModelError(
            "the model carries adapters, and their sum with the pruned weights would be dense again: merge them first "
            "(model.merge_and_unload() of peft)"
        )
    if getattr(getattr(model, "config", None), "_attn_implementation", None) == "flex_attention":
        raise UnsupportedModelError(
            "the model's flex_attention is compiled, which hides the use of its weights: load it with "
            "attn_implementation='sdpa'"
        )
    quantised = getattr(getattr(model, "config", None), "quantization_config", None)
    # 8-bit floating point too: such weights mean nothing without their scales.
    narrow = [name for name, each in model.named_parameters() if each.ndim > 1 and not _is_weight_dtype(each.dtype)]
    if quantised is not None or narrow:
        found = f" ({narrow[0]} is {model.get_parameter(narrow[0]).dtype})" if narrow else ""
        raise UnsupportedModelError(
            f"the model is quantised{found}: load it dequantised (secateur prunes floating-point weights)"
        )


def _is_compiled(module: nn.Module) -> bool:
    """Whether its call, or its own `forward`, is what torch.compile made."""
    own_forward = vars(module).get("forward")
    return module._compiled_call_impl is not None or hasattr(own_forward, "_torchdynamo_orig_callable")


def _made_weight(module: nn.Module) -> str | None:
    """The name of a matrix that the module computes from parameters of its own (pruned by torch, normalised)."""
    if is_parametrized(module):
        return next(iter(module.parametrizations))  # pyright: ignore[reportArgumentType, reportCallIssue]
    own = module._parameters
    made = (name.rpartition("_")[0] for name in own if name.endswith(("_orig", "_g")))
    return next((name for name in made if name and name not in own and hasattr(module, name)), None)


def config_of(model: Any) -> Any:
    """The model's configuration.

    Raises:
        UnsupportedModelError: it has none.
    """
    if not hasattr(getattr(model, "config", None), "get_text_config"):
        raise UnsupportedModelError(
            f"{type(model).__name__} has no `config` of transformers, as its models have: pass the model itself, "
            f"without what wraps it (`model.module` of a DataParallel)"
        )
    return model.config


def _is_weight_dtype(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point and dtype.itemsize > 1


def check_finite_weights(model: nn.Module) -> None:
    """Raise ValueError naming the first parameter with a NaN or an infinity. Cost: one read of the model."""
    for name, parameter in model.named_parameters():
        if parameter.device.type == "meta" or not parameter.numel():
            continue
        # In parts: the mask of a whole embedding would be larger than any block.
        rows = max(1, WEIGHTS_AT_ONCE // (parameter[0].numel() if parameter.ndim else 1))
        parts = parameter.data.split(rows) if parameter.ndim else [parameter.data]
        if bad := sum(int((~torch.isfinite(part)).sum()) for part in parts):
            raise ValueError(f"{name} has {bad} weights that are NaN or infinite: the checkpoint is damaged")


def device_of(model: nn.Module) -> torch.device:
    """Where the model's inputs go: to the accelerator, where any part of it is on one while others wait in files."""
    devices = (parameter.device for parameter in model.parameters())
    return next((device for device in devices if device.type not in ("cpu", "meta")), torch.device("cpu"))


@contextmanager
def observable(model: nn.Module) -> Iterator[None]:
    """The model as it can be watched: without dropout, its experts in plain products, by deterministic kernels.

    Random numbers that it draws all the same (hashes of an attention) are the run's own: the caller's are as before.
    """
    gpus = range(torch.cuda.device_count()) if torch.cuda.is_available() else []
    with ExitStack() as stack:
        stack.enter_context(evaluation_mode(model))
        stack.enter_context(_eager_experts(model))
        stack.enter_context(deterministic_algorithms())
        stack.enter_context(full_precision())
        stack.enter_context(torch.random.fork_rng(gpus))
        yield


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode (no dropout), restored module by module."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def _eager_experts(model: Any) -> Iterator[None]:
    """Experts as plain products, one at a time: fused kernels hide the use of each expert's weights."""
    before = getattr(getattr(model, "config", None), "_experts_implementation", None)
    if before in (None, "eager") or not hasattr(model, "set_experts_implementation"):
        yield
        return
    model.set_experts_implementation("eager")
    try:
        yield
    finally:
        model.set_experts_implementation(before)


@contextmanager
def full_precision() -> Iterator[None]:
    """fp32 products in fp32, for Gram matrices and solves: not in TF32's ten bits, nor in what autocast says."""
    backends: Any = torch.backends  # its settings are no declared attributes
    settings = (backends.cuda.matmul, backends.mkldnn.matmul)
    before = [setting.fp32_precision for setting in settings]
    cast = [kind for kind in ("cpu", "cuda", "mps") if torch.is_autocast_enabled(kind)]
    try:
        for setting in settings:
            setting.fp32_precision = "ieee"
        with ExitStack() as stack:
            for kind in cast:
                stack.enter_context(torch.autocast(kind, enabled=False))
            yield
    finally:
        for setting, precision in zip(settings, before, strict=True):
            setting.fp32_precision = precision


@contextmanager
def deterministic_algorithms() -> Iterator[None]:
    """Only deterministic kernels, so that the same seed on the same machine gives the same bits."""
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fills: Any = torch.utils.deterministic  # its setting is no declared attribute
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS is refused as not deterministic
    fill = fills.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    fills.fill_uninitialized_memory = False  # a debugging aid that costs a write of each new tensor
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
        fills.fill_uninitialized_memory = fill


def matrices_of(path: str, module: nn.Module) -> list[Matrix]:
    """Every floating-point matrix of a module: 2-D parameters, and the slices of 3-D ones; no convolutions.

    A matrix that the module holds in several places comes once, by its first path.

    Raises:
        UnsupportedModelError: one that is computed before each call.
    """
    matrices = []
    convolutions = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d)
    for module_name, part in module.named_modules():
        if isinstance(part, (nn.Embedding, *convolutions)):
            continue
        if made := _made_weight(part):
            raise UnsupportedModelError(
                f"{'.'.join(filter(None, (path, module_name)))}.{made} is computed from other parameters before each "
                f"call, so that to prune those would do nothing: make it plain by torch.nn.utils.prune.remove, "
                f"remove_weight_norm or parametrize.remove_parametrizations"
            )
        for parameter_name, parameter in part.named_parameters(recurse=False):
            if not parameter.is_floating_point() or parameter.ndim not in (2, 3) or min(parameter.shape) < 2:
                continue
            own = "" if parameter_name == "weight" else parameter_name
            name = ".".join(filter(None, (path, module_name, own)))
            if parameter.ndim == 2:
                matrices.append(Matrix(name, parameter))
            else:
                matrices += [Matrix(f"{name}[{index}]", parameter, index) for index in range(len(parameter))]
    return matrices


def _matches(path: str, glob: str) -> bool:
    """Whether a glob means a path, or spells it out: an expert's ends in brackets, which a glob reads as a set."""
    return path == glob or fnmatchcase(path, glob)
