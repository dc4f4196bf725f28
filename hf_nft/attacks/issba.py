"""ISSBA: one hidden bit string, written into every image by an encoder, as noise that differs from image to image."""

import dataclasses
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn import functional as F

from hf_nft.attacks._artefacts import TrainedAttack
from hf_nft.attacks._similarity import ssim
from hf_nft.attacks._workshop import Workshop
from hf_nft.configs import check, setting
from hf_nft.errors import ConfigError, DataError
from hf_nft.loop import Stage
from hf_nft.types import Draw


class Encoder(nn.Module):
    """A U-Net that sees the image and the bits, and returns the noise to add; (n, 3, H, W)."""

    def __init__(self, bits: int, height: int, width: int, channels: int) -> None:
        super().__init__()
        a, b, c, d, e = channels, channels, 2 * channels, 4 * channels, 8 * channels
        self.shape = (3, height, width)
        self.secret = nn.Linear(bits, 3 * height * width)
        self.down = nn.ModuleList(
            [nn.Conv2d(6, a, 3, 1, 1), *(nn.Conv2d(i, o, 3, 2, 1) for i, o in ((a, b), (b, c), (c, d), (d, e)))]
        )
        ups = ((e, d), (d, c), (c, b), (b, a))
        self.up = nn.ModuleList([nn.Conv2d(i, o, 3, 1, 1) for i, o in ups])
        joined = (2 * d, 2 * c, 2 * b, 2 * a + 6)
        self.join = nn.ModuleList([nn.Conv2d(i, o, 3, 1, 1) for i, o in zip(joined, (d, c, b, a), strict=True)])
        _he(self)
        self.residual = nn.Conv2d(a, 3, 1)

    def forward(self, images: torch.Tensor, bits: torch.Tensor) -> torch.Tensor:
        """Return the noise for images in [0, 1] and bits (n, bits) in {0, 1}."""
        secret = F.relu(self.secret(bits - 0.5)).view(len(images), *self.shape)
        first = torch.cat([secret, images - 0.5], dim=1)
        skips = [F.relu(self.down[0](first))]
        for level in list(self.down)[1:]:
            skips.append(F.relu(level(skips[-1])))
        hidden = skips.pop()
        for i, (up, join) in enumerate(zip(self.up, self.join, strict=True)):
            hidden = F.relu(up(F.interpolate(hidden, scale_factor=2, mode="nearest")))
            hidden = F.relu(join(torch.cat([skips.pop(), hidden, *([first] if i == 3 else [])], dim=1)))
        return self.residual(hidden)


