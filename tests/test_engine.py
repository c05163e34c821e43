"""Scoring and sampling against plain transformers: the same numbers, whatever is packed."""

import copy
import dataclasses
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Qwen2_5_VLForConditionalGeneration

from currreft import grpo_loss
from data import Prompt, load_examples
from engine import Engine, attend_shared, generate, inverse_cdf, load_policy
from packed import SelectedLogps, embed_patches, forbidden_bias, image_features, pack, rms_norm
from packed import token_logps
from support.rows import find_files
from support.tiny import tiny_checkpoint, tiny_data

LENGTHS = [[3, 7], [5, 1], [9, 9], [2, 4]]  # of two completions of each of four prompts


@pytest.fixture(params=["shared", "copied"])
def prompts_are(request, monkeypatch, world):
    """Both ways to keep a group's prompt, whatever the rule would choose for short ones."""
    world[0].engine = None
    monkeypatch.setattr("engine.shares_prompts", lambda device, length, rows, width:
                        request.param == "shared" and width > 1)
    return request.param


both_ways = pytest.mark.usefixtures("prompts_are")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A tiny checkpoint with weights so large that its answers depend on what it sees."""
    path = tiny_checkpoint(tmp_path_factory.mktemp("model"))
    model, _ = load_policy(path)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(4 if p.dim() > 1 else 1)
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def world(checkpoint, tmp_path_factory):
    """(policy, processor, plain model, prompts: text only, two sizes of image, two images)."""
    policy, processor = load_policy(checkpoint)
    plain = Qwen2_5_VLForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32)
    data = tiny_data(tmp_path_factory.mktemp("data"))
    files = find_files(data)
    rows = [row for file in (files["train"]["open"], files["questions"])
            for row in load_examples(file, image_root=data)]
    examples = {tuple(row.images): row for row in rows}.values()
    prompts = [processor(e) for e in sorted(examples, key=lambda row: len(row.images))]
    assert prompts[0].pixel_values is None and len(prompts[-1].image_grid_thw) == 2
    assert len({str(p.image_grid_thw) for p in prompts}) >= 4
    return policy, processor, plain.eval(), [*prompts[:3], prompts[-1]]


def completions_for(prompts):
    g = torch.Generator().manual_seed(0)
    return [[torch.randint(250, (n,), generator=g).tolist() for n in lengths]
            for _, lengths in zip(prompts, LENGTHS)]


def images_of(prompt, copies=1):
    """A prompt's images as transformers wants them, for so many rows of it."""
    return {} if prompt.pixel_values is None else {
        "pixel_values": prompt.pixel_values.repeat(copies, 1),
        "image_grid_thw": prompt.image_grid_thw.repeat(copies, 1)}


def separate_rows(world, prompt, group, bias, temperature=1.0):
    """The oracle: (logps, entropies) (G, T) of padded rows, each with prompt and images again."""
    _, processor, plain, _ = world
    P, tokens = len(prompt.input_ids), [torch.tensor(c) for c in group]
    rows = pad_sequence([torch.cat([prompt.input_ids, c]) for c in tokens], True, processor.pad_id)
    there = pad_sequence([torch.ones(P + len(c)).long() for c in tokens], True)
    logits = plain(
        input_ids=rows, attention_mask=there, use_cache=False, **images_of(prompt, len(group)),
        mm_token_type_ids=(rows == processor.image_token_id).int()).logits[:, P - 1:-1]
    logps = (logits.float() / temperature + bias).log_softmax(-1)
    entropy = -(logps.exp() * logps.clamp(min=-1e30)).sum(-1)
    return logps.gather(2, rows[:, P:, None])[..., 0].masked_fill(there[:, P:] == 0, 0.0), entropy


def run(world, rows, max_new, prompts, temperature=1.0, capture=False, **settings):
    """(four completions of each prompt, the Engine that made them)."""
    lengths = [len(p.input_ids) for p in prompts]
    decoder = Engine(*world[:2], max(lengths), rows, max_new, temperature, width=4, **settings)
    decoder.capture = capture
    seeds = [[10 * i + g for g in range(4)] for i in range(len(prompts))]
    return [o for group in decoder.run(prompts, lengths, seeds) for o in group], decoder


