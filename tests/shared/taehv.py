"""TAEHV's decoders as they are published: names and shapes, with narrower layers of random numbers."""

import itertools

import torch

#: Frames of a frame, a level; the published widths are 256, 128, 64, 64.
TIMES, WIDTHS = (1, 2, 2), (16, 12, 8, 8)


def taehv_tensors(*, z_dim, patch, widths=WIDTHS, times=TIMES):
    """Random tensors by the names of ``taew2_1.pth``, an encoder's among them."""
    generator = torch.Generator().manual_seed(0)

    def weight(out, width, side=3):
        return torch.randn(out, width, side, side, generator=generator) / (width * side**2) ** 0.5

    def bias(out):
        return 0.1 * torch.randn(out, generator=generator)

    tensors = {"decoder.1.weight": weight(widths[0], z_dim), "decoder.1.bias": bias(widths[0])}
    for level, (width, out) in enumerate(itertools.pairwise(widths)):
        first = 3 + 6 * level
        for block in range(first, first + 3):
            for number, fan in zip((0, 2, 4), (2 * width, width, width), strict=True):
                tensors[f"decoder.{block}.conv.{number}.weight"] = weight(width, fan) * (0.5 if number == 4 else 1)
                tensors[f"decoder.{block}.conv.{number}.bias"] = bias(width)
        tensors[f"decoder.{first + 4}.conv.weight"] = weight(times[level] * width, width, side=1)
        tensors[f"decoder.{first + 5}.weight"] = weight(out, width)
    # Grey on the whole, so that few pixels are clipped.
    tensors["decoder.22.weight"] = 2 * weight(3 * patch**2, widths[-1])
    tensors["decoder.22.bias"] = 0.4 + bias(3 * patch**2)
    tensors["encoder.0.weight"], tensors["encoder.2.conv.weight"] = weight(8, 3), weight(8, 16, side=1)
    return tensors
