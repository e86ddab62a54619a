"""What transformers calls when it loads a packed folder: registered under the quantisation method `secateur`.

transformers reads the weights through the file that `config.transformers_weights` names, which only this sets: without
secateur there is no file that it looks for, so loading fails. Layers that a kernel serves keep their encoded weight
until all are read; then each becomes a `PackedLinear`. Everything else is decoded to dense while it is read, and so is
all where a device map names anything but the CPU.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import ConversionOps, WeightConverter, rename_source_key
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from secateur.errors import SecateurError, errors_within
from secateur.packed import kernels
from secateur.packed.encoding import Header, decode, is_encoded
from secateur.packed.files import FORMAT_VERSION, METHOD, dense, read_headers
from secateur.packed.layout import is_mapped
from secateur.packed.linear import PackedLinear
from secateur.packed.mapped import drop_pages
from secateur.packed.saving import save_packed
from secateur.runtime.messages import say
from secateur.storage.checkpoint_files import PACKED_INDEX, PACKED_WEIGHTS


@register_quantization_config(METHOD)
class PackedConfig(QuantizationConfigMixin):
    """The `quantization_config` of a packed folder: method, version, whether its weights are in several files.

    `secateur.load(folder, dense=True)` sets `dequantize`, and gives the ordinary dense model.
    """

    def __init__(
        self,
        version: int = FORMAT_VERSION,
        sharded: bool = False,
        dequantize: bool = False,
        quant_method: str = METHOD,
        **unknown: Any,
    ) -> None:
        """Check the fields of a config.json.

        Raises:
            SecateurError: another version, or fields that this version does not have.
        """
        if version != FORMAT_VERSION:
            raise SecateurError(
                f"the model is packed in version {version} of the format; this secateur reads version "
                f"{FORMAT_VERSION}: upgrade it"
            )
        if unknown or quant_method != METHOD or not isinstance(sharded, bool):
            raise SecateurError(f"quantization_config of config.json is damaged: {sorted(unknown) or quant_method}")
        self.quant_method: Any = METHOD
        self.version, self.sharded = version, sharded
        self.dequantize = dequantize

    def to_dict(self) -> dict[str, Any]:
        """What config.json holds."""
        return {"quant_method": METHOD, "version": self.version, "sharded": self.sharded}


@register_quantizer(METHOD)
class PackedQuantizer(HfQuantizer):
    """Loads a packed folder."""

    requires_calibration = True  # a model is packed by `secateur pack`, not while it is loaded
    quantization_config: Any  # a PackedConfig

    def update_attn_implementation(self, config: Any) -> Any:
        """Name the weights, in the only step before the files are looked for that sees the config."""
        config.transformers_weights = PACKED_INDEX if self.quantization_config.sharded else PACKED_WEIGHTS
        return config

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Remember the model's dtype, which decides whether a kernel serves it."""
        self._dtype = dtype
        return dtype

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, device_map: Any = None, **_: Any
    ) -> Any:
        """Give each layer that a kernel will serve a weight of encoded bytes.

        Raises:
            SecateurError: a matrix of another shape than the model's, a device map with a disk, or files of another
                folder.
        """
        self._layers: dict[str, nn.Module] = {}
        _check_no_disk(device_map)
        _check_one_folder(model, checkpoint_files or [])
        headers = {name: found for path in checkpoint_files or [] for name, found in read_headers(path).items()}
        by_target = _by_target(model, headers)
        why_dense = _why_dense(self._dtype, device_map)
        if self.quantization_config.dequantize or why_dense:
            if not self.quantization_config.dequantize:
                say(f"secateur: the packed model is unpacked to a dense one: {why_dense}")
            return model
        modules, tied = dict(model.named_modules()), model.all_tied_weights_keys
        shared = {*tied, *tied.values()}  # one parameter of several layers
        for target, (header, size) in by_target.items():
            name = target.removesuffix(".weight")
            module = modules.get(name)
            kind = Conv1D if header.transposed else nn.Linear
            if _is_served(header) and name != target and type(module) is kind and target not in shared:
                _check_shape(target, header, module.weight)
                self._layers[name] = module
                empty = torch.empty(size, dtype=torch.uint8, device="meta")
                module.register_parameter("weight", nn.Parameter(empty, requires_grad=False))
        _mark_as_initialised(model, self._layers.values())
        if unserved := len(headers) - len(self._layers):
            say(f"secateur: {unserved} of {len(headers)} packed matrices are unpacked: no kernel serves them")
        return model

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any) -> list[Any]:  # noqa: ARG002
        """Decode what no kernel serves: first in every converter of the model, and in one for all other tensors."""
        self._others = WeightConverter(r"^(.+)$", r"\1", [_DecodeOne()])
        changed = [
            each.copy(
                each._original_source_patterns, each._original_target_patterns, operations=[_Decode(), *each.operations]
            )
            if isinstance(each, WeightConverter)
            else each
            for each in weight_conversions
        ]
        return [*changed, self._others]

    def get_new_dtype(self, converter: Any, param: Any, dtype: Any) -> Any:
        """Encoded tensors keep their bytes; the others get the model's dtype."""
        name = param.get_dtype() if hasattr(param, "get_dtype") else str(param.dtype)
        return None if name in ("U8", "torch.uint8") else super().get_new_dtype(converter, param, dtype)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:  # noqa: ARG002
        """Make a packed layer of each that was read.

        Raises:
            SecateurError: damaged bytes, or a device map that came to name a disk.
        """
        _check_no_disk(getattr(model, "hf_device_map", None))
        while self._layers:
            name, module = self._layers.popitem()
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, _packed_layer(name, module))
        if not self.quantization_config.dequantize:
            model._weight_conversions = [each for each in model._weight_conversions if each is not self._others]
            model.save_pretrained = partial(save_packed, model)
        return model

    def _dequantize(self, model: Any, dtype: Any = None) -> Any:
        for module in model.modules():
            if isinstance(module, PackedLinear) and module.is_packed:
                module.become_dense()
        del model.save_pretrained
        return model if dtype is None else model.to(dtype)

    def is_serializable(self) -> Any:
        """`save_pretrained` packs again."""
        return True

    @property
    def is_trainable(self) -> Any:
        """Packed weights are for inference."""
        return False

    @property
    def is_compileable(self) -> bool:
        """`torch.compile` keeps the product as one operator."""
        return True


