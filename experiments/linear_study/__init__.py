"""The study of `experiments.linear`: a federation whose optimum is known in closed form."""
