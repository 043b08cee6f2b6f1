"""The networks of a diffusion model as pure functions of tensors, ready to be traced at every size.

diffusers' own forward methods ask sizes questions ("is it a multiple of 8?"), and a trace keeps one answer. So those of
denoisers and ControlNets are written out here once more, over the checkpoint's own layers; all else is diffusers' code.
"""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any
from unittest import mock

import torch
from diffusers.models.embeddings import AttentionPooling
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn
from torch.nn import functional

from services.compiler.export.exported import ExportError
from services.runtimes import diffusion_graphs as names


class Network(nn.Module):
    """A network as it is exported: its forward takes tensors or lists of them and answers tensors in `outputs`' order.

    inputs: by name, lists counted out; outputs: by name.
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    def arguments(self, feeds: Mapping[str, Tensor]) -> dict[str, Any]:
        """The arguments of forward for the graph's inputs."""
        return {name: feeds[name] for name in self.inputs}

    @torch.no_grad()
    def reference(self, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Inputs by name to outputs by name, on torch."""
        return dict(zip(self.outputs, self(**self.arguments(feeds)), strict=True))


class Clip(Network):
    """A CLIPTextModel, with a projection or without."""

    inputs = (names.INPUT_IDS,)
    outputs = (names.LAST_HIDDEN_STATE, names.POOLED, names.HIDDEN_STATES, names.NORMED_STATES)

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.text_model = model

    def forward(self, input_ids: Tensor) -> tuple[Tensor, ...]:
        output = self.text_model(input_ids, output_hidden_states=True)
        states = torch.stack(output.hidden_states)
        # Older checkpoints' classes keep the layers one level further down.
        norm = getattr(self.text_model, "text_model", self.text_model).final_layer_norm
        pooled = getattr(output, "text_embeds", None)
        if pooled is None:
            pooled = output.pooler_output
        return output.last_hidden_state, pooled, states, norm(states)


class T5(Network):
    """A T5EncoderModel."""

    inputs = (names.INPUT_IDS,)
    outputs = (names.LAST_HIDDEN_STATE,)

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.encoder_model = model

    def forward(self, input_ids: Tensor) -> tuple[Tensor, ...]:
        return (self.encoder_model(input_ids).last_hidden_state,)


class UNet(Network):
    """A UNet2DConditionModel that always takes residuals and fits every size, whatever it is a multiple of."""

    outputs = (names.PREDICTION,)

    def __init__(self, unet: Any) -> None:
        super().__init__()
        _check_conditions(unet.config, names.UNET)
        self.unet = unet
        self._conditions = _condition_names(unet.config)
        # One residual for the first convolution, one a block's resnet, one a shrinking of a block.
        self.residual_count = 1 + sum(len(block.resnets) + len(block.downsamplers or ()) for block in unet.down_blocks)
        self._residuals = tuple(names.down_residual(index) for index in range(self.residual_count))
        self.inputs = (*self._conditions, *self._residuals, names.MID_RESIDUAL)

    def arguments(self, feeds: Mapping[str, Tensor]) -> dict[str, Any]:
        return {
            **{name: feeds[name] for name in self._conditions},
            "down_residuals": [feeds[name] for name in self._residuals],
            names.MID_RESIDUAL: feeds[names.MID_RESIDUAL],
        }

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        timestep_cond: Tensor | None = None,
        text_embeds: Tensor | None = None,
        time_ids: Tensor | None = None,
        *,
        down_residuals: list[Tensor],
        mid_residual: Tensor,
    ) -> tuple[Tensor, ...]:
        unet = self.unet
        if unet.config.center_input_sample:
            sample = 2 * sample - 1.0
        embedded = unet.time_embedding(unet.time_proj(timestep), timestep_cond)
        embedded = embedded + _added(unet, encoder_hidden_states, text_embeds, time_ids)
        if unet.time_embed_act is not None:
            embedded = unet.time_embed_act(embedded)
        told = unet.process_encoder_hidden_states(encoder_hidden_states, added_cond_kwargs={})
        hidden, skips = _down(unet, unet.conv_in(sample), embedded, told)
        skips = [skip + residual for skip, residual in zip(skips, down_residuals, strict=True)]
        if unet.mid_block is not None:
            hidden = _block(unet.mid_block, hidden, embedded, told)
        hidden = hidden + mid_residual
        for block in unet.up_blocks:
            count = len(block.resnets)
            taken, skips = tuple(skips[-count:]), skips[:-count]
            size = skips[-1].shape[2:] if skips else None
            hidden = _block(block, hidden, embedded, told, res_hidden_states_tuple=taken, upsample_size=size)
        if unet.conv_norm_out is not None:
            hidden = unet.conv_act(unet.conv_norm_out(hidden))
        return (unet.conv_out(hidden),)


class ControlNet(Network):
    """A ControlNetModel at strength 1."""

    def __init__(self, controlnet: Any) -> None:
        super().__init__()
        _check_conditions(controlnet.config, names.CONTROLNET)
        if controlnet.config.global_pool_conditions:
            raise ExportError("a ControlNet that pools its residuals (global_pool_conditions) cannot be exported")
        self.controlnet = controlnet
        self.inputs = (*_condition_names(controlnet.config), names.CONDITION)
        count = len(controlnet.controlnet_down_blocks)
        self.outputs = (*map(names.down_residual, range(count)), names.MID_RESIDUAL)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        text_embeds: Tensor | None = None,
        time_ids: Tensor | None = None,
        *,
        condition: Tensor,
    ) -> tuple[Tensor, ...]:
        net = self.controlnet
        if net.config.controlnet_conditioning_channel_order == "bgr":
            condition = torch.flip(condition, dims=[1])
        embedded = net.time_embedding(net.time_proj(timestep), None)
        embedded = embedded + _added(net, encoder_hidden_states, text_embeds, time_ids)
        hidden = net.conv_in(sample)
        seen = net.controlnet_cond_embedding(condition)
        # Of one size already, as the host gives them; said so for the trace, which cannot know.
        rows, columns = torch.arange(hidden.shape[2]), torch.arange(hidden.shape[3])
        hidden = hidden + seen.index_select(2, rows).index_select(3, columns)
        hidden, skips = _down(net, hidden, embedded, encoder_hidden_states)
        if net.mid_block is not None:
            hidden = _block(net.mid_block, hidden, embedded, encoder_hidden_states)
        down = [block(skip) for skip, block in zip(skips, net.controlnet_down_blocks, strict=True)]
        return (*down, net.controlnet_mid_block(hidden))


class SD3Transformer(Network):
    """An SD3Transformer2DModel. Height and width are multiples of the patch size."""

    inputs = (names.HIDDEN_STATES, names.ENCODER_HIDDEN_STATES, names.POOLED_PROJECTIONS, names.TIMESTEP)
    outputs = (names.PREDICTION,)

    def __init__(self, transformer: Any) -> None:
        super().__init__()
        self.transformer = transformer

    def forward(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor, pooled_projections: Tensor, timestep: Tensor
    ) -> tuple[Tensor, ...]:
        transformer = self.transformer
        patches = transformer.pos_embed.proj(hidden_states)
        rows, columns = patches.shape[2:]
        hidden = patches.flatten(2).transpose(1, 2) + self._places(rows, columns)
        embedded = transformer.time_text_embed(timestep, pooled_projections)
        told = transformer.context_embedder(encoder_hidden_states)
        for block in transformer.transformer_blocks:
            told, hidden = block(hidden_states=hidden, encoder_hidden_states=told, temb=embedded)
        hidden = transformer.proj_out(transformer.norm_out(hidden, embedded))
        size, channels = transformer.config.patch_size, transformer.out_channels
        hidden = hidden.reshape(hidden.shape[0], rows, columns, size, size, channels).permute(0, 5, 1, 3, 2, 4)
        return (hidden.reshape(hidden.shape[0], channels, rows * size, columns * size),)

    def _places(self, rows: int, columns: int) -> Tensor:
        """Position embeddings [1, rows * columns, channels]: the middle of the table of the largest picture."""
        table = self.transformer.pos_embed
        most = table.pos_embed_max_size
        grid = table.pos_embed.reshape(most, most, -1)
        grid = grid.index_select(0, (most - rows) // 2 + torch.arange(rows))
        grid = grid.index_select(1, (most - columns) // 2 + torch.arange(columns))
        places: Tensor = grid.reshape(1, rows * columns, -1)
        return places


class FluxTransformer(Network):
    """A FluxTransformer2DModel."""

    outputs = (names.PREDICTION,)

    def __init__(self, transformer: Any) -> None:
        super().__init__()
        self.transformer = transformer
        guidance = (names.GUIDANCE,) if transformer.config.guidance_embeds else ()
        self.inputs = (
            names.HIDDEN_STATES,
            names.ENCODER_HIDDEN_STATES,
            names.POOLED_PROJECTIONS,
            names.TIMESTEP,
            names.IMG_IDS,
            names.TXT_IDS,
            *guidance,
        )

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        pooled_projections: Tensor,
        timestep: Tensor,
        img_ids: Tensor,
        txt_ids: Tensor,
        guidance: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        output: tuple[Tensor, ...] = self.transformer(
            hidden_states=hidden_states,
            encoder_hidden_states=encoder_hidden_states,
            pooled_projections=pooled_projections,
            timestep=timestep,
            img_ids=img_ids,
            txt_ids=txt_ids,
            guidance=guidance,
            return_dict=False,
        )
        return output


class VaeEncoder(Network):
    """The encoder of an AutoencoderKL."""

    inputs = (names.PIXELS,)
    outputs = (names.MOMENTS,)

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.encoder, self.quant_conv = vae.encoder, vae.quant_conv

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        moments = self.encoder(pixels)
        return (moments if self.quant_conv is None else self.quant_conv(moments),)


class VaeDecoder(Network):
    """The decoder of an AutoencoderKL."""

    inputs = (names.LATENTS,)
    outputs = (names.PIXELS,)

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.post_quant_conv, self.decoder = vae.post_quant_conv, vae.decoder

    def forward(self, latents: Tensor) -> tuple[Tensor, ...]:
        if self.post_quant_conv is not None:
            latents = self.post_quant_conv(latents)
        return (self.decoder(latents),)


@contextlib.contextmanager
def plain_operators() -> Iterator[None]:
    """While a network is traced: attention and upsampling in the operators that graphs have.

    torch's own attention is exported with a mask of zeros and both factors scaled; diffusers' upsampling asks how large
    its input is, and its pooling attends for every token where the first is wanted. Changes the libraries' functions
    for the whole process meanwhile.
    """
    with (
        mock.patch.object(functional, "scaled_dot_product_attention", _attention),
        mock.patch.object(Upsample2D, "forward", _upsample),
        mock.patch.object(AttentionPooling, "forward", _pool),
    ):
        yield


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """As torch.nn.functional's, in evaluation."""
    if enable_gqa:
        raise NotImplementedError("attention with fewer keys than queries")
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    # The queries are fewer than the scores.
    scores = (query * scale) @ key.transpose(-1, -2)
    if is_causal:
        length = query.shape[-2]
        later = torch.full((length, length), float("-inf"), dtype=query.dtype).triu(1)
        scores = scores + later
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, float("-inf")) if attn_mask.dtype == torch.bool else scores + attn_mask
    return torch.softmax(scores, dim=-1) @ value


