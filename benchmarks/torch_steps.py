"""PyTorch's training and inference steps of the same net, ready to be timed."""

from __future__ import annotations

import platform
import resource
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from benchmarks.timed import Net, Timed
from benchmarks.torch_nets import torch_net, train_step


def steps_to_time(implementation: str, net: Net, batch: int, what: Sequence[str]) -> Iterator[Timed]:
    """The steps that `what` names, in its order, in "torch eager", "torch channels_last" or "torch compile"."""
    steps = TorchSteps(implementation, net, batch)
    for name in what:
        yield steps.timed(name)


class TorchSteps:
    """The net, the batch and the optimizer that both steps use, on the GPU if there is one."""

    def __init__(self, implementation: str, net: Net, batch: int):
        self.implementation, self.counted, self.batch = implementation, net, batch
        self.cuda = torch.cuda.is_available()
        self.device = torch.device("cuda" if self.cuda else "cpu")
        self.dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[str(net.model.dtype)]
        self.steps_per_call = {"inference": 1, "train": 10 if self.cuda else 1}
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision("high" if self.dtype == torch.bfloat16 else "highest")
        layout = torch.contiguous_format if implementation == "torch eager" else torch.channels_last
        self.net = torch_net(net.model.spec, net.model.num_classes, net.parameters)
        self.net = self.net.to(self.device, memory_format=layout)
        images = torch.rand(batch, 3, net.size, net.size, device=self.device)
        self.images = images.to(memory_format=layout)
        self.labels = torch.randint(0, net.model.num_classes, (batch,), device=self.device)
        self.called = torch.compile(self.net, dynamic=False) if implementation == "torch compile" else self.net
        self.optimizer = torch.optim.SGD(
            self.net.parameters(), 1e-3, 0.9, weight_decay=1e-4, nesterov=True, fused=self.cuda or None
        )

    def timed(self, what: str) -> Timed:
        """The step of that name, after its first call, which compiles it."""
        call = {"inference": self.infer, "train": self.train}[what]
        began = time.perf_counter()
        call()
        seconds = time.perf_counter() - began
        flops = self.counted.flops(what, self.batch)
        steps = self.steps_per_call[what]
        return Timed(self.implementation, what, call, steps, self.batch, flops, seconds, self._further)

    def infer(self) -> None:
        """A forward pass in evaluation mode."""
        self.net.eval()
        with torch.inference_mode(), torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            self.called(self.images)
        self._wait()

    def train(self) -> None:
        """The training steps of one call: 10 on a GPU, 1 on the CPU."""
        self.net.train()
        for _ in range(self.steps_per_call["train"]):
            train_step(self.called, self.optimizer, self.images, self.labels, self.dtype)
        self._wait()

    def _wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def _further(self, steps_per_second: float) -> dict[str, Any]:
        """The figures of `Timed.further`; none of them depends on the speed."""
        rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return {
            "memory_bytes": torch.cuda.max_memory_allocated() if self.cuda else rss,
            "device": torch.cuda.get_device_name() if self.cuda else "cpu",
            "versions": {"torch": torch.__version__, "python": platform.python_version()},
        }
