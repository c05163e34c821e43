"""The other side of tools/against.py: runs in the Python that has vLLM, which need not have anything of this project's.

Each line of standard input is a request in JSON: the first a checkpoint to load, every later one prompts to complete.
Each is answered by a line of JSON.
"""

import json
import os
import sys
import time

if __name__ == "__main__":
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # its work in this very process, whose CPU time is told
                   "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1",
                   "VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else is printed goes where errors go

    import vllm

    def say(**answer):
        print(json.dumps(answer), file=answers, flush=True)

    first = json.loads(sys.stdin.readline())
    size = {} if first["device"] == "cpu" else {"gpu_memory_utilization": 0.4}  # the engine has the same card
    llm = vllm.LLM(first["model"], dtype="float32" if first["device"] == "cpu" else "bfloat16",
                   enforce_eager=first["eager"], max_model_len=first["longest"] + 16, max_num_seqs=first["rows"],
                   max_num_batched_tokens=16_384, generation_config="vllm", seed=0,
                   limit_mm_per_prompt={"image": 0, "video": 0}, **size)
    say(version=vllm.__version__)
    for line in sys.stdin:
        asked = json.loads(line)
        settings = vllm.SamplingParams(
            n=asked["n"], temperature=asked["temperature"], max_tokens=asked["new"], ignore_eos=True, detokenize=False,
            logit_bias={token: -100.0 for token in asked.get("banned", ())} or None)
        llm.reset_prefix_cache()
        wall, cpu = time.perf_counter(), time.process_time()
        outputs = llm.generate([{"prompt_token_ids": ids} for ids in asked["prompts"]], settings, use_tqdm=False)
        cost = time.perf_counter() - wall, time.process_time() - cpu
        say(cost=cost, tokens=[list(one.token_ids) for each in outputs for one in each.outputs])