class Calls(TorchDispatchMode):
    """Names of the operations that torch was asked for, but for views."""

    def __enter__(self):
        self.names = []
        return super().__enter__()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if not function.is_view:
            self.names.append(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


# ---- Scoring ----

def test_the_worked_example_of_a_packed_row(world):
    """Packed's own: prompts "a b c" and "d e", completions "f g", "h", "i", "j k"."""
    a, b, c, d, e, f, g, h, i, j, k = range(11)
    prompts = [Prompt(torch.tensor(ids), None, None) for ids in ([a, b, c], [d, e])]
    packed = pack(world[0], prompts, [[[f, g], [h]], [[i], [j, k]]])
    expected = dict(
        input_ids=[a, b, c, d, e, f, g, h, i, j, k], prompt_slots=[0, 1, 2, 3, 4],
        position_ids=[[0, 1, 2, 0, 1, 3, 4, 3, 2, 2, 3]] * 3, prompt_of=[0, 0, 1, 1],
        completion_slots=[0, 1, 2, 4, 6, 7], predictors=[2, 5, 2, 4, 4, 9],
        mask=[[1, 1], [1, 0], [1, 0], [1, 1]])
    assert {name: getattr(packed, name).tolist() for name in expected} == expected
    places = packed.prompt_places.tolist() + packed.completion_places.tolist()
    real = [[0, 1, 2], [3, 4], [5, 6], [7], [8], [9, 10]]
    assert [line[:len(known)] for line, known in zip(places, real, strict=True)] == real
    assert packed.attend.shape == (4, 1, 4, 5)  # each line twice: two query heads share their keys
    assert torch.equal(packed.attend[:, 0, ::2], packed.attend[:, 0, 1::2])
    seen = (packed.attend[::2, 0, ::2] == 0).int().tolist()
    assert seen == [[[1, 1, 1, 1, 0], [1] * 5], [[1, 1, 0, 1, 0], [1, 1, 0, 1, 1]]]
    # On CUDA the backward pass of indexing adds up what points at one place one by one.
    packed = pack(world[0], world[3], [[[1] * 40, [2], [3]] for _ in world[3]])
    for places in (packed.prompt_places, packed.completion_places):
        assert places.flatten().bincount().max() <= len(places) + 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decode_rounds_its_norms_as_the_model_does(world, dtype):
    """One rounding less, and bfloat16 drifts: 0.077 nats a token instead of 0.0045."""
    norm = copy.deepcopy(world[2].model.language_model.norm).to(dtype)  # its class's own forward
    torch.nn.init.normal_(norm.weight, 1.0, 0.3)
    x = torch.randn(500, 64, generator=torch.Generator().manual_seed(0)).to(dtype) * 3
    tolerance = 0 if dtype == torch.bfloat16 else 1e-6
    torch.testing.assert_close(rms_norm(norm, x), norm(x), atol=tolerance, rtol=tolerance)


def test_patches_are_embedded_as_by_the_convolution_and_cudnn_stays_off(world):
    """Value and gradient. cuDNN's attention would plan anew for every shape, nearly every group."""
    module, pixels = world[0].model.visual.patch_embed, torch.randn(20, 1176)
    assert module.forward.func is embed_patches and not torch.backends.cuda.cudnn_sdp_enabled()
    results = []
    for forward in (module.forward, type(module).forward.__get__(module)):
        out = forward(pixels)
        results.append((out, *torch.autograd.grad(out.square().sum(), module.proj.weight)))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
def test_packed_row_equals_separate_rows_in_value_and_gradient(world, checkpointing):
    policy, _, plain, prompts = world
    groups, bias = completions_for(prompts), forbidden_bias(*world[:2])
    weight = torch.randn(8, 9, generator=torch.Generator().manual_seed(1))
    policy.zero_grad(), plain.zero_grad()
    if checkpointing:
        policy.gradient_checkpointing_enable({"use_reentrant": False})
    packed = token_logps(policy.train(), pack(policy, prompts, groups), bias, 0.7)
    (packed * weight).sum().backward()
    policy.gradient_checkpointing_disable()
    policy.eval()
    for i, (prompt, group) in enumerate(zip(prompts, groups)):
        ours, oracle = packed[2 * i:2 * i + 2], separate_rows(world, prompt, group, bias, 0.7)[0]
        T = oracle.shape[1]
        torch.testing.assert_close(ours[:, :T], oracle, atol=1e-5, rtol=0)
        assert not ours[:, T:].any(), "padding must stay 0"
        (oracle * weight[2 * i:2 * i + 2, :T]).sum().backward()
    expected = dict(plain.named_parameters())
    for name, p in policy.named_parameters():
        scale = expected[name].grad.abs().max().clamp(min=1)
        torch.testing.assert_close(
            p.grad / scale, expected[name].grad / scale, atol=1e-5, rtol=0, msg=name)


def test_positions_are_three_dimensional_and_matter(world):
    """M-RoPE that falls back to 1-D positions moves far more than the tolerance above."""
    (group,), bias = completions_for(world[3][1:2]), forbidden_bias(*world[:2])
    batch, P = pack(world[0], world[3][1:2], [group]), len(world[3][1].input_ids)
    assert (batch.position_ids[0] != batch.position_ids[1]).any()
    right = token_logps(world[0], batch, bias)
    flat = torch.cat([torch.arange(P), *(P + torch.arange(len(tokens)) for tokens in group)])
    batch.position_ids = flat.expand(3, -1)
    assert (token_logps(world[0], batch, bias) - right).abs().max() > 1e-3


def test_log_probabilities_in_chunks_equal_the_naive_ones(monkeypatch):
    """Value and gradients; a frozen head gets none: at 3B it alone would be 0.6 GB."""
    g = torch.Generator().manual_seed(0)
    h, w = (torch.randn(n, 8, generator=g, requires_grad=True) for n in (11, 23))
    targets, out = torch.randint(0, 20, (11,), generator=g), torch.randn(11, generator=g)
    bias = torch.zeros(23).index_fill(0, torch.arange(20, 23), -torch.inf)
    four = partial(SelectedLogps.logits, numbers=4 * 23)  # tokens at a time
    assert [len(logits) for _, logits in four(h, w, bias, 1.0)] == [4, 4, 3]
    monkeypatch.setattr(SelectedLogps, "logits", staticmethod(four))
    naive = ((h @ w.T) / 0.6 + bias).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    expected = naive, *torch.autograd.grad(naive, (h, w), out)
    logps = SelectedLogps.apply(h, w, targets, bias, 0.6)
    found = logps, *torch.autograd.grad(logps, (h, w), out)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    frozen = SelectedLogps.apply(h, w.detach(), targets, bias, 0.6)
    of_hidden, of_head, *_ = SelectedLogps.backward(frozen.grad_fn, out)
    torch.testing.assert_close(of_hidden, expected[1], atol=1e-5, rtol=1e-5)
    assert of_head is None


def test_the_vision_tower_in_one_call_is_the_loop_over_windows_and_may_run_once(world, monkeypatch):
    """A frozen tower encodes each image once for all that follows."""
    policy, _, plain, prompts = world
    groups, bias = completions_for(prompts), forbidden_bias(*world[:2])
    right = token_logps(policy, pack(policy, prompts, groups), bias)
    known = [dataclasses.replace(p) for p in prompts]
    for p in (p for p in known if p.pixel_values is not None):
        p.features = image_features(policy, p.pixel_values, p.image_grid_thw)
        theirs = plain.model.get_image_features(p.pixel_values, p.image_grid_thw).pooler_output
        torch.testing.assert_close(p.features, torch.cat(theirs), atol=1e-5, rtol=0)
    assert (known[-1].image_grid_thw.prod(-1) > 64).any(), "an image of several windows"
    monkeypatch.setattr("packed.image_features", None)  # not called again
    found = token_logps(policy, pack(policy, known, groups), bias)
    torch.testing.assert_close(found, right, atol=1e-5, rtol=0)


@pytest.mark.parametrize("which, most", [(0, 0), (1, 12)], ids=["text alone", "images"])
def test_an_update_waits_for_the_device_a_few_times_at_most(world, which, most):
    """Scoring, loss and backward pass read nothing but the vision tower's window boundaries."""
    policy, _, _, prompts = world
    packed, bias = pack(policy, [prompts[which]], [[[1, 2], [4]]]), forbidden_bias(*world[:2])
    with Calls() as calls:
        logp = token_logps(policy, packed, bias)
        loss, sums = grpo_loss(logp, logp.detach(), logp.detach(), torch.ones(2), packed.mask)
        loss.backward()
    policy.zero_grad()
    waits = {"_local_scalar_dense", "nonzero", "masked_select", "unique_consecutive"}
    assert sum(name in waits for name in calls.names) <= most
    assert all(isinstance(value, torch.Tensor) for value in sums.values())


# ---- Sampling ----

@both_ways
@pytest.mark.parametrize("temperature", [0.5, 1.0, 5.0])
def test_what_was_sampled_is_what_is_scored(world, temperature):
    """By our own scoring and by plain transformers; its entropy; and nothing forbidden in it."""
    policy, processor, _, prompts = world
    bias = forbidden_bias(policy, processor)
    groups = generate(policy, processor, prompts, 3, 10, temperature)
    batch = pack(policy, prompts, [[o.tokens for o in group] for group in groups])
    scored = iter(token_logps(policy, batch, bias, temperature))
    for prompt, group in zip(prompts, groups):
        with torch.no_grad():
            oracle = separate_rows(world, prompt, [o.tokens for o in group], bias, temperature)
        for o, logps, *theirs in zip(group, scored, *oracle):
            ours, theirs = (o.logps, o.entropy), [x[:len(o.tokens)] for x in theirs]
            torch.testing.assert_close(logps[:len(o.tokens)], o.logps, atol=1e-5, rtol=0)
            torch.testing.assert_close(theirs, list(ours), atol=2e-5, rtol=1e-5)
            assert bias[o.tokens].isfinite().all() and bias[processor.image_token_id] == -torch.inf


@pytest.mark.parametrize("temperature, top_p", [(1.0, 1.0), (0.7, 0.9), (0.0, 1.0)])
def test_a_decode_step_never_waits_for_its_numbers(world, prompts_are, temperature, top_p):
    """A graph can hold no number that the host reads, and no memory that moves."""
    policy, processor, _, prompts = world
    generate(policy, processor, prompts, 2, 4, temperature, top_p)
    decoder, cache = policy.engine, policy.engine.cache
    decoder.owner = [(0, 0, 0), (0, 1, 0), (1, 0, 1), (1, 1, 1)]
    seats = decoder._seat([9, 9], 4) if prompts_are == "shared" else None
    fixed = [*cache.tails, *cache.prompts, decoder.tokens, decoder.logps, decoder.count]
    before = [t.data_ptr() for t in fixed]
    with torch.no_grad(), Calls() as calls:
        decoder.step(4, decoder.tail, seats)
    assert not {"_local_scalar_dense", "item", "nonzero", "masked_select", "unique",
                "repeat_interleave"} & {*calls.names}
    assert [t.data_ptr() for t in fixed] == before
    assert {"index_put_", "cumsum" if temperature else "argmax"} <= {*calls.names}
    if top_p == temperature:  # a GPU waits for its kernels: of two layers, and of what is around
        assert len(calls.names) <= (136 if prompts_are == "shared" else 112), calls.names


def test_captured_steps_lose_and_double_none(world, monkeypatch):
    """Pretended graphs, whose capture runs nothing, sample over refills and compaction as eager."""
    eager, _ = run(world, 8, 40, world[3], shared=False)
    decode = Engine._decode

    @contextmanager
    def capture(graph, pool):
        with monkeypatch.context() as patch:
            patch.setattr(Engine, "_decode", lambda decoder, *shape: setattr(
                graph, "replay", partial(decode, decoder, *shape)))
            yield
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(pool=lambda: "pool"))
    monkeypatch.setattr(torch.cuda, "graph", capture)
    captured, decoder = run(world, 8, 40, world[3], capture=True, shared=False)
    assert len(decoder.graphs) > 2, "several widths and lengths must have been captured"
    assert [o.tokens for o in captured] == [o.tokens for o in eager]
    monkeypatch.setattr(torch.cuda, "graph", None)  # a capture that fails leaves no empty graph
    with pytest.raises(TypeError), torch.no_grad():
        decoder.step(7, 16)
    assert (7, 16) not in decoder.graphs


