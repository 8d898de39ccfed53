"""Ten steps follow Hugging Face Trainer's losses and end at its weights, in float32 and the same order."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from tests import tiny
from trainwright import build, loop
from trainwright.adapt import lora
from trainwright.data.loader import TextBatch


def examples(batches):
    """Our micro-batches as Trainer's examples: labels unshifted, padding behind."""
    found = []
    for batch in batches:
        assert isinstance(batch, TextBatch)
        labels = torch.cat([torch.full((len(batch.labels), 1), -100), batch.labels[:, :-1]], 1)
        mask = (batch.positions == torch.arange(batch.tokens.shape[1])).long()
        found += [
            {"input_ids": t, "labels": y, "attention_mask": m} for t, y, m in zip(batch.tokens, labels, mask, strict=True)
        ]
    return found


class NotingTrainer(Trainer):
    """Keeps each step's loss, unrounded."""

    def training_step(self, *arguments, **options):
        loss = super().training_step(*arguments, **options)
        self.losses = [*getattr(self, "losses", []), loss.item()]
        return loss


def theirs(model, data, folder, decay):
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=10, per_device_train_batch_size=4, learning_rate=5e-3, lr_scheduler_type="linear",
        warmup_steps=0, weight_decay=decay, max_grad_norm=0.5, optim="adamw_torch", train_sampling_strategy="sequential",
        report_to="none", save_strategy="no", logging_strategy="no", disable_tqdm=True, use_cpu=True,
        dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = NotingTrainer(model=model, args=arguments, train_dataset=data)
    trainer.train()
    return trainer.losses


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")
def test_ten_steps(tmp_path, method):
    adapt = {"adapt__method": "lora", "adapt__rank": 4, "adapt__alpha": 8} if method == "lora" else {}
    recipe = tiny.recipe(
        tmp_path, **adapt, data__packing=False, data__held_out=None, training__steps=10, training__batch_size=4,
        training__micro_batch_size=4, training__clip_norm=0.5, optimizer__learning_rate=5e-3, optimizer__weight_decay=0.1,
    )  # fmt: skip
    run = build.assemble(recipe)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    if method == "lora":
        config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(model, config)
        ours = dict(run.model.named_parameters())
        with torch.no_grad():  # the same random A
            for name, parameter in model.named_parameters():
                if "lora_A" in name:
                    parameter.copy_(ours[name.removeprefix("base_model.model.").replace(".default.weight", "")])
    data = examples([batch for step in range(10) for batch in run.batch(step)])
    losses = theirs(model, data, tmp_path / "peer", 0.1)
    mine = [result.loss for result in loop.train(run)]
    assert mine == pytest.approx(losses, rel=1e-4)
    assert mine[-1] < mine[0]
    ends = dict(model.named_parameters())
    for name, parameter in run.model.named_parameters():
        other = f"base_model.model.{name}.default.weight" if lora.is_factor(name) else name
        if parameter.requires_grad:
            torch.testing.assert_close(parameter, ends[other], rtol=1e-3, atol=2e-4, msg=name)
