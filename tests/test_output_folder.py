"""What a run may replace, copy and follow: nothing of the user's is touched."""

from __future__ import annotations

import json
import shutil
import threading
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import pytest
from models import TEXT, character_tokenizer, save_checkpoint
from safetensors.torch import load_file
from zoo import tiny

import secateur
from secateur.resume import folder, publish, put_in_place
from secateur.resume.manifest import MANIFEST, journal_of, read_manifest
from secateur.storage import held_folder
from secateur.storage.file_records import record_of

SETTINGS = {"pattern": "50%", "solver": "sparsegpt", "samples": 4, "seq_len": 32}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A model, a text, and the model pruned."""
    place = tmp_path_factory.mktemp("source")
    save_checkpoint(place / "model", num_hidden_layers=2)
    (place / "text.txt").write_text(TEXT)
    prune(place, place / "pruned")
    return place


@pytest.fixture
def out(source, tmp_path):
    """An earlier pruned model."""
    return shutil.copytree(source / "pruned", tmp_path / "out")


def prune(source, out, **changed):
    arguments = {"calibration": source / "text.txt"} | SETTINGS | changed
    return secateur.prune(arguments.pop("model", source / "model"), out, **arguments)


def stop(*_):
    raise KeyboardInterrupt


def content(place):
    return {path.relative_to(place): path.read_bytes() for path in place.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", ["thesis.tex", ".bashrc", "lora.safetensors", "data/x.txt", "a link"])
@pytest.mark.parametrize("of", ["a run", "transformers", "{}"])
def test_overwrite_refuses_a_folder_with_a_file_that_is_none_of_a_checkpoint(source, out, tmp_path, name, of):
    if of == "transformers":
        shutil.rmtree(out)
        shutil.copytree(source / "model", out)
    if of == "{}":
        shutil.rmtree(out)
        out.mkdir()
        (out / "config.json").write_text("{}")
    if name == "a link":
        (tmp_path / "private").write_text("mine")
        (out / name).symlink_to(tmp_path / "private")
    else:
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text("years of work")
    before = content(out)
    (tmp_path / "way").symlink_to(out)
    for place in (out, tmp_path / "way"):
        message = "not a model" if of == "{}" else f"holds {Path(name).parts[0]}, "
        with pytest.raises(ValueError, match=message):
            prune(source, place, overwrite=True)
    assert content(out) == before
    assert not journal_of(out).exists()


def test_overwrite_replaces_a_model_of_transformers_and_one_of_ours_whose_card_was_edited(source, out, tmp_path):
    (out / "README.md").write_text("my own words")
    prune(source, out, seed=1, overwrite=True)
    shutil.copytree(source / "model", tmp_path / "theirs")
    prune(source, tmp_path / "theirs", overwrite=True)
    assert content(tmp_path / "theirs").keys() == content(source / "pruned").keys()


def test_a_finished_run_stays_as_it_is_when_its_card_was_edited(source, out):
    (out / "README.md").write_text("my own words")
    before = content(out)
    prune(source, out, resume=True)
    assert content(out) == before


def test_a_copied_file_of_any_name_is_replaced_only_while_it_is_as_it_was_saved(source, tmp_path):
    shutil.copytree(source / "model", tmp_path / "model")
    (tmp_path / "model" / "modeling_own.py").write_text("x = 1")
    prune(source, tmp_path / "out", model=tmp_path / "model")
    assert (tmp_path / "out" / "modeling_own.py").exists()
    prune(source, tmp_path / "out", model=tmp_path / "model", overwrite=True)
    (tmp_path / "out" / "modeling_own.py").write_text("x = 2")
    with pytest.raises(ValueError, match="holds modeling_own.py, which was changed since it was saved"):
        prune(source, tmp_path / "out", model=tmp_path / "model", overwrite=True)


def test_a_link_that_leaves_the_model_is_not_copied(source, tmp_path):
    model = shutil.copytree(source / "model", tmp_path / "model")
    (tmp_path / "private").write_text("mine")
    (model / "notes.txt").symlink_to(tmp_path / "private")
    (model / "inside.txt").write_text("shared")
    (model / "also.txt").symlink_to("inside.txt")
    (model / "dangling.json").symlink_to("nowhere")
    (model / "loop.json").symlink_to("loop.json")
    (model / "folder.json").mkdir()
    (model / "folder.safetensors").mkdir()
    report = prune(source, tmp_path / "out", model=model)
    assert [notice for notice in report.notices if "notes.txt is a link that leaves" in notice]
    assert "folder.json, folder.safetensors: sub-folders of the model are not copied" in report.notices
    found = content(tmp_path / "out")
    assert Path("notes.txt") not in found
    assert found[Path("also.txt")] == b"shared"
    assert not [path for path in (tmp_path / "out").iterdir() if path.is_symlink()]


@pytest.mark.parametrize("name", ["LICENSE", "README.md", "config.json"])
def test_a_link_that_would_publish_another_file_is_refused(source, tmp_path, name):
    """In a folder called snapshots too, which is not the hub's cache."""
    model = shutil.copytree(source / "model", tmp_path / "snapshots" / "model")
    (model / name).touch()
    shutil.move(model / name, tmp_path / "private")
    (model / name).symlink_to(tmp_path / "private")
    with pytest.raises(ValueError, match=f"{name} is a link to .*private, outside of the model's folder"):
        prune(source, tmp_path / "other", model=model)
    assert not (tmp_path / "other").exists()
    assert not journal_of(tmp_path / "other").exists()


