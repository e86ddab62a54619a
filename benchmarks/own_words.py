"""Divergence from the dense model on chats, after calibration on text and on what the model writes.

    python benchmarks/own_words.py --text TEXT --out benchmarks/results/own_words.json

Equal tokens, one recipe. The chats to evaluate on are the dense model's answers to prompts of other topics than those
that it answers for the calibration. `--texts FILE ...` are evaluated on as well.
"""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from common import arguments_of, write_result

import secateur
from secateur.calibration.documents import read_documents
from secateur.calibration.own_words import Prompts, write_windows
from secateur.checkpoints.load import Checkpoint, load
from secateur.models.placement import InMemory
from secateur.runtime.progress import no_progress

TASKS = (
    "Explain {} to a ten-year-old.",
    "Write a short story about {}.",
    "Give me five tips about {}.",
    "What should I know about {} before I begin?",
    "Write a polite email about {}.",
    "Summarise the history of {} in a few sentences.",
)
TOPICS = {
    "calibration": ("bees", "the stock market", "sourdough bread", "volcanoes", "job interviews", "bicycles",
                    "the Roman army", "sorting algorithms"),
    "evaluation": ("tides", "home insurance", "learning the violin", "glaciers", "remote work", "steam engines",
                   "vaccines", "unit tests"),
}  # fmt: skip
SPOKEN_TOKENS = 12288


def main() -> None:
    """Prune by each text, and compare on chats and on texts."""
    args = arguments_of(
        __doc__, "text", model="smollm2", recipe="balanced", pattern="50%", samples=32, seq_len=512, seed=0, texts=[]
    )
    rows = []
    with TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for part, topics in TOPICS.items():
            write_prompts(folder / f"{part}.jsonl", topics)
        spoken = speak(args.model, folder / "evaluation.jsonl")
        sources = {
            "text": str(args.text),
            "self": "self",
            "self:PROMPTS": f"self:{folder / 'calibration.jsonl'}",
        }
        for name, source in sources.items():
            checkpoint, dense = load(args.model), load(args.model)
            report = secateur.prune(
                checkpoint,
                recipe=args.recipe,
                pattern=args.pattern,
                calibration=source,
                samples=args.samples,
                seq_len=args.seq_len,
                seed=args.seed,
            )
            row = {"calibration": name, "seconds": report.seconds, "chats": divergence(checkpoint, dense, spoken)}
            for text in args.texts:
                found = secateur.evaluate(
                    checkpoint.model, text, against=dense.model, tokenizer=checkpoint.tokenizer, max_tokens=16384
                )
                against = found["against"]
                row[Path(text).stem] = {name: against[name] for name in ("kl", "top1_agreement")}
                row[Path(text).stem]["perplexity"] = found["perplexity"]
            rows.append(row)
            print(json.dumps(row), flush=True)
    settings = {name: getattr(args, name) for name in ("model", "recipe", "pattern", "samples", "seq_len", "seed")}
    base = rows[0]["chats"]["kl"]
    gains = {row["calibration"]: 1 - row["chats"]["kl"] / base for row in rows}
    write_result(args.out, {"settings": settings, "text": args.text.name, "rows": rows, "lower_divergence": gains})


def write_prompts(path: Path, topics: tuple[str, ...]) -> None:
    """Chats with one question each."""
    questions = [task.format(topic) for task, topic in product(TASKS, topics)]
    chats = [{"messages": [{"role": "user", "content": question}]} for question in questions]
    path.write_text("".join(json.dumps(chat) + "\n" for chat in chats))


def speak(model: str, prompts: Path) -> torch.Tensor:
    """Windows of the dense model's answers."""
    checkpoint = load(model)
    asked = Prompts.of(read_documents(prompts), checkpoint.tokenizer, 512, prompts.name)
    return write_windows(
        checkpoint.model, checkpoint.tokenizer, asked, SPOKEN_TOKENS // 512, 1000, InMemory(), no_progress
    )


@torch.no_grad()
def divergence(checkpoint: Checkpoint, dense: Checkpoint, windows: torch.Tensor) -> dict[str, float]:
    """Mean KL of the dense model's predictions to the pruned one's, and how often they agree on the likeliest token."""
    total, agreeing, positions = 0.0, 0, 0
    for window in windows.split(1):
        log_p, log_q = (each.model(window).logits[0].float().log_softmax(-1) for each in (dense, checkpoint))
        total += float((log_p.exp() * (log_p - log_q)).sum())
        agreeing += int((log_p.argmax(-1) == log_q.argmax(-1)).sum())
        positions += len(log_p)
    return {"kl": total / positions, "top1_agreement": agreeing / positions}


if __name__ == "__main__":
    main()
