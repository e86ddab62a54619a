"""Commands for what comes after pruning: report, pack, unpack, measure, and say what this machine has."""

from __future__ import annotations

from pathlib import Path
from shlex import quote
from typing import Annotated, Any

import typer

from secateur.cli import flags
from secateur.cli.console import print_json, print_pairs, print_speeds, show
from secateur.cli.progress import progress_shown


def report(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A pruned model.")],
    other: Annotated[Path | None, typer.Argument(metavar="[OTHER]", help="A second one, to compare.")] = None,
    out: Annotated[
        Path | None, flags.flag("The page (DIR/report.html; comparison.html).", flags.OUTPUT, "FILE")
    ] = None,
) -> None:
    """Write the page of a run again, or of two runs side by side: which layers suffered, and why."""
    import secateur as api

    show(f"open it in a browser: {api.write_report(folder, other, out=out)}")


def push(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A pruned model, packed or not.")],
    repo: Annotated[str, typer.Argument(metavar="REPO", help="owner/name, or a name in your account.")],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
) -> None:
    """Publish DIR on the Hugging Face hub, with its card, recipe and report. Needs `hf auth login` or HF_TOKEN."""
    import secateur as api

    show(f"published: {api.push(folder, repo, private=private)}")


def pack(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A pruned checkpoint folder.")],
    out: flags.NewFolder,
    values: Annotated[
        str, flags.flag("same: as before, bit for bit; int8: rounded, with one scale per row.", flags.OUTPUT, "NAME")
    ] = "same",
    compression: Annotated[
        str, flags.flag("zstd, or none: larger, and mapped from the file as it is.", flags.OUTPUT, "NAME")
    ] = "zstd",
    as_json: flags.Json = False,
) -> None:
    """Write DIR in the packed format: smaller on disk and in memory, and faster to decode on a CPU."""
    import secateur as api

    with progress_shown() as progress:
        asked: Any = {"values": values, "compression": compression}
        found = api.pack(folder, out, progress=progress, **asked)
    if as_json:
        print_json(found)
        return
    show(
        f"packed {found['matrices']} matrices: {found['dense_bytes'] / 1e6:.1f} MB of weights became "
        f"{found['packed_bytes'] / 1e6:.1f} MB ({found['packed_bytes'] / found['dense_bytes']:.2f} of them), in {out}"
    )
    show(f"compare size, memory and speed: secateur bench {quote(str(folder))} {quote(str(out))}")


def unpack(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A packed checkpoint folder.")],
    out: flags.NewFolder,
    as_json: flags.Json = False,
) -> None:
    """Write the packed checkpoint DIR as an ordinary one, bit for bit."""
    import secateur as api

    with progress_shown() as progress:
        found = api.unpack(folder, out, progress=progress)
    print_json(found) if as_json else show(f"{found['dense_bytes'] / 1e6:.1f} MB of dense weights are in {out}")


def bench(
    models: Annotated[list[str], typer.Argument(metavar="MODEL...", help="Folders or names; packed ones too.")],
    prompt_tokens: Annotated[int, flags.flag("Tokens of the prompt.", flags.EVALUATION, "N")] = 128,
    new_tokens: Annotated[int, flags.flag("Tokens to decode.", flags.EVALUATION, "N")] = 64,
    record: flags.Record = False,
    as_json: flags.Json = False,
    threads: flags.Threads = None,
    trust_remote_code: flags.RemoteCode = False,
    allow_pickle: flags.Pickle = False,
) -> None:
    """Size, memory, load time and speed of models, each in a fresh process on the CPU.

    Any folder that transformers loads can be in the list, such as your own int8 model.
    """
    import secateur as api

    with progress_shown() as progress:
        found = api.bench(
            models,
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            threads=threads,
            record=record,
            trust_remote_code=trust_remote_code,
            allow_pickle=allow_pickle,
            progress=progress,
        )
    print_json({"models": [each.to_dict() for each in found]}) if as_json else print_speeds(found)


def env(as_json: flags.Json = False) -> None:
    """Versions, CPU features, kernels, devices and the cache folder: what a bug report needs."""
    import secateur as api

    found = api.env()
    print_json(found) if as_json else print_pairs("environment", found)
