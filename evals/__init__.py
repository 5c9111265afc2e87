"""Evaluation of gpt-oss checkpoints: tasks, graders, statistics, records on disk and the HTML report.

Used through its command, `gptoss-eval` (`python -m evals`). It runs checkpoints through `gptoss_infer.engine` and never
imports `gptoss_train`: training and evaluation meet at a directory on disk. Importing this package imports nothing.
"""
