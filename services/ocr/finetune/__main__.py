"""`python -m services.ocr.finetune --data DIR --output DIR`: teach a model, then print the line that serves it."""

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from services.ocr.settings import Settings

Data = Annotated[
    list[str] | None,
    typer.Option(
        help="folder with labels.tsv (columns file, text, and writer if known); DIR=0.3 gives it that share of every"
        " batch; may be given several times"
    ),
]


def command(
    output: Annotated[
        Path, typer.Option(help="folder that gets the model; logs and checkpoints go to OUTPUT.training")
    ],
    data: Data = None,
    dataset: Annotated[
        list[str] | None,
        typer.Option(help="Hugging Face dataset: folder of save_to_disk, parquet, or owner/name@revision; =share too"),
    ] = None,
    base: Annotated[str, typer.Option(help="model to start from: a folder or owner/name@revision")] = "",
    freeze: Annotated[str, typer.Option(help="none, encoder, decoder, or all-but-top-N (decoder layers)")] = "none",
    vocabulary: Annotated[
        Literal["keep", "extend", "replace"],
        typer.Option(
            help="characters the data has and the model lacks: leave those lines out, add them, or begin anew"
        ),
    ] = "extend",
    scratch: Annotated[bool, typer.Option(help="begin with random weights, as a yardstick")] = False,
    minutes: Annotated[float, typer.Option(min=0, help="stop after so long; 0: no limit")] = 0,
    steps: Annotated[int, typer.Option(min=0, help="steps of training; 0: by --epochs or --minutes")] = 0,
    epochs: Annotated[float, typer.Option(min=0.01, help="how often each line is seen, at least 100 steps")] = 30,
    batch: Annotated[int, typer.Option(min=1, help="lines of a step, over all processes and accumulations")] = 16,
    accumulate: Annotated[int, typer.Option(min=1, help="parts a step's lines are computed in, to save memory")] = 1,
    rate: Annotated[float, typer.Option(min=0, help="peak learning rate; 0: by the model's size")] = 0,
    warmup: Annotated[int, typer.Option(min=0, help="steps to the peak rate, at most a tenth of all")] = 100,
    weight_decay: Annotated[float, typer.Option(min=0)] = 0.05,
    label_smoothing: Annotated[float, typer.Option(min=0, max=0.5)] = 0.02,
    token_noise: Annotated[
        float, typer.Option(min=0, max=0.5, help="share of characters the decoder is told wrongly while it learns")
    ] = 0.06,
    augment: Annotated[bool, typer.Option("--augment/--no-augment", help="distort the lines at random")] = True,
    strength: Annotated[float, typer.Option(min=0, max=2, help="of the distortion")] = 1.0,
    learn_statistics: Annotated[
        bool, typer.Option(help="let batch normalisations learn their statistics; for thousands of lines")
    ] = False,
    average: Annotated[
        float, typer.Option(min=0, max=0.99999, help="averaging of the weights, a step; 0: none")
    ] = 0.998,
    precision: Annotated[
        Literal["auto", "fp32", "bf16", "fp16"], typer.Option(help="auto: bf16 where the hardware computes in it")
    ] = "auto",
    validation: Annotated[
        list[str] | None, typer.Option(help="folder read to choose the best weights; default: a part of the data")
    ] = None,
    validation_share: Annotated[
        float, typer.Option(min=0, max=0.5, help="part of the data held out: whole writers if known; 0: none")
    ] = 0.1,
    validation_writers: Annotated[str, typer.Option(help="hold out these writers, separated by commas")] = "",
    validation_lines: Annotated[int, typer.Option(min=0, help="read at most so many of them; 0: all")] = 200,
    test: Annotated[
        list[str] | None, typer.Option(help="folder read before and after, never used to choose; several allowed")
    ] = None,
    patience: Annotated[
        int, typer.Option(min=0, help="stop after so many evaluations without a better CER; 0: never")
    ] = 5,
    evaluations: Annotated[int, typer.Option(min=1, help="how often the validation lines are read")] = 15,
    keep: Annotated[
        Literal["best", "last"], typer.Option(help="the weights that read best, or the last ones")
    ] = "best",
    save_minutes: Annotated[float, typer.Option(min=0.05, help="minutes between checkpoints")] = 5,
    weights: Annotated[Literal["float16", "float32"], typer.Option(help="type of the weights written")] = "float16",
    language: Annotated[list[str] | None, typer.Option(help="language tag for the model card, such as de")] = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    workers: Annotated[int, typer.Option(min=0, help="processes that prepare lines; 0: in the training process")] = 0,
    compile_encoder: Annotated[
        bool, typer.Option("--compile", help="compile the encoder: pays after some minutes; needs a C++ compiler")
    ] = False,
    restart: Annotated[bool, typer.Option(help="throw away what an earlier run left in OUTPUT.training")] = False,
    cache: Annotated[Path | None, typer.Option(help="folder of resized lines; default OUTPUT.training/cache")] = None,
    split: Annotated[str, typer.Option(help="split of a dataset")] = "train",
    image_column: Annotated[str, typer.Option(help="of a dataset")] = "image",
    text_column: Annotated[str, typer.Option(help="of a dataset")] = "text",
    writer_column: Annotated[str, typer.Option(help="of a dataset, if it has one")] = "writer",
) -> None:
    """Teach a TrOCR model from labelled lines. The same command goes on where a killed run stopped."""
    if not data and not dataset:
        print("--data: give a folder with labels.tsv, or --dataset", file=sys.stderr)
        raise typer.Exit(2)

    # Late: they take seconds, and `--help` should not.
    from services.ocr.evaluate import BadFolder
    from services.ocr.finetune.options import Options, Refused
    from services.ocr.finetune.precision import resolve
    from services.ocr.finetune.rows import DatasetColumns
    from services.ocr.finetune.run import run
    from services.runtimes.checkpoints import CheckpointError

    settings = Settings()
    source = base or settings.default_model_name
    try:
        options = Options(
            data=tuple(data or ()),
            dataset=tuple(dataset or ()),
            columns=DatasetColumns(split, image_column, text_column, writer_column),
            output=output,
            base=settings.models.get(source, source),
            validation=tuple(validation or ()),
            validation_share=validation_share,
            validation_writers=tuple(name.strip() for name in validation_writers.split(",") if name.strip()),
            validation_lines=validation_lines,
            test=tuple(test or ()),
            freeze=freeze,
            vocabulary=vocabulary,
            scratch=scratch,
            steps=steps,
            epochs=epochs,
            minutes=minutes,
            batch=batch,
            accumulate=accumulate,
            rate=rate,
            warmup=warmup,
            weight_decay=weight_decay,
            label_smoothing=label_smoothing,
            token_noise=token_noise,
            strength=strength if augment else 0.0,
            learn_statistics=learn_statistics,
            average=average,
            precision=resolve(precision),
            patience=patience,
            evaluations=evaluations,
            keep=keep,
            save_minutes=save_minutes,
            weights=weights,
            languages=tuple(language or ()),
            seed=seed,
            workers=workers,
            compile_encoder=compile_encoder,
            restart=restart,
            cache=cache,
        )
        code = run(options, Console())
    except (BadFolder, Refused) as bad:
        for problem in bad.problems:
            print(problem, file=sys.stderr)
        raise typer.Exit(2) from None
    except CheckpointError as error:
        print(error, file=sys.stderr)
        raise typer.Exit(2) from None
    raise typer.Exit(code)


def main() -> None:
    """Entry point."""
    typer.run(command)


if __name__ == "__main__":
    main()
