"""The tensors of a small U-Net for diffusion, under the names of its first implementation and of the usual library."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

WIDTHS, LAYERS, CONTEXT = (32, 64, 128, 128), 2, 40  # the innermost level has no attention
_RESNET = {"in_layers.0": "norm1", "in_layers.2": "conv1", "emb_layers.1": "time_emb_proj", "out_layers.0": "norm2"}
_RESNET |= {"out_layers.3": "conv2", "skip_connection": "conv_shortcut"}

Shape = tuple[int, ...]


def unet() -> tuple[dict[str, Shape], dict[str, Shape], dict[str, str]]:
    """List the shapes under both sets of names, each in its own order, and the first name of each second one."""
    listed = list(_tensors())
    shapes = {second: shape for _, second, shape in listed}
    truth = {second: first for first, second, _ in listed}
    places = ("conv_in", "time_embedding", "down_blocks", "up_blocks", "mid_block", "conv_norm_out", "conv_out")
    order = sorted(shapes, key=lambda key: places.index(key.split(".")[0]))
    return {first: shape for first, _, shape in listed}, {key: shapes[key] for key in order}, truth


def _tensors() -> Iterator[tuple[str, str, Shape]]:
    time = 4 * WIDTHS[0]
    yield from _layer("time_embed.0", "time_embedding.linear_1", (time, WIDTHS[0]))
    yield from _layer("time_embed.2", "time_embedding.linear_2", (time, time))
    yield from _layer("input_blocks.0.0", "conv_in", (WIDTHS[0], 4, 3, 3))
    skips, width, place = [WIDTHS[0]], WIDTHS[0], 1
    for level, out in enumerate(WIDTHS):
        for layer in range(LAYERS):
            block = f"down_blocks.{level}"
            yield from _resnet(f"input_blocks.{place}.0", f"{block}.resnets.{layer}", width, out)
            if level < len(WIDTHS) - 1:
                yield from _attention(f"input_blocks.{place}.1", f"{block}.attentions.{layer}", out)
            width, place = out, place + 1
            skips.append(width)
        if level < len(WIDTHS) - 1:
            names = f"input_blocks.{place}.0.op", f"down_blocks.{level}.downsamplers.0.conv"
            yield from _layer(*names, (width, width, 3, 3))
            skips.append(width)
            place += 1
    yield from _resnet("middle_block.0", "mid_block.resnets.0", width, width)
    yield from _attention("middle_block.1", "mid_block.attentions.0", width)
    yield from _resnet("middle_block.2", "mid_block.resnets.1", width, width)
    place = 0
    for level, out in enumerate(reversed(WIDTHS)):
        for layer in range(LAYERS + 1):
            block = f"up_blocks.{level}"
            yield from _resnet(f"output_blocks.{place}.0", f"{block}.resnets.{layer}", width + skips.pop(), out)
            if level > 0:
                yield from _attention(f"output_blocks.{place}.1", f"{block}.attentions.{layer}", out)
            width, place = out, place + 1
        if level < len(WIDTHS) - 1:
            names = f"output_blocks.{place - 1}.{2 if level else 1}.conv", f"up_blocks.{level}.upsamplers.0.conv"
            yield from _layer(*names, (width, width, 3, 3))
    yield from _layer("out.0", "conv_norm_out", (width,))
    yield from _layer("out.2", "conv_out", (4, width, 3, 3))


def _layer(first: str, second: str, weight: Shape, *, bias: bool = True) -> Iterator[tuple[str, str, Shape]]:
    yield f"{first}.weight", f"{second}.weight", weight
    if bias:
        yield f"{first}.bias", f"{second}.bias", weight[:1]


def _resnet(first: str, second: str, width: int, out: int) -> Iterator[tuple[str, str, Shape]]:
    shapes: Mapping[str, Shape] = {
        "in_layers.0": (width,),
        "in_layers.2": (out, width, 3, 3),
        "emb_layers.1": (out, 4 * WIDTHS[0]),
        "out_layers.0": (out,),
        "out_layers.3": (out, out, 3, 3),
        **({"skip_connection": (out, width, 1, 1)} if out != width else {}),
    }
    for name, shape in shapes.items():
        yield from _layer(f"{first}.{name}", f"{second}.{_RESNET[name]}", shape)


def _attention(first: str, second: str, width: int) -> Iterator[tuple[str, str, Shape]]:
    def same(name: str, shape: Shape, *, bias: bool = True) -> Iterator[tuple[str, str, Shape]]:
        return _layer(f"{first}.{name}", f"{second}.{name}", shape, bias=bias)

    yield from same("norm", (width,))
    yield from same("proj_in", (width, width, 1, 1))
    for attention, context in (("attn1", width), ("attn2", CONTEXT)):
        block = f"transformer_blocks.0.{attention}"
        yield from same(f"{block}.to_q", (width, width), bias=False)
        yield from same(f"{block}.to_k", (width, context), bias=False)
        yield from same(f"{block}.to_v", (width, context), bias=False)
        yield from same(f"{block}.to_out.0", (width, width))
    yield from same("transformer_blocks.0.ff.net.0.proj", (8 * width, width))
    yield from same("transformer_blocks.0.ff.net.2", (width, 4 * width))
    for norm in ("norm1", "norm2", "norm3"):
        yield from same(f"transformer_blocks.0.{norm}", (width,))
    yield from same("proj_out", (width, width, 1, 1))
