"""What a sweep found: rows, tables, pictures, pages.

- `block_rows`: What a plan looks like: the base model's blocks in a row, and what became of each.
- `dataset_uses`: The texts of a sweep as MLflow's datasets: where each is from, and the digest of
  its content.
- `files`: The files of a sweep's comparison, and all the comparisons in a home.
- `findings`: What a sweep found, in words: the sentences that end a run, and that begin its page.
- `frame`: Rows as a pandas frame: typed columns, what is asked for of them, and formats of files.
- `interactive`: Pictures of comparisons that answer to the pointer: plotly figures as data, and its
  script.
- `item_table`: What a model made of each item of its benchmarks, as a table: MLflow lays those of
  several models side by side.
- `plots`: Pictures of a comparison.
- `report`: The report of a sweep, or of several: one HTML page that needs nothing else, and no
  network.
- `result`: The result of a sweep as data: one row per variant beside the dense model.
- `rows`: From the artifacts of a branch to its row in the comparison.
- `sweep_log`: From the rows of a comparison to what MLflow is told of them.
- `tables`: The columns that people look at, and tables of them: of texts, and of rounded numbers.
- `terminal`: What a person sees in the terminal when a sweep has ended: the table, and what it says
  in words.
- `unchanged`: A run of which nothing has changed since it ended: what it found is told again.
"""
