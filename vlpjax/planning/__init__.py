"""What the planner is made of: a reader of compiled programs, their cost over time, and FLOPs of a model.

Nothing here knows a run; :mod:`vlpjax.plan` puts them together.
"""
