"""The engine against plain transformers: the same numbers, whatever is packed, padded, cached or refilled."""

import contextlib
import copy
import dataclasses
import types
from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Qwen2_5_VLForConditionalGeneration

from currreft import grpo_loss
from data import Prompt, load_examples
from engine import Engine, attend_shared, generate, inverse_cdf, load_policy
from packed import SelectedLogps, embed_patches, forbidden_bias, image_features, pack, rms_norm, token_logps
from support.rows import find_files
from support.tiny import tiny_checkpoint, tiny_data
from support.words import UserError

LENGTHS = [[3, 7], [5, 1], [9, 9], [2, 4]]  # completions of different lengths, one of them a single token


@pytest.fixture(params=["shared", "copied"], autouse=True)
def prompts_are(request, monkeypatch, world):
    """Both ways to keep a group's prompt, whatever the rule would choose for prompts as short as these."""
    world[0].engine = None
    monkeypatch.setattr("engine.shares_prompts", lambda *numbers: request.param == "shared" and numbers[-1] > 1)
    return request.param


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A tiny checkpoint whose weights are large enough for its answers to depend on what it sees."""
    path = tiny_checkpoint(tmp_path_factory.mktemp("model"))
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(path, dtype=torch.float32)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.mul_(4)
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def world(checkpoint, tmp_path_factory):
    """(policy, processor, plain transformers model, prompts: three image sizes, text only, two images)."""
    policy, processor = load_policy(checkpoint)
    plain = Qwen2_5_VLForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32).eval()
    data = tiny_data(tmp_path_factory.mktemp("data"))
    files = find_files(data)
    rows = load_examples(files["train"]["open"], image_root=data) + load_examples(files["questions"], image_root=data)
    by_grid = {tuple(r.images): r for r in rows}
    examples = sorted(by_grid.values(), key=lambda r: len(r.images))
    assert {len(e.images) for e in examples} >= {0, 1, 2}
    prompts = [processor(e) for e in examples]
    assert len({tuple(p.image_grid_thw.flatten().tolist()) for p in prompts if p.image_grid_thw is not None}) >= 3
    return policy, processor, plain, [prompts[0], prompts[1], prompts[2], prompts[-1]]


def completions_for(prompts, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [[torch.randint(0, 250, (n,), generator=g).tolist() for n in LENGTHS[i % 4]] for i in range(len(prompts))]


def separate_rows(plain, processor, prompt, group, bias, temperature=1.0):
    """The oracle: G padded rows, each with the prompt and its images again, as other trainers do it. (G, T)."""
    T = max(map(len, group))
    ids = torch.stack([torch.cat([prompt.input_ids, torch.tensor(c), torch.full((T - len(c),), processor.pad_id)])
                       for c in group])
    attention = torch.stack([torch.arange(ids.shape[1]) < len(prompt.input_ids) + len(c) for c in group]).long()
    images = {}
    if prompt.pixel_values is not None:
        images = {"pixel_values": prompt.pixel_values.repeat(len(group), 1),
                  "image_grid_thw": prompt.image_grid_thw.repeat(len(group), 1)}
    logits = plain(input_ids=ids, attention_mask=attention, mm_token_type_ids=(ids == processor.image_token_id).int(),
                   use_cache=False, **images).logits[:, len(prompt.input_ids) - 1:-1]
    logps = (logits.float() / temperature + bias).log_softmax(-1).gather(2, ids[:, len(prompt.input_ids):, None])[..., 0]
    mask = torch.stack([torch.arange(T) < len(c) for c in group])
    return logps.masked_fill(~mask, 0.0)


def test_the_worked_example_of_a_packed_row(world):
    """The docstring of Packed, tensor by tensor: prompts "a b c" and "d e", completions "f g", "h", "i", "j k"."""
    a, b, c, d, e, f, g, h, i, j, k = range(11)
    prompts = [Prompt(torch.tensor([a, b, c]), None, None), Prompt(torch.tensor([d, e]), None, None)]
    packed = pack(world[0], prompts, [[[f, g], [h]], [[i], [j, k]]])
    assert packed.input_ids.tolist() == [a, b, c, d, e, f, g, h, i, j, k]
    assert packed.position_ids.tolist() == [[0, 1, 2, 0, 1, 3, 4, 3, 2, 2, 3]] * 3
    assert [packed.prompt_places[0].tolist(), packed.prompt_places[1, :2].tolist()] == [[0, 1, 2], [3, 4]]
    assert packed.prompt_slots.tolist() == [0, 1, 2, 3, 4]
    places = packed.completion_places.tolist()
    assert (places[0], places[1][0], places[2][0], places[3]) == ([5, 6], 7, 8, [9, 10])
    assert packed.completion_slots.tolist() == [0, 1, 2, 4, 6, 7]
    assert packed.prompt_of.tolist() == [0, 0, 1, 1] and packed.predictors.tolist() == [2, 5, 2, 4, 4, 9]
    assert packed.mask.tolist() == [[1, 1], [1, 0], [1, 0], [1, 1]]
    seen = (packed.attend[:, 0, ::2] == 0).int()  # each line stands there twice: two query heads share their keys
    assert torch.equal(packed.attend[:, 0, ::2], packed.attend[:, 0, 1::2]) and packed.attend.shape == (4, 1, 4, 5)
    assert seen[2].tolist() == [[1, 1, 0, 1, 0], [1, 1, 0, 1, 1]] and seen[0].tolist() == [[1, 1, 1, 1, 0], [1] * 5]


def test_no_place_of_a_packed_row_is_gathered_by_many_padded_slots(world):
    """On CUDA the backward of indexing adds up what points at one place one by one: padding must not share a place."""
    policy, _, _, prompts = world
    packed = pack(policy, prompts, [[[1] * 40, [2], [3]] for _ in prompts])
    for places in (packed.prompt_places, packed.completion_places):
        assert places.flatten().bincount().max() <= len(places) + 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decode_rounds_its_norms_as_the_model_does(world, dtype):
    """One rounding less, and sampling in bfloat16 drifts away from scoring: 0.077 nats a token instead of 0.0045."""
    norm = copy.deepcopy(world[0].model.language_model.norm).to(dtype)
    torch.nn.init.normal_(norm.weight, 1.0, 0.3)
    x = torch.randn(500, 64, generator=torch.Generator().manual_seed(0)).to(dtype) * 3
    assert torch.equal(rms_norm(norm, x), norm(x)) if dtype == torch.bfloat16 else \
        torch.allclose(rms_norm(norm, x), norm(x), atol=1e-6)


def test_patches_are_embedded_as_by_the_convolution(world):
    """Value and gradient, against the class's own forward, which a loaded policy no longer uses."""
    module, pixels = world[0].model.visual.patch_embed, torch.randn(20, 1176)
    assert module.forward.func is embed_patches
    results = []
    for forward in (module.forward, type(module).forward.__get__(module)):
        module.zero_grad()
        out = forward(pixels)
        out.square().sum().backward()
        results.append((out.detach(), module.proj.weight.grad))
    module.zero_grad()
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


