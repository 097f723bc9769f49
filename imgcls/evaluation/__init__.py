"""How good a trained model is: scores, report, comparison. Trains nothing."""
