"""Models on the hub, against a local server that stands in for it."""

from __future__ import annotations

import pytest
from hub_stand_in import TOKEN, Hub
from models import TEXT, save_checkpoint
from ruamel.yaml import YAML

import secateur

SMALL = {"pattern": "50%", "solver": "magnitude", "samples": 4, "seq_len": 32}


@pytest.fixture
def hub(monkeypatch):
    with Hub() as found:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", found.url)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield found


@pytest.fixture
def pruned(tmp_path):
    save_checkpoint(tmp_path / "model")
    (tmp_path / "text.txt").write_text(TEXT)
    secateur.prune(tmp_path / "model", tmp_path / "pruned", calibration=tmp_path / "text.txt", **SMALL)
    return tmp_path / "pruned"


def published(folder, repo):
    """The files of a folder; the card has the model's name in it."""
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    return files | {"README.md": files["README.md"].replace(b"THIS_MODEL", repo.encode())}


@pytest.mark.parametrize("packed", [False, True])
def test_the_hub_holds_the_same_bytes(hub, main, pruned, tmp_path, packed):
    folder = pruned
    if packed:
        folder = tmp_path / "packed"
        secateur.pack(pruned, folder)
    code, out, errors = main("push", folder, "somebody/small", "--private")
    assert code == 0, errors
    assert f"{hub.url}/somebody/small" in out
    assert hub.repos["somebody/small"] == published(folder, "somebody/small")
    assert hub.private == {"somebody/small"}
    assert hub.blobs, "the weights went the way of large files"
    assert len(hub.commits) == 1


def test_the_card_has_valid_metadata(hub, pruned):
    secateur.push(pruned, "somebody/small")
    card = hub.repos["somebody/small"]["README.md"].decode()
    header = YAML(typ="safe", pure=True).load(card.split("---\n")[1])
    assert header["license"] == "mit"
    assert header["library_name"] == "transformers"
    assert header["pipeline_tag"] == "text-generation"
    assert {"pruned", "secateur"} <= {*header["tags"]}
    assert "base_model" not in header
    assert str(pruned.parent) not in card


def test_a_second_push_replaces_the_model_and_nothing_else(hub, pruned, tmp_path):
    secateur.push(pruned, "small")
    repo = hub.repos["somebody/small"]
    repo["picture.png"] = b"theirs"
    repo[".gitattributes"] = b"the hub's"
    kept = {f"dense/{name}": b"theirs" for name in ("model.safetensors.index.json", "pytorch_model-00001-of-00001.bin")}
    repo |= kept
    secateur.pack(pruned, tmp_path / "packed")
    secateur.push(tmp_path / "packed", "small")
    ours = published(tmp_path / "packed", "somebody/small")
    assert repo == ours | kept | {"picture.png": b"theirs", ".gitattributes": b"the hub's"}
    assert "model.safetensors" not in repo


def test_push_to_hub_after_a_run(hub, main, pruned, tmp_path):
    out = tmp_path / "my-model"
    options = ["--pattern", "2:4", "--solver", "magnitude", "--samples", 4, "--seq-len", 32]
    code, _, errors = main(
        "prune", tmp_path / "model", out, "--calibration", tmp_path / "text.txt", *options, "--push-to-hub"
    )
    assert code == 0, errors
    assert hub.repos["somebody/my-model"] == published(out, "somebody/my-model")
    assert hub.private == {"somebody/my-model"}


@pytest.mark.parametrize("name", ["a/b/c", "bad name", "-x", "a--b"])
def test_a_name_that_is_no_repository(hub, main, pruned, name):
    code, _, errors = main("push", pruned, "--", name)
    assert code == 2
    assert "can't be a repository's name" in " ".join(errors.split())
    assert not hub.repos


