"""vLLM's side of bench/rollouts.py, run by the Python that has it. Lines of JSON in, and out."""

import json
import os
import sys
import time

if __name__ == "__main__":
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the work in this process, whose CPU time is told
        "VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else is printed goes where errors go
    import vllm
    first = json.loads(sys.stdin.readline())
    cpu = first["device"] == "cpu"
    llm = vllm.LLM(
        first["model"], dtype="float32" if cpu else "bfloat16", seed=0,
        enforce_eager=first["mode"] == "eager", generation_config="vllm",
        max_model_len=1024, max_num_seqs=64, max_num_batched_tokens=16_384,
        limit_mm_per_prompt={"image": 0, "video": 0},
        block_size=32,  # a group shares whole blocks; in larger ones, short prompts share nothing
        **({} if cpu else {"gpu_memory_utilization": 0.4}))  # the engine has the same card
    print(json.dumps({"version": vllm.__version__}), file=answers, flush=True)
    for asked in map(json.loads, sys.stdin):
        settings = vllm.SamplingParams(
            n=asked["n"], temperature=asked["temperature"], max_tokens=asked["new"],
            logit_bias={token: -100.0 for token in asked["banned"]} or None,
            ignore_eos=True, detokenize=False)
        llm.reset_prefix_cache()
        wall, cpu = time.perf_counter(), time.process_time()
        outputs = llm.generate([{"prompt_token_ids": ids} for ids in asked["prompts"]], settings,
                               use_tqdm=False)
        cost = time.perf_counter() - wall, time.process_time() - cpu
        tokens = [list(one.token_ids) for each in outputs for one in each.outputs]
        print(json.dumps({"cost": cost, "tokens": tokens}), file=answers, flush=True)
