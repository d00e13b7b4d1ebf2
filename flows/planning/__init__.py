"""What a run will take, and whether it can work, before anything is computed.

- `forecast`: The dry run: sizes of every variant, what is in the store already, time and memory to
  come.
- `machine_rates`: How fast this machine is, measured for a moment, in what stages are made of.
- `needs`: What each stage takes of memory and disk, from shapes alone; and whether this machine has
  it.
- `on_paper`: The dry run for another machine, from a model's config alone: hours, memory, and what
  streams.
- `preflight`: What can be known to fail is refused before anything is computed.
- `stage_arithmetic`: Seconds of a stage of which no earlier run is known, from its shapes and this
  machine's rates.
"""
