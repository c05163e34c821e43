"""The rollout engine: completions of prompts, many at once, one captured decode step after the other.

A prompt is prefilled once into a preallocated cache, long ones kept once a group; every decode step is tensor work on
fixed memory without a word from the host, so that on CUDA it is captured as a graph and replayed.

Shapes: n rows (completions) in flight, V vocabulary, H hidden size, D head size, T slots of a row's tail, P slots of a
prompt that is kept once, `width` rows of a group.
"""

from collections import deque
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from transformers import GenerationConfig, Qwen2_5_VLForConditionalGeneration

from data import Processor
from packed import attach_attention, forbidden_bias, pack, packed_hidden, prompt_positions, rms_norm
from support.base import base_config, check_weights, first_line
from support.words import UserError


def load_policy(path, device="cpu", dtype=None, max_pixels=401_408):
    """Read a Qwen2.5-VL directory or hub name; return (model in eval mode, processor).

    dtype: torch.bfloat16 on CUDA and torch.float32 elsewhere unless given. max_pixels None: the checkpoint's own.
    Only safetensors are read and no code from the checkpoint is run. UserError for what is not a whole Qwen2.5-VL
    checkpoint of finite floats (support/base.py).
    """
    dtype = dtype or (torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32)
    processor = Processor.from_pretrained(path, max_pixels)
    base_config(path, processor)
    try:
        model, loaded = Qwen2_5_VLForConditionalGeneration.from_pretrained(
            path, dtype=dtype, use_safetensors=True, ignore_mismatched_sizes=True, output_loading_info=True)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # not narrower: a damaged file raises what its reader meets
        raise UserError(f"{path}: cannot be loaded as a Qwen2.5-VL model: {first_line(error)}") from error
    check_weights(path, model.to(device), loaded)
    model.generation_config = GenerationConfig()  # the base's own file is copied; a contradiction in it stops no save
    return attach_attention(model.eval()), processor


@dataclass
class Completion:
    """One sampled answer: tokens up to and including its end token, and how likely each was when it was sampled."""

    tokens: list        # token ids
    logps: torch.Tensor # (len(tokens),) float32, of the tempered distribution (of the plain one when greedy)
    truncated: bool     # no end token within the allowed length
    text: str           # decoded, without special tokens
    entropy: torch.Tensor | None = None  # (len(tokens),) float32, nats, of the distribution of `logps`, before top_p


class Cache:
    """Keys and values at fixed addresses, each (layers, rows or groups, kv_heads, slots, D).

    tails: of every row; prompts: of every group, or None where each row's tail holds a copy of its prompt.
    """

    def __init__(self, model, groups, longest, rows, tail):
        text = model.config.text_config
        head = text.hidden_size // text.num_attention_heads

        def pair(count, slots):
            shape = (text.num_hidden_layers, count, text.num_key_value_heads, slots, head)
            return [torch.zeros(shape, dtype=model.dtype, device=model.device) for _ in range(2)]
        self.tails, self.prompts = pair(rows, tail), pair(groups, longest) if groups else None
        if groups:  # a product with many lines wants its keys side by side
            self.prompts[0] = self.prompts[0].view(*self.prompts[0].shape[:3], head, longest).mT
        self.prefill = []  # [(group, or its rows, start, stop)]: who gets the tokens start:stop of the packed row

    def update(self, key, value, layer, *_, **__):
        """Called by every attention layer during prefill: copies each prompt's keys and values to where it is kept."""
        for cache, new in zip(self.prompts or self.tails, (key, value)):
            for place, start, stop in self.prefill:
                cache[layer, place, :, :stop - start] = new[0, :, start:stop]
        return key, value