def test_attention_stays_away_from_cudnn(world):
    """It would build an execution plan for every new shape, and nearly every group has a new one."""
    assert not torch.backends.cuda.cudnn_sdp_enabled()


def test_entropy_is_that_of_the_distribution_that_was_sampled(world):
    policy, processor, plain, prompts = world
    bias = forbidden_bias(policy, processor)
    for prompt, (completion,) in zip(prompts, generate(policy, processor, prompts, 1, 8, temperature=0.7)):
        ids = torch.cat([prompt.input_ids, torch.tensor(completion.tokens)])
        images = {} if prompt.pixel_values is None else {
            "pixel_values": prompt.pixel_values, "image_grid_thw": prompt.image_grid_thw}
        with torch.no_grad():
            logits = plain(input_ids=ids[None], mm_token_type_ids=(ids == processor.image_token_id).int()[None],
                           **images).logits[0, len(prompt.input_ids) - 1:-1]
        entropy = torch.distributions.Categorical(logits=(logits / 0.7 + bias).clamp(min=-1e30)).entropy()
        torch.testing.assert_close(completion.entropy, entropy, atol=1e-4, rtol=1e-4)


def test_a_frozen_head_gets_no_gradient(world):
    """At 3B the head's gradient alone is 0.6 GB."""
    hidden, weight = torch.randn(5, 8, requires_grad=True), torch.randn(11, 8)
    logps = SelectedLogps.apply(hidden, weight, torch.arange(5), torch.zeros(11), 1.0)
    assert SelectedLogps.backward(logps.grad_fn, torch.ones(5))[1] is None
    logps.sum().backward()
    (expected,) = torch.autograd.grad((hidden @ weight.T).log_softmax(-1)[range(5), range(5)].sum(), hidden)
    torch.testing.assert_close(hidden.grad, expected)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_packed_row_equals_separate_rows_in_value_and_gradient(world, checkpointing):
    policy, processor, plain, prompts = world
    groups, bias = completions_for(prompts), forbidden_bias(policy, processor)
    weight = torch.randn(sum(map(len, groups)), max(len(c) for g in groups for c in g),
                         generator=torch.Generator().manual_seed(1))
    policy.zero_grad(), plain.zero_grad()
    if checkpointing:
        policy.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    packed = token_logps(policy.train(), pack(policy, prompts, groups), bias, 0.7)
    (packed * weight).sum().backward()
    policy.gradient_checkpointing_disable()
    policy.eval()
    row = 0
    for prompt, group in zip(prompts, groups):
        oracle = separate_rows(plain, processor, prompt, group, bias, 0.7)
        R, T = oracle.shape
        torch.testing.assert_close(packed[row:row + R, :T], oracle, atol=1e-5, rtol=0)
        assert not packed[row:row + R, T:].any(), "padding must stay 0"
        (oracle * weight[row:row + R, :T]).sum().backward()
        row += R
    expected = dict(plain.named_parameters())
    for name, p in policy.named_parameters():
        scale = expected[name].grad.abs().max().clamp(min=1)
        torch.testing.assert_close(p.grad / scale, expected[name].grad / scale, atol=1e-5, rtol=0, msg=name)


