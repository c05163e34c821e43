"""Does it fit? The memory that a run is estimated to need, without model, data or GPU.

    python -m tools.memory              # 3B and 7B on the cards of docs/3b.md
    python -m tools.memory --size 7b --ranks 4 --beta 0    # any of currreft's flags
"""

import argparse
import sys

from transformers import Qwen2_5_VLConfig

from currreft import parse_args
from support.flags import check_values
from support.memory import OVERHEAD, host_needed, memory_needed
from support.words import command

SIZES = {  # of the released configurations, what decides; the vision towers differ in their output
    "3b": {"hidden_size": 2048, "intermediate_size": 11_008, "num_attention_heads": 16,
           "num_hidden_layers": 36, "num_key_value_heads": 2, "vocab_size": 151_936},
    "7b": {"hidden_size": 3584, "intermediate_size": 18_944, "num_attention_heads": 28,
           "num_hidden_layers": 28, "num_key_value_heads": 4, "vocab_size": 152_064}}
LEAN = "--checkpoint_activations"
CARDS = (("3b", 1, 80, LEAN), ("3b", 8, 80, ""), ("3b", 8, 40, LEAN),
         ("3b", 32, 80, "--prompts_per_step 32"), ("3b", 1, 32, f"{LEAN} --offload"),
         ("3b", 1, 24, f"{LEAN} --offload --beta 0.0 --max_rows 32"), ("7b", 8, 80, LEAN),
         ("7b", 1, 80, f"{LEAN} --offload"))  # size, GPUs, GB of each, flags


def configuration(size):
    """The released configuration of "3b" or "7b", as far as memory goes."""
    vision = {"hidden_size": 1280, "out_hidden_size": SIZES[size]["hidden_size"]}
    return Qwen2_5_VLConfig(text_config=SIZES[size], vision_config=vision,
                            tie_word_embeddings=size == "3b")


def estimate(size, ranks, flags, prompt_length=None):
    """{what: GiB per GPU} in bfloat16; "estimated": the worst moment; "host": of a machine of 8 GPUs at most."""
    cfg, config = parse_args([*flags, "--dtype", "bfloat16"]), configuration(size)
    needed = memory_needed(config, cfg, ranks, prompt_length)
    host = host_needed(config, cfg, ranks, here=min(ranks, 8))
    return {name: n / 2**30 for name, n in {**needed, "estimated": sum(needed.values()), "host": host}.items()}


@command
def main(argv=None):
    """Print the table of docs/3b.md, or one line for the size, ranks and flags that are given."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False,
                                     epilog="and currreft's flags")
    parser.add_argument("--size", choices=SIZES, default="3b")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--prompt_length", type=int, help="tokens of the longest prompt")
    given = sys.argv[1:] if argv is None else argv
    args, flags = parser.parse_known_args(given)
    check_values(vars(args))
    cards = [(args.size, args.ranks, "?", " ".join(flags))] if given else CARDS
    print(f"GiB per GPU; up to {OVERHEAD / 2**30:.1f} more for CUDA itself and captured steps\n")
    for number, (size, ranks, card, flags) in enumerate(cards):
        found = estimate(size, ranks, flags.split(), args.prompt_length)
        if number == 0:
            print(f"| size | GPUs | flags | {' | '.join(found)} |\n|{'---|' * (3 + len(found))}")
        cells = size, f"{ranks} x {card} GB", flags or "-", *(f"{n:.1f}" for n in found.values())
        print("|", " | ".join(cells), "|")


if __name__ == "__main__":
    sys.exit(main())