class Engine:
    """Generates with `rows` completions in flight; a finished row makes room for the next prompt.

    Each row keeps its tokens in cache slots 0.. of its tail, without padding, so rows of any length share a step. Where
    the prompts of groups are shared, each is kept once and its rows attend to it side by side; else every tail begins
    with a copy. A row's random numbers come from its own seed: a completion does not depend on which others share its
    batch.
    temperature 0 is greedy. top_p below 1 samples from the smallest set of tokens that holds that much probability.
    """

    def __init__(self, model, processor, prompt_length, rows, max_new, temperature=1.0, top_p=1.0, width=1,
                 capture=None, shared=None):
        device, self.settings = model.device, (rows, max_new, temperature, top_p, width)
        self.model, self.processor, self.max_new = model, processor, max_new
        self.temperature, self.top_p = temperature, top_p
        self.capture = device.type == "cuda" if capture is None else capture
        # Reading `done` stalls a GPU, and a captured step has a fixed number of slots: ask seldom, grow in large steps.
        self.stride, self.bucket = (16, 256) if device.type == "cuda" else (4, 16)
        self.shared = shares_prompts(device.type, prompt_length, rows, width) if shared is None else shared
        self.longest = -(-prompt_length // self.bucket) * self.bucket
        self.tail = -(-(max_new + self.longest * (not self.shared)) // self.bucket) * self.bucket
        # A group keeps its prompt while its rows end one by one, so there may be more groups than full ones.
        self.groups = 2 * rows // width if self.shared else rows
        self.cache = Cache(model, self.groups * self.shared, self.longest, rows, self.tail)
        self.bias = forbidden_bias(model, processor)
        self.end_ids = torch.tensor(processor.end_ids, device=device)
        self.rows, self.slots = (torch.arange(n, device=device) for n in (rows, self.longest + self.tail))
        # A rotation of x is x * cos + (x, its halves exchanged) * sin, with the sign of the exchange in the sine.
        cos, sin = model.model.language_model.rotary_emb(self.cache.tails[0], self.slots.expand(3, 1, -1))
        low, high = sin.chunk(2, -1)
        self.cos, self.sin = cos[0, :, None], torch.cat([-low, high], -1)[0, :, None]  # (P + T, 1, D)
        self.graphs, self.pool, self.side = {}, None, torch.cuda.Stream() if self.capture else None

        def zeros(*shape, dtype=torch.long):
            return torch.zeros(*shape, dtype=dtype, device=device)
        # A row or group that nobody owns is computed all the same: its one slot of zeros keeps it finite.
        self.group_length, self.first, self.end, self.count = zeros(self.groups) + 1, *zeros(2, rows), zeros(rows) + 1
        # Who stands where: rows of a group are neighbours in a table of (groups, width) places.
        self.row_at, self.place_of = zeros(self.groups * width), zeros(rows)
        self.done = torch.ones(rows, dtype=torch.bool, device=device)
        # One column more than is ever read: a finished row writes there, so that no step needs a condition.
        self.tokens = zeros(rows, max_new + 1)
        self.logps, self.entropy, self.uniform = (zeros(rows, max_new + 1, dtype=torch.float32) for _ in range(3))

    # -- one decode step: fixed memory, no host sync ------------------------------------------------------------------

    def _decode(self, n, T, groups=0, width=0, P=0):
        """Feed the newest token of rows 0..n-1, sample the next one. The whole of it is one CUDA graph.

        T, P: slots of tails and of shared prompts that are in use; these are groups 0..groups-1 of up to `width` rows.
        """
        rows, newest, cache = self.rows[:n], self.count[:n] - 1, self.cache
        slot, position = self.first[:n] + newest, self.end[:n] + newest
        x = self.model.get_input_embeddings()(self.tokens[rows, newest])  # (n, H)
        seats = self.row_at[:groups * width].view(groups, width), self.place_of[:n]
        unseen = self.slots[:T] > slot[:, None], self.slots[:P] >= self.group_length[:groups, None]
        masks = [torch.zeros_like(u, dtype=x.dtype).masked_fill_(u, -torch.inf)[:, None, None] for u in unseen]
        text, rotation = self.model.model.language_model, (self.cos[position], self.sin[position])
        for i, layer in enumerate(text.layers):
            q, *new = qkv(layer, x, rotation)
            for tail, values in zip(cache.tails, new):
                tail[i][rows, :, slot] = values
            tail = [tail[i, :n, :, :T] for tail in cache.tails]
            prompt = [prompt[i, :groups, :, :P] for prompt in cache.prompts or ()]
            out = attend_shared(q, tail, prompt, masks, seats) if prompt else attend_one(q, *tail, masks[0])
            x = x + layer.self_attn.o_proj(out.to(x.dtype))
            x = x + feed_forward(layer, x)
        self._sample(self.model.lm_head(rms_norm(text.norm, x)), rows)

    def _sample(self, logits, rows):
        """Draw a token for each of `rows` from logits (len(rows), V); book it and whether the row has ended."""
        logps = torch.add(self.bias, logits, alpha=1 / (self.temperature or 1.0)).log_softmax(-1)
        step, probs = self.count[rows], logps.exp()
        token = logps.argmax(-1) if self.temperature == 0 else \
            inverse_cdf(probs, self.uniform[rows, step], self.top_p)
        self.tokens[rows, step] = token
        self.logps[rows, step] = logps.gather(1, token[:, None])[:, 0]
        self.entropy[rows, step] = -(probs * logps).nansum(-1)  # 0 log 0 is NaN, and counts as 0
        self.count[rows] = count = step + ~self.done[rows]
        self.done[rows] |= (token[:, None] == self.end_ids).any(1) | (count == self.max_new)

    def step(self, *shape):
        """One decode step: replayed from a CUDA graph where there is one, recorded on first use."""
        if not self.capture:
            return self._decode(*shape)
        if shape not in self.graphs:
            self.side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.side):  # capture needs warm libraries: this first step is real, but eager
                self._decode(*shape)
            torch.cuda.current_stream().wait_stream(self.side)
            self.graphs[shape] = graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self.pool):
                self._decode(*shape)
            self.pool = graph.pool()
            return None
        return self.graphs[shape].replay()

    # -- rows come and go ---------------------------------------------------------------------------------------------

    def _admit(self, prompts, groups, rows, seeds):
        """Prefill prompts once each, into `groups`, and start their completions: rows and seeds are a list for each."""
        packed = pack(self.model, prompts, [[] for _ in prompts]).to(self.model.device)
        starts = [0, *torch.tensor([len(p.input_ids) for p in prompts]).cumsum(0).tolist()]
        index = [torch.tensor(r, device=self.model.device) for r in rows]
        self.cache.prefill = list(zip(groups if self.shared else index, starts, starts[1:]))
        hidden = packed_hidden(self.model, packed, self.cache)
        flat = torch.cat(index)
        owner = torch.tensor([b for b, r in enumerate(rows) for _ in r], device=self.model.device)
        lengths = torch.tensor([len(p.input_ids) for p in prompts], device=self.model.device)
        ends = torch.tensor([int(prompt_positions(self.model, p).max()) + 1 for p in prompts], device=self.model.device)
        self.group_length[torch.tensor(groups, device=self.model.device)] = lengths
        self.end[flat], self.first[flat] = ends[owner], lengths[owner] * (not self.shared)
        self.count[flat], self.done[flat] = 0, False
        if self.temperature:
            self.uniform[flat] = torch.stack([
                torch.rand(self.max_new + 1, generator=torch.Generator().manual_seed(seed))
                for group in seeds for seed in group]).to(self.uniform.device)
        last = torch.tensor(starts[1:], device=self.model.device) - 1
        self._sample(self.model.lm_head(hidden[last])[owner], flat)

    @torch.no_grad()
    def run(self, prompts, lengths, seeds, on_finish=None):
        """Complete each prompt (`lengths` tokens long) once for each of its seeds; returns a list of Completions each.

        on_finish(prompt number, its Completions) is called as soon as a prompt's last completion has ended.
        """
        results = [[None] * len(s) for s in seeds]
        waiting = deque(range(len(prompts)))
        owner = [None] * len(self.rows)  # row -> (prompt number, sample number)
        home = {}                        # prompt number -> its group
        n, seated = len(self.rows), None
        while waiting or any(owner):
            free = [row for row in range(n) if owner[row] is None]
            # Prefill in batches: wait until a quarter of the rows is free, unless nothing is left to do meanwhile.
            if waiting and (4 * len(free) >= n or len(free) == n):
                self._fill(prompts, lengths, seeds, waiting, free, owner, home)
                seated = None
            if not waiting and (fewer := self._compact(owner, n)) < n:
                n, seated = fewer, None
            seated = seated or self._seat(owner, home, n)
            reach = int((self.first + self.count)[:n].max()) + self.stride
            T, P = (min(-(-used // self.bucket) * self.bucket, most) for used, most in (
                (reach, self.tail), (max(lengths[number] for number in home), self.longest)))
            for _ in range(self.stride):
                self.step(n, T, *(*seated, P) if self.shared else ())
            self._harvest(results, owner, n, on_finish)
            for number in home.keys() - {which[0] for which in owner if which}:
                del home[number]
        return results

    def _fill(self, prompts, lengths, seeds, waiting, free, owner, home, token_budget=16_384):
        """Move waiting prompts into free rows, packed into prefills of at most `token_budget` tokens."""
        groups = sorted(set(range(self.groups)) - set(home.values()))
        while waiting and groups and len(seeds[waiting[0]]) <= len(free):
            batch, budget = [], token_budget
            while waiting and groups and len(seeds[waiting[0]]) <= len(free):
                budget -= lengths[waiting[0]]
                if batch and budget < 0:
                    break
                number = waiting.popleft()
                home[number] = groups.pop(0)
                batch.append((number, [free.pop(0) for _ in seeds[number]]))
            numbers = [number for number, _ in batch]
            self._admit([prompts[i] for i in numbers], [home[i] for i in numbers], [rows for _, rows in batch],
                        [seeds[i] for i in numbers])
            for number, rows in batch:
                for sample, row in enumerate(rows):
                    owner[row] = number, sample

    def _seat(self, owner, home, n):
        """Give rows of one group neighbouring places; returns (groups, width): how large a table they take."""
        members = {}
        for row in range(n):
            if owner[row] is not None:
                members.setdefault(home[owner[row][0]], []).append(row)
        groups, width = max(members) + 1, max(map(len, members.values()))
        row_at, place_of = [0] * (groups * width), [0] * n  # places without a row repeat row 0's query, unread
        for group, rows in members.items():
            for place, row in enumerate(rows, group * width):
                row_at[place], place_of[row] = row, place
        self.row_at[:groups * width] = torch.tensor(row_at, device=self.row_at.device)
        self.place_of[:n] = torch.tensor(place_of, device=self.row_at.device)
        return groups, width

    def _harvest(self, results, owner, n, on_finish):
        """Collect rows that have ended and free them: the one place where the host waits for the device."""
        done, count = self.done[:n].tolist(), self.count[:n].tolist()
        ended = [row for row in range(n) if done[row] and owner[row] is not None]
        if not ended:
            return
        tokens, logps, entropy = self.tokens[ended].tolist(), self.logps[ended].cpu(), self.entropy[ended].cpu()
        for i, row in enumerate(ended):
            (number, sample), ids = owner[row], tokens[i][:count[row]]
            results[number][sample] = Completion(
                ids, logps[i, :count[row]].clone(), ids[-1] not in self.processor.end_ids, self.processor.decode(ids),
                entropy[i, :count[row]].clone())
            owner[row] = None
            if on_finish and all(results[number]):
                on_finish(number, results[number])

    def _compact(self, owner, n):
        """While at most half of the rows still run, move them to the front: finished rows are not paid for."""
        live = [row for row in range(n) if owner[row] is not None]
        if not live or 2 * len(live) > n:
            return n
        while n > 1 and 2 * len(live) <= n:
            n //= 2
        keep = live + [row for row in range(len(owner)) if owner[row] is None][:n - len(live)]
        for state in (self.first, self.end, self.count, self.done, self.tokens, self.logps, self.entropy, self.uniform):
            state[:n] = state[keep]
        used = int((self.first + self.count)[:n].max())
        for tails in self.cache.tails:
            for tail in tails:  # a layer at a time: the copy stays small
                tail[:n, :, :used] = tail[keep, :, :used]
        owner[:] = [owner[row] for row in live] + [None] * (len(owner) - len(live))
        return n


def qkv(layer, x, rotation):
    """Rotated queries (n, heads, D), rotated keys (n, kv_heads, D) and values (n, kv_heads, D) of the new tokens."""
    attention, (cos, sin) = layer.self_attn, rotation  # (n, 1, D) each
    x = rms_norm(layer.input_layernorm, x)
    q, k, v = (project(x).view(len(x), -1, attention.head_dim)
               for project in (attention.q_proj, attention.k_proj, attention.v_proj))
    heads = torch.cat([q, k], 1)
    heads = heads * cos + heads.roll(attention.head_dim // 2, -1) * sin
    return heads[:, :q.shape[1]], heads[:, q.shape[1]:], v


def shares_prompts(device_type, prompt_length, rows, width):
    """Whether rows of a group, `width` of them, read their prompt together: fewer bytes, more kernels.

    On a CPU it is measured to pay from 250 tokens times 32 rows on. On a GPU, by 12 more kernels a layer against the
    bytes of a 3B model, from 1,500 tokens times 64 rows on: estimated, not run.
    """
    return width > 1 and prompt_length * rows > (8_000 if device_type == "cpu" else 100_000)


def attend_one(q, keys, values, mask):
    """Attention of one query a row over its tail (n, kv_heads, T, D): heads that share keys are rows of one query."""
    q = q.unflatten(1, (keys.shape[1], -1))
    return F.scaled_dot_product_attention(q, keys, values, mask).flatten(1)


def attend_shared(q, tail, prompt, masks, seats):
    """Attention of one query a row (n, heads, D) over its tail and its group's prompt: (n, heads * D) float32.

    tail, prompt: keys and values, (n, kv_heads, T, D) and (groups, kv_heads, P, D). A prompt is read once for its
    group: queries of its rows, and of heads that share keys, are lines of one product. The two softmaxes become one
    by their sums.
    """
    (row_at, place_of), D = seats, q.shape[-1]
    q = q.unflatten(1, (tail[0].shape[1], -1))         # (n, kv_heads, repeats, D)
    lines = q[row_at].transpose(1, 2).flatten(2, 3)    # (groups, kv_heads, width * repeats, D)
    of_prompt = partial_attention(lines, *prompt, masks[1]).unflatten(2, (row_at.shape[1], -1))
    of_prompt = of_prompt.transpose(1, 2).flatten(0, 1)[place_of]  # (n, kv_heads, repeats, D + 2)
    (a, a_top, a_sum), (b, b_top, b_sum) = (
        part.split([D, 1, 1], -1) for part in (of_prompt, partial_attention(q, *tail, masks[0])))
    top = torch.maximum(a_top, b_top)
    a_share, b_share = (a_top - top).exp_(), (b_top - top).exp_()
    return ((a * a_share + b * b_share) / (a_sum * a_share + b_sum * b_share)).flatten(1)


def partial_attention(q, keys, values, mask):
    """sum_k e^(s_k - top) v_k, top = max_k s_k and sum_k e^(s_k - top) over a part of the keys: (.., D + 2) float32."""
    scores = product(q, keys.mT).mul_(q.shape[-1]**-0.5).add_(mask)
    top = scores.amax(-1, keepdim=True)
    weights = scores.sub_(top).exp_()
    return torch.cat([product(weights.to(values.dtype), values), top, weights.sum(-1, keepdim=True)], -1)


def product(a, b):
    """a @ b, summed and returned in float32 as attention kernels do: bfloat16 scores would lose their last digits."""
    if a.is_cuda and a.dtype != torch.float32:
        return torch.bmm(a.flatten(0, 1), b.flatten(0, 1), out_dtype=torch.float32).unflatten(0, a.shape[:2])
    return a.float() @ b.float()


def feed_forward(layer, x):
    """Qwen2's gated MLP on the normed states."""
    x, mlp = rms_norm(layer.post_attention_layernorm, x), layer.mlp
    return mlp.down_proj(mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x))


def inverse_cdf(probs, uniform, top_p=1.0):
    """The token at which the cumulative probability first exceeds `uniform` (rows,) in [0, 1): exact sampling.

    probs (rows, V). Two passes over the row instead of a multinomial's many. A token of probability 0 is never drawn.
    """
    if top_p < 1.0:
        order = probs.sort(-1, descending=True)
        kept = order.values * (order.values.cumsum(-1) - order.values < top_p)
        return order.indices.gather(1, inverse_cdf(kept, uniform)[:, None])[:, 0]
    cdf = probs.cumsum(-1)
    target = uniform.clamp(max=1 - 1e-6)[:, None] * cdf[:, -1:]
    return torch.searchsorted(cdf, target, right=True)[:, 0].clamp(max=probs.shape[-1] - 1)


class Prompts:
    """Examples as prompts that are made when asked for: pixels of a whole test set would not fit in memory."""

    def __init__(self, processor, examples):
        self.processor, self.examples = processor, examples

    def __len__(self):
        return len(self.examples)

    def __getitem__(self, i):
        return self.processor(self.examples[i])

    def lengths(self):
        """Tokens of each prompt, read off the images' headers."""
        return [self.processor.prompt_length(example) for example in self.examples]


def generate(model, processor, prompts, num_generations=1, max_completion_length=512, temperature=1.0, top_p=1.0,
             seeds=None, max_rows=64, on_finish=None):
    """Sample `num_generations` completions of each prompt (a list of data.Prompt, or Prompts): a list of lists.

    temperature 0 is greedy. seeds: for each prompt a list of num_generations ints; 0, 1, 2, .. unless given.
    max_rows: completions in flight; more prompts wait and enter as rows finish. The model must be in eval mode.
    """
    if len(prompts) == 0:
        return []
    if seeds is None:
        seeds = [[i * num_generations + g for g in range(num_generations)] for i in range(len(prompts))]
    rows = max(num_generations, min(max_rows, num_generations * len(prompts)))
    lengths = prompts.lengths() if isinstance(prompts, Prompts) else [len(p.input_ids) for p in prompts]
    settings = (rows, max_completion_length, temperature, top_p, num_generations)
    engine = getattr(model, "engine", None)  # its cache and graphs serve every later call alike
    if engine is None or engine.settings != settings or engine.longest < max(lengths):
        engine = model.engine = None  # free the old cache before the new one is made
        engine = model.engine = Engine(model, processor, max(lengths), *settings)
    return engine.run(prompts, lengths, seeds, on_finish)
