"""A user's own patch: any picture at any position, as `--trigger patch.png` applies it."""

import dataclasses

import numpy as np
import torch

from hf_nft.attacks._image import ImageAttack
from hf_nft.attacks._pictures import file_digest, picture
from hf_nft.configs import check, setting
from hf_nft.errors import DataError


@dataclasses.dataclass(frozen=True)
class Patch(ImageAttack):
    """Paste a picture at a row and column of the final image; its alpha channel, if any, is its opacity.

    Source: the trigger of Gu et al., arXiv 1708.06733, with the pattern left to the user.
    """

    name = "patch"
    source = "https://arxiv.org/abs/1708.06733"

    trigger_file: str | None = setting(None, "path of the patch picture; default: a 3x3 white square")
    row: int = setting(-1, "top row of the patch; negative counts from the bottom edge, -1 being flush with it")
    column: int = setting(-1, "left column of the patch; negative counts from the right edge")
    opacity: float = setting(1.0, "opacity of the patch, in (0, 1]")

    def __post_init__(self) -> None:
        """Check the settings."""
        super().__post_init__()
        check(self, (0 < self.opacity <= 1, f"opacity: expected in (0, 1], found {self.opacity}"))

    def trigger(self, image: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
        """Blend the patch in; the same for every image.

        Args:
            image: float32 (3, H, W) in [0, 1].
            rng: Not used.

        Returns:
            The patched image.

        Raises:
            DataError: If the picture cannot be read or does not fit into the image.
        """
        patch = self._patch()
        _, height, width = patch.shape
        top, left = self._corner(patch, *image.shape[1:])
        area = (slice(None), slice(top, top + height), slice(left, left + width))
        out = image.clone()
        out[area] = torch.lerp(out[area], patch[:3], patch[3:] * self.opacity)
        return out

    def check_size(self, width: int, height: int) -> None:
        """Refuse a resolution in which the patch does not lie inside the image."""
        super().check_size(width, height)
        self._corner(self._patch(), height, width)

    def _corner(self, patch: torch.Tensor, height: int, width: int) -> tuple[int, int]:
        """Return the patch's first row and column in an image."""
        own = patch.shape[1:]
        top = self.row if self.row >= 0 else height - own[0] + self.row + 1
        left = self.column if self.column >= 0 else width - own[1] + self.column + 1
        if min(top, left) < 0 or top + own[0] > height or left + own[1] > width:
            raise DataError(
                f"patch: expected a {own[0]}x{own[1]} patch at ({top}, {left}) inside the image, found an image of "
                f"{height}x{width}. Move or shrink the patch."
            )
        return top, left

    def digest(self) -> str:
        """Return the hash of the picture."""
        return file_digest(self.trigger_file)

    def _patch(self) -> torch.Tensor:
        if self.trigger_file is None:
            return torch.ones(4, 3, 3)
        drawn = picture(self.trigger_file, "RGBA")
        return torch.from_numpy(np.asarray(drawn, dtype=np.float32) / 255.0).permute(2, 0, 1)
