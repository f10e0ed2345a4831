"""Where an ability begins: tables, metrics, intervals, onsets, scaling laws and the report.

Everything here is a function of the files of a run directory. No JAX: a finished study can be
read, analysed and drawn on a machine that could never have trained it.
"""
