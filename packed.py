"""Scoring: one prompt shared by its G completions, as one row of real tokens, and the log-probability of each token.

A GRPO group is G completions of one prompt. Prompts and completions lie in one row, every prompt (and its images) once.
A prompt attends to itself causally; a completion attends to its prompt and, causally, to itself. Log-probabilities and
gradients equal those of G separate rows. `token_logps` is what the method calls; above it, how it is done.

Shapes: N tokens of the packed row, B prompts of up to P tokens, R completions of up to T tokens (R = B * G in GRPO),
H hidden size, V vocabulary.
"""

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from transformers import AttentionInterface


def attach_attention(model):
    """Let a Qwen2.5-VL attend, norm and embed patches by this file's functions; returns the model."""
    # On Hopper SDPA would take cuDNN first, which builds a plan for every new shape: nearly every group has one.
    torch.backends.cuda.enable_cudnn_sdp(False)
    AttentionInterface.register("shared_prefix", shared_prefix_attention)
    AttentionInterface.register("windowed_flash", windowed_attention)
    # Set on the configs and not asked for at loading, where transformers would look for such a flash kernel on the hub.
    model.config.text_config._attn_implementation = "shared_prefix"
    model.config.vision_config._attn_implementation = "windowed_flash"
    for module in model.modules():  # two kernels in place of eight, in scoring and training as in decoding
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = partial(rms_norm, module)
    patches = model.model.visual.patch_embed
    patches.forward = partial(embed_patches, patches)
    return model


@dataclass
class Packed:
    """Prompts and their completions as one row of N real tokens: all prompts first, then all completions.

    The row has *places* 0 .. N-1 and no padding. Attention wants rectangles: a table of prompts (B, P) and one of
    completions (R, T), whose *slots* are numbered line by line. A place says where in the row a slot's token lies, a
    slot where in its table a token of the row goes; padded slots point at some place that nobody reads.

    Two prompts, "a b c" and "d e", with two completions each, "f g" and "h", "i" and "j k":

        place               0 1 2 3 4 5 6 7 8 9 10        N = 11
        input_ids           a b c d e f g h i j k
        position_ids        0 1 2 0 1 3 4 3 2 2 3         on each of the three axes: no images here
        prompt_places       [[0 1 2], [3 4 .]]            B = 2, P = 3
        prompt_slots        0 1 2 3 4                     slot 5 is padding
        completion_places   [[5 6], [7 .], [8 .], [9 10]] R = 4, T = 2
        completion_slots    0 1 2 4 6 7                   slots 3 and 5 are padding
        prompt_of           0 0 1 1                       f g and h belong to prompt 0
        predictors          2 5 2 4 4 9                   f is predicted where c lies, g where f lies, h where c ..
        mask                [[1 1], [1 0], [1 0], [1 1]]
        attend[2], of "i"   [[0 0 - 0 -],                 columns d e . | i and a padded slot; "-" is minus infinity
                             [0 0 - 0 0]]                 the line of a padded slot is computed and thrown away
    """

    input_ids: torch.Tensor         # (N,)
    position_ids: torch.Tensor      # (3, N) time, height, width; a completion continues from its own prompt's end
    prompt_places: torch.Tensor     # (B, P)
    prompt_slots: torch.Tensor      # (tokens of prompts,)
    completion_places: torch.Tensor # (R, T)
    completion_slots: torch.Tensor  # (tokens of completions,)
    prompt_of: torch.Tensor         # (R,) the prompt of each completion
    predictors: torch.Tensor        # (tokens of completions,) the place whose output predicts each of them
    mask: torch.Tensor              # (R, T) 1.0 on completion tokens, their end token included; 0.0 on padding
    attend: torch.Tensor            # (R, 1, T * repeats, P + T) 0 where a completion's token sees one of its prompt's
                                    # or its own, else -inf; a line for each of the query heads that share keys; R is 1
                                    # for a single prompt, whose completions all see alike
    pixel_values: torch.Tensor | None = None    # (patches, 1176)
    image_grid_thw: torch.Tensor | None = None  # (images, 3)
    features: torch.Tensor | None = None        # (image tokens, H) instead of pixels, where the vision tower is frozen

    @property
    def targets(self):
        """(tokens of completions,) ids of what `predictors` predict."""
        return self.input_ids[len(self.prompt_slots):]

    def to(self, device):
        """The same row with every tensor on `device`."""
        return Packed(**{k: v if v is None else v.to(device, non_blocking=True) for k, v in vars(self).items()})


