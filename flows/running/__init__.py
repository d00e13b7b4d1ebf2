"""The stages of a run laid out and submitted, and what shows their progress.

- `branches`: The stages of a run, laid out before any has run: each one's artifact is known by
  then.
- `dask_scheduler`: A Dask scheduler, asked who its workers are, with a sentence for when it does
  not answer.
- `engines`: What stages run on: processes of this machine, or the workers of a Dask scheduler.
- `measures`: The stages that measure a model, as a config says: quality, and speed.
- `prefect_database`: The database of a Prefect server of ours: never one that another version of
  Prefect made.
- `prefect_server`: A Prefect API server for the time of one command, for those who run none.
- `progress`: What a person sees in the terminal while a sweep runs.
- `provenance`: Who ran which code, by the tags that MLflow's own pages show.
- `stage_runs`: The task runs of one sweep: submitted with what they wait for, and what became of
  each.
"""
