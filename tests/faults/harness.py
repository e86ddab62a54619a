"""Runs the real commands in forked children, with faults injected by `shim.c` at the k-th call that changes a file.

    LD_PRELOAD=shim.so python tests/faults/harness.py CASES.json RESULTS.json

The process imports everything once; each command then runs in its own child, which takes a tenth of the time.
`benchmarks/faults.py` runs all cases, tests/test_faults.py a sample.
"""

from __future__ import annotations

import ctypes
import errno
import json
import mmap
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

from power_cuts import Disk, cut, records  # noqa: E402

MODES = {"kill": 1, "torn": 2, "short": 3, "once": 4, "from": 5}
ERRORS = {"EIO": errno.EIO, "ENOSPC": errno.ENOSPC, "EROFS": errno.EROFS}
# What is injected: mode and error.
FAULTS = {
    "kill": ("kill", ""),
    "torn write": ("torn", ""),
    "short write": ("short", ""),
    "EIO once": ("once", "EIO"),
    "full disk": ("from", "ENOSPC"),
    "read-only from then on": ("from", "EROFS"),
}
TEXT = "the quick brown fox jumps over the lazy dog, and then it does so again.\n" * 60
BLOCKS, SHARD, LIMIT = 3, "20KB", 90.0
PRUNE = ("--pattern", "50%", "--solver", "sparsegpt", "--samples", "4", "--seq-len", "32", "--threads", "1")


@dataclass(frozen=True)
class Case:
    """A fault: what runs, what is injected, and at which call."""

    scenario: str
    fault: str
    at: int


@dataclass
class Ended:
    """How a child ended. `code` is negative for a signal, `kinds` has a letter for each call, W for a write."""

    code: int
    output: str
    pruned: int
    hits: int
    kinds: str


@dataclass
class Result:
    """A case's outcome, whether the fault did happen, and every promise that was broken."""

    case: Case
    code: int
    hit: bool = True
    broken: list[str] = field(default_factory=list)
    output: str = ""


class Shim:
    """The functions of the preloaded library."""

    def __init__(self) -> None:
        self.library = ctypes.CDLL(None)
        self.library.faults_hits.restype = ctypes.c_long
        self.library.faults_kinds.restype = ctypes.c_char_p

    def arm(self, root: Path | str, at: int, fault: str) -> None:
        mode, error = FAULTS.get(fault, ("", ""))
        self.library.faults_arm(os.fsencode(root), ctypes.c_long(at), MODES.get(mode, 0), ERRORS.get(error, 0))

    def hits(self) -> int:
        return self.library.faults_hits()

    def kinds(self) -> bytes:
        return self.library.faults_kinds()

    def log(self, path: Path) -> None:
        self.library.faults_log(os.fsencode(path))


@dataclass(frozen=True)
class Scenario:
    """What lies there before the command, the command, and the command that resumes it.

    Args:
        prepare: fills the folder.
        command: its arguments; `{work}` is the folder.
        resume: the same for the command after the fault.
        exchange: whether the system can exchange two folders.
    """

    prepare: Callable[[Path], None]
    command: tuple[str, ...]
    resume: tuple[str, ...]
    exchange: bool = True


@dataclass(frozen=True)
class Recorded:
    """The calls of a scenario, where they happened, and what lay there before."""

    root: Path
    base: Path
    calls: list[tuple[str, str, str, bytes]]


