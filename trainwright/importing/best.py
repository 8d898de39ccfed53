"""Which model is the best one: ``metric_for_best_model``, ``greater_is_better`` and ``load_best_model_at_end``."""

from __future__ import annotations

from trainwright.importing.findings import Reading

HIGHER = (
    "f1", "accuracy", "acc", "precision", "recall", "auroc", "auc", "roc_auc", "average_precision", "map", "mrr", "ndcg", "r2",
    "iou", "mean_iou", "dice", "bleu", "sacrebleu", "rouge", "rouge1", "rouge2", "rougel", "rougelsum", "meteor", "chrf",
    "bertscore", "matthews_correlation", "mcc", "exact_match", "em", "pearson", "spearmanr", "spearman", "top_5", "top_1",
    "f1_macro", "f1_micro", "f1_weighted", "macro_f1", "micro_f1", "weighted_f1", "balanced_accuracy", "specificity",
    "sensitivity", "score", "pass@1", "win_rate", "reward",
)  # fmt: skip
LOWER = (
    "loss", "perplexity", "ppl", "mse", "rmse", "mae", "mape", "wer", "cer", "ter", "error", "error_rate", "eer", "brier",
    "calibration_error", "ece", "fid", "nll", "bits_per_byte",
)  # fmt: skip
# Our names of metrics that are often called otherwise.
OURS = {"acc": "accuracy", "auc": "auroc", "roc_auc": "auroc", "ppl": "perplexity", "ece": "calibration_error",
        "mean_iou": "iou", "macro_f1": "f1_macro", "micro_f1": "f1_micro", "weighted_f1": "f1_weighted"}  # fmt: skip
OF_TEXT = ("loss", "perplexity")


def of_arguments(reading: Reading) -> None:
    """``evaluation.best``, in the metric's true direction where that is known; what the file says otherwise is told."""
    metric, loads = reading.word("metric_for_best_model"), reading.flag("load_best_model_at_end")
    greater = reading.flag("greater_is_better")
    about = "evaluation.best"
    if metric is None and not loads:
        if greater is not None:
            reading.tell("note", "greater_is_better", "no metric_for_best_model, so it has no effect")
        return
    if reading.said["evaluation.every"].value is None:
        what = "no evaluation during the training (eval_strategy no), so there is no best model"
        for key in ("metric_for_best_model", "greater_is_better", "load_best_model_at_end"):
            if reading.get(key) is not None:
                reading.tell(
                    "error" if loads else "warning", key, what, "set evaluation.every and evaluation.best", about="evaluation"
                )
        return
    given = (metric or "loss").removeprefix("eval_")
    plain = OURS.get(given.lower(), given.lower())
    known = plain if plain in (*HIGHER, *LOWER) else given
    direction = _direction(reading, given, plain, greater)
    key = "metric_for_best_model" if metric else "load_best_model_at_end"
    reading.say(about, {"metric": known, "direction": direction}, key)
    for other in ("metric_for_best_model", "load_best_model_at_end", "greater_is_better"):
        if reading.get(other) is not None:
            reading.used[other] = about
    if not loads:
        what = "load_best_model_at_end isn't set, so transformers keeps the last model and the metric chooses nothing"
        what += "; here the best one is kept"
        reading.tell("warning", "metric_for_best_model", what, "remove evaluation.best to keep the last one", about)
    if known not in OF_TEXT:
        what = f"{known} is measured on images, tables and arrays; text has loss and perplexity, and refuses others"
        fix = "for text write {metric: loss, direction: minimize}"
        reading.tell("warning", "metric_for_best_model", what, fix, about)
    _rhythm(reading, bool(loads))


def _direction(reading: Reading, given: str, plain: str, greater: bool | None) -> str:
    about = "evaluation.best"
    if plain in HIGHER or plain in LOWER:
        right = "maximize" if plain in HIGHER else "minimize"
        kind = "a score: more is better" if plain in HIGHER else "an error: less is better"
        if greater is not None and greater is not (plain in HIGHER):
            what = f"{str(greater).lower()} with {given}, which is {kind}; so it keeps the worst model"
            reading.tell("warning", "greater_is_better", what, f"here it is {right}", about)
        elif greater is None and given.endswith("loss") is (plain in HIGHER):
            what = f"not in the file, and transformers would take more of {given} for better; it is {kind}"
            reading.tell("warning", "greater_is_better", what, f"here it is {right}", about)
        return right
    if greater is None:
        greater = not given.endswith("loss")
        what = f"not in the file, so transformers guesses that {'more' if greater else 'less'} of {given} is better"
        reading.tell("warning", "greater_is_better", what, "look whether that is so", about)
    return "maximize" if greater else "minimize"


def _rhythm(reading: Reading, loads: bool) -> None:
    """transformers can only load a best model that it happened to save."""
    evaluated, saved = reading.said["evaluation.every"].value, reading.said["checkpoint.every"].value
    if reading.get("save_strategy") == "best" or evaluated == saved:
        return
    if isinstance(evaluated, int) and isinstance(saved, int) and saved % evaluated == 0:
        what = f"saved every {saved} steps, evaluated every {evaluated}: only those saved could be the best there"
        reading.tell("note", "save_steps", what, "here the best of all evaluations is kept", "checkpoint.every")
        return
    words = [f"every {every} steps" if isinstance(every, int) else {"epoch": "every epoch"}.get(str(every), "never")
             for every in (evaluated, saved)]  # fmt: skip
    what = f"evaluated {words[0]}, saved {words[1]}: the best model may not have been saved"
    what += ", so transformers refuses load_best_model_at_end" if loads else ""
    reading.tell(
        "error" if loads else "warning", "save_steps", what, "here the best of all evaluations is kept", "checkpoint.every"
    )
