"""`tenfold report`: the page of a sweep or study, again from what is on disk."""

from orchestration.run_folder import run_at
from orchestration.saved import study_command_of
from trainers.mirror import shown


def write_report_again(place: str) -> str:
    """Writes report.html of a sweep or study; returns where it is.

    Args:
        place: folder or URL.

    Raises:
        ValueError: it is none, or a study that has never ended.
    """
    run = run_at(place)
    if study_command_of(run) is not None:
        from orchestration.studies.report import write_study_report

        if not run.results.is_file():
            raise ValueError(f"{place}: a study must have ended once for a report, it has not")
        write_study_report(run.root)
    elif not run.plan.is_file() or not run.trials.is_dir():
        raise ValueError(
            f"{place}: must be the folder of a sweep (plan.json and trials/) or of a study, it is not"
        )
    else:
        from orchestration.report import write_report

        write_report(run)
    return shown(run.report)
