"""The command line, command by command.

- `app`: The command line: `foldstack run CONFIG [key=value ...]` and its neighbours.
- `claims`: One group of servers per folder: who holds it is said, and what a killed one left is
  ended.
- `command_cache`: `foldstack cache ls | explain | gc`.
- `command_compare`: `foldstack compare`: any number of sweeps as one table, filtered, sorted, shown
  and written.
- `command_compress`: `foldstack compress`: one model made smaller, without a recipe; the same flow
  underneath.
- `command_export`: `foldstack export`: a model folder in the form that another program loads.
- `command_measure`: `foldstack evaluate` and `foldstack bench`: one model, measured like those of a
  sweep.
- `command_run`: What `foldstack run` does around the flow: a server, progress, Ctrl-C, and folders
  to find.
- `completion`: What the shell offers for a half-typed word: recipes, keys of a config, kinds of
  things.
- `held_models`: Which models in the store are the only copy of what an alias in MLflow's registry
  points to.
- `listing`: What `foldstack ls` prints: names, and a line about each.
- `output`: What a command prints: its result, alone on standard output.
- `processes`: Processes that serve: started, logged, watched over, started again when they die, and
  ended.
- `quick_imports`: Import what a command needs without Python's garbage collector.
- `servers`: `foldstack ui`: the Prefect and the MLflow server on loopback, until Ctrl-C.
"""
