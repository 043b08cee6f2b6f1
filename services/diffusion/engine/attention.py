"""What a denoiser's attention does at every step though once would do, of the same bits.

On emoji-tiny, whose picture has fewer places than its prompt has tokens, the two are together a tenth of a step; on
large models nothing to speak of.
"""

import functools
from collections.abc import Callable
from typing import Any

from diffusers.models.attention_processor import Attention
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary


def quicken(denoiser: nn.Module) -> None:
    """Have the module's attentions leave out what they did before. In place, for inference only.

    Neither weights nor prompt embeddings may be written to afterwards. LoRAs may come and go, as may attention
    processors: what they compute is computed each time.
    """
    for module in denoiser.modules():
        if isinstance(module, Attention):
            _call_processor(module)
            if module.is_cross_attention:
                _remember(module.to_k)
                _remember(module.to_v)


def _call_processor(attention: Attention) -> None:
    # diffusers' own forward inspects the processor's signature to sort out arguments, of which there are mostly none.
    forward = attention.forward

    @functools.wraps(forward)
    def quick(
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **more: Any,
    ) -> Any:
        if more:
            return forward(hidden_states, encoder_hidden_states, attention_mask, **more)
        return attention.processor(
            attention,
            hidden_states,
            encoder_hidden_states=encoder_hidden_states,
            attention_mask=attention_mask,
        )

    attention.forward = quick


def _remember(layer: nn.Module) -> None:
    """Have the layer keep what it made of an input tensor for as long as that tensor lives."""
    # Keys and values of the prompt. Not isinstance: subclasses may compute something else.
    if type(layer) is nn.Linear:
        layer.forward = _remembering(layer.forward)  # type: ignore[assignment, method-assign]


def _remembering(forward: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    # By the tensor itself, not by its numbers: pictures that are painted in turns have tensors of their own.
    known: Any = WeakTensorKeyDictionary()

    @functools.wraps(forward)
    def remembering(embeddings: Tensor) -> Tensor:
        answer: Tensor | None = known.get(embeddings)
        if answer is None:
            answer = known[embeddings] = forward(embeddings)
        return answer

    return remembering
