"""Evaluation: what is measured, on which data, by which metric, and how results are reported.

`evaluators` are named in a recipe or a suite, `suites` run them on checkpoints and keep results, `report` shows them.
May import `encoding`, `weights`, `runtime` and what is below them; never `training`.
"""
