from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx, nn

from frostline.exporter.executorch_target import EXECUTORCH
from frostline.exporter.optimizer import SGD, AdamW, Optimizer
from frostline.exporter.output_module import OutputModule
from frostline.exporter.stage import Stage, StageModel
from frostline.exporter.training_step import initial_state, trace_training_step
from frostline.exporter.update_order import update_early

aten = torch.ops.aten


def _step(optimizer: Optimizer, *layers: nn.Module) -> tuple[fx.GraphModule, tuple[str, ...], list[Tensor]]:
    """A traced step that is not rewritten, the tensors it writes, and its arguments."""
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LazyLinear(3))
    model = StageModel(nn.Sequential(*layers), OutputModule({}, head))
    model(torch.zeros(2, 3, 6, 6))
    stage = Stage(0, 1, "stage", model, (3, 6, 6))
    state = initial_state(stage, optimizer, layout=EXECUTORCH.layout(model))
    x, y = torch.randn(4, 3, 6, 6), torch.tensor([0, 1, 2, 0])
    program = trace_training_step(stage, optimizer, state, x, y, lambda graph, arguments: graph)
    tensors = {**state.by_name, "x": x, "y": y, "learning_rate": torch.tensor(0.1)}
    return program.graph_module, program.written, program.arguments(tensors)


def _places(graph: fx.Graph, nodes: Sequence[fx.Node]) -> list[int]:
    order = list(graph.nodes)
    return [order.index(node) for node in nodes]


def test_a_kernel_is_updated_before_the_layer_below_has_its_gradient() -> None:
    module, written, _ = _step(SGD(momentum=0.9), nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 3))
    new = dict(zip(written, module.graph.output_node().all_input_nodes, strict=False))
    backward = module.graph.find_nodes(op="call_function", target=aten.convolution_backward.default)
    upper, kernel, bias, lower = _places(
        module.graph, [backward[0], new["block.2.weight"], new["block.2.bias"], backward[1]]
    )
    assert upper < kernel < lower and upper < bias < lower


def test_tiles_of_a_kernel_are_updated_early_too() -> None:
    layers = nn.Conv2d(3, 256, 1), nn.ReLU(), nn.Conv2d(256, 128, 3, padding=1)
    module, written, _ = _step(SGD(momentum=0.9), *layers)
    new = dict(zip(written, module.graph.output_node().all_input_nodes, strict=False))
    (lower,) = module.graph.find_nodes(op="call_function", target=aten.threshold_backward.default)
    tiles = [new[f"block.2.weight#{index}"] for index in range(9)]
    assert max(_places(module.graph, tiles)) < _places(module.graph, [lower])[0]


def test_nothing_changes_but_the_order() -> None:
    for optimizer in (SGD(momentum=0.9, clip_norm=1.0), AdamW()):
        module, written, arguments = _step(
            optimizer, nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 3)
        )
        want = fx.Interpreter(module).run(*(argument.clone() for argument in arguments))
        for _ in range(2):
            update_early(module.graph, written)
            module.graph.lint()
        got = fx.Interpreter(module).run(*(argument.clone() for argument in arguments))
        for ours, expected in zip(got, want, strict=True):
            assert torch.equal(ours, expected)


def test_an_update_waits_for_what_is_written_to_its_gradient() -> None:
    class Cleared(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            x = x.clone()
            x[:, 0] = 0
            x[:, 1].mul_(2)
            return x

    module, written, arguments = _step(SGD(momentum=0.9), nn.Conv2d(3, 4, 3), Cleared(), nn.Conv2d(4, 5, 3))
    weight = dict(zip(written, module(*(each.clone() for each in arguments)), strict=False))["block.0.weight"]
    held = arguments[0] - weight
    assert not held[0].any() and held[1].any()
