"""The rollout engine: completions of prompts, many at once, one captured decode step after another.

A prompt is prefilled once into a cache at fixed addresses. A decode step is tensor work on it,
without a word from the host, so that on CUDA it is captured as a graph and replayed. On a CPU a
long prompt is kept once for its group; elsewhere each of its rows begins with a copy. `generate` is
what the method calls; `Engine.run` is its loop: prompts come, rows take steps, completions go.

Shapes: n rows (completions) in flight, V vocabulary, H hidden size, D head size, T slots of a row's
tail, P slots of a prompt that is kept once, `width` rows of a group at most.
"""

from collections import deque
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from transformers import GenerationConfig, Qwen2_5_VLForConditionalGeneration

from data import Processor, Prompt
from packed import attach_attention, forbidden_bias, pack, packed_hidden, prompt_positions, rms_norm
from support.base import base_config, check_weights, first_line
from support.words import UserError


def load_policy(path, device="cpu", dtype=None, max_pixels=401_408):
    """Read a Qwen2.5-VL directory or hub name; return (model in eval mode, processor).

    dtype: torch.bfloat16 on CUDA, else torch.float32, unless given. max_pixels None: as in the
    checkpoint. Only safetensors are read, and no code from the checkpoint is run. UserError for
    what is not a whole Qwen2.5-VL checkpoint of finite floats (support/base.py).
    """
    dtype = dtype or (torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32)
    processor = Processor.from_pretrained(path, max_pixels)
    base_config(path, processor)
    try:
        model, loaded = Qwen2_5_VLForConditionalGeneration.from_pretrained(
            path, dtype=dtype, use_safetensors=True, ignore_mismatched_sizes=True,
            output_loading_info=True)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # not narrower: a damaged file raises what its reader meets
        raise UserError(f"{path}: cannot be loaded as a Qwen2.5-VL model: {first_line(error)}") from error
    check_weights(path, model.to(device), loaded)
    model.generation_config = GenerationConfig()  # a contradiction in the base's own stops no save
    return attach_attention(model.eval()), processor


@dataclass
class Completion:
    """One sampled answer, its end token included, and how likely each of its tokens was."""

    tokens: list         # token ids
    logps: torch.Tensor  # (len(tokens),) float32, of the tempered distribution; greedy: the plain
    truncated: bool      # no end token within the allowed length
    text: str            # decoded, without special tokens
    entropy: torch.Tensor | None = None  # (len(tokens),) nats, of the distribution of `logps`


def generate(model, processor, prompts, num_generations=1, max_completion_length=512,
             temperature=1.0, top_p=1.0, seeds=None, max_rows=64, on_finish=None):
    """Sample `num_generations` completions of each prompt: a list of lists of Completions.

    prompts: Prompts, or Examples that become Prompts when their turn comes (pixels of a whole test
    set would not fit in memory). temperature 0 is greedy; top_p below 1 samples from the smallest
    set of tokens that holds that much probability. seeds: num_generations ints for each prompt; 0,
    1, .. unless given. max_rows: completions in flight; further prompts wait. on_finish(prompt's
    number, its Completions) is called when its last has ended. The model must be in eval mode.
    """
    if len(prompts) == 0:
        return []
    G = num_generations
    seeds = seeds or [[i * G + g for g in range(G)] for i in range(len(prompts))]
    lengths = [len(p.input_ids) if isinstance(p, Prompt) else processor.prompt_lengths([p])[0]
               for p in prompts]  # of an Example read off the images' headers
    rows = max(G, min(max_rows, G * len(prompts)))
    settings = (rows, max_completion_length, temperature, top_p, G)
    # `model.engine` is ours, kept from call to call: its memory and graphs hold the addresses of
    # this model's weights, which change in place. Whoever copies the model sets it to None first.
    engine = getattr(model, "engine", None)
    if engine is None or engine.settings != settings or engine.longest < max(lengths):
        engine = model.engine = None  # free the old cache before the new one is made
        engine = model.engine = Engine(model, processor, max(lengths), *settings)
    return engine.run(prompts, lengths, seeds, on_finish)


