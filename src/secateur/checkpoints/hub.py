"""Publish a pruned model on the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id

from secateur.checkpoints.measured import report_in
from secateur.errors import SecateurError
from secateur.packed.files import is_packed
from secateur.reporting.page import run_page
from secateur.reporting.report import Report
from secateur.runtime.hub_errors import http_error
from secateur.runtime.messages import first_line
from secateur.sources.validate import check_folder, check_packed
from secateur.storage.checkpoint_files import CARD, INDEX_FILES, METADATA, REPORT_FILE, WEIGHT_FILES
from secateur.storage.file_records import first_damage
from secateur.storage.paths import real_path

REFUSED = (401, 403)


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
    """Upload a pruned model in one commit, in place of the pruned model that the repository holds.

    Only the files of the checkpoint are uploaded, and only weights of the earlier model are deleted there. The card may
    have been edited; it gets the model's name where it says `THIS_MODEL`.

    Args:
        folder: of the pruned model, packed or not.
        repo: `owner/name`, or a name in the user's account; made where there is none.
        private: whether a new repository is private.

    Returns:
        the address of the model.

    Raises:
        SecateurError: not a pruned model, files that were changed since, a repository that holds another model, or what
            `check_can_push` raises.
    """
    report, names, card = _files_to_push(folder)
    check_can_push(repo)
    contents: dict[str, str | bytes] = {name: str(folder / name) for name in names}
    contents[REPORT_FILE] = run_page(report, folder).encode()
    api = HfApi()
    with _explained(repo):
        url = api.create_repo(repo, private=private, exist_ok=True)
        there = api.list_repo_files(url.repo_id)
    _check_may_replace(url.repo_id, report, there)
    contents[CARD] = card.replace("THIS_MODEL", url.repo_id).encode()
    stale = [name for name in there if name not in contents and _is_of_a_model(name)]
    operations = [CommitOperationAdd(name, content) for name, content in contents.items()]
    deletions = [CommitOperationDelete(name) for name in stale]
    with _explained(repo, f"whether it was published is unknown: look at {url}"):
        api.create_commit(
            url.repo_id, [*operations, *deletions], commit_message=f"{real_path(folder).name}, pruned by secateur"
        )
    return str(url)


def _is_of_a_model(name: str) -> bool:
    """Whether a file of a repository holds weights, or their index. What lies in a folder there is the user's."""
    return "/" not in name and any(fnmatchcase(name, each) for each in (*WEIGHT_FILES, *INDEX_FILES))


def _check_may_replace(repo: str, report: Report, there: Sequence[str]) -> None:
    """Check that a repository is empty, or holds a model that secateur pruned.

    Raises:
        SecateurError: it holds another one, such as the dense model.
    """
    has_weights = any(map(_is_of_a_model, there))
    if repo == report.source.get("base_model") or (has_weights and METADATA not in there):
        raise SecateurError(f"{repo} holds a model that secateur did not prune, so it is not replaced: name another")


def _files_to_push(folder: Path) -> tuple[Report, list[str], str]:
    """The report, the names of the checkpoint's files, which are what was saved, and the card, which may differ.

    Raises:
        SecateurError: they are not, or the card is not text.
    """
    report = report_in(folder)
    _ = check_packed(folder) if is_packed(folder) else check_folder(folder)
    if found := first_damage(folder, report.unedited_files):
        raise SecateurError(
            f"{found}: the folder is not what was saved. After fine-tuning, write the report again: "
            f"secateur.Report.load(PRUNED).save(TUNED)"
        )
    names = sorted({*report.files, CARD, METADATA})
    if not (folder / CARD).exists():
        raise SecateurError(
            f"{folder} has no {CARD}, the model's card: write one, or measure it (secateur eval {folder} --record)"
        )
    if linked := [name for name in names if (folder / name).is_symlink() or not (folder / name).is_file()]:
        raise SecateurError(f"{folder / linked[0]} is missing, or a link: what it leads to would be published")
    try:
        return report, names, (folder / CARD).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise SecateurError(f"{folder / CARD} is not UTF-8 text (byte {error.start}): save it as UTF-8") from error


@contextmanager
def _explained(repo: str, outcome: str = "nothing was published") -> Iterator[None]:
    """Turn errors of the hub into messages; `outcome` says what is there where it did not answer."""
    try:
        yield
    except HfHubHTTPError as error:
        if error.response.status_code in REFUSED:
            raise SecateurError(
                f"the hub refused the token for {repo}: it is wrong, expired, or can't write there. `hf auth login` "
                f"takes another one, and HF_TOKEN wins over it"
            ) from error
        raise SecateurError(f"the hub could not do this for {repo}: {first_line(error)}") from error
    except (http_error(), ConnectionError, TimeoutError) as error:
        raise SecateurError(f"the hub could not be reached ({first_line(error)}): {outcome}") from error
