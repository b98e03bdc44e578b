"""What a person sees of a run: metric files, the clock, the live line, the environment record and the report.

Nothing is imported here, so that ``import vlpjax.observe`` costs nothing; name the module that you need
(``from vlpjax.observe.metrics import MetricWriter``).
"""