class Laboratory:
    """The prepared folders, and the runs in them."""

    def __init__(self, folder: Path) -> None:
        from models import save_checkpoint, save_gguf

        self.folder, self.shim = folder, Shim()
        save_checkpoint(folder / "model", num_hidden_layers=BLOCKS)
        (folder / "text.txt").write_text(TEXT)
        save_gguf(folder / "model.gguf")
        prune = ("prune", str(folder / "model"), "{work}/out", "--calibration", str(folder / "text.txt"), *PRUNE)
        sharded = (*prune, "--max-shard-size", SHARD)
        gguf = (
            "eval",
            str(folder / "model.gguf"),
            "--max-tokens",
            "64",
            "--seq-len",
            "32",
            "--text",
            str(folder / "text.txt"),
        )
        nothing, earlier = lambda _: None, self.copied("earlier")
        self.scenarios = {
            "fresh": Scenario(nothing, prune, (*prune, "--resume")),
            "overwrite": Scenario(earlier, (*prune, "--overwrite"), (*prune, "--resume")),
            "overwrite again": Scenario(earlier, (*prune, "--overwrite"), (*prune, "--overwrite", "--resume")),
            "sharded": Scenario(nothing, sharded, (*sharded, "--resume")),
            "resumed": Scenario(self.copied("two blocks"), (*prune, "--resume"), (*prune, "--resume")),
            "publishing": Scenario(self.copied("whole"), (*prune, "--resume"), (*prune, "--resume")),
            "publishing without exchange": Scenario(
                self.copied("whole"), (*prune, "--resume"), (*prune, "--resume"), exchange=False
            ),
            "cache": Scenario(nothing, gguf, gguf),
        }
        self.stages = {
            "two blocks": (*prune, "--resume"),
            "two shards": (*sharded, "--resume"),
            "whole": (*prune, "--resume"),
            "reference": (*prune, "--resume"),
        }
        self.sharded, self.recorded = {"sharded", "two shards"}, {}
        self.prepare(prune, sharded)

    def prepare(self, prune: tuple[str, ...], sharded: tuple[str, ...]) -> None:
        """Make the folders that scenarios begin with, and the models that they end with."""
        for name, command in (
            ("reference", prune),
            ("reference-sharded", sharded),
            ("earlier", (*prune, "--seed", "7")),
        ):
            self.must(self.folder / name, command)
        shutil.copytree(self.folder / "earlier", self.folder / "whole")
        self.run(self.at(self.folder / "two blocks", prune), stop="block")
        self.run(self.at(self.folder / "two shards", sharded), stop="shard")
        self.run(self.at(self.folder / "whole", (*prune, "--overwrite")), stop="place")

    def copied(self, name: str) -> Callable[[Path], None]:
        return lambda work: shutil.copytree(self.folder / name, work, dirs_exist_ok=True, symlinks=True) and None

    @staticmethod
    def at(work: Path, command: Sequence[str]) -> list[str]:
        return [part.replace("{work}", str(work)) for part in command]

    def must(self, work: Path, command: Sequence[str]) -> None:
        work.mkdir()
        ended = self.run(self.at(work, command))
        if ended.code:
            raise RuntimeError(ended.output)

    def calls(self, name: str) -> str:
        """Calls that a scenario makes without a fault, a letter each."""
        with tempfile.TemporaryDirectory(dir=self.folder) as scratch:
            work = Path(scratch) / "work"
            work.mkdir()
            scenario = self.scenarios[name]
            scenario.prepare(work)
            ended = self.run(self.at(work, scenario.command), work, 0, "none", cache=work, exchange=scenario.exchange)
            if ended.code:
                raise RuntimeError(ended.output)
            return ended.kinds

    def run(
        self,
        arguments: list[str],
        root: Path | str = "",
        at: int = 0,
        fault: str = "none",
        cache: Path | None = None,
        exchange: bool = True,
        stop: str = "",
        log: Path | None = None,
    ) -> Ended:
        """Run a command in a child."""
        shared = mmap.mmap(-1, 1 << 16)
        with tempfile.TemporaryFile(dir=self.folder) as output:
            pid = os.fork()
            if pid == 0:
                self._child(arguments, root, at, fault, cache, exchange, stop, log, output.fileno(), shared)
            code = _wait(pid)
            output.seek(0)
            text = output.read().decode(errors="replace")
        pruned, hits, number = struct.unpack("qqq", shared[:24])
        return Ended(code, text, pruned, hits, shared[24 : 24 + number].decode())

    def _child(
        self, arguments: list[str], root: Any, at: int, fault: str, cache: Any, exchange: bool, stop: str, log: Any,
        output: int, shared: mmap.mmap,
    ) -> None:  # fmt: skip
        os.dup2(output, 1)
        os.dup2(output, 2)
        import torch

        code = 99
        try:
            # torch replaces its thread pool at the first call after a fork, and two threads that load a model would
            # both do it: "Invalid thread pool!".
            torch.set_num_threads(1)
            if cache is not None:
                os.environ["SECATEUR_CACHE"] = str(cache)
            pruned = _watch(shared, exchange, stop)
            sys.argv = ["secateur", *arguments]
            if log is not None:
                self.shim.log(log)
            self.shim.arm(root, at, fault)
            code = _command()
            hits, kinds = self.shim.hits(), self.shim.kinds()
            self.shim.arm("", 0, "none")
            shared[: 24 + len(kinds)] = struct.pack("qqq", pruned[0], hits, len(kinds)) + kinds
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def check(self, case: Case) -> Result:
        """Inject a fault, resume, and see which promises hold."""
        scenario = self.scenarios[case.scenario]
        with tempfile.TemporaryDirectory(dir=self.folder) as scratch:
            work = Path(scratch) / "work"
            work.mkdir()
            scenario.prepare(work)
            run = {"cache": work, "exchange": scenario.exchange}
            first = self.run(self.at(work, scenario.command), work, case.at, case.fault, **run)
            result = Result(case, first.code, first.code == -signal.SIGKILL or first.hits > 0)
            self._check_end(result, first, killed=case.fault in ("kill", "torn write"))
            known = () if case.scenario == "cache" else self._check_out(result, work, scenario, case)
            before = 0 if case.scenario == "cache" else _finished_blocks(work)
            begun = (work / ".out.secateur" / "manifest.json").exists()
            second = self.run(self.at(work, scenario.resume), **run)
            if case.scenario == "overwrite" and known == ("earlier",) and not begun and second.code == 2:
                pass  # nothing had begun, so there is nothing to resume
            elif second.code:
                result.broken.append(f"resumed: exit code {second.code}: {second.output[-600:]}")
            elif case.scenario == "cache":
                _check_cache(result, work)
            else:
                self._check_resumed(result, work, case, before, second, known)
            result.output = first.output[-600:] if result.broken else ""
            return result

    def damage(self, stage: str, how: str, number: int) -> Result:
        """Damage a file of a folder, resume, start again where that is refused, and see which promises hold."""
        result = Result(Case(stage, f"damage, {how}", number), 0)
        with tempfile.TemporaryDirectory(dir=self.folder) as scratch:
            work = Path(scratch) / "work"
            shutil.copytree(self.folder / stage, work)
            chance = random.Random(number)
            damaged = damage_file(work, how, chance)
            if damaged is None:
                result.hit = False
                return result
            reference = self.folder / ("reference-sharded" if stage in self.sharded else "reference") / "out"
            before = bytes_of(work / "out") if (work / "out").is_dir() else None
            if stage == "reference" and self.run(["inspect", str(work / "out")]).code not in (1, 2):
                result.broken.append(f"inspect finds nothing wrong with {damaged}")
            ended = self.run(self.at(work, self.stages[stage]))
            result.code = ended.code
            self._check_end(result, ended, killed=False)
            if ended.code == 2 and before != (bytes_of(work / "out") if (work / "out").is_dir() else None):
                result.broken.append("a refused run changed OUT")
            if ended.code == 2:
                again = tuple(part for part in self.stages[stage] if part != "--resume")
                ended = self.run(self.at(work, (*again, "--overwrite")))
                if ended.code == 2 and how in ("a link", "a folder") and f"holds {damaged}" in ended.output:
                    return result
            if ended.code or not same_model(work / "out", reference):
                result.broken.append(f"{damaged}: exit code {ended.code}, other bits: {ended.output[-400:]}")
            if left := sorted({path.name for path in work.iterdir()} - {"out"}):
                result.broken.append(f"leftovers: {left}")
        return result

    def cut_power(self, name: str, number: int, how: str, seed: int) -> Result:
        """Cut the power after a number of calls, resume on what the disk then holds, and see which promises hold."""
        result = Result(Case(name, f"power cut, {how}", number), -signal.SIGKILL)
        with tempfile.TemporaryDirectory(dir=self.folder) as scratch:
            work = Path(scratch) / "work"
            disk = Disk(self.recorded[name].root, self.recorded[name].base)
            for call in self.recorded[name].calls[:number]:
                disk.happen(*call)
            cut(disk, work, how, random.Random(seed))
            scenario, had_model = self.scenarios[name], name.startswith("overwrite")
            out, states = work / "out", ()
            if out.exists() or had_model:
                states = self._check_out(result, work, scenario, result.case)
            ended = self.run(self.at(work, scenario.resume), exchange=scenario.exchange)
            if ended.code:
                result.broken.append(f"resumed: exit code {ended.code}: {ended.output[-600:]}")
            else:
                self._check_resumed(result, work, result.case, 0, ended, states)
        return result

    def record(self, name: str) -> None:
        """Record the calls of a scenario without a fault."""
        folder = self.folder / f"recorded {name}"
        base, work = folder / "base", folder / "work"
        for place in (base, work):
            place.mkdir(parents=True)
            self.scenarios[name].prepare(place)
        ended = self.run(self.at(work, self.scenarios[name].command), work, log=folder / "calls")
        if ended.code:
            raise RuntimeError(ended.output)
        self.recorded[name] = Recorded(work, base, list(records(folder / "calls")))

    def _check_end(self, result: Result, ended: Ended, killed: bool) -> None:
        allowed = (0, 2, -signal.SIGKILL) if killed else (0, 2)
        if ended.code not in allowed:
            result.broken.append(f"exit code {ended.code}")
        if "Traceback" in ended.output or "bug in secateur" in ended.output:
            result.broken.append("a traceback")
        if ended.code == 2 and "error: " not in ended.output:
            result.broken.append("no message")

    def _check_out(self, result: Result, work: Path, scenario: Scenario, case: Case) -> tuple[str, ...]:
        """OUT is what it was, the finished model, or away where nothing was there."""
        out, states = work / "out", []
        reference = self.folder / ("reference-sharded" if case.scenario in self.sharded else "reference") / "out"
        had_model = case.scenario not in ("fresh", "sharded", "resumed")
        if out.exists() and same_model(out, reference):
            states.append("new")
        elif had_model and out.exists() and bytes_of(out) == bytes_of(self.folder / "earlier" / "out"):
            states.append("earlier")
        elif not out.exists() and (not had_model or not scenario.exchange):
            states.append("away")
        else:
            result.broken.append("OUT is neither the earlier model nor the new one")
        if result.code == 0 and states != ["new"]:
            result.broken.append("exit code 0 without the model")
        return tuple(states)

    def _check_resumed(
        self, result: Result, work: Path, case: Case, before: int, ended: Ended, states: tuple[str, ...]
    ) -> None:
        reference = self.folder / ("reference-sharded" if case.scenario in self.sharded else "reference") / "out"
        if not same_model(work / "out", reference):
            result.broken.append("resumed: other bits")
        if left := sorted({path.name for path in work.iterdir()} - {"out"}):
            result.broken.append(f"leftovers: {left}")
        expected = 0 if states == ("new",) else BLOCKS - before
        if ended.pruned > expected:
            result.broken.append(f"lost blocks: {ended.pruned} were pruned again, {expected} were missing")


