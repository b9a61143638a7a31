"""Stages of commands with named outputs: what is done stays done, what was killed goes on."""
