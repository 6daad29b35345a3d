"""`evaluate`: public benchmarks through lm-evaluation-harness."""

from __future__ import annotations

from pathlib import Path

from pkm_lightning.cli.command_keys import EVALUATION_KEYS
from pkm_lightning.cli.evaluation import locate, names_pretrained
from pkm_lightning.cli.evaluation_results import keep_in_run, show, write_json
from pkm_lightning.cli.job import Job, log_to_stderr, plain
from pkm_lightning.cli.loading import load_of_job
from pkm_lightning.inference.harness_settings import read_settings
from pkm_lightning.storage import check_target, is_stream


def run(job: Job) -> None:
    """Scores a model on `tasks`; writes the harness's JSON, TensorBoard scalars and run.json, and prints a table."""
    asked = plain(job.config)
    settings = read_settings(**{key: asked[key] for key in EVALUATION_KEYS})
    folder, _ = locate(job)
    path = Path(asked["out"] or (folder or Path.cwd()) / "evaluation.json")
    check_target("out", path)  # before minutes of answering
    if is_stream(path):
        log_to_stderr()
    # An extra, which takes a second to import.
    from pkm_lightning.data.base import begin_ids
    from pkm_lightning.inference.harness import HarnessModel
    from pkm_lightning.inference.harness_results import run_tasks, scores_of
    from pkm_lightning.inference.harness_tasks import load_tasks

    loaded = load_of_job(job, reads=EVALUATION_KEYS)
    codec = loaded.codec()
    tasks = load_tasks(settings.tasks, tasks_dir=settings.tasks_dir, num_fewshot=settings.num_fewshot)
    model = HarnessModel(
        loaded.model,
        codec,
        context=loaded.context,
        device=loaded.device,
        batch_size=settings.batch_size,
        # Trainings here put no token before a text, whatever a tokenizer of the user's does elsewhere.
        **(begin_ids(codec) if names_pretrained(job) else {}),
    )
    results = run_tasks(model, tasks, limit=settings.limit)
    scores = scores_of(results)
    write_json(path, results, loaded, settings)
    if folder is not None:
        keep_in_run(folder, loaded, scores, results)
    if not is_stream(path):  # who reads it reads the JSON and nothing else
        print(f"evaluate {loaded.path}")
        show(scores)
        print(f"written to {path}")