class Scheduled(Engine):
    """The engine's own scheduler as on a GPU; in place of a model, lengths that were drawn."""

    def _admit(self, batch):
        for prompt, rows, _ in batch:
            self.first[rows], self.count[rows], self.done[rows] = len(prompt.input_ids), 1, False

    def step(self, n, T, seats=None):
        self.graphs[n, T] = self.graphs.get((n, T), 0) + 1
        if sum(self.graphs.values()) % self.stride == 0:  # all steps of a stride at its last one
            length = -self.max_new / 3 * self.uniform[:n, 0].log()
            length = length.long().clamp(1, self.max_new)
            self.count[:n] = (self.count[:n] + self.stride).minimum(length)
            self.done[:n] = self.count[:n] == length


@pytest.mark.parametrize("groups, rows, max_new, steps", [
    (8, 64, 512, 400), (16, 64, 2048, 30), (16, 128, 2048, 30)])
def test_the_number_of_graphs_stays_small(world, monkeypatch, groups, rows, max_new, steps):
    """Each keeps its memory: one for every shape that is met would fill a GPU in 50 steps."""
    monkeypatch.setattr("engine.Cache", lambda model, _, longest, rows, tail: SimpleNamespace(
        tails=[torch.zeros(1, rows, 1, tail, 1)] * 2, prompts=[]))
    processor = SimpleNamespace(end_ids=[0], decode=str, forbidden_ids=lambda rows: [])
    decoder = Scheduled(world[0], processor, 4096, rows, max_new, width=8, shared=False)
    decoder.capture, decoder.stride, decoder.bucket = True, 16, 256
    for step in range(steps):
        g = torch.Generator().manual_seed(step)
        lengths = torch.randint(300, 4097, (groups,), generator=g).tolist()
        seeds = torch.randint(2**40, (groups, 8), generator=g).tolist()
        decoder.run([Prompt(torch.zeros(n), None, None) for n in lengths], lengths, seeds)
    assert 16 < len(decoder.graphs) <= 64 and len({T for _, T in decoder.graphs}) <= 14


