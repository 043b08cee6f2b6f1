"""Previews: what the model believes the finished picture to be, painted cheaply while it is still denoised.

Two ways from latents to pixels: a small autoencoder made for the model, or one linear map from a latent to a colour,
fitted to the model's own VAE. A budget keeps their cost a small part of the denoising itself.
"""

import copy
import functools
import io
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from services.diffusion.domain import PreviewMethod
from services.diffusion.engine.schedulers import family_of, place_of
from services.diffusion.scheduler_table import TABLE

# These work on latents that grow with the noise; the others keep their variance at 1.
_GROWING = ("Euler", "Heun", "KDPM2", "LMS")
_KNOWN_CLASSES = frozenset(entry.diffusers_class for entry in TABLE.values())

# The part of the denoising's time that painting previews may take when nobody says how often they are wanted. A call is
# to lose no more than a twentieth; the rest is for sending them.
COST_SHARE = 0.03
# How much the last preview counts in the estimate of the next one's cost.
_LAST_WEIGHT = 0.3

# The pictures that the linear map is fitted to: this many, of so many latents a side. 384 latents for 17 numbers a
# colour at most; encoding more takes seconds where the VAE is large and the hardware is not.
_FIT_PICTURES = 6
_FIT_LATENTS = 8
_FIT_RIDGE = 1e-3


