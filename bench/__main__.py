"""How fast it is, beside other programs, on this machine.

    python -m bench                      rollouts and updates; on a CPU about 5 minutes
    python -m bench --size 3b            a GPU: the real size with random bfloat16 weights
    python -m bench --against generate   rollouts beside transformers' generate, at eight sizes
    python -m bench --against vllm --python ENV/bin/python       beside vLLM, eager and compiled
    python -m bench --against trl        whole training steps beside TRL's GRPOTrainer
    python -m bench --prompts            groups that keep their prompt once, beside copies
    python -m bench --json > out.json    any of them, for machines

Weights are random: the work is the same. docs/speed.md has figures, and what to install. B prompts
of P tokens, G completions of each, C tokens long; pictures `side` pixels wide.
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

from bench.ground import MODEL_SIZES, build
from bench.rollouts import beside_generate, beside_vllm, shared_prompts
from bench.updates import beside_trl, full_step, group_update
from support.words import UserError, command

LENGTHS = [{"B": B, "G": 8, "P": P, "C": C} for P in (100, 600) for B in (4, 8) for C in (64, 128)]
STEPS = [{"B": 8, "G": 8, "C": 64, "side": 84},    # short, as in the demo
         {"B": 2, "G": 8, "C": 200, "side": 560}]  # long, and most of it picture


def asked_for(args, device):
    """{title: a function without arguments that measures}."""
    if args.against or args.prompts:
        measure = {"vllm": partial(beside_vllm, args.python), "trl": beside_trl,
                   "generate": beside_generate, None: shared_prompts}[args.against]
        cases = [(measure, shape) for shape in (STEPS if args.against == "trl" else LENGTHS)]
    else:
        cases = [(beside_generate, LENGTHS[1]), (beside_generate, LENGTHS[5]),
                 (group_update, {"G": 8, "P": 600, "C": 200})]
        cases += [(full_step, {"B": 8, "G": 8, "C": 512, "side": 616})] * (device == "cuda")
    return {", ".join(f"{name} {value}" for name, value in shape.items()):
            partial(measure, args.size, device, args.repeats, **shape) for measure, shape in cases}


def machine(size, device):
    """What is measured, on what, and when."""
    parameters = sum(p.numel() for p in build(size, "meta")[0].parameters())
    cpu = f"{platform.machine()} CPU ({torch.backends.cpu.get_cpu_capability()})"
    return {"date": time.strftime("%Y-%m-%d"), "model": f"{size}, {parameters:,} parameters",
            "hardware": torch.cuda.get_device_name() if device == "cuda" else cpu,
            "threads": torch.get_num_threads(), "torch": torch.__version__,
            "transformers": transformers.__version__}


@command
def main(argv=None):
    """Print a table; with --json on standard error, and JSON of the same on standard output."""
    parser = argparse.ArgumentParser("python -m bench", description=__doc__.splitlines()[0],
                                     allow_abbrev=False)
    parser.add_argument("--size", choices=MODEL_SIZES, default="small")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    table = parser.add_mutually_exclusive_group()
    table.add_argument("--against", choices=("generate", "trl", "vllm"), help="another program")
    table.add_argument("--prompts", action="store_true", help="of groups, kept once or copied")
    parser.add_argument("--python", default=sys.executable, help="the one that has vLLM")
    args = parser.parse_args(argv)
    device = "cuda" if torch.cuda.is_available() and args.against != "trl" else "cpu"
    if args.size == "3b" and device == "cpu":
        raise UserError("--size 3b needs a GPU, and --against trl is measured on a CPU")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    report, cases = {}, {"machine": partial(machine, args.size, device)} | asked_for(args, device)
    for title, measure in cases.items():
        report[title] = measure()
        print(title, *(f"{name:<32}{value if isinstance(value, str) else f'{value:.4g}'}"
                       for name, value in report[title].items()), sep="\n    ", flush=True,
              file=sys.stderr if args.json else sys.stdout)
        gc.collect()  # its model goes before the next one's is made
    if args.json:
        print(json.dumps(report, indent=1))


if __name__ == "__main__":
    sys.exit(main())
