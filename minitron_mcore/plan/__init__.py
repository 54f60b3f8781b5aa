"""Plans: which indices of each axis a pruned model keeps, from scores and targets."""