def pack(model, prompts, completions):
    """Lay out prompts (list of data.Prompt) and completions (for each prompt a list of token lists) as one Packed row.

    A group without completions is prefilled only. A prompt's `features`, where it has them, are used in place of its
    pixels. Works on the CPU, but for the large `attend`, which is made on the model's device; move the rest with .to.
    """
    flat = [torch.as_tensor(tokens, dtype=torch.long) for group in completions for tokens in group]
    prompt_of = torch.tensor([b for b, group in enumerate(completions) for _ in group], dtype=torch.long)
    prompt_lengths = torch.tensor([len(p.input_ids) for p in prompts])
    prompt_places, prompt_slots = rectangle(prompt_lengths, 0)
    completion_lengths = torch.tensor([len(tokens) for tokens in flat], dtype=torch.long)
    completion_places, completion_slots = rectangle(completion_lengths, int(prompt_lengths.sum()))
    prompt_ends = prompt_lengths.cumsum(0) - 1  # the place that predicts a first token
    before = torch.cat([prompt_ends[prompt_of][:, None], completion_places], 1)[:, :-1]  # (R, T)
    positions = [prompt_positions(model, p) for p in prompts]
    continued = [positions[b].max() + 1 + torch.arange(len(tokens)).expand(3, -1) for b, tokens in zip(prompt_of, flat)]
    images = [p for p in prompts if p.pixel_values is not None]
    features = [p.features for p in images if p.features is not None]
    return Packed(
        input_ids=torch.cat([p.input_ids for p in prompts] + flat),
        position_ids=torch.cat(positions + continued, 1),
        prompt_places=prompt_places, prompt_slots=prompt_slots,
        completion_places=completion_places, completion_slots=completion_slots, prompt_of=prompt_of,
        predictors=before.flatten()[completion_slots],
        mask=(torch.arange(completion_places.shape[1]) < completion_lengths[:, None]).float(),
        attend=visibility(model, prompt_lengths, prompt_of, completion_places.shape[1]),
        pixel_values=torch.cat([p.pixel_values for p in images]) if images and not features else None,
        image_grid_thw=torch.cat([p.image_grid_thw for p in images]) if images else None,
        features=torch.cat(features) if features else None)


def rectangle(lengths, start):
    """Runs of consecutive places, one a line: lengths [2, 1], start 5 -> places [[5, 6], [7, 1]], slots [0, 1, 2].

    Padded slots point at the place of their column, each at another one: attention never lets them be seen, and the
    backward pass of indexing adds up what points at one place one by one.
    """
    column = torch.arange(int(lengths.max()) if len(lengths) else 0)
    real = column < lengths[:, None]
    first = start + lengths.cumsum(0) - lengths
    return torch.where(real, first[:, None] + column, column), real.flatten().nonzero()[:, 0]


