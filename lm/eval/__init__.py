"""What trained parameters can do: teacher-forced scores of answers and of held-out text."""
