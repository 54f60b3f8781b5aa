"""Importance: hooks that reduce activations on the spot (collect), and the artefact that holds the result (scores)."""
