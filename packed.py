"""Scoring: a prompt and its G completions as one row of tokens, and the log-probability of each.

Every prompt, with its images, lies in the row once and attends to itself causally; a completion
attends to its prompt and, causally, to itself. Log-probabilities and gradients equal those of G
separate rows. `token_logps` is what the method calls.

Shapes: N tokens of the packed row, B prompts of up to P tokens, R completions of up to T tokens
(R = B * G in GRPO), H hidden size, V vocabulary.
"""

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from transformers import AttentionInterface

# What this file puts where transformers does not expect it: two attention functions under names of
# their own; `forward` of the norms and of the patch embedding, as fewer kernels for the same
# numbers; a Packed row as the text model's attention mask, which it hands to our function unread;
# `cu_seq_lens_q.windows`, the vision tower's tables, made once a forward pass. engine.py adds a
# Cache with an `update` of its own, and `model.engine`.


def attach_attention(model):
    """Let a Qwen2.5-VL attend, norm and embed patches by this file's functions; returns it."""
    # On Hopper SDPA would take cuDNN first, which builds a plan for every new shape: every group.
    torch.backends.cuda.enable_cudnn_sdp(False)
    AttentionInterface.register("shared_prefix", shared_prefix_attention)
    AttentionInterface.register("windowed_flash", windowed_attention)
    # Not asked for at loading, when transformers would look for such a kernel on the hub.
    model.config.text_config._attn_implementation = "shared_prefix"
    model.config.vision_config._attn_implementation = "windowed_flash"
    for module in model.modules():  # two kernels in place of eight
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = partial(rms_norm, module)
    patches = model.model.visual.patch_embed
    patches.forward = partial(embed_patches, patches)
    return model


@dataclass
class Packed:
    """Prompts and their completions as one row of N real tokens: all prompts, then all completions.

    The row has *places* 0 .. N-1 and no padding. Attention wants rectangles: a table of prompts
    (B, P), one of completions (R, T), whose *slots* are numbered line by line. A place says where
    in the row a slot's token lies, a slot where in its table a token of the row goes. Padded slots
    point at some place that nobody reads. N_p tokens are in prompts, N_c in completions.

    Beside the shapes: prompts "a b c" and "d e" with completions "f g" and "h", "i" and "j k", so
    N = 11, B = 2, P = 3, R = 4, T = 2; a dot is padding.
    """
    # of places 0 .. N-1                        0 1 2 3 4 5 6 7 8 9 10
    input_ids: torch.Tensor          # (N,)     a b c d e f g h i j k
    position_ids: torch.Tensor       # (3, N)   0 1 2 0 1 3 4 3 2 2 3 on each axis: no images here
    prompt_places: torch.Tensor      # (B, P)   [[0 1 2], [3 4 .]]
    prompt_slots: torch.Tensor       # (N_p,)   0 1 2 3 4                    slot 5 is padding
    completion_places: torch.Tensor  # (R, T)   [[5 6], [7 .], [8 .], [9 10]]
    completion_slots: torch.Tensor   # (N_c,)   0 1 2 4 6 7                  3 and 5 are padding
    prompt_of: torch.Tensor          # (R,)     0 0 1 1                      f g, h: of prompt 0
    predictors: torch.Tensor         # (N_c,)   2 5 2 4 4 9                  c predicts f, f g, c h
    mask: torch.Tensor               # (R, T)   [[1 1], [1 0], [1 0], [1 1]]
    attend: torch.Tensor             # (R, 1, T * repeats, P + T): `visibility`
    pixel_values: torch.Tensor | None = None    # (patches, 1176)
    image_grid_thw: torch.Tensor | None = None  # (images, 3)
    features: torch.Tensor | None = None        # (image tokens, H) in place of pixels: frozen tower

    def to(self, device):
        """The same row with every tensor on `device`."""
        return Packed(*(x if x is None else x.to(device) for x in vars(self).values()))


def pack(model, prompts, completions):
    """Lay out prompts (data.Prompts) and completions (for each a list of token lists) as Packed.

    A group without completions is prefilled only; a prompt's `features` stand for its pixels. Made
    on the CPU, but for the large `attend`, which is made on the model's device.
    """
    flat = [torch.as_tensor(tokens).long() for group in completions for tokens in group]
    prompt_of = torch.tensor([b for b, group in enumerate(completions) for _ in group]).long()
    lengths = torch.tensor([len(p.input_ids) for p in prompts])
    prompt_places, prompt_slots, in_prompt = rectangle(lengths, 0)
    places, slots, real = rectangle(torch.tensor([len(tokens) for tokens in flat]).long(), int(lengths.sum()))
    before = torch.cat([(lengths.cumsum(0) - 1)[prompt_of, None], places], 1)[:, :-1]  # (R, T)
    positions = [prompt_positions(model, p) for p in prompts]
    continued = [positions[b].max() + 1 + torch.arange(len(tokens)).expand(3, -1)
                 for b, tokens in zip(prompt_of, flat)]
    images = [p for p in prompts if p.pixel_values is not None]
    features = [p.features for p in images if p.features is not None]
    pixels = [] if features else [p.pixel_values for p in images]
    return Packed(
        torch.cat([p.input_ids for p in prompts] + flat), torch.cat(positions + continued, 1),
        prompt_places, prompt_slots, places, slots, prompt_of,
        predictors=before.flatten()[slots], mask=real.float(),
        attend=visibility(model, in_prompt[prompt_of] if len(prompts) > 1 else in_prompt, real),
        pixel_values=torch.cat(pixels) if pixels else None,
        image_grid_thw=torch.cat([p.image_grid_thw for p in images]) if images else None,
        features=torch.cat(features) if features else None)


