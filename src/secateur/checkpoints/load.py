"""Load a checked checkpoint: its model, in memory or mapped from its files, and its tokenizer.

Weights come from safetensors only, and remote code is not run, unless asked for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from secateur.calibration.texts import encode_text
from secateur.checkpoints.converted_weights import is_converted, load_mapped
from secateur.errors import SecateurError
from secateur.packed.files import read_headers
from secateur.runtime.environment import check_device
from secateur.runtime.messages import first_line
from secateur.sources.resolve import resolve_dense
from secateur.sources.validate import check_folder, compute_dtype, holds_all, main_dtype
from secateur.storage.checkpoint_files import TOKENIZER_FILES
from secateur.storage.json_files import read_json

# What transformers raises for files that do not fit together: RuntimeError for tensors of other sizes than the
# config's, ImportError for packages that a checkpoint's code needs, the others for values in the config that make no
# sense.
BROKEN = (
    ValueError, OSError, LookupError, RuntimeError, TypeError, AttributeError, ArithmeticError, ImportError,
    AssertionError, UnpicklingError,
)  # fmt: skip
# A model may have that many more than its files before it is refused unseen: missing tensors have an error with names.
SPARE_WEIGHTS = 100_000_000
HINT_OTHER_CLASS = "its own class, and pass it to secateur.prune(model, calibration=batches) with batches of its inputs"


@dataclass(eq=False)
class Checkpoint:
    """A model, its tokenizer, and the folder it came from.

    Args:
        model: in memory, ready to run, or mapped from its files (`models.placement.OffloadedWeights`).
        tokenizer: of the model.
        folder: where it came from.
        name: what the user called it.
        file_dtypes: dtype of each parameter in the checkpoint, by name; the model may compute in another.
        file_of: file of each tensor that the checkpoint has as the model has it, and its name there.
        main_dtype: dtype of most tensors.
        device: where it runs.
        notices: what of the checkpoint the model leaves out.
    """

    model: Any
    tokenizer: Any
    folder: Path
    name: str
    file_dtypes: dict[str, torch.dtype]
    file_of: dict[str, tuple[Path, str]]
    main_dtype: torch.dtype
    device: str
    notices: list[str] = field(default_factory=list)

    @property
    def compute_dtype(self) -> torch.dtype:
        """Dtype of forward passes."""
        return compute_dtype(self.main_dtype, self.device)

    @property
    def matrix_dtypes(self) -> dict[str, torch.dtype]:
        """`file_dtypes` under the names of matrices (without `.weight`)."""
        return {name.removesuffix(".weight"): dtype for name, dtype in self.file_dtypes.items()}


def load(
    name: str,
    device: str = "cpu",
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    converted: Path | None = None,
) -> Checkpoint:
    """Load a causal language model with its tokenizer, ready for forward passes.

    Args:
        name: folder, GGUF file, hub name or `smollm2`.
        device: where the model runs.
        trust_remote_code: let the checkpoint's Python code run.
        allow_pickle: also read PyTorch .bin files, which can run code when they are loaded.
        converted: a folder for weights that transformers makes of the checkpoint's (experts that it fuses). With it no
            weights are read: they are mapped from files, in the files' dtype, and onloaded part by part.

    Raises:
        SecateurError: missing, incomplete or damaged files, or a model that is not a causal language model.
    """
    from transformers import AutoModelForCausalLM

    check_device(device)
    folder = resolve_dense(name, trust_remote_code, allow_pickle)
    dtypes, shards = check_folder(folder, allow_pickle)
    config, tokenizer = load_config_and_tokenizer(folder, trust_remote_code)
    main = main_dtype(dtypes, config)
    computes_in, skeleton, names = compute_dtype(main, device), None, {}
    from_pretrained: Any = partial(
        AutoModelForCausalLM.from_pretrained,
        folder,
        config=config,
        dtype=computes_in if converted is None else main,
        use_safetensors=None if allow_pickle else True,
        output_loading_info=True,
        trust_remote_code=trust_remote_code,
        local_files_only=True,
    )
    with _explained(folder, trust_remote_code, converted):
        if converted is not None or (shards and not trust_remote_code):  # code from the checkpoint runs no second time
            make = partial(AutoModelForCausalLM.from_config, dtype=computes_in, trust_remote_code=trust_remote_code)
            skeleton = skeleton_of(make, config)
            check_sizes(folder, skeleton, shards)
        if converted is not None and shards and is_converted(skeleton, shards):
            model, info, names = load_mapped(from_pretrained, converted)
        else:
            model, info = from_pretrained()
    if missing := sorted(info["missing_keys"]):
        raise SecateurError(_why_missing(folder, config, type(model).__name__, missing))
    notices = differences(folder, config, model, info["unexpected_keys"], shards)
    if not dtypes:
        notices.append(f"the weights are saved in {main}, the dtype in config.json: .bin files were not asked")
    stored = {name: (path, name) for name, path in shards.items()}
    stored |= {ours: stored[theirs] for ours, theirs in names.items()}
    storage = _storage_dtypes(model, {ours: dtypes.get(theirs, main) for ours, (_, theirs) in stored.items()}, main)
    if skeleton is not None and converted is not None and computes_in != main:
        _take_buffers(model, skeleton)
        _map_rounded_tensors(model, storage, stored)
    model = model.to(device).eval() if converted is None else model.eval()
    return Checkpoint(model, tokenizer, folder, name, storage, stored, main, device, notices)


@contextmanager
def _explained(folder: Path, trust_remote_code: bool, converted: Path | None) -> Iterator[None]:
    """Within this context, what transformers raises of a checkpoint is told as what is wrong with it."""
    try:
        yield
    except SecateurError:
        raise
    except SafetensorError as error:  # the checkpoint's own files were checked
        raise SecateurError(f"{converted} can't be written ({first_line(error)})") from error
    except BROKEN as error:
        raise SecateurError(why_not_loaded(folder, error, trust_remote_code)) from error


def _storage_dtypes(model: Any, known: dict[str, torch.dtype], main: torch.dtype) -> dict[str, torch.dtype]:
    """The dtype that each floating tensor of a model has in its files; `main` for those that no file holds.

    Of tied tensors, files hold one.
    """
    tensors = {name: tensor for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
    in_files = {name: tensor for name, tensor in tensors.items() if name in known and tensor.numel()}
    of_content = {tensor.data_ptr(): known[name] for name, tensor in in_files.items()}
    return {name: known.get(name) or of_content.get(tensor.data_ptr(), main) for name, tensor in tensors.items()}


def _map_rounded_tensors(model: Any, storage: dict[str, torch.dtype], stored: dict[str, tuple[Path, str]]) -> None:
    """Map the tensors that the files hold in another dtype than most, where loading has rounded them."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if name in stored and name in storage and not holds_all(tensor.dtype, storage[name]):
            path, there = stored[name]
            with safe_open(path, framework="pt") as shard:
                tensor.data = shard.get_tensor(there)


