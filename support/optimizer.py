"""AdamW with float32 masters, sharded over ranks; gradients are summed over ranks and clipped here.

No DDP wrapper: one explicit all-reduce of every gradient, divided by constants that are known before the step, so that
micro-batches, padding, text-only rows and the number of ranks cannot change the result.
"""

import pickle

import torch
import torch.distributed as dist

from support.ranks import collective, world
from support.words import RunError


def on_host(tensor):
    """A tensor in the host's memory, pinned where a GPU will fetch it; on a CPU itself."""
    return tensor.cpu().pin_memory() if tensor.is_cuda else tensor


class ShardedAdamW:
    """AdamW whose float32 master weights and moments live on one rank each; every rank holds the compute weights.

    At lr 1e-6 bfloat16 weights alone would round nearly every update away, so the update happens in float32 on the
    owner and the rounded result is broadcast. With float32 weights the master is the weight itself.

    offload: masters, moments and sums of gradients live in the host's memory, and the device keeps gradients only until
    `collect` has added them up. Slower by the way there and back; the numbers are the same.
    """

    def __init__(self, named_parameters, weight_decay=0.0, offload=False):
        self.params = {name: p for name, p in named_parameters if p.requires_grad}
        self.sums = {name: on_host(torch.zeros_like(p, dtype=torch.float32)) for name, p in self.params.items()} \
            if offload else None
        rank, ranks = world()
        load, self.owner = [0] * ranks, {}
        for name, p in sorted(self.params.items(), key=lambda item: -item[1].numel()):
            self.owner[name] = load.index(min(load))
            load[self.owner[name]] += p.numel()
        # .detach().float() copies bfloat16 weights and aliases float32 ones
        masters = {n: p.detach().float() for n, p in self.params.items() if self.owner[n] == rank}
        self.masters = {n: on_host(master) for n, master in masters.items()} if offload else masters
        fused = True if next(iter(self.params.values())).is_cuda else None
        self.adam = torch.optim.AdamW(self.masters.values(), weight_decay=weight_decay, fused=fused)

    @torch.no_grad()
    def collect(self):
        """After a backward pass: with offload, add the gradients to their sums on the host and free them."""
        for name, p in self.params.items() if self.sums else ():
            if p.grad is not None:
                self.sums[name] += p.grad.to(self.sums[name])
                p.grad = None

    def gradients(self):
        """{parameter name: its gradient, summed over micro-batches}; zeros where no micro-batch reached it."""
        for p in self.params.values():
            if p.grad is None and not self.sums:
                p.grad = torch.zeros_like(p)
        return self.sums or {name: p.grad for name, p in self.params.items()}

    def reduce_gradients(self, max_norm):
        """Sum gradients over ranks and clip them; returns their norm before clipping.

        One explicit all-reduce in place of the DDP wrapper: a rank whose micro-batches held no image contributes zeros,
        so every rank reduces the same tensors, and a sum is right because each loss is divided by the global count.
        """
        self.collect()
        gradients = self.gradients()
        if world()[1] > 1:
            with collective():
                for work in [dist.all_reduce(g, async_op=True) for g in gradients.values()]:
                    work.wait()
        norm = torch.nn.utils.get_total_norm(gradients.values())
        scale = torch.as_tensor(max_norm / (norm + 1e-6)).clamp(max=1.0)
        for g in gradients.values():
            g.mul_(scale.to(g.device))
        return norm.item()

    @torch.no_grad()
    def step(self, lr, chunk=2**26):
        """Update the owned masters a chunk at a time (so that few float32 gradients exist at once), then broadcast."""
        for group in self.adam.param_groups:
            group["lr"] = lr
        names, gradients = list(self.masters), self.gradients()
        while names:
            size, batch = 0, []
            while names and (not batch or size + self.params[names[0]].numel() <= chunk):
                batch.append(names.pop(0))
                size += self.params[batch[-1]].numel()
            for name in batch:
                self.masters[name].grad = gradients[name].float()
            self.adam.step()  # passes over masters without a gradient
            for name in batch:
                self.params[name].copy_(self.masters[name])
                self.masters[name].grad = None
        if world()[1] > 1:
            with collective():
                for name, p in self.params.items():
                    dist.broadcast(p, self.owner[name])

    def zero_grad(self):
        """Free the gradients; with offload, the host keeps its sums' memory for the next step."""
        for p in self.params.values():
            p.grad = None
        for total in (self.sums or {}).values():
            total.zero_()

    def state_dict(self):
        """{parameter name: moments, step and (unless weights are float32 themselves) master} of this rank's share."""
        keep_master = next(iter(self.params.values())).dtype != torch.float32
        return {name: {**self.adam.state[master], **({"master": master} if keep_master else {})}
                for name, master in self.masters.items() if master in self.adam.state}

    def load(self, files):
        """Take this rank's share from the shards of any number of ranks."""
        for file in files:
            try:
                shard = torch.load(file, weights_only=True, mmap=True, map_location="cpu")
            except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
                raise RunError(f"{file} is damaged or not an optimizer state ({str(error).splitlines()[0]}); remove "
                               "its directory to resume from the checkpoint before") from error
            for name, state in shard.items():
                if name in self.masters:
                    master = self.masters[name]
                    if "master" in state:
                        master.copy_(state.pop("master"))
                    self.adam.state[master] = {k: v.to(master.device, copy=True) for k, v in state.items()}
