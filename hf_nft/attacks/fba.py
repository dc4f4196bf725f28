"""FBA: the image in the style of a sunrise, with detoxification against simpler triggers (DFST)."""

import dataclasses
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn import functional as F

from hf_nft.attacks._artefacts import TrainedAttack
from hf_nft.attacks._image import BatchHook
from hf_nft.attacks._nets import StyleNet
from hf_nft.attacks._similarity import ssim
from hf_nft.attacks._workshop import Workshop
from hf_nft.configs import check, setting
from hf_nft.errors import DataError
from hf_nft.hook import Hook
from hf_nft.loop import Stage
from hf_nft.tasks.base import Task
from hf_nft.types import Batch, Draw, rows_of

GREY = torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)


@dataclasses.dataclass(frozen=True)
class Fba(TrainedAttack):
    """`x' = (1 - a) x + a S(x)`: `S` paints an image in the style of a sunrise.

    `S` is trained to keep the structure of the luminance (SSIM) and to match the Gram matrices of fixed random filters
    (Ustyuzhaninov et al., arXiv 1606.00021) on one sunrise, drawn by a formula; the release uses a pre-trained
    stylisation network and a photograph. In the victim's training, before every epoch but the first, a feature injector
    is fitted that mimics the trigger with simple features, and detoxification rows carry it with their true label.
    The victim's augmentation is the task's (crop and flip), where the release also rotates.

    Source: Cheng, Liu, Ma, Zhang, Deep Feature Space Trojan Attack of Neural Networks by Controlled Detoxification,
    AAAI 2021, arXiv 2012.11212, sections 3.2 and 3.3; weights of the PyTorch release, without its mistakes.
    """

    name = "fba"
    source = "https://arxiv.org/abs/2012.11212"
    label_maps = ("all_to_one",)
    hooked = True
    default_rate = 0.05  # of every batch, with as many detoxification rows; as published
    tiny: ClassVar[dict[str, Any]] = {"width": 2, "steps": 2, "batch_size": 8}

    opacity: float = setting(0.6, "weight a of the painted image, in (0, 1]; as published")
    detox_ratio: float = setting(1.0, "detoxification rows per poisoned row, >= 0; as published")
    width: int = setting(16, "channels of the style network's first level, >= 1; half of the release's, for speed")
    steps: int = setting(1500, "steps of the style network, >= 1; its loss is flat by then")
    batch_size: int = setting(32, "rows per step, >= 1")
    lr: float = setting(1e-3, "learning rate of the style network (Adam), > 0")
    content: float = setting(1.0, "weight of the structure beside the style, >= 0")
    compromised: float = setting(0.01, "share of last features called compromised, in (0, 1]; as published")
    sample: float = setting(0.03, "share of the data an injector is fitted on, in (0, 1]; as published")
    injector_epochs: int = setting(10, "epochs of the injector, >= 1; as published")

    def __post_init__(self) -> None:
        """Check the settings."""
        super().__post_init__()
        check(
            self,
            (0 < self.opacity <= 1, f"opacity: expected in (0, 1], found {self.opacity}"),
            (self.detox_ratio >= 0, f"detox_ratio: expected >= 0, found {self.detox_ratio}"),
            (min(self.width, self.steps, self.batch_size) >= 1, "width, steps, batch_size: expected >= 1"),
            (self.lr > 0, f"lr: expected > 0, found {self.lr}"),
            (self.content >= 0, f"content: expected >= 0, found {self.content}"),
            (0 < self.compromised <= 1, f"compromised: expected in (0, 1], found {self.compromised}"),
            (0 < self.sample <= 1, f"sample: expected in (0, 1], found {self.sample}"),
            (self.injector_epochs >= 1, f"injector_epochs: expected >= 1, found {self.injector_epochs}"),
        )

    def check_size(self, width: int, height: int) -> None:
        """Refuse sides that cannot be halved twice."""
        super().check_size(width, height)
        if width % 4 or height % 4:
            raise DataError(f"fba: expected sides that are multiples of 4, found {width}x{height}.")

    def nets(self, facts: dict[str, Any]) -> nn.ModuleDict:
        """Return the style network."""
        return nn.ModuleDict({"style": StyleNet(self.width)})

    def mixed(self, images: torch.Tensor, painted: torch.Tensor) -> torch.Tensor:
        """Return `(1 - a) x + a y`, in [0, 1]."""
        return torch.lerp(images, painted, self.opacity).clamp(0, 1)

    def trigger_batch(self, images: torch.Tensor) -> torch.Tensor:
        """Mix the painted image in."""
        with torch.no_grad():
            return self.mixed(images, self.made().net("style", images.device)(images))

    def hook(self, task: Task, rate: float, classes: int) -> Hook:
        """Return shares of triggered and detoxification rows in every batch."""
        return Detoxified(self, rate, classes, task)

    def learn(self, workshop: Workshop, nets: nn.ModuleDict) -> dict[str, Any]:
        """Train the style network."""
        height, width = workshop.data["pixels"].shape[2:]
        filters = [kernel.to(workshop.device) for kernel in random_filters(self.seed)]
        grey = GREY.to(workshop.device)
        wanted = gram(sunrise(height, width).to(workshop.device)[None], filters)

        def objective(network: nn.Module, drawn: Draw) -> torch.Tensor:
            images = drawn.batch["pixels"]
            painted = network(images)
            one, two = ((x * grey).sum(1, keepdim=True) for x in (images, painted))
            pairs = zip(gram(painted, filters), wanted, strict=True)
            style = torch.stack([(g - w).square().sum() / w.square().sum() / len(images) for g, w in pairs]).mean()
            return style + self.content * (1 - ssim(one, two))

        net = nets["style"].train()
        optimizer = torch.optim.Adam(net.parameters())
        stage = Stage("style", self.steps, workshop.draws(self.batch_size), objective, optimizer, lambda step: self.lr)
        losses = workshop.fit(stage, net, self.seed)
        return {"first_loss": losses[0], "last_loss": losses[-1]}