def skeleton_of(make: Callable[[Any], Any], config: Any) -> Any:
    """The model that `make` builds of a config, without weights, with its buffers. The config stays as it is."""
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        return make(deepcopy(config))


def check_sizes(folder: Path, skeleton: Any, shards: dict[str, Path]) -> None:
    """Check that the files' tensors are as large as the config makes them, before memory is taken by the config.

    Their shapes may differ: transformers transposes some.

    Raises:
        SecateurError: they are not, or the config makes a far larger model.
    """
    if not shards:
        return
    wanted, in_files = {name: tensor.shape for name, tensor in skeleton.named_parameters()}, 0
    for path in sorted({*shards.values()}):
        for name, found in _shapes(path).items():
            in_files += math.prod(found)
            if name in wanted and math.prod(found) != wanted[name].numel():
                raise SecateurError(
                    f"{path}: {name} is {found}, but {tuple(wanted[name])} by {folder / 'config.json'}: "
                    f"these files are of different models"
                )
    needed = sum(shape.numel() for name, shape in wanted.items() if name not in skeleton.all_tied_weights_keys)
    if needed > 2 * in_files + SPARE_WEIGHTS:
        raise SecateurError(
            f"{folder} holds {in_files:,} weights, and its config.json makes a model of {needed:,}: the download is "
            f"incomplete, or these files are of different models"
        )


