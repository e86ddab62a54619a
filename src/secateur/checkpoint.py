"""From what a user calls a model (folder, GGUF file, hub name, `smollm2`) to a checked checkpoint and a loaded model.

Weights come from safetensors only, and remote code is not run, unless asked for. Every file is checked before use.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from secateur.assets import convert_gguf, demo_model
from secateur.converted import is_converted, load_mapped

INDEX = "model.safetensors.index.json"
WORDS = (
    "tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model",
    "tiktoken.model",
)  # fmt: skip
# What transformers raises for files that don't fit together: RuntimeError for tensors of other sizes than the config's,
# the others for values in the config that make no sense.
BROKEN = (ValueError, OSError, KeyError, RuntimeError, TypeError, AttributeError, ArithmeticError)
OTHERWISE = "its own class, and pass it to secateur.prune(model, calibration=batches) with batches of its inputs"
QUANTISED = ("I8", "U8", "I16", "I32", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F4")
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(eq=False)
class Checkpoint:
    """A model, its tokenizer, and the folder it came from.

    The model lies in memory, ready to run, or is mapped from its files (`residence.Mapped`). `storage` is the dtype of
    each of its parameters in the checkpoint, by parameter name; the model itself may compute in another. `stored` is
    the file of each tensor that the checkpoint has as it is, and its name there. `notices` tell what of the checkpoint
    the model leaves out.
    """

    model: Any
    tokenizer: Any
    folder: Path
    name: str
    storage: dict[str, torch.dtype]
    stored: dict[str, tuple[Path, str]]
    main_dtype: torch.dtype
    device: str
    notices: list[str] = field(default_factory=list)

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype of forward passes."""
        return compute_dtype(self.main_dtype, self.device)

    @property
    def matrix_storage(self) -> dict[str, torch.dtype]:
        """`storage` under the names of matrices (without `.weight`)."""
        return {name.removesuffix(".weight"): dtype for name, dtype in self.storage.items()}


def resolve(name: str, trust_remote_code: bool = False, allow_pickle: bool = False) -> Path:
    """The local folder of a model, fetched or converted into the user's cache where need be."""
    path = Path(name).expanduser()
    if name == "smollm2" and not path.exists():
        return demo_model()
    if path.is_file() and path.suffix == ".gguf":
        return convert_gguf(path)
    if path.is_dir():
        return path
    if path.exists():
        raise ValueError(f"{name} is a file that is no .gguf: give a model folder, a GGUF file or a hub name")
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1 or path.suffix == ".gguf":
        raise ValueError(f"no model at {name}: there is no such folder or file")
    return _from_hub(name, trust_remote_code, allow_pickle)


def load(
    name: str,
    device: str = "cpu",
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    converted: Path | None = None,
) -> Checkpoint:
    """Load a causal language model with its tokenizer, ready for forward passes.

    Args:
        device: where the model runs.
        trust_remote_code: let the checkpoint's own Python code run.
        allow_pickle: also take PyTorch .bin files, which can run code when they are loaded.
        converted: a folder for weights that transformers makes of the checkpoint's (experts that it fuses). With it no
            weights are read: they are mapped from files, in the files' dtype, and are brought in part by part.

    Raises:
        ValueError: missing, incomplete or damaged files, or a model that is not a causal language model.
    """
    from transformers import AutoModelForCausalLM

    check_device(device)
    folder = resolve(name, trust_remote_code, allow_pickle)
    dtypes, shards = check_folder(folder, allow_pickle)
    config, tokenizer = load_words(folder, trust_remote_code)
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
    try:
        if converted is not None:
            skeleton = _skeleton(config, computes_in, trust_remote_code)
        if converted is not None and shards and is_converted(skeleton, shards):
            model, info, names = load_mapped(from_pretrained, converted)
        else:
            model, info = from_pretrained()
    except SafetensorError as error:  # the checkpoint's own files were checked
        raise ValueError(f"{converted} can't be written ({_first_line(error)})") from error
    except BROKEN as error:
        raise ValueError(_why_not_loaded(folder, error, trust_remote_code)) from error
    if missing := sorted(info["missing_keys"]):
        raise ValueError(_why_missing(folder, config, type(model).__name__, missing))
    notices = _differences(folder, config, model, info["unexpected_keys"], shards)
    stored = {name: (path, name) for name, path in shards.items()}
    stored |= {ours: stored[theirs] for ours, theirs in names.items()}
    floating = [key for key, tensor in model.state_dict().items() if tensor.is_floating_point()]
    storage = {key: dtypes.get(stored[key][1], main) if key in stored else main for key in floating}
    if skeleton is not None and computes_in != main:
        _take_buffers(model, skeleton)
        _map_wider_tensors(model, storage, stored)
    model = model.to(device).eval() if converted is None else model.eval()
    return Checkpoint(model, tokenizer, folder, name, storage, stored, main, device, notices)