class _Decode(ConversionOps):
    """Encoded tensors as dense ones; others as they are."""

    def convert(self, input_dict: dict[str, Any], *_: Any, full_layer_name: str, **__: Any) -> Any:
        """Decode every tensor of `input_dict` (pattern -> tensors)."""
        return {pattern: [_dense(each, full_layer_name) for each in tensors] for pattern, tensors in input_dict.items()}

    @property
    def reverse_op(self) -> ConversionOps:
        """Nothing to do: what is saved is packed while it is written."""
        return _AsItIs()


class _AsItIs(ConversionOps):
    """No change."""

    def convert(self, input_dict: dict[str, Any], *_: Any, **__: Any) -> Any:
        """The same tensors."""
        return input_dict


class _DecodeOne(ConversionOps):
    """One tensor that no converter of the model takes: decoded, unless its layer holds encoded bytes."""

    def convert(self, input_dict: dict[str, Any], *_: Any, full_layer_name: str, model: Any, **__: Any) -> Any:
        """Decode the tensor of `input_dict` (pattern -> tensors)."""
        ((found, *_rest),) = input_dict.values()
        target = model.get_parameter_or_buffer(full_layer_name)
        if target.dtype != torch.uint8:
            found = _dense(found, full_layer_name)
            found = found.to(target.dtype) if found.is_floating_point() else found
        return {full_layer_name: found}


