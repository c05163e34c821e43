"""Updates: a group packed beside separate rows, and whole steps alone or beside TRL's."""

import tempfile
import time
from dataclasses import replace

import torch
import transformers

from bench.ground import Cost, build, compared, alternately, make_prompt, as_transformers, plain_inputs, timed
from currreft import Config, Run, Stage, group_advantages, rollout, update
from data import instruction
from packed import attach_attention, forbidden_bias, pack, token_logps
from rewards import Example, accuracy_reward, format_reward
from support.optimizer import ShardedAdamW
from support.tiny import tiny_image
from support.words import UserError

STAGE = Stage(0, "open", 10**6)


def group_update(size, device, repeats, G, P, C):
    """Forward and backward of a group in one row, beside a row for each completion as elsewhere."""
    model, processor = build(size, device)
    prompt, bias = make_prompt(processor, P), forbidden_bias(model, processor)
    group = torch.randint(0, 300, (G, C), generator=torch.Generator().manual_seed(0))
    rows = [replace(prompt, input_ids=torch.cat([prompt.input_ids, tokens])) for tokens in group]

    def packed():
        row = pack(attach_attention(model).train(), [prompt], [group.tolist()]).to(device)
        token_logps(model, row, bias).sum().backward()
        model.zero_grad()

    def separate():
        inputs = plain_inputs(processor, rows, device)
        out = as_transformers(model).train()(**inputs, use_cache=False, logits_to_keep=C + 1)
        logps = out.logits[:, :-1].float().log_softmax(-1)
        logps.gather(2, inputs["input_ids"][:, P:, None]).sum().backward()
        model.zero_grad()
    return compared(alternately({"packed": packed, "separate": separate}, repeats), device)


def our_run(size, device, folder, B, G, C, side, **settings):
    """A Run at the start of a stage; B questions about a picture each, `side` pixels wide."""
    build(size, device, folder)
    examples = [Example(problem=f"How many boxes are there in picture {i}?", solution="1", images=(
        str(tiny_image(f"{folder}/{i}.png", (side, side), box=(i, i, 40, 40))),)) for i in range(B)]
    cfg = Config(model=folder, out=folder, prompts_per_step=B, num_generations=G,
                 max_completion_length=C, max_rows=B * G, **settings)
    run = Run(cfg, torch.device(device), {"open": examples})
    run.load_weights(folder)
    run.load_reference(STAGE)
    run.processor.end_ids = (-1,)  # nothing ends a completion
    run.bias = forbidden_bias(run.policy, run.processor)
    run.optimizer = ShardedAdamW(run.policy.named_parameters(), run.cfg.offload)
    return run


def our_step(run):
    """`currreft.grpo_step` without its log, the same prompts each time."""
    groups = rollout(run, STAGE, 0)
    for group in groups:
        group.rewards = torch.tensor([paid(o.text, group.example) for o in group.completions])
        group.advantages = group_advantages(group.rewards)
    update(run, STAGE, 0, groups)


def paid(text, example):
    """Rewards, and a bit by length: random text earns nothing, and equal rewards teach nothing."""
    return accuracy_reward(text, example) + format_reward(text, example) + len(text) % 7 / 7


def full_step(size, device, repeats, B, G, C, side, **settings):
    """A step of full fine-tuning alone, activations checkpointed."""
    with tempfile.TemporaryDirectory() as folder:
        run = our_run(size, device, folder, B, G, C, side, checkpoint_activations=True, **settings)
        figures = compared(alternately({"step": lambda: our_step(run)}, repeats), device)
    graphs = len(run.policy.engine.graphs)
    return {**figures, "graphs": graphs, "hours of 3,400 such steps": 3400 * figures["step s"] / 3600}


class Turns(transformers.TrainerCallback):
    """Between two of TRL's steps, which begin with reading pictures, one of ours."""

    def __init__(self, run):
        self.run, self.rounds = run, []

    def on_train_begin(self, *_, **__):
        self.wall, self.cpu = time.perf_counter(), time.process_time()

    def on_step_end(self, *_, **__):
        theirs = Cost(time.perf_counter() - self.wall, time.process_time() - self.cpu)
        self.rounds.append({"ours": timed(lambda: our_step(self.run)), "TRL": theirs})
        self.on_train_begin()


def beside_trl(size, device, repeats, B, G, C, side):
    """Whole steps in turn: same weights, prompts, pictures, lengths and loss."""
    try:
        import torchvision  # noqa: F401  TRL's processor asks for it
        import trl
        from datasets import Dataset, Image
    except (ImportError, RuntimeError) as error:  # RuntimeError: it is made for another torch
        raise UserError("--against trl needs pip install trl torchvision, the latter of torch's "
                        f"own build (docs/speed.md): {error}") from error

    def reward(completions, **_):
        return [paid(completion[0]["content"], examples[0]) for completion in completions]

    def checked(input_ids, **inputs):
        out = inner(input_ids=input_ids, **inputs)
        if {*map(tuple, input_ids.tolist())} != asked or out.shape[1] != C + input_ids.shape[1]:
            raise UserError("TRL has other prompts or lengths: there is nothing to compare")
        return out
    with tempfile.TemporaryDirectory() as folder:
        run = our_run(size, device, folder, B, G, C, side, micro_batch=B)
        examples, turns = run.examples["open"], Turns(run)
        asked = {tuple(run.processor(example).input_ids.tolist()) for example in examples}
        rows = [{"prompt": [{"role": "user", "content": f"{e.problem}\n{instruction(e)}"}],
                 "image": e.images[0]} for e in examples]
        trainer = trl.GRPOTrainer(
            model=folder, reward_funcs=reward, callbacks=[turns],
            train_dataset=Dataset.from_list(rows).cast_column("image", Image()),
            args=trl.GRPOConfig(
                output_dir=folder, max_steps=repeats + 1, use_cpu=True, bf16=False, beta=0.04,
                loss_type="grpo", num_generations=G, max_completion_length=C, disable_tqdm=True,
                per_device_train_batch_size=G, gradient_accumulation_steps=B,  # beats all at once
                generation_kwargs={"suppress_tokens": run.processor.tokenizer.all_special_ids},
                gradient_checkpointing=False, dataloader_pin_memory=False, logging_strategy="no",
                save_strategy="no", report_to="none"))
        trainer.remove_callback(transformers.PrinterCallback)
        inner, trainer.model.generate = trainer.model.generate, checked
        trainer.train()
    return {"TRL": trl.__version__, "prompt tokens": max(map(len, asked)),
            **compared(turns.rounds, device)}
