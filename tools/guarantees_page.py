"""docs/guarantees.md: what is promised, which test holds it, and how often it was tried."""

from __future__ import annotations

from pathlib import Path

from pages import DOCS, read_result, table

# Promise -> the tests that hold it.
PROMISES = {
    "After a kill at any moment, `--resume` ends with the bits of a run that was never stopped, and prunes no finished block again.": "test_faults.py: test_a_sample_of_faults_breaks_no_promise; test_resume.py: test_a_run_stopped_anywhere_goes_on_to_the_same_bits",
    "The same after a power cut that loses, keeps or reorders what was not flushed to the disk.": "test_faults.py: test_a_sample_of_faults_breaks_no_promise; test_storage.py: test_a_write_is_flushed_before_it_gets_its_name_and_the_name_after",
    "OUT is the earlier model or the new one, whole, at every moment. Where the system can't exchange two folders (NFS, some FUSE file systems), OUT is away for a moment, and a resumed run puts the model there.": "test_resume.py: test_power_cuts_while_the_finished_model_takes_its_place",
    "A damaged file is never called finished: every file is verified before it is published, by `--resume`, and by `inspect`.": "test_output_folder.py: test_a_damaged_model_is_never_called_finished; test_resume.py: test_a_damaged_shard_is_not_published",
    "`--overwrite` replaces only files of a checkpoint, or files that we copied there and nobody changed. It names the first other file and changes nothing.": "test_output_folder.py: test_overwrite_refuses_a_folder_with_a_file_that_is_none_of_a_checkpoint, test_a_copied_file_of_any_name_is_replaced_only_while_it_is_as_it_was_saved",
    "A file that comes to OUT while a run goes on is neither replaced nor removed.": "test_output_folder.py: test_a_file_that_comes_to_out_during_the_run_is_never_replaced, test_a_file_that_comes_at_the_last_moment_is_kept_beside_out",
    "Nothing is written through a link, and no link of a model is copied that leaves its folder.": "test_output_folder.py: test_a_link_in_the_journal_is_never_followed, test_a_link_that_leaves_the_model_is_not_copied; test_storage.py: test_links_are_replaced_or_refused_and_never_followed",
    "Two runs never write one OUT.": "test_resume.py: test_two_runs_on_one_folder; test_output_folder.py: test_a_second_run_that_checked_out_before_the_first_one_finished_replaces_nothing",
    "A full disk, an I/O error or a read-only disk gives exit code 2 and a message, and costs no finished block.": "test_faults.py: test_a_sample_of_faults_breaks_no_promise; test_resume.py: test_a_full_disk_costs_nothing_that_was_there",
    "A model in the cache that is damaged is made again.": "test_hostile_files.py: test_a_damaged_model_in_the_cache_is_made_again",
    "Damaged and hostile files give exit code 2 and a message: no traceback, no hang, no memory beyond twice the file and 500 MB. A packed file may need more: a zero takes one bit there.": "test_fuzz.py: test_mutated_files_break_no_promise; test_hostile_files.py: test_configs_that_make_no_sense, test_a_config_of_a_far_larger_model_takes_no_memory, test_damaged_gguf_files",
    "A packed model unpacks to the same bits. A damaged one gives an error: its sizes, checksums, masks and counts are checked, and its shapes against the config. The offsets that kernels use are computed from the masks.": "test_packed_format.py: test_a_round_trip_keeps_every_bit, test_damaged_headers_are_refused, test_no_flipped_bit_of_a_header_is_taken, test_wrong_contents_under_a_right_checksum_are_refused; test_packed_models.py: test_damaged_packed_files_are_found, test_a_matrix_of_another_shape_than_the_config_is_refused",
    "Without secateur, a packed model fails to load. It never starts from random weights.": "test_packed_models.py: test_plain_transformers_fails_loudly",
    "Text from files is printed as it is: no markup, no control characters.": "test_hostile_files.py: test_names_from_files_are_printed_as_they_are",
    "Names from models and files are text in a report's page: none is run, and the page's own policy forbids scripts and the network.": "test_report.py: test_hostile_names_stay_text, test_the_page_in_a_browser",
    "Only the checkpoint's files are published, and only if they are what was saved. The token is checked before any work.": "test_hub.py: test_files_that_are_not_of_the_model_stay_here, test_what_is_not_as_it_was_saved_is_not_published, test_a_token_is_checked_before_any_work",
    "No pickle is loaded and no code of a model runs, unless asked for.": "test_hostile_files.py: test_a_pickle_with_a_payload; test_packed_models.py: test_bench_loads_a_pickle_where_it_is_asked_to",
    "An error that nobody foresaw says so, leaves its traceback in a file, and exits with 70.": "test_hostile_files.py: test_an_unexpected_error_says_so_and_leaves_its_traceback",
}