def visibility(model, prompt_lengths, prompt_of, T):
    """Packed.attend: a completion's token sees all of its prompt, and of its completion itself and what is before."""
    whose, P, device = prompt_of if len(prompt_lengths) > 1 else slice(1), int(prompt_lengths.max()), model.device
    lengths, causal = prompt_lengths[whose].to(device), torch.ones(T, T, dtype=torch.bool, device=device).tril()
    in_prompt = (torch.arange(P, device=device) < lengths[:, None])[:, None].expand(-1, T, -1)  # (R, T, P)
    sees = torch.cat([in_prompt, causal.expand(len(in_prompt), T, T)], dim=2)
    attend = torch.zeros(sees.shape, dtype=model.dtype, device=device).masked_fill_(~sees, float("-inf"))
    text = model.config.text_config
    return attend.repeat_interleave(text.num_attention_heads // text.num_key_value_heads, dim=1)[:, None]


def prompt_positions(model, prompt):
    """(3, P) rotary positions of one prompt, by the model's own rule; kept on the prompt. Runs on the CPU."""
    if prompt.position_ids is None:
        ids = prompt.input_ids[None]
        types = (ids == model.config.image_token_id).int()
        prompt.position_ids = model.model.get_rope_index(
            ids, mm_token_type_ids=types, image_grid_thw=prompt.image_grid_thw)[0][:, 0]
    return prompt.position_ids


def image_features(model, pixel_values, image_grid_thw):
    """(image tokens, H): the vision tower's output for all images, in the order in which their tokens stand."""
    return torch.cat(model.model.get_image_features(pixel_values, image_grid_thw).pooler_output)


def embed_patches(module, pixels):
    """(patches, hidden) of pixels (patches, 1176): transformers' convolution, of windows side by side, as a product."""
    weight = module.proj.weight.flatten(1)
    return pixels.to(weight.dtype) @ weight.T


def rms_norm(norm, x):
    """x / sqrt(mean(x^2) + eps) * weight, rounded before the weight and after it, as Qwen's own norm rounds.

    With the weight inside the kernel there would be one rounding less, and in bfloat16 a quarter of the numbers would
    differ from those of the scoring pass after every norm.
    """
    return norm.weight * F.rms_norm(x, x.shape[-1:], None, norm.variance_epsilon)


def packed_hidden(model, packed, cache=None):
    """(N, H) last hidden states of a packed row on the model's device."""
    embeds = model.get_input_embeddings()(packed.input_ids)  # (N, H)
    features = packed.features
    if packed.pixel_values is not None:
        features = image_features(model, packed.pixel_values, packed.image_grid_thw)
    if features is not None:
        is_image = (packed.input_ids == model.config.image_token_id)[:, None]
        embeds = embeds.masked_scatter(is_image, features.to(embeds.dtype))
    return model.model.language_model(
        inputs_embeds=embeds[None], position_ids=packed.position_ids[:, None], use_cache=False,
        attention_mask={"full_attention": packed}, past_key_values=cache).last_hidden_state[0]


def shared_prefix_attention(module, query, key, value, attention_mask, scaling, **_):
    """Attention of a packed row; attention_mask is its Packed, which says who sees whom.

    query (1, heads, N, D), key and value (1, kv_heads, N, D). Returns ((1, N, heads, D), None), as transformers asks.
    """
    packed, heads, kv_heads = attention_mask, query.shape[1], key.shape[1]
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))  # (N, heads, D), (N, kv_heads, D)

    alone, P = len(packed.prompt_places) == 1, packed.prompt_places.shape[1]  # one prompt: slices in place of gathers
    q, k_prompt, v_prompt = ((x[None, :P] if alone else x[packed.prompt_places]).transpose(1, 2)
                             for x in (query, key, value))  # (B, heads or kv_heads, P, D)
    k, v = (x.repeat_interleave(heads // kv_heads, 1) for x in (k_prompt, v_prompt))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling)
    out = out.transpose(1, 2).flatten(0, 1)[packed.prompt_slots]  # (tokens of prompts, heads, D)

    if len(packed.prompt_of):  # query heads that share keys become lines of one query: keys are not copied for each
        q = query[packed.completion_places].unflatten(2, (kv_heads, -1)).transpose(1, 2).flatten(2, 3)
        k, v = (torch.cat([prompt.expand(len(q), -1, -1, -1) if alone else prompt[packed.prompt_of],
                           own[packed.completion_places].transpose(1, 2)], 2)
                for prompt, own in ((k_prompt, key), (v_prompt, value)))  # (R, kv_heads, P + T, D)
        own = F.scaled_dot_product_attention(q, k, v, attn_mask=packed.attend, scale=scaling)
        own = own.unflatten(2, (-1, heads // kv_heads)).transpose(1, 2).flatten(2, 3)  # (R, T, heads, D)
        out = torch.cat([out, own.flatten(0, 1)[packed.completion_slots]])
    return out[None], None


def windowed_attention(module, query, key, value, attention_mask, scaling, cu_seq_lens_q, **_):
    """The vision tower's attention: all windows of all images in one padded call, where transformers loops over them.

    query, key, value (1, heads, patches, D); cu_seq_lens_q (windows + 1,) their boundaries. Returns ((1, patches,
    heads, D), None). The name under which it is registered holds "flash" because only then does transformers hand over
    the boundaries.
    """
    if not hasattr(cu_seq_lens_q, "windows"):  # the host reads the boundaries once a forward, not once a layer
        cu_seq_lens_q.windows = [x if x is None else x.to(query.device) for x in windows(cu_seq_lens_q)]
    places, slots, mask = cu_seq_lens_q.windows
    query, key, value = (x[0].transpose(0, 1)[places].transpose(1, 2) for x in (query, key, value))
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling)
    return out.transpose(1, 2).flatten(0, 1)[slots][None], None


def windows(boundaries):
    """(places, slots, mask) of windows with boundaries (windows + 1,): a rectangle; no mask if all are of one size."""
    lengths = boundaries.diff().cpu()
    real = torch.arange(int(lengths.max())) < lengths[:, None]
    return *rectangle(lengths, 0), None if real.all() else real[:, None, None]


def token_logps(model, packed, bias, temperature=1.0):
    """log pi(o_t | q, o_<t) of every completion token: (R, T) float32, 0 on padding.

    packed: a Packed row. bias (V,): `forbidden_bias`. The distribution is softmax(logits / temperature) without
    the forbidden tokens, the one that was sampled. Policy, old policy and reference all come from this function.
    """
    hidden = packed_hidden(model, packed)  # (N, H)
    logps = SelectedLogps.apply(hidden[packed.predictors], model.lm_head.weight, packed.targets, bias, temperature)
    return logps.new_zeros(packed.mask.numel()).scatter(0, packed.completion_slots, logps).view_as(packed.mask)


class SelectedLogps(torch.autograd.Function):
    """log softmax(hidden @ weight.T / temperature + bias)[targets], a chunk of tokens at a time.

    Only (chunk, V) float32 logits ever exist, forward and backward: the backward pass computes them again.
    hidden (n, H), weight (V, H), targets (n,), bias (V,) float32 with -inf on forbidden tokens. Returns (n,) float32.
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, bias, temperature):
        logps, lse = hidden.new_empty(2, len(hidden), dtype=torch.float32)
        for c in _chunks(len(hidden), len(weight)):
            logits = SelectedLogps.logits(hidden[c], weight, bias, temperature)
            lse[c] = logits.logsumexp(-1)
            logps[c] = logits.gather(1, targets[c, None])[:, 0] - lse[c]
        ctx.save_for_backward(hidden, weight, targets, bias, lse)
        ctx.temperature = temperature
        return logps

    @staticmethod
    def backward(ctx, grad):
        hidden, weight, targets, bias, lse = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None  # a frozen head gets none
        for c in _chunks(len(hidden), len(weight)):
            probs = SelectedLogps.logits(hidden[c], weight, bias, ctx.temperature).sub_(lse[c, None]).exp_()
            d = probs.mul_(-grad[c, None])  # d logp / d logits = onehot - softmax
            d.scatter_add_(1, targets[c, None], grad[c, None])
            d = d.div_(ctx.temperature).to(weight.dtype)
            grad_hidden[c] = d @ weight
            if grad_weight is not None:
                grad_weight.addmm_(d.T, hidden[c])
        return grad_hidden, grad_weight, None, None, None

    @staticmethod
    def logits(hidden, weight, bias, temperature):
        return (hidden @ weight.T).float().div_(temperature).add_(bias)


def _chunks(tokens, vocabulary, numbers=2**26):
    """Slices of so many tokens that a float32 (chunk, V) tensor stays near 256 MB."""
    size = max(1, numbers // vocabulary)
    return [slice(i, min(i + size, tokens)) for i in range(0, tokens, size)]


def forbidden_bias(model, processor):
    """(V,) float32: -inf on tokens that no completion may hold (image and video places, unused rows of the head)."""
    weight = model.lm_head.weight
    bias = torch.zeros(len(weight), device=weight.device)
    bias[list(processor.forbidden_ids(len(weight)))] = float("-inf")
    return bias
