"""The Trainer's own arguments that would silently do something else here than they say, each with its reason."""

from transformers import TrainingArguments

from finetune.arguments import UserError

# Why, after the argument and its value. All of them are off by default.
REFUSED = {
    "push_to_hub": "it would upload files that are not whole; when the run is done, `hf upload REPO OUTPUT_DIR`",
    "enable_jit_checkpoint": "its checkpoint would not be complete, and the run would count as finished; leave it out, "
    "a run that is killed goes on from the last of --save_steps",
    "save_only_model": "a run could not go on from such a checkpoint; leave it out",
    "save_on_each_node": "a checkpoint counts once process 0 has marked it; give an --output_dir that all nodes share",
    "ignore_data_skip": "a run that goes on would read the same rows again; leave it out",
    "auto_find_batch_size": "another batch is another run; lower --per_device_train_batch_size and raise "
    "--gradient_accumulation_steps",
    "bf16_full_eval": "it would round the weights that are saved after the evaluation; --bf16 evaluates in bf16, too",
    "fp16_full_eval": "it would round the weights that are saved after the evaluation; --fp16 evaluates in fp16, too",
    "label_smoothing_factor": "the held-out loss would be smoothed as well, and its exponential no perplexity",
    "use_liger_kernel": "it has no kernels for landmark attention and asks the model for what it does not know",
}


def refuse_arguments(run: TrainingArguments) -> None:
    """Raises `UserError` for an argument of `REFUSED` that is given, and for a best model that could not be saved."""
    for name, why in REFUSED.items():
        if value := getattr(run, name, None):
            raise UserError(f"--{name} {value}: {why}")
    if not run.load_best_model_at_end:
        return
    if run.metric_for_best_model not in ("loss", "eval_loss"):
        raise UserError(f"--metric_for_best_model {run.metric_for_best_model}: only the loss is measured; give loss")
    if run.save_strategy == "steps" and run.eval_steps != run.save_steps:
        raise UserError(
            f"--eval_steps {run.eval_steps:g}, --save_steps {run.save_steps:g}: a best model that was not saved could "
            "not be loaded; with --load_best_model_at_end give the same for both"
        )
