"""What MLflow is told: here and nowhere else is it imported.

- `logged_models`: Models as MLflow holds them: with their weights where that was asked for, else
  with their place.
- `mlflow_pages`: Addresses of MLflow's pages, and what its experiment page shows of variants:
  columns and charts.
- `quality_gate`: Whether a new result may take the place of the last accepted one, in MLflow's
  model registry.
- `receipts`: Which records a tracking server already holds, known without importing its client.
- `registry`: Versions of registered models in MLflow, and the aliases by which people find them.
- `run_record`: What a tracking server is to know of one variant, the dense model or a sweep, as
  plain data.
- `tracker`: How MLflow is told, and when: whole records, in the background, nothing twice.
- `tracking_database`: MLflow's SQLite file: it appears whole or not at all, whoever opens it first.
"""
