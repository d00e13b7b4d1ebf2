"""How stages come to run: cached, in processes of their own, and with a reason why.

- `explanation`: Why a stage is found in the store, or has to run.
- `messages`: What a process that computes a stage tells the one that waits for it, and how it ends.
- `prefect_cache`: Stages as Prefect tasks: a task run is Cached exactly when the store holds the
  artifact.
- `ranks`: One stage computed by several processes together, as torchrun and accelerate start them.
- `usage`: What the processes of long stages take of the machine, sampled while they compute.
- `worker_pool`: Stages compute in processes of their own: several at once, and none disturbs
  another.
"""