def test_a_wrong_token(hub, main, pruned, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    code, _, errors = main("push", pruned, "small")
    assert code == 2
    assert "refused the token" in " ".join(errors.split())
    assert not hub.repos


def test_no_token(hub, main, pruned, monkeypatch, tmp_path):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no token"))
    code, _, errors = main("push", pruned, "small")
    assert code == 2
    assert "hf auth login" in errors


def test_a_token_is_checked_before_any_work(hub, main, pruned, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    code, _, _ = main("prune", tmp_path / "model", tmp_path / "new", "--push-to-hub")
    assert code == 2
    assert not (tmp_path / "new").exists()


def test_a_hub_that_is_offline(hub, main, pruned, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    code, _, errors = main("push", pruned, "small")
    assert code == 2
    assert "could not be reached" in " ".join(errors.split())


def test_a_hub_that_is_out_of_order(hub, main, pruned):
    hub.status = 418
    code, _, errors = main("push", pruned, "small")
    assert code == 2
    assert "could not do this" in " ".join(errors.split())


def test_what_is_not_as_it_was_saved_is_not_published(hub, main, pruned, tmp_path):
    (pruned / "config.json").write_text((pruned / "config.json").read_text() + " ")
    code, _, errors = main("push", pruned, "small")
    assert code == 2
    assert "is not what was saved" in " ".join(errors.split())
    for folder, message in ((tmp_path / "model", "secateur.json"), (tmp_path / "nosuch", "there is no folder")):
        code, _, errors = main("push", folder, "small")
        assert code == 2
        assert message in " ".join(errors.split())
    assert not hub.repos


def test_files_that_are_not_of_the_model_stay_here(hub, pruned):
    (pruned / "secrets.txt").write_text("mine")
    secateur.push(pruned, "small")
    assert "secrets.txt" not in hub.repos["somebody/small"]


def test_files_next_to_a_tuned_model_stay_here(hub, pruned):
    (pruned / ".env").write_text("TOKEN")
    (pruned / "training_args.bin").write_bytes(b"paths")
    secateur.Report.load(pruned).save(pruned)
    secateur.push(pruned, "small")
    assert not {".env", "training_args.bin"} & hub.repos["somebody/small"].keys()
    assert "model.safetensors" in hub.repos["somebody/small"]
    (pruned / "README.md").unlink()
    with pytest.raises(secateur.SecateurError, match=r"has no README\.md"):
        secateur.push(pruned, "small")


def test_a_card_heals_where_a_run_was_stopped_before_it_was_recorded(hub, main, pruned, tmp_path):
    record = ("eval", pruned, "--text", tmp_path / "text.txt", "--seq-len", 32, "--record")
    before = (pruned / "secateur.json").read_bytes()
    assert main(*record)[0] == 0
    (pruned / "secateur.json").write_bytes(before)
    code, _, errors = main(*record)
    assert code == 0
    assert "was edited" not in errors


def test_a_dense_model_is_not_replaced(hub, main, pruned):
    """`prune me/model model --push-to-hub` would put the pruned model in the place of the dense one."""
    hub.repos["somebody/dense"] = {"model.safetensors": b"dense", "config.json": b"{}"}
    code, _, errors = main("push", pruned, "somebody/dense")
    assert code == 2
    assert "did not prune" in " ".join(errors.split())
    assert hub.repos["somebody/dense"] == {"model.safetensors": b"dense", "config.json": b"{}"}


def test_an_edited_card_is_published_and_kept(hub, main, pruned, tmp_path):
    (pruned / "README.md").write_text("# my own words on THIS_MODEL\n")
    secateur.push(pruned, "small")
    assert hub.repos["somebody/small"]["README.md"] == b"# my own words on somebody/small\n"
    code, _, errors = main("eval", pruned, "--text", tmp_path / "text.txt", "--seq-len", 32, "--record")
    assert code == 0
    assert "was edited" in errors
    assert (pruned / "README.md").read_text() == "# my own words on THIS_MODEL\n"


def test_a_card_that_is_no_text_is_named_before_a_repository_is_made(hub, main, pruned):
    (pruned / "README.md").write_bytes("# größer".encode("latin-1"))
    code, _, errors = main("push", pruned, "new")
    assert code == 2
    assert "README.md is not UTF-8 text (byte 4)" in " ".join(errors.split())
    assert not hub.repos


@pytest.mark.parametrize("name", ["README.md", "secateur.json"])
def test_nothing_is_published_through_a_link(hub, main, pruned, tmp_path, name):
    """What it leads to has the right content; that of the other files has a digest."""
    (pruned / name).rename(tmp_path / "private")
    (pruned / name).symlink_to(tmp_path / "private")
    code, _, errors = main("push", pruned, "small")
    assert code == 2
    assert f"{name} is missing, or a link" in " ".join(errors.split())
    assert not hub.repos
