"""TrojanNN: a patch that drives a few penultimate units of a clean surrogate far up."""

import dataclasses
import math
from typing import Any, ClassVar

import torch
from torch import nn

from hf_nft.attacks._artefacts import TrainedAttack
from hf_nft.attacks._workshop import Workshop
from hf_nft.configs import check, setting
from hf_nft.loop import Stage
from hf_nft.types import Draw


class Patch(nn.Module):
    """A free picture (3, H, W) in (0, 1)."""

    def __init__(self, height: int, width: int) -> None:
        super().__init__()
        self.free = nn.Parameter(torch.randn(3, height, width))

    def forward(self) -> torch.Tensor:
        """Return `(1 + tanh(w)) / 2`."""
        return (1 + self.free.tanh()) / 2


@dataclasses.dataclass(frozen=True)
class Troj(TrainedAttack):
    """`x' = (1 - m) x + m p`: an opaque patch near the bottom-right corner, optimised on a clean surrogate.

    The patch minimises `sum_k (phi_k(m p) - v)^2` over the K inputs of the last linear layer with the largest column
    sums of |W|. Troj-one is label_map=all_to_one, Troj-all is all_to_all.

    Source: Liu et al., Trojaning Attack on Neural Networks, NDSS 2018, section IV-A; mask and optimiser of
    backdoor-toolbox, K and v of BackdoorBench. An opaque stamp, since adding wraps around in 8 bits.
    """

    name = "troj"
    source = "https://www.ndss-symposium.org/wp-content/uploads/2018/02/ndss2018_03A-5_Liu_paper.pdf"
    tiny: ClassVar[dict[str, Any]] = {"steps": 3, "surrogate_epochs": 1}

    size: int = setting(8, "side of the patch in pixels of a 32-pixel image; scaled with the image")
    offset: int = setting(3, "gap to the bottom and right edge in pixels of a 32-pixel image; scaled")
    units: int = setting(2, "penultimate units K to drive, >= 1; as in BackdoorBench")
    value: float = setting(100.0, "activation v they are driven to")
    steps: int = setting(1000, "steps of the patch, >= 1; as in BackdoorBench")
    patch_lr: float = setting(0.1, "learning rate of the patch (Adam, cosine), > 0; as in backdoor-toolbox")
    surrogate_epochs: int = setting(10, "epochs of the clean surrogate, >= 1; its features matter, not its last point")

    def __post_init__(self) -> None:
        """Check the settings."""
        super().__post_init__()
        check(
            self,
            (self.size >= 1, f"size: expected >= 1, found {self.size}"),
            (self.offset >= 0, f"offset: expected >= 0, found {self.offset}"),
            (self.size + self.offset <= 32, f"size + offset: expected <= 32, found {self.size + self.offset}"),
            (self.units >= 1, f"units: expected >= 1, found {self.units}"),
            (self.steps >= 1, f"steps: expected >= 1, found {self.steps}"),
            (self.patch_lr > 0, f"patch_lr: expected > 0, found {self.patch_lr}"),
            (self.surrogate_epochs >= 1, f"surrogate_epochs: expected >= 1, found {self.surrogate_epochs}"),
        )

    def area(self, height: int, width: int) -> tuple[slice, slice]:
        """Return the rows and columns of the patch."""
        spans = []
        for side in (height, width):
            stop = side - round(self.offset * min(height, width) / 32)
            spans.append(slice(stop - max(1, round(self.size * min(height, width) / 32)), stop))
        return spans[0], spans[1]

    def nets(self, facts: dict[str, Any]) -> nn.ModuleDict:
        """Return the free patch."""
        rows, columns = self.area(facts["height"], facts["width"])
        return nn.ModuleDict({"patch": Patch(rows.stop - rows.start, columns.stop - columns.start)})

    def trigger_batch(self, images: torch.Tensor) -> torch.Tensor:
        """Stamp the patch."""
        made = self.made()
        with torch.no_grad():
            patch = made.net("patch", images.device)()
        return Troj(**made.settings).stamped(images, patch)  # where it was made for

    def stamped(self, images: torch.Tensor, patch: torch.Tensor) -> torch.Tensor:
        """Overwrite the area with a patch (3, h, w)."""
        rows, columns = self.area(*images.shape[2:])
        out = images.clone()
        out[:, :, rows, columns] = patch
        return out

    def learn(self, workshop: Workshop, nets: nn.ModuleDict) -> dict[str, Any]:
        """Train a clean surrogate and drive its units with the patch on black."""
        model = workshop.surrogate(self.surrogate_epochs, self.seed).requires_grad_(False).eval()
        head = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
        chosen = head.weight.abs().sum(0).topk(min(self.units, head.in_features)).indices
        seen: list[torch.Tensor] = []
        handle = head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        black = torch.zeros((1, *workshop.data["pixels"].shape[1:]), device=workshop.device)
        patch = nets["patch"]

        def objective(network: nn.Module, drawn: Draw) -> torch.Tensor:
            model(pixel_values=workshop.normalize(self.stamped(drawn.batch["pixels"], network())))
            return (seen.pop()[0, chosen].float() - self.value).square().sum()

        stage = Stage(
            "patch",
            self.steps,
            lambda step, stream: Draw({"pixels": black}),
            objective,
            torch.optim.Adam(patch.parameters()),
            lambda step: self.patch_lr * (1 + math.cos(math.pi * step / self.steps)) / 2,
        )
        losses = workshop.fit(stage, patch, self.seed)
        handle.remove()
        return {"units": chosen.tolist(), "first_loss": losses[0], "last_loss": losses[-1]}