def _map_wider_tensors(model: Any, storage: dict[str, torch.dtype], stored: dict[str, tuple[Path, str]]) -> None:
    """Give the model what its files hold in a wider dtype than most, which loading in that dtype has rounded."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if name in stored and name in storage and torch.finfo(storage[name]).bits > torch.finfo(tensor.dtype).bits:
            path, there = stored[name]
            with safe_open(path, framework="pt") as shard:
                tensor.data = shard.get_tensor(there)


def _skeleton(config: Any, dtype: torch.dtype, trust_remote_code: bool) -> Any:
    """The model without its weights, but with its buffers."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    with init_empty_weights(include_buffers=False):
        return AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)


def _take_buffers(model: Any, skeleton: Any) -> None:
    """Give the model the buffers that its skeleton computed in another dtype (Gemma's scale of embeddings is one)."""
    stored = model.state_dict().keys()
    ours = dict(model.named_buffers())
    for name, buffer in skeleton.named_buffers():
        if name not in stored and ours[name].dtype != buffer.dtype:
            ours[name].data = buffer


def load_words(folder: Path, trust_remote_code: bool = False) -> tuple[Any, Any]:
    """A model's configuration and tokenizer, which is all that texts need.

    Raises:
        ValueError: missing or damaged files.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig, AutoTokenizer

    options: dict[str, Any] = {"trust_remote_code": trust_remote_code, "local_files_only": True}
    try:
        config = AutoConfig.from_pretrained(folder, **options)
    except (*BROKEN, StrictDataclassError) as error:
        raise ValueError(_why_not_loaded(folder, error, trust_remote_code)) from error
    try:
        return config, AutoTokenizer.from_pretrained(folder, **options)
    except BROKEN as error:
        if "trust_remote_code" in str(error) and not trust_remote_code:
            raise ValueError(_why_not_loaded(folder, error, trust_remote_code)) from error
        if not any((folder / name).exists() for name in WORDS):
            raise ValueError(f"{folder} has no tokenizer (none of {', '.join(WORDS)} is there)") from error
        raise ValueError(f"{folder}'s tokenizer can't be loaded: {_first_line(error)}") from error


def _why_not_loaded(folder: Path, error: Exception, trust_remote_code: bool) -> str:
    """What to say of a checkpoint that transformers can't load."""
    own_code = read_json(folder / "config.json", "").get("auto_map")
    if isinstance(own_code, dict) and not trust_remote_code and "trust_remote_code" in str(error):
        files = ", ".join(sorted({f"{str(name).partition('.')[0]}.py" for name in own_code.values()}))
        return f"{folder} brings Python code of its own ({files}): read it, and let it run with --trust-remote-code"
    advice = f": load it with {OTHERWISE}" if "Unrecognized configuration class" in str(error) else ""
    return f"{folder} can't be loaded as a causal language model: {' '.join(str(error).split())[:300]}{advice}"


def _differences(folder: Path, config: Any, model: Any, unexpected: set[str], shards: dict[str, Path]) -> list[str]:
    """What of a checkpoint a loaded model leaves out: all but its text model, and tensors that its class doesn't take.

    Raises:
        ValueError: it is another class of transformers' than the checkpoint names, such as the decoder alone of an
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
            raise ValueError(
                f"{folder} holds a {made_as}, and would be loaded as a {loaded.__name__}, which is another model: load "
                f"it with {OTHERWISE}"
            )
        notices.append(f"of the {made_as} this is the text model alone, a {loaded.__name__}")
    matrices = []
    for name in sorted(set(unexpected) & set(shards)):
        with safe_open(shards[name], framework="pt") as shard:
            if len(shard.get_slice(name).get_shape()) > 1:  # not a buffer that older versions saved
                matrices.append(name)
    if matrices:
        some = f"{', '.join(matrices[:3])}{' ...' * (len(matrices) > 3)}"
        notices.append(f"{len(matrices)} tensors of the checkpoint are not in {loaded.__name__}: {some}")
    return notices


def _why_missing(folder: Path, config: Any, loaded_as: str, missing: list[str]) -> str:
    """What to say of tensors that a causal language model needs and a checkpoint lacks."""
    some = ", ".join(missing[:3])
    made_as = ", ".join(getattr(config, "architectures", None) or ())
    if made_as and loaded_as not in made_as:
        return (
            f"{folder} holds a {made_as}, which is no causal language model ({loaded_as} would need {some}): load it "
            f"with {OTHERWISE}"
        )
    return f"{folder} lacks {len(missing)} tensors ({some} ...): the download is incomplete"


def default_device() -> str:
    """The GPU where there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def check_device(device: str) -> None:
    """Raise ValueError for a device that this machine or this build of torch doesn't have."""
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:  # torch's two ways to say so
        raise ValueError(f"device {device!r} can't be used: {_first_line(error)}") from error