def test_positions_are_three_dimensional_and_matter(world):
    """M-RoPE that falls back to 1-D positions moves log-probabilities far more than the tolerance above."""
    policy, processor, plain, prompts = world
    groups, bias = completions_for(prompts[1:2]), forbidden_bias(policy, processor)
    batch = pack(policy, prompts[1:2], groups)
    assert (batch.position_ids[0] != batch.position_ids[1]).any()
    right = token_logps(policy, batch, bias)
    flat = torch.cat([torch.arange(len(prompts[1].input_ids))] + [len(prompts[1].input_ids) + torch.arange(len(c))
                                                                   for c in groups[0]])
    batch.position_ids = flat.expand(3, -1)
    assert (token_logps(policy, batch, bias) - right).abs().max() > 1e-3


def test_log_probabilities_in_chunks_equal_the_naive_ones(monkeypatch):
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(11, 8, generator=g), torch.randn(23, 8, generator=g)
    targets, bias = torch.randint(0, 20, (11,), generator=g), torch.zeros(23)
    bias[20:] = float("-inf")
    out = torch.randn(11, generator=g)
    grads = []
    for naive in (True, False):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        if naive:
            logps = ((h @ w.T) / 0.6 + bias).log_softmax(-1).gather(1, targets[:, None])[:, 0]
        else:
            logits = partial(SelectedLogps.logits, numbers=4 * len(w))  # four tokens at a time
            monkeypatch.setattr(SelectedLogps, "logits", staticmethod(logits))
            logps = SelectedLogps.apply(h, w, targets, bias, 0.6)
        (logps * out).sum().backward()
        grads.append((logps, h.grad, w.grad))
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_chunks_never_hold_more_than_their_budget():
    chunks = SelectedLogps.logits(torch.zeros(5000, 1), torch.zeros(700, 1), 0.0, 1.0, numbers=2**20)
    sizes = [len(logits) for _, logits in chunks]
    assert max(sizes) * 700 <= 2**20 and sum(sizes) == 5000


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_what_was_sampled_is_what_is_scored(world, temperature):
    policy, processor, _, prompts = world
    groups = generate(policy, processor, prompts, 3, 10, temperature)
    batch = pack(policy, prompts, [[o.tokens for o in group] for group in groups])
    scored = token_logps(policy, batch, forbidden_bias(policy, processor), temperature)
    for row, completion in enumerate(o for group in groups for o in group):
        torch.testing.assert_close(scored[row, :len(completion.tokens)], completion.logps, atol=1e-5, rtol=0)


