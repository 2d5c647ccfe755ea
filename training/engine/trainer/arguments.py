"""transformers' TrainingArguments from the settings of a stage."""

from transformers import TrainingArguments

from blipren.training.engine.run_folder import RunFolder


def training_arguments(
    settings, run: RunFolder, *, max_steps: int, accumulation: int, eval_steps: int | None, **changes
) -> TrainingArguments:
    """Return the Trainer's arguments. A step is an optimizer update in both.

    Args:
        settings: of a stage, with the groups of `engine/settings.py`.
        accumulation: micro-batches of a step on each process.
        eval_steps: steps between validations; None for none.
        changes: more arguments.
    """
    warmup = settings.warmup if settings.warmup >= 1 else settings.warmup * max_steps
    schedule, options = {
        "cosine": ("cosine_with_min_lr", {"min_lr_rate": settings.min_learning_rate}),
        "linear": ("linear", {}),
        "constant": ("constant_with_warmup", {}),
    }[settings.schedule]
    return TrainingArguments(
        output_dir=str(run.checkpoints),
        per_device_train_batch_size=1,
        gradient_accumulation_steps=accumulation,
        max_steps=max_steps,
        learning_rate=settings.learning_rate,
        lr_scheduler_type=schedule,
        lr_scheduler_kwargs=options,
        warmup_steps=round(warmup),
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.clip,
        logging_steps=settings.log_every,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        eval_strategy="steps" if eval_steps else "no",
        eval_steps=eval_steps,
        save_strategy="steps",
        save_steps=settings.save_every or eval_steps or max_steps,
        save_total_limit=settings.keep_checkpoints,
        report_to=settings.report_to or "none",
        seed=settings.seed,
        dataloader_num_workers=settings.workers,
        disable_tqdm=True,
        remove_unused_columns=False,
        label_names=["targets"],
        restore_callback_states_from_checkpoint=True,
        ignore_data_skip=False,
        ddp_find_unused_parameters=False,
        **changes,
    )