def _watch(shared: mmap.mmap, exchange: bool, stop: str) -> list[int]:
    """Count pruned blocks; let a run stop where a scenario begins."""
    from secateur.pruning import loop
    from secateur.resume import block_store, publish
    from secateur.storage import held_folder

    pruned, prune_block = [0], loop.prune_block

    def counted(*arguments: Any) -> Any:
        pruned[0] += 1
        return prune_block(*arguments)

    def halt(*_: Any) -> None:
        os._exit(0)

    loop.prune_block = counted
    if not exchange:
        held_folder._exchange = lambda *_: False
    if stop == "place":
        publish.put_in_place = halt
    if stop == "shard":
        keep = publish.Publisher.keep_shard

        def kept(self: Any, *arguments: Any) -> None:
            keep(self, *arguments)
            if self.num_whole_shards == 2:
                os._exit(0)

        publish.Publisher.keep_shard = kept
    if stop == "block":
        commit = block_store.JournalledBlocks.commit
        number = [0]

        def committed(*arguments: Any) -> None:
            commit(*arguments)
            number[0] += 1
            if number[0] == BLOCKS - 1:
                os._exit(0)

        block_store.JournalledBlocks.commit = committed
    return pruned


def _command() -> int:
    from secateur.cli import app

    try:
        app.main()
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    return 0