@pytest.mark.parametrize("temperature, top_p", [(1.0, 1.0), (0.7, 0.9), (0.0, 1.0)])
def test_a_decode_step_never_waits_for_its_numbers(world, temperature, top_p):
    """What a CUDA graph cannot hold: numbers read by the host, shapes that depend on values, a cache that moves."""
    policy, processor, _, prompts = world
    called = set()

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            called.add(function.overloadpacket.__name__)
            return function(*args, **(kwargs or {}))
    generate(policy, processor, prompts, 2, 4, temperature, top_p)
    decoder = policy.engine
    cache, decoder.owner = decoder.cache, [(0, 0, 0), (0, 1, 0), (1, 0, 1), (1, 1, 1)]
    seats = decoder._seat([9, 9], 4) if decoder.shared else None
    fixed = [*cache.tails, *cache.prompts, decoder.tokens, decoder.logps, decoder.count, decoder.done]
    before = [t.data_ptr() for t in fixed]
    with torch.no_grad(), Record():
        decoder.step(4, decoder.tail, seats)
    assert not called & {"_local_scalar_dense", "item", "nonzero", "masked_select", "unique", "repeat_interleave"}
    assert [t.data_ptr() for t in fixed] == before
    assert {"index_put_", "cumsum" if temperature else "argmax"} <= called, "the recorder must see the step"


@pytest.mark.parametrize("which, most", [("text alone", 0), ("images", 12)])
def test_an_update_waits_for_the_device_a_few_times_at_most(world, which, most):
    """Scoring, loss and backward of one micro-batch: the host reads nothing but the vision tower's window boundaries."""
    policy, processor, _, prompts = world
    (prompt, *_) = [p for p in prompts if (p.pixel_values is None) == (which == "text alone")]
    packed, bias = pack(policy, [prompt], [[[1, 2, 3], [4]]]), forbidden_bias(policy, processor)
    read = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            read.extend([name] if (name := function.overloadpacket.__name__) in
                        ("_local_scalar_dense", "nonzero", "masked_select", "unique_consecutive") else [])
            return function(*args, **(kwargs or {}))
    with Record():
        logp = token_logps(policy, packed, bias)
        loss, sums = grpo_loss(logp, logp.detach(), logp.detach(), torch.ones(2), packed.mask)
        loss.backward()
    policy.zero_grad()
    assert len(read) <= most and all(isinstance(value, torch.Tensor) for value in sums.values()), read


class PretendedGraph:
    """What torch.cuda's graphs promise, on a CPU: a capture runs nothing, a replay what was captured."""

    def __init__(self, decoder):
        self.decoder = decoder

    def __enter__(self):
        self.before = [t.clone() for t in self.state()]

    def __exit__(self, *_):
        for tensor, value in zip(self.state(), self.before):
            tensor.copy_(value)

    def state(self):
        d = self.decoder
        return *d.cache.tails, d.tokens, d.logps, d.entropy, d.count, d.done

    def replay(self):
        self.decoder._decode(*next(k for k, graph in self.decoder.graphs.items() if graph is self))

    def pool(self):
        return "pool"