@both_ways
def test_greedy_generation_is_that_of_transformers(world):
    """The checkpoint's own generation config (repetition penalty, top-k) must not leak in."""
    policy, processor, plain, prompts = world
    forbidden = list(processor.forbidden_ids(len(policy.lm_head.weight)))
    ours = generate(policy, processor, prompts, 1, 24, temperature=0.0)
    assert len({tuple(group[0].tokens) for group in ours}) > 1, "answers must depend on the prompt"
    for prompt, (completion,) in zip(prompts, ours):
        ids = prompt.input_ids[None]
        theirs = plain.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False,
            repetition_penalty=1.0, suppress_tokens=forbidden, eos_token_id=list(processor.end_ids),
            mm_token_type_ids=(ids == processor.image_token_id).int(), **images_of(prompt))
        assert completion.tokens == theirs[0, ids.shape[1]:].tolist()


@both_ways
def test_a_completion_does_not_depend_on_its_company(world):
    """Refilled rows, moved rows, prompts or examples: each is what it would be alone."""
    policy, processor, _, prompts = world
    many = prompts * 3 + [p.example for p in prompts]
    seeds, told = [[100 * i + g for g in range(2)] for i in range(len(many))], []
    together = generate(policy, processor, many, 2, 16, seeds=seeds, max_rows=24)
    refilled = generate(policy, processor, many, 2, 16, seeds=seeds, max_rows=4,
                        on_finish=lambda i, group: told.append((i, len(group))))
    for i in range(len(many)):
        (alone,) = generate(policy, processor, [prompts[i % 4]], 2, 16, seeds=seeds[i:i + 1])
        for a, b, c in zip(alone, together[i], refilled[i]):
            assert a.tokens == b.tokens == c.tokens
    assert together[0][0].tokens != together[0][1].tokens, "samples of one prompt must differ"
    assert sorted(told) == [(i, 2) for i in range(len(many))]
    assert generate(policy, processor, [], 4) == []


