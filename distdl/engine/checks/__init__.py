"""Checks of a running training: equal replicas, finite numbers, ranks that are late."""