def _wait(pid: int) -> int:
    until = time.monotonic() + LIMIT
    while time.monotonic() < until:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.003)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return 98


def _finished_blocks(work: Path) -> int:
    from secateur.resume.manifest import journal_of, read_manifest

    return len(read_manifest(journal_of(work / "out")).blocks)


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() if path.is_file() else b"no file" for path in folder.iterdir()}


def same_model(out: Path, reference: Path) -> bool:
    """Whether a folder is a whole model with the bits of another; times may differ."""
    from secateur.reporting.report import read_metadata
    from secateur.storage.checkpoint_files import METADATA, REPORT_FILE
    from secateur.storage.file_records import first_damage

    ours, theirs = bytes_of(out), bytes_of(reference)
    with_times = (METADATA, REPORT_FILE)
    if ours.keys() != theirs.keys() or any(ours[name] != theirs[name] for name in ours if name not in with_times):
        return False
    return first_damage(out, read_metadata(out).files) is None


DAMAGES = ("a bit", "the end", "empty", "gone", "zeros", "a link", "a folder", "another file's content")


def damage_file(work: Path, how: str, chance: random.Random) -> str | None:
    """Damage a file below a folder; returns its name, or None where that changed nothing."""
    without = ("lock", "report.html")  # the page is made of secateur.json, and can be made again
    files = sorted(path for path in work.rglob("*") if path.is_file() and path.name not in without)
    path = chance.choice(files)
    content = path.read_bytes()
    bit = chance.randrange(len(content))
    other = chance.choice(files).read_bytes()
    damaged = {
        "a bit": content[:bit] + bytes([content[bit] ^ (1 << chance.randrange(8))]) + content[bit + 1 :],
        "the end": content[: chance.randrange(len(content))],
        "empty": b"",
        "zeros": bytes(len(content)),
        "another file's content": other,
    }
    if damaged.get(how) == content:
        return None
    path.unlink()
    if how in damaged:
        path.write_bytes(damaged[how])
    elif how == "a folder":
        path.mkdir()
    elif how == "a link":
        aside = work.parent / "aside"
        aside.write_bytes(content)
        path.symlink_to(aside)
    return path.name


