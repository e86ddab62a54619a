"""Checks of a model before anything is changed."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from secateur.errors import SecateurError, UnsupportedModelError
from secateur.models.blocks import device_of, run_without_cache

WEIGHTS_AT_ONCE = 1 << 24  # that are checked for NaN at a time
PROBE_TOKENS, SAME = 8, 1e-3  # tells whether predictions depend on later tokens


def check_runnable(model: nn.Module) -> None:
    """Check that the model's forward pass can be watched and its weights changed.

    Raises:
        UnsupportedModelError: they can't; the message names the remedy.
    """
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
            "the model was made inside torch.inference_mode(), so its weights can't be changed: load it outside"
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


def generates(model: Any) -> bool:
    """Whether a model goes on with a text: transformers lets it generate, and it has no encoder."""
    can = getattr(model, "can_generate", None)
    return can is not None and bool(can()) and not getattr(model.config, "is_encoder_decoder", False)


@torch.no_grad()
def looks_ahead(model: Any) -> bool:
    """Whether predictions depend on later tokens, as BERT's do, which predict no next token.

    Raises:
        ForwardError: the model does not run on tokens alone.

    Cost: a forward pass over a few tokens.
    """
    ids = torch.arange(1, 2 * PROBE_TOKENS + 1, device=device_of(model)).view(2, -1)
    ids %= len(model.get_input_embeddings().weight)
    ids[1, :-1] = ids[0, :-1]  # two texts that differ in the last token alone
    one, other = run_without_cache(model, model, input_ids=ids).logits[:, :-1].float()
    return bool((one - other).abs().max() > SAME * one.abs().max())


def _is_compiled(module: nn.Module) -> bool:
    """Whether torch.compile made its call or its `forward`."""
    own_forward = vars(module).get("forward")
    return module._compiled_call_impl is not None or hasattr(own_forward, "_torchdynamo_orig_callable")


def _is_weight_dtype(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point and dtype.itemsize > 1


def check_finite_weights(model: nn.Module) -> None:
    """Check that no parameter has a NaN or an infinity. Cost: one read of the model.

    Raises:
        SecateurError: one has; the message names the first.
    """
    for name, parameter in model.named_parameters():
        if parameter.device.type == "meta" or not parameter.numel():
            continue
        # In parts: the mask of a whole embedding would be larger than any block.
        rows = max(1, WEIGHTS_AT_ONCE // (parameter[0].numel() if parameter.ndim else 1))
        parts = parameter.data.split(rows) if parameter.ndim else [parameter.data]
        if bad := sum(int((~torch.isfinite(part)).sum()) for part in parts):
            raise SecateurError(f"{name} has {bad} weights that are NaN or infinite: the checkpoint is damaged")
