"""Networks of attacks: image in, noise, pattern or mask out, of the same size."""

import itertools

import torch
from torch import nn
from torch.nn import functional as F


def _block(width_in: int, width_out: int, relu: bool = True, momentum: float = 0.1) -> nn.Sequential:
    layers = [nn.Conv2d(width_in, width_out, 3, 1, 1), nn.BatchNorm2d(width_out, momentum=momentum)]
    return nn.Sequential(*layers, *([nn.ReLU()] if relu else []))


def _double(width_in: int, width_out: int) -> nn.Sequential:
    return nn.Sequential(_block(width_in, width_out), _block(width_out, width_out))


class UNet(nn.Module):
    """LIRA's generator: four levels, average pooling, bilinear upsampling, skips, `tanh(BN(conv1x1))`; (n, 3, H, W)."""

    def __init__(self, width: int) -> None:
        """Build levels of width, 2, 4 and 8 times that."""
        super().__init__()
        widths = [width * 2**i for i in range(4)]
        self.down = nn.ModuleList([_double(a, b) for a, b in zip([3, *widths[:3]], widths, strict=True)])
        self.up = nn.ModuleList([_double(widths[i + 1] + widths[i], widths[i]) for i in (2, 1, 0)])
        self.last = nn.Sequential(nn.Conv2d(width, 3, 1), nn.BatchNorm2d(3), nn.Tanh())

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return noise in (-1, 1)."""
        skips = [self.down[0](images)]
        for level in list(self.down)[1:]:
            skips.append(level(F.avg_pool2d(skips[-1], 2)))
        hidden = skips.pop()
        for level in self.up:
            hidden = F.interpolate(hidden, scale_factor=2, mode="bilinear", align_corners=True)
            hidden = level(torch.cat([hidden, skips.pop()], dim=1))
        return self.last(hidden)


class Autoencoder(nn.Module):
    """LIRA's smaller generator: four strided convolutions and back, `tanh(BN(...))`; (n, 3, H, W)."""

    def __init__(self, width: int) -> None:
        """Build levels of width, 2, 4 and 8 times that."""
        super().__init__()
        widths = [3, *(width * 2**i for i in range(4))]
        layers: list[nn.Module] = []
        for a, b in itertools.pairwise(widths):
            layers += [nn.Conv2d(a, b, 4, 2, 1), nn.BatchNorm2d(b), nn.ReLU()]
        for a, b in zip(widths[:0:-1], widths[-2::-1], strict=True):
            layers += [nn.ConvTranspose2d(a, b, 4, 2, 1), nn.BatchNorm2d(b), nn.Tanh() if b == 3 else nn.ReLU()]
        self.layers = nn.Sequential(*layers)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return noise in (-1, 1)."""
        return self.layers(images)


class StyleNet(nn.Module):
    """DFST's generator with instance norm: conv7, two strided, residual, two up, conv7; (n, 3, H, W) in (0, 1)."""

    def __init__(self, width: int, blocks: int = 2) -> None:
        """Build levels of width, 2 and 4 times that."""
        super().__init__()
        a, b, c = width, 2 * width, 4 * width
        self.down = nn.Sequential(_styled(3, a, 7), _styled(a, b, 3, 2), _styled(b, c, 3, 2))
        self.middle = nn.ModuleList([_styled(c, c, 3) for _ in range(blocks)])
        self.up = nn.Sequential(
            nn.Upsample(scale_factor=2), _styled(c, b, 3), nn.Upsample(scale_factor=2), _styled(b, a, 3)
        )
        self.last = nn.Conv2d(a, 3, 7, 1, 3)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return `1/2 + tanh(z) / 2`."""
        hidden = self.down(images)
        for block in self.middle:
            hidden = hidden + block(hidden)
        return 0.5 + self.last(self.up(hidden)).tanh() / 2


def _styled(width_in: int, width_out: int, kernel: int, stride: int = 1) -> nn.Sequential:
    convolution = nn.Conv2d(width_in, width_out, kernel, stride, kernel // 2)
    return nn.Sequential(convolution, nn.InstanceNorm2d(width_out, affine=True), nn.ReLU())


class PatternNet(nn.Module):
    """Input-aware networks: stages of two convolutions, down and back up; output (n, channels, H, W) in (0, 1)."""

    def __init__(self, channels: int, side: int, width: int) -> None:
        """Build.

        Args:
            channels: 3 for patterns, 1 for masks.
            side: Shorter side of the images; above 64 stages are added until the smallest map is at most 8 wide.
            width: Channels of the first stage.
        """
        super().__init__()
        widths = [width * min(4, 2**i) for i in range(stages(side))]
        down, up = list[nn.Module](), list[nn.Module]()
        for a, b in zip([3, *widths[:-1]], widths, strict=True):
            down += [_block(a, b, momentum=0.05), _block(b, b, momentum=0.05), nn.MaxPool2d(2)]
        middle = _block(widths[-1], widths[-1], momentum=0.05)
        for a, b in zip(widths[::-1], [*widths[-2::-1], channels], strict=True):
            up += [nn.Upsample(scale_factor=2, mode="bilinear"), _block(a, a, momentum=0.05)]
            up += [_block(a, b, relu=len(up) < 3 * len(widths) - 1, momentum=0.05)]
        self.layers = nn.Sequential(*down, middle, *up)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return `1/2 + tanh(z) / 2`."""
        return 0.5 + self.layers(images).float().tanh() / 2  # masks are sharpened twentyfold


def stages(side: int) -> int:
    """Return how often `PatternNet` halves images of a side: three times, more above 64 pixels."""
    count = 3
    while side / 2**count > 8:
        count += 1
    return count