def _by_target(model: Any, headers: dict[str, tuple[Header, int]]) -> dict[str, tuple[Header, int]]:
    """Headers by the name of the parameter that they become, of those that no converter takes apart or joins."""
    conversions = get_model_conversion_mapping(model)
    converters = [each for each in conversions if isinstance(each, WeightConverter)]
    renamings: list[Any] = [each for each in conversions if not isinstance(each, WeightConverter)]
    own, prefix = model.state_dict(), model.base_model_prefix
    targets = {key: rename_source_key(key, renamings, converters, prefix, own) for key in headers}
    return {target: headers[key] for key, (target, pattern) in targets.items() if pattern is None}


def _mark_as_initialised(model: Any, layers: Iterable[nn.Module]) -> None:
    """Keep transformers from initialising layers of encoded bytes, and modules that hold nothing else.

    It overwrites no weight that was read, but RWKV and BLT look at the shapes of all of them while it does so.
    """
    marked = {layer for layer in layers if layer.bias is None}
    for module in model.modules():
        children = [each for each in module.children() if any(True for _ in each.parameters())]
        own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        if module in marked or (children and not own and marked.issuperset(children)):
            module._is_hf_initialized = True


def _check_one_folder(model: Any, files: Sequence[str]) -> None:
    """Check that all files of weights are in the model's folder.

    Raises:
        SecateurError: an index names files elsewhere.
    """
    paths, place = [Path(path) for path in files], Path(model.config.name_or_path)
    # Names alone are compared: the files of a hub's cache are links that leave it.
    inside = all(path.is_relative_to(place) and ".." not in path.relative_to(place).parts for path in paths)
    if len({path.parent for path in paths}) > 1 or (place.is_dir() and not inside):
        raise SecateurError(f"the index of the packed weights names files of another folder: {list(files)}")


def _check_no_disk(device_map: Any) -> None:
    if isinstance(device_map, dict) and "disk" in map(str, device_map.values()):
        raise SecateurError("layers of a packed model can't stay on a disk: unpack it first, by `secateur unpack`")


def _check_shape(name: str, header: Header, weight: Tensor) -> None:
    """Check the shape that a file gives a matrix: a kernel would read beyond the layer's bias, or its input."""
    if header.shape != tuple(weight.shape):
        raise SecateurError(
            f"{name} has the shape {header.shape} in the packed file, and {tuple(weight.shape)} by config.json: the "
            f"folder is damaged"
        )


def _is_served(header: Header) -> bool:
    return header.dtype == torch.bfloat16 and len(header.shape) == 2


def _packed_layer(name: str, module: nn.Module) -> PackedLinear:
    weight: Tensor = module.weight.data  # pyright: ignore[reportAssignmentType]
    bias: Any = module.bias
    with errors_within(f"{name}.weight"):
        packed = decode(weight)
    if not is_mapped(weight, packed):
        drop_pages(weight)
    return PackedLinear(packed, None if bias is None else bias.data)


def _dense(tensor: Tensor, name: str) -> Tensor:
    """A tensor of the file, where it is; unpacked on the CPU if it is packed."""
    if tensor.dtype != torch.uint8:
        return tensor
    here = tensor.cpu()
    found = dense(here, name).to(tensor.device)
    if is_encoded(here):
        drop_pages(here)
    return found


def _why_dense(dtype: Any, device_map: Any) -> str:
    """Why no layer stays packed; "" where they do."""
    if dtype != torch.bfloat16:
        return f"kernels serve torch.bfloat16, and {dtype} was asked for"
    if not _is_on_cpu(device_map):
        return f"kernels serve the CPU, and the device map is {device_map}"
    if kernels.level() == "none":
        return "the kernels were not built, or this CPU has neither AVX2 nor AVX-512 (see `secateur env`)"
    return ""


def _is_on_cpu(device_map: Any) -> bool:
    """Whether all layers of a device map are on the CPU and stay there."""
    if isinstance(device_map, dict):
        return all(str(place) == "cpu" for place in device_map.values())
    if device_map in ("auto", "balanced", "balanced_low_0", "sequential"):
        return not torch.accelerator.is_available()
    return device_map is None or str(device_map) == "cpu"
