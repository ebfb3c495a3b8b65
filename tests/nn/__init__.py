"""Tests of distdl.nn, named after their promises."""
