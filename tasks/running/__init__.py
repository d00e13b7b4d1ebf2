"""How stages come to run: cached, in processes of their own, and with a reason why.

- `explanation`: Why a stage is found in the store, or has to run.
- `prefect_cache`: Stages as Prefect tasks: a task run is Cached exactly when the store holds the
  artifact.
- `usage`: What the processes of long stages take of the machine, sampled while they compute.
- `worker_pool`: Stages compute in processes of their own: several at once, and none disturbs
  another.
"""
