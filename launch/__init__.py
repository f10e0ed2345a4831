"""Where work runs: engines that know argument lists and files, and nothing of models."""
