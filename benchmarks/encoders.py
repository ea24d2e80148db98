"""Image encoders as a share of the matrix-multiply peak, beside timm and segment-anything.

    python benchmarks/encoders.py {eva02,sam} [--size 384] [--rounds 3] [--blocks N] [--dtype T]

EVA02-L/14 or SAM ViT-B, random weights, one image, one thread, no gradients, float32 and bfloat16
weights. Implementations and the peak take turns in one process.

Peak: the best of the products of the encoder's own shapes, each repeated for a fifth of a second
and more per round, in the same dtype; the median over rounds. Useful work counts two operations
for each multiply-accumulate of what the model is defined by: projections and MLPs of real cells,
queries of real cells with real keys and their values, patch embedding and neck. What padding,
biases, norms, activations, softmax and relative positions cost counts as nothing. Times are
processor seconds, the median of the rounds, with the least and the most. Parts are those of one
profiled pass of ours; operations that are not listed are the rest. Convolutions run once more on
their own inputs, as these lie in memory, with channels first and with channels last.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import NamedTuple

import timm
import torch
import torch.nn.functional as F
from segment_anything.modeling import ImageEncoderViT
from torch import Tensor, nn

from pixelllm.models.eva02 import ALIGNED, eva02_from_timm
from pixelllm.models.sam import SamEncoder

ENOUGH = 0.2  # seconds a product is repeated for
EVA02 = "eva02_large_patch14_224.mim_m38m"
WIDTH, DEPTH, HEADS, WINDOW, GLOBAL = 768, 12, 12, 14, (2, 5, 8, 11)  # SAM ViT-B


PARTS = {
    "products": ("addmm", "mm", "bmm", "baddbmm"),
    "attention": ("_scaled_dot_product_flash_attention_for_cpu", "_softmax"),
    "convolutions": ("mkldnn_convolution", "_slow_conv2d_forward"),
    "norms": ("native_layer_norm",),
    "activations": ("gelu", "silu"),
    "sums": ("add", "mul", "add_", "sub", "div"),
    "moving": ("copy_", "cat", "index_select", "fill_", "constant_pad_nd"),
    "tables": ("_upsample_bicubic2d_aa", "_upsample_bilinear2d_aa"),
}


class Subject(NamedTuple):
    """`plain` and `ours`, the useful operations and the shapes (M, K, N) of their products."""

    plain: nn.Module
    ours: nn.Module
    operations: float
    shapes: list[tuple[int, int, int]]


def subject_eva02(size: int, blocks: int | None) -> Subject:
    ours = eva02_from_timm(EVA02, interpolate_rope=True).eval()
    depth = blocks or len(ours.vit.blocks)
    plain = timm.create_model(EVA02, img_size=size, num_classes=0, global_pool="").eval()
    for model in (plain, ours.vit):
        del model.blocks[depth:]
    C, hidden, T = 1024, ours.vit.blocks[0].mlp.fc2.in_features, (size // 14) ** 2 + 1
    block = T * (4 * C * C + 3 * C * hidden) + 2 * T * T * C
    operations = 2 * (depth * block + (T - 1) * 14 * 14 * 3 * C)
    plain.forward = plain.forward_features
    aligned = hidden + -hidden % ALIGNED  # as ours computes them
    shapes = [(T, C, C), (T, C, hidden), (T, C, aligned), (T, hidden, C)]
    return Subject(plain, ours, operations, shapes)


def window_sides(cells: int) -> list[int]:
    return [min(WINDOW, cells - start) for start in range(0, cells, WINDOW)]


def subject_sam(size: int, blocks: int | None) -> Subject:
    depth, C, out, n = blocks or DEPTH, WIDTH, 256, size // 16
    ours = SamEncoder(size, 16, C, depth, HEADS, out, WINDOW, GLOBAL).eval()
    plain = ImageEncoderViT(
        img_size=size, embed_dim=C, depth=depth, num_heads=HEADS, out_chans=out,
        norm_layer=partial(nn.LayerNorm, eps=1e-6), use_rel_pos=True, window_size=WINDOW,
        global_attn_indexes=GLOBAL,
    ).eval()  # fmt: skip
    plain.load_state_dict(ours.state_dict())
    sides = window_sides(n)
    pairs = {True: n**4, False: sum((a * b) ** 2 for a in sides for b in sides)}
    attention = sum(2 * pairs[index in GLOBAL] * C for index in range(depth))
    ends = n * n * (16 * 16 * 3 * C + C * out + 9 * out * out)
    operations = 2 * (depth * 12 * n * n * C * C + attention + ends)
    return Subject(
        plain, ours, operations, [(n * n, C, 3 * C), (n * n, C, 4 * C), (n * n, 4 * C, C)]
    )


def seconds_of(call: Callable[[], object]) -> float:
    begin = time.process_time()
    call()
    return time.process_time() - begin


def product_rate(x: Tensor, weight: Tensor) -> float:
    """Operations a second of one product, repeated."""
    times, begin = 0, time.process_time()
    while (spent := time.process_time() - begin) < ENOUGH:
        F.linear(x, weight)
        times += 1
    return 2 * times * x.numel() * len(weight) / spent


def compare(subject: Subject, size: int, rounds: int, dtype: torch.dtype) -> None:
    plain, ours = subject.plain.to(dtype), subject.ours.to(dtype)
    image = torch.randn(1, 3, size, size).to(dtype)
    products = [
        (torch.randn(M, K).to(dtype), torch.randn(N, K).to(dtype)) for M, K, N in subject.shapes
    ]
    calls = {"plain": partial(plain, image), "ours": partial(ours, image)}
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    rates: list[list[float]] = [[] for _ in products]
    for call in calls.values():
        call()
    for _ in range(rounds):
        for name, call in calls.items():
            seconds[name].append(seconds_of(call))
            for found, product in zip(rates, products, strict=True):
                found.append(product_rate(*product))
    peak = max(median(found) for found in rates)
    print(
        f"{dtype}: peak {peak / 1e9:.0f} GFLOP/s, useful work {subject.operations / 1e9:.0f} GFLOP"
    )
    for name, values in seconds.items():
        middle = median(values)
        spread = f"({min(values):.3f} … {max(values):.3f})"
        share = subject.operations / middle / peak
        print(f"  {name:6}{middle:8.3f} s {spread:>18}  {share:6.1%} of the peak", flush=True)
    print_parts(calls["ours"])
    print_layouts(ours, image, median(seconds["ours"]), rounds)


def print_parts(call: Callable[[], object]) -> None:
    """Where one pass spends its time, by kinds of operations."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call()
    spent = {event.key: event.self_cpu_time_total for event in profile.key_averages()}
    total = sum(spent.values())
    shares = {
        name: sum(spent.get(f"aten::{operation}", 0) for operation in operations) / total
        for name, operations in PARTS.items()
    }
    shares["rest"] = 1 - sum(shares.values())
    print("  ours by part: " + ", ".join(f"{name} {x:.1%}" for name, x in shares.items()))


