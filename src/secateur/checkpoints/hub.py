"""Publish a pruned model on the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id

from secateur.errors import SecateurError
from secateur.reporting.report import METADATA, REPORT_FILE, read_metadata
from secateur.resume.output_folder import CHECKPOINT_FILES
from secateur.sources.unpacked import is_packed
from secateur.sources.validate import check_folder, check_packed
from secateur.storage.file_records import first_damage

REFUSED = (401, 403)
# What the hub's HTTP client raises without a connection; the client's package has another name in each version.
_HTTP_ERROR: type[Exception] = HfHubHTTPError.__bases__[0]


def check_can_push(repo: str) -> None:
    """Check, before any work, that the hub knows the user's token.

    Raises:
        SecateurError: a name that can't be a repository's, no token, a wrong one, or a hub that can't be reached.
    """
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise SecateurError(f"{repo} can't be a repository's name on the hub: {error}") from error
    if get_token() is None:
        raise SecateurError(
            "there is no token for the hub: make one with write access at https://huggingface.co/settings/tokens, "
            "then run `hf auth login`, or set HF_TOKEN"
        )
    with _explained(repo):
        HfApi().whoami()


def push_folder(folder: Path, repo: str, private: bool) -> str:
    """Upload a pruned model in one commit, in place of the model that the repository holds.

    Only the files of the checkpoint are uploaded, and only such files are deleted there.

    Args:
        folder: of the pruned model, packed or not.
        repo: `owner/name`, or a name in the user's account; made where there is none.
        private: whether a new repository is private.

    Returns:
        the address of the model.

    Raises:
        SecateurError: not a pruned model, files that were changed since, or what `check_can_push` raises.
    """
    names = _files_to_push(folder)
    check_can_push(repo)
    api = HfApi()
    with _explained(repo):
        url = api.create_repo(repo, private=private, exist_ok=True)
        there = api.list_repo_files(url.repo_id)
        stale = [name for name in there if name not in names and _is_of_checkpoint(name)]
        adds = [CommitOperationAdd(name, str(folder / name)) for name in names]
        operations = [*adds, *(CommitOperationDelete(name) for name in stale)]
        api.create_commit(url.repo_id, operations, commit_message=f"{folder.name}, pruned by secateur")
    return str(url)


def _files_to_push(folder: Path) -> list[str]:
    """Names of the checkpoint's files, which are what was saved.

    Raises:
        SecateurError: they are not.
    """
    if not folder.is_dir():
        raise SecateurError(f"there is no folder {folder}")
    if not (folder / METADATA).is_file():
        raise SecateurError(f"{folder} has no {METADATA}: it is not a model that secateur pruned")
    _ = check_packed(folder) if is_packed(folder) else check_folder(folder)
    files = read_metadata(folder).files
    if found := first_damage(folder, files):
        raise SecateurError(
            f"{found}: the folder is not what was saved. After fine-tuning, write the report again: "
            f"secateur.Report.load(PRUNED).save(TUNED)"
        )
    return sorted({*files, METADATA, *([REPORT_FILE] if (folder / REPORT_FILE).is_file() else [])})


def _is_of_checkpoint(name: str) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in CHECKPOINT_FILES if not pattern.startswith("."))


@contextmanager
def _explained(repo: str) -> Iterator[None]:
    """Turn errors of the hub into messages."""
    try:
        yield
    except HfHubHTTPError as error:
        if error.response.status_code in REFUSED:
            raise SecateurError(
                f"the hub refused the token for {repo}: it is wrong, expired, or can't write there. `hf auth login` "
                f"takes another one, and HF_TOKEN wins over it"
            ) from error
        raise SecateurError(f"the hub could not do this for {repo}: {_first_line(error)}") from error
    except (_HTTP_ERROR, OSError) as error:
        raise SecateurError(f"the hub could not be reached ({_first_line(error)}): nothing was published") from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
