"""Zero-shot tasks equal the harness called by hand; divergence from a dense model equals a plain loop."""

from __future__ import annotations

import json
from functools import lru_cache

import pytest
import torch
from models import character_tokenizer, tiny_model

import secateur
from secateur.evaluation.tasks import check_tasks, headline, run_tasks

TEXT = "the quick brown fox jumps over the lazy dog, and then it does so again.\n" * 10
TASK = """task: foxes
dataset_path: json
dataset_kwargs:
  data_files:
    validation: {data}
validation_split: validation
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_target: label
doc_to_choice: "{{{{[first, second]}}}}"
metric_list:
  - metric: acc
  - metric: acc_norm
"""


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture(scope="module")
def task_dir(tmp_path_factory):
    """One for all tests: with each new folder, the harness reads the thousands of tasks that it ships."""
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is the extra `eval`")
    folder = tmp_path_factory.mktemp("tasks")
    records = [
        {"question": f"fox number {n} is", "first": "quick" * (n % 3 + 1), "second": "lazy", "label": n % 2}
        for n in range(12)
    ]
    (folder / "foxes.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "foxes.yaml").write_text(TASK.format(data=folder / "foxes.jsonl"))
    (folder / "lost.yaml").write_text(TASK.format(data=folder / "lost.jsonl").replace("task: foxes", "task: lost"))
    return folder


def small_model():
    return tiny_model("llama", max_position_embeddings=256).eval(), character_tokenizer()


def test_missing_data_of_a_task_is_told_before_the_text_is_evaluated(task_dir, tmp_path):
    (tmp_path / "text.txt").write_text("quick foxes. " * 40)
    model, tokenizer = small_model()
    seen = []
    with pytest.raises(secateur.SecateurError, match="the data of lost could not be read"):
        secateur.evaluate(
            *(model, tmp_path / "text.txt"), tokenizer=tokenizer, seq_len=32, tasks="lost", task_dir=task_dir,
            progress=lambda *step: seen.append(step),
        )  # fmt: skip
    assert not seen


def test_a_task_that_is_mended_is_known(tmp_path, monkeypatch):
    """In one process, as in a notebook; the folder goes by the home folder too. Without the tasks that come along."""
    task_manager = pytest.importorskip("lm_eval.tasks", reason="lm-evaluation-harness is the extra `eval`").TaskManager
    index = lru_cache(maxsize=1)(lambda folder, _: task_manager(include_path=str(folder), include_defaults=False))
    monkeypatch.setattr("secateur.evaluation.tasks._read_index", index)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "own").mkdir()
    with pytest.raises(secateur.SecateurError, match="'foxes' is not known"):
        check_tasks(["foxes"], "~/own", None)
    (tmp_path / "own" / "foxes.yaml").write_text(TASK.format(data="foxes.jsonl"))
    check_tasks(["foxes"], "~/own", None)


@pytest.mark.parametrize("options", [{"task_limit": 5}, {"task_dir": "anywhere"}])
def test_options_of_tasks_without_a_task_are_refused(options):
    (name,) = options
    with pytest.raises(secateur.SecateurError, match=f"{name} is for tasks, and none is named"):
        secateur.evaluate(None, **options)


def test_figures_equal_the_harness_called_by_hand(task_dir):
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    model, tokenizer = small_model()
    found = run_tasks(model, tokenizer, ["foxes"], task_dir)
    by_hand = simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer),
        tasks=["foxes"],
        task_manager=TaskManager(include_path=str(task_dir), include_defaults=False),
    )["results"]["foxes"]
    assert found == {"foxes": {name: by_hand[name] for name in ("acc,none", "acc_norm,none")}}
    assert headline(found["foxes"]) == by_hand["acc_norm,none"]


@pytest.mark.parametrize(
    ("tasks", "options", "message"),
    [
        (["no_such_task"], {}, "task 'no_such_task' is not known"),
        (["foxes"], {"task_dir": "/nowhere"}, "is not a folder"),
        (["foxes"], {"limit": 0}, "task_limit is 0"),
    ],
)
def test_bad_requests_are_named(task_dir, tasks, options, message):
    model, tokenizer = small_model()
    with pytest.raises(ValueError, match=message):
        run_tasks(model, tokenizer, tasks, **({"task_dir": task_dir} | options))


def test_piqa_and_blimp_equal_the_harness(shared, tmp_path):
    """The project's own example, on a few documents of the real sets."""
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is the extra `eval`")
    import importlib.util
    from pathlib import Path

    script = Path(__file__).parents[1] / "benchmarks" / "make_tasks.py"
    spec = importlib.util.spec_from_file_location("make_tasks", script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.write(shared / "data", tmp_path)
    model, tokenizer = tiny_model("llama", max_position_embeddings=2048).eval(), character_tokenizer()
    found = run_tasks(model, tokenizer, ["piqa_local", "blimp_local"], tmp_path, limit=3)
    assert set(found["piqa_local"]) == {"acc,none", "acc_norm,none"}
    sets = [values["acc,none"] for name, values in found.items() if name.startswith("blimp_local_")]
    assert len(sets) == 6
    assert found["blimp_local"]["acc,none"] == pytest.approx(sum(sets) / 6)


def test_divergence_from_an_equal_model_is_nothing(text):
    model, tokenizer = small_model()
    with pytest.raises(ValueError, match="can't be compared with itself"):
        secateur.evaluate(model, text, seq_len=32, tokenizer=tokenizer, against=model)
    with pytest.raises(ValueError, match="the model is on cpu and the dense one on meta: put both on one device"):
        secateur.evaluate(model, text, seq_len=32, tokenizer=tokenizer, against=tiny_model("llama").to("meta"))
    dense = tiny_model("llama", max_position_embeddings=256)
    figures = secateur.evaluate(model, text, seq_len=32, tokenizer=tokenizer, against=dense)
    assert dense.training, "its mode is given back"
    assert figures["against"]["kl"] == pytest.approx(0.0, abs=1e-6)
    assert figures["against"]["top1_agreement"] == 1.0


@pytest.mark.parametrize("in_chunks", [False, True])
def test_divergence_equals_a_plain_loop(text, monkeypatch, in_chunks):
    model, tokenizer = small_model()
    dense = tiny_model("llama", seed=1, max_position_embeddings=256).eval()
    if in_chunks:
        monkeypatch.setattr("secateur.models.head.LOGIT_ELEMENTS", 2 * 128 * 5)
    asked = {"text": text, "seq_len": 32, "max_tokens": 320, "tokenizer": tokenizer}
    figures, alone = secateur.evaluate(model, **asked, against=dense), secateur.evaluate(model, **asked)
    found = figures.pop("against")
    assert figures.pop("text") == alone.pop("text")
    assert figures == pytest.approx(alone, rel=1e-6)
    assert found["perplexity"] == pytest.approx(secateur.evaluate(dense, **asked)["perplexity"], rel=1e-6)
    ids = torch.tensor(tokenizer(TEXT).input_ids)[:320].view(10, 32)
    with torch.no_grad():
        p, q = (each(ids).logits[:, :-1].double().log_softmax(-1) for each in (dense, model))
    assert found["kl"] == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-5)
    assert found["top1_agreement"] == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).double().mean()))


def test_models_with_other_vocabularies_are_refused(text):
    model, tokenizer = small_model()
    dense = tiny_model("llama", vocab_size=64)
    with pytest.raises(ValueError, match="vocabulary of 128 and the dense one of 64"):
        secateur.evaluate(model, text, seq_len=32, tokenizer=tokenizer, against=dense)