def check_folder(folder: Path, allow_pickle: bool = False) -> tuple[dict[str, torch.dtype], dict[str, Path]]:
    """Check a checkpoint's files without reading weights; returns the dtype and the file of each floating tensor."""
    config = read_json(folder / "config.json", "a model folder needs its config.json")
    if quantised := config.get("quantization_config"):
        method = quantised.get("quant_method", "unknown") if isinstance(quantised, dict) else quantised
        raise ValueError(f"{folder} is quantised ({method}): give the original floating-point checkpoint")
    shard_paths = _shard_paths(folder)
    if not shard_paths:
        if allow_pickle and any(folder.glob("*.bin")):
            return {}, {}
        hint = " (it has .bin files: --allow-pickle reads them, at the risk of code in them)" * any(
            folder.glob("*.bin")
        )
        raise ValueError(f"{folder} holds no model.safetensors{hint}")
    dtypes: dict[str, torch.dtype] = {}
    shards: dict[str, Path] = {}
    for path in shard_paths:
        try:
            with safe_open(path, framework="pt") as shard:
                for key in shard.keys():  # noqa: SIM118 - safe_open is no mapping
                    dtype = shard.get_slice(key).get_dtype()
                    shards[key] = path
                    if dtype in FLOATS:
                        dtypes[key] = FLOATS[dtype]
                    elif dtype in QUANTISED and key.endswith("weight"):
                        raise ValueError(
                            f"{path} is quantised ({key} is {dtype}): give the original floating-point checkpoint"
                        )
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} is damaged or incomplete ({_first_line(error)}): download it again") from error
    return dtypes, shards


def read_json(path: Path, why: str) -> dict[str, Any]:
    """Parse a JSON object from a file that may be missing or damaged."""
    if not path.is_file():
        raise ValueError(f"{path} is missing: {why}")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds no JSON object")
    return value


def main_dtype(dtypes: dict[str, torch.dtype], config: Any) -> torch.dtype:
    """The dtype most tensors of the checkpoint have."""
    if dtypes:
        return Counter(dtypes.values()).most_common(1)[0][0]
    return getattr(config, "dtype", None) or torch.float32


def compute_dtype(storage: torch.dtype, device: str) -> torch.dtype:
    """The dtype of forward passes: the checkpoint's own where the device is fast in it, else fp32, which holds it.

    A CPU is fast in bf16 with AMX tiles, or where AVX-512's bf16 instructions run at their full rate: on AMD (2.2 times
    the rate of fp32 on a Zen 4), while a Xeon without AMX gave half the rate of fp32.
    """
    if not device.startswith("cpu") or storage in (torch.float32, torch.float64):
        return storage
    return storage if storage == torch.bfloat16 and _is_fast_in_bf16() else torch.float32


@cache
def _is_fast_in_bf16() -> bool:
    if torch.cpu._is_amx_tile_supported():
        return True
    processor = Path("/proc/cpuinfo")
    amd = processor.is_file() and "AuthenticAMD" in processor.read_text(encoding="utf-8")
    return amd and torch.cpu._is_avx512_bf16_supported()


def _shard_paths(folder: Path) -> list[Path]:
    single = folder / "model.safetensors"
    if single.is_file():  # transformers takes it even where there is an index too
        return [single]
    if not (folder / INDEX).exists():
        return []
    weight_map = read_json(folder / INDEX, "").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{folder / INDEX} has no weight_map")
    for name in weight_map.values():
        if not isinstance(name, str) or Path(name).name != name:
            raise ValueError(f"{folder / INDEX} names the shard {name!r}, which is not a plain file name")
    names = sorted(set(weight_map.values()))
    for name in names:
        if not (folder / name).is_file():
            raise ValueError(f"{folder / name} is missing though the index names it: the download is incomplete")
    return [folder / name for name in names]


def _from_hub(name: str, trust_remote_code: bool, allow_pickle: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    wanted = [
        "*.safetensors",
        "*.json",
        "*.jinja",
        "*.model",
        "*.txt",
        "*.tiktoken",
        "LICENSE*",
        "NOTICE*",
        "README.md",
    ]
    wanted += ["*.py"] * trust_remote_code + ["*.bin"] * allow_pickle
    try:
        return Path(snapshot_download(name, allow_patterns=wanted))
    except (HFValidationError, OSError) as error:  # network, permission and not-found errors all derive from OSError
        raise ValueError(
            f"no folder {name} here, and no model of that name could be had from the hub ({_first_line(error)})"
        ) from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