@both_ways
@pytest.mark.parametrize("end", [0, 1])
def test_completions_end_at_their_first_end_token_inclusive(world, end, monkeypatch):
    """Either end token ends a completion and belongs to it; without one it is truncated."""
    policy, processor, _, prompts = world
    other = processor.end_ids[1 - end]

    def prefers_ending(probs, uniform, top_p=1.0):
        token = inverse_cdf(probs, uniform)
        token = torch.where(token == other, 0, token)
        return torch.where(uniform < 0.3, processor.end_ids[end], token)
    monkeypatch.setattr("engine.inverse_cdf", prefers_ending)
    completions = [o for group in generate(policy, processor, prompts, 8, 6) for o in group]
    for o in completions:
        assert o.truncated == (o.tokens[-1] != processor.end_ids[end])
        assert processor.end_ids[end] not in o.tokens[:-1]
        assert len(o.tokens) == 6 or not o.truncated
    assert {o.truncated for o in completions} == {True, False}


def test_inverse_cdf_draws_each_token_as_often_as_its_probability():
    probs = torch.tensor([0.0, 0.5, 0.0, 0.3, 0.2, 0.0])
    uniform = (torch.arange(1000) + 0.5) / 1000
    for top_p, expected in ((1.0, [0, 500, 0, 300, 200, 0]), (0.6, [0, 625, 0, 375, 0, 0])):
        drawn = inverse_cdf(probs.expand(1000, -1), uniform, top_p)
        assert drawn.bincount(minlength=6).tolist() == expected
    assert inverse_cdf(probs.expand(2, -1), torch.tensor([0.0, 1.0])).tolist() == [1, 4]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_captured_step_samples_what_the_eager_one_samples(checkpoint, world):
    on_gpu = load_policy(checkpoint, "cuda", torch.float32)
    captured, eager = (run(on_gpu, 16, 40, world[3], capture=flag)[0] for flag in (True, False))
    assert [o.tokens for o in captured] == [o.tokens for o in eager]