def _shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor in a weight file, by name; of packed tensors, that of the dense one."""
    with safe_open(path, framework="pt") as shard:
        shapes = {name: tuple(shard.get_slice(name).get_shape()) for name in sorted(shard.keys())}
    return shapes | {name: tuple(header.shape) for name, (header, _) in read_headers(path).items()}


def _take_buffers(model: Any, skeleton: Any) -> None:
    """Take the buffers that the skeleton computed in another dtype (such as Gemma's scale of embeddings)."""
    stored = model.state_dict().keys()
    ours = dict(model.named_buffers())
    for name, buffer in skeleton.named_buffers():
        if name not in stored and ours[name].dtype != buffer.dtype:
            ours[name].data = buffer


def load_config_and_tokenizer(folder: Path, trust_remote_code: bool = False) -> tuple[Any, Any]:
    """A model's configuration and tokenizer.

    Raises:
        SecateurError: missing or damaged files.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig, AutoTokenizer

    options: dict[str, Any] = {"trust_remote_code": trust_remote_code, "local_files_only": True}
    try:
        config = AutoConfig.from_pretrained(folder, **options)
    except (*BROKEN, StrictDataclassError) as error:
        raise SecateurError(why_not_loaded(folder, error, trust_remote_code)) from error
    _check_is_causal(folder, config)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, **options)
    except BROKEN as error:
        if "trust_remote_code" in str(error) and not trust_remote_code:
            raise SecateurError(why_not_loaded(folder, error, trust_remote_code)) from error
        if not _has_tokenizer(folder):
            raise SecateurError(_no_tokenizer(folder)) from error
        raise SecateurError(f"{folder}'s tokenizer can't be loaded: {first_line(error)}") from error
    # Of a folder without tokenizer files, transformers may make one that knows no word.
    if not _has_tokenizer(folder) and not encode_text("a", tokenizer):
        raise SecateurError(_no_tokenizer(folder))
    return config, tokenizer


def _check_is_causal(folder: Path, config: Any) -> None:
    """Check that transformers has a causal language model for one of its configurations.

    Raises:
        SecateurError: it has none.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    if type(config).__module__.startswith("transformers.") and type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        made_as = ", ".join(getattr(config, "architectures", None) or ()) or type(config).__name__
        raise SecateurError(
            f"{folder} holds a {made_as}, which is not a causal language model: load it with {HINT_OTHER_CLASS}"
        )


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / name).exists() for name in TOKENIZER_FILES)


def _no_tokenizer(folder: Path) -> str:
    return (
        f"{folder} has no tokenizer (none of {', '.join(TOKENIZER_FILES)} is there): save the model's own there, by "
        f"tokenizer.save_pretrained({str(folder)!r})"
    )


def why_not_loaded(folder: Path, error: Exception, trust_remote_code: bool) -> str:
    """The message for a checkpoint that transformers can't load."""
    own_code = read_json(folder / "config.json", "").get("auto_map")
    if isinstance(own_code, dict) and not trust_remote_code and "trust_remote_code" in str(error):
        files = ", ".join(sorted({f"{str(name).partition('.')[0]}.py" for name in own_code.values()}))
        return f"{folder} brings Python code ({files}): read it, and let it run with ‹trust_remote_code›"
    return f"{folder} can't be loaded as a causal language model: {' '.join(str(error).split())[:300]}"


def differences(folder: Path, config: Any, model: Any, unexpected: set[str], shards: dict[str, Path]) -> list[str]:
    """Notices of what a loaded model leaves out: other parts than its text model, and tensors unknown to its class.

    Raises:
        SecateurError: its class is not the one that the checkpoint names, such as the decoder alone of an
            encoder-decoder, or a masked language model. The same without its head is fine: that is tied.
    """
    import transformers

    loaded, notices = type(model), []
    is_its_text = type(model.config) is type(config.get_text_config()) is not type(config)
    fine = {loaded.__name__, type(getattr(model, "base_model", model)).__name__}
    for made_as in getattr(config, "architectures", None) or ():
        if made_as in fine or not hasattr(transformers, made_as):
            continue
        if not is_its_text:
            raise SecateurError(
                f"{folder} holds a {made_as}, and would be loaded as a {loaded.__name__}, which is another model: load "
                f"it with {HINT_OTHER_CLASS}"
            )
        notices.append(f"of the {made_as} this is the text model alone, a {loaded.__name__}")
    unknown = sorted(set(unexpected) & set(shards))
    shapes = {path: _shapes(path) for path in {shards[name] for name in unknown}}
    # Buffers that older versions saved have one dimension.
    matrices = [name for name in unknown if len(shapes[shards[name]][name]) > 1]
    if matrices:
        some = f"{', '.join(matrices[:3])}{' ...' * (len(matrices) > 3)}"
        notices.append(f"{len(matrices)} tensors of the checkpoint are not in {loaded.__name__}: {some}")
    return notices


def _why_missing(folder: Path, config: Any, loaded_as: str, missing: list[str]) -> str:
    """The message for tensors that a causal language model needs and a checkpoint lacks."""
    some = ", ".join(missing[:3])
    made_as = ", ".join(getattr(config, "architectures", None) or ())
    if made_as and loaded_as not in made_as:
        return (
            f"{folder} holds a {made_as}, which is not a causal language model ({loaded_as} would need {some}): load "
            f"it with {HINT_OTHER_CLASS}"
        )
    return f"{folder} lacks {len(missing)} tensors ({some} ...): the download is incomplete"
