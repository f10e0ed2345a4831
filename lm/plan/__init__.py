"""`lm plan`: what a study would take on accelerators that are not here.

`topology` names them, `estimate` says by arithmetic what a cell takes, `compile` has the compiler
say it, `hlo` reads collectives from what it made, and `search` finds a setting that fits. The verb
is `experiments.plan`, since it reads a study.
"""
