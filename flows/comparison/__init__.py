"""What a sweep found: rows, tables, pictures, pages.

- `block_rows`: What a plan looks like: the base model's blocks in a row, and what became of each.
- `files`: The files of a sweep's comparison, and all the comparisons in a home.
- `plots`: Pictures of a comparison.
- `report`: The report of a sweep: one HTML page that needs nothing else, and runs no script.
- `result`: The result of a sweep as data: one row per variant beside the dense model.
- `rows`: From the artifacts of a branch to its row in the comparison.
- `run_records`: From the rows of a comparison to what MLflow is told of them.
- `tables`: A comparison as tables: of texts for people, and of all its numbers.
- `terminal`: What a person sees in the terminal when a sweep has ended: the table, and where to
  look next.
"""