def _upsample(self: Any, hidden_states: Tensor, output_size: Any = None, *_: Any, **__: Any) -> Tensor:
    """As Upsample2D's."""
    if self.norm is not None:
        hidden_states = self.norm(hidden_states.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    if self.use_conv_transpose:
        transposed: Tensor = self.conv(hidden_states)
        return transposed
    if self.interpolate:
        if output_size is None:
            hidden_states = functional.interpolate(hidden_states, scale_factor=2.0, mode="nearest")
        else:
            hidden_states = functional.interpolate(hidden_states, size=tuple(output_size), mode="nearest")
    if self.use_conv:
        hidden_states = self.conv(hidden_states) if self.name == "conv" else self.Conv2d_0(hidden_states)
    return hidden_states


def _pool(self: Any, x: Tensor) -> Tensor:
    """As AttentionPooling's."""
    mean = x.mean(dim=1, keepdim=True) + self.positional_embedding
    seen = torch.cat([mean, x], dim=1)
    shape = (x.shape[0], -1, self.num_heads, self.dim_per_head)
    query, key, value = (
        projection(states).reshape(shape).transpose(1, 2)
        for projection, states in ((self.q_proj, mean), (self.k_proj, seen), (self.v_proj, seen))
    )
    return _attention(query, key, value).transpose(1, 2).flatten(2)[:, 0]


def _check_conditions(config: Any, component: str) -> None:
    """Raise ExportError for a network that is told more than this file passes on."""
    if config.get("class_embed_type") is not None or config.get("num_class_embeds") is not None:
        raise ExportError(f"{component}: a network with class labels (class_embed_type) cannot be exported")
    if config.get("addition_embed_type") not in (None, "text", "text_time"):
        raise ExportError(f"{component}: addition_embed_type {config['addition_embed_type']!r} cannot be exported")
    if config.get("encoder_hid_dim_type") not in (None, "text_proj"):
        raise ExportError(f"{component}: encoder_hid_dim_type {config['encoder_hid_dim_type']!r} cannot be exported")


def _condition_names(config: Any) -> tuple[str, ...]:
    found = [names.SAMPLE, names.TIMESTEP, names.ENCODER_HIDDEN_STATES]
    if config.get("time_cond_proj_dim") is not None:
        found.append(names.TIMESTEP_COND)
    if config.get("addition_embed_type") == "text_time":
        found += [names.TEXT_EMBEDS, names.TIME_IDS]
    return tuple(found)


def _added(net: Any, told: Tensor, text_embeds: Tensor | None, time_ids: Tensor | None) -> Any:
    """What is embedded beside the timestep: a tensor [batch, channels], or 0."""
    kind = net.config.addition_embed_type
    if kind == "text":
        return net.add_embedding(told)
    if kind == "text_time":
        assert text_embeds is not None
        assert time_ids is not None
        times = net.add_time_proj(time_ids.flatten()).reshape(text_embeds.shape[0], -1)
        return net.add_embedding(torch.cat([text_embeds, times], dim=-1))
    return 0.0


def _down(net: Any, hidden: Tensor, embedded: Tensor, told: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The downward half: what comes out below, and what is kept for the skip connections."""
    skips = [hidden]
    for block in net.down_blocks:
        hidden, kept = _block(block, hidden, embedded, told)
        skips += kept
    return hidden, skips


def _block(block: Any, hidden: Tensor, embedded: Tensor, told: Tensor, **others: Any) -> Any:
    if getattr(block, "has_cross_attention", False):
        others["encoder_hidden_states"] = told
    return block(hidden_states=hidden, temb=embedded, **others)
