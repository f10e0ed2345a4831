"""Training: the optimiser, the pure step, populations of replicas, checkpoints, and the loop around
them.
"""
