"""Equations against slower ones: advantages, the loss and its gradient, the schedule, the optimizer."""

import math

import pytest
import torch

from currreft import Config, Stage, group_advantages, grpo_loss, learning_rate
from support.optimizer import ShardedAdamW


def test_advantages_by_hand():
    a = group_advantages(torch.tensor([[1.0, 0.0, 0.0, 1.0], [2.0, 0.0, 1.0, 1.0]], dtype=torch.float64))
    s = 0.5 / (math.sqrt(1 / 3) + 1e-4)  # unbiased std of 1, 0, 0, 1 is sqrt(1/3)
    t = 1 / (math.sqrt(2 / 3) + 1e-4)
    torch.testing.assert_close(a, torch.tensor([[s, -s, -s, s], [t, -t, 0, 0]], dtype=torch.float64))


def test_equal_rewards_give_exactly_no_advantage():
    """Rounding in the mean of eight 1.2's, divided by 1e-4, would otherwise be a gradient."""
    assert not group_advantages(torch.full((3, 8), 1.2)).any()
    assert not group_advantages(torch.full((3, 7), 0.1)).any()


def slow_loss(logp, old, ref, A, lengths, beta, eps):
    total = 0.0
    for i, length in enumerate(lengths):
        own = 0.0
        for t in range(length):
            rho = math.exp(logp[i][t] - old[i][t])
            clipped = min(max(rho, 1 - eps), 1 + eps)
            d = min(max(ref[i][t] - logp[i][t], -20), 20)
            own += min(rho * A[i], clipped * A[i]) - beta * (math.exp(d) - d - 1)
        total += own / length
    return -total / len(lengths)


def random_case(seed=0, R=6, T=5):
    g = torch.Generator().manual_seed(seed)
    logp, old, ref = (-2 * torch.rand(R, T, generator=g, dtype=torch.float64) for _ in range(3))
    lengths = torch.randint(1, T + 1, (R,), generator=g)
    mask = (torch.arange(T) < lengths[:, None]).double()
    return logp, old, ref, torch.randn(R, generator=g, dtype=torch.float64), mask, lengths


def test_loss_equals_a_slow_scalar_computation():
    logp, old, ref, A, mask, lengths = random_case()
    loss, sums = grpo_loss(logp, old, ref, A, mask, 0.04, 0.2)
    slow = slow_loss(logp.tolist(), old.tolist(), ref.tolist(), A.tolist(), lengths.tolist(), 0.04, 0.2)
    assert loss.item() == pytest.approx(slow, rel=1e-12)
    assert sums["tokens"] == lengths.sum() and 0 < sums["clipped"] < sums["tokens"]


def test_loss_by_hand():
    """One completion of two tokens, A = 1: rho = e^0.5 is clipped to 1.2, rho = e^-0.1 is not; no KL."""
    logp, old = torch.tensor([[-0.5, -1.1]]), torch.tensor([[-1.0, -1.0]])
    loss, sums = grpo_loss(logp, old, None, torch.tensor([1.0]), torch.ones(1, 2), beta=0.04, epsilon=0.2)
    assert loss.item() == pytest.approx(-(1.2 + math.exp(-0.1)) / 2)
    assert sums == {"kl": 0.0, "clipped": 1.0, "tokens": 2.0}


def test_gradient_on_policy_is_the_policy_gradient():
    """At rho = 1 and ref = logp the gradient is -A_i / (R |o_i|): the KL term is flat there."""
    logp, _, _, A, mask, lengths = random_case(1)
    logp.requires_grad_()
    grpo_loss(logp, logp.detach(), logp.detach(), A, mask)[0].backward()
    torch.testing.assert_close(logp.grad, -(A / lengths / len(A))[:, None] * mask)


def test_clip_stops_the_gradient_only_where_it_would_overshoot():
    logp = torch.tensor([[0.5], [0.5], [-0.5], [-0.5]], requires_grad=True)
    A = torch.tensor([1.0, -1.0, 1.0, -1.0])
    grpo_loss(logp, torch.zeros(4, 1), None, A, torch.ones(4, 1))[0].backward()
    assert (logp.grad[:, 0] == 0).tolist() == [True, False, False, True]


def test_kl_is_positive_and_finite_for_any_difference():
    far = torch.tensor([[-1e4, 0.0, -3.0]])
    for logp, ref in ((far, -far), (-far, far), (far, far)):
        loss, sums = grpo_loss(logp.clone(), logp, ref, torch.zeros(1), torch.ones(1, 3))
        assert math.isfinite(loss.item()) and sums["kl"] >= 0


def test_padding_and_micro_batches_do_not_change_the_loss():
    logp, old, ref, A, mask, _ = random_case(2)
    whole = grpo_loss(logp, old, ref, A, mask)[0]
    wide = [torch.cat([x, torch.full((6, 3), fill, dtype=torch.float64)], 1) for x, fill in
            ((logp, -9.0), (old, -1.0), (ref, -5.0), (mask, 0.0))]
    torch.testing.assert_close(grpo_loss(*wide[:3], A, wide[3])[0], whole)
    parts = [grpo_loss(*(x[s] for x in (logp, old, ref, A, mask)), num_completions=6)[0]
             for s in (slice(0, 1), slice(1, 4), slice(4, 6))]
    torch.testing.assert_close(sum(parts), whole)


def test_learning_rate_schedule():
    cfg, stage = Config(data="d"), Stage(0, "open", 12)
    values = [learning_rate(cfg, stage, step, 1.0) for step in range(12)]
    assert values[0] == 1.0 and values[6] == pytest.approx(0.5) and 0 < values[11] < 0.03
    constant = Config(data="d", lr_schedule="constant")
    assert {learning_rate(constant, stage, step, 0.1) for step in range(12)} == {0.1}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masters_keep_updates_that_bfloat16_would_lose(dtype):
    """20 AdamW steps at 1e-6 equal float32 AdamW, rounded; without masters bfloat16 weights would not move at all."""
    start = (torch.randn(64, generator=torch.Generator().manual_seed(0)) + 3).to(dtype)
    weight, exact = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.float().clone())
    ours, theirs = ShardedAdamW([("w", weight)]), torch.optim.AdamW([exact], lr=1e-6, weight_decay=0.0)
    for step in range(20):
        grad = torch.randn(64, generator=torch.Generator().manual_seed(step)).to(dtype)
        weight.grad, exact.grad = grad.clone(), grad.float()
        ours.reduce_gradients(1e9)
        ours.step(1e-6)
        ours.zero_grad()
        theirs.step()
    torch.testing.assert_close(ours.masters["w"], exact.detach(), atol=0, rtol=0)
    assert torch.equal(weight, exact.to(dtype))
    assert not torch.equal(ours.masters["w"], start.float())




def test_clipping_scales_to_the_norm_and_reports_the_norm_before():
    weight = torch.nn.Parameter(torch.zeros(2))
    optimizer = ShardedAdamW([("w", weight)])
    weight.grad = torch.tensor([3.0, 4.0])
    assert optimizer.reduce_gradients(1.0) == pytest.approx(5.0)
    torch.testing.assert_close(weight.grad, torch.tensor([0.6, 0.8]), atol=1e-5, rtol=0)
