"""One run from labelled lines to a served model."""

import json
import logging
import math
import os
import shutil
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
import transformers
from rich.console import Console
from transformers import PrinterCallback, TrainerCallback, TrainingArguments

from services.ocr.finetune import base as bases
from services.ocr.finetune import output
from services.ocr.finetune.batches import Collator, Plan
from services.ocr.finetune.options import Options, Refused
from services.ocr.finetune.prepare import Material, Prepared, Say, gather
from services.ocr.finetune.trainer import (
    Clock,
    ReadingTrainer,
    drop_broken_checkpoints,
    load_state,
    reader_for,
    whole_checkpoint,
    write_json,
)

RUN = "run.json"


def run(options: Options, console: Console) -> int:
    """Do what is asked; answers the process's exit code. Raises Refused or BadFolder before anything is trained."""
    _quiet()
    torch.manual_seed(options.seed)  # loading draws what a folder lacks, such as a pooler that no reading uses
    arguments = _arguments(options)
    first = arguments.process_index == 0
    say = console.print if first else _say_nothing
    if options.batch % (arguments.world_size * options.accumulate):
        raise Refused(
            f"--batch {options.batch} does not divide into {arguments.world_size} processes x"
            f" {options.accumulate} accumulation steps"
        )
    with arguments.main_process_first(desc="reading the data"):
        material = gather(options)
        base = bases.load(options.base)
        prepared = Prepared(options, base, material, say)
    if not options.rate:
        options = replace(options, rate=usual_rate(prepared.total))
    options, plan = _planned(options, prepared)
    with arguments.main_process_first(desc="looking for checkpoints"):
        resume = _resume(options, material, first)
    if resume == "finished":
        say(f"This run is finished: the model is in {options.output}. --restart begins anew.")
        return 0
    trainer = _trainer(options, arguments, prepared, plan, first, console)
    before = _measure(trainer, prepared)
    _say_measures(say, "before", before)
    if isinstance(resume, Path):
        trainer.restore(resume)
        say(f"Going on after step {resume.name.rpartition('-')[2]}.")
    else:
        first_cer = before.get("validation")
        if first_cer is not None and options.keep == "best":
            trainer.clock.progress.best_cer = first_cer
            trainer.remember_best()
    with _gentle_stop(trainer.clock):
        trainer.train(resume_from_checkpoint=str(resume) if isinstance(resume, Path) else None)
    _finish(options, material, prepared, trainer, before, say if first else None)
    return 0


def _finish(
    options: Options,
    material: Material,
    prepared: Prepared,
    trainer: ReadingTrainer,
    before: dict[str, float],
    say: Say | None,
) -> None:
    """Measure the chosen weights in all processes; write them as a model in the one that may say so."""
    chosen = trainer.state.global_step
    if options.keep == "best" and prepared.validation is not None:
        trainer.wait_for_others()
        load_state(trainer.reader, _best_path(options))
        chosen = trainer.clock.progress.best_step
    after = _measure(trainer, prepared)
    if say is None:
        return
    measures = [
        output.Measure(item.name, len(item.texts), before[item.name], after[item.name]) for item in prepared.measured()
    ]
    facts = output.Facts(
        data=[(s.name, len(s.rows), len({r.writer for r in s.rows if r.writer})) for s in material.split.train],
        held_out=prepared.held_out,
        learned=prepared.learned,
        added="".join(prepared.vocabulary.added),
        dropped="".join(prepared.vocabulary.dropped),
        steps=trainer.state.global_step,
        best_step=chosen,
        minutes=trainer.clock.progress.elapsed / 60,
        measures=measures,
    )
    prepared.base.model = trainer.reader
    output.write(prepared.base, options, facts, prepared.longest)
    state = json.loads((options.training / RUN).read_text("utf-8"))
    write_json(options.training / RUN, {**state, "finished": not trainer.clock.stop_asked})
    _conclude(say, options, measures, chosen, trainer.clock)


def _say_nothing(*_: object, **__: object) -> None:
    pass


def usual_rate(parameters: int) -> float:
    """5e-5 for TrOCR-base (334 million parameters), more for smaller models: by the root of their size, up to 4e-4."""
    return float(min(4e-4, 5e-5 * math.sqrt(334e6 / parameters)))


