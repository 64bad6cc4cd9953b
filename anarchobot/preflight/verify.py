"""Whether a run could begin: a table of checks of the machine, the configuration and all that it names."""

from collections.abc import Sequence

from anarchobot.preflight.check import Check, Machine, Setup, asked
from anarchobot.preflight.installation import EXTRAS, FIRST
from anarchobot.system.blas import load_fast_blas


def verify(
    path: str,
    overrides: Sequence[str] = (),
    *,
    calibrate: bool = True,
    machine: Machine | None = None,
) -> list[Check]:
    """The checks of a configuration for pretrain, sft, dpo or adapt-vocab, told by its sections. Nothing is written.

    What depends on a check that failed is skipped. `calibrate`: a few training steps are measured, for the run's time.
    """
    setup, lost = Setup(path, overrides, machine or Machine(), calibrate), set[str]()
    checks = list(asked(FIRST, setup, lost))
    if "packages" in lost:
        return [*checks, Check("all others", "skip", "needs: packages")]
    load_fast_blas()  # before MLX, which some of the next lines import
    from anarchobot.preflight import data, run, settings

    of_run = (run.SAVE_DIR, run.DISK, settings.SCHEDULE, run.MEMORY, run.TIME)
    tuning = (settings.TUNING_CONFIGURATION, EXTRAS, run.DEVICE, run.BLAS, data.ROWS, *of_run)
    questions = {
        "pretrain": (
            settings.CONFIGURATION, settings.REQUIRED, EXTRAS, run.DEVICE, run.BLAS, data.TOKENIZER, data.DATASET,
            data.SHARDS, data.MODEL_AND_DATA, run.SAVE_DIR, run.RESUMED_RUN, *of_run[1:],
        ),
        "sft": tuning,
        "dpo": tuning,
        "adapt-vocab": (
            settings.ADAPT_CONFIGURATION, EXTRAS, data.SOURCE_MODEL, data.CORPUS, run.RUN_ROOT, settings.PAPERS_RATE,
        ),
    }  # fmt: skip
    return checks + list(asked(questions[settings.kind_of(setup)], setup, lost))