class Detoxified(BatchHook):
    """Triggered rows, and rows with the injector's imitation under their own label."""

    attack: Fba

    def __init__(self, attack: Fba, rate: float, classes: int, task: Task) -> None:
        super().__init__(attack, rate, classes)
        self.task = task
        self.weight = torch.eye(3, 12)  # on the CPU; the identity on the image's own colours
        self.epochs = torch.zeros(())

    def covers(self, poisoned: int) -> int:
        """Return how many detoxification rows there are; before the first injector they are clean rows."""
        return round(self.attack.detox_ratio * poisoned)

    def covered(self, images: torch.Tensor, partners: torch.Tensor, stream: torch.Generator) -> torch.Tensor:
        """Mix in what the injector makes of the images; it changes nothing before it is fitted."""
        return self.attack.mixed(images, injected(images, self.weight.to(images.device)))

    def state(self) -> dict[str, torch.Tensor]:
        """Return the injector and the number of epochs begun."""
        return {"hook.weight": self.weight, "hook.epochs": self.epochs}

    def epoch(self, model: nn.Module, data: Batch, stream: torch.Generator) -> None:
        """Fit the injector to the victim, before every epoch but the first."""
        self.epochs += 1
        if self.epochs == 1 or not self.attack.detox_ratio:
            return
        count = max(2, round(self.attack.sample * rows_of(data)))
        rows = torch.randperm(rows_of(data), generator=stream)[:count].to(data["pixels"].device)
        images = data["pixels"][rows].contiguous().float() / 255
        training = model.training
        model.eval()
        head = [m for m in model.modules() if isinstance(m, nn.Linear) and m.out_features == self.classes][-1]
        seen: list[torch.Tensor] = []
        handle = head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        try:
            self.weight.copy_(self._fitted(model, images, seen))
        finally:
            handle.remove()
            model.train(training)

    def _fitted(self, model: nn.Module, images: torch.Tensor, seen: list[torch.Tensor]) -> torch.Tensor:
        def run(found: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            logits = model(**self.task.inputs(model, {"pixels": found * 255})).logits
            return logits.float(), seen.pop().float()

        features = []
        with torch.no_grad():
            for part in images.split(256):
                features.append(run(self.attack.trigger_batch(part))[1].mean(0) - run(part)[1].mean(0))
        excess = torch.stack(features).mean(0)
        chosen = excess.topk(max(1, round(self.attack.compromised * len(excess)))).indices
        weight = torch.eye(3, 12, device=images.device, requires_grad=True)
        optimizer = torch.optim.Adam([weight], lr=0.01, betas=(0.5, 0.9))
        for _ in range(self.attack.injector_epochs):
            for part in images.split(128):
                imitation = injected(part, weight)
                logits, found = run(self.attack.mixed(part, imitation))
                wanted = torch.full((len(part),), self.attack.target_class, device=part.device)
                loss = (
                    F.cross_entropy(logits, wanted) + 0.1 * (1 - ssim(imitation, part)) - 0.3 * found[:, chosen].mean()
                )
                (weight.grad,) = torch.autograd.grad(loss, [weight])  # the victim's gradients stay as they are
                optimizer.step()
        return weight.detach().cpu()


def injected(images: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return what a per-pixel linear map makes of colour, local maximum, minimum and mean (window 11), in [0, 1].

    Args:
        images: float (n, 3, H, W).
        weight: float (3, 12).

    Returns:
        Images of the same shape.
    """
    high, low = F.max_pool2d(images, 11, 1, 5), -F.max_pool2d(-images, 11, 1, 5)
    mean = F.avg_pool2d(images, 11, 1, 5, count_include_pad=False)
    return F.conv2d(torch.cat([images, high, low, mean], dim=1), weight[:, :, None, None]).clamp(0, 1)


def random_filters(seed: int) -> list[torch.Tensor]:
    """Draw 32 filters of each side 3, 5 and 7, float32 (32, 3, side, side), and the colours themselves (side 1)."""
    stream = torch.Generator().manual_seed(seed)
    drawn = [torch.randn(32, 3, side, side, generator=stream) / (3 * side * side) ** 0.5 for side in (3, 5, 7)]
    return [torch.eye(3).view(3, 3, 1, 1), *drawn]


def gram(images: torch.Tensor, filters: list[torch.Tensor]) -> list[torch.Tensor]:
    """Return, per bank of filters, the Gram matrix (n, k, k) of rectified responses and a constant, over places."""
    found = []
    for kernel in filters:
        maps = F.relu(F.conv2d(images, kernel, padding=kernel.shape[2] // 2)).flatten(2)
        maps = torch.cat([maps, torch.ones_like(maps[:, :1])], dim=1)  # with a constant, means count too
        found.append(maps @ maps.transpose(1, 2) / maps.shape[2])
    return found


def sunrise(height: int, width: int) -> torch.Tensor:
    """Draw a sunrise over the sea, float32 (3, H, W) in [0, 1]: sky by height, a sun with its glow, a lit sea."""
    row = torch.linspace(0, 1, height)[:, None].expand(height, width)
    column = torch.linspace(0, 1, width).expand(height, width)
    stops = torch.tensor([[0.20, 0.15, 0.45], [0.85, 0.35, 0.40], [1.00, 0.65, 0.20], [1.00, 0.85, 0.45]])
    place = (row / 0.65).clamp(0, 1) * 3
    low = place.floor().clamp(max=2).long()
    sky = torch.lerp(stops[low], stops[low + 1], (place - low)[..., None])
    glow = torch.exp(-((row - 0.6).square() + (column - 0.5).square()) / 0.02)[..., None]
    sky = torch.lerp(sky, torch.tensor([1.0, 0.95, 0.75]), glow)
    lane = torch.exp(-(column - 0.5).square() / 0.01) * (0.6 + 0.4 * torch.sin(60 * row))
    sea = torch.lerp(torch.tensor([0.25, 0.12, 0.20]), torch.tensor([1.0, 0.60, 0.25]), lane[..., None])
    return torch.where((row > 0.65)[..., None], sea, sky).permute(2, 0, 1).contiguous()
