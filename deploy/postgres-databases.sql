-- Beside the database `prefect`, which the image makes itself.
CREATE DATABASE mlflow;
