"""Declared comparisons: what is compared, what is held equal, the runs, and a report from their folders alone.

A study is a short Python file with a function ``study(scale)`` that returns a ``Study``; those that ship with elman lie
in ``catalogue/``. ``study.py`` says what a study may declare, ``plan.py`` makes jobs of it, ``runner.py`` and
``launch.py`` run them, and ``records.py``, ``analysis.py``, ``figures.py`` and ``report.py`` tell what came of them.
"""

from elman.studies.study import Run, Scale, Study, over_tasks

__all__ = ["Run", "Scale", "Study", "over_tasks"]