def test_links_of_the_hubs_cache_are_copied(source, tmp_path):
    snapshot = tmp_path / "models--a--b" / "snapshots" / "1234"
    blobs = tmp_path / "models--a--b" / "blobs"
    shutil.copytree(source / "model", blobs)
    snapshot.mkdir(parents=True)
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    prune(source, tmp_path / "out", model=snapshot)
    assert content(tmp_path / "out").keys() == content(source / "pruned").keys()


def test_a_private_file_of_the_model_stays_private(source, tmp_path):
    model = shutil.copytree(source / "model", tmp_path / "model")
    (model / "notes.txt").write_text("mine")
    (model / "notes.txt").chmod(0o600)
    prune(source, tmp_path / "out", model=model)
    assert (tmp_path / "out" / "notes.txt").stat().st_mode & 0o777 == 0o600


def test_a_model_of_links_into_out_is_refused(source, out, tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    for path in out.iterdir():
        (model / path.name).symlink_to(path)
    before = content(out)
    with pytest.raises(ValueError, match="which must stay"):
        prune(source, out, model=model, overwrite=True)
    assert content(out) == before


def stopped_before_its_place(source, out, monkeypatch, **changed):
    with monkeypatch.context() as patched:
        patched.setattr(publish, "put_in_place", stop)
        with pytest.raises(KeyboardInterrupt):
            prune(source, out, **changed)


def test_a_file_that_comes_to_out_during_the_run_is_never_replaced(source, out, tmp_path, monkeypatch):
    stopped_before_its_place(source, out, monkeypatch, seed=7, overwrite=True)
    earlier = content(out)
    for name, words in (("README.md", "my own words"), ("thesis.tex", "years of work")):
        kept = (out / name).read_bytes() if (out / name).exists() else None
        (out / name).write_text(words)
        with pytest.raises(ValueError, match=name):
            prune(source, out, seed=7, resume=True)
        assert (out / name).read_text() == words
        (out / name).unlink() if kept is None else (out / name).write_bytes(kept)
    assert content(out) == earlier
    prune(source, out, seed=7, resume=True)
    assert content(out) != earlier
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_file_that_comes_at_the_last_moment_is_kept_beside_out(source, out, tmp_path, monkeypatch, capsys):
    switch = put_in_place._switch

    def late(journal, parent, place):
        (place / "thesis.tex").write_text("years of work")
        switch(journal, parent, place)

    monkeypatch.setattr(put_in_place, "_switch", late)
    prune(source, out, seed=7, overwrite=True)
    (kept,) = tmp_path.glob("out.kept-*")
    assert content(kept) == {Path("thesis.tex"): b"years of work"}
    assert f"are in {kept}" in capsys.readouterr().err


def edited(out, monkeypatch, change):
    """Change the manifest as a person would who also writes its digest."""
    path = journal_of(out) / MANIFEST
    data = json.loads(path.read_text())
    del data["sha256"]
    change(data)
    from secateur.storage.json_files import sealed

    path.write_text(json.dumps(sealed(data)))


@pytest.mark.parametrize("name", ["../private", "/etc/passwd", "", "..", "a\nb", "a\x1bb"])
def test_a_manifest_that_names_files_elsewhere_is_damaged(source, out, monkeypatch, name):
    stopped_before_its_place(source, out, monkeypatch, seed=7, overwrite=True)
    for part in ("replaces", "files"):
        kept = (journal_of(out) / MANIFEST).read_bytes()
        edited(out, monkeypatch, lambda data, part=part: data[part].update({name: {"sha256": "0" * 64, "bytes": 0}}))
        with pytest.raises(ValueError, match="is damaged"):
            prune(source, out, seed=7, resume=True)
        (journal_of(out) / MANIFEST).write_bytes(kept)


def test_an_edited_manifest_deletes_nothing_and_publishes_no_other_model(source, out, monkeypatch):
    stopped_before_its_place(source, out, monkeypatch, seed=7, overwrite=True)
    before, manifest = content(out), (journal_of(out) / MANIFEST).read_bytes()
    for change, message in (
        (lambda data: data["replaces"].pop("README.md"), r"holds README\.md, which was not there"),
        (lambda data: data["files"].pop("tokenizer.json"), r"tokenizer\.json is not recorded"),
        (lambda data: (data["files"].clear(), data["shards"].append(data["shards"][0])), "more shards than planned"),
    ):
        (journal_of(out) / MANIFEST).write_bytes(manifest)
        edited(out, monkeypatch, change)
        with pytest.raises(ValueError, match=message):
            prune(source, out, seed=7, resume=True)
    assert content(out) == before


def test_a_forged_manifest_removes_no_file_that_is_none_of_a_checkpoint(source, out, monkeypatch):
    """It may say that the run may replace anything in OUT, with the right digest."""
    stopped_before_its_place(source, out, monkeypatch, seed=7, overwrite=True)
    (out / "thesis.docx").write_text("two years")
    record = asdict(record_of(out / "thesis.docx"))
    edited(out, monkeypatch, lambda data: data["replaces"].update({"thesis.docx": record}))
    before = content(out)
    with pytest.raises(ValueError, match=r"holds thesis\.docx, which is not a file of a checkpoint"):
        prune(source, out, seed=7, resume=True)
    assert content(out) == before


@pytest.mark.parametrize("damage", ["a bit", "the end", "gone", "config", "tokenizer"])
@pytest.mark.parametrize("stage", ["finished", "before its place"])
def test_a_damaged_model_is_never_called_finished(source, out, monkeypatch, damage, stage):
    place = out
    if stage == "before its place":
        stopped_before_its_place(source, out, monkeypatch, seed=7, overwrite=True)
        place = journal_of(out) / put_in_place.FINISHED
    name = {"config": "config.json", "tokenizer": "tokenizer.json"}.get(damage, "model.safetensors")
    bits = (place / name).read_bytes()
    earlier = content(out)
    if damage in ("a bit", "the end"):
        (place / name).write_bytes(bits[:-1] + bytes([bits[-1] ^ 1]) if damage == "a bit" else bits[:-9])
    else:
        (place / name).unlink()
    settings = {"seed": 7} if stage == "before its place" else {}
    with pytest.raises(ValueError, match=name):
        prune(source, out, resume=True, **settings)
    if stage == "before its place":
        assert content(out) == earlier
    else:
        try:
            problems = secateur.inspect(out).problems
        except ValueError as error:
            problems = [str(error)]
        assert [problem for problem in problems if name in problem or "config.json" in problem]
    prune(source, out, overwrite=True)
    assert load_file(out / "model.safetensors").keys() == load_file(source / "pruned/model.safetensors").keys()
    assert not secateur.inspect(out).problems


def test_a_second_run_that_checked_out_before_the_first_one_finished_replaces_nothing(source, tmp_path, monkeypatch):
    """It waits where it has the old view of OUT, until the first run is done."""
    out, check_place, first_is_done = tmp_path / "out", secateur.run.check_place, threading.Event()

    def slow(place):
        check_place(place)
        if threading.current_thread() is second:
            assert first_is_done.wait(60)

    errors = []

    def run():
        try:
            prune(source, out, seed=1)
        except ValueError as error:
            errors.append(str(error))

    monkeypatch.setattr("secateur.run.check_place", slow)
    second = threading.Thread(target=run)
    second.start()
    prune(source, out)
    before = content(out)
    first_is_done.set()
    second.join()
    assert "exists and is not empty" in errors[0]
    assert content(out) == before


def test_what_a_killed_process_left_while_it_began_is_no_hindrance(source, tmp_path):
    out = tmp_path / "out"
    journal_of(out).mkdir()
    (journal_of(out) / folder.LOCK).touch()
    (journal_of(out) / f"{held_folder.PARTIAL}0123").mkdir()
    prune(source, out)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_overwriting_run_is_resumed_by_resume_alone_from_its_first_moment(source, out, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(secateur.run, "prune_model", stop)
        with pytest.raises(KeyboardInterrupt):
            prune(source, out, seed=7, overwrite=True)
    assert not read_manifest(journal_of(out)).blocks
    prune(source, out, seed=7, resume=True)
    assert json.loads((out / "secateur.json").read_text())["recipe"]["seed"] == 7


@pytest.mark.parametrize("name", ["finished", "manifest.json", "lock", "block-00000.safetensors", "outcome.json"])
def test_a_link_in_the_journal_is_never_followed(source, out, tmp_path, monkeypatch, name):
    target = tmp_path / "target"
    if name == "finished":
        target.mkdir()
        (target / "model.safetensors").write_text("mine")
    else:
        target.write_text("mine")
    journal_of(out).mkdir()
    (journal_of(out) / name).symlink_to(target)
    with suppress(ValueError):  # whether it can go on depends on the name
        prune(source, out, seed=7, overwrite=True)
    assert (target / "model.safetensors" if name == "finished" else target).read_text() == "mine"


def test_a_journal_that_is_a_link_is_refused(source, out, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    journal_of(out).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="can't be written"):
        prune(source, out, seed=7, overwrite=True)
    assert not list((tmp_path / "elsewhere").iterdir())


def test_a_name_that_can_not_be_recorded_is_not_copied(source, tmp_path):
    model = shutil.copytree(source / "model", tmp_path / "model")
    (model / "a\u202fb.txt").write_text("x")
    report = prune(source, tmp_path / "out", model=model)
    assert [notice for notice in report.notices if "can't be recorded" in notice]
    assert not secateur.inspect(tmp_path / "out").problems


def test_a_file_that_changes_at_the_last_moment_is_kept(source, out, tmp_path, monkeypatch):
    switch = put_in_place._switch

    def late(journal, parent, place):
        (place / "README.md").write_text("my own words")
        switch(journal, parent, place)

    monkeypatch.setattr(put_in_place, "_switch", late)
    prune(source, out, seed=7, overwrite=True)
    (kept,) = tmp_path.glob("out.kept-*")
    assert content(kept) == {Path("README.md"): b"my own words"}


def test_a_refused_run_leaves_what_a_killed_one_may_replace(source, out, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr("secateur.request.ModelSource.load", stop)
        with pytest.raises(KeyboardInterrupt):
            prune(source, out, seed=7, overwrite=True)
    with pytest.raises(ValueError, match="resume"):
        prune(source, out, seed=7)
    prune(source, out, seed=7, resume=True)


def test_a_file_that_comes_to_the_new_model_before_its_journal_is_gone_is_kept(source, out, tmp_path, monkeypatch):
    """Killed between the switch and the removal of the earlier model."""
    with monkeypatch.context() as patched:
        patched.setattr(put_in_place, "_remove_replaced", stop)
        with pytest.raises(KeyboardInterrupt):
            prune(source, out, seed=7, overwrite=True)
    (out / "notes.txt").write_text("mine")
    prune(source, out, seed=7, resume=True)
    assert (out / "notes.txt").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_out_where_a_disk_is_mounted_is_refused(source, out, monkeypatch):
    monkeypatch.setattr(Path, "is_mount", lambda path: path == out)
    with pytest.raises(ValueError, match="name a folder in it"):
        prune(source, out, overwrite=True)


def test_a_wrong_request_to_overwrite_costs_no_finished_block(source, out, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(secateur.run.Publisher, "publish", stop)
        with pytest.raises(KeyboardInterrupt):
            prune(source, out, seed=7, overwrite=True)
    before = read_manifest(journal_of(out))
    assert len(before.blocks) == 2
    with pytest.raises(ValueError, match="not a file"):
        prune(source, out, overwrite=True, calibration="absent.txt")
    assert read_manifest(journal_of(out)) == before
    prune(source, out, seed=7, resume=True)
    assert json.loads((out / "secateur.json").read_text())["recipe"]["seed"] == 7


def test_a_dry_run_tells_of_an_unfinished_run(source, out, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(secateur.run.Publisher, "publish", stop)
        with pytest.raises(KeyboardInterrupt):
            prune(source, out, overwrite=True)
    for function in (secateur.dry_run, secateur.prune):
        with pytest.raises(ValueError, match="has an unfinished run"):
            function(source / "model", out, calibration=source / "text.txt", **SETTINGS)


def test_weights_made_for_a_run_stay_until_it_ends(tmp_path, monkeypatch):
    """Fused experts are mapped from the journal, and a run that begins clears what lies there of others."""
    tiny("mixtral").save_pretrained(tmp_path / "model")
    character_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text(TEXT)
    seen = []

    def watched(*arguments):
        seen.append((journal_of(tmp_path / "out") / "converted-0").is_dir())
        raise KeyboardInterrupt

    monkeypatch.setattr(secateur.run, "prune_model", watched)
    with pytest.raises(KeyboardInterrupt):
        prune(tmp_path, tmp_path / "out")
    assert seen == [True]
    assert not journal_of(tmp_path / "out").exists()