class Cache:
    """Keys and values at fixed addresses, each (layers, rows or groups, kv_heads, slots, D).

    tails: of every row. prompts: of every group, or empty where each tail begins with a copy.
    """

    def __init__(self, model, groups, longest, rows, tail):
        text = model.config.text_config
        head = text.hidden_size // text.num_attention_heads

        def pair(count, slots):
            shape = (text.num_hidden_layers, count, text.num_key_value_heads, slots, head)
            return [torch.zeros(shape, dtype=model.dtype, device=model.device) for _ in range(2)]
        self.tails, self.prompts = pair(rows, tail), pair(groups, longest) if groups else []
        self.prefill = []  # [(group or its rows, start, stop)]: who gets tokens start:stop

    def update(self, key, value, layer, *_, **__):
        """Called by transformers in every attention layer of a prefill, as on a cache of its own.

        key, value: (1, kv_heads, N, D) of a packed row; each prompt's are copied to their place.
        """
        for cache, new in zip(self.prompts or self.tails, (key, value)):
            for place, start, stop in self.prefill:
                cache[layer, place, :, :stop - start] = new[0, :, start:stop]
        return key, value


class Engine:
    """Generates with `rows` completions in flight; a finished row makes room for the next prompt.

    A row's tokens lie in slots 0.. of its tail without padding, so rows of any length share a step.
    Its random numbers come from its own seed, so a completion does not depend on its company.
    """

    def __init__(self, model, processor, prompt_length, rows, max_new, temperature=1.0, top_p=1.0,
                 width=1, shared=None):
        device, self.settings = model.device, (rows, max_new, temperature, top_p, width)
        self.model, self.processor, self.max_new = model, processor, max_new
        self.temperature, self.top_p = temperature, top_p
        self.capture, self.graphs, self.pool = device.type == "cuda", {}, None
        if shared is None:
            shared = shares_prompts(device.type, prompt_length, rows, width)
        # Reading `done` stalls a GPU, and every number of slots is a graph: ask seldom, grow much.
        self.stride, self.bucket = (16, 256) if self.capture else (4, 16)
        self.longest = -(-prompt_length // self.bucket) * self.bucket
        self.tail = -(-(max_new + (0 if shared else self.longest)) // self.bucket) * self.bucket
        # A group keeps its prompt while its rows end one by one: there may be more than full ones.
        self.groups, self.shared = 2 * rows // width if shared else rows, shared
        self.cache = Cache(model, self.groups if shared else 0, self.longest, rows, self.tail)
        self.bias = forbidden_bias(model, processor)
        self.end_ids = torch.tensor(processor.end_ids, device=device)
        slots = self.longest + self.tail
        self.rows, self.slots = (torch.arange(number, device=device) for number in (rows, slots))
        # A rotation of x is x * cos + (x, its halves exchanged) * sin, with their sign in the sine.
        rotary = model.model.language_model.rotary_emb
        cos, sin = rotary(self.cache.tails[0], self.slots.expand(3, 1, -1))
        low, high = sin.chunk(2, -1)
        self.cos, self.sin = cos[0, :, None], torch.cat([-low, high], -1)[0, :, None]  # (.., 1, D)
        # Of each row: its first slot, the position behind its prompt, its tokens so far, its end.
        # A row that nobody owns is computed all the same: its one slot of zeros keeps it finite.
        self.first, self.end, self.count = torch.zeros(3, rows, dtype=torch.long, device=device)
        self.count, self.done = self.count + 1, torch.ones_like(self.rows, dtype=torch.bool)
        # One column more than is read: an ended row writes there, so that no step has a condition.
        self.logps, self.entropy, self.uniform = torch.zeros(3, rows, max_new + 1, device=device)
        self.tokens = torch.zeros_like(self.logps, dtype=torch.long)
        self.owner = []  # of each row (number of its prompt, of its completion, its group), or None

    # ---- Rows come and go ----

    @torch.no_grad()
    def run(self, prompts, lengths, seeds, on_finish=None):
        """Complete each prompt, `lengths` tokens long, once for each of its seeds: `generate`."""
        results = [[None] * len(s) for s in seeds]
        waiting, n, seats = deque(range(len(prompts))), len(self.rows), None
        self.owner = [None] * n
        while waiting or any(self.owner):
            free = [row for row in range(n) if self.owner[row] is None]
            if waiting and 4 * len(free) >= n:  # not sooner: prompts are prefilled together
                self._fill(prompts, lengths, seeds, waiting, free)
                seats = None
            if not waiting and (fewer := self._compact(n)) < n:
                n, seats = fewer, None
            if self.shared and seats is None:
                seats = self._seat(lengths, n)
            T = self._room(n, int((self.first + self.count)[:n].max()) + self.stride)
            for _ in range(self.stride):
                self.step(n, T, seats)
            self._harvest(results, n, on_finish)
        return results

    def _room(self, n, used):
        """Slots of a tail that a step reads, `used` at least; few numbers where each is a graph.

        Fewest for few rows, which read little beside the weights: 8 x 8 rows come to 45 in 400 steps.
        """
        few = 2**(used.bit_length() - (3 if n > 8 else 2))
        size = max(self.bucket, few) if self.capture else self.bucket
        return min(-(-used // size) * size, self.tail)

    def _fill(self, prompts, lengths, seeds, waiting, free, budget=16_384):
        """Move waiting prompts into free rows, packed into prefills of at most `budget` tokens."""
        groups = sorted(set(range(self.groups)) - {owner[2] for owner in self.owner if owner})
        batch, tokens = [], 0
        while waiting and groups and len(seeds[waiting[0]]) <= len(free):
            number, group = waiting.popleft(), groups.pop(0)
            rows = [free.pop(0) for _ in seeds[number]]
            for sample, (row, seed) in enumerate(zip(rows, seeds[number])):
                self.owner[row] = number, sample, group
                random = torch.Generator().manual_seed(seed)
                self.uniform[row] = torch.rand(self.max_new + 1, generator=random)
            if batch and tokens + lengths[number] > budget:
                self._admit(batch)
                batch, tokens = [], 0
            prompt, tokens = prompts[number], tokens + lengths[number]
            prompt = prompt if isinstance(prompt, Prompt) else self.processor(prompt)
            batch.append((prompt, rows, group))
        if batch:
            self._admit(batch)

    def _admit(self, batch):
        """Prefill prompts once each and sample the first token of each of their rows."""
        def tensor(numbers):
            return torch.tensor(numbers, device=self.model.device)
        prompts, rows, groups = zip(*batch)
        packed = pack(self.model, prompts, [[] for _ in prompts]).to(self.model.device)
        lengths = torch.tensor([len(p.input_ids) for p in prompts])
        stops = lengths.cumsum(0)
        places = groups if self.shared else [tensor(r) for r in rows]
        self.cache.prefill = list(zip(places, (stops - lengths).tolist(), stops.tolist()))
        hidden = packed_hidden(self.model, packed, self.cache)
        flat = tensor([row for group in rows for row in group])
        owner = tensor([b for b, group in enumerate(rows) for _ in group])  # each row's prompt
        ends = tensor([int(prompt_positions(self.model, p).max()) + 1 for p in prompts])
        self.end[flat] = ends[owner]
        self.first[flat] = lengths.to(flat.device)[owner] * (not self.shared)
        self.count[flat], self.done[flat] = 0, False
        self._sample(self.model.lm_head(hidden[stops.to(flat.device) - 1])[owner], flat)

    def _seat(self, lengths, n):
        """Rows of a group side by side: (row_at (groups, width), place_of (n,), prompts' mask).

        Rows 0 to 3 are of groups 1, 0, 1 and none:
            row_at    [[1, 0], [0, 2]]  an empty place holds row 0, whose answer there is not read
            place_of  [2, 0, 3, 0]      line by line: row 2 sits at the last of the four places
        """
        members, length = {}, torch.ones(self.groups, 1, dtype=torch.long)
        for row, owner in enumerate(self.owner[:n]):
            if owner:
                members.setdefault(owner[2], []).append(row)
                length[owner[2]] = lengths[owner[0]]
        groups, width = max(members) + 1, max(map(len, members.values()))
        row_at, place_of = torch.zeros(groups, width).long(), torch.zeros(n).long()
        for group, rows in members.items():
            row_at[group, :len(rows)] = torch.tensor(rows)
            place_of[rows] = group * width + torch.arange(len(rows))
        unseen = self.slots[:length.max()] >= length[:groups]
        mask = unseen.to(self.model.dtype).masked_fill_(unseen, -torch.inf)
        return row_at, place_of, mask[:, None, None]

    def _harvest(self, results, n, on_finish):
        """Collect rows that have ended and free them: here the host waits for the device."""
        done, count = self.done[:n].tolist(), self.count[:n].tolist()
        for row in [row for row in range(n) if done[row] and self.owner[row]]:
            number, sample, _ = self.owner[row]
            tokens, logps, entropy = (x[row, :count[row]].to("cpu", copy=True)
                                      for x in (self.tokens, self.logps, self.entropy))
            ids = tokens.tolist()
            results[number][sample] = Completion(
                ids, logps, ids[-1] not in self.processor.end_ids, self.processor.decode(ids),
                entropy)
            self.owner[row] = None
            if on_finish and all(results[number]):
                on_finish(number, results[number])

    def _compact(self, n):
        """While at most half of the rows still run, move them to the front: only they are paid."""
        live = [row for row in range(n) if self.owner[row]]
        if not live or 2 * len(live) > n:
            return n
        while 2 * len(live) <= n:
            n //= 2
        keep = live + [row for row, owner in enumerate(self.owner) if not owner][:n - len(live)]
        for state in (self.first, self.end, self.count, self.done, self.tokens, self.logps,
                      self.entropy, self.uniform):
            state[:n] = state[keep]
        used = int((self.first + self.count)[:n].max())
        for tail in (tail for tails in self.cache.tails for tail in tails):  # a layer at a time
            tail[:n, :, :used] = tail[keep, :, :used]
        self.owner = [self.owner[row] for row in keep] + [None] * (len(self.owner) - n)
        return n

    # ---- One decode step: fixed memory, no word from the host ----

    def step(self, n, T, seats=None):
        """One decode step: replayed from a CUDA graph where there is one, captured on first use."""
        if (n, T) in self.graphs:
            return self.graphs[n, T].replay()
        self._decode(n, T, seats)  # a capture runs nothing, and needs warm libraries
        if self.capture:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self.pool):
                self._decode(n, T)
            # Never dropped one by one: in torch 2.12 and 2.13 that frees what all of them share.
            self.graphs[n, T], self.pool = graph, graph.pool()

    def _decode(self, n, T, seats=None):
        """Feed the newest token of rows 0..n-1, sample the next; reads T slots of their tails.

        seats: what `_seat` returns, where prompts are kept once.
        """
        rows, newest, tails = self.rows[:n], self.count[:n] - 1, self.cache.tails
        slot, position = self.first[:n] + newest, self.end[:n] + newest
        x = self.model.get_input_embeddings()(self.tokens[rows, newest])  # (n, H)
        unseen = self.slots[:T] > slot[:, None]
        mask = unseen.to(x.dtype).masked_fill_(unseen, -torch.inf)[:, None, None]
        text, rotation = self.model.model.language_model, (self.cos[position], self.sin[position])
        for i, layer in enumerate(text.layers):
            q, *new = qkv(layer, x, rotation)
            for tail, values in zip(tails, new):
                tail[i][rows, :, slot] = values
            tail = [tail[i, :n, :, :T] for tail in tails]
            out = attend_one(q, *tail, mask) if seats is None else attend_shared(
                q, tail, mask, [prompt[i] for prompt in self.cache.prompts], seats)
            x = x + layer.self_attn.o_proj(out.to(x.dtype))
            x = x + feed_forward(layer, x)
        self._sample(self.model.lm_head(rms_norm(text.norm, x)), rows)

    def _sample(self, logits, rows):
        """Draw a token for each of `rows` from logits (len(rows), V); note it and who has ended."""
        scale = 1 / (self.temperature or 1.0)
        logps = torch.add(self.bias, logits, alpha=scale).log_softmax(-1)
        step, probs = self.count[rows], logps.exp()
        token = logps.argmax(-1) if self.temperature == 0 else \
            inverse_cdf(probs, self.uniform[rows, step], self.top_p)
        self.tokens[rows, step] = token
        self.logps[rows, step] = logps.gather(1, token[:, None])[:, 0]
        self.entropy[rows, step] = -(probs * logps).nansum(-1)  # 0 log 0 is NaN, and counts as 0
        self.count[rows] = count = step + ~self.done[rows]
        self.done[rows] |= (token[:, None] == self.end_ids).any(1) | (count == self.max_new)


def qkv(layer, x, rotation):
    """Rotated queries (n, heads, D), rotated keys and values (n, kv_heads, D) of the new tokens."""
    attention, (cos, sin) = layer.self_attn, rotation  # (n, 1, D) each
    x = rms_norm(layer.input_layernorm, x)
    q, k, v = (project(x).view(len(x), -1, attention.head_dim)
               for project in (attention.q_proj, attention.k_proj, attention.v_proj))
    heads = torch.cat([q, k], 1)
    heads = heads * cos + heads.roll(attention.head_dim // 2, -1) * sin
    return heads[:, :q.shape[1]], heads[:, q.shape[1]:], v


def feed_forward(layer, x):
    """Qwen2's gated MLP on the normed states."""
    x, mlp = rms_norm(layer.post_attention_layernorm, x), layer.mlp
    return mlp.down_proj(mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x))


def attend_one(q, keys, values, mask):
    """Attention of one query a row over its tail (n, kv_heads, T, D): (n, heads * D)."""
    q = q.unflatten(1, (keys.shape[1], -1))  # heads that share keys are lines of one query
    return F.scaled_dot_product_attention(q, keys, values, mask).flatten(1)


def shares_prompts(device_type, prompt_length, rows, width):
    """Whether rows of a group, at most `width`, read their prompt together.

    Fewer bytes, more kernels: on a CPU it pays from 250 tokens times 32 rows on. On a GPU a step is
    bound by its kernels, and each way to sit would be one more graph.
    """
    return device_type == "cpu" and width > 1 and prompt_length * rows > 8_000


def attend_shared(q, tail, mask, prompt, seats):
    """Attention of one query a row over its group's prompt and its tail: (n, heads * D) float32.

    q (n, heads, D); tail, prompt: keys and values (n or groups, kv_heads, T or P, D). A prompt is
    read once for its group, whose queries are lines of one. Softmaxes a, of the prompt, and b, of
    the tail, become one by the logarithms of their sums of exponentials, lse_a and lse_b.
    """
    row_at, place_of, unseen = seats
    q = q.unflatten(1, (tail[0].shape[1], -1))       # (n, kv_heads, repeats, D)
    lines = q[row_at].transpose(1, 2).flatten(2, 3)  # (groups, kv_heads, width * repeats, D)
    prompt = [x[:len(row_at), :, :unseen.shape[-1]] for x in prompt]
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # returns lse as well
    a, lse_a = (x.unflatten(2, (row_at.shape[1], -1)).transpose(1, 2).flatten(0, 1)[place_of]
                for x in attention(lines, *prompt, attn_mask=unseen))
    b, lse_b = attention(q, *tail, attn_mask=mask)   # (n, kv_heads, repeats, D), (.., repeats)
    return b.float().lerp(a.float(), (lse_a - lse_b).sigmoid()[..., None]).flatten(1)


def inverse_cdf(probs, uniform, top_p=1.0):
    """The token at which the sum of probs (n, V) first exceeds `uniform` (n,) in [0, 1): (n,).

    Two passes over a row instead of a multinomial's many. Probability 0 is never drawn.
    """
    if top_p < 1.0:
        order = probs.sort(-1, descending=True)
        kept = order.values * (order.values.cumsum(-1) - order.values < top_p)
        return order.indices.gather(1, inverse_cdf(kept, uniform)[:, None])[:, 0]
    cdf = probs.cumsum(-1)
    target = uniform.clamp(max=1 - 1e-6)[:, None] * cdf[:, -1:]
    return torch.searchsorted(cdf, target, right=True)[:, 0].clamp(max=probs.shape[-1] - 1)
