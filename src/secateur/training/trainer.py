"""Keep the zeros of a pruned model while `transformers.Trainer` trains it."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from secateur.errors import SecateurError
from secateur.training.keep_zeros import keep_zeros


class KeepZerosCallback(TrainerCallback):
    """Keeps the zeros that a model has when training begins: `Trainer(..., callbacks=[KeepZerosCallback()])`.

    Raises, when training begins:
        SecateurError: the model has no sparse matrix, or is a peft model, whose zeros change when it is merged.
    """

    def __init__(self) -> None:
        """Wait for a model."""
        self._held: keep_zeros | None = None

    def on_train_begin(self, *_: Any, model: Any = None, **__: Any) -> None:
        """Hold the zeros."""
        if getattr(model, "peft_config", None):
            raise SecateurError(
                "training an adapter changes no zeros, merging it does: train without KeepZerosCallback, and merge it "
                "inside `with keep_zeros(base_model)`"
            )
        if self._held is not None:  # of training that was interrupted
            self._held.release()
        self._held = keep_zeros(model)
        self._held.__enter__()

    def on_train_end(self, *_: Any, **__: Any) -> None:
        """Restore the zeros a last time, and let go of them."""
        held, self._held = self._held, None
        if held is not None:
            held.__exit__(None, None, None)
