"""The command `inkwell paint`: texts are read in `values`, laid together in `asking`, and sent by `painting`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from inkwell.channel import DEFAULT_TIMEOUT_S
from inkwell.cli.options import DEFAULT_ADDRESS, Address, Hardware, Json, Quiet, Timeout, Wait, call, connect
from inkwell.errors import FieldViolation, InkwellError
from inkwell.types import MaskFill, PredictionType, PreviewMethod, PromptSyntax, TimestepSpacing

_START = "Start from a picture"
_STEER = "Steer"
_SECOND = "Second pass"
_SAMPLING = "Sampling"
_PROMPT = "Prompt"
_DECODING = "Decoding and previews"


def _option(*names: str, panel: str, help: str, **more: Any) -> Any:
    return typer.Option(*names, rich_help_panel=panel, help=help, **more)


def paint(
    prompt: Annotated[str | None, typer.Argument(help="What to paint; optional with --like.", metavar="PROMPT")] = None,
    output: Annotated[
        str,
        typer.Option(
            "--output", "-o", help="File to write: .png, .jpg or .webp; '-' for a PNG on stdout.", metavar="FILE"
        ),
    ] = ...,  # type: ignore[assignment]  # typer's mark of a required option
    address: Address = DEFAULT_ADDRESS,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Name from 'inkwell models'.", metavar="NAME")
    ] = None,
    negative: Annotated[str | None, typer.Option("--negative", "-n", help="What it should not show.")] = None,
    steps: Annotated[int | None, typer.Option("--steps", help="Denoising steps.")] = None,
    size: Annotated[str | None, typer.Option("--size", help="In pixels, such as 64x64.", metavar="WxH")] = None,
    guidance: Annotated[float | None, typer.Option("--guidance", help="How strongly the prompt rules.")] = None,
    scheduler: Annotated[
        str | None,
        typer.Option("--scheduler", help="Name or alias from 'inkwell schedulers'.", metavar="NAME"),
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="0 to 4294967295; random if left out.")] = None,
    count: Annotated[
        int, typer.Option("--count", "-c", help="Pictures to paint; several get -1, -2, … before the extension.", min=1)
    ] = 1,
    batches: Annotated[
        int, typer.Option("--batches", help="Paint so many times --count pictures, one batch after the other.", min=1)
    ] = 1,
    quality: Annotated[int | None, typer.Option("--quality", help="1 to 100, for JPEG and WebP.")] = None,
    like: Annotated[
        Path | None,
        typer.Option(
            "--like",
            help="Repeat this picture from the parameters in its file; other options override. Pictures that went into"
            " it must be given again.",
        ),
    ] = None,
    # --- start from a picture
    image: Annotated[
        str | None,
        _option("--image", "-i", panel=_START, help="Picture to start from; '-' for stdin.", metavar="FILE"),
    ] = None,
    strength: Annotated[
        float | None, _option("--strength", panel=_START, help="How much of it is repainted, above 0 to 1.")
    ] = None,
    mask: Annotated[
        str | None, _option("--mask", panel=_START, help="Repaint only what is white in this one.", metavar="FILE")
    ] = None,
    invert_mask: Annotated[
        bool | None, _option("--invert-mask/--no-invert-mask", panel=_START, help="Repaint what is black instead.")
    ] = None,
    mask_blur: Annotated[
        int | None,
        _option("--mask-blur", panel=_START, help="Soften the edge of the mask, or of --outpaint.", metavar="PIXELS"),
    ] = None,
    inpaint_padding: Annotated[
        int | None,
        _option(
            "--inpaint-padding",
            panel=_START,
            help="Paint the masked region and so much around it at full size, and put it back.",
            metavar="PIXELS",
        ),
    ] = None,
    fill: Annotated[
        MaskFill | None, _option("--fill", panel=_START, help="What is under the mask, or beyond the edges, before.")
    ] = None,
    outpaint: Annotated[
        str | None,
        _option("--outpaint", panel=_START, help="Paint so many pixels beyond the edges.", metavar="L,T,R,B"),
    ] = None,
    # --- steer
    control: Annotated[
        list[str] | None,
        _option(
            "--control",
            panel=_STEER,
            help="Steer the composition by a picture; MODEL and preprocessors from 'inkwell controls'. Again for"
            " others.",
            metavar="[MODEL=]FILE[,preprocessor=NAME][,scale=N][,start=N][,end=N]",
        ),
    ] = None,
    image_prompt: Annotated[
        list[str] | None,
        _option(
            "--image-prompt",
            panel=_STEER,
            help="A picture that says what to paint; ADAPTER from 'inkwell adapters'. Again for others.",
            metavar="[ADAPTER=]FILE[,scale=N]",
        ),
    ] = None,
    lora: Annotated[
        list[str] | None,
        _option(
            "--lora", panel=_STEER, help="Name from 'inkwell adapters'. Again for others.", metavar="NAME[:WEIGHT]"
        ),
    ] = None,
    # --- second pass
    hires: Annotated[
        str | None,
        _option("--hires", panel=_SECOND, help="Paint again, so many times larger or at this size.", metavar="N|WxH"),
    ] = None,
    hires_upscaler: Annotated[
        str | None,
        _option(
            "--hires-upscaler",
            panel=_SECOND,
            help="lanczos, bicubic, nearest, latent or latent_nearest.",
            metavar="NAME",
        ),
    ] = None,
    hires_strength: Annotated[
        float | None, _option("--hires-strength", panel=_SECOND, help="How much is repainted, above 0 to 1.")
    ] = None,
    hires_steps: Annotated[
        int | None, _option("--hires-steps", panel=_SECOND, help="Steps before its strength shortens them.")
    ] = None,
    refiner: Annotated[
        str | None,
        _option("--refiner", panel=_SECOND, help="Model that paints the last steps.", metavar="NAME"),
    ] = None,
    switch_at: Annotated[
        float | None, _option("--switch-at", panel=_SECOND, help="The part of the steps after which it takes over.")
    ] = None,
    # --- sampling
    sigmas: Annotated[
        str | None,
        _option(
            "--sigmas",
            panel=_SAMPLING,
            help="How noise levels are spread: karras, exponential or beta; or the levels, falling, between commas.",
            metavar="NAME|LEVELS",
        ),
    ] = None,
    timesteps: Annotated[
        str | None,
        _option("--timesteps", panel=_SAMPLING, help="The steps by hand, falling, between commas.", metavar="STEPS"),
    ] = None,
    spacing: Annotated[
        TimestepSpacing | None, _option("--spacing", panel=_SAMPLING, help="Which of the training's steps are visited.")
    ] = None,
    prediction_type: Annotated[
        PredictionType | None,
        _option("--prediction-type", panel=_SAMPLING, help="What the model's output means, where its files say wrong."),
    ] = None,
    eta: Annotated[
        float | None, _option("--eta", panel=_SAMPLING, help="Fresh noise at each step of ddim and its kin, 0 to 1.")
    ] = None,
    guidance_rescale: Annotated[
        float | None, _option("--guidance-rescale", panel=_SAMPLING, help="Against overexposure by guidance, 0 to 1.")
    ] = None,
    pag: Annotated[
        float | None, _option("--pag", panel=_SAMPLING, help="Perturbed-attention guidance: its scale, such as 3.")
    ] = None,
    pag_adaptive: Annotated[
        float | None, _option("--pag-adaptive", panel=_SAMPLING, help="How fast that fades over the steps; 0: never.")
    ] = None,
    freeu: Annotated[
        str | None,
        _option("--freeu", panel=_SAMPLING, help="FreeU: on, or its four factors.", metavar="on|S1,S2,B1,B2"),
    ] = None,
    variation_seed: Annotated[
        int | None, _option("--variation-seed", panel=_SAMPLING, help="Mix this seed's noise into the first's.")
    ] = None,
    variation_strength: Annotated[
        float | None, _option("--variation-strength", panel=_SAMPLING, help="How much of it, 0 to 1.")
    ] = None,
    # --- prompt
    plain_prompt: Annotated[
        bool | None,
        _option("--plain-prompt/--no-plain-prompt", panel=_PROMPT, help="Take (brackets:1.2) and all else as text."),
    ] = None,
    style: Annotated[
        list[str] | None,
        _option("--style", panel=_PROMPT, help="Name of a style of the service. Again for others.", metavar="NAME"),
    ] = None,
    wildcard_seed: Annotated[
        int | None,
        _option("--wildcard-seed", panel=_PROMPT, help="What decides __wildcards__; else each picture's own seed."),
    ] = None,
    clip_skip: Annotated[
        int | None,
        _option("--clip-skip", panel=_PROMPT, help="Text encoder layers to skip; one less than web UIs count."),
    ] = None,
    # --- decoding and previews
    vae: Annotated[
        str | None, _option("--vae", panel=_DECODING, help="Another VAE of the model, by name.", metavar="NAME")
    ] = None,
    vae_tiled: Annotated[
        bool | None, _option("--vae-tiled/--no-vae-tiled", panel=_DECODING, help="Decode in tiles, with less memory.")
    ] = None,
    vae_upcast: Annotated[
        bool | None, _option("--vae-upcast/--no-vae-upcast", panel=_DECODING, help="Decode in 32 bits.")
    ] = None,
    preview: Annotated[
        bool,
        _option("--preview/--no-preview", panel=_DECODING, help="Draw previews where the terminal has colours."),
    ] = True,
    preview_method: Annotated[
        PreviewMethod | None, _option("--preview-method", panel=_DECODING, help="What decodes them.")
    ] = None,
    preview_interval: Annotated[
        int | None,
        _option("--preview-interval", panel=_DECODING, help="One after every so many steps; else as cheap as may be."),
    ] = None,
    hardware: Hardware = None,
    timeout: Timeout = DEFAULT_TIMEOUT_S,
    wait: Wait = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Paint a picture from a prompt, other pictures, or both; prints the path of every picture written."""
    from inkwell.cli import asking, painting, values

    destination = painting.destination(output, count * batches)
    if json and destination.stdout:
        raise typer.BadParameter("stdout cannot carry both the picture and --json", param_hint="--output")
    if [image, mask].count("-") > 1:
        raise typer.BadParameter("stdin ('-') can be read only once", param_hint="--mask")
    width, height = values.size(size)
    given = asking.Given(
        prompt=prompt,
        image=values.picture(image, "--image"),
        mask=values.picture(mask, "--mask"),
        controls=[values.picture_with_settings(each, values.CONTROL_SETTINGS, "--control") for each in control or ()],
        image_prompts=[
            values.picture_with_settings(each, values.IMAGE_PROMPT_SETTINGS, "--image-prompt")
            for each in image_prompt or ()
        ],
        loras=[values.lora(each) for each in lora or ()],
        parts={
            "inpaint": {
                "inverted": invert_mask,
                "blur_px": mask_blur,
                "crop_padding_px": inpaint_padding,
                "fill": fill,
            },
            "outpaint": values.outpaint(outpaint),
            "hires": {
                **values.hires(hires),
                "upscaler": hires_upscaler,
                "strength": hires_strength,
                "step_count": hires_steps,
            },
            "refiner": {"model": refiner, "switch_at": switch_at},
            "sampling": {
                **values.sigmas(sigmas),
                "timesteps": values.numbers(timesteps, int, "--timesteps") if timesteps is not None else None,
                "timestep_spacing": spacing,
                "prediction_type": prediction_type,
                "eta": eta,
            },
            "perturbed_attention": {"scale": pag, "adaptive_scale": pag_adaptive},
            "variation": {"seed": variation_seed, "strength": variation_strength},
            "vae": {"name": vae, "tiled": vae_tiled, "upcast": vae_upcast},
        },
        plain={
            "negative_prompt": negative,
            "model": model,
            "width": width,
            "height": height,
            "steps": steps,
            "guidance_scale": guidance,
            "scheduler": scheduler,
            "seed": seed,
            "strength": strength,
            "guidance_rescale": guidance_rescale,
            "freeu": values.freeu(freeu),
            "clip_skip": clip_skip,
            "prompt_syntax": {True: PromptSyntax.PLAIN, False: PromptSyntax.WEIGHTED, None: None}[plain_prompt],
            "styles": style,
            "wildcard_seed": wildcard_seed,
            "image_count": count if count > 1 else None,
            "batch_count": batches if batches > 1 else None,
            "media_type": destination.media_type,
            "quality": quality,
            "preview_method": preview_method,
            "preview_interval": preview_interval,
        },
    )
    what, options = asking.combined(given, like)
    try:
        call(
            lambda client: painting.run(client, what, options, destination, as_json=json, quiet=quiet, preview=preview),
            connect(address, hardware=hardware, timeout_s=timeout, wait_for_ready_s=wait),
        )
    except InkwellError as error:
        # What is an argument of the commands that read, image.content, is an option here.
        error.fields = tuple(
            FieldViolation(each.field.removesuffix(".content"), each.description) for each in error.fields
        )
        raise
