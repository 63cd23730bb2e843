"""Attacks that a sandbox has to withstand, and their trial: by psie's own tests, and on a user's host by `psie selftest`."""