def test_captured_steps_lose_and_double_none(world, monkeypatch):
    """Over refills and compaction, a pretended graph samples token for token what the eager loop samples."""
    policy, processor, _, prompts = world
    lengths = [len(p.input_ids) for p in prompts]
    seeds = [[10 * i + g for g in range(4)] for i in range(len(prompts))]
    eager, captured = (Engine(policy, processor, max(lengths), 8, 40, width=4, shared=False) for _ in range(2))
    captured.capture = True
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: PretendedGraph(captured))
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, pool: graph)
    groups = captured.run(prompts, lengths, seeds)
    assert len(captured.graphs) > 2, "several widths and lengths must have been captured"
    assert [[o.tokens for o in group] for group in groups] == [
        [o.tokens for o in group] for group in eager.run(prompts, lengths, seeds)]


def test_greedy_generation_is_that_of_transformers(world):
    """The checkpoint's own generation config (repetition penalty, top-k) must not leak in."""
    policy, processor, plain, prompts = world
    forbidden = list(processor.forbidden_ids(len(policy.lm_head.weight)))
    ours = generate(policy, processor, prompts, 1, 24, temperature=0.0)
    assert len({tuple(group[0].tokens) for group in ours}) > 1, "answers must depend on the prompt"
    for prompt, (completion,) in zip(prompts, ours):
        images = {} if prompt.pixel_values is None else {
            "pixel_values": prompt.pixel_values, "image_grid_thw": prompt.image_grid_thw,
            "mm_token_type_ids": (prompt.input_ids == processor.image_token_id).int()[None]}
        theirs = plain.generate(
            input_ids=prompt.input_ids[None], attention_mask=torch.ones_like(prompt.input_ids)[None], max_new_tokens=24,
            do_sample=False, repetition_penalty=1.0, suppress_tokens=forbidden, eos_token_id=list(processor.end_ids),
            **images)
        assert completion.tokens == theirs[0, len(prompt.input_ids):].tolist()


def test_a_completion_does_not_depend_on_its_company(world):
    """Per-row seeds, refilled rows, moved rows: each completion is the one it would be alone."""
    policy, processor, _, prompts = world
    many = prompts * 3
    seeds = [[100 * i + g for g in range(2)] for i in range(len(many))]
    together = generate(policy, processor, many, 2, 16, seeds=seeds, max_rows=24)
    refilled = generate(policy, processor, many, 2, 16, seeds=seeds, max_rows=4)
    for i in range(len(many)):
        (alone,) = generate(policy, processor, many[i:i + 1], 2, 16, seeds=seeds[i:i + 1])
        for a, b, c in zip(alone, together[i], refilled[i]):
            assert a.tokens == b.tokens == c.tokens
    assert together[0][0].tokens != together[0][1].tokens, "samples of one prompt must differ"


def test_finished_prompts_are_reported_once(world):
    policy, processor, _, prompts = world
    seen = []
    generate(policy, processor, prompts * 2, 2, 8, max_rows=4, on_finish=lambda i, group: seen.append((i, len(group))))
    assert sorted(seen) == [(i, 2) for i in range(8)]