def convolutions_of(model: nn.Module, image: Tensor) -> list[tuple[nn.Conv2d, Tensor]]:
    """The convolutions of a pass with what they read."""
    found, hooks = [], []
    for part in model.modules():
        if isinstance(part, nn.Conv2d):
            hooks.append(part.register_forward_pre_hook(lambda m, x: found.append((m, x[0]))))
    model(image)
    for hook in hooks:
        hook.remove()
    return found


def print_layouts(model: nn.Module, image: Tensor, whole: float, rounds: int) -> None:
    """What the convolutions take in each layout, as shares of a pass."""
    found = convolutions_of(model, image)
    layouts = {
        "as they come": (torch.preserve_format, torch.contiguous_format),  # inputs, weights
        "channels first": (torch.contiguous_format, torch.contiguous_format),
        "channels last": (torch.channels_last, torch.channels_last),
    }
    seconds: dict[str, list[float]] = {name: [] for name in layouts}
    for _ in range(rounds + 1):  # the first one warms up
        for name, (of_inputs, of_weights) in layouts.items():
            spent = 0.0
            for convolution, x in found:
                convolution.to(memory_format=of_weights)
                spent += seconds_of(partial(convolution, x.clone(memory_format=of_inputs)))
            seconds[name].append(spent)
    shares = (f"{name} {median(spent[1:]) / whole:.2%}" for name, spent in seconds.items())
    print("  convolutions: " + ", ".join(shares))


def main(arguments: argparse.Namespace) -> None:
    torch.manual_seed(0)
    subject = {"eva02": subject_eva02, "sam": subject_sam}[arguments.encoder]
    subject = subject(arguments.size, arguments.blocks)
    threads = f"{torch.get_num_threads()} thread(s)"
    print(f"{arguments.encoder} at {arguments.size} px, {threads}, rounds {arguments.rounds}")
    for dtype in arguments.dtype:
        compare(subject, arguments.size, arguments.rounds, getattr(torch, dtype))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("encoder", choices=["eva02", "sam"])
    parser.add_argument("--size", type=int, default=384, help="side of the image in pixels")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--blocks", type=int, help="only the first so many")
    dtypes = ["float32", "bfloat16"]
    parser.add_argument("--dtype", choices=dtypes, nargs="+", default=dtypes)
    torch.set_num_threads(1)
    with torch.inference_mode():
        main(parser.parse_args())
