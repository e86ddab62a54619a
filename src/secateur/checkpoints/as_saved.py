"""Load a checkpoint of any class of transformers, by the class that its config names, without a tokenizer."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from secateur.checkpoints.converted_weights import load_mapped
from secateur.checkpoints.load import BROKEN, check_sizes, skeleton_of
from secateur.errors import SecateurError
from secateur.sources.resolve import resolve_dense
from secateur.sources.validate import check_folder, main_dtype
from secateur.storage.json_files import read_json


def load_as_saved(folder: Path, scratch: Path) -> Any:
    """The model of a checkpoint, with all weights mapped.

    Args:
        folder: of the checkpoint; a packed one is unpacked in the user's cache.
        scratch: a folder for weights that transformers makes of the checkpoint's, where it renames or fuses them.

    Raises:
        SecateurError: the config names no class of transformers, or the files don't fit it.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    folder = resolve_dense(str(folder))
    dtypes, shards = check_folder(folder)
    kind = _class_of(folder)
    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    try:
        config = AutoConfig.from_pretrained(folder, **options)
        check_sizes(folder, skeleton_of(kind, config), shards)
        options |= {"config": config, "dtype": main_dtype(dtypes, config), "use_safetensors": True}
        model, info, _ = load_mapped(
            partial(kind.from_pretrained, folder, output_loading_info=True, **options), scratch
        )
    except SecateurError:
        raise
    except (*BROKEN, StrictDataclassError) as error:
        raise SecateurError(
            f"{folder} can't be loaded as a {kind.__name__}: {' '.join(str(error).split())[:300]}"
        ) from error
    if missing := sorted(info["missing_keys"]):
        raise SecateurError(f"{folder} lacks {len(missing)} tensors ({missing[0]} ...): it is damaged")
    return model


def _class_of(folder: Path) -> Any:
    """The class of transformers that a checkpoint's config names.

    Raises:
        SecateurError: it names none.
    """
    import transformers

    named = read_json(folder / "config.json").get("architectures") or []
    for name in named:
        found = getattr(transformers, name, None)
        if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
            return found
    raise SecateurError(
        f"{folder / 'config.json'} names no model class of transformers (architectures: {named!r}): the files have "
        f"other names than the pruned matrices, and only such a class knows which is which"
    )
