"""AdamW with float32 masters, sharded over ranks; gradients are summed over ranks and clipped here.

No DDP wrapper: one explicit all-reduce of every gradient. Losses are divided by constants that are
known before the step, so that micro-batches, padding, text-only rows and the number of ranks cannot
change the result.
"""

import pickle

import torch
import torch.distributed as dist

from support.base import first_line
from support.ranks import collective, world
from support.words import RunError


class ShardedAdamW:
    """AdamW whose float32 masters and moments live on one rank each; every rank holds the weights.

    At lr 1e-6 bfloat16 weights alone would round nearly every update away, so the update happens in float32
    on the owner and the rounded result is broadcast. With float32 weights the master is the weight itself.

    offload: masters, moments and the step's gradients live in the host's memory. Slower by the way
    there and back, once a step; in float32 the numbers are the same.
    """

    def __init__(self, named_parameters, offload=False):
        self.params = {name: p for name, p in named_parameters if p.requires_grad}
        self.gradients = {}  # {parameter name: gradient of the step}, after `reduce_gradients`
        self.on_host = {name: torch.zeros(p.shape) for name, p in self.params.items() if offload}
        rank, ranks = world()
        load, self.owner = [0] * ranks, {}
        for name, p in sorted(self.params.items(), key=lambda item: -item[1].numel()):
            self.owner[name] = load.index(min(load))
            load[self.owner[name]] += p.numel()
        # Copies of bfloat16 weights, aliases of float32 ones. With offload never all on the device.
        self.masters = {name: (p.detach().cpu() if offload else p.detach()).float()
                        for name, p in self.params.items() if self.owner[name] == rank}
        fused = True if next(iter(self.params.values())).is_cuda else None
        self.adam = torch.optim.AdamW(self.masters.values(), weight_decay=0.0, fused=fused)

    @torch.no_grad()
    def reduce_gradients(self, max_grad_norm):
        """Sum gradients over ranks and clip them; returns their norm before clipping.

        A rank whose micro-batches held no image contributes zeros, so that every rank reduces the
        same tensors; a sum is right because each loss is divided by the global count. With offload
        the gradients go to the host here, once a step.
        """
        for name, p in self.params.items():
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            self.gradients[name] = p.grad
            if self.on_host:
                self.gradients[name], p.grad = self.on_host[name].copy_(p.grad), None
        if world()[1] > 1:
            with collective():
                for work in [dist.all_reduce(g, async_op=True) for g in self.gradients.values()]:
                    work.wait()
        norm = torch.nn.utils.get_total_norm(self.gradients.values())
        scale = torch.as_tensor(max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
        for g in self.gradients.values():
            g.mul_(scale.to(g.device))
        return norm.item()

    @torch.no_grad()
    def step(self, lr, chunk=2**26):
        """Update the owned masters, few at a time for few float32 gradients, and broadcast them."""
        for group in self.adam.param_groups:
            group["lr"] = lr
        names = list(self.masters)
        while names:
            size, batch = 0, []
            while names and (not batch or size + self.params[names[0]].numel() <= chunk):
                batch.append(names.pop(0))
                size += self.params[batch[-1]].numel()
            for name in batch:
                self.masters[name].grad = self.gradients[name].float()
            self.adam.step()  # passes over masters without a gradient
            for name in batch:
                self.params[name].copy_(self.masters[name])
                self.masters[name].grad = None
        if world()[1] > 1:
            with collective():
                for name, p in self.params.items():
                    dist.broadcast(p, self.owner[name])

    def zero_grad(self):
        """Free the step's gradients; with offload the host keeps their memory for the next step."""
        self.gradients.clear()
        for p in self.params.values():
            p.grad = None

    def state_dict(self):
        """{parameter name: moments, step and master} of this rank's share.

        No master where weights are float32: they are it.
        """
        keep_master = next(iter(self.params.values())).dtype != torch.float32
        return {name: {**self.adam.state[master], **({"master": master} if keep_master else {})}
                for name, master in self.masters.items() if master in self.adam.state}

    def load(self, files):
        """Take this rank's share from the shards of any number of ranks."""
        for file in files:
            try:
                shard = torch.load(file, weights_only=True, mmap=True, map_location="cpu")
            except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
                raise RunError(
                    f"{file} is damaged or not an optimizer state ({first_line(error)}); remove "
                    "its directory to resume from the checkpoint before") from error
            for name, state in shard.items():
                if name in self.masters:
                    master = self.masters[name]
                    if "master" in state:
                        master.copy_(state.pop("master"))
                    self.adam.state[master] = {k: v.to(master.device, copy=True) for k, v in state.items()}