# ---- One prompt for a group ----

@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_shared_and_copied_prompts_give_the_same_completions(world, temperature):
    """Mixed lengths, with and without images; refills while groups end row by row; compaction."""
    prompts = [world[3][i % len(world[3])] for i in range(9)]
    (shared, kept), (copied, whole) = (
        run(world, 12, 24, prompts, temperature, shared=flag) for flag in (True, False))
    for a, b in zip(shared, copied, strict=True):
        assert a.tokens == b.tokens
        torch.testing.assert_close(a.logps, b.logps, atol=1e-5, rtol=0)
    assert kept.cache.prompts[0].shape[1] == 6, "twice the full groups" and not whole.cache.prompts
    assert kept.cache.tails[0].shape[3] < kept.longest < whole.cache.tails[0].shape[3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_in_two_parts_is_that_in_one(dtype):
    """Rows of groups in any order, one alone; prompts of any length; a row without a group."""
    torch.manual_seed(0)
    rows, kv_heads, repeats, D, P, T = 7, 2, 3, 16, 9, 5
    group, lengths, counts = [1, 0, 1, 2, 0, 1], [9, 4, 1], [1, 5, 3, 2, 4, 1, 3]
    q, tails, prompts = (torch.randn(shape).to(dtype) for shape in (
        (rows, kv_heads * repeats, D), (2, rows, kv_heads, T, D), (2, 3, kv_heads, P, D)))
    unseen = torch.arange(T) >= torch.tensor(counts)[:, None]
    mask = torch.zeros(rows, T, dtype=dtype).masked_fill_(unseen, -torch.inf)[:, None, None]
    decoder = SimpleNamespace(owner=[(g, 0, g) for g in group] + [None], groups=3,
                              slots=torch.arange(P), model=SimpleNamespace(dtype=dtype))
    seats = Engine._seat(decoder, lengths, rows)
    found = attend_shared(q, list(tails), mask, list(prompts), seats)
    for row, g in enumerate(group):  # by one obvious softmax a row and head
        keys, values = torch.cat([
            prompts[:, g, :, :lengths[g]], tails[:, row, :, :counts[row]]], 2).double()
        scores = q[row].view(kv_heads, repeats, D).double() @ keys.mT / D**0.5
        expected = (scores.softmax(-1) @ values).flatten()
        tolerance = 1e-6 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(found[row].double(), expected, atol=tolerance, rtol=tolerance)
    assert found.isfinite().all() and found.dtype == torch.float32
    decoder.owner = [(7, 0, 1), (5, 0, 0), (7, 1, 1), None]  # the docstring's own example
    row_at, place_of, mask = Engine._seat(decoder, {7: 3, 5: 2}, 4)
    assert row_at.tolist() == [[1, 0], [0, 2]] and place_of.tolist() == [2, 0, 3, 0]
    assert mask[:, 0, 0].tolist() == [[0, 0, -torch.inf], [0, 0, 0]]


@both_ways
def test_a_kept_engine_serves_any_prompt_that_it_has_room_for(world):
    """Room is dealt out in buckets: a later prompt may be longer than the first, and still fit."""
    def asked(length):
        prompt = Prompt(torch.arange(20, 20 + length), None, None)
        return [o.tokens for o in generate(*world[:2], [prompt], 3, 15)[0]], world[0].engine
    kept = asked(17)[1]
    long, same = asked(kept.longest)
    world[0].engine = None
    assert same is kept and long == asked(kept.longest)[0]
