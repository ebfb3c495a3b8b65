"""Tests of distdl.nn, named after the promise they keep."""
