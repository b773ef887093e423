"""Pure functions of a federation: local training, one round, evaluation, communication."""