class Prediction:
    """Listens in on a scheduler's steps, so that the clean latents predicted last can be worked out when wanted."""

    def __init__(self, scheduler: Any) -> None:
        self._scheduler = scheduler
        self._family = family_of(scheduler)
        self._growing = self._family == "noise" and type(scheduler).__name__.startswith(_GROWING)
        self._places = hasattr(scheduler, "sigmas") and hasattr(scheduler, "step_index")
        self._understood = type(scheduler).__name__ in _KNOWN_CLASSES or (
            hasattr(scheduler, "alphas_cumprod") and not self._places
        )
        self._noted: tuple[Tensor, Tensor, float] | None = None
        step: Callable[..., Any] = scheduler.step

        # `wraps` keeps the signature: pipelines look at it to learn whether the scheduler takes a generator.
        @functools.wraps(step)
        def noting(model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
            # Second-order schedulers evaluate once more at a noise level of their own making; the first one will do.
            if self._understood and getattr(scheduler, "state_in_first_order", True):
                self._noted = (model_output, sample, self._sigma(timestep))
            return step(model_output, timestep, sample, *args, **kwargs)

        scheduler.step = noting

    def clean_latents(self) -> Tensor | None:
        """The predicted latents without noise, as the denoising loop holds latents; they may be no numbers.

        None before the first step, and with a scheduler outside the table whose noise levels are not understood.
        """
        if self._noted is None:
            return None
        output, sample, sigma = self._noted[0].float(), self._noted[1].float(), self._noted[2]
        if self._family == "flow":
            return sample - sigma * output
        if self._family == "edm":
            return torch.as_tensor(self._scheduler.precondition_outputs(sample, output, sigma))
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
        if self._places:
            return float(self._scheduler.sigmas[place_of(self._scheduler)])
        alpha = float(self._scheduler.alphas_cumprod[int(timestep)])
        return float(((1.0 - alpha) / max(alpha, 2**-24)) ** 0.5)


class Previews:
    """Paints previews for one model, and knows what they cost.

    vae: the model's own. tiny: the small autoencoder, None if the model has none. pixels_a_latent: along one side.
    clock: seconds, from anywhere.
    """

    def __init__(
        self, vae: Any, tiny: Any, pixels_a_latent: int, *, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._vae = vae
        self._tiny = tiny
        self._pixels_a_latent = pixels_a_latent
        self._clock = clock
        self._map: LinearMap | None = None
        self._cost_s: dict[PreviewMethod, float] = {}  # for one latent

    @property
    def default_method(self) -> PreviewMethod:
        """The small autoencoder where there is one."""
        return "linear" if self._tiny is None else "tiny_autoencoder"

    def paint(self, latents: Tensor, method: PreviewMethod | None, *, max_side_px: int, quality: int) -> bytes:
        """A JPEG of the picture's own size, scaled down to `max_side_px`.

        latents: clean, of one picture, [1, channels, rows, columns]; what is no number in them becomes grey.
        method: None for the default; the small autoencoder must be there to be asked for. quality: 1 to 100.
        """
        method = method or self.default_method
        if method == "linear" and self._map is None:
            self._map = fit_linear(self._vae, self._pixels_a_latent)  # once a model, so no part of the estimate
        began = self._clock()
        latents = torch.nan_to_num(latents.detach().float(), nan=0.0, posinf=0.0, neginf=0.0)
        if method == "linear":
            assert self._map is not None
            image = self._map.image(latents, self._pixels_a_latent, max_side_px)
        else:
            image = _decoded(self._tiny, latents)
        content = _jpeg(image, max_side_px, quality)
        cost_s = (self._clock() - began) / (latents.shape[-1] * latents.shape[-2])
        before = self._cost_s.get(method, cost_s)
        self._cost_s[method] = _LAST_WEIGHT * cost_s + (1 - _LAST_WEIGHT) * before
        return content

    def expected_s(self, method: PreviewMethod | None, width: int, height: int) -> float | None:
        """Seconds that a preview of a picture of this many pixels will take; None before the first of its method."""
        a_latent = self._cost_s.get(method or self.default_method)
        return None if a_latent is None else a_latent * width * height / self._pixels_a_latent**2


class PreviewBudget:
    """Decides for one call after which steps previews are painted.

    interval: at every so many steps; 0 for never; None for as often as is cheap: as long as all previews of the call
    together take no more than COST_SHARE of its denoising so far. Never after the last step, for the result follows.
    """

    def __init__(self, interval: int | None, step_count: int) -> None:
        self._interval = interval
        self._step_count = step_count
        self._last_step = 0
        self._steps_s = 0.0
        self._previews_s = 0.0

    def note_steps(self, seconds: float) -> None:
        """The call was denoised for so long, previews not counted."""
        self._steps_s += seconds

    def note_previews(self, seconds: float) -> None:
        """Previews were painted for so long."""
        self._previews_s += seconds

    def due(self, step: int, expected_s: float | None) -> bool:
        """Whether previews are painted now that `step` steps are done; ask once a step.

        expected_s: seconds for all pictures of the call; None if none was ever painted, and then one is, to learn.
        """
        before, self._last_step = self._last_step, step
        if step >= self._step_count or step <= before or self._interval == 0:
            return False
        if self._interval is not None:
            return step // self._interval > before // self._interval
        return self._previews_s + (expected_s or 0.0) <= COST_SHARE * self._steps_s


@dataclass(frozen=True)
class LinearMap:
    """Colours as a linear function of latents. weight: [channels, 3]; bias: [3]; both float32 on the CPU."""

    weight: Tensor
    bias: Tensor

    def image(self, latents: Tensor, pixels_a_latent: int, max_side_px: int) -> Image.Image:
        """One picture's latents [1, channels, rows, columns] as colours, enlarged to the picture's size."""
        colours = torch.einsum("chw,cr->rhw", latents[0].cpu(), self.weight) + self.bias[:, None, None]
        small = to_image(colours.clamp(0, 1)[None])
        width, height = small.width * pixels_a_latent, small.height * pixels_a_latent
        scale = min(1.0, max_side_px / max(width, height))
        return small.resize((max(1, round(width * scale)), max(1, round(height * scale))), Image.Resampling.BILINEAR)


def fit_linear(vae: Any, pixels_a_latent: int) -> LinearMap:
    """The linear map that comes nearest to a VAE, by least squares over a few smooth pictures that it encodes.

    Takes a fraction of a second with a small VAE, one or two with that of Stable Diffusion on two CPU cores. Latents
    are those of the denoising loop: shifted and scaled as the VAE's config says.
    """
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(_FIT_PICTURES, 3, 4, 4, generator=generator)
    side = _FIT_LATENTS * pixels_a_latent
    pictures = functional.interpolate(coarse, size=(side, side), mode="bicubic", align_corners=False).clamp(0, 1)
    if vae.dtype == torch.float16:
        vae = copy.deepcopy(vae).float()  # some encoders overflow in float16
    with torch.no_grad():
        encoded = vae.encode((pictures * 2 - 1).to(vae.device, vae.dtype), return_dict=False)[0]
    latents = encoded if isinstance(encoded, Tensor) else encoded.mode()
    latents = _as_the_loop_holds_them(vae.config, latents.detach().cpu().double())
    colours = functional.adaptive_avg_pool2d(pictures.double(), (latents.shape[-2], latents.shape[-1]))
    inputs = latents.movedim(1, -1).flatten(0, -2)
    outputs = colours.movedim(1, -1).flatten(0, -2)
    mean_in, mean_out = inputs.mean(0), outputs.mean(0)
    centred = inputs - mean_in
    # A touch of ridge, so that channels that say nothing here get no large weight.
    gram = centred.T @ centred
    gram += _FIT_RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    weight = torch.linalg.solve(gram, centred.T @ (outputs - mean_out))
    return LinearMap(weight.float(), (mean_out - mean_in @ weight).float())


def _as_the_loop_holds_them(config: Any, latents: Tensor) -> Tensor:
    mean, std = config.get("latents_mean"), config.get("latents_std")
    scaling, shift = config.get("scaling_factor") or 1.0, config.get("shift_factor") or 0.0
    if mean is not None and std is not None:
        shape = (1, -1, 1, 1)
        mean = torch.tensor(mean, dtype=latents.dtype).view(shape)
        return (latents - mean) * scaling / torch.tensor(std, dtype=latents.dtype).view(shape)
    return (latents - shift) * scaling


def to_image(pixels: Tensor) -> Image.Image:
    """One picture, [1, 3, height, width] in 0 to 1, as 8-bit RGB."""
    array = (pixels[0].permute(1, 2, 0).float() * 255).round().to(torch.uint8).cpu().numpy()
    return Image.fromarray(array, "RGB")


def _decoded(autoencoder: Any, latents: Tensor) -> Image.Image:
    with torch.no_grad():
        decoded = autoencoder.decode(latents.to(autoencoder.device, autoencoder.dtype), return_dict=False)[0]
    # Latents far out of range may decode to what is no number.
    return to_image(torch.nan_to_num(decoded.float() / 2 + 0.5, nan=0.5).clamp(0, 1))


def _jpeg(image: Image.Image, max_side_px: int, quality: int) -> bytes:
    if max(image.size) > max_side_px:
        image.thumbnail((max_side_px, max_side_px), Image.Resampling.BILINEAR)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()
