"""A benchmark's call as a CUDA graph that replays it: the device's time without the launches'."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

GRAPHED = ("native", "triton", "eager", "autocast", "compile", "compile_max", "masked_bincount", "single_calls")
LARGEST_SHARE = 1 / 8  # of the device's memory: a graph keeps what its call needs for as long as the graph lives
WARM_UP = 3


def graphs(variants: Mapping[str, Any], device: torch.device) -> tuple[dict[str, Any], dict[str, dict[str, str]]]:
    """ "<name>+graph" of those of GRAPHED, and of those that refuse {"not_captured": why}."""
    replayed, refused = {}, {}
    for name, variant in variants.items():
        if name in GRAPHED:
            made = captured(variant, device)
            if isinstance(made, str):
                refused[f"{name}+graph"] = {"not_captured": made}
            else:
                replayed[f"{name}+graph"] = made
    return replayed, refused


def captured(variant: Any, device: torch.device) -> Any:
    """The variant with a replay for its `run`, whose result was checked; a string says why there is none."""
    if reason := why_not(variant.run, device):
        return reason
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.device(device), torch.cuda.graph(graph):
            result = variant.run()
    except RuntimeError as error:
        return first_line(error)
    poison(result)
    graph.replay()
    torch.cuda.synchronize(device)
    if variant.check is not None:
        variant.check(result)
    return variant._replace(run=graph.replay)


def why_not(run: Callable[[], Any], device: torch.device) -> str | None:
    """Warms up on a stream of its own, as a capture wants; says whether the call waits for the device or needs much."""
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for _ in range(WARM_UP):
            run()
        torch.cuda.set_sync_debug_mode("error")
        try:
            run()
        except RuntimeError as error:
            return first_line(error)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    torch.cuda.current_stream(device).wait_stream(side)
    torch.cuda.synchronize(device)
    needed = torch.cuda.max_memory_allocated(device) - before
    if needed > LARGEST_SHARE * torch.cuda.get_device_properties(device).total_memory:
        return f"it needs {needed / 1e9:.1f} GB, which the graph would keep"
    return None


def poison(result: Any) -> None:
    """Writes over a result, so that only a replay that computes it again passes the check."""
    with torch.inference_mode():
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                tensor.detach().fill_(float("nan") if tensor.is_floating_point() else 85)


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).partition("\n")[0][:200]
