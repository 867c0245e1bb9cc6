"""Plans the kernels that torch.compile would make, by inductor, without building them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._functorch._aot_autograd.utils import make_boxed_func
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._guards import detect_fake_mode
from torch._inductor import config
from torch._inductor.compile_fx import fake_tensor_prop
from torch._inductor.debug import DebugContext
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.fx_passes.post_grad import post_grad_passes, view_to_reshape
from torch._inductor.graph import GraphLowering
from torch._inductor.ir import MultiOutput
from torch._inductor.scheduler import BaseSchedulerNode, NopKernelSchedulerNode
from torch._inductor.virtualized import V

from benchmarks.cost.kernels import Kernel


class Schedule:
    """A backend of torch.compile that plans kernels as inductor does and counts them. It computes nothing."""

    def __init__(self) -> None:
        self.kernels: list[list[Kernel]] = []  # those of the forward pass, then those of the backward pass

    def __call__(self, module: torch.fx.GraphModule, inputs: Sequence[Tensor]) -> Any:
        compiler = aot_autograd(
            fw_compiler=self._plan,
            decompositions=select_decomp_table(),
            partition_fn=min_cut_rematerialization_partition,
        )
        return compiler(module, inputs)

    def _plan(self, module: torch.fx.GraphModule, inputs: Sequence[Tensor]) -> Any:
        (output,) = (node for node in module.graph.nodes if node.op == "output")
        results = [node.meta["val"] if isinstance(node, torch.fx.Node) else node for node in output.args[0]]
        view_to_reshape(module)
        # On a CPU inductor turns everything before a convolution to channels last, by copies that a GPU does not need,
        # it gives each part of a concatenation its own kernel, where on a GPU up to 8 parts share one, and it calls the
        # library for sums at indices.
        as_on_gpu = config.patch(
            {"layout_optimization": False, "force_pointwise_cat": True, "cpp.fallback_scatter_reduce_sum": False}
        )
        with V.set_fake_mode(detect_fake_mode(inputs)), DebugContext(), as_on_gpu:
            fake_tensor_prop(module, inputs)
            post_grad_passes(module, is_inference=False)
            graph = GraphLowering(module, example_inputs=inputs)
            with V.set_graph_handler(graph), V.set_extern_kernel_nodes([]):
                graph.run(*inputs)
                graph._update_scheduler()
                nodes = [node for node in graph.scheduler.nodes if _launches(node)]
                sizes = [(node.get_name(), node.get_read_write_buffers_sizes()) for node in nodes]
        self.kernels.append([Kernel(name, size, 0, torch.float32) for name, size in sizes])
        return make_boxed_func(lambda *_: [_empty(value) for value in results])


def _launches(node: BaseSchedulerNode) -> bool:
    """Returns whether it is a kernel, not a concatenation of parts written in place or a result of another kernel."""
    return not isinstance(node, NopKernelSchedulerNode) and not isinstance(node.node, MultiOutput)


def _empty(value: Any) -> Any:
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype) if isinstance(value, Tensor) else value
