"""Fine-tuning that keeps every zero: a plain loop, the Trainer, a merged LoRA; and a broken mask that is found."""

from __future__ import annotations

import pytest
import torch
from models import TEXT, character_tokenizer, save_checkpoint, tiny_model, tokens
from torch.optim.optimizer import _global_optimizer_post_hooks
from torch.utils.data import Dataset

import secateur

STEPS = 20


@pytest.fixture
def pruned():
    model = tiny_model("llama")
    secateur.prune(model, pattern="2:4", solver="magnitude", calibration=tokens())
    return model.train()


def weights_of(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters() if "proj" in name}


def assert_only_zeros_kept(model, before):
    now = {name.replace("base_model.model.", ""): parameter for name, parameter in model.named_parameters()}
    assert len(before) == 14
    for name, weight in before.items():
        zero = weight == 0
        assert zero.float().mean() >= 0.5
        assert (now[name][zero] == 0).all(), name
        assert not now[name][zero].signbit().any(), name  # -0.0 is a value for packing
    assert any(not torch.equal(now[name], weight) for name, weight in before.items())


def train(model, optimizer):
    losses = []
    for ids in (tokens() * STEPS)[:STEPS]:
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(
    "optimizer",
    [lambda p: torch.optim.SGD(p, 0.5, momentum=0.9, weight_decay=0.01), lambda p: torch.optim.AdamW(p, 1e-2),
     lambda p: torch.optim.AdamW(p, 1e-2, foreach=True), lambda p: torch.optim.RMSprop(p, 1e-3, centered=True)],
    ids=["sgd", "adamw", "foreach", "rmsprop"],
)  # fmt: skip
def test_a_plain_loop(pruned, optimizer):
    before = weights_of(pruned)
    with secateur.keep_zeros(pruned) as held:
        losses = train(pruned, optimizer(pruned.parameters()))
        assert held.broken() == []
        assert sorted(held.names) == sorted(before)
    assert_only_zeros_kept(pruned, before)
    assert losses[-1] < losses[0]
    train(pruned, torch.optim.SGD(pruned.parameters(), 0.1))  # outside of the context nothing is held
    assert any((pruned.get_parameter(name)[weight == 0] != 0).any() for name, weight in before.items())


class Sequences(Dataset):
    def __len__(self):
        return 32

    def __getitem__(self, index):
        ids = tokens(1, 16, seed=index)[0][0]
        return {"input_ids": ids, "labels": ids}


def test_the_trainer(pruned, tmp_path):
    from transformers import Trainer, TrainingArguments

    before = weights_of(pruned)
    arguments = TrainingArguments(
        tmp_path, max_steps=STEPS, per_device_train_batch_size=2, learning_rate=1e-2, report_to=[], use_cpu=True,
        save_strategy="no", weight_decay=0.1, gradient_accumulation_steps=2, disable_tqdm=True,
    )  # fmt: skip
    Trainer(pruned, arguments, train_dataset=Sequences(), callbacks=[secateur.KeepZerosCallback()]).train()
    assert_only_zeros_kept(pruned, before)


def test_a_lora_is_merged_under_the_mask(pruned):
    peft = pytest.importorskip("peft")
    before = weights_of(pruned)
    config = peft.LoraConfig(target_modules=["q_proj", "up_proj", "down_proj"], r=4, task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(pruned, config)
    losses = train(adapted, torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], 1e-2))
    assert losses[-1] < losses[0]
    with secateur.keep_zeros(adapted):
        merged = adapted.merge_and_unload()
    assert_only_zeros_kept(merged, before)


def test_a_model_without_zeros_is_refused():
    with pytest.raises(secateur.SecateurError, match="no matrix of this LlamaForCausalLM has zeros to keep"):
        secateur.keep_zeros(tiny_model("llama"))


def test_inspect_tells_a_kept_mask_from_a_broken_one(tmp_path):
    from transformers import AutoModelForCausalLM

    save_checkpoint(tmp_path / "model", dtype=torch.float32)
    (tmp_path / "text.txt").write_text(TEXT)
    secateur.prune(tmp_path / "model", tmp_path / "pruned", pattern="50%", solver="magnitude", samples=4, seq_len=32,
                   calibration=tmp_path / "text.txt")  # fmt: skip
    for name in ("kept", "broken"):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned")
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        if name == "kept":
            with secateur.keep_zeros(model):
                train(model, optimizer)
        else:
            train(model, optimizer)
        model.save_pretrained(tmp_path / name)
        character_tokenizer().save_pretrained(tmp_path / name)
        secateur.Report.load(tmp_path / "pruned").save(tmp_path / name)
    assert secateur.inspect(tmp_path / "kept").problems == []
    problems = secateur.inspect(tmp_path / "broken").problems
    assert len(problems) == 14
    assert "secateur.keep_zeros(model)" in problems[0]


@pytest.fixture
def adapted(pruned):
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(pruned, peft.LoraConfig(target_modules=["up_proj"], r=4, task_type="CAUSAL_LM"))


def test_an_adapter_inside_of_the_base_model_learns(pruned, adapted):
    """Half of a LoRA begins as zeros alone. That is not a mask."""
    with secateur.keep_zeros(pruned):
        train(adapted, torch.optim.AdamW([each for each in adapted.parameters() if each.requires_grad], 1e-2))
    halves = [each for name, each in adapted.named_parameters() if "lora_B" in name]
    assert halves
    assert all((each != 0).any() for each in halves)


def test_the_callback_refuses_an_adapter(adapted):
    with pytest.raises(secateur.SecateurError, match="train without KeepZerosCallback, and merge it inside"):
        secateur.KeepZerosCallback().on_train_begin(None, None, None, model=adapted)


def test_training_that_was_interrupted_holds_no_model(pruned):
    """No `on_train_end` comes after Ctrl-C or an out-of-memory error."""
    callback = secateur.KeepZerosCallback()
    for _ in range(2):
        callback.on_train_begin(None, None, None, model=pruned)
    assert len(_global_optimizer_post_hooks) == 1
    del callback
    assert len(_global_optimizer_post_hooks) == 0
    before = weights_of(pruned)
    train(pruned, torch.optim.SGD(pruned.parameters(), 0.1))
    assert any((pruned.get_parameter(name)[weight == 0] != 0).any() for name, weight in before.items())


def test_weights_that_are_replaced_are_told(pruned):
    held, dense = secateur.keep_zeros(pruned), tiny_model("llama", seed=1)
    with pytest.raises(secateur.SecateurError, match="14 sparse matrices were replaced by other tensors"), held:
        pruned.load_state_dict(dense.state_dict(), assign=True)


def test_weights_that_are_loaded_in_place_are_held(pruned):
    before = weights_of(pruned)
    with secateur.keep_zeros(pruned):
        pruned.load_state_dict(tiny_model("llama", seed=1).state_dict())
    assert_only_zeros_kept(pruned, before)
