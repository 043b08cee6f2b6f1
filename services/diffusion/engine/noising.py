"""Where a pipeline mixes noise into a picture's latents: variations, masks, and latents that were made elsewhere.

Pipelines that start from a picture call their scheduler to do it (`add_noise`, `scale_noise` for flow matching). Each
picture has a scheduler of its own, so listening there serves every pipeline and touches no other picture.
"""

import functools
from typing import Any

import torch
from torch import Tensor

from services.diffusion.domain import Variation

_CALLS = ("add_noise", "scale_noise")


class Noise:
    """Listens at one picture's scheduler, and remembers the first mix: the picture's own latents and its noise.

    variation: mixed into the noise. latents: taken in place of what the pipeline encoded, of the same shape, scaled as
    the denoising loop holds them.
    """

    def __init__(self, scheduler: Any, *, variation: Variation | None = None, latents: Tensor | None = None) -> None:
        self._variation = variation
        self._replacement = latents
        self.original: Tensor | None = None
        self._noise: Tensor | None = None
        self._plain = {name: getattr(scheduler, name) for name in _CALLS if hasattr(scheduler, name)}
        for name in self._plain:
            setattr(scheduler, name, functools.partial(self._first, name))

    def _first(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """Stands for the scheduler's method; the arguments' order is that of the method."""
        plain = self._plain[name]
        if self.original is not None:
            return plain(*args, **kwargs)
        sample, second, third = args  # all pipelines pass them by position
        noise, timestep = (second, third) if name == "add_noise" else (third, second)
        if self._replacement is not None:
            sample = self._replacement.to(sample.device, sample.dtype)
        noise = varied(noise, self._variation)
        self.original, self._noise = sample, noise
        return plain(sample, noise, timestep) if name == "add_noise" else plain(sample, timestep, noise)

    def mixed(self, timestep: Tensor) -> Tensor:
        """The picture's own latents with its noise at that step, as the loop would hold them; after the first mix."""
        assert self.original is not None
        if "scale_noise" in self._plain:
            result = self._plain["scale_noise"](self.original, timestep[None], self._noise)
        else:
            result = self._plain["add_noise"](self.original, self._noise, timestep[None])
        return torch.as_tensor(result)


def varied(noise: Tensor, variation: Variation | None) -> Tensor:
    """The noise on its way to that of the variation's seed: spherical interpolation, which keeps its length.

    noise: [1, channels, rows, columns].
    """
    if variation is None or not variation.strength:
        return noise
    generator = torch.Generator("cpu").manual_seed(variation.seed)
    other = torch.randn(noise.shape, generator=generator, dtype=torch.float32).to(noise.device, noise.dtype)
    if variation.strength == 1:
        return other
    a, b = noise.float(), other.float()
    cosine = (a * b).sum() / (a.norm() * b.norm())
    angle = torch.acos(cosine.clamp(-1, 1))
    mixed = (torch.sin((1 - variation.strength) * angle) * a + torch.sin(variation.strength * angle) * b) / angle.sin()
    return mixed.to(noise.dtype)
