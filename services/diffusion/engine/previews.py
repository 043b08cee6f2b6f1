"""Previews: what the model believes the finished picture to be, decoded by its small autoencoder at every step."""

import functools
import io
from collections.abc import Callable
from typing import Any

import torch
from PIL import Image

from services.diffusion.engine.schedulers import is_flow

# These work on latents that grow with the noise; the others keep their variance at 1.
_GROWING = ("Euler", "Heun", "KDPM2", "LMS")


class Prediction:
    """Listens in on a scheduler's steps, so that the clean latents predicted last can be worked out when wanted."""

    def __init__(self, scheduler: Any) -> None:
        self._scheduler = scheduler
        self._flow = is_flow(scheduler)
        self._growing = not self._flow and type(scheduler).__name__.startswith(_GROWING)
        self._understood = self._flow or self._growing or hasattr(scheduler, "alphas_cumprod")
        self._noted: tuple[torch.Tensor, torch.Tensor, float] | None = None
        step: Callable[..., Any] = scheduler.step

        # `wraps` keeps the signature: pipelines look at it to learn whether the scheduler takes a generator.
        @functools.wraps(step)
        def noting(model_output: torch.Tensor, timestep: Any, sample: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            # Second-order schedulers evaluate once more at a noise level of their own making; the first one will do.
            if self._understood and getattr(scheduler, "state_in_first_order", True):
                self._noted = (model_output, sample, self._sigma(timestep))
            return step(model_output, timestep, sample, *args, **kwargs)

        scheduler.step = noting

    def clean_latents(self) -> torch.Tensor | None:
        """The predicted latents without noise, as the autoencoder takes them.

        None before the first step, and with a scheduler outside the table whose noise levels are not understood.
        """
        if self._noted is None:
            return None
        output, sample, sigma = self._noted
        if self._flow:
            return sample - sigma * output
        # With sigma the noise-to-signal ratio: a sample of variance 1 is signal * x0 + noise * eps.
        signal: float = (1.0 + sigma * sigma) ** -0.5
        noise = sigma * signal
        if self._growing:
            sample = sample * signal
        kind = self._scheduler.config.get("prediction_type", "epsilon")
        if kind == "v_prediction":
            return signal * sample - noise * output
        if kind == "sample":
            return output
        return (sample - noise * output) / signal

    def _sigma(self, timestep: Any) -> float:
        if self._flow:
            return float(timestep) / float(self._scheduler.config.num_train_timesteps)
        if self._growing:
            return float(self._scheduler.sigmas[self._scheduler.step_index])
        alpha = float(self._scheduler.alphas_cumprod[int(timestep)])
        return float(((1.0 - alpha) / max(alpha, 2**-24)) ** 0.5)


def paint(autoencoder: Any, latents: torch.Tensor, *, most_side: int, quality: int) -> bytes:
    """Decode latents of one picture, [1, channels, rows, columns], into a JPEG no longer than `most_side` pixels."""
    decoded = autoencoder.decode(latents.to(autoencoder.dtype), return_dict=False)[0]
    image = to_image((decoded / 2 + 0.5).clamp(0, 1))
    if max(image.size) > most_side:
        image.thumbnail((most_side, most_side), Image.Resampling.BILINEAR)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def to_image(pixels: torch.Tensor) -> Image.Image:
    """One picture, [1, 3, height, width] in 0 to 1, as 8-bit RGB."""
    array = (pixels[0].permute(1, 2, 0).float() * 255).round().to(torch.uint8).cpu().numpy()
    return Image.fromarray(array, "RGB")