@pytest.mark.parametrize("end", [0, 1])
def test_completions_end_at_their_first_end_token_inclusive(world, end, monkeypatch):
    """Either end token ends a completion and belongs to it; without one the completion is truncated."""
    policy, processor, _, prompts = world
    other = processor.end_ids[1 - end]

    def prefers_ending(probs, uniform, top_p=1.0):
        token = inverse_cdf(probs, uniform)
        return torch.where(uniform < 0.3, processor.end_ids[end], torch.where(token == other, 0, token))
    monkeypatch.setattr("engine.inverse_cdf", prefers_ending)
    completions = [o for group in generate(policy, processor, prompts, 8, 6) for o in group]
    for o in completions:
        assert o.truncated == (o.tokens[-1] != processor.end_ids[end])
        assert processor.end_ids[end] not in o.tokens[:-1]
        assert len(o.tokens) == 6 or not o.truncated
    assert {o.truncated for o in completions} == {True, False}


def test_forbidden_tokens_are_never_sampled(world):
    policy, processor, _, prompts = world
    forbidden = set(processor.forbidden_ids(len(policy.lm_head.weight)))
    assert processor.image_token_id in forbidden
    groups = generate(policy, processor, prompts, 16, 16, temperature=5.0)
    assert not forbidden & {t for group in groups for o in group for t in o.tokens}


def test_inverse_cdf_draws_each_token_as_often_as_its_probability():
    probs = torch.tensor([0.0, 0.5, 0.0, 0.3, 0.2, 0.0])
    uniform = (torch.arange(1000) + 0.5) / 1000
    counts = inverse_cdf(probs.expand(1000, -1), uniform).bincount(minlength=6)
    assert counts.tolist() == [0, 500, 0, 300, 200, 0]
    counts = inverse_cdf(probs.expand(1000, -1), uniform, top_p=0.6).bincount(minlength=6)
    assert counts.tolist() == [0, 625, 0, 375, 0, 0]
    edge = inverse_cdf(probs.expand(2, -1), torch.tensor([0.0, 1.0]))
    assert edge.tolist() == [1, 4]


def test_vision_tower_in_one_call_equals_the_loop_over_windows(world):
    policy, processor, plain, prompts = world
    images = [p for p in prompts if p.pixel_values is not None]
    pixels, grids = torch.cat([p.pixel_values for p in images]), torch.cat([p.image_grid_thw for p in images])
    assert (grids.prod(-1) > 64).any(), "one image must have several windows"
    ours = image_features(policy, pixels, grids)
    theirs = torch.cat(plain.model.get_image_features(pixels, grids).pooler_output)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def test_a_frozen_tower_may_encode_once_for_all(world, monkeypatch):
    policy, processor, _, prompts = world
    groups, bias = completions_for(prompts), forbidden_bias(policy, processor)
    a = token_logps(policy, pack(policy, prompts, groups), bias)
    known = [dataclasses.replace(p) for p in prompts]
    for p in known:
        if p.pixel_values is not None:
            p.features = image_features(policy, p.pixel_values, p.image_grid_thw)
    monkeypatch.setattr("packed.image_features", None)  # not called again
    b = token_logps(policy, pack(policy, known, groups), bias)
    torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