def rectangle(lengths, start):
    """Runs of places, one a line: (places, slots, which slots are real).

    Lengths [2, 1], start 5 -> [[5, 6], [7, 1]], [0, 1, 2], [[True, True], [True, False]]. Padded
    slots point at different places: CUDA's backward pass adds up one by one what points at one.
    """
    column = torch.arange(int(lengths.max()) if len(lengths) else 0)
    real = column < lengths[:, None]
    places = torch.where(real, start + (lengths.cumsum(0) - lengths)[:, None] + column, column)
    return places, real.flatten().nonzero()[:, 0], real


def visibility(model, in_prompt, real):
    """Packed.attend: 0 where a completion's token sees a token of its prompt or its own, else -inf.

    in_prompt (R, P), real (R, T): which slots are real. In the example above "i" and the padding
    behind it see [[0 0 - 0 -], [0 0 - 0 0]] of d e . | i . where - is -inf. Each line is there for
    every query head that shares its keys. A single prompt's completions all see alike: R is 1.
    """
    text, T, device = model.config.text_config, real.shape[1], model.device
    causal = torch.ones(T, T, dtype=torch.bool, device=device).tril()
    sees = torch.cat([part.expand(len(in_prompt), T, -1)
                      for part in (in_prompt[:, None].to(device), causal)], 2)  # (R, T, P + T)
    repeats = text.num_attention_heads // text.num_key_value_heads
    hidden = ~sees.repeat_interleave(repeats, 1)[:, None]
    return hidden.to(model.dtype).masked_fill_(hidden, -torch.inf)


def prompt_positions(model, prompt):
    """(3, P) rotary positions of a prompt by the model's own rule, on the CPU; kept on it."""
    if prompt.position_ids is None:
        ids = prompt.input_ids[None]
        types = (ids == model.config.image_token_id).int()
        prompt.position_ids = model.model.get_rope_index(
            ids, mm_token_type_ids=types, image_grid_thw=prompt.image_grid_thw)[0][:, 0]
    return prompt.position_ids


def image_features(model, pixel_values, image_grid_thw):
    """(image tokens, H): the vision tower's output for all images, in the order of their tokens."""
    return torch.cat(model.model.get_image_features(pixel_values, image_grid_thw).pooler_output)


def embed_patches(module, pixels):
    """(patches, hidden) of pixels (patches, 1176): the model's convolution as a product."""
    return pixels.to(module.proj.weight.dtype) @ module.proj.weight.flatten(1).T


def rms_norm(norm, x):
    """x / sqrt(mean(x^2) + eps) * weight, rounded twice in bfloat16 as by Qwen's own norm."""
    return norm.weight * F.rms_norm(x, x.shape[-1:], None, norm.variance_epsilon)


def packed_hidden(model, packed, cache=None):
    """(N, H) last hidden states of a packed row on the model's device."""
    embeds, features = model.get_input_embeddings()(packed.input_ids), packed.features  # (N, H)
    if packed.pixel_values is not None:
        features = image_features(model, packed.pixel_values, packed.image_grid_thw)
    if features is not None:
        is_image = (packed.input_ids == model.config.image_token_id)[:, None]
        embeds = embeds.masked_scatter(is_image, features.to(embeds.dtype))
    return model.model.language_model(
        inputs_embeds=embeds[None], position_ids=packed.position_ids[:, None], use_cache=False,
        attention_mask={"full_attention": packed}, past_key_values=cache).last_hidden_state[0]