def _planned(options: Options, prepared: Prepared) -> tuple[Options, Plan]:
    lines = sum(len(source.tokens) for source in prepared.sources)
    steps = options.steps
    if not steps:
        # With a limit of time the clock ends the run, whatever this says.
        steps = 1_000_000 if options.minutes else max(100, math.ceil(options.epochs * lines / options.batch))
    options = replace(options, steps=steps, warmup=min(options.warmup, max(1, steps // 10)))
    plan = Plan(prepared.sources, prepared.shares, batch=options.batch, steps=steps, seed=options.seed)
    return options, plan


def _resume(options: Options, material: Material, first: bool) -> Path | str | None:
    """The checkpoint to go on from, "finished", or None; raises Refused if the folder holds another run."""
    folder = options.training
    state = folder / RUN
    if options.restart and first:
        for name in ("checkpoints", "logs", RUN, "best.safetensors"):
            path = folder / name
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
    wanted = json.loads(json.dumps(options.fingerprint(material.everything)))
    found = None if options.restart or not state.exists() else json.loads(state.read_text("utf-8"))
    checkpoint = None if options.restart else whole_checkpoint(folder / "checkpoints")
    if found and (checkpoint or found["finished"]):
        there = found["settings"]
        differing = [name for name in wanted if wanted[name] != there.get(name)]
        if differing:
            raise Refused(
                f"{folder} holds a run with other settings:",
                *(f"  {name}: {there.get(name)!r} there, {wanted[name]!r} now" for name in differing),
                "Give the same settings to go on with it, another --output, or --restart to throw it away.",
            )
        if found["finished"] and options.output.exists():
            return "finished"
    if options.output.exists() and not (found or state.exists()) and not options.restart:
        raise Refused(f"{options.output} exists and no run of this tool made it; give another --output, or --restart")
    if first:
        folder.mkdir(parents=True, exist_ok=True)
        drop_broken_checkpoints(folder / "checkpoints")
        write_json(state, {"finished": False, "settings": wanted})
    return checkpoint


def _arguments(options: Options) -> TrainingArguments:
    on_gpu = torch.cuda.is_available() or (hasattr(torch, "xpu") and torch.xpu.is_available())
    world = int(os.environ.get("WORLD_SIZE", "1"))
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(options.training / "logs")
    return TrainingArguments(
        output_dir=str(options.training / "checkpoints"),
        use_cpu=not on_gpu,
        ddp_backend="nccl" if torch.cuda.is_available() else "gloo" if world > 1 else None,
        ddp_find_unused_parameters=False,
        bf16=options.precision == "bf16",
        fp16=options.precision == "fp16",
        per_device_train_batch_size=max(1, options.batch // (world * options.accumulate)),
        gradient_accumulation_steps=options.accumulate,
        learning_rate=options.rate or 1e-4,
        weight_decay=options.weight_decay,
        adam_beta2=0.98,
        optim="adamw_torch_fused",
        max_grad_norm=1.0,
        max_steps=options.steps or 1_000_000,
        num_train_epochs=1,
        eval_strategy="no",  # the clock asks
        save_strategy="no",
        save_total_limit=2,
        logging_steps=10 if options.steps and options.steps < 500 else 50,
        logging_nan_inf_filter=False,
        report_to=["tensorboard"] if _has_tensorboard() else [],
        disable_tqdm=True,
        dataloader_num_workers=options.workers,
        remove_unused_columns=False,
        average_tokens_across_devices=True,
        seed=options.seed,
        data_seed=options.seed,
    )


def _has_tensorboard() -> bool:
    from importlib.util import find_spec

    return find_spec("tensorboard") is not None


def _trainer(
    options: Options, arguments: TrainingArguments, prepared: Prepared, plan: Plan, first: bool, console: Console
) -> ReadingTrainer:
    base = prepared.base
    arguments.learning_rate, arguments.max_steps = options.rate, options.steps
    clock = Clock(
        steps=options.steps,
        seconds=options.minutes * 60,
        evaluations=options.evaluations,
        save_seconds=options.save_minutes * 60,
        warmup=options.warmup,
        patience=options.patience,
    )
    special = set(base.tokenizer.all_special_ids)
    collator = Collator(
        sources=prepared.sources,
        processor=base.processor,
        channels=base.channels,
        start_id=base.start_id,
        pad_id=base.pad_id,
        fillers=np.array([token for token in range(len(base.tokenizer)) if token not in special]),
        seed=options.seed,
        strength=options.strength,
        token_noise=options.token_noise,
    )
    if not first:
        arguments.report_to = []
    trainer = ReadingTrainer(
        model=base.model,
        args=arguments,
        train_dataset=plan,
        data_collator=collator,
        clock=clock,
        still=bases.still_modules(base.model, learn_statistics=options.learn_statistics or options.scratch),
        label_smoothing=options.label_smoothing,
        average=options.average,
        validation=prepared.validation,
        read=reader_for(
            base.processor,
            base.tokenizer,
            base.model.generation_config,
            rank=arguments.process_index,
            world=arguments.world_size,
            max_length=min(base.position_limit, prepared.longest + 8),
        ),
        best_path=_best_path(options),
    )
    trainer.remove_callback(PrinterCallback)
    if first:
        trainer.add_callback(_Show(console, clock, options))
    if arguments.use_cpu:
        # Twice as fast on processors in bfloat16 as the fused kernel, which is made for long sequences.
        base.model.encoder.set_attn_implementation("eager")
    base.model.encoder.to(memory_format=torch.channels_last)
    if options.compile_encoder:
        base.model.encoder.compile()
    return trainer


class _Show(TrainerCallback):  # type: ignore[misc]
    """Tells how training goes, a line at a time."""

    def __init__(self, console: Console, clock: Clock, options: Options) -> None:
        self.console, self.clock, self.options = console, clock, options

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if not logs or ("loss" not in logs and "eval_cer" not in logs):
            return
        of = "" if self.options.minutes else f"/{self.options.steps}"
        where = f"step {state.global_step}{of} · {self.clock.progress.elapsed / 60:.1f} min · {self.clock.share:.0%}"
        if "loss" in logs:
            text = f"{where} · loss {logs['loss']:.4f} · rate {logs['learning_rate']:.2e}"
        else:
            mark = " (best so far)" if self.clock.progress.stale == 0 else ""
            text = f"{where} · CER {logs['eval_cer']:.4f}{mark}"
        self.console.print(text, highlight=False, soft_wrap=True)


def _measure(trainer: ReadingTrainer, prepared: Prepared) -> dict[str, float]:
    return {item.name: trainer.error_rate(item) for item in prepared.measured()}


def _say_measures(say: Say, when: str, measures: dict[str, float]) -> None:
    for name, cer in measures.items():
        say(f"CER {when:<8}{cer:.4f}  {name}", highlight=False)


def _conclude(say: Say, options: Options, measures: Sequence[output.Measure], chosen: int, clock: Clock) -> None:
    say("")
    for m in measures:
        say(
            f"CER {m.before:.4f} before, {m.after:.4f} after: {m.name}, {m.lines} lines",
            highlight=False,
            soft_wrap=True,
        )
    if chosen == 0:
        say("No checkpoint read the validation lines better than the base did: the folder holds the base's weights.")
    if clock.stop_asked:
        say("Stopped before its end when asked to; the same command goes on from here.")
    say(f"The model is in {options.output} (weights of step {chosen}).", soft_wrap=True)
    say(f"Curves: tensorboard --logdir {options.training / 'logs'}", soft_wrap=True)
    say("Serve it:", soft_wrap=True)
    models = json.dumps({options.output.name: str(options.output.resolve())})
    say(f"  INKWELL_OCR_MODELS='{models}' python -m services.ocr", highlight=False, soft_wrap=True)
    say(f"or, where one runs with INKWELL_OCR_MODEL_FOLDER={options.output.resolve().parent}:", soft_wrap=True)
    say(f"  inkwell models load {options.output.name}", highlight=False, soft_wrap=True)


def _best_path(options: Options) -> Path:
    return options.training / "best.safetensors"


@contextmanager
def _gentle_stop(clock: Clock) -> Iterator[None]:
    """Within it the first SIGINT or SIGTERM ends the training after the step under way; the second acts as usual."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def stop(number: int, frame: FrameType | None) -> None:
        clock.stop_asked = True
        signal.signal(number, before[signal.Signals(number)])

    for number in before:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _quiet() -> None:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("accelerate").setLevel(logging.ERROR)