def pages() -> dict[Path, str]:
    """The page."""
    return {DOCS / "guarantees.md": _page()}


def _page() -> str:
    faults, fuzz, verification, asan = map(read_result, ("faults", "fuzz", "verification", "fuzz_asan"))
    kinds = faults["cases"]
    injected = sum(number for kind, number in kinds.items() if kind not in ("damage", "power cut"))
    rows = [[promise, tests] for promise, tests in PROMISES.items()]
    run, resumed = (verification["runs"][name] for name in ("run", "finished run resumed"))
    slowest = max(found["slowest_seconds"] for found in fuzz["targets"].values())
    broken = sum(len(found["broken"]) for found in fuzz["targets"].values())
    return f"""# Guarantees

What you can rely on when a machine, a disk or a file fails. Each promise has a test that fails when it is broken.

A run works in a folder next to OUT, `.OUT.secateur`, its journal: finished blocks and a manifest. OUT changes once, at the end, by one
rename. `secateur.json` in OUT records size and SHA-256 of all files apart from `report.html`, and its own.

{table(["promise", "held by (in tests/)"], rows)}

## How often it was tried

- **{injected:,} injected faults** ({", ".join(f"{number:,} {kind}" for kind, number in kinds.items() if kind not in ("damage", "power cut"))}), at every call that changes a file, in fresh, overwriting, sharded and resumed runs, while publishing, and in the cache. **{kinds["power cut"]} power cuts** at moments over the whole run. **{kinds["damage"]} damaged files** of journals and finished models. {len(faults["broken"])} broke a promise.

      python benchmarks/faults.py --out benchmarks/results/faults.json

- **{fuzz["inputs"]:,} mutated files** ({", ".join(f"{found['inputs']:,} {name}" for name, found in fuzz["targets"].items())}). The slowest took {slowest:.1f} s. {broken} broke a promise.

      python benchmarks/fuzz.py --out benchmarks/results/fuzz.json
- **{asan["inputs"]:,} mutated packed files** with the kernels under AddressSanitizer. {sum(len(found["broken"]) for found in asan["targets"].values())} broke a promise.

- **What digests cost**: {run["hashing"]:.2f} s of hashing in a run of {run["seconds"]:.0f} s on SmolLM2-135M, {run["hashing"] / run["seconds"]:.1%} (recipe `fast`, 32 x 512 tokens). Resuming a finished run hashes {resumed["hashed_bytes"] / 1e6:,.0f} MB, in {resumed["hashing"]:.2f} s.

      python benchmarks/verification.py --out benchmarks/results/verification.json

## What is not promised

- The disk must do what fsync says. A disk that lies about it can lose the last blocks; their digests tell.
- OUT must not be where a disk is mounted: name a folder in it. The folder above OUT must be writable.
- A run that another number of processes resumes ends with the same model up to the rounding of sums, and not with the same bits.
- Files are verified when they are read. A bit that flips in memory is not noticed.
- A person who can write to the journal can also forge its digests. What is forged can still name no file elsewhere, and delete only files of a checkpoint.
- The rename inside safetensors' `save_file` was not among the calls at which faults were injected: no preloaded library sees it.
- Windows is not supported: it has no folders held by descriptors. macOS exchanges folders too, but is untested.
"""
