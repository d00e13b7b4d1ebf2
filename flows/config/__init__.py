"""The YAML of a run, read and checked.

- `config_errors`: What is wrong with a configuration: sentences that name the key and the nearest
  known one.
- `config_file`: A YAML file and `key.sub=value` overrides, read into plain data.
- `method_entries`: What a config says about methods: an entry per method, expanded to one variant
  per sparsity.
- `model_recipe`: The recipe for one model that nobody has written one for: from a few wishes to a
  config.
- `run_config`: RunConfig: the YAML of a run, and what becomes of it.
- `track_presets`: Tracks that come with foldstack, and what a config changes of them.
"""
