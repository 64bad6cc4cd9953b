"""Whether a run could start: checks of the machine, the configuration and everything it names. Nothing is written."""

from collections.abc import Sequence

from anarchobot.preflight import installation
from anarchobot.preflight.check import CheckResult, Context, run_checks
from anarchobot.system.blas import load_fast_blas


def verify(
    path: str, overrides: Sequence[str] = (), *, calibrate: bool = True, name: str | None = None
) -> list[CheckResult]:
    """Runs the checks of the command that the configuration is for: pretrain, sft, dpo, grpo or adapt-vocab.

    Checks that depend on a failed one are skipped. `calibrate` measures a few training steps to predict the run's time.
    `name`: how advice refers to the configuration (default: by its path).
    """
    context, unavailable = Context(path, overrides, calibrate, name or path), set[str]()
    results = list(run_checks((installation.python, installation.packages), context, unavailable))
    if "packages" in unavailable:
        return [*results, CheckResult("all others", "skip", "needs: packages")]
    load_fast_blas()  # before the modules below import MLX
    from anarchobot.preflight import data, run, settings

    run_folder = (run.save_dir, run.disk, settings.schedule, run.memory, run.run_time)
    tuning = (
        settings.tuning_configuration, installation.optional_packages, run.device, run.blas, data.conversations,
        *run_folder,
    )  # fmt: skip
    checks = {
        "pretrain": (
            settings.configuration, settings.required_fields, installation.optional_packages, run.device, run.blas,
            data.tokenizer, data.dataset, data.shards, data.model_and_data, run.save_dir, run.resumed_run,
            *run_folder[1:],
        ),
        "sft": tuning,
        "dpo": tuning,
        "grpo": tuning,
        "adapt-vocab": (
            settings.adapt_configuration, installation.optional_packages, data.source_model, data.corpus, run.run_root,
            settings.learning_rate,
        ),
    }  # fmt: skip
    return results + list(run_checks(checks[settings.command_for(context)], context, unavailable))