def test_other_models_are_refused_with_a_sentence(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(UserError, match="bert"):
        load_policy(tmp_path)
    with pytest.raises(UserError, match="nowhere"):
        load_policy(tmp_path / "nowhere")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_captured_step_samples_what_the_eager_one_samples(checkpoint, world):
    policy, processor = load_policy(checkpoint, "cuda", torch.float32)
    prompts = world[3]
    lengths = [len(p.input_ids) for p in prompts]
    seeds = [[10 * i + g for g in range(4)] for i in range(len(prompts))]
    captured, eager = (Engine(policy, processor, max(lengths), 16, 40, width=4) for _ in range(2))
    eager.capture = False
    captured, eager = (e.run(prompts, lengths, seeds) for e in (captured, eager))
    assert [[o.tokens for o in g] for g in captured] == [[o.tokens for o in g] for g in eager]


def test_generate_needs_no_prompts(world):
    policy, processor, _, _ = world
    assert generate(policy, processor, [], 4) == []


# ---- One prompt for a group, in decoding ----

@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_shared_and_copied_prompts_give_the_same_completions(world, temperature):
    """Prompts of mixed length, with and without images; refills while groups end row by row; compaction; short tails."""
    policy, processor, _, prompts = world
    prompts = [prompts[i % len(prompts)] for i in range(9)]
    lengths, seeds = [len(p.input_ids) for p in prompts], [[10 * i + g for g in range(4)] for i in range(9)]
    shared, copied = (Engine(policy, processor, max(lengths), 12, 24, temperature, width=4, shared=flag)
                      .run(prompts, lengths, seeds) for flag in (True, False))
    for a, b in zip((o for group in shared for o in group), (o for group in copied for o in group), strict=True):
        assert a.tokens == b.tokens
        torch.testing.assert_close(a.logps, b.logps, atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_in_two_parts_is_that_in_one(dtype):
    """Rows of three groups in any order, one of them alone, prompts of different length, one row that nobody owns."""
    torch.manual_seed(0)
    rows, kv_heads, repeats, D, P, T = 7, 2, 3, 16, 9, 5
    group, lengths, counts = [1, 0, 1, 2, 0, 1, 1], torch.tensor([9, 4, 1]), torch.tensor([0, 4, 2, 1, 3, 0, 2])
    q, tails, prompts = torch.randn(rows, kv_heads * repeats, D), torch.randn(2, rows, kv_heads, T, D), torch.randn(2, 3, kv_heads, P, D)
    q, tails, prompts = q.to(dtype), tails.to(dtype), prompts.to(dtype)
    places, row_at, place_of = {}, torch.zeros(3, 4, dtype=torch.long), torch.zeros(rows, dtype=torch.long)
    for row, g in enumerate(group[:6]):
        member = places[g] = places.get(g, -1) + 1
        row_at[g, member], place_of[row] = row, 4 * g + member
    unseen = [torch.arange(T) > counts[:, None], torch.arange(P) >= lengths[:, None]]
    masks = [torch.zeros(u.shape, dtype=dtype).masked_fill_(u, -torch.inf)[:, None, None] for u in unseen]
    found = attend_shared(q, list(tails), masks[0], list(prompts), (row_at, place_of, masks[1]))
    for row, g in enumerate(group[:6]):  # by one obvious softmax a row and head
        for head in range(kv_heads * repeats):
            keys, values = (torch.cat([prompts[i, g, head // repeats, :lengths[g]], tails[i, row, head // repeats, :counts[row] + 1]]).double()
                            for i in range(2))
            expected = (keys @ q[row, head].double() / D**0.5).softmax(0) @ values
            tolerance = 1e-5 if dtype == torch.float32 else 2e-2
            torch.testing.assert_close(found[row, head * D:][:D].double(), expected, atol=tolerance, rtol=tolerance)
    assert found.isfinite().all() and found.dtype == torch.float32


def test_a_shared_prompt_is_kept_once(world, prompts_are):
    policy, processor, _, prompts = world
    generate(policy, processor, prompts[:2], 4, 8)
    cache, (rows, longest) = policy.engine.cache, (8, policy.engine.longest)
    if prompts_are == "shared":
        assert cache.prompts[0].shape[1] == 4 and cache.tails[0].shape[1] == rows and cache.tails[0].shape[3] < longest
    else:
        assert not cache.prompts and cache.tails[0].shape[3] > longest


def test_a_kept_engine_serves_any_prompt_that_it_has_room_for(world):
    """Room is dealt out in buckets: a later prompt may be longer than the first, and still fit."""
    policy, processor, _, _ = world

    def asked(length):
        return [Prompt(torch.arange(20, 20 + length), None, None)]
    generate(policy, processor, asked(17), 3, 15)
    kept = policy.engine
    long = generate(policy, processor, asked(kept.longest), 3, 15)
    assert policy.engine is kept
    policy.engine = None
    assert [o.tokens for o in long[0]] == [o.tokens for o in generate(policy, processor, asked(kept.longest), 3, 15)[0]]