def run_cases(cases: Sequence[Case], shim: Path, workers: int) -> list[dict[str, Any]]:
    """Run cases in several processes."""
    with tempfile.TemporaryDirectory() as scratch:
        running = [_start(Path(scratch) / str(index), cases[index::workers], shim) for index in range(workers)]
        codes = [process.wait() for process in running]
        if any(codes):
            raise RuntimeError("the harness itself failed")
        return [
            result for index in range(workers) for result in json.loads((Path(scratch) / f"{index}-found").read_text())
        ]


def calls_of_scenarios(shim: Path) -> dict[str, str]:
    """Calls that each scenario makes without a fault: a letter each, W for a write."""
    with tempfile.TemporaryDirectory() as scratch:
        if _start(Path(scratch) / "0", [], shim).wait():
            raise RuntimeError("the harness itself failed")
        return json.loads((Path(scratch) / "0-found").read_text())


def _start(place: Path, cases: Sequence[Case], shim: Path) -> subprocess.Popen[bytes]:
    place.with_name(f"{place.name}-cases").write_text(json.dumps([asdict(case) for case in cases]))
    command = [sys.executable, __file__, f"{place}-cases", f"{place}-found"]
    alone = {"OMP_NUM_THREADS": "1", "LD_PRELOAD": str(shim), "TMPDIR": str(place.parent)}
    return subprocess.Popen(command, env=os.environ | alone)


def build_shim(folder: Path) -> Path | None:
    """The compiled `shim.c`; None where there is no C compiler, or no LD_PRELOAD."""
    compiler = shutil.which("cc")
    if compiler is None or sys.platform != "linux":
        return None
    made = folder / "shim.so"
    source = Path(__file__).with_name("shim.c")
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", str(made), str(source)], check=True)
    return made


def _check_cache(result: Result, work: Path) -> None:
    from secateur.sources.model_cache import _damage

    models = sorted(path.name for path in (work / "models").iterdir())
    if len(models) != 2 or models[0] != ".lock":
        result.broken.append(f"leftovers in the cache: {models}")
    elif found := _damage(work / "models" / models[1]):
        result.broken.append(f"a damaged model in the cache: {found}")


def main() -> None:
    """Run cases, and write their results as JSON. Without cases: write the calls of each scenario."""
    import torch
    from markupsafe import Markup

    from secateur.reporting import charts

    for name in ("transformers", "matplotlib.figure", "secateur.cli.app", "secateur.comparison.compare"):
        import_module(name)  # everything, once
    charts._svg = lambda _figure, alt: Markup("<svg></svg>")  # drawing would take half of a tiny run's time
    torch.set_num_threads(1)
    wanted = json.loads(Path(sys.argv[1]).read_text())
    with tempfile.TemporaryDirectory() as scratch:
        laboratory = Laboratory(Path(scratch))
        if not wanted:
            found: Any = {name: laboratory.calls(name) for name in laboratory.scenarios}
        else:
            found = [asdict(run_case(laboratory, Case(**case))) for case in wanted]
        Path(sys.argv[2]).write_text(json.dumps(found))


def run_case(laboratory: Laboratory, case: Case) -> Result:
    """Inject a fault at call `at`, damage a file (`at` is a seed), or cut the power after `at` / 1000 of the calls."""
    if case.fault.startswith("damage"):
        return laboratory.damage(case.scenario, case.fault.removeprefix("damage, "), case.at)
    if not case.fault.startswith("power cut"):
        return laboratory.check(case)
    if case.scenario not in laboratory.recorded:
        laboratory.record(case.scenario)
    number = len(laboratory.recorded[case.scenario].calls) * case.at // 1000
    return laboratory.cut_power(case.scenario, number, case.fault.removeprefix("power cut, "), case.at)


if __name__ == "__main__":
    main()
