"""Depthwise convolutions of any kernel and their gradients: a pixel at a time, tap after tap."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import common
from .depthwise_chains import (
    Norm,
    blocks,
    finish,
    gate,
    load_norm,
    moments,
    normalised,
    packed,
    pixels,
    place,
    save_moments,
    save_sums,
)

OP_BACKWARD = "depthwise_conv_backward"


@triton.jit
def gather(
    x, y, weight, scale, shift, counts, means, squares, in_mean, in_var, in_scale, in_shift, eps, gated, sums,
    slots, height, width, out_height, out_width, groups, stride, dilation,
    K: tl.constexpr, TRANSPOSED: tl.constexpr, ACTIVATION: tl.constexpr, IN_ACTIVATION: tl.constexpr,
    VECTOR: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """`_rows` for any K, a pixel at a time; TRANSPOSED: its gradient, x and y in each other's place.

    in_scale: TRANSPOSED or not, of the forward's x, in the gradient `gated`; sums (tiles of all images, 2, C)
    """
    image, tile, channels, c = place(groups, VECTOR, BLOCK_C)
    row, column, pixel = pixels(tile, slots, out_width, 1, 1, 1, BLOCK_W)
    there = pixel & (c < channels)
    vector = tl.broadcast_to(c, (BLOCK_W, BLOCK_C))
    if in_scale is not None:
        mean, rstd, in_scale, in_shift = load_norm(in_mean, in_var, in_scale, in_shift, eps, c, channels, BLOCK_W)
    total = tl.zeros((BLOCK_W, BLOCK_C), tl.float32)
    for tap in range(K * K):
        down, right = (tap // K - K // 2) * dilation, (tap % K - K // 2) * dilation
        if TRANSPOSED:
            h, w = row - down, column - right
            live = there & (h >= 0) & (w >= 0) & (h % stride == 0) & (w % stride == 0)
            h, w = h // stride, w // stride
        else:
            h, w = row * stride + down, column * stride + right
            live = there & (h >= 0) & (w >= 0)
        at = x + ((image * height + h) * width + w) * channels + c
        value = tl.load(at, mask=live & (h < height) & (w < width), other=0).to(tl.float32)
        if in_scale is not None and not TRANSPOSED:
            inside = (h >= 0) & (h < height) & (w >= 0) & (w < width)
            value = normalised(value, in_scale, in_shift, inside, IN_ACTIVATION)
        total += value * tl.load(weight + tap * channels + vector, mask=vector < channels, other=0).to(tl.float32)
    if scale is not None:
        scale = tl.load(scale + vector, mask=vector < channels, other=0)
    if shift is not None:
        shift = tl.load(shift + vector, mask=vector < channels, other=0)
    if gated is not None:
        at = gated + ((image * out_height + row) * out_width + column) * channels + c
        value, none = tl.load(at, mask=there, other=0), tl.zeros((BLOCK_W, BLOCK_C), tl.float32)
        total, sum_grad, product = gate(total, value, pixel, mean, in_scale, in_shift, none, none, IN_ACTIVATION)
        part = image * (tl.num_programs(0) // tl.cdiv(channels, BLOCK_C)) + tile
        save_sums(sums, part, sum_grad, product, rstd, channels, c, 2)
    result = finish(total, scale, shift, ACTIVATION, y.dtype.element_ty)
    tl.store(y + ((image * out_height + row) * out_width + column) * channels + c, result, mask=there)
    if counts is not None:
        index = image * (tl.num_programs(0) // tl.cdiv(channels, BLOCK_C)) + tile
        count, mean, square = moments((result,), row, pixel, out_height, 1, 1)
        save_moments(counts, means, squares, index, channels, c, count, mean, square)


@triton.jit
def _products(
    grad_y, x, parts, in_mean, in_var, in_scale, in_shift, eps,
    total_pixels, height, width, out_height, out_width, groups, stride, dilation, tiles,
    K: tl.constexpr, ACTIVATION: tl.constexpr, VECTOR: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """parts (programs of a channel, K * K, C) of grad_weight for any K: one tap of `tiles` tiles."""
    channels = groups * VECTOR
    part = tl.program_id(0) // tl.cdiv(channels, BLOCK_C)
    c = (tl.program_id(0) % tl.cdiv(channels, BLOCK_C)) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    tap = tl.program_id(1)
    if in_scale is not None:
        _, _, in_scale, in_shift = load_norm(in_mean, in_var, in_scale, in_shift, eps, c, channels, BLOCK_W)
    total = tl.zeros((BLOCK_W, BLOCK_C), tl.float32)
    for i in range(tiles):
        pixel = (part.to(tl.int64) * tiles + i) * BLOCK_W + tl.arange(0, BLOCK_W)[:, None]
        line = pixel // out_width
        h = (line % out_height) * stride + (tap // K - K // 2) * dilation
        w = (pixel % out_width) * stride + (tap % K - K // 2) * dilation
        live = (pixel < total_pixels) & (c < channels) & (h >= 0) & (h < height) & (w >= 0) & (w < width)
        grad = tl.load(grad_y + pixel * channels + c, mask=live, other=0).to(tl.float32)
        at = x + ((line // out_height * height + h) * width + w) * channels + c
        value = tl.load(at, mask=live, other=0).to(tl.float32)
        if in_scale is not None:
            inside = (pixel < total_pixels) & (h >= 0) & (h < height) & (w >= 0) & (w < width)
            value = normalised(value, in_scale, in_shift, inside, ACTIVATION)
        total += grad * value
    to = parts + (part.to(tl.int64) * (K * K) + tap) * channels + c
    tl.store(to, tl.sum(total, 0, keep_dims=True), mask=c < channels)


def gradients(
    grad_y: Tensor, x: Tensor, weight: Tensor, grad_x: Tensor | None, need_weight: bool, stride: int, dilation: int,
    norm: Norm | None = None,
) -> list[Tensor]:  # fmt: skip
    """What `_run_chains` does, for any kernel and stride, in two launches."""
    (n, c, h, w), k = x.shape, weight.shape[-1]
    out_size = tuple(grad_y.shape[2:])
    config = common.configuration(OP_BACKWARD, "any", x)
    tiles = config.pop("TILES")
    block = blocks(c, x.dtype, config.pop("BLOCK_C"), config["num_warps"])
    vectors, activation = (norm or Norm())[:5], norm.activation if norm else "none"
    tiles_of_image = common.cdiv(h * w, block["BLOCK_W"])
    sums = x.new_empty((n * tiles_of_image, 2, c), dtype=torch.float32) if norm else None
    if grad_x is not None:
        common.launch(
            gather, (tiles_of_image * common.cdiv(c, block["BLOCK_C"]), n),
            grad_y, grad_x, packed(weight), *[None] * 5, *vectors, x if norm else None, sums,
            h * w, *out_size, h, w, c // block["VECTOR"], stride, dilation,
            K=k, TRANSPOSED=True, ACTIVATION="none", IN_ACTIVATION=activation, **block, **config,
        )  # fmt: skip
    if not need_weight:
        return []
    pixels_of_all = n * out_size[0] * out_size[1]
    tiles = min(tiles, max(1, common.cdiv(pixels_of_all, block["BLOCK_W"])))
    parts = x.new_empty((common.cdiv(pixels_of_all, block["BLOCK_W"] * tiles), k * k, c), dtype=torch.float32)
    common.launch(
        _products, (parts.shape[0] * common.cdiv(c, block["BLOCK_C"]), k * k), grad_y, x, parts, *vectors,
        pixels_of_all, h, w, *out_size, c // block["VECTOR"], stride, dilation, tiles, K=k, ACTIVATION=activation,
        **block, **config,
    )  # fmt: skip
    return [parts, sums] if norm else [parts]
