"""How fast it is, beside other programs, on this machine.

    python -m bench                      rollouts, an update, steps: of 3B where there is a GPU (docs/3b.md)
    python -m bench --against generate   rollouts beside transformers' generate, at eight sizes
    python -m bench --against vllm --python ENV/bin/python       beside vLLM, eager and compiled
    python -m bench --against trl        whole training steps beside TRL's GRPOTrainer, on a CPU
    python -m bench --prompts            groups that keep their prompt once, beside copies, on a CPU
    python -m bench --json > out.json    any of them, for machines

Weights are random: the work is the same. docs/speed.md has figures, and what to install. B prompts
of P tokens, G completions of each, C tokens long; pictures `side` pixels wide. What does not fit on
a card is left out, and said at the end.
"""

import argparse
import gc
import json
import platform
import sys
import time
from functools import partial

import torch
import transformers

from bench.ground import MODEL_SIZES, bandwidth, build
from bench.rollouts import beside_generate, beside_vllm, engine_alone, shared_prompts
from bench.updates import beside_trl, full_step, group_update
from support.base import first_line
from support.ranks import usable_gpu
from support.words import UserError, command, say

LENGTHS = [{"B": B, "G": 8, "P": P, "C": C} for P in (100, 600) for B in (4, 8) for C in (64, 128)]
STEPS = [{"B": 8, "G": 8, "C": 64, "side": 84},    # short, as in the demo
         {"B": 2, "G": 8, "C": 200, "side": 560}]  # long, and most of it picture


ROLLOUTS = [{"B": B, "G": 8, "P": P, "C": 512} for P in (600, 4000) for B in (1, 8)]  # on a GPU
TRAINED = [{"B": 8, "G": 8, "C": 512, "side": 616},  # a step of 3B on 80 GB, and on 24
           {"B": 4, "G": 8, "C": 512, "side": 616, "offload": True, "beta": 0.0}]


def asked_for(args, size, device):
    """{title: a function without arguments that measures}."""
    if args.against or args.prompts:
        measure = {"vllm": partial(beside_vllm, args.python), "trl": beside_trl,
                   "generate": beside_generate, None: shared_prompts}[args.against]
        cases = [(measure, shape) for shape in (STEPS if args.against == "trl" else LENGTHS)]
    else:
        cases = [(beside_generate, LENGTHS[1]), (beside_generate, LENGTHS[5]),
                 (group_update, {"G": 8, "P": 600, "C": 200})]
        if device == "cuda":
            cases += [*((engine_alone, shape) for shape in ROLLOUTS), *((full_step, shape) for shape in TRAINED)]
    return {", ".join(f"{name} {value}" for name, value in shape.items()):
            partial(measure, size, device, args.repeats, **shape) for measure, shape in cases}


def machine(size, device):
    """What is measured, on what, and when."""
    parameters = sum(p.numel() for p in build(size, "meta")[0].parameters())
    cpu = f"{platform.machine()} CPU ({torch.backends.cpu.get_cpu_capability()})"
    return {"date": time.strftime("%Y-%m-%d"), "model": f"{size}, {parameters:,} parameters",
            "hardware": torch.cuda.get_device_name() if device == "cuda" else cpu,
            "memory copies, GB/s": bandwidth(device) / 1e9, "threads": torch.get_num_threads(),
            "torch": torch.__version__, "transformers": transformers.__version__}


def measured(measure, device):
    """Figures of a measure, with a card's memory in GiB; or that it did not fit."""
    gc.collect()  # the last one's model goes before the next is made
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    try:
        figures = measure()
    except RuntimeError as error:  # torch's own, or CUDA's while it captures
        if "memory" not in str(error):
            raise
        return {"did not fit": first_line(error)}
    if device == "cuda":
        free, total = torch.cuda.mem_get_info()
        figures |= {"peak GiB": torch.cuda.max_memory_allocated() / 2**30,  # and CUDA's own, with its graphs:
                    "beside it GiB": (total - free - torch.cuda.memory_reserved()) / 2**30}
    return figures


@command
def main(argv=None):
    """Print a table; with --json on standard error, and JSON of the same on standard output."""
    parser = argparse.ArgumentParser("python -m bench", description=__doc__.splitlines()[0],
                                     allow_abbrev=False)
    parser.add_argument("--size", choices=MODEL_SIZES, help="of the model (default: 3b on a GPU, else small)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    table = parser.add_mutually_exclusive_group()
    table.add_argument("--against", choices=("generate", "trl", "vllm"), help="another program")
    table.add_argument("--prompts", action="store_true", help="of groups, kept once or copied")
    parser.add_argument("--python", default=sys.executable, help="the one that has vLLM")
    args = parser.parse_args(argv)
    device = "cuda" if usable_gpu() and args.against != "trl" and not args.prompts else "cpu"
    size = args.size or ("3b" if device == "cuda" else "small")
    if size == "3b" and device == "cpu":
        raise UserError("--size 3b needs a GPU, and --against trl and --prompts are measured on a CPU")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    report, cases = {}, {"machine": partial(machine, size, device)} | asked_for(args, size, device)
    for title, measure in cases.items():
        report[title] = measured(measure, device)
        print(title, *(f"{name:<32}{value if isinstance(value, str) else f'{value:.4g}'}"
                       for name, value in report[title].items()), sep="\n    ", flush=True,
              file=sys.stderr if args.json else sys.stdout)
    if left_out := [title for title, figures in report.items() if "did not fit" in figures]:
        say(f"did not fit in the memory that is there: {'; '.join(left_out)}")
    if args.json:
        print(json.dumps(report, indent=1))


if __name__ == "__main__":
    sys.exit(main())
