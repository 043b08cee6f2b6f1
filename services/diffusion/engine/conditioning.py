"""What the denoiser is told of the prompts: weights, long prompts, prompts that change over the steps, AND.

A pipeline takes one embedding for all its steps, so a prompt that changes is swapped around the denoiser's evaluations,
and AND is composed there (Liu et al. 2022, "Compositional Visual Generation with Composable Diffusion Models",
arXiv:2206.01714): each sub-prompt has a row of its own, and the row that the pipeline's guidance formula takes as the
conditional one becomes uncond + sum of weight_i * (cond_i - uncond).

Words are weighed as compel does it: an embedding is moved along the line from that of the empty prompt through its own.
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from services.diffusion.domain import Parameters
from services.diffusion.engine.text_encoders import Embeds, Encoders, clips, family_of, sequence_most
from services.diffusion.prompts.syntax import CHUNKS_MOST, Branch, Chunk, Prompt, PromptError, parse
from services.kit import faults

# Chunks of all that a picture's prompts become over its steps, negative prompt included. Other pictures wait while they
# are encoded, and their embeddings are kept until the picture is finished.
CHUNKS_IN_ALL_MOST = 128

# Told at one step: the sub-prompts, and the negative prompt where there is guidance.
_Told = tuple[tuple[Branch, ...], Branch | None]


@dataclass(frozen=True, eq=False)
class _Moment:
    """What one or several steps are told. negative: None without guidance. All sequences are of one length."""

    branches: tuple[tuple[Embeds, float], ...]
    negative: Embeds | None


class Conditioning:
    """One picture's prompts, encoded.

    arguments: what the pipeline is called with instead of prompt, negative_prompt and clip_skip.
    """

    def __init__(self, moments: Sequence[_Moment]) -> None:
        self._moments = moments  # by step
        first = moments[0]
        positive = first.branches[0][0]
        self.arguments: dict[str, torch.Tensor] = {"prompt_embeds": positive.sequence}
        if positive.pooled is not None:
            self.arguments["pooled_prompt_embeds"] = positive.pooled
        if first.negative is not None:
            self.arguments["negative_prompt_embeds"] = first.negative.sequence
            if first.negative.pooled is not None:
                self.arguments["negative_pooled_prompt_embeds"] = first.negative.pooled

    @property
    def branch_count(self) -> int:
        """Sub-prompts of AND, each of which is a row of every evaluation; 1 without."""
        return len(self._moments[0].branches)

    def around(self, step: int, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Evaluate the denoiser as the pipeline asks (args, kwargs), but told what holds at `step` (0-based)."""
        moment = self._moment(step)
        if self.branch_count > 1:
            return (_composed(moment, forward, args, kwargs),)
        return forward(*args, **self.swapped(step, kwargs))

    def swapped(self, step: int, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The denoiser's or a ControlNet's arguments, told what holds at `step`; of AND, the first sub-prompt."""
        moment = self._moment(step)
        if moment is self._moments[0]:
            return kwargs
        positive = moment.branches[0][0]
        row_count = kwargs["encoder_hidden_states"].shape[0]
        if moment.negative is None or row_count == 1:
            return _told([positive] * row_count, kwargs)
        # With perturbed-attention guidance there is a second positive row.
        return _told([moment.negative] + [positive] * (row_count - 1), kwargs)

    def _moment(self, step: int) -> _Moment:
        return self._moments[min(step, len(self._moments) - 1)]


class Conditioner:
    """Encodes prompts for a pipeline with its own tokenizers and text encoders, as they are at that moment.

    Known: Stable Diffusion 1 and 2, SDXL, Stable Diffusion 3, Flux, in all their pipelines. Others take plain prompts.
    """

    def __init__(self, pipeline: Any) -> None:
        self._pipeline = pipeline
        self._family = family_of(pipeline)

    @functools.cached_property
    def _device(self) -> torch.device:
        # The library looks through every module for it, which takes milliseconds; it never changes.
        device: torch.device = self._pipeline._execution_device
        return device

    def prepare(self, parameters: Parameters, *, guided: bool, step_count: int | None = None) -> Conditioning | None:
        """Encode a picture's prompts; None where the pipeline may get them, plain as they are, itself.

        guided: whether the pipeline evaluates a negative row beside the positive one (classifier-free guidance).
        step_count: that of the prompts' timing, if it is not that of the parameters.
        Runs the text encoders, so whatever belongs into them (LoRAs, embeddings) must be there.

        Raises Fault: INVALID_ARGUMENT for a prompt that cannot be read or is too long, for AND where it cannot be, and
        for a clip_skip that the text encoder is not deep enough for; FAILED_PRECONDITION for a prompt that this kind of
        model cannot take.
        """
        plain = parameters.prompt_syntax == "plain"
        skip = parameters.clip_skip or 0
        self._check_clip_skip(skip)
        positive = Prompt.literal(parameters.prompt) if plain else _parsed("prompt", parameters.prompt)
        negative = (
            Prompt.literal(parameters.negative_prompt)
            if plain
            else _parsed("negative_prompt", parameters.negative_prompt)
        )
        as_it_stands = not skip and (plain or (positive.is_plain and negative.is_plain))
        if self._family is None:
            if as_it_stands:
                return None
            raise faults.failed_precondition(
                "PROMPT_SYNTAX_UNSUPPORTED",
                f"prompt: a {type(self._pipeline).__name__} takes plain prompts only; set prompt_syntax to PLAIN, or "
                "take weights, AND, BREAK and changes over the steps out of the prompts",
                field="prompt",
            )
        if plain and as_it_stands:
            return None
        guided = guided and self._family != "flux"
        self._check_branches(positive, parameters, guided=guided)
        encoders = Encoders(self._pipeline, self._family, skip, device=self._device, truncate=plain)
        count = step_count or parameters.step_count
        negatives = [branches[0] for branches in negative.over(count)] if guided else [None] * count
        shown: list[_Told] = list(zip(positive.over(count), negatives, strict=True))
        lengths = _chunk_counts(encoders, dict.fromkeys(shown))
        if as_it_stands and set(lengths.values()) == {1}:
            return None
        moments = {told: _encoded(encoders, told, length) for told, length in lengths.items()}
        return Conditioning([moments[told] for told in shown])

    def cut_off(self, parameters: Parameters) -> list[str]:
        """A sentence for each prompt whose end the model does not see."""
        plain = parameters.prompt_syntax == "plain"
        if self._family in ("sd", "sdxl") and not plain:
            return []
        tokenizer, limit = self._widest()
        if tokenizer is None:
            return []
        sentences = []
        for field in ("prompt", "negative_prompt"):
            text = getattr(parameters, field)
            if not plain:
                text = " ".join(branch.text for branch in _parsed(field, text).at(0, parameters.step_count)[:1])
            ids = tokenizer(text, add_special_tokens=False)["input_ids"] if text else []
            if cut := str(tokenizer.decode(ids[limit:]).strip()):
                sentences.append(f"{field}: the model takes in {limit} tokens; it did not see the end: {cut!r}")
        return sentences

    def _widest(self) -> tuple[Any, int]:
        """The tokenizer of the text encoder that reads furthest, and how many tokens of a prompt it takes."""
        found = [getattr(self._pipeline, name, None) for name in ("tokenizer", "tokenizer_2", "tokenizer_3")]
        tokenizer = max(filter(None, found), key=lambda each: each.model_max_length, default=None)
        if tokenizer is None:
            return None, 0
        limit = min(int(tokenizer.model_max_length), sequence_most(self._pipeline) or 10**9)
        return tokenizer, limit - int(tokenizer.num_special_tokens_to_add())

    def _check_clip_skip(self, skip: int) -> None:
        if not skip:
            return
        if self._family in (None, "flux"):
            raise faults.invalid_field(
                "clip_skip", f"a {type(self._pipeline).__name__} has no layers to skip; leave it unset"
            )
        depths = [encoder.config.num_hidden_layers for _, encoder in clips(self._pipeline)]
        most = min(depths) - (0 if self._family == "sd" else 1)
        if skip > most:
            raise faults.invalid_field(
                "clip_skip", f"{skip} is more than the text encoder has layers to skip; accepted: 0 to {most}"
            )

    def _check_branches(self, positive: Prompt, parameters: Parameters, *, guided: bool) -> None:
        if positive.branch_count == 1:
            return
        if self._family == "flux":
            raise faults.failed_precondition(
                "PROMPT_AND_UNSUPPORTED",
                "prompt: AND needs a model that is guided by a negative row, and Flux has its guidance built in; "
                "write the sub-prompts as one",
                field="prompt",
            )
        if not guided:
            raise faults.invalid_field(
                "prompt",
                f"AND needs guidance_scale above 1 (it is {parameters.guidance_scale:g}); raise it, or write the "
                "sub-prompts as one",
            )
        if parameters.perturbed_attention is not None:
            raise faults.invalid_field(
                "prompt", "AND cannot go together with perturbed_attention; leave out one of the two"
            )


def _chunk_counts(encoders: Encoders, every: Iterable[_Told]) -> dict[_Told, int]:
    """To how many chunks the prompts of each moment are filled up. Raises Fault before anything is encoded."""
    counted: dict[tuple[Chunk, ...], int] = {}
    lengths: dict[_Told, int] = {}
    to_read: set[tuple[tuple[Chunk, ...], int, str]] = set()
    for told in every:
        branches, negative = told
        fields = [("prompt", branch) for branch in branches]
        if negative is not None:
            fields.append(("negative_prompt", negative))
        for field, branch in fields:
            if branch.chunks not in counted:
                counted[branch.chunks] = encoders.chunk_count(branch)
            if counted[branch.chunks] > CHUNKS_MOST:
                raise faults.invalid_field(
                    field,
                    f"the text encoder would read it in {counted[branch.chunks]} parts, and at most {CHUNKS_MOST} are "
                    "accepted; shorten it",
                )
        lengths[told] = max(counted[branch.chunks] for _, branch in fields)
        to_read.update((branch.chunks, lengths[told], field) for field, branch in fields)
        if sum(length for _, length, _ in to_read) > CHUNKS_IN_ALL_MOST:
            raise faults.invalid_field(
                "prompt",
                "with all that the prompts become over the steps the text encoder would read more than "
                f"{CHUNKS_IN_ALL_MOST} parts; shorten them or let them change less often",
            )
    return lengths


def _encoded(encoders: Encoders, told: _Told, chunk_count: int) -> _Moment:
    branches, negative = told
    positive = tuple((encoders.embed(branch, chunk_count), branch.weight) for branch in branches)
    if negative is None:
        return _Moment(positive, None)
    return _Moment(positive, encoders.embed_negative(negative, chunk_count, positive[0][0]))


def _told(rows: Sequence[Embeds], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The denoiser's arguments with these embeddings, one a row of its batch."""
    old = kwargs["encoder_hidden_states"]
    told = {**kwargs, "encoder_hidden_states": torch.cat([row.sequence for row in rows]).to(old)}
    pooled = [row.pooled for row in rows if row.pooled is not None]
    if pooled:
        # Stable Diffusion 3 and Flux take them on their own, SDXL among other conditions.
        if kwargs.get("pooled_projections") is not None:
            told["pooled_projections"] = torch.cat(pooled).to(old)
        elif "text_embeds" in (kwargs.get("added_cond_kwargs") or {}):
            told["added_cond_kwargs"] = {**kwargs["added_cond_kwargs"], "text_embeds": torch.cat(pooled).to(old)}
    return told


def _composed(
    moment: _Moment, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> torch.Tensor:
    """One evaluation on a negative row and a row a sub-prompt; answers [2, ...]: the negative row, the composed one."""
    assert moment.negative is not None
    if kwargs["encoder_hidden_states"].shape[0] != 2:
        raise RuntimeError("AND is composed of one negative and one positive row, and this evaluation has other rows")
    order = torch.tensor([0] + [1] * len(moment.branches))
    rows = [moment.negative, *(embeds for embeds, _ in moment.branches)]
    output = forward(*_reordered(args, order), **_told(rows, _reordered(kwargs, order)))[0]
    negative = output[:1]
    composed = negative + sum(
        weight * (output[row : row + 1] - negative) for row, (_, weight) in enumerate(moment.branches, 1)
    )
    return torch.cat([negative, composed])


def _reordered(value: Any, order: torch.Tensor) -> Any:
    """`value` with the rows of every tensor of two rows in it (latents, residuals of ControlNets ...) in `order`."""
    if isinstance(value, torch.Tensor):
        return value[order.to(value.device)] if value.ndim and value.shape[0] == 2 else value
    if isinstance(value, dict):
        return {key: _reordered(each, order) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_reordered(each, order) for each in value)
    return value


def _parsed(field: str, text: str) -> Prompt:
    try:
        return parse(text, divided=field == "prompt")
    except PromptError as error:
        raise faults.invalid_field(field, str(error)) from error