def shared_prefix_attention(module, query, key, value, attention_mask, scaling, **_):
    """Attention of a packed row, which comes as attention_mask: its Packed says who sees whom.

    query (1, heads, N, D), key and value (1, kv_heads, N, D) -> ((1, N, heads, D), None).
    """
    packed, heads, kv_heads = attention_mask, query.shape[1], key.shape[1]
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))  # (N, .., D)
    alone, P = len(packed.prompt_places) == 1, packed.prompt_places.shape[1]
    q, k_prompt, v_prompt = ((x[None, :P] if alone else x[packed.prompt_places]).transpose(1, 2)
                             for x in (query, key, value))  # (B, heads or kv_heads, P, D)
    k, v = (x.repeat_interleave(heads // kv_heads, 1) for x in (k_prompt, v_prompt))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling)
    out = out.transpose(1, 2).flatten(0, 1)[packed.prompt_slots]  # (tokens of prompts, heads, D)
    if len(places := packed.completion_places):  # heads that share keys are lines of one query
        q = query[places].unflatten(2, (kv_heads, -1)).transpose(1, 2).flatten(2, 3)
        k, v = (torch.cat([prompt.expand(len(q), -1, -1, -1) if alone else prompt[packed.prompt_of],
                           own[places].transpose(1, 2)], 2)
                for prompt, own in ((k_prompt, key), (v_prompt, value)))  # (R, kv_heads, P + T, D)
        own = F.scaled_dot_product_attention(q, k, v, attn_mask=packed.attend, scale=scaling)
        own = own.unflatten(2, (-1, heads // kv_heads)).transpose(1, 2).flatten(2, 3)
        out = torch.cat([out, own.flatten(0, 1)[packed.completion_slots]])  # (N, heads, D)
    return out[None], None


def windowed_attention(module, query, key, value, attention_mask, scaling, cu_seq_lens_q, **_):
    """The vision tower's attention: all windows in one padded call, where transformers loops.

    query, key, value (1, heads, patches, D), boundaries of windows (windows + 1,) -> ((1, patches,
    heads, D), None). Only under a name that holds "flash" does transformers hand boundaries over.
    """
    if not hasattr(cu_seq_lens_q, "windows"):  # read by the host once a forward, not once a layer
        places, slots, real = rectangle(cu_seq_lens_q.diff().cpu(), 0)
        mask = None if real.all() else real[:, None, None].to(query.device)
        cu_seq_lens_q.windows = places.to(query.device), slots.to(query.device), mask
    places, slots, mask = cu_seq_lens_q.windows
    query, key, value = (x[0].transpose(0, 1)[places].transpose(1, 2) for x in (query, key, value))
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling)
    return out.transpose(1, 2).flatten(0, 1)[slots][None], None


def token_logps(model, packed, bias, temperature=1.0):
    """log pi(o_t | q, o_<t) of every completion token: (R, T) float32, 0 on padding.

    bias (V,): `forbidden_bias`. The distribution is softmax(logits / temperature) without forbidden
    tokens, the one that was sampled. Policy, old policy and reference all come from this function.
    """
    hidden = packed_hidden(model, packed)[packed.predictors]  # (N_c, H)
    targets = packed.input_ids[len(packed.prompt_slots):]     # (N_c,)
    logps = SelectedLogps.apply(hidden, model.lm_head.weight, targets, bias, temperature)
    padded = torch.zeros_like(packed.mask).flatten().scatter(0, packed.completion_slots, logps)
    return padded.view_as(packed.mask)


class SelectedLogps(torch.autograd.Function):
    """log softmax(hidden @ weight.T / temperature + bias)[targets], a chunk of tokens at a time.

    Only (chunk, V) float32 logits ever exist: the backward pass computes them again. hidden (n, H),
    weight (V, H), targets (n,), bias (V,) float32, -inf on forbidden tokens. Returns (n,) float32.
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, bias, temperature):
        logps, lse = hidden.new_empty(2, len(hidden), dtype=torch.float32)
        for c, logits in SelectedLogps.logits(hidden, weight, bias, temperature):
            lse[c] = logits.logsumexp(-1)
            logps[c] = logits.gather(1, targets[c, None])[:, 0] - lse[c]
        ctx.save_for_backward(hidden, weight, targets, bias, lse)
        ctx.temperature = temperature
        return logps

    @staticmethod
    def backward(ctx, grad):
        hidden, weight, targets, bias, lse = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None  # frozen: none
        for c, logits in SelectedLogps.logits(hidden, weight, bias, ctx.temperature):
            d = logits.sub_(lse[c, None]).exp_().mul_(-grad[c, None])
            d.scatter_add_(1, targets[c, None], grad[c, None])  # d logp / d logits = 1hot - softmax
            d = d.div_(ctx.temperature).to(weight.dtype)
            grad_hidden[c] = d @ weight
            if grad_weight is not None:
                grad_weight.addmm_(d.T, hidden[c])
        return grad_hidden, grad_weight, None, None, None

    @staticmethod
    def logits(hidden, weight, bias, temperature, numbers=2**26):
        """Yields (slice of tokens, their logits (chunk, V)): `numbers` of them at most, 256 MB."""
        size = max(1, numbers // len(weight))
        for c in (slice(start, start + size) for start in range(0, len(hidden), size)):
            yield c, (hidden[c] @ weight.T).float().div_(temperature).add_(bias)


def forbidden_bias(model, processor):
    """(V,) float32: -inf on tokens that no completion may hold: image places, unused rows, .."""
    bias = torch.zeros(len(model.lm_head.weight), device=model.device)
    bias[list(processor.forbidden_ids(len(bias)))] = -torch.inf
    return bias
