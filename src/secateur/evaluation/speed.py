"""Size, memory and speed of models, each measured in a fresh process: what `secateur bench` prints."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from secateur.errors import SecateurError
from secateur.packed.files import bytes_of
from secateur.reporting.figures import Speed
from secateur.runtime.memory import resident_bytes
from secateur.runtime.messages import one_line

# In the order that they are looked for.
WEIGHT_FORMATS = ("model*.safetensors", "packed*.safetensors", "pytorch_model*.bin", "*.gguf")
REPEATS = 3
# Set by the command line for pruning; decoding is to be measured as a user's own process would do it.
NOT_INHERITED = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
POSITIONS_HINT = ". Does it have {} positions? If not, lower ‹prompt_tokens› or ‹new_tokens›"


def measure_models(
    folders: Sequence[Path],
    prompt_tokens: int,
    new_tokens: int,
    threads: int | None,
    trust_remote_code: bool,
    allow_pickle: bool,
    progress: Callable[..., None],
) -> list[Speed]:
    """Measure models one after the other, each in a process that does nothing else.

    Args:
        folders: of checkpoints that transformers loads, packed ones included.
        prompt_tokens: length of the prompt, of random tokens.
        new_tokens: number of tokens that are decoded.
        threads: of torch; None = its default.
        trust_remote_code: let the checkpoints' Python code run.
        allow_pickle: also load .bin files, which can run code.
        progress: called with the stage `bench`.

    Raises:
        SecateurError: a model that can't be loaded or run.
    """
    if not allow_pickle:
        for folder in folders:
            _check_no_pickle(folder)
    found = []
    for number, folder in enumerate(folders):
        numbers = (prompt_tokens, new_tokens, threads or 0, int(trust_remote_code), int(allow_pickle))
        found.append(_measured(folder, numbers))
        progress("bench", number + 1, len(folders))
    return found


def _measured(folder: Path, numbers: tuple[int, ...]) -> Speed:
    """What a fresh process measures, which gets the numbers of `measure_here`."""
    # -P: else Python files in the current folder would be imported instead of libraries.
    command = [sys.executable, "-P", "-m", __name__, str(folder), *map(str, numbers)]
    own = {name: value for name, value in os.environ.items() if name not in NOT_INHERITED}
    done = subprocess.run(command, env=own, capture_output=True, text=True, check=False)
    if done.returncode:
        why = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        hint = POSITIONS_HINT.format(numbers[0] + numbers[1]) if why.startswith("IndexError") else ""
        raise SecateurError(f"{folder} could not be measured: {one_line(why)}{hint}")
    return Speed(**json.loads(done.stdout.splitlines()[-1]))


def measure_here(
    folder: Path, prompt_tokens: int, new_tokens: int, threads: int, trust_remote_code: int = 0, allow_pickle: int = 0
) -> Speed:
    """Measure one model in this process, which should be a fresh one.

    Raises:
        SecateurError: too few new tokens to tell from the prompt.
        Exception: what transformers raises of a model that it can't load or run.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    if threads:
        torch.set_num_threads(threads)
    torch.manual_seed(0)
    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": bool(trust_remote_code)}
    config = AutoConfig.from_pretrained(folder, **options)
    if type(config) in AutoModelForCausalLM._model_mapping:  # remote code is not
        AutoModelForCausalLM._model_mapping[type(config)]  # imports the model's code
    _generate_seconds(_tiny_model(), prompt_tokens, 4)  # what libraries take is not the model's
    before, started = resident_bytes(), time.perf_counter()
    options["use_safetensors"] = None if allow_pickle else True
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", **options).eval()
    loaded = time.perf_counter() - started
    _generate_seconds(model, prompt_tokens, 2)  # warm-up
    prefill = min(_generate_seconds(model, prompt_tokens, 1) for _ in range(REPEATS))
    decoded = min(_generate_seconds(model, prompt_tokens, 1 + new_tokens) for _ in range(REPEATS)) - prefill
    if decoded <= 0:
        raise SecateurError(f"{new_tokens} new tokens are too few to measure next to the prompt: raise ‹new_tokens›")
    return Speed(
        model=str(folder),
        file_bytes=bytes_of(weight_files(folder)),
        memory_bytes=resident_bytes() - before,
        load_seconds=loaded,
        prefill_tokens_per_second=prompt_tokens / prefill,
        decode_tokens_per_second=new_tokens / decoded,
        threads=torch.get_num_threads(),
    )


def weight_files(folder: Path) -> list[Path]:
    """The weight files that transformers loads: those of the first format that is there."""
    return next(filter(None, (list(folder.glob(pattern)) for pattern in WEIGHT_FORMATS)), [])


def _check_no_pickle(folder: Path) -> None:
    """Check that a folder's weights are not in .bin files.

    Raises:
        SecateurError: they are.
    """
    if any(path.suffix == ".bin" for path in weight_files(folder)):
        raise SecateurError(
            f"{folder} has its weights in .bin files, which can run code: ‹allow_pickle› loads them; `save_pretrained` "
            f"of a model that you trust writes safetensors"
        )


def _generate_seconds(model: Any, prompt_tokens: int, count: int) -> float:
    """Time of a number of greedy tokens after a random prompt."""
    import torch

    prompt = torch.randint(model.get_input_embeddings().num_embeddings // 2, (1, prompt_tokens))
    options = {"do_sample": False, "min_new_tokens": count, "max_new_tokens": count, "pad_token_id": 0}
    started = time.perf_counter()
    with torch.inference_mode():
        model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
    return time.perf_counter() - started


def _tiny_model() -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes: Any = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    model: Any = LlamaForCausalLM(LlamaConfig(vocab_size=128, **sizes))
    return model.to(torch.bfloat16).eval()


def main() -> None:
    """Measure the model that the arguments name, and print the figures as JSON."""
    import secateur  # noqa: F401 - transformers then loads packed models

    folder, *numbers = sys.argv[1:]
    try:
        speed = measure_here(Path(folder), *map(int, numbers))
    except SecateurError as error:
        sys.exit(error.raw)  # the process that waits makes its own error of it
    print(json.dumps(speed.to_dict()))


if __name__ == "__main__":
    main()
