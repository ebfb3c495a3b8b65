"""A trained network, loaded from its checkpoint: its scores, figures and report page."""