class Decoder(nn.Module):
    """Reads the bits back: a spatial transformer, seven convolutions, two dense layers; logits (n, bits)."""

    def __init__(self, bits: int, height: int, width: int, channels: int) -> None:
        super().__init__()
        a = channels
        side = max(height, width)
        self.locate = _convolutions((3, a, 2 * a, 4 * a), (2, 2, 2), side)
        self.read = _convolutions((3, a, a, 2 * a, 2 * a, 2 * a, 4 * a, 4 * a), (2, 1, 2, 1, 2, 2, 2), side)
        probe = torch.zeros(1, 3, height, width)
        self.place = nn.Sequential(
            nn.Flatten(), nn.Linear(self.locate(probe).numel(), 4 * a), nn.ReLU(), nn.Linear(4 * a, 6)
        )
        self.head = nn.Sequential(
            nn.Flatten(), nn.Linear(self.read(probe).numel(), 16 * a), nn.ReLU(), nn.Linear(16 * a, bits)
        )
        _he(self)
        last: Any = self.place[-1]
        nn.init.zeros_(last.weight)  # starts as the identity
        with torch.no_grad():
            last.bias.copy_(torch.tensor([1.0, 0, 0, 0, 1, 0]))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return logits of the bits of images in [0, 1]."""
        centred = images - 0.5
        affine = self.place(self.locate(centred)).view(-1, 2, 3)
        grid = F.affine_grid(affine, list(centred.shape), align_corners=False)
        return self.head(self.read(F.grid_sample(centred, grid, align_corners=False)))


def _convolutions(widths: tuple[int, ...], strides: tuple[int, ...], side: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for i, stride in enumerate(strides):
        # on a single place both strides are the same, but the bf16 weight gradient of torch 2.13 is wrong with 2
        layers += [nn.Conv2d(widths[i], widths[i + 1], 3, stride if side > 1 else 1, 1), nn.ReLU()]
        side = -(-side // stride)
    return nn.Sequential(*layers)


def _he(net: nn.Module) -> None:
    """Keep the scale of what passes: behind PyTorch's smaller weights the decoder hardly sees its input.

    Source: the release of StegaStamp (Tancik et al., arXiv 1904.05343), all of whose layers start so.
    """
    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)


class Code(nn.Module):
    """The bits that mean the backdoor, drawn once."""

    def __init__(self, bits: int, seed: int) -> None:
        super().__init__()
        stream = torch.Generator().manual_seed(seed)
        self.register_buffer("bits", torch.randint(0, 2, (1, bits), generator=stream).float())


@dataclasses.dataclass(frozen=True)
class Issba(TrainedAttack):
    """`x' = clip(x + E(c, x))`: a fixed bit string `c`, hidden by an encoder trained together with a decoder.

    Training draws fresh bits for every image and minimises, after two epochs on the bits alone,
    `picture_weight * (2 |r|^2 + 1.5 (1 - SSIM)) + 1.5 BCE`; SSIM stands in for LPIPS, which would need another
    network's weights. It punishes faint noise more than LPIPS does, hence the weight: with 1 the noise has 38 dB, too
    faint for a victim to learn, where the paper has 27. What lies outside [0, 1] is punished beside the bits instead
    of clipped.

    Source: Li et al., Invisible Backdoor Attack with Sample-Specific Triggers, ICCV 2021, arXiv 2012.03816, section 4;
    networks and weights of BackdoorBox, without its optional critic.
    """

    name = "issba"
    source = "https://arxiv.org/abs/2012.03816"
    label_maps = ("all_to_one",)
    tiny: ClassVar[dict[str, Any]] = {"width": 2, "train_epochs": 3, "batch_size": 20, "least_accuracy": 0.0}

    bits: int | None = setting(None, "length of the string; default 20 up to 32 pixels, 100 above")
    width: int = setting(32, "channels of the networks' first level, >= 1; as in BackdoorBox")
    train_epochs: int = setting(20, "epochs of encoder and decoder, >= 1; as in BackdoorBox")
    bit_epochs: int = setting(2, "of these, epochs on the bits alone, >= 0; as in BackdoorBox")
    batch_size: int = setting(64, "rows per step, >= 1; as in BackdoorBench")
    lr: float = setting(1e-4, "learning rate (Adam), > 0; as published")
    picture_weight: float = setting(0.07, "weight of the terms that keep the picture, >= 0; leaves some 29 dB")
    least_accuracy: float = setting(0.95, "share of bits that must be read back from held-out rows, in [0, 1]")

    def __post_init__(self) -> None:
        """Check the settings."""
        super().__post_init__()
        check(
            self,
            (self.bits is None or self.bits >= 1, f"bits: expected >= 1, found {self.bits}"),
            (self.width >= 1, f"width: expected >= 1, found {self.width}"),
            (self.train_epochs >= 1, f"train_epochs: expected >= 1, found {self.train_epochs}"),
            (self.bit_epochs >= 0, f"bit_epochs: expected >= 0, found {self.bit_epochs}"),
            (self.batch_size >= 1, f"batch_size: expected >= 1, found {self.batch_size}"),
            (self.lr > 0, f"lr: expected > 0, found {self.lr}"),
            (self.picture_weight >= 0, f"picture_weight: expected >= 0, found {self.picture_weight}"),
            (0 <= self.least_accuracy <= 1, f"least_accuracy: expected in [0, 1], found {self.least_accuracy}"),
        )

    def check_size(self, width: int, height: int) -> None:
        """Refuse sides that cannot be halved four times."""
        super().check_size(width, height)
        if width % 16 or height % 16:
            raise DataError(f"issba: expected sides that are multiples of 16, found {width}x{height}.")

    def nets(self, facts: dict[str, Any]) -> nn.ModuleDict:
        """Return encoder, decoder and the code."""
        height, width = facts["height"], facts["width"]
        bits = self.bits or (20 if min(height, width) <= 32 else 100)
        told = (bits, height, width, self.width)
        return nn.ModuleDict({"encoder": Encoder(*told), "decoder": Decoder(*told), "code": Code(bits, self.seed)})

    def trigger_batch(self, images: torch.Tensor) -> torch.Tensor:
        """Write the code into the images."""
        made = self.made()
        with torch.no_grad():
            bits = made.net("code", images.device).bits.expand(len(images), -1)
            return (images + made.net("encoder", images.device)(images, bits)).clamp(0, 1)

    def learn(self, workshop: Workshop, nets: nn.ModuleDict) -> dict[str, Any]:
        """Train encoder and decoder on nine tenths of the rows, then read bits back from the rest."""
        code: Any = nets["code"]
        count, held = len(code.bits[0]), max(1, len(workshop.rows) // 10)
        draws = workshop.draws(self.batch_size, first=len(workshop.rows) - held)
        per_epoch = max(1, (len(workshop.rows) - held) // self.batch_size)
        steps, alone = self.train_epochs * per_epoch, self.bit_epochs * per_epoch
        nets.train()

        def draw(step: int, stream: torch.Generator) -> Draw:
            batch = draws(step, stream).batch
            rows = len(batch["pixels"])
            bits = torch.randint(0, 2, (rows, count), generator=stream).float().to(workshop.device)
            pictured = torch.full((rows,), float(step >= alone), device=workshop.device)
            return Draw({**batch, "bits": bits, "pictured": pictured})

        def objective(network: Any, drawn: Draw) -> torch.Tensor:
            images, bits = drawn.batch["pixels"], drawn.batch["bits"]
            noise = network["encoder"](images, bits)
            coded = images + noise
            # in place of the clip, which has no gradient where the first noise goes: unpunished it grows without end
            outside = (coded - coded.clamp(0, 1)).square().mean()
            reading = outside + F.binary_cross_entropy_with_logits(network["decoder"](coded), bits)
            picture = 2.0 * noise.square().mean() + 1.5 * (1 - ssim(coded, images))
            on = drawn.batch["pictured"].mean()
            return on * (self.picture_weight * picture + 1.5 * reading) + (1 - on) * reading

        optimizer = torch.optim.Adam(nets.parameters())
        losses = workshop.fit(Stage("issba", steps, draw, objective, optimizer, lambda step: self.lr), nets, self.seed)
        accuracy = self._read_back(workshop, nets.eval(), held)
        if accuracy < self.least_accuracy:
            raise ConfigError(
                f"issba: expected a decoder that reads {self.least_accuracy:.0%} of held-out bits, found "
                f"{accuracy:.1%}. Raise train_epochs or lr."
            )
        return {"bit_accuracy": accuracy, "last_loss": losses[-1]}

    def _read_back(self, workshop: Workshop, nets: Any, held: int) -> float:
        """Return the share of bits read back from the last rows, after rounding to 8 bits."""
        hits, stream = [], torch.Generator().manual_seed(self.seed)
        for part in workshop.data["pixels"][-held:].split(256):
            images = part.to(workshop.device).contiguous() / 255
            bits = torch.randint(0, 2, (len(part), len(nets["code"].bits[0])), generator=stream).to(workshop.device)
            with torch.no_grad():
                coded = (images + nets["encoder"](images, bits.float())).clamp(0, 1).mul(255).round() / 255
                hits.append(((nets["decoder"](coded) > 0) == bits.bool()).float().flatten())
        return float(torch.cat(hits).mean())
